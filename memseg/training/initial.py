"""What a run begins with, where another one has learnt already: fine-tuning at full size what was trained at half.

All is taken, running statistics too, so that frozen norms use them from the first step. It must fit exactly: a tensor
left out in silence would be trained from noise.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from memseg.errors import InputError, ProblemsError
from memseg.models import SegmentedModel
from memseg.models.weights import read_weights
from memseg.training.checkpoint import CHECKPOINTS_FOLDER, find_checkpoint, load_weights, stored_shapes

_MOST_NAMED = 5
"""Of tensors that have the same problem."""


def check_initial_weights(path: Path, model: SegmentedModel) -> None:
    """Whether `load_initial_weights` would fill this model, which may be on the meta device.

    Raises:
        InputError: nothing that can be read lies there.
        ProblemsError: not the state of this network; all that differs.
    """
    folder = _checkpoint(path)
    stored = stored_shapes(folder) if folder else {name: one.shape for name, one in _state_in(path).items()}
    if problems := _problems(stored, model):
        raise ProblemsError(f"model.initial_weights {path} must be of {model.name}", problems)


def load_initial_weights(path: Path, model: SegmentedModel) -> None:
    """Fill a model with all weights and running statistics of another run of the same network.

    Args:
        path: A run folder, whose last checkpoint is taken; the folder of a checkpoint; or a file with a state dict.
        model: Filled where it lies, whatever the precision of what is read.

    Raises:
        InputError: nothing that can be read lies there.
        ProblemsError: not the state of this network; all that differs.
    """
    check_initial_weights(path, model)
    if folder := _checkpoint(path):
        load_weights(folder, model)
    else:
        model.load_state_dict(_state_in(path))


def _checkpoint(path: Path) -> Path | None:
    """The folder of the checkpoint; None for a file."""
    if path.is_file():
        return None
    if not path.is_dir():
        raise InputError(
            f"model.initial_weights must name a run or checkpoint folder, or a state dict file, there is none at {path}"
        )
    return path if path.resolve().parent.name == CHECKPOINTS_FOLDER else find_checkpoint(path)


def _state_in(path: Path) -> Mapping[str, torch.Tensor]:
    state = read_weights(path, "a state dict of the network")
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _problems(stored: Mapping[str, torch.Size], model: SegmentedModel) -> list[str]:
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    problems = []
    if absent := [name for name in wanted if name not in stored]:
        problems.append(f"{len(absent)} of {len(wanted)} tensors are missing: {_some(absent)}")
    if unknown := [name for name in stored if name not in wanted]:
        problems.append(f"{len(unknown)} tensors are not of this network: {_some(unknown)}")
    different = [name for name in wanted if name in stored and stored[name] != wanted[name]]
    classes = {stored[name][:1] for name in different if name.split(".")[1] in model.outputs}
    if len(classes) == 1 and (first := classes.pop()):
        found = first[0]
        if found != model.num_classes:
            problems.append(f"it tells {found} classes apart, the data set has {model.num_classes}")
    problems += [
        f"{name}: has {_shape(stored[name])}, must have {_shape(wanted[name])}" for name in different[:_MOST_NAMED]
    ]
    if len(different) > _MOST_NAMED:
        problems.append(f"and {len(different) - _MOST_NAMED} more of another shape")
    return problems


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:_MOST_NAMED], *(["..."] if len(names) > _MOST_NAMED else [])])


def _shape(size: torch.Size) -> str:
    return "x".join(map(str, size)) or "a single number"
