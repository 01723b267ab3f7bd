"""Convolutions in whole numbers of 8 bits: four times the products of float32 on processors that have VNNI.

Post-training quantization in the usual way (Jacob et al., arXiv:1712.05877), with what makes it fit DenseNets:

- Every channel of a map has a scale and an offset of its own, x = scale * code + offset with codes 0..255. The next
  convolution's weights and bias take them over, so nothing has to be rescaled between layers.
- What a convolution makes is written as codes at once, rectified by saturation. A dense block's features stay codes, so
  concatenating and clamping them moves a quarter of the bytes.
- Before a padded convolution offsets are 0, as they are behind a ReLU: zeros are padded, and must mean zero.
- Codes reach only as far as some reader looks: what all clamps behind a channel cut off needs no code of its own.

Weights have 8 bits and a scale for each output channel. Ranges are those seen on sample images. The first convolution,
which reads the images, and everything that is no convolution stay in float32.
"""

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from memseg.errors import InputError
from memseg.inference.plain import CAT, CONV, RELUS, aten, constant, geometry, put_constant, shape, sole_reader, tidy

CLAMP = aten.clamp.Tensor
_LARGEST_CODE = 255
_LARGEST_WEIGHT = 127
_SMALLEST = 2.0**-100
"""Scale, of a channel that is the same everywhere."""
_FEWEST_CHANNELS = 16
"""Of a convolution that is worth it; fewer read the images."""


def why_not_quantized(device: torch.device) -> str | None:
    """Why networks cannot be quantized on a device; None where they can."""
    if device.type != "cpu":
        return "8-bit convolutions are there for CPUs alone"
    return None if torch.cpu._is_vnni_supported() else "the processor has no VNNI instructions"


@torch.no_grad()
def quantize(module: GraphModule, samples: Iterable[Tensor]) -> GraphModule:
    """A graph without batch norms with its convolutions in 8 bits; the given one is left as it is.

    Args:
        module: As `memseg.inference.fold.fold_norms` makes it, in float32, on a CPU.
        samples: Images (N, 3, H, W) of the graph's size, like those that it will see.

    Raises:
        InputError: there is no sample, or the processor has no instructions for it.
    """
    if reason := why_not_quantized(torch.device("cpu")):
        raise InputError(f"a network can be quantized on a CPU with VNNI instructions alone: {reason}")
    module = copy.deepcopy(module)
    observer = _Observer(module)
    for images in samples:
        observer.run(images)
    if not observer.seen:
        raise InputError("quantizing needs at least one sample image")
    _Quantizer(module, observer.seen).run()
    tidy(module)
    return module


class _Seen(NamedTuple):
    """The smallest and the largest number of each channel of a map, over all samples; (C,) in float64."""

    low: Tensor
    high: Tensor


class _Observer(Interpreter):
    """Runs a graph and remembers the ranges of its maps."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[Node, _Seen] = {}

    def run_node(self, n: Node) -> Any:
        found = super().run_node(n)
        if n.op == "call_function" and isinstance(found, Tensor) and found.dim() == 4:
            low, high = (limit.double() for limit in torch.aminmax(found.transpose(0, 1).flatten(1), dim=1))
            if n in self.seen:
                low, high = low.minimum(self.seen[n].low), high.maximum(self.seen[n].high)
            self.seen[n] = _Seen(low, high)
        return found


class _Range(NamedTuple):
    """What codes of a map must reach, each (C,) in float64."""

    low: Tensor
    high: Tensor
    padded: bool
    """Whether a padded convolution reads it, so that zero must be a code; it is the first then."""


def _needed_ranges(module: GraphModule, seen: dict[Node, _Seen]) -> dict[Node, _Range]:
    """The ranges of the maps that were seen, without what all readers of a channel cut off."""
    needed: dict[Node, _Range] = {}
    for node in reversed(module.graph.nodes):
        if node in seen:
            low, high = seen[node]
            reads = [_needed_by(module, reader, node, needed, low, high) for reader in node.users]
            if reads:
                low = low.maximum(torch.stack([read.low for read in reads]).amin(0)).minimum(high)
                high = high.minimum(torch.stack([read.high for read in reads]).amax(0)).maximum(low)
            padded = any(read.padded for read in reads)
            needed[node] = _Range(torch.zeros_like(low) if padded else low, high, padded)
    return needed


def _needed_by(
    module: GraphModule, reader: Node, node: Node, needed: dict[Node, _Range], low: Tensor, high: Tensor
) -> _Range:
    """What one reader needs of the range low..high of a map."""
    if reader.target is CLAMP:
        return _Range(*_limits(module, reader), padded=False)
    if reader.target is CAT:
        parts = cast(list[Node], reader.args[0])
        at = sum(shape(part)[1] for part in parts[: parts.index(node)])
        own = slice(at, at + len(low))
        return _Range(needed[reader].low[own], needed[reader].high[own], needed[reader].padded)
    padded = reader.target is CONV and geometry(reader)[1] != [0, 0]
    return _Range(low, high, padded and bool((low >= 0).all()))


def _limits(module: GraphModule, clamp: Node) -> tuple[Tensor, Tensor]:
    """Those of a clamp, (C,) in float64."""
    low, high = (constant(module, limit) for limit in clamp.args[1:3])
    assert low is not None
    assert high is not None
    return low.double().flatten(), high.double().flatten()


class _Codes(NamedTuple):
    """A map in codes: x = scale * code + offset; numbers are (C,) in float64."""

    node: Node
    scale: Tensor
    offset: Tensor


class _Quantizer:
    """Rewrites a graph in order; what only convolutions read is made as codes, the rest is turned into codes."""

    def __init__(self, module: GraphModule, seen: dict[Node, _Seen]) -> None:
        self.module, self.graph, self.seen = module, module.graph, seen
        self.needed = _needed_ranges(module, seen)
        self.made: dict[Node, _Codes] = {}

    def run(self) -> None:
        for conv in self.graph.find_nodes(op="call_function", target=CONV):
            if self.can_quantize(conv):
                self.quantize_conv(conv)

    def can_quantize(self, conv: Node) -> bool:
        x = cast(Node, conv.args[0])
        _, padding, _, groups = geometry(conv)
        if x not in self.seen or groups != 1 or shape(x)[1] < _FEWEST_CHANNELS:
            return False
        return padding == [0, 0] or bool((self.seen[x].low >= 0).all())

    def reads_codes(self, node: Node) -> bool:
        """Whether everything that reads it can read codes."""
        for reader in node.users:
            if reader.target is CONV:
                if reader.args[0] is not node or not self.can_quantize(reader):
                    return False
            elif reader.target not in (CAT, CLAMP) or not self.reads_codes(reader):
                return False
        return bool(node.users)

    def codes(self, node: Node) -> _Codes:
        """The map of a node in codes."""
        if node not in self.made:
            self.made[node] = self.make_codes(node)
        return self.made[node]

    def make_codes(self, node: Node) -> _Codes:
        if node.target is CAT:
            parts = [self.codes(part) for part in cast(list[Node], node.args[0])]
            with self.graph.inserting_before(node):
                joined = self.graph.call_function(CAT, ([part.node for part in parts], 1))
            return _Codes(joined, torch.cat([part.scale for part in parts]), torch.cat([part.offset for part in parts]))
        if node.target is CLAMP:
            return self.clamp_codes(node)
        return self.turn_into_codes(node)

    def scale_of(self, node: Node) -> tuple[Tensor, Tensor]:
        """Scale and offset (C,) for the values that a node has."""
        low, high, _ = self.needed[node]
        return ((high - low) / _LARGEST_CODE).clamp(min=_SMALLEST), low

    def clamp_codes(self, node: Node) -> _Codes:
        x = self.codes(cast(Node, node.args[0]))
        low, high = _limits(self.module, node)
        limits = [((limit - x.offset) / x.scale).round().clamp(0, _LARGEST_CODE) for limit in (low, high)]
        nodes = [put_constant(self.module, limit.to(torch.uint8).view(1, -1, 1, 1), node) for limit in limits]
        with self.graph.inserting_before(node):
            clamped = self.graph.call_function(CLAMP, (x.node, *nodes))
        # What is cut off everywhere is a constant, which no code may stand for.
        top = x.offset + _LARGEST_CODE * x.scale
        constant_low, constant_high = low >= top, high <= x.offset
        offset = torch.where(constant_low, low, torch.where(constant_high, high, x.offset))
        return _Codes(clamped, x.scale.masked_fill(constant_low | constant_high, 0), offset)

    def turn_into_codes(self, node: Node) -> _Codes:
        scale, offset = self.scale_of(node)
        x, after = node, node.next
        if node.target in RELUS and sole_reader(cast(Node, node.args[0])) is node:
            x = cast(Node, node.args[0])  # Codes below the first are cut off, which rectifies.
        numbers = [
            put_constant(self.module, number.float().view(1, -1, 1, 1), after)
            for number in (0.5 - offset / scale, 1 / scale)
        ]
        with self.graph.inserting_before(after):
            scaled = self.graph.call_function(aten.addcmul.default, (numbers[0], x, numbers[1]))
            cut = self.graph.call_function(aten.clamp_.default, (scaled, 0, _LARGEST_CODE))
            codes = self.graph.call_function(aten.to.dtype, (cut, torch.uint8))
        return _Codes(codes, scale, offset)

    def quantize_conv(self, conv: Node) -> None:
        x = self.codes(cast(Node, conv.args[0]))
        weight, bias = (constant(self.module, cast(Node, part)) for part in (*conv.args, None)[1:3])
        assert weight is not None
        stride, padding, dilation, groups = geometry(conv)
        kernel = weight.double()
        relu = sole_reader(conv)
        rectified = relu is not None and relu.target in RELUS
        end = cast(Node, relu) if rectified else conv
        total = kernel.sum((2, 3)) @ x.offset + (0 if bias is None else bias.double())
        kernel = kernel * x.scale.view(1, -1, 1, 1)
        step = (kernel.abs().amax((1, 2, 3)) / _LARGEST_WEIGHT).clamp(min=_SMALLEST)
        whole = (kernel / step.view(-1, 1, 1, 1)).round().clamp(-_LARGEST_WEIGHT, _LARGEST_WEIGHT).to(torch.int8)
        as_codes = self.reads_codes(end)
        if as_codes:
            scale, offset = self.scale_of(end)
            step, total = step / scale, (total - offset) / scale
        step, total = step.float(), total.float()
        packed = torch.ops.onednn.qconv_prepack(
            whole, step, 1.0, 0, stride, padding, dilation, groups, list(shape(conv.args[0]))
        )
        constants = (packed, step, torch.zeros(len(step), dtype=torch.int32), total)
        nodes = [put_constant(self.module, value, conv) for value in constants]
        with self.graph.inserting_before(conv):
            new = self.graph.call_function(
                torch.ops.onednn.qconv2d_pointwise.default,
                (
                    x.node, 1.0, 0, *nodes, stride, padding, dilation, groups, 1.0, 0,
                    torch.uint8 if as_codes else torch.float32,
                    "relu" if rectified else "none", [], "",
                ),
            )  # fmt: skip
        if as_codes:
            self.made[end] = self.made[conv] = _Codes(new, scale, offset)
        else:
            new.meta["val"], self.seen[new], self.needed[new] = end.meta["val"], self.seen[end], self.needed[end]
            end.replace_all_uses_with(new)
