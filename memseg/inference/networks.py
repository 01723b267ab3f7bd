"""A network by its name or its run, and pictures like those it will see: what measuring and exporting begin with."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memseg.data import ClassList, SegmentationDataset, to_tensor
from memseg.data.prepare import resize_image
from memseg.data.streets import Streets
from memseg.errors import DataError, InputError
from memseg.inference.labelling import Framing
from memseg.models import SegmentedModel, build_model
from memseg.training.checkpoint import load_trained
from memseg.training.tables import DataConfig


@dataclass(frozen=True)
class Network:
    """A network in eval mode, on the CPU, in float32."""

    name: str
    model: SegmentedModel
    classes: ClassList | None = None
    """Of a run."""
    data: DataConfig | None = None
    """What a run was trained on."""
    step: int | None = None
    """Steps that a run had done."""


def load_network(name: str, *, num_classes: int = 19, checkpoint: str = "last") -> Network:
    """A run's network; else a model of that name with random weights, the same each time.

    Args:
        name: A run's folder, or one of its checkpoints; or a model, as `memseg.models.build_model` takes it.
        num_classes: Of a model that is no run.
        checkpoint: Of a run's folder: last, best, or a checkpoint's name.

    Raises:
        CheckpointError: the folder holds no run, or not that checkpoint.
        UnknownNameError: there is no such folder and no such model.
        InputError: a model of the user's cannot be made or cut into segments.
    """
    if Path(name).is_dir():
        trained = load_trained(Path(name), checkpoint)
        return Network(name, trained.model.float().eval(), trained.classes, trained.recipe.data, trained.step)
    torch.manual_seed(0)
    return Network(name, build_model(name, num_classes=num_classes).float().eval())


def sample_pictures(network: Network, size: tuple[int, int], count: int) -> tuple[Tensor, str]:
    """Pictures as the network would be given them, (count, 3, H, W), and where they are from.

    Of a run they are the first of the data set's validation split, the region that it was trained on, resized. Where
    there is no run, or its data set is not on this machine, they are generated streets.
    """
    if network.data is not None and network.data.dataset != "streets":
        with suppress(DataError, InputError):
            dataset = network.data.open_val()
            return _read(dataset, Framing.of(network.data), size, count), f"{dataset.name} {network.data.val_split}"
    return _read(Streets("val", size=size), Framing(), size, count), "generated streets"


def _read(dataset: SegmentationDataset, framing: Framing, size: tuple[int, int], count: int) -> Tensor:
    found = []
    for index in range(count):
        picture = dataset.image(index % len(dataset))
        top, bottom, left, right = framing.region_in((picture.shape[0], picture.shape[1]))
        found.append(to_tensor(resize_image(picture[top:bottom, left:right], size)))
    return torch.stack(found)
