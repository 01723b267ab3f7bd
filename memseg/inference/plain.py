"""A network as the plain operations that it stands for, for whoever wants to change or hand on what it computes.

Our layers compute by operators of their own, which no other program knows. Exported by torch.export they record what
they stand for: convolutions, norms, ReLU, concatenation. That graph is what torch itself would compute; it is the
baseline of `memseg bench infer`, what norms are folded in, and what is written to files.
"""

import copy
from collections.abc import Sequence
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from memseg.models import SegmentedModel

aten = torch.ops.aten
CONV = aten.conv2d.default
NORM = aten.batch_norm.default
CAT = aten.cat.default
RELUS = (aten.relu.default, aten.relu_.default)
UPSAMPLE = aten.upsample_bilinear2d.vec
AVG_POOL = aten.avg_pool2d.default


@torch.no_grad()
def plain_graph(model: SegmentedModel, images: Tensor) -> GraphModule:
    """The plain operations from images (N, 3, H, W) to full-size logits, in eval mode, for images of this size alone.

    Its parameters are copies. The network is left as it is.
    """
    twin = copy.deepcopy(model).eval()
    module = torch.export.export(twin, (images,)).module(check_guards=False)
    for node in module.graph.find_nodes(op="call_module", target="_guards_fn"):
        module.graph.erase_node(node)
    tidy(module)
    return module


def tidy(module: GraphModule) -> None:
    """Drop what nothing reads, in-place operations included, and make the code new."""
    module.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    module.delete_all_unused_submodules()
    for name in {*module._buffers} - {node.target for node in module.graph.find_nodes(op="get_attr")}:
        del module._buffers[name]
    module.recompile()


def constant(module: GraphModule, node: Any) -> Tensor | None:
    """The parameter or buffer that a node stands for; None of None."""
    if node is None:
        return None
    found: Any = module
    for part in node.target.split("."):
        found = getattr(found, part)
    return cast(Tensor, found).detach()


def put_constant(module: GraphModule, value: Tensor, before: Node) -> Node:
    """A new buffer, and the node before another that stands for it."""
    name = next(name for name in map("constant{}".format, count()) if not hasattr(module, name))
    module.register_buffer(name, value)
    with module.graph.inserting_before(before):
        return module.graph.get_attr(name)


def geometry(conv: Node) -> tuple[list[int], list[int], list[int], int]:
    """Stride, padding, dilation and groups of a convolution."""
    given = list(conv.args[3:])
    stride, padding, dilation, groups = given + [[1, 1], [0, 0], [1, 1], 1][len(given) :]
    return _pair(stride), _pair(padding), _pair(dilation), cast(int, groups)


def is_projection(node: Node) -> bool:
    """Whether it is a 1x1 convolution without padding, which mixes the channels of each pixel by itself."""
    if node.target is not CONV:
        return False
    _, padding, _, groups = geometry(node)
    return shape(node.args[1])[2:] == (1, 1) and padding == [0, 0] and groups == 1


def sole_reader(node: Node) -> Node | None:
    """The one node that reads it; None where there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def shape(node: Any) -> tuple[int, ...]:
    """Of the tensor that a node makes."""
    return tuple(node.meta["val"].shape)


def _pair(value: Any) -> list[int]:
    return [int(side) for side in value] if isinstance(value, Sequence) else [int(value)] * 2
