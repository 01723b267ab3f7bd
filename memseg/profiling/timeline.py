"""Every allocation of one training step, in order: the value that all figures and reports derive from."""

from collections import Counter, defaultdict
from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from itertools import accumulate


class Phase(StrEnum):
    """What the step was doing."""

    SETUP = "setup"
    """Before the step: parameters, optimizer state, the batch."""
    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"


class Category(StrEnum):
    """What bytes are for."""

    PARAMETER = "parameter"
    """Weights and buffers."""
    GRADIENT = "gradient"
    """Of parameters."""
    OPTIMIZER_STATE = "optimizer state"
    INPUT = "input"
    """The batch: images and target."""
    COMMUNICATION = "communication buffer"
    """Gradient buckets of data parallelism, and copies on their way between cards."""
    AUTOCAST = "autocast copy"
    """Weights in half precision, made by autocast."""
    SAVED = "saved activation"
    """Made in forward, freed in backward or after."""
    TEMPORARY = "temporary"
    """Made and freed in the same phase, and gradients of activations."""
    WORKSPACE = "workspace"
    """What a library's kernel takes while it runs."""


@dataclass(frozen=True)
class Allocation:
    """One piece of memory: alive in the half-open interval [born, died) of the timeline's instants."""

    size_bytes: int
    born: int
    died: int
    phase: Phase
    category: Category
    layer: str
    """Qualified name of the module that made it; "" outside every module."""
    operation: str = ""
    """The operator that made it, as "aten.convolution"."""
    shape: tuple[int, ...] = ()
    """Of the tensor that it was made for."""
    dtype: str = ""
    reader: tuple[Phase, str] | None = None
    """Phase and layer of the operation that reads it last; None where nothing reads it."""
    output_of: tuple[str, ...] = ()
    """Layers that return it, innermost first."""
    card: int = 0
    """Index of the card that it lies on."""


@dataclass(frozen=True)
class LayerRow:
    """What one layer costs in one step."""

    name: str
    parameter_bytes: int
    saved_bytes: int
    """Saved activations that it made and that are alive when backward begins."""
    peak_bytes: int
    """The most that is allocated, by everybody, while it makes something; 0 where it makes nothing."""


@dataclass(frozen=True)
class Timeline:
    """One training step in its steady state, optimizer state born, gradients not."""

    allocations: tuple[Allocation, ...]
    instants: int
    """How many instants the step has; each allocation and each free is one."""
    backward_start: int
    """The instant at which forward is over."""

    @cached_property
    def curve(self) -> list[int]:
        """Allocated bytes after each instant."""
        change = [0] * (self.instants + 1)
        for allocation in self.allocations:
            change[allocation.born] += allocation.size_bytes
            change[allocation.died] -= allocation.size_bytes
        return list(accumulate(change[: self.instants]))

    @cached_property
    def peak_allocated_bytes(self) -> int:
        """The most that is allocated at once."""
        return max(self.curve, default=0)

    @cached_property
    def peak_instant(self) -> int:
        """The first instant of the peak."""
        return self.curve.index(self.peak_allocated_bytes) if self.curve else 0

    def on_card(self, index: int) -> "Timeline":
        """What is on one of several cards, at the same instants."""
        return replace(self, allocations=tuple(one for one in self.allocations if one.card == index))

    def alive(self, instant: int) -> list[Allocation]:
        """What is allocated after an instant, largest first."""
        found = [one for one in self.allocations if one.born <= instant < one.died]
        return sorted(found, key=lambda one: -one.size_bytes)

    @property
    def peak_moment(self) -> tuple[Phase, str]:
        """Phase and layer of the allocation that reaches the peak."""
        for one in self.allocations:
            if one.born == self.peak_instant:
                return one.phase, one.layer
        return Phase.SETUP, ""

    def by_category(self, instant: int | None = None) -> dict[Category, int]:
        """Bytes of each category at an instant, the peak where none is given; all categories are there."""
        totals = Counter(dict.fromkeys(Category, 0))
        for one in self.alive(self.peak_instant if instant is None else instant):
            totals[one.category] += one.size_bytes
        return dict(totals)

    def layers(self, names: Iterable[str]) -> list[LayerRow]:
        """One row for each name, in their order; a layer counts to the longest name that is it or holds it."""
        rows = list(names)
        known = set(rows)
        parameter: Counter[str] = Counter()
        saved: Counter[str] = Counter()
        peak: defaultdict[str, int] = defaultdict(int)
        for one in self.allocations:
            name = nearest_layer(one.layer, known)
            if one.category is Category.PARAMETER:
                parameter[name] += one.size_bytes
                continue
            if one.category is Category.SAVED and one.died >= self.backward_start:
                saved[name] += one.size_bytes
            if one.phase in (Phase.FORWARD, Phase.BACKWARD):
                peak[name] = max(peak[name], self.curve[one.born])
        return [LayerRow(name, parameter[name], saved[name], peak[name]) for name in rows]


def nearest_layer(layer: str, known: Container[str]) -> str:
    """The longest known name that is the layer or holds it; "" where none does.

    >>> nearest_layer("block1.denselayer2.norm1", {"block1", "block1.denselayer2"})
    'block1.denselayer2'
    """
    while layer and layer not in known:
        layer = layer.rpartition(".")[0]
    return layer
