"""The training steps that `benchmarks.prediction` holds predictions against, on the CPU.

Three kinds of network: memseg's own, at every recompute level and in every norm mode; torchvision's, as published; and
small ones with what those lack. Between them they go through all precisions, optimizers and their kernels, accumulated
gradients, both memory layouts, and what `memseg.nn` does to other people's networks. Names tell what is not usual:

    ladder-densenet-mini/2x3x128x256/segment/frozen/bfloat16/sgd-fused/accumulate-3
    fcn_resnet50/2x3x128x256/channels-last/momentum

Sizes are such that feature maps are most of the memory, and that all steps together take minutes. Left out for that are
depthwise convolutions in float64, which torch runs group by group, each with allocations of its own to be counted, and
float16 but for two small steps, since CPUs convolve it a hundred times more slowly than float32.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision.models as vision
import torchvision.models.segmentation as vision_segmentation
from torch import Tensor, nn

from benchmarks.unet import UNet
from memseg.levels import NormMode, Precision, Recompute
from memseg.models import build_model
from memseg.nn import IGNORE_INDEX, convert, recompute
from memseg.nn.precision import parameter_dtype
from memseg.profiling import Job, foreign_job, named_optimizer, segmented_job

_CLASSES = 21
"""Of Pascal VOC, for which torchvision's segmentation networks were trained."""
_MANY_CLASSES = 150
"""Of ADE20K."""
_CATEGORIES = 1000
"""Of ImageNet."""


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One training step."""

    model: str
    shape: tuple[int, ...]
    """Of what the model reads, batch first."""
    precision: Precision = Precision.FLOAT32
    optimizer: str
    accumulation: int = 1

    @property
    def name(self) -> str:
        """The model, the shape, all that is not usual, and the optimizer."""
        parts = [self.model, "x".join(map(str, self.shape)), *self._kind()]
        if self.precision is not Precision.FLOAT32:
            parts.append(str(self.precision))
        parts.append(self.optimizer)
        if self.accumulation > 1:
            parts.append(f"accumulate-{self.accumulation}")
        return "/".join(parts)

    @abstractmethod
    def make(self, *, real: bool) -> Job:
        """The step, with a batch of its own: of real tensors, or, called under a fake mode, of fake ones."""

    def _kind(self) -> Iterator[str]:
        yield from ()


@dataclass(frozen=True, kw_only=True)
class LadderCase(Case):
    """A step of a network of memseg's."""

    level: Recompute
    norm: NormMode

    def make(self, *, real: bool) -> Job:
        """Real wherever it is not called under a fake mode, whatever `real` is."""
        batch, _, height, width = self.shape
        build = partial(build_model, self.model, norm=self.norm, dtype=parameter_dtype(self.precision))
        return segmented_job(
            build,
            image=(height, width),
            batch=batch,
            recompute=self.level,
            optimizer=named_optimizer(self.optimizer),
            precision=self.precision,
            accumulation=self.accumulation,
        )

    def _kind(self) -> Iterator[str]:
        yield from (str(self.level), str(self.norm))


class Task(NamedTuple):
    """What a network is trained for."""

    target: Callable[[tuple[int, ...]], Tensor]
    """A random one, for an input of that shape."""
    loss: Callable[..., Tensor]
    """Of the network's outputs and the target."""


@dataclass(frozen=True, kw_only=True)
class ForeignCase(Case):
    """A step of anybody's network."""

    build: Callable[[], nn.Module]
    task: Task
    channels_last: bool = False

    def make(self, *, real: bool) -> Job:
        """The batch is made here, so that measuring counts it too."""
        inputs, target = torch.randn(self.shape), self.task.target(self.shape)
        if self.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return foreign_job(
            # What makes a model is called to make one without memory; a real step needs a real one.
            self._build() if real else self._build,
            inputs,
            target,
            loss=self.task.loss,
            optimizer=named_optimizer(self.optimizer),
            precision=self.precision,
            accumulation=self.accumulation,
            real=real,
            name=self.name,
        )

    def _build(self) -> nn.Module:
        model = self.build()
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def _kind(self) -> Iterator[str]:
        if self.channels_last:
            yield "channels-last"


# Tasks.


def segmentation_loss(outputs: Tensor | Mapping[str, Tensor], target: Tensor) -> Tensor:
    """Cross-entropy of full-size logits; the auxiliary ones, where there are any, count half as much.

    Source: torchvision's references/segmentation/train.py, whose networks return {"out": ..., "aux": ...}.
    """
    if isinstance(outputs, Tensor):
        return F.cross_entropy(outputs, target, ignore_index=IGNORE_INDEX)
    losses = {name: F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX) for name, logits in outputs.items()}
    return losses["out"] + 0.5 * losses["aux"] if "aux" in losses else losses["out"]


def segmentation(num_classes: int) -> Task:
    """A class for each pixel."""
    return Task(lambda shape: torch.randint(num_classes, (shape[0], *shape[2:])), segmentation_loss)


CLASSIFICATION = Task(
    lambda shape: torch.randint(_CATEGORIES, shape[:1]), partial(F.cross_entropy, label_smoothing=0.1)
)
"""A category for each image, with torchvision's usual smoothing."""

REGRESSION = Task(torch.randn, F.mse_loss)
"""As many numbers as were read."""


# Networks.


def encoder() -> nn.Module:
    """A small transformer encoder over (N, T, 256)."""
    layer = nn.TransformerEncoderLayer(256, nhead=8, dim_feedforward=1024, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, num_layers=4, enable_nested_tensor=False)


class Recurrent(nn.Module):
    """Two recurrent layers, both ways, over (N, T, 256), and a linear one back to 256."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layers = kind(256, 192, num_layers=2, bidirectional=True, batch_first=True)
        self.last = nn.Linear(2 * 192, 256)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, 256) to the same."""
        out: Tensor = self.last(self.layers(x)[0])
        return out


def converted_densenet121() -> nn.Module:
    """torchvision's DenseNet-121 after `memseg.nn.convert`."""
    return convert(vision.densenet121(weights=None), recompute=Recompute.UNITS).model


def rebuilding_resnet50() -> nn.Module:
    """torchvision's ResNet-50 whose first stages are rebuilt in backward."""
    model: nn.Module = vision.resnet50(weights=None)
    recompute(model, {"layer1": Recompute.SEGMENT, "layer2.*": Recompute.SEGMENT})
    return model


def rebuilding_unet() -> nn.Module:
    """The U-Net whose double convolutions are rebuilt in backward."""
    model = UNet()
    recompute(model, {"down.*": Recompute.SEGMENT, "join.*": Recompute.SEGMENT})
    return model


# The cases.

_MINI, _121 = "ladder-densenet-mini", "ladder-densenet121"
_LARGE, _MIDDLE, _SMALL = (2, 3, 256, 512), (2, 3, 192, 320), (2, 3, 128, 256)
_TINY = (2, 3, 64, 128)

_LADDERS: tuple[tuple[str, tuple[int, ...], str, str, str, str, int], ...] = (
    (_MINI, _LARGE, "none", "batch", "float32", "sgd", 1),
    (_MINI, _SMALL, "none", "frozen", "float64", "momentum", 1),
    (_MINI, _LARGE, "none", "synced", "bfloat16", "adam", 1),
    (_MINI, _LARGE, "norms", "batch", "bfloat16", "adamw", 1),
    (_MINI, _LARGE, "norms", "frozen", "float32", "sgd-loop", 1),
    (_MINI, _SMALL, "norms", "synced", "float64", "adam-loop", 3),
    (_MINI, _SMALL, "units", "batch", "float32", "adam-fused", 3),
    (_MINI, _TINY, "units", "frozen", "float16", "adamw-loop", 1),
    (_MINI, _MIDDLE, "units", "synced", "float32", "momentum-foreach", 1),
    (_MINI, _LARGE, "segment", "batch", "float64", "adam-foreach", 1),
    (_MINI, _SMALL, "segment", "frozen", "bfloat16", "sgd-fused", 3),
    (_MINI, _LARGE, "segment", "synced", "float32", "adamw-fused", 1),
    (_121, _LARGE, "none", "batch", "float32", "adam-fused", 1),
    (_121, _SMALL, "none", "frozen", "bfloat16", "sgd-foreach", 1),
    (_121, _SMALL, "none", "synced", "float64", "momentum-loop", 1),
    (_121, _LARGE, "norms", "batch", "float32", "adamw-foreach", 1),
    (_121, _MIDDLE, "norms", "frozen", "float64", "adam", 1),
    (_121, _SMALL, "norms", "synced", "bfloat16", "momentum-fused", 1),
    (_121, _MIDDLE, "units", "batch", "bfloat16", "adam", 1),
    (_121, _SMALL, "units", "frozen", "float32", "adamw", 3),
    (_121, _MIDDLE, "units", "synced", "float64", "sgd", 1),
    (_121, _MIDDLE, "segment", "batch", "float32", "momentum", 1),
    (_121, _SMALL, "segment", "frozen", "float64", "adamw-fused", 1),
    (_121, _SMALL, "segment", "synced", "bfloat16", "adam-loop", 1),
)


def _ladders() -> Iterator[Case]:
    for model, shape, level, norm, precision, optimizer, accumulation in _LADDERS:
        yield LadderCase(
            model=model,
            shape=shape,
            level=Recompute(level),
            norm=NormMode(norm),
            precision=Precision(precision),
            optimizer=optimizer,
            accumulation=accumulation,
        )


def _segmentation_networks() -> Iterator[Case]:
    def case(model: str, shape: tuple[int, ...], optimizer: str, *, num_classes: int = _CLASSES, **other: Any) -> Case:
        aux = {} if model.startswith("lraspp") else {"aux_loss": True}
        network = getattr(vision_segmentation, model)
        build = partial(network, weights=None, weights_backbone=None, num_classes=num_classes, **aux)
        name = model if num_classes == _CLASSES else f"{model}-{num_classes}-classes"
        return ForeignCase(
            model=name, shape=shape, optimizer=optimizer, build=build, task=segmentation(num_classes), **other
        )

    yield case("fcn_resnet50", _SMALL, "momentum")
    yield case("fcn_resnet50", _SMALL, "momentum", channels_last=True)
    yield case("fcn_resnet50", _SMALL, "adam", precision=Precision.BFLOAT16)
    yield case("fcn_resnet50", _SMALL, "sgd", num_classes=_MANY_CLASSES)
    yield case("deeplabv3_resnet50", _SMALL, "sgd-foreach")
    yield case("deeplabv3_resnet50", _SMALL, "adamw-fused", accumulation=3)
    lraspp = partial(case, "lraspp_mobilenet_v3_large")
    yield lraspp(_LARGE, "adam")
    yield lraspp(_LARGE, "adam-foreach", precision=Precision.BFLOAT16)
    yield lraspp(_LARGE, "momentum-fused", num_classes=_MANY_CLASSES)
    yield lraspp(_SMALL, "adamw", accumulation=3)


def _classifiers() -> Iterator[Case]:
    def case(model: str, shape: tuple[int, ...], optimizer: str, **other: Any) -> Case:
        build = partial(getattr(vision, model), weights=None)
        return ForeignCase(model=model, shape=shape, optimizer=optimizer, build=build, task=CLASSIFICATION, **other)

    square = (4, 3, 224, 224)
    yield case("resnet18", _LARGE, "sgd-loop")
    yield case("resnet18", _LARGE, "adam-fused", precision=Precision.FLOAT64)
    yield case("resnet50", _LARGE, "momentum")
    yield case("resnet50", _LARGE, "adamw", channels_last=True)
    yield case("resnet50", _SMALL, "adam-foreach", precision=Precision.BFLOAT16, accumulation=3)
    yield case("densenet121", _LARGE, "adam")
    yield case("densenet121", _SMALL, "momentum-foreach", precision=Precision.FLOAT64)
    yield case("vit_b_16", square, "adamw")
    yield case("vit_b_16", (2, 3, 224, 224), "adam-loop", precision=Precision.BFLOAT16)
    yield case("swin_t", square, "adamw-foreach")
    yield case("swin_t", square, "adamw", precision=Precision.BFLOAT16)
    yield case("convnext_tiny", square, "adamw-loop")
    yield case("convnext_tiny", square, "adamw", channels_last=True)
    yield case("efficientnet_b0", _LARGE, "momentum")
    yield case("efficientnet_b0", _SMALL, "adam-fused", precision=Precision.BFLOAT16, accumulation=3)
    yield case("mobilenet_v3_large", _LARGE, "sgd-fused")
    yield case("mobilenet_v3_large", _LARGE, "adam", precision=Precision.BFLOAT16)


def _others() -> Iterator[Case]:
    unet = partial(ForeignCase, model="unet", build=UNet, task=segmentation(_CLASSES))
    yield unet(shape=_LARGE, optimizer="adam")
    yield unet(shape=_LARGE, optimizer="momentum", channels_last=True)
    yield unet(shape=_SMALL, optimizer="sgd", precision=Precision.FLOAT64)
    yield unet(shape=_LARGE, optimizer="adam-loop", precision=Precision.BFLOAT16)
    transformer = partial(ForeignCase, model="transformer-encoder", build=encoder, task=REGRESSION)
    yield transformer(shape=(8, 256, 256), optimizer="adamw")
    yield transformer(shape=(8, 256, 256), optimizer="adamw-fused", precision=Precision.BFLOAT16, accumulation=3)
    yield transformer(shape=(4, 512, 256), optimizer="sgd", precision=Precision.FLOAT64)
    yield transformer(shape=(2, 128, 256), optimizer="adam-foreach", precision=Precision.FLOAT16)
    lstm = partial(ForeignCase, model="lstm", build=partial(Recurrent, nn.LSTM), task=REGRESSION)
    yield lstm(shape=(16, 128, 256), optimizer="adam")
    yield lstm(shape=(16, 128, 256), optimizer="momentum", precision=Precision.BFLOAT16)
    yield ForeignCase(
        model="gru", shape=(16, 128, 256), build=partial(Recurrent, nn.GRU), task=REGRESSION, optimizer="adamw"
    )
    converted = partial(ForeignCase, model="densenet121-converted", build=converted_densenet121, task=CLASSIFICATION)
    yield converted(shape=_LARGE, optimizer="adam", channels_last=True)
    yield converted(shape=_LARGE, optimizer="momentum", precision=Precision.BFLOAT16)
    yield ForeignCase(
        model="resnet50-rebuilding", shape=_LARGE, build=rebuilding_resnet50, task=CLASSIFICATION, optimizer="adam"
    )
    yield ForeignCase(
        model="unet-rebuilding", shape=_LARGE, build=rebuilding_unet, task=segmentation(_CLASSES), optimizer="adam"
    )


CASES: Mapping[str, Case] = {
    case.name: case for case in (*_ladders(), *_segmentation_networks(), *_classifiers(), *_others())
}
"""All of them by name, in the order in which they are run."""
