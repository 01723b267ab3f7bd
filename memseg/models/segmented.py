"""A network written as segments with named edges: the one description that profiler, planner and pipeline all read.

A segment is the smallest part that is placed on a card as a whole. It reads tensors by the names of the segments that
made them and makes one tensor of its own name. A run of consecutive segments is again such a graph, with the tensors
that cross its borders as inputs and outputs: that is what one card of a split model runs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memseg.errors import InputError, UnknownNameError
from memseg.levels import NormMode, Recompute
from memseg.models.objective import ClassificationObjective, Objective
from memseg.nn import BatchNorm2d, layout

IMAGES = "images"
"""The name under which segments read the input batch."""


@dataclass(frozen=True)
class Origin:
    """The network of torchvision's whose weights an encoder takes."""

    name: str | None
    """As in `torchvision.models.get_model`; None where there is none of this size."""
    family: str
    """In words."""
    prefixes: Mapping[str, str]
    """Beginnings of our names, behind "segments.", each up to a dot, and of theirs; the longest that fits holds."""
    unused: tuple[str, ...]
    """Beginnings of their names that no encoder has."""


class Segment(NamedTuple):
    """What is placed as a whole: its name, its module, and the names it reads, in the order of the module's inputs."""

    name: str
    module: nn.Module
    reads: tuple[str, ...]


class SegmentGraph(nn.Module):
    """Segments in topological order, run one after the other; each tensor is freed after its last reader.

    Args:
        segments: In order; each reads names of earlier ones or of `inputs`.
        inputs: Names of the tensors given to forward.
        outputs: Names of the tensors it returns; an input may be among them and is passed through.

    Raises:
        ValueError: a name is read or returned before it is made, or made twice.
    """

    def __init__(self, segments: Sequence[Segment], *, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        made = set(inputs)
        for segment in segments:
            if missing := set(segment.reads) - made:
                raise ValueError(f"segment {segment.name} reads {sorted(missing)}, which nothing before it makes")
            if segment.name in made:
                raise ValueError(f"segment {segment.name} is made twice")
            made.add(segment.name)
        if missing := set(outputs) - made:
            raise ValueError(f"outputs {sorted(missing)} are not made by any segment")
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.reads = {segment.name: segment.reads for segment in segments}
        self.segments = nn.ModuleDict({segment.name: segment.module for segment in segments})

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs, in order."""
        alive = dict(zip(self.inputs, inputs, strict=True))
        del inputs
        last_reader = {read: name for name, reads in self.reads.items() for read in reads}
        for name, reads in self.reads.items():
            alive[name] = self.segments[name](*(alive[read] for read in reads))
            for read in set(reads):
                if last_reader[read] == name and read not in self.outputs:
                    del alive[read]
        return tuple(alive[name] for name in self.outputs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...] | Tensor:
        """The outputs, in order."""
        return self.run(*inputs)

    @property
    def recompute_levels(self) -> dict[str, Recompute]:
        """The level of each segment; `none` for one that has nothing to rebuild."""
        return {name: getattr(module, "recompute", Recompute.NONE) for name, module in self.segments.items()}

    def set_recompute(self, levels: Recompute | Mapping[str, Recompute]) -> None:
        """Give every segment, or each named one, its recompute level. Modules without levels ignore it.

        Raises:
            UnknownNameError: a name is not a segment of this graph.
        """
        if isinstance(levels, Recompute):
            levels = dict.fromkeys(self.segments, levels)
        for name, level in levels.items():
            if name not in self.segments:
                raise UnknownNameError("segment", name, self.segments)
            if hasattr(self.segments[name], "recompute"):
                self.segments[name].recompute = level  # type: ignore[assignment]

    def stage(self, names: Sequence[str]) -> "Stage":
        """The consecutive segments `names` as a graph of their own that shares their modules.

        Its inputs are all tensors made before it and needed in or after it; its outputs all tensors needed after it.
        Tensors that skip the stage are passed through.

        Raises:
            ValueError: the names are not consecutive segments of this graph.
        """
        order = list(self.segments)
        start = order.index(names[0]) if names and names[0] in order else 0
        stop = start + len(names)
        if not names or order[start:stop] != list(names):
            raise ValueError(f"{list(names)} are not consecutive segments of {order}")
        made_before = [*self.inputs, *order[:start]]
        made_here = order[start:stop]
        needed_after = {read for name in order[stop:] for read in self.reads[name]} | set(self.outputs)
        needed_here = {read for name in made_here for read in self.reads[name]}
        inputs = [name for name in made_before if name in needed_here | needed_after]
        outputs = [name for name in [*made_before, *made_here] if name in needed_after]
        if stop == len(order):
            outputs = list(self.outputs)
        segments = [Segment(name, self.segments[name], self.reads[name]) for name in made_here]
        return Stage(segments, inputs=inputs, outputs=outputs, begins=start == 0, ends=stop == len(order))


class Stage(SegmentGraph):
    """Part of a model, with borders that tensors can cross, for which they must be contiguous.

    Feature maps are channels-last, (N, C, H, W) in memory (N, H, W, C); so that is how they cross, without a copy, and
    their gradients cross back. Other tensors cross as they are. A tensor that is passed through gets a node of its own,
    so that a gradient can arrive for it.

    Args:
        segments, inputs, outputs: As of any graph.
        begins: Whether the model begins here: then its inputs are those of the model, and stay as they are.
        ends: Whether the model ends here: then its outputs cross no border, and stay as they are.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        *,
        inputs: Sequence[str],
        outputs: Sequence[str],
        begins: bool,
        ends: bool,
    ) -> None:
        super().__init__(segments, inputs=inputs, outputs=outputs)
        self.begins, self.ends = begins, ends

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs, in order.

        Inputs and outputs are contiguous, maps (N, H, W, C), but for the inputs of the stage that `begins` the model
        and the outputs of the one that `ends` it.
        """
        tensors = inputs if self.begins else map(_received, inputs)
        outputs = super().run(*tensors)
        return outputs if self.ends else tuple(map(_sent, outputs))


def _received(tensor: Tensor) -> Tensor:
    tensor = cast(Tensor, _ContiguousGradient.apply(tensor))
    return layout.images(tensor) if tensor.dim() == 4 else tensor


def _sent(tensor: Tensor) -> Tensor:
    return (layout.rows(tensor) if tensor.dim() == 4 else tensor).contiguous()


class _ContiguousGradient(torch.autograd.Function):
    """The identity; the gradient that comes back through it is contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


class SegmentedModel(SegmentGraph):
    """A segmentation network, or one that classifies images, as a SegmentGraph over `images`.

    Training and evaluation want different things of it, as with torchvision's networks that have auxiliary heads:

    - `.train()`: forward returns its coarse outputs, a tuple of (N, num_classes, h, w), the main one first. The loss
      (`memseg.nn.banded_cross_entropy`) brings them to full size in bands.
    - `.eval()`: forward returns the main logits, (N, num_classes, H, W), upsampled bilinearly.

    Where images are classified, logits are (N, num_classes) in both.

    Args:
        name: Its name in the zoo, or the address of what makes it.
        segments: In topological order.
        outputs: Names of the segments that make coarse logits, the main one first.
        num_classes: Channels of the logits.
        output_stride: Image sides must be multiples of it; of a network of ours the input size over the coarsest map's.
        encoder: Names of the segments that pretrained weights fill.
        origin: Whose weights those are, of a network of ours.
        is_dense: Whether it labels pixels; else whole images.
        norm_stride: Input size over that of the coarsest map of which batch norm takes statistics, `math.inf` where a
            map pooled to 1x1 is normalised; by default the output stride.
        image: The only (height, width) of images that it takes, if there is but one.
        published_cut: The first segment of each further card, as its authors split it over cards; none where they
            did not.
    """

    def __init__(
        self,
        name: str,
        segments: Sequence[Segment],
        *,
        outputs: Sequence[str],
        num_classes: int,
        output_stride: int,
        encoder: Sequence[str] = (),
        origin: Origin | None = None,
        is_dense: bool = True,
        norm_stride: float | None = None,
        image: tuple[int, int] | None = None,
        published_cut: Sequence[str] = (),
    ) -> None:
        super().__init__(segments, inputs=(IMAGES,), outputs=outputs)
        self.name, self.num_classes, self.output_stride = name, num_classes, output_stride
        self.encoder, self.is_dense, self.image = tuple(encoder), is_dense, image
        self.origin = origin
        self.published_cut = tuple(published_cut)
        self.norm_stride: float = output_stride if norm_stride is None else norm_stride

    def objective(
        self, aux_weight: float = 0.3, *, class_weights: Sequence[float] | None = None, label_smoothing: float = 0.0
    ) -> Objective:
        """What its training minimises; the arguments are those of `Objective`."""
        kind = Objective if self.is_dense else ClassificationObjective
        return kind(aux_weight, class_weights=class_weights, label_smoothing=label_smoothing)

    def make_target(self, batch: int, image: tuple[int, int]) -> Tensor:
        """Random labels for a batch of images: (N, H, W) of uint8 for pixels, (N,) of int64 for whole images."""
        shape, dtype = ((batch, *image), torch.uint8) if self.is_dense else ((batch,), torch.int64)
        return torch.randint(self.num_classes, shape, dtype=dtype)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...] | Tensor:
        """Of images (N, 3, H, W): coarse outputs in training, full-size logits (N, num_classes, H, W) otherwise.

        Raises:
            InputError: H or W is not a multiple of `output_stride`.
        """
        (images,) = inputs
        outputs = self.coarse_outputs(images)
        if self.training:
            return outputs
        if not self.is_dense:
            return outputs[0]
        return F.interpolate(outputs[0], images.shape[2:], mode="bilinear", align_corners=False)

    def coarse_outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """All coarse logits (N, num_classes, h, w) of images (N, 3, H, W), the main ones first.

        Raises:
            InputError: H or W is not a multiple of `output_stride`, or not the only size that there is.
        """
        self.check_image(cast(tuple[int, int], tuple(images.shape[2:])))
        return self.run(images)

    def check_image(self, size: tuple[int, int], *, batch: int | None = None) -> None:
        """Do nothing where (height, width) suits the model, and a training batch of so many such images too.

        Raises:
            InputError: a side is not a multiple of `output_stride`, and which size is nearest; or the model takes
                another size alone; or the coarsest map of the whole batch has a single value per channel, of which
                batch norm can take no statistics.
        """
        stride = self.output_stride
        if self.image is not None and size != self.image:
            raise InputError(
                f"{self.name} takes images of {self.image[0]}x{self.image[1]} alone, got {size[0]}x{size[1]}"
            )
        if any(side < stride or side % stride for side in size):
            nearest = "x".join(str(max(stride, round(side / stride) * stride)) for side in size)
            raise InputError(
                f"image sides must be multiples of {stride} (the output stride of {self.name}), "
                f"got {size[0]}x{size[1]}; nearest is {nearest}"
            )
        norms = [module for module in self.modules() if isinstance(module, BatchNorm2d)]
        counts = any(norm.norm is not NormMode.FROZEN for norm in norms)
        values = math.prod(max(1, math.ceil(side / self.norm_stride)) for side in size)
        if batch is not None and counts and batch * values == 1:
            raise InputError(
                f"batch statistics need more than one value per channel, and one image of {size[0]}x{size[1]} is a "
                f"single value at the coarsest map of {self.name}; take a batch of 2, a larger image, or frozen norm"
            )
