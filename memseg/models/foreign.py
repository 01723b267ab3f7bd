"""Anybody's network as a SegmentedModel: traced, run on samples, cut, and its norms and dense blocks made memseg's.

The network's own modules go into the segments, so it is trained where it stands. What changes:

- Batch norms of torch's become memseg's, which keep their NormMode and count a rebuilt batch once; dense blocks and
  BN-ReLU-convolution runs become recomputing layers (`memseg.nn.convert`).
- A bilinear upsampling to the images' size at the very end is left out: the loss does it in bands and evaluation does
  it at the end, with the same result.

Parameters of the segmented model are named `segments.<segment>.<name in the original>`; `load_original` fills it from a
state dict of the original.
"""

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_flatten

from memseg.errors import InputError, ProblemsError
from memseg.levels import NormMode, Recompute
from memseg.models.cut import Steps, cut
from memseg.models.samples import STRIDES, Samples, take_samples, tensors_in
from memseg.models.segmented import IMAGES, Segment, SegmentedModel
from memseg.models.traced_segment import TracedSegment, with_zero_gradient
from memseg.models.tracing import module_path, outputs_of, trace
from memseg.models.weights import read_weights
from memseg.nn import BatchNorm2d, convert

_RESERVED = frozenset({IMAGES, "target", "loss", *dir(nn.ModuleDict())})
"""What a segment cannot be named: other things that are read, and attributes of the dict that holds the segments."""
_ENCODERS = ("backbone", "encoder")
"""Names of the child that pretrained weights fill, in torchvision's networks and in segmentation_models_pytorch's."""


def segment_module(
    module: nn.Module, *, name: str, num_classes: int | None = None, norm: NormMode = NormMode.BATCH
) -> SegmentedModel:
    """Any network that torch.fx or torch.export can trace, as segments.

    Args:
        module: Reads images (N, 3, H, W); returns logits (N, K, h, w) or (N, K), or several in a tuple or dict, the
            main ones first or under "out". It is changed, and its modules are used.
        name: Of the segmented model.
        num_classes: What K must be; None takes any.
        norm: Mode of all its batch norms.

    Raises:
        InputError: it cannot be traced or cut, what it returns are no such logits, or a norm cannot have the mode.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    >>> segment_module(net, name="net").reads
    {'layer_0': ('images',), 'layer_2': ('layer_0',), 'layer_4': ('layer_2',)}
    """
    _convert_norms(module, norm)
    with _alone(module):
        graph = trace(module)
        samples = take_samples(module, graph)
        outputs = tuple(dict.fromkeys(_without_upsampling(node, module, samples) for node in outputs_of(graph)))
        classes, is_dense = _check_outputs(name, outputs, samples, num_classes)
        steps, segments, made_by = _cut(Steps(module, graph, samples, outputs))
    return SegmentedModel(
        name,
        segments,
        outputs=[made_by[steps.position[node]] for node in outputs],
        num_classes=classes,
        output_stride=steps.samples.output_stride,
        encoder=_encoder(segments),
        is_dense=is_dense,
        norm_stride=_norm_stride(steps),
        image=samples.image,
    )


def _cut(steps: Steps) -> tuple[Steps, list[Segment], dict[int, str]]:
    """The steps as they are cut, the segments, and which segment each step is in.

    A size that a segment needs and cannot tell from what it reads may be told where sides are multiples of a larger
    output stride, for there sizes are proportional. Where that does not help either, what has the size crosses.
    """
    first = steps
    for stride in (stride for stride in STRIDES if stride >= first.samples.output_stride):
        if stride > first.samples.output_stride:
            try:
                steps = replace(first, samples=take_samples(first.model, first.graph, least_stride=stride))
            except InputError:
                continue
        parts = cut(steps)
        segments, surplus = _segments(steps, parts)
        if not surplus:
            return steps, segments, _makers(parts, segments)
    steps = first
    while True:
        parts = cut(steps)
        segments, surplus = _segments(steps, parts)
        if not surplus:
            return steps, segments, _makers(parts, segments)
        steps = replace(steps, extra=steps.extra | surplus)


def _makers(parts: Sequence[range], segments: Sequence[Segment]) -> dict[int, str]:
    return {position: segment.name for part, segment in zip(parts, segments, strict=True) for position in part}


def original_name(name: str) -> str:
    """The original's name of a parameter or buffer of a segmented model.

    >>> original_name("segments.layer1_0.layer1.0.conv1.weight")
    'layer1.0.conv1.weight'
    """
    return name.split(".", 2)[2]


def load_original(model: SegmentedModel, weights: Mapping[str, Tensor], *, where: str = "weights") -> list[str]:
    """Fill a model that `segment_module` made from a state dict of the original network.

    Returns:
        The keys that were not used: of what the original has and does not run.

    Raises:
        ProblemsError: keys are missing, or shapes differ; all are named, and nothing has been changed.
    """
    chosen, unused = match_original(model, weights, where=where)
    model.load_state_dict(chosen)
    return unused


def match_original(
    model: SegmentedModel, weights: Mapping[str, Tensor], *, where: str
) -> tuple[dict[str, Tensor], list[str]]:
    """What `load_original` loads, by our names, and the keys that it does not use.

    Raises:
        ProblemsError: as `load_original`.
    """
    own = model.state_dict()
    wanted = {original_name(name): name for name in own}
    problems = [f"nothing in it fills {key}" for key in wanted if key not in weights]
    problems += [
        f"{key}: shape must be {tuple(own[name].shape)}, got {tuple(weights[key].shape)}"
        for key, name in wanted.items()
        if key in weights and own[name].shape != weights[key].shape
    ]
    if problems:
        raise ProblemsError(f"{where} (a state dict of {model.name} is needed)", problems)
    return {name: weights[key] for key, name in wanted.items()}, [key for key in weights if key not in wanted]


def load_original_file(model: SegmentedModel, path: Path) -> list[str]:
    """`load_original` from a file saved by torch.save, read with weights_only=True.

    Raises:
        InputError: the file cannot be read as a state dict.
        ProblemsError: as `load_original`.
    """
    return load_original(model, read_weights(path, f"a state dict of {model.name}"), where=str(path))


def _convert_norms(module: nn.Module, norm: NormMode) -> None:
    with unset_fake_temporarily():  # Classes change, tensors do not.
        convert(module, recompute=Recompute.NONE, norm=norm)
    problems = []
    for name, part in module.named_modules():
        if type(part) is nn.BatchNorm2d and part.affine and part.track_running_stats and part.momentum is not None:
            part.__class__ = BatchNorm2d
            part.__dict__["process_group"] = None
        if isinstance(part, BatchNorm2d):
            part.norm = norm
            if norm is NormMode.FROZEN:
                part.weight.requires_grad_(False)
                part.bias.requires_grad_(False)
        elif isinstance(part, _NormBase) and part.track_running_stats and norm is not NormMode.BATCH:
            problems.append(f"{name}: {part} cannot be {norm}; a BatchNorm2d with affine and momentum can")
    if problems:
        raise ProblemsError(f"norm {norm} of {type(module).__name__}", problems)


@contextmanager
def _alone(module: nn.Module) -> Iterator[None]:
    """Inside, norms do not sync: the network is run on tensors without values, of which other replicas know nothing."""
    synced = [part for part in module.modules() if isinstance(part, BatchNorm2d) and part.norm is NormMode.SYNCED]
    for part in synced:
        part.norm = NormMode.BATCH
    try:
        yield
    finally:
        for part in synced:
            part.norm = NormMode.SYNCED


def _without_upsampling(node: fx.Node, module: nn.Module, samples: Samples) -> fx.Node:
    """What is upsampled bilinearly to the images' size, where that is what a node does; else the node itself."""
    read = _upsampled(node, module)
    if read is None or not isinstance(samples.runs[0].values.get(read), Tensor):
        return node
    for run in samples.runs:
        before, after = run.values[read].shape, run.values[node].shape
        if len(before) != 4 or after[2:] != run.images[2:]:
            return node
    return read


def _upsampled(node: fx.Node, module: nn.Module) -> fx.Node | None:
    """What a node upsamples bilinearly without aligning corners, as far as the node's arguments tell."""
    read = node.args[0] if node.args else None
    if not isinstance(read, fx.Node):
        return None
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        is_bilinear = isinstance(layer, nn.Upsample) and layer.mode == "bilinear" and not layer.align_corners
        return read if is_bilinear and _is_whole(layer.scale_factor) else None
    if node.target is F.interpolate:
        names = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
        given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
        is_bilinear = given.get("mode") == "bilinear" and not given.get("align_corners") and not given.get("antialias")
        return read if is_bilinear and _is_whole(given.get("scale_factor")) else None
    if node.target is torch.ops.aten.upsample_bilinear2d.vec:
        _, _, align_corners, factors = node.args
        return read if align_corners is False and _is_whole(factors) else None
    return None


def _is_whole(factor: Any) -> bool:
    """Whether a factor of a size, or several, leaves no rounding: then it says the same as the size."""
    factors = factor if isinstance(factor, list | tuple) else [factor]
    return all(one is None or (isinstance(one, int | float) and float(one).is_integer()) for one in factors)


def _check_outputs(
    name: str, outputs: Sequence[fx.Node], samples: Samples, num_classes: int | None
) -> tuple[int, bool]:
    """Classes, and whether the outputs are maps.

    Raises:
        InputError: the outputs are no logits, or of another number of classes.
    """
    values = [samples.runs[0].values[node] for node in outputs]
    shapes = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in values]
    batch = samples.runs[0].images[0]
    are_logits = all(
        isinstance(value, Tensor) and value.is_floating_point() and len(value.shape) in (2, 4) and len(value) == batch
        for value in values
    )
    if not are_logits or len({(value.dim(), value.shape[1]) for value in values}) > 1:
        raise InputError(
            f"{name} must return logits (N, K, h, w) of pixels or (N, K) of images, all with the same K; of a batch of "
            f"{batch} it returns {', '.join(map(str, shapes))}"
        )
    if not all(value.requires_grad for value in values):
        raise InputError(f"{name} has nothing to train: what it returns depends on no parameter that takes a gradient")
    classes = values[0].shape[1]
    if num_classes is not None and classes != num_classes:
        raise InputError(
            f"{name} makes logits of {classes} classes, but {num_classes} are asked for; let its function take "
            f"num_classes, or ask for {classes}"
        )
    return classes, values[0].dim() == 4


def _norm_stride(steps: Steps) -> float:
    """Side of the images over that of the smallest map of which a batch norm takes statistics; inf where that is 1x1.

    Nearest power of two, for sides may be rounded up or down on the way.
    """
    largest = 1.0
    for node in steps.nodes:
        if node.op != "call_module":
            continue
        layer = steps.model.get_submodule(str(node.target))
        if not any(isinstance(part, _NormBase) for part in layer.modules()):
            continue
        for tensor in tensors_in([steps.samples.runs[0].values[read] for read in node.all_input_nodes]):
            sides = tensor.shape[2:] if tensor.dim() == 4 else (1,)
            if math.prod(sides) == 1:
                return math.inf
            ratio = max(image / side for image, side in zip(steps.samples.runs[0].images[2:], sides, strict=True))
            largest = max(largest, 2 ** round(math.log2(ratio)))
    return largest


def _encoder(segments: Sequence[Segment]) -> list[str]:
    """Names of the segments that are of the network's backbone alone."""
    found = []
    for segment in segments:
        children = {name.split(".")[0] for name, _ in segment.module.named_parameters()}
        if len(children) == 1 and children <= set(_ENCODERS):
            found.append(segment.name)
    return found


def _segments(steps: Steps, parts: Sequence[range]) -> tuple[list[Segment], set[tuple[fx.Node, int]]]:
    """A segment for each part; and which tensors a part would have to read for their shapes, and cannot."""
    names = _names(steps, parts)
    made_by = {position: names[index] for index, part in enumerate(parts) for position in part}
    segments, surplus = [], set()
    for name, part in zip(names, parts, strict=True):
        builder = _Builder(steps, part)
        graph = builder.build()
        surplus |= builder.surplus
        reads = [made_by[steps.position[node]] if node in steps.position else IMAGES for node in builder.reads]
        if not surplus:
            segments.append(Segment(name, TracedSegment(steps.model, graph), tuple(reads)))
    return segments, surplus


class _Builder:
    """Writes the graph of one segment.

    Args:
        steps: Of the network.
        part: Positions of the segment's own.
    """

    def __init__(self, steps: Steps, part: range) -> None:
        self._steps, self._part = steps, part
        self._graph = fx.Graph()
        self._copies: dict[fx.Node, Any] = {}
        self.surplus: set[tuple[fx.Node, int]] = set()
        """Tensors that would have to be read for their shapes, with where."""
        own = steps.nodes[part.start : part.stop]
        direct = dict.fromkeys(read for node in own for read in node.all_input_nodes if self._comes_from_outside(read))
        asked = (node for node, position in steps.extra if position in part and self._comes_from_outside(node))
        shaped = sorted(set(asked), key=lambda node: steps.position.get(node, -1))
        self._read_for_shape = [node for node in shaped if node not in direct]
        self.reads = [*direct, *self._read_for_shape]
        """Nodes whose tensors the segment reads, in the order of its inputs."""

    def build(self) -> fx.Graph:
        """The graph; of no use where there is a surplus."""
        for read in self.reads:
            self._copies[read] = self._graph.placeholder(read.name)
        for position in self._part:
            node = self._steps.nodes[position]
            self._copies[node] = self._copy(node, position)
        (last,) = (i for i in self._part if self._steps.last_use[i] >= self._part.stop)
        out = self._copies[self._steps.nodes[last]]
        if self._read_for_shape:
            shaped = tuple(self._copies[node] for node in self._read_for_shape)
            out = self._graph.call_function(with_zero_gradient, (out, *shaped))
        self._graph.output(out)
        return self._graph

    def _comes_from_outside(self, node: fx.Node) -> bool:
        return node.op == "placeholder" or (
            node in self._steps.position and self._steps.position[node] not in self._part
        )

    def _copy(self, node: fx.Node, position: int) -> fx.Node:
        args, kwargs = map_arg((node.args, node.kwargs), lambda read: self._argument(read, position))
        return self._graph.create_node(node.op, node.target, args, kwargs, node.name)

    def _argument(self, node: fx.Node, position: int) -> Any:
        """What stands for a node in this segment."""
        if node not in self._copies:
            free = [node, *self._steps.free_inputs(node)]
            sources = dict.fromkeys(read for one in free for read in one.all_input_nodes if read not in free)
            missing = [read for read in sources if read not in self._copies]
            self._copies[node] = self._copy(node, position) if not missing else self._expressed(node, missing, position)
        return self._copies[node]

    def _expressed(self, node: fx.Node, missing: Sequence[fx.Node], position: int) -> Any:
        """A size, or several, by the shapes of what the segment reads."""
        leaves = [tree_flatten(value)[0] for value in self._steps.samples.values(node)]
        found = [self._leaf(list(values)) for values in zip(*leaves, strict=True)]
        if any(value is _UNKNOWN for value in found):
            self.surplus |= {(read, position) for read in missing}
            return 0
        is_single = not isinstance(self._steps.samples.runs[0].values[node], list | tuple)
        return found[0] if is_single else tuple(found)

    def _leaf(self, values: list[Any]) -> Any:
        """A value, given in each sample: a constant, or p/q of a side of a tensor that is read."""
        first = values[0]
        if isinstance(first, torch.device | torch.dtype):
            kind = "device" if isinstance(first, torch.device) else "dtype"
            alike = [read for read in self.reads if getattr(self._steps.samples.values(read)[0], kind) == first]
            return self._graph.call_function(getattr, (self._copies[alike[0]], kind)) if alike else _UNKNOWN
        if all(value == first for value in values):
            return first
        for read in self.reads if isinstance(first, int) else ():
            for dim, sides in enumerate(zip(*(value.shape for value in self._steps.samples.values(read)), strict=True)):
                if all(value * sides[0] == first * side for value, side in zip(values, sides, strict=True)):
                    return self._side(self._copies[read], dim, first, sides[0])
        return _UNKNOWN

    def _side(self, read: fx.Node, dim: int, value: int, side: int) -> fx.Node:
        """What is to the side `dim` of a tensor as a value is to a side."""
        common = math.gcd(value, side)
        node = self._graph.call_method("size", (read, dim))
        if value != common:
            node = self._graph.call_function(operator.mul, (node, value // common))
        if side != common:
            node = self._graph.call_function(operator.floordiv, (node, side // common))
        return node


_UNKNOWN = object()


def _names(steps: Steps, parts: Sequence[range]) -> list[str]:
    """Of each part: the shortest path of its first layer with parameters that no other part is under."""
    paths: list[list[str]] = []
    for part in parts:
        nodes = steps.nodes[part.start : part.stop]
        with_parameters = [node for node in nodes if _has_parameters(steps.model, node)]
        named = [module_path(node) for node in (*with_parameters, *nodes) if module_path(node)]
        paths.append(list(dict.fromkeys(named)) or [nodes[0].name])
    names: list[str] = []
    for index, mine in enumerate(paths):
        others = [path for other, theirs in enumerate(paths) if other != index for path in theirs]
        pieces = mine[0].split(".")
        lengths = range(1, len(pieces) + 1)
        free = (".".join(pieces[:n]) for n in lengths if not any(_is_under(o, pieces[:n]) for o in others))
        names.append(_unique(next(free, mine[0]).replace(".", "_"), names))
    return names


def _has_parameters(model: nn.Module, node: fx.Node) -> bool:
    return node.op == "call_module" and any(True for _ in model.get_submodule(str(node.target)).parameters())


def _is_under(path: str, prefix: Sequence[str]) -> bool:
    return path.split(".")[: len(prefix)] == list(prefix)


def _unique(name: str, taken: Sequence[str]) -> str:
    name = f"layer_{name}" if name[0].isdigit() else name
    number = 1
    found = name
    while found in taken or found in _RESERVED:
        number += 1
        found = f"{name}_{number}"
    return found
