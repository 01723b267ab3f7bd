"""Models by name, and models of others by the address of what makes them."""

from dataclasses import dataclass
from functools import cache

import torch

from memseg.errors import UnknownNameError
from memseg.levels import NormMode
from memseg.models.densenet import DenseNetConfig
from memseg.models.factory import make_module
from memseg.models.foreign import segment_module
from memseg.models.ladder import ladder_densenet
from memseg.models.segmented import SegmentedModel


@dataclass(frozen=True)
class _Entry:
    description: str
    config: DenseNetConfig
    width: int = 128
    context_width: int = 512


# Growth rates, blocks and stems: torchvision.models.densenet, after Huang et al., arXiv:1608.06993, table 1.
_ZOO = {
    "ladder-densenet121": _Entry("Kreso et al.'s ladder on DenseNet-121", DenseNetConfig(32, (6, 12, 24, 16), 64)),
    "ladder-densenet161": _Entry("the same ladder on DenseNet-161", DenseNetConfig(48, (6, 12, 36, 24), 96)),
    "ladder-densenet169": _Entry("Kreso et al.'s ladder on DenseNet-169", DenseNetConfig(32, (6, 12, 32, 32), 64)),
    "ladder-densenet201": _Entry("the same ladder on DenseNet-201", DenseNetConfig(32, (6, 12, 48, 32), 64)),
    "ladder-densenet-mini": _Entry(
        "the same ladder, small enough to learn on a laptop's CPU",
        DenseNetConfig(16, (3, 4, 6, 4), 32),
        width=64,
        context_width=128,
    ),
}


@dataclass(frozen=True)
class ModelCard:
    """What a list of models shows of one."""

    name: str
    description: str
    parameters: int
    """Numbers to learn, at 19 classes."""
    output_stride: int
    segments: int


def model_names() -> tuple[str, ...]:
    """Names that `build_model` takes."""
    return tuple(_ZOO)


def build_model(
    name: str, *, num_classes: int = 19, norm: NormMode = NormMode.BATCH, dtype: torch.dtype = torch.float32
) -> SegmentedModel:
    """A new model with random weights, on torch's default device.

    Args:
        name: One of `model_names()`; or package.module:factory or path/file.py:factory, whose network is cut into
            segments. Such a factory is called with `num_classes`, where it takes it, and without pretrained weights.
        num_classes: Channels of its logits.
        norm: Mode of all its norms.
        dtype: Of its parameters and buffers.

    Raises:
        UnknownNameError: there is no model of that name.
        InputError: a factory fails, or what it makes cannot be cut into segments or has other classes.
    """
    if name not in _ZOO and ":" not in name:
        hint = "(a model of your own is file.py:FUNCTION or package.module:FUNCTION)"
        raise UnknownNameError("model", name, _ZOO, hint)
    # Not `.to(dtype)` afterwards: fake parameters, which profiling builds with, cannot be converted in place.
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        if name not in _ZOO:
            module = make_module(name, num_classes=num_classes)
            return segment_module(module, name=name, num_classes=num_classes, norm=norm)
        entry = _ZOO[name]
        return ladder_densenet(
            name,
            entry.config,
            num_classes=num_classes,
            width=entry.width,
            context_width=entry.context_width,
            norm=norm,
        )
    finally:
        torch.set_default_dtype(before)


@cache
def describe(name: str) -> ModelCard:
    """The card of a model, without allocating it.

    >>> describe("ladder-densenet121").parameters
    9588902
    """
    with torch.device("meta"):
        model = build_model(name)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelCard(name, _ZOO[name].description, parameters, model.output_stride, len(model.segments))
