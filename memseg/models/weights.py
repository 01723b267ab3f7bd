"""Pretrained weights: found by name or in a file, and put where they belong in an encoder.

torchvision names its weights by enum members, as DenseNet121_Weights.IMAGENET1K_V1, downloads each once into the
checkpoints folder of torch.hub, and looks there first. Its state dicts name whole networks by torchvision's members; a
network of ours says in its `origin` where each of them went, also where a block is halved or dilated. Every key of a
file is loaded, or known to be of no use here (the classifier), or the file is refused: a silent mismatch would train
from noise.

The files of torchvision's DenseNets spell members `norm.1`, `conv.1`, ...; both spellings are taken.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import torch
from torch import Tensor

from memseg.errors import InputError, ProblemsError, UnknownNameError
from memseg.models.segmented import Origin, SegmentedModel

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

_FILE_ENDINGS = (".pth", ".pt")
_COUNTER = "num_batches_tracked"
"""Files from before torch 0.4.1 count no batches; the counter is of no use with a fixed momentum."""


@dataclass(frozen=True)
class LoadReport:
    """What became of pretrained weights."""

    loaded: tuple[str, ...]
    """Keys of theirs that went into the encoder."""
    new: tuple[str, ...]
    """Segments that they do not fill, and that start from random weights."""
    ignored: tuple[str, ...]
    """Keys of theirs that no encoder has a place for: those of the classifier."""


def load_encoder(model: SegmentedModel, weights: Mapping[str, Tensor] | Path | str) -> LoadReport:
    """Fill a model's encoder with the weights of torchvision's network of the same size.

    Args:
        model: A network of ours.
        weights: A state dict of torchvision's; or as `find_weights` takes them.

    Raises:
        InputError: as `find_weights` and `read_weights`, or the model has no encoder that torchvision has weights for.
        ProblemsError: keys are missing or unknown, or shapes differ; all are named, and nothing has been changed.
    """
    chosen, report = _match(model, weights)
    model.load_state_dict(chosen, strict=False)
    return report


def check_encoder(model: SegmentedModel, weights: Mapping[str, Tensor] | Path | str) -> LoadReport:
    """What `load_encoder` would do, without doing it; the model may be on the meta device.

    Raises:
        InputError, ProblemsError: as `load_encoder`.
    """
    return _match(model, weights)[1]


def find_weights(model: SegmentedModel, weights: str, *, progress: bool = False) -> Path:
    """The file of pretrained weights: a given one, or one of torchvision's, which is downloaded where it is not there.

    Args:
        model: The network that they are for.
        weights: Path of a file; or torchvision's name for weights of the model's encoder, with or without the enum:
            "IMAGENET1K_V1", "DenseNet121_Weights.IMAGENET1K_V1", "DEFAULT". What is no file and does not end in .pth
            or .pt is such a name.
        progress: Whether torchvision shows how far a download is.

    Raises:
        InputError: there is no such file; torchvision has no weights for the model; or a download failed, and how to
            do without.
        UnknownNameError: torchvision has no weights of that name for the model.
    """
    path = Path(weights)
    if path.is_file():
        return path
    if weights.endswith(_FILE_ENDINGS):
        raise InputError(f"encoder weights must be a file or a name of torchvision's, there is no file {weights}")
    member = _member(model, weights)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / Path(urlparse(member.url).path).name
    if not path.is_file():
        try:
            member.get_state_dict(progress=progress, check_hash=True, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{type(member).__name__}.{member.name} could not be downloaded ({error}), and there is no {path.name} "
                f"in {folder}; put the file there, from {member.url}, or give the path of one in place of the name"
            ) from None
    return path


def read_weights(path: Path, what: str) -> dict[str, Tensor]:
    """The state dict in a file saved by torch.save, read with weights_only=True.

    One that lies in the file under "state_dict", as beside an optimizer's, is taken out, and names that all begin with
    "module.", as DistributedDataParallel makes them, lose that.

    Args:
        path: Of the file.
        what: It must be, in words.

    Raises:
        InputError: the file cannot be read as a state dict.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise InputError(f"{path}: must be {what} saved by torch.save, cannot be read: {reason}") from None
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping):
        raise InputError(f"{path}: must hold a state dict (names to tensors), got {type(found).__name__}")
    if others := [str(key) for key, value in found.items() if not isinstance(value, Tensor)]:
        raise InputError(f"{path}: must hold a state dict (names to tensors), but {others[0]} is no tensor")
    wrapped = all(key.startswith("module.") for key in found)
    return {key.removeprefix("module.") if wrapped else key: value for key, value in found.items()}


def _match(model: SegmentedModel, weights: Mapping[str, Tensor] | Path | str) -> tuple[dict[str, Tensor], LoadReport]:
    """Tensors by our names, and what they are."""
    origin, where = _origin(model), "encoder weights"
    if not isinstance(weights, Mapping):
        path = find_weights(model, str(weights))
        weights, where = read_weights(path, f"a torchvision {origin.family} state dict"), str(path)
    own = model.state_dict()
    wanted = {_their_name(key, origin): key for key in own if key.split(".")[1] in model.encoder}
    chosen: dict[str, Tensor] = {}
    loaded: list[str] = []
    ignored: list[str] = []
    problems: list[str] = []
    weights = {_new_spelling(key): value for key, value in weights.items()}
    for key, value in weights.items():
        name = wanted.get(key)
        if name is None:
            if key.startswith(origin.unused):
                ignored.append(key)
            else:
                problems.append(f"{key}: the encoder of {model.name} has no such layer")
        elif own[name].shape != value.shape:
            problems.append(f"{key}: shape must be {tuple(own[name].shape)}, got {tuple(value.shape)}")
        else:
            chosen[name] = value
            loaded.append(key)
    missing = sorted(name for key, name in wanted.items() if key not in weights and not name.endswith(_COUNTER))
    problems += [f"nothing in it fills {name}" for name in missing]
    if problems:
        more = len(problems) - 10
        shown = [*problems[:10], f"and {more} more"] if more > 0 else problems
        raise ProblemsError(f"{where} (a torchvision {origin.family} of the same size is needed)", shown)
    new = tuple(name for name in model.segments if name not in model.encoder)
    return chosen, LoadReport(tuple(loaded), new, tuple(ignored))


def _origin(model: SegmentedModel) -> Origin:
    if model.origin is None:
        raise InputError(f"{model.name} has no encoder that takes weights of torchvision's")
    return model.origin


def _new_spelling(key: str) -> str:
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2.", key)


def _their_name(key: str, origin: Origin) -> str:
    """torchvision's name of a key of ours.

    >>> prefixes = {"stem": "features", "block4b.denselayer1": "features.denseblock4.denselayer9"}
    >>> _their_name("segments.block4b.denselayer1.conv1.weight", Origin(None, "DenseNet", prefixes, ()))
    'features.denseblock4.denselayer9.conv1.weight'
    """
    parts = key.split(".")[1:]
    for length in range(len(parts), 0, -1):
        if (theirs := origin.prefixes.get(".".join(parts[:length]))) is not None:
            return ".".join([theirs, *parts[length:]])
    raise KeyError(key)


def _member(model: SegmentedModel, weights: str) -> "WeightsEnum":
    """torchvision's enum member of that name."""
    from torchvision.models import get_model_weights  # Not above: it takes a second, which only pretraining needs.

    origin = _origin(model)
    if origin.name is None:
        raise InputError(f"torchvision has no weights for the encoder of {model.name}, which must be given as a file")
    enum: Any = get_model_weights(origin.name)
    kind, _, name = weights.rpartition(".")
    if kind not in ("", enum.__name__) or name not in enum.__members__:
        known = [f"{enum.__name__}.{name}" for name in enum.__members__]
        raise UnknownNameError(f"weights for the encoder of {model.name}", weights, known)
    member: WeightsEnum = enum[name]
    return member
