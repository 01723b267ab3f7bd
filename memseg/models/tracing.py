"""The operations of anybody's network, as a graph over its own modules.

torch.fx runs a forward on stand-ins and writes down what is done with them. Layers of torch and of memseg stay whole,
so modules keep their identity, and with it names, modes and checkpoints. It cannot follow a branch on a size or a loop
over one. Where that happens in a module without parameters, the module stays whole too. Elsewhere torch.export is
asked, which can, but gives bare operators; there batch norms are put back as the modules that they came from. Where
that fails as well, the modules that torch.fx cannot enter stay whole.

Both write down one mode. A forward may ask `self.training` (dropout by function, stochastic depth, auxiliary heads), so
each network is traced in both modes. Where only constants differ, the graph chooses between them as it runs; a module
that does something else in evaluation stays whole; and what only training's auxiliary outputs need may be there alone.

What comes back: one placeholder, the images, and an output that is a tuple of nodes, the main one first.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.graph import CodeGen
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from memseg.errors import InputError
from memseg.models.factory import empty_copy
from memseg.nn import BatchNorm2d
from memseg.nn.fused_sequential import FusedSequential, pieces_of

TRAINING = "training"
"""The target of a get_attr node that reads the mode."""

_EXPORTED_BATCH, _EXPORTED_IMAGE = 2, (224, 288)
"""What torch.export is shown; other sizes are possible where the forward does not rule them out."""
_DROPOUTS = (
    torch.ops.aten.dropout.default,
    torch.ops.aten.feature_dropout.default,
    torch.ops.aten.alpha_dropout.default,
    torch.ops.aten.feature_alpha_dropout.default,
)


class _UntraceableError(Exception):
    """A forward cannot be written down, and why."""


class _DiffersError(Exception):
    """A forward does something else in evaluation."""


class _StuckError(Exception):
    """torch.fx cannot follow the forward of a module, `path`."""

    def __init__(self, path: str, error: Exception) -> None:
        self.path = path
        super().__init__(f"in {path or 'the network itself'}, {first_line(error)}")


def trace(model: nn.Module) -> fx.Graph:
    """The graph of a network in training; names of modules and parameters in it are the network's.

    Raises:
        InputError: neither torch.fx nor torch.export can trace it; with what stopped them.
    """
    ways: dict[str, Callable[[], fx.Graph]] = {
        "torch.fx": lambda: _by_fx(model, lambda part: not any(True for _ in part.parameters())),
        "torch.export": lambda: _by_export(model),
        "torch.fx, around what it cannot enter": lambda: _by_fx(model, lambda part: part is not model),
    }
    reasons = []
    for name, way in ways.items():
        try:
            return way()
        except _DiffersError as error:
            reasons.append(f"{name}: {error}")
        except InputError:
            raise
        except Exception as error:
            reasons.append(f"{name}: {first_line(error)}")
    raise InputError(
        f"the forward of {type(model).__name__} cannot be traced, so it cannot be cut into segments:\n  "
        + "\n  ".join(reasons)
        + "\nPut the part that cannot be followed into a module of its own, which is then kept whole, or write the "
        "network as memseg.models.Segment"
    )


def either(training: bool, first: Any, second: Any) -> Any:
    """The first in training, the second in evaluation."""
    return first if training else second


def needed_for(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and all that they are computed from."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def outputs_of(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """What a traced graph returns, the main output first."""
    return cast(tuple[fx.Node, ...], graph.output_node().args[0])


def module_path(node: fx.Node) -> str:
    """Name of the innermost module that a node was traced in; "" is the network itself."""
    stack = node.meta.get("nn_module_stack") or {}
    *_, (path, _kind) = stack.values() or [("", None)]
    return cast(str, path)


def _by_fx(model: nn.Module, may_stay_whole: Callable[[nn.Module], bool]) -> fx.Graph:
    leaves: set[str] = set()
    while True:
        try:
            graph = _fx_graph(model.train(), leaves)
            with unset_fake_temporarily(), FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
                evaluation = _fx_graph(empty_copy(model).eval(), leaves)
        except _StuckError as error:
            if not error.path or error.path in leaves or not may_stay_whole(model.get_submodule(error.path)):
                raise
            leaves.add(error.path)
            continue
        differing = _differing_modules(graph, evaluation) - leaves - {""}
        if not differing:
            return _with_both_modes(graph, evaluation)
        leaves |= differing


class _Tracer(fx.Tracer):
    """Keeps layers of torch and of ours whole, and what is asked for."""

    proxy_buffer_attributes = True

    def __init__(self, leaves: set[str]) -> None:
        super().__init__()
        self._leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self._leaves:
            return True
        if isinstance(m, FusedSequential):
            return len(pieces_of(m, BatchNorm2d)) == 1 and len(m) > 1
        ours = m.__module__.startswith("memseg.nn.") and not isinstance(m, nn.Sequential)
        return ours or super().is_leaf_module(m, module_qualified_name)


def _fx_graph(model: nn.Module, leaves: set[str]) -> fx.Graph:
    _, *others = inspect.signature(model.forward).parameters.values()
    named = [parameter for parameter in others if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    defaults = {p.name: p.default for p in named if p.kind is not inspect.Parameter.VAR_POSITIONAL}
    if missing := [name for name, default in defaults.items() if default is inspect.Parameter.empty]:
        raise InputError(f"a network must read images alone, but {type(model).__name__} also needs {missing}")
    tracer = _Tracer(leaves)
    try:
        graph = tracer.trace(model, defaults or None)
    except Exception as error:
        path, _ = next(reversed(tracer.module_stack.values()), ("", None))
        raise _StuckError(path, error) from error
    _, *surplus = graph.find_nodes(op="placeholder")
    for node in surplus:
        _erase(graph, node)
    result = graph.output_node().args[0]
    graph.output_node().args = (tuple(_main_first(result)),)
    return graph


def _main_first(result: Any) -> list[fx.Node]:
    """All nodes in what a forward returns; "out" of a dict before the others."""
    if isinstance(result, fx.Node) and isinstance(result.target, type) and issubclass(result.target, tuple):
        result = [*result.args, *result.kwargs.values()]  # A named tuple is made by an operation of its own.
    if isinstance(result, Mapping) and "out" in result:
        result = [result["out"], *(value for key, value in result.items() if key != "out")]
    nodes = [leaf for leaf in tree_leaves(result) if isinstance(leaf, fx.Node)]
    if not nodes:
        raise _UntraceableError("the forward returns nothing that it computes from the images")
    return list(dict.fromkeys(nodes))


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node and all that use it."""
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


def _by_export(model: nn.Module) -> fx.Graph:
    graph = _exported(model, training=True)
    return _with_both_modes(graph, _exported(model, training=False))


def _exported(model: nn.Module, *, training: bool) -> fx.Graph:
    auto = torch.export.Dim.AUTO
    with unset_fake_temporarily(), torch.device("cpu"):
        with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
            twin = empty_copy(model).train(training)
            dtype = next((parameter.dtype for parameter in twin.parameters()), torch.float32)
            images = torch.empty(_EXPORTED_BATCH, 3, *_EXPORTED_IMAGE, dtype=dtype)
        exported = torch.export.export(twin, (images,), dynamic_shapes=({0: auto, 2: auto, 3: auto},), strict=False)
        graph = exported.module(check_guards=False).graph
    result = tree_unflatten(list(tree_leaves(graph.output_node().args)), exported.call_spec.out_spec)
    graph.output_node().args = (tuple(_main_first(result)),)
    graph.set_codegen(CodeGen())
    (placeholder,) = graph.find_nodes(op="placeholder")
    with graph.inserting_after(placeholder):
        device = graph.call_function(getattr, (placeholder, "device"))
    for node in list(graph.nodes):
        if node.op == "get_attr" and not _has_attribute(model, str(node.target)):
            raise _UntraceableError(f"it makes the constant {node.target}; make it a buffer")
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": device}
        if node.op == "call_function" and node.target in _DROPOUTS:
            node.args = (*node.args[:2], training)
        _restore_norm(graph, node, model)
    return graph


def _has_attribute(model: nn.Module, name: str) -> bool:
    owner, _, attribute = name.rpartition(".")
    return hasattr(model.get_submodule(owner), attribute)


def _restore_norm(graph: fx.Graph, node: fx.Node, model: nn.Module) -> None:
    """A batch norm's operator becomes the module that it came from, which counts batches itself."""
    first = node.args[0] if node.args else None
    if node.target is torch.ops.aten.add_.Tensor and isinstance(first, fx.Node) and first.op == "get_attr":
        if str(first.target).endswith("num_batches_tracked"):
            graph.erase_node(node)
        return
    if node.target is not torch.ops.aten.batch_norm.default:
        return
    owner = next((str(arg.target).rpartition(".")[0] for arg in node.args[1:5] if isinstance(arg, fx.Node)), None)
    if owner is None or not isinstance(model.get_submodule(owner), nn.modules.batchnorm._BatchNorm):
        return
    with graph.inserting_before(node):
        restored = graph.call_module(owner, (first,))
    restored.meta = dict(node.meta)
    node.replace_all_uses_with(restored)
    graph.erase_node(node)


def _signature(node: fx.Node) -> tuple[str, str]:
    return node.op, node.target if isinstance(node.target, str) else str(node.target)


def _differing_modules(graph: fx.Graph, other: fx.Graph) -> set[str]:
    """Names of the modules that do different things in the two."""
    done: list[dict[str, list[tuple[str, str]]]] = []
    for one in (graph, other):
        by_module: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for node in one.nodes:
            by_module[module_path(node)].append(_signature(node))
        done.append(by_module)
    first, second = done
    return {path for path in first.keys() | second.keys() if first.get(path) != second.get(path)}


def _with_both_modes(graph: fx.Graph, evaluation: fx.Graph) -> fx.Graph:
    """The graph, with the constants of evaluation beside those of training."""
    for count in (None, 1):
        pairs = _pairs(graph, evaluation, count)
        if pairs is not None:
            for node, constants in pairs:
                _choose(graph, node, constants)
            graph.lint()
            return graph
    raise _DiffersError("it does something else in evaluation than in training")


_Constants = list[tuple[int, Any]]


def _pairs(graph: fx.Graph, other: fx.Graph, count: int | None) -> list[tuple[fx.Node, _Constants]] | None:
    """Each node of which arguments differ, and what they are in the other graph; None where more than that differs.

    Args:
        count: How many outputs are compared, the main one first; None compares all.
    """
    ordered = []
    for one in (graph, other):
        outputs = outputs_of(one)[:count]
        needed = needed_for(outputs)
        ordered.append([node for node in one.nodes if node in needed])
    if [_signature(node) for node in ordered[0]] != [_signature(node) for node in ordered[1]]:
        return None
    same = dict(zip(ordered[1], ordered[0], strict=True))
    if [same[node] for node in outputs_of(other)[:count]] != list(outputs_of(graph)[:count]):
        return None
    found = []
    for node, twin in zip(*ordered, strict=True):
        mine, spec = tree_flatten((node.args, node.kwargs))
        theirs, their_spec = tree_flatten(map_arg((twin.args, twin.kwargs), lambda leaf: same[leaf]))
        if spec != their_spec:
            return None
        differing = [(index, theirs[index]) for index in range(len(mine)) if not _are_same(mine[index], theirs[index])]
        if any(isinstance(mine[index], fx.Node) or isinstance(value, fx.Node) for index, value in differing):
            return None
        if differing:
            found.append((node, differing))
    return found


def _are_same(first: Any, second: Any) -> bool:
    return type(first) is type(second) and bool(first == second)


def _choose(graph: fx.Graph, node: fx.Node, constants: _Constants) -> None:
    leaves, spec = tree_flatten((node.args, node.kwargs))
    with graph.inserting_before(node):
        training = graph.create_node("get_attr", TRAINING)
        for index, value in constants:
            leaves[index] = graph.call_function(either, (training, leaves[index], value))
    node.args, node.kwargs = tree_unflatten(leaves, spec)


def first_line(error: BaseException) -> str:
    """Kind of an error, and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text[:240]}" if text else type(error).__name__
