"""Batch norms folded away: in inference they are a scale and a shift for each channel, known beforehand.

Where a norm alone reads a convolution, weight and bias of the convolution take over its numbers, also through what
commutes with them: upsampling, average pooling, concatenation of such maps. That is all there is in a ResNet. In a
DenseNet every map has many readers, each with a norm of its own before a 1x1 convolution. There

    conv(relu(s * x + t)) = conv(s * (clamp(x) - c)),    c = -t / s,

where clamp cuts a channel off below c if s is positive, else above. Scale and offset go into the convolution, and of
norm and ReLU one pass is left, a clamp. A padded convolution would pad with something else than zeros, so before one,
norm and ReLU stay a multiplication, an addition and a ReLU.

Average pooling behind a 1x1 convolution, as in a DenseNet's transitions, goes before it: a quarter of the products.
"""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from memseg.inference.plain import (
    AVG_POOL,
    CAT,
    CONV,
    NORM,
    RELUS,
    UPSAMPLE,
    aten,
    constant,
    geometry,
    is_projection,
    put_constant,
    shape,
    sole_reader,
    tidy,
)

_UNPADDED = 3
"""Arguments of a pooling without padding: its input, window and stride."""


@torch.no_grad()
def fold_norms(module: GraphModule, *, pool_first: bool = True) -> GraphModule:
    """A plain graph without batch norms, that computes the same but for rounding; the given one is left as it is.

    Args:
        module: As `plain_graph` makes it.
        pool_first: Whether average pooling goes before the 1x1 convolution that it follows.
    """
    module = copy.deepcopy(module)
    for node in module.graph.find_nodes(op="call_function", target=NORM):
        scale, shift = _numbers(module, node)
        x = cast(Node, node.args[0])
        if _takes(x):
            _take(module, x, scale, shift)
            node.replace_all_uses_with(x)
            module.graph.erase_node(node)
        elif not _clamp(module, node, scale, shift):
            _multiply(module, node, scale, shift)
    _rectify_parts(module)
    if pool_first:
        _pool_first(module)
    tidy(module)
    return module


def _numbers(module: GraphModule, norm: Node) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) of a norm that uses its running statistics, in float64."""
    weight, bias, mean, var = (constant(module, part) for part in norm.args[1:5])
    assert mean is not None
    assert var is not None
    scale = (var.double() + cast(float, norm.args[7])).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -mean.double() * scale
    return scale, shift if bias is None else shift + bias.double()


def _takes(x: Node) -> bool:
    """Whether what makes x can scale and shift its channels itself, and nobody else would see it."""
    if sole_reader(x) is None:
        return False
    if x.target is CAT:
        parts = cast(Sequence[Node], x.args[0])
        return x.args[1:] == (1,) and all(_takes(part) for part in parts)
    if x.target is UPSAMPLE or (x.target is AVG_POOL and len(x.args) <= _UNPADDED):
        return _takes(cast(Node, x.args[0]))
    return x.target is CONV


def _take(module: GraphModule, x: Node, scale: Tensor, shift: Tensor) -> None:
    """Have what makes x scale and shift its channels."""
    if x.target is CAT:
        parts = cast(Sequence[Node], x.args[0])
        sizes = [shape(part)[1] for part in parts]
        numbers = (torch.split(scale, sizes), torch.split(shift, sizes))
        for part, own_scale, own_shift in zip(parts, *numbers, strict=True):
            _take(module, part, own_scale, own_shift)
    elif x.target is CONV:
        weight, bias = _kernel(module, x)
        _set_kernel(module, x, weight * scale.view(-1, 1, 1, 1), bias * scale + shift)
    else:
        _take(module, cast(Node, x.args[0]), scale, shift)


def _clamp(module: GraphModule, norm: Node, scale: Tensor, shift: Tensor) -> bool:
    """Make norm and ReLU a clamp, if only 1x1 convolutions read them; whether that could be done."""
    relu = sole_reader(norm)
    if relu is None or relu.target not in RELUS or not all(is_projection(reader) for reader in relu.users):
        return False
    dtype = cast(Tensor, norm.meta["val"]).dtype
    cut = (-shift / scale).to(dtype)
    # What is scaled by nothing, or next to it, is the same everywhere: cut it off at 0 and add relu(shift).
    flat = ~cut.isfinite()
    cut[flat], scale = 0, scale.masked_fill(flat, 0)
    gone = torch.where(flat, shift.clamp(min=0), -cut.double() * scale)
    low = torch.where(scale >= 0, cut, -torch.inf).masked_fill(flat, 0)
    high = torch.where(scale < 0, cut, torch.inf).masked_fill(flat, 0)
    for reader in list(relu.users):
        weight, bias = _kernel(module, reader)
        _set_kernel(module, reader, weight * scale.view(1, -1, 1, 1), bias + weight.flatten(1) @ gone)
    limits = [put_constant(module, limit.view(1, -1, 1, 1), norm) for limit in (low, high)]
    _replace(module, relu, norm, aten.clamp.Tensor, (norm.args[0], *limits))
    return True


def _multiply(module: GraphModule, norm: Node, scale: Tensor, shift: Tensor) -> None:
    """Make a norm one multiplication and addition."""
    dtype = cast(Tensor, norm.meta["val"]).dtype
    numbers = [put_constant(module, number.to(dtype).view(1, -1, 1, 1), norm) for number in (shift, scale)]
    _replace(module, norm, norm, aten.addcmul.default, (numbers[0], norm.args[0], numbers[1]))


def _replace(module: GraphModule, last: Node, first: Node, target: Any, args: tuple[Any, ...]) -> None:
    """Compute another function instead of a chain of nodes from `first` to `last`, which is `first` or reads it."""
    with module.graph.inserting_before(first):
        new = module.graph.call_function(target, args)
    new.meta.update(last.meta)
    last.replace_all_uses_with(new)
    for node in dict.fromkeys((last, first)):
        module.graph.erase_node(node)


def _rectify_parts(module: GraphModule) -> None:
    """Rectify maps before they are concatenated: what makes them may do it on the way."""
    for relu in [node for node in module.graph.nodes if node.target in RELUS]:
        joined = cast(Node, relu.args[0])
        parts = cast(list[Node], joined.args[0])
        if joined.target is not CAT or not all(sole_reader(node) for node in (joined, *parts)):
            continue
        for part in parts:
            with module.graph.inserting_before(joined):
                rectified = module.graph.call_function(aten.relu_.default, (part,))
            rectified.meta.update(part.meta)
            joined.replace_input_with(part, rectified)
        relu.replace_all_uses_with(joined)
        module.graph.erase_node(relu)


def _pool_first(module: GraphModule) -> None:
    for pool in module.graph.find_nodes(op="call_function", target=AVG_POOL):
        conv = pool.args[0]
        if (
            not is_projection(conv)
            or sole_reader(conv) is None
            or geometry(conv)[0] != [1, 1]
            or len(pool.args) > _UNPADDED
        ):
            continue
        x = conv.args[0]
        with module.graph.inserting_before(conv):
            pooled = module.graph.call_function(AVG_POOL, (x, *pool.args[1:]))
        pooled.meta["val"] = x.meta["val"].new_empty((*shape(x)[:2], *shape(pool)[2:]))
        conv.replace_input_with(x, pooled)
        conv.meta["val"] = pool.meta["val"]
        pool.replace_all_uses_with(conv)
        module.graph.erase_node(pool)


def _kernel(module: GraphModule, conv: Node) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution, in float64."""
    weight = constant(module, conv.args[1])
    bias = constant(module, conv.args[2] if len(conv.args) > 2 else None)
    assert weight is not None
    return weight.double(), weight.new_zeros(weight.shape[0], dtype=torch.float64) if bias is None else bias.double()


def _set_kernel(module: GraphModule, conv: Node, weight: Tensor, bias: Tensor) -> None:
    dtype = cast(Tensor, conv.meta["val"]).dtype
    nodes = []
    for value, like in ((weight, conv.args[1]), (bias, None)):
        nodes.append(put_constant(module, value.to(dtype), conv))
        nodes[-1].meta["val"] = cast(Node, like).meta["val"] if like is not None else value
    conv.args = (conv.args[0], *nodes, *geometry(conv))
