"""A network written as segments with named edges: the one description that profiler, planner and pipeline all read.

A segment is the smallest part that is placed on a card as a whole. It reads tensors by the names of the segments that
made them and makes one tensor of its own name. A run of consecutive segments is again such a graph, with the tensors
that cross its borders as inputs and outputs: that is what one card of a split model runs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memseg.errors import InputError, UnknownNameError
from memseg.levels import NormMode, Recompute
from memseg.nn import BatchNorm2d, layout

IMAGES = "images"
"""The name under which segments read the input batch."""


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
        return Stage(segments, inputs=inputs, outputs=outputs, ends=stop == len(order))


class Stage(SegmentGraph):
    """Part of a model, with borders that tensors can cross, for which they must be contiguous.

    Feature maps are channels-last, (N, C, H, W) in memory (N, H, W, C); so that is how they cross, without a copy, and
    their gradients cross back. A tensor that is passed through gets a node of its own, so that a gradient can arrive
    for it.

    Args:
        segments, inputs, outputs: As of any graph.
        ends: Whether the model ends here: then its outputs cross no border, and stay as they are.
    """

    def __init__(
        self, segments: Sequence[Segment], *, inputs: Sequence[str], outputs: Sequence[str], ends: bool
    ) -> None:
        super().__init__(segments, inputs=inputs, outputs=outputs)
        self.ends = ends

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs, in order.

        Inputs and outputs are contiguous (N, H, W, C), but for the images, and the outputs of the stage that `ends` the
        model.
        """
        maps = (
            tensor if name == IMAGES else layout.images(_ContiguousGradient.apply(tensor))
            for name, tensor in zip(self.inputs, inputs, strict=True)
        )
        outputs = super().run(*maps)
        return outputs if self.ends else tuple(layout.rows(tensor).contiguous() for tensor in outputs)


class _ContiguousGradient(torch.autograd.Function):
    """The identity; the gradient that comes back through it is contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


class SegmentedModel(SegmentGraph):
    """A segmentation network as a SegmentGraph over `images`.

    Training and evaluation want different things of it, as with torchvision's networks that have auxiliary heads:

    - `.train()`: forward returns its coarse outputs, a tuple of (N, num_classes, h, w), the main one first. The loss
      (`memseg.nn.banded_cross_entropy`) brings them to full size in bands.
    - `.eval()`: forward returns the main logits, (N, num_classes, H, W), upsampled bilinearly.

    Args:
        name: Its name in the zoo.
        segments: In topological order.
        outputs: Names of the segments that make coarse logits, the main one first.
        num_classes: Channels of the logits.
        output_stride: Input size over the coarsest map's size; image sides must be multiples of it.
        encoder: Names of the segments that pretrained weights fill.
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
    ) -> None:
        super().__init__(segments, inputs=(IMAGES,), outputs=outputs)
        self.name, self.num_classes, self.output_stride = name, num_classes, output_stride
        self.encoder = tuple(encoder)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...] | Tensor:
        """Of images (N, 3, H, W): coarse outputs in training, full-size logits (N, num_classes, H, W) otherwise.

        Raises:
            InputError: H or W is not a multiple of `output_stride`.
        """
        (images,) = inputs
        outputs = self.coarse_outputs(images)
        if self.training:
            return outputs
        return F.interpolate(outputs[0], images.shape[2:], mode="bilinear", align_corners=False)

    def coarse_outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """All coarse logits (N, num_classes, h, w) of images (N, 3, H, W), the main ones first.

        Raises:
            InputError: H or W is not a multiple of `output_stride`.
        """
        self.check_image(cast(tuple[int, int], tuple(images.shape[2:])))
        return self.run(images)

    def check_image(self, size: tuple[int, int], *, batch: int | None = None) -> None:
        """Do nothing where (height, width) suits the model, and a training batch of so many such images too.

        Raises:
            InputError: a side is not a multiple of `output_stride`, and which size is nearest; or the coarsest map of
                the whole batch has a single value per channel, of which batch norm can take no statistics.
        """
        stride = self.output_stride
        if any(side < stride or side % stride for side in size):
            nearest = "x".join(str(max(stride, round(side / stride) * stride)) for side in size)
            raise InputError(
                f"image sides must be multiples of {stride} (the output stride of {self.name}), "
                f"got {size[0]}x{size[1]}; nearest is {nearest}"
            )
        norms = [module for module in self.modules() if isinstance(module, BatchNorm2d)]
        counts = any(norm.norm is not NormMode.FROZEN for norm in norms)
        if batch is not None and counts and batch * (size[0] // stride) * (size[1] // stride) == 1:
            raise InputError(
                f"batch statistics need more than one value per channel, and one image of {size[0]}x{size[1]} is a "
                f"single value at the coarsest map of {self.name}; take a batch of 2, a larger image, or frozen norm"
            )
