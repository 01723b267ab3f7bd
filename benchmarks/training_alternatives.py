"""The ways to train a DenseNet within less memory that `benchmarks.training_memory` sets side by side.

    plain                 the network as torch runs it: contiguous images, everything kept that autograd keeps
    plain-channels-last   the same with weights and images in torch.channels_last
    torchvision           torchvision's `memory_efficient=True`: concat-BN-ReLU-1x1 of each dense layer checkpointed
    checkpoint            torch.utils.checkpoint around each dense block and transition; of a ladder, each segment
    checkpoint-layer      around each dense layer and transition, as the ladder's authors do in their release
    compile, compile-0.2  torch.compile, and with its activation memory budget at that fraction
    memseg-LEVEL          memseg at a recompute level, on images in torch.channels_last

`-frozen` normalises with running statistics and a fixed affine, `-bf16` runs forward and loss under autocast to
bfloat16, `-fused` has memseg's element-wise chains compiled. All start from the same weights, images and targets, and a
ladder's losses are memseg's in every row, so that the networks alone differ: `plain-torch-loss` is the row whose losses
are torch's own too, bilinear upsampling and cross-entropy of full-size logits.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import NamedTuple, cast

import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.densenet import _DenseBlock

from memseg.errors import InputError, UnknownNameError
from memseg.levels import NormMode, Recompute
from memseg.models import SegmentedModel, build_model, model_names
from memseg.models.objective import Objective
from memseg.nn import IGNORE_INDEX, fused_kernels
from memseg.nn.convert import convert
from memseg.profiling.jobs.job import fused_adam

EXTRACTORS = ("densenet121", "densenet161", "densenet169", "densenet201")
"""torchvision's networks, of which the feature extractor is trained on its own."""

_SEED = 0
_EXTRACTOR_STRIDE = 32
_AUX_WEIGHT = 0.3


@dataclass(frozen=True)
class Variant:
    """One row."""

    way: str
    """What comes before the suffixes."""
    frozen: bool = False
    bf16: bool = False
    fused: bool = False

    @property
    def name(self) -> str:
        """The way and its suffixes."""
        suffixes = {"-frozen": self.frozen, "-bf16": self.bf16, "-fused": self.fused}
        return self.way + "".join(suffix for suffix, present in suffixes.items() if present)

    @property
    def with_batch_norm(self) -> "Variant":
        """The same, not frozen."""
        return replace(self, frozen=False)

    @property
    def level(self) -> Recompute | None:
        """memseg's level, or None for an alternative to it."""
        return Recompute(self.way.removeprefix("memseg-")) if self.way.startswith("memseg-") else None

    @property
    def compile_budget(self) -> float | None:
        """The fraction of activations that torch.compile may keep; None where nothing is compiled."""
        if not self.way.startswith("compile"):
            return None
        return float(self.way.partition("-")[2] or 1)

    @property
    def channels_last(self) -> bool:
        """Whether its images are."""
        return self.level is not None or self.way == "plain-channels-last"


def _variants() -> Iterable[Variant]:
    ways = ["plain", "plain-torch-loss", "plain-channels-last", "torchvision", "checkpoint", "checkpoint-layer"]
    ways += ["compile", "compile-0.5", "compile-0.2", "compile-0.1", *(f"memseg-{level}" for level in Recompute)]
    for bf16, frozen, fused, way in product((False, True), (False, True), (False, True), ways):
        if not fused or (way.startswith("memseg-") and way != "memseg-none"):
            yield Variant(way, frozen, bf16, fused)


VARIANTS = {variant.name: variant for variant in _variants()}
"""All rows by name, in the order in which they are run."""

DEFAULT = (
    *("plain", "plain-channels-last", "torchvision", "checkpoint", "checkpoint-layer", "compile", "compile-0.2"),
    *(f"memseg-{level}" for level in Recompute),
    *("plain-frozen", "memseg-units-frozen", "plain-bf16", "memseg-units-bf16"),
)
"""The rows of a run that names none."""


@dataclass(frozen=True)
class Task:
    """What every row trains."""

    model: str
    image: tuple[int, int]
    batch: int
    whole_step: bool
    """Whether an optimizer's step belongs to it."""


def check_task(task: Task) -> None:
    """Do nothing where the model exists and can train on such a batch.

    Raises:
        InputError: it does not, or cannot.
    """
    if task.model in model_names():
        with torch.device("meta"):
            build_model(task.model).check_image(task.image, batch=task.batch)
        return
    if task.model not in EXTRACTORS:
        raise UnknownNameError("model", task.model, (*EXTRACTORS, *model_names()))
    sides = "x".join(map(str, task.image))
    if any(side % _EXTRACTOR_STRIDE for side in task.image):
        nearest = "x".join(str(max(1, round(side / _EXTRACTOR_STRIDE)) * _EXTRACTOR_STRIDE) for side in task.image)
        raise InputError(f"image sides must be multiples of {_EXTRACTOR_STRIDE}, got {sides}; nearest is {nearest}")
    if task.batch * task.image[0] * task.image[1] == _EXTRACTOR_STRIDE**2:
        raise InputError(
            f"batch statistics need more than one value per channel, and one image of {sides} is a single value at "
            "the coarsest map; take a batch of 2 or a larger image"
        )


class Work:
    """A model, its batch, and the step that is measured.

    An extractor has no loss; its backward starts from a fixed random gradient of its output. That costs nothing beyond
    the output itself, which a loss would keep too.
    """

    def __init__(self, task: Task, variant: Variant) -> None:
        fused_kernels(variant.fused)
        self._bf16 = variant.bf16
        self.model, self._forward = build_network(task.model, variant)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimizer = fused_adam(self.parameters) if task.whole_step else None
        generator = torch.Generator().manual_seed(_SEED)
        images = torch.randn(task.batch, 3, *task.image, generator=generator)
        memory_format = torch.channels_last if variant.channels_last else torch.contiguous_format
        self._images = images.contiguous(memory_format=memory_format)
        self._objective: Callable[..., Tensor] | None = None
        if isinstance(self.model, SegmentedModel):
            self._objective = _torch_losses if variant.way == "plain-torch-loss" else Objective(_AUX_WEIGHT)
            size = (task.batch, *task.image)
            self._target = torch.randint(self.model.num_classes, size, dtype=torch.uint8, generator=generator)
        else:
            # Filled by the first step, which knows the output's size and layout.
            self._target = torch.empty(0)

    @property
    def given(self) -> list[Tensor]:
        """What is there before a step: parameters, buffers, images, and the target or the output's gradient."""
        return [*self.model.parameters(), *self.model.buffers(), self._images, self._target]

    def clear(self) -> None:
        """Free the gradients of the last step."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def step(self, see: Callable[[Sequence[Tensor]], None] = lambda outputs: None) -> None:
        """Forward, loss, backward, and the optimizer's step where there is one.

        Args:
            see: Called with the outputs; whoever keeps them keeps their memory.
        """
        self.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            found = self._forward(self._images)
            outputs = (found,) if isinstance(found, Tensor) else found
            del found
            see(outputs)
            loss = self._objective(*outputs, self._target) if self._objective else outputs[0]
            del outputs
        if self._objective is None and not self._target.numel():
            self._target = _gradient_like(loss)
        torch.autograd.backward(loss, None if self._objective else self._target)
        if self._optimizer is not None:
            self._optimizer.step()


class Network(NamedTuple):
    """What is trained, and how its outputs come from images."""

    model: nn.Module
    forward: Callable[[Tensor], Tensor | tuple[Tensor, ...]]


def build_network(name: str, variant: Variant) -> Network:
    """The network of that name trained in that way, with the same random weights whatever the way."""
    torch.manual_seed(_SEED)
    norm = NormMode.FROZEN if variant.frozen else NormMode.BATCH
    if name in EXTRACTORS:
        model: nn.Module = getattr(torchvision.models, name)(memory_efficient=variant.way == "torchvision").features
    else:
        model = build_model(name, norm=norm)
    model.train()
    if variant.level is not None:
        model = _at_level(model, variant.level, norm)
    elif variant.way == "plain-channels-last":
        model.to(memory_format=torch.channels_last)
    elif variant.way.startswith("checkpoint") or variant.way == "torchvision":
        _rebuild_parts(model, variant.way)
    if variant.frozen:
        _freeze(model)
    forward = model.run if isinstance(model, SegmentedModel) else model
    if variant.compile_budget is not None:
        functorch_config.activation_memory_budget = variant.compile_budget
        forward = torch.compile(forward)
    return Network(model, forward)


def _at_level(model: nn.Module, level: Recompute, norm: NormMode) -> nn.Module:
    if isinstance(model, SegmentedModel):
        model.set_recompute(level)
        return model
    return convert(model, recompute=level, norm=norm).model


def _rebuild_parts(model: nn.Module, way: str) -> None:
    """Replace, in place, the parts that this way checkpoints; parameters keep their values and their order."""
    is_ladder = isinstance(model, SegmentedModel)
    parts = cast(nn.Module, model.segments) if is_ladder else model
    blocks = [name for name, _ in parts.named_children() if "block" in name]
    transitions = [name for name, _ in parts.named_children() if "transition" in name]
    if is_ladder and way in ("torchvision", "checkpoint-layer"):
        _replace(parts, blocks, partial(_torchvision_block, memory_efficient=way == "torchvision"))
    if way == "checkpoint":
        _replace(parts, list(parts._modules) if is_ladder else [*blocks, *transitions], _Checkpointed)
    if way == "checkpoint-layer":
        for block in blocks:
            layers = parts.get_submodule(block)
            _replace(layers, list(layers._modules), _CheckpointedLayer)
        _replace(parts, transitions, _Checkpointed)


def _replace(parent: nn.Module, names: Iterable[str], replacement: Callable[[nn.Module], nn.Module]) -> None:
    for name in names:
        parent.add_module(name, replacement(parent.get_submodule(name)))


class _Checkpointed(nn.Module):
    """A module of which only the inputs are kept."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Tensor:
        return cast(Tensor, checkpoint(self.inner, *inputs, use_reentrant=False))


class _CheckpointedLayer(_Checkpointed):
    """A dense layer of torchvision's, which reads a list that its block goes on to lengthen."""

    def forward(self, *inputs: Tensor) -> Tensor:
        (features,) = inputs
        return checkpoint(self._concatenated, *features, use_reentrant=False)

    def _concatenated(self, *features: Tensor) -> Tensor:
        return cast(Tensor, self.inner(list(features)))


def _torchvision_block(block: nn.Module, *, memory_efficient: bool) -> nn.Module:
    """torchvision's dense block with the parameters of ours, whose names are the same."""
    state = block.state_dict()
    width, in_channels = state["denselayer1.conv1.weight"].shape[:2]
    growth_rate = state["denselayer1.conv2.weight"].shape[0]
    num_layers = sum(name.endswith("conv2.weight") for name in state)
    theirs = _DenseBlock(num_layers, in_channels, width // growth_rate, growth_rate, 0.0, memory_efficient)
    theirs.load_state_dict(state)
    return cast(nn.Module, theirs)


def _freeze(model: nn.Module) -> None:
    """Have torch's batch norms use their running statistics and keep their affine; memseg's have a mode for it."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.eval().requires_grad_(False)


def _gradient_like(output: Tensor) -> Tensor:
    """A fixed random gradient in the layout and precision of the output."""
    values = torch.randn(output.shape, generator=torch.Generator().manual_seed(_SEED))
    return torch.empty_like(output, requires_grad=False).copy_(values)


def _torch_losses(*outputs_and_target: Tensor) -> Tensor:
    """What Objective computes, from torch's own functions: each output's logits exist at full size."""
    *outputs, target = outputs_and_target
    weights = (
        [1.0] if len(outputs) == 1 else [1 - _AUX_WEIGHT, *[_AUX_WEIGHT / (len(outputs) - 1)] * (len(outputs) - 1)]
    )
    full = (F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=False) for logits in outputs)
    losses = (F.cross_entropy(logits, target.long(), ignore_index=IGNORE_INDEX) for logits in full)
    return cast(Tensor, sum(weight * loss for weight, loss in zip(weights, losses, strict=True)))
