"""Where a traced network is cut into segments.

A segment must make exactly one tensor that later segments read, and that tensor must be one that can cross to another
card and carry a gradient back. Of all the ways to cut, one is chosen by a shortest path over the places between
operations. A segment that does the share s of the network's work pays

    1 + (32 s)²        so that 32 segments of equal work would be the cheapest
    + 12 / (32 m)      for each module that the cut before it goes through, m being the share of that module, 1/32 at
                       least; a quarter of that for mere containers
    + half of          what crosses there, in units of what crosses on average
    + 32               if it has no convolution or other product: an addition, a joining, a dropout alone

so blocks and stages of an encoder become segments: to cut through a backbone costs little, to cut through a block much.
Work is operations, bytes of maps and bytes of parameters, each as a share of the whole. Not cut: between a convolution
and the norm and activation behind it, or before it where a norm comes first (pre-activation); between a tensor and an
operation that overwrites it; between two uses of a parameter.

Sizes cross no border: what depends on shapes alone is computed anew in each segment that needs it.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from memseg.errors import InputError
from memseg.models.samples import Samples, storage_of, tensors_in
from memseg.models.tracing import module_path, needed_for

_TARGET_SEGMENTS = 32
"""Of equal work; ResNet-50 has 16 blocks, ResNet-152 has 50, and a plan is found in seconds for up to about 50."""
_OWN_FORWARD_PENALTY, _CONTAINER_PENALTY, _CROSSING_PENALTY = 12.0, 3.0, 0.5
"""In segments: how much longer a path may be that goes along the borders of modules, or where little crosses."""
_TRIVIAL_PENALTY = 32.0
"""In segments: enough to forbid it wherever there is another way."""
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)
_NORM_WORDS = ("batch_norm", "layer_norm", "group_norm", "instance_norm")
_PENDANT_WORDS = (
    *("relu", "hardswish", "hardsigmoid", "hardtanh", "sigmoid", "silu", "gelu", "elu", "mish", "tanh", "softplus"),
    *("dropout", "stochastic_depth", "flatten", "identity"),
)
"""In names of operations that belong to what they read."""


@dataclass(eq=False)
class Steps:
    """The operations of a traced network that make tensors, in order; all others are sizes, parameters and constants.

    Args:
        model: The traced network.
        graph: Its operations.
        samples: What it makes.
        outputs: What is kept of the network: nodes, the main one first.
        extra: (node, position) where a step reads a tensor for its shape alone, and nothing else tells that shape.
    """

    model: nn.Module
    graph: fx.Graph
    samples: Samples
    outputs: tuple[fx.Node, ...]
    extra: frozenset[tuple[fx.Node, int]] = frozenset()

    @cached_property
    def nodes(self) -> list[fx.Node]:
        """The steps."""
        needed = needed_for(self.outputs)
        return [node for node in self.graph.nodes if node in needed and self._is_step(node)]

    @cached_property
    def position(self) -> dict[fx.Node, int]:
        """Of each step."""
        return {node: index for index, node in enumerate(self.nodes)}

    @cached_property
    def last_use(self) -> list[int]:
        """Of what each step makes: the last position that reads it; that behind all for the network's outputs."""
        last = list(range(len(self.nodes)))
        for index, node in enumerate(self.nodes):
            for read in node.all_input_nodes:
                if read in self.position:
                    last[self.position[read]] = index
        for node, index in self.extra:
            if node in self.position:
                last[self.position[node]] = max(last[self.position[node]], index)
        for node in self.outputs:
            last[self.position[node]] = len(self.nodes)
        return last

    @cached_property
    def made_at(self) -> dict[int, int]:
        """Where each storage is first made."""
        first: dict[int, int] = {}
        for index, node in enumerate(self.nodes):
            for tensor in tensors_in(self._value(node)):
                first.setdefault(storage_of(tensor), index)
        return first

    def free_inputs(self, node: fx.Node) -> list[fx.Node]:
        """What a step reads that is no step and not the images: sizes, parameters, constants, and what these read."""
        found: list[fx.Node] = []
        waiting = list(node.all_input_nodes)
        while waiting:
            read = waiting.pop()
            if read not in self.position and read.op != "placeholder" and read not in found:
                found.append(read)
                waiting += read.all_input_nodes
        return found

    def can_cross(self, position: int) -> bool:
        """Whether what a step makes is one whole tensor that carries a gradient."""
        value = self._value(self.nodes[position])
        if not isinstance(value, Tensor) or not (value.is_floating_point() and value.requires_grad):
            return False
        return value.untyped_storage().nbytes() == value.numel() * value.itemsize

    def begins_at(self, position: int) -> int:
        """Where the memory of what a step makes is first made."""
        return min((self.made_at[storage_of(t)] for t in tensors_in(self._value(self.nodes[position]))), default=-1)

    @cached_property
    def shares(self) -> list[float]:
        """Of the whole network's work, each step's: the mean of its shares of operations, maps and parameters."""
        kinds: list[list[int]] = [[self.samples.runs[0].flops[node] for node in self.nodes], [], []]
        seen: set[int] = set()
        for index, node in enumerate(self.nodes):
            new = [t for t in tensors_in(self._value(node)) if self.made_at[storage_of(t)] == index]
            kinds[1].append(sum(t.untyped_storage().nbytes() for t in {storage_of(t): t for t in new}.values()))
            parameters = [t for t in self._parameters(node) if id(t) not in seen]
            seen |= {id(t) for t in parameters}
            kinds[2].append(sum(t.nbytes for t in parameters))
        shares = [[size / (sum(sizes) or 1) for size in sizes] for sizes in kinds]
        return [sum(parts) / len(parts) for parts in zip(*shares, strict=True)]

    @cached_property
    def cuttable(self) -> list[bool]:
        """Whether a cut may stand before each step."""
        allowed = [True] * len(self.nodes)
        for start, stop in self._together():
            allowed[start + 1 : stop + 1] = [False] * (stop - start)
        return allowed

    def penalty(self, position: int) -> float:
        """Of a cut before a step, for the modules that it goes through and for what crosses."""
        before, after = (module_path(node).split(".") for node in self.nodes[position - 1 : position + 1])
        depth = next(
            (index for index, (one, other) in enumerate(zip(before, after, strict=False)) if one != other),
            min(len(before), len(after)),
        )
        total = _CROSSING_PENALTY * self._crossing[position] / self._mean_crossing
        for path in (".".join(before[:length]) for length in range(1, depth + 1) if before[0]):
            is_container = isinstance(self.model.get_submodule(path), _CONTAINERS)
            penalty = _CONTAINER_PENALTY if is_container else _OWN_FORWARD_PENALTY
            total += penalty / max(1, _TARGET_SEGMENTS * self._module_shares[path])
        return total

    @cached_property
    def _module_shares(self) -> dict[str, float]:
        """Of the whole network's work, each module's."""
        found: dict[str, float] = defaultdict(float)
        for node, share in zip(self.nodes, self.shares, strict=True):
            pieces = module_path(node).split(".")
            for length in range(1, len(pieces) + 1):
                found[".".join(pieces[:length])] += share
        return found

    @cached_property
    def _crossing(self) -> list[int]:
        sizes = [0] * (len(self.nodes) + 1)
        for index, last in enumerate(self.last_use):
            size = sum(t.nbytes for t in tensors_in(self._value(self.nodes[index])))
            for position in range(index + 1, min(last, len(self.nodes) - 1) + 1):
                sizes[position] += size
        return sizes

    @cached_property
    def _mean_crossing(self) -> float:
        places = [size for size, allowed in zip(self._crossing[1:], self.cuttable[1:], strict=False) if allowed]
        return sum(places) / max(1, len(places)) or 1

    def _together(self) -> Iterable[tuple[int, int]]:
        """Pairs of positions that no cut may separate."""
        uses: dict[int, list[int]] = defaultdict(list)
        leading: set[fx.Node] = set()
        for index, node in enumerate(self.nodes):
            for storage in self.samples.runs[0].overwrites.get(node, ()):
                yield self.made_at.get(storage, index), index
            for tensor in self._parameters(node):
                uses[id(tensor)].append(index)
            reads = [read for read in node.all_input_nodes if read in self.position]
            if self._is_pendant(node):
                for read in reads[:1]:
                    yield self.position[read], index
                    if read in leading:
                        leading.add(node)
            elif self._is_norm(node):
                if reads and self._is_product(reads[0]):
                    yield self.position[reads[0]], index
                else:
                    leading.add(node)
            elif self._is_product(node):
                yield from ((self.position[read], index) for read in reads if read in leading)
        yield from ((positions[0], positions[-1]) for positions in uses.values())

    def _parameters(self, node: fx.Node) -> list[Tensor]:
        """Parameters and buffers that a step uses."""
        found: list[Tensor] = []
        for one in (node, *self.free_inputs(node)):
            if one.op == "call_module":
                module = self.model.get_submodule(str(one.target))
                found += [*module.parameters(), *module.buffers()]
            elif one.op == "get_attr":
                owner, _, name = str(one.target).rpartition(".")
                module = self.model.get_submodule(owner)
                found += [t for t in (module._parameters.get(name), module._buffers.get(name)) if t is not None]
        return found

    def _is_step(self, node: fx.Node) -> bool:
        return node.op not in ("placeholder", "get_attr", "output") and bool(tensors_in(self._value(node)))

    def _is_norm(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.model.get_submodule(str(node.target)), _NORMS)
        return any(word in _operation(node) for word in _NORM_WORDS)

    def _is_pendant(self, node: fx.Node) -> bool:
        kind = _operation(node)
        if node.op == "call_module":
            kind = type(self.model.get_submodule(str(node.target))).__name__.lower()
        return any(word in kind for word in _PENDANT_WORDS) and not self._is_product(node)

    def _is_product(self, node: fx.Node) -> bool:
        return self.samples.runs[0].flops[node] > 0

    def _value(self, node: fx.Node) -> Any:
        return self.samples.runs[0].values[node]


def cut(steps: Steps) -> list[range]:
    """Positions of the steps of each segment.

    Raises:
        InputError: there is no way to cut so that each segment makes one tensor that is read later.
    """
    count = len(steps.nodes)
    places = [0, *(place for place in range(1, count) if steps.cuttable[place]), count]
    sums = [0.0, *accumulate(steps.shares)]
    products = [0, *accumulate(steps.samples.runs[0].flops[node] > 0 for node in steps.nodes)]
    best: dict[int, tuple[float, Sequence[range]]] = {0: (0.0, ())}
    for end, stop in enumerate(places[1:], start=1):
        found: tuple[float, Sequence[range]] | None = None
        leaving: list[int] = []
        for begin in reversed(range(end)):
            start = places[begin]
            leaving += [index for index in range(start, places[begin + 1]) if steps.last_use[index] >= stop]
            if len(leaving) > 1:
                break
            if not leaving or start not in best or not _may_leave(steps, leaving[0], start):
                continue
            price = best[start][0] + 1 + (_TARGET_SEGMENTS * (sums[stop] - sums[start])) ** 2
            price += steps.penalty(start) if start else 0
            price += _TRIVIAL_PENALTY * (products[stop] == products[start])
            if found is None or price < found[0]:
                found = price, (*best[start][1], range(start, stop))
        if found:
            best[stop] = found
    if count not in best:
        raise InputError(
            f"{type(steps.model).__name__} cannot be cut into segments that each make one tensor for later ones: "
            f"its {len(steps.outputs)} outputs are made together, or of parameters that are used in several places; "
            "return one of them, or write the network as segments (memseg.models.Segment)"
        )
    return list(best[count][1])


def _may_leave(steps: Steps, position: int, start: int) -> bool:
    """Whether what a step makes may leave a segment that begins at `start`: it must not lie in a tensor of another."""
    return steps.can_cross(position) and steps.begins_at(position) >= start


def _operation(node: fx.Node) -> str:
    """Name of a function or method; of a module none."""
    if node.op == "call_module":
        return ""
    return str(getattr(node.target, "__name__", node.target)).lower()
