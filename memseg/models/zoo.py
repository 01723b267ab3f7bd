"""Models by name, and models of others by the address of what makes them."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch

from memseg.errors import UnknownNameError
from memseg.levels import NormMode
from memseg.models.context import PyramidPooling
from memseg.models.densenet import DenseNetConfig
from memseg.models.factory import make_module
from memseg.models.foreign import segment_module
from memseg.models.ladder import Architecture, build_architecture
from memseg.models.resnet import ResNetConfig
from memseg.models.segmented import SegmentedModel


class _Entry(NamedTuple):
    description: str
    architecture: Architecture


# Growth rates, blocks and stems: torchvision.models.densenet, after Huang et al., arXiv:1608.06993, table 1. Layers:
# torchvision.models.resnet, after He et al., arXiv:1512.03385, table 1.
_DENSENET_121 = DenseNetConfig(32, (6, 12, 24, 16), 64, "densenet121")
_DENSENET_161 = DenseNetConfig(48, (6, 12, 36, 24), 96, "densenet161")
_DENSENET_169 = DenseNetConfig(32, (6, 12, 32, 32), 64, "densenet169")
_DENSENET_201 = DenseNetConfig(32, (6, 12, 48, 32), 64, "densenet201")
_RESNET_50 = ResNetConfig((3, 4, 6, 3), "resnet50")
_RESNET_101 = ResNetConfig((3, 4, 23, 3), "resnet101")
_DILATIONS = (1, 1, 2, 4)
_PAPERS_CUT = ("transition2",)
"""Stem, blocks 1 and 2 on one card, the rest on another."""


def _ladder(encoder: DenseNetConfig, **settings: Any) -> Architecture:
    return Architecture(encoder, published_cut=_PAPERS_CUT, **settings)


_ZOO = {
    "ladder-densenet121": _Entry("Kreso et al.'s ladder on DenseNet-121", _ladder(_DENSENET_121)),
    "ladder-densenet161": _Entry("the same ladder on DenseNet-161", _ladder(_DENSENET_161)),
    "ladder-densenet169": _Entry("Kreso et al.'s ladder on DenseNet-169", _ladder(_DENSENET_169)),
    "ladder-densenet201": _Entry("the same ladder on DenseNet-201", _ladder(_DENSENET_201)),
    "ladder-densenet-mini": _Entry(
        "the same ladder, small enough to learn on a laptop's CPU",
        _ladder(DenseNetConfig(16, (3, 4, 6, 4), 32), width=64, context_width=128),
    ),
    "ladder-resnet50": _Entry("Kreso et al.'s ladder on ResNet-50", Architecture(_RESNET_50)),
    "ladder-resnet101": _Entry("the same ladder on ResNet-101", Architecture(_RESNET_101)),
    "densenet121-32x": _Entry(
        "DenseNet-121 and a context, no up path",
        Architecture(replace(_DENSENET_121, halved=()), joined=0, has_aux=False),
    ),
    "resnet50-32x": _Entry("ResNet-50 and a context, no up path", Architecture(_RESNET_50, joined=0, has_aux=False)),
    "dilated-densenet121": _Entry(
        "DenseNet-121, blocks 3 and 4 dilated at /8, and one blend",
        Architecture(replace(_DENSENET_121, halved=(), dilations=_DILATIONS), joined=1),
    ),
    "dilated-resnet50": _Entry(
        "ResNet-50, layers 3 and 4 dilated at /8, and one blend",
        Architecture(replace(_RESNET_50, dilations=_DILATIONS), joined=1),
    ),
    "ladder-densenet121-single": _Entry(
        "ladder-densenet121 without auxiliary logits", _ladder(_DENSENET_121, has_aux=False)
    ),
    "ladder-densenet169-split34": _Entry(
        "ladder-densenet169 with block 3 halved too: to /128 and back",
        _ladder(replace(_DENSENET_169, halved=(3, 4))),
    ),
    "ladder-densenet169-spp": _Entry(
        "ladder-densenet169 with spatial pyramid pooling for its context",
        _ladder(_DENSENET_169, context=PyramidPooling),
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
        return build_architecture(name, _ZOO[name].architecture, num_classes=num_classes, norm=norm)
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
