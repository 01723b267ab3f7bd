"""Consecutive operations of a traced network as the module of a segment.

The original's modules are in it under their own names, in containers that do nothing: parameter `layer1.0.conv1.weight`
of a network is `segments.<segment>.layer1.0.conv1.weight` of its segmented model. The operations run as Python code
that torch.fx makes of them, so tensors die as early as in a forward written by hand.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from memseg.levels import Recompute
from memseg.models.tracing import TRAINING
from memseg.nn import rebuild
from memseg.nn.autograd import is_traced
from memseg.nn.recompute import has_levels


class TracedSegment(nn.Module):
    """Runs a graph over modules and parameters of a network.

    Levels: `none` keeps what autograd keeps; `segment` keeps only what the segment reads. Where layers of memseg's are
    inside, their levels are there too, and the other operations keep what they keep. A segment that is just one such
    layer hands every level on to it.

    Args:
        root: The network.
        graph: Placeholders in the order of the segment's inputs; one output.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__()
        self.graph = graph
        operations = [node for node in graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr") and node.target != TRAINING:
                self._adopt(root, str(node.target))
        called = [self.get_submodule(str(node.target)) for node in operations if node.op == "call_module"]
        self._layers = tuple(str(node.target) for node in operations if _has_levels(self, node))
        self._is_one_layer = len(operations) == len(self._layers) == 1
        inside = {level for module in called if has_levels(module) for level in cast(Any, module).levels}
        if not self._is_one_layer:
            inside |= {Recompute.NONE, Recompute.SEGMENT}
        self.levels: tuple[Recompute, ...] = tuple(level for level in Recompute if level in inside)
        self._recompute = Recompute.NONE
        self._code = _compiled(graph)
        self.recompute = Recompute.NONE

    @property
    def recompute(self) -> Recompute:
        """The level; one that the segment lacks acts as the next lower one that it has."""
        return self._recompute

    @recompute.setter
    def recompute(self, level: Recompute) -> None:
        self._recompute = level
        for name in self._layers:
            layer = cast(Any, self.get_submodule(name))
            layer.recompute = _nearest(level, layer.levels)

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the graph makes of its inputs."""
        if self._recompute is Recompute.SEGMENT and not self._is_one_layer and not is_traced():
            return rebuild(self._run, *inputs, owner=self)
        return self._run(*inputs)

    def _run(self, *inputs: Tensor) -> Tensor:
        return cast(Tensor, self._code(self, *inputs))

    def _adopt(self, root: nn.Module, target: str) -> None:
        """Hold what the network has under this name under the same name."""
        path, _, name = target.rpartition(".")
        theirs, mine = root, cast(nn.Module, self)
        for part in path.split(".") if path else ():
            theirs = cast(nn.Module, getattr(theirs, part))
            if part not in mine._modules:
                mine.add_module(part, nn.Module())
            mine = cast(nn.Module, mine._modules[part])
        value = getattr(theirs, name)
        if isinstance(value, nn.Parameter | nn.Module):
            setattr(mine, name, value)
        elif isinstance(value, Tensor):
            # A constant that the tracer met is a plain attribute; as a buffer it moves with the segment.
            is_saved = name in theirs._buffers and name not in theirs._non_persistent_buffers_set
            mine.register_buffer(name, value, persistent=is_saved)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_code": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._code = _compiled(self.graph)


def with_zero_gradient(out: Tensor, *read_for_shape: Tensor) -> Tensor:
    """The first tensor; the others, of which only shapes were read, get zeros for a gradient.

    They may have come from another card, which waits for one.
    """
    return cast(Tensor, _WithZeroGradient.apply(out, *read_for_shape))


class _WithZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, *others: Tensor) -> Tensor:
        ctx.shapes = [other.shape for other in others]
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        zero = grad.new_zeros(())
        wanted = zip(ctx.shapes, ctx.needs_input_grad[1:], strict=True)
        return grad, *(zero.expand(shape) if needed else None for shape, needed in wanted)


def _has_levels(segment: nn.Module, node: fx.Node) -> bool:
    return node.op == "call_module" and has_levels(segment.get_submodule(str(node.target)))


def _nearest(level: Recompute, levels: tuple[Recompute, ...]) -> Recompute:
    """The level, or the next lower of those that there are."""
    order = list(Recompute)
    return max((one for one in levels if order.index(one) <= order.index(level)), key=order.index)


def _compiled(graph: fx.Graph) -> Callable[..., Any]:
    code = graph.python_code("self")
    namespace: dict[str, Any] = {"torch": torch, **code.globals}
    exec(compile(code.src, "<traced segment>", "exec"), namespace)
    return cast(Callable[..., Any], namespace["forward"])
