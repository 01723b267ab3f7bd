"""What one training step of a model costs, segment by segment: values only.

A planner that measured for itself would need the model, its framework and minutes. So it is given numbers: the
profiler runs the step once on tensors without storage and writes down, for each segment at each recompute level, what
that segment alone allocates. What several segments share (the tensors that pass between them) is not in these numbers;
`memory` adds it, since it depends on who else runs on the same card.

    saved_bytes             kept from forward to backward inside the segment: neither what it reads nor its output
    forward_peak_bytes      above what was alive when its forward started; so with its output and what it saves
    backward_memory         above its inputs, its saved bytes and its output's gradient; so with the gradients of its
                            inputs and parameters, and with whatever it rebuilds. In stretches, for what it lets go of
                            on the way is only free if nobody else holds it
    backward_memory_adding  the same where parameters have gradients already, so that fresh ones are added to these, one
                            after the other, and let go of
    shared_gradients        storages that gradients of its inputs lie in together: those of a concatenation are views of
                            one, those of a sum are the same tensor

All sizes are bytes, all work is for the whole batch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from memseg.errors import ProblemsError
from memseg.levels import NormMode, Precision, Recompute
from memseg.planning.roofline import Products, merged
from memseg.planning.strict import problem_lines

if TYPE_CHECKING:
    from memseg.planning.card import Card

IMAGES = "images"
"""The name of the input batch among the tensors that a segment reads."""
TARGET = "target"
"""The name of the labels among the tensors that a segment reads."""
LOSS = "loss"
"""The name of the last segment."""

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class Work:
    """What one phase of a segment computes."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    flops: int
    """Of matrix products and convolutions; a multiply-add counts two."""
    moved_bytes: int
    """Read and written by all other operations."""
    operations: int = 0
    """Kernels started, products among them."""
    products: tuple[Products, ...] = ()
    """The same `flops` by kind and arithmetic intensity. What is not in here is taken for float32 matrix products that
    never wait for memory."""

    def __add__(self, other: "Work") -> "Work":
        return Work.total((self, other))

    @staticmethod
    def total(parts: Iterable["Work"]) -> "Work":
        """All of it together; none is no work."""
        parts = list(parts)
        products = merged(one for part in parts for one in part.products)
        return Work(
            sum(part.flops for part in parts),
            sum(part.moved_bytes for part in parts),
            sum(part.operations for part in parts),
            products,
        )


@dataclass(frozen=True)
class SharedGradient:
    """A storage that gradients of what a segment reads lie in; it stays while any of them does."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    places: tuple[int, ...]
    """Of those tensors, in `SegmentCost.reads`."""
    size_bytes: int


@dataclass(frozen=True)
class Stretch:
    """A part of a backward, between moments at which it lets go of tensors that others may hold as well."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    peak_bytes: int
    """The most that is taken meanwhile; less than nothing where more has been let go of."""
    inputs: tuple[int, ...] = ()
    """Which inputs have been let go of by then, by their places in `SegmentCost.reads`."""
    output: bool = False
    """Whether the output has been."""
    gradient: bool = False
    """Whether the output's gradient has been."""


@dataclass(frozen=True)
class Arrival:
    """A part of a backward from when it hands on the gradient of one of its inputs."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    place: int
    """Of that input, in `SegmentCost.reads`."""
    then: Stretch


@dataclass(frozen=True)
class BackwardMemory:
    """What a backward takes; empty where nothing in the segment or before it is trained."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    stretches: tuple[Stretch, ...] = ()
    arrivals: tuple[Arrival, ...] = ()
    """Where the sum with a gradient that is there already may take a tensor of its own."""


@dataclass(frozen=True)
class LevelCost:
    """One segment at one recompute level."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    recompute: Recompute
    saved_bytes: int
    """Interior tensors kept from forward to backward."""
    saves_inputs: tuple[bool, ...]
    """For each name in `SegmentCost.reads`: must that tensor live until this segment's backward?"""
    saves_output: bool
    """Must the output live until this segment's backward?"""
    forward_peak_bytes: int
    backward_memory: BackwardMemory
    backward_memory_adding: BackwardMemory
    forward: Work
    backward: Work
    """Includes what is rebuilt."""
    shared_gradients: tuple[SharedGradient, ...] = ()
    """Storages of several gradients, or larger than the one that lies in them; a gradient lies in one at most."""
    compiled_kernels: int = 0
    """That a CPU compiles for its convolutions; memory that no allocator counts."""

    @property
    def work(self) -> Work:
        """Forward and backward together."""
        return self.forward + self.backward


@dataclass(frozen=True)
class SegmentCost:
    """One segment: the smallest part of a model that is placed as a whole."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    reads: tuple[str, ...]
    """Names of earlier segments, "images" or "target"."""
    output_bytes: int
    output_needs_grad: bool
    parameter_bytes: int
    buffer_bytes: int
    gradient_bytes: int
    """Of the parameters: zero where they are not trained."""
    optimizer_bytes: int
    levels: tuple[LevelCost, ...]
    """Those that differ, at least one."""


@dataclass(frozen=True)
class ModelCosts:
    """One step of one model, with the settings that it was profiled for.

    Raises:
        ProblemsError: the segments do not form a step: names repeated, a tensor read before it is made, no level, ...
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    model: str
    num_classes: int
    image: tuple[int, int]
    """(height, width) in pixels."""
    batch: int
    norm: NormMode
    precision: Precision
    """Of activations and parameters: "float32"."""
    image_bytes: int
    target_bytes: int
    segments: tuple[SegmentCost, ...]
    """In topological order; the last is "loss"."""
    optimizer: str = "adam"
    """What makes its state: a name that `named_optimizer` takes."""

    def __post_init__(self) -> None:
        problems = _structure_problems(self.segments)
        if problems:
            raise ProblemsError(f"costs of {self.model}", problems)

    def level_seconds(self, card: "Card") -> list[list[float]]:
        """Predicted time of forward and backward of each segment at each of its levels."""
        if card not in self._seconds:
            self._seconds[card] = [[card.seconds(level.work) for level in one.levels] for one in self.segments]
        return self._seconds[card]

    @cached_property
    def _seconds(self) -> "dict[Card, list[list[float]]]":
        return {}

    def to_json(self) -> str:
        """One JSON object; `from_json` reads it back to an equal value."""
        return _adapter().dump_json(self, indent=2).decode()

    @staticmethod
    def from_json(text: str, where: str) -> "ModelCosts":
        """The costs that `to_json` wrote.

        Args:
            text: The JSON object.
            where: What to call it in an error, its path.

        Raises:
            ProblemsError: not such an object.
        """
        try:
            return _adapter().validate_json(text)
        except ValidationError as error:
            raise ProblemsError(where, problem_lines(error)) from None


@cache
def _adapter() -> TypeAdapter[ModelCosts]:
    return TypeAdapter(ModelCosts)


def _structure_problems(segments: tuple[SegmentCost, ...]) -> list[str]:
    problems = []
    made = {IMAGES, TARGET}
    for segment in segments:
        if segment.name in made:
            problems.append(f"{segment.name}: the name is taken")
        problems += [
            f"{segment.name}: reads {name}, which no earlier segment makes"
            for name in segment.reads
            if name not in made
        ]
        made.add(segment.name)
        if len(set(segment.reads)) < len(segment.reads):
            problems.append(f"{segment.name}: reads a tensor twice")
        if not segment.levels:
            problems.append(f"{segment.name}: has no recompute level")
        if len({level.recompute for level in segment.levels}) < len(segment.levels):
            problems.append(f"{segment.name}: has a recompute level twice")
        problems += [
            f"{segment.name}: saves_inputs at {level.recompute} needs {len(segment.reads)} entries, one for each read"
            for level in segment.levels
            if len(level.saves_inputs) != len(segment.reads)
        ]
    if not segments or segments[-1].name != LOSS:
        problems.append(f'the last segment must be "{LOSS}"')
    return problems
