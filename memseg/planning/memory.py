"""The peak of one stage (consecutive segments on one card): a maximum over moments, each a sum of terms.

The peak of a step is not the sum of its segments' peaks: what one segment saves is alive while another one works, and
a tensor between two segments dies when its last user is done, which depends on the recompute level of each of them.
Written as code that walks through the step, the peak of a choice of levels is easy to compute and impossible to
optimise. So the walk is written down once, as data, for all choices together: each moment is a list of terms, and a
term counts its bytes if any of certain (segment, level) pairs is chosen. `Stage.peak_of` adds the terms of one choice;
`solver` makes the same terms the rows of a mixed-integer program. They cannot disagree.

What is alive, for a stage of segments i..j:

    all step        parameters, buffers, optimizer state; images and target where the stage reads them; a receive buffer
                    for each tensor that comes from an earlier stage, and one for the gradient of each tensor that
                    leaves for a later one. A tensor that skips the stage comes and leaves: it has both.
    forward of s    what i..s-1 saved; tensors made here, until their last reader's forward is over, or for as long as
                    a segment that saves them waits for its backward, or, if they leave, until the end of all backward
    backward of s   what i..s saved; tensors that s or an earlier segment saves, or that leave; gradients of the
                    parameters of s+1..j; gradients of tensors, from the first backward of a reader to the end of the
                    maker's backward, and of tensors that came from an earlier stage until all backward is over; the
                    whole storage of those that are parts of one, until a second reader adds to them
    optimizer step  all parameter gradients

What leaves a stage crosses as it lies in memory. On the last card of a split the pipeline holds the model's outputs
until backward is over.

A tensor that skips the stage unread needs a third buffer throughout backward: autograd copies the gradient that it is
handed for a leaf. Left out: the gradient of the loss, a scalar, and what the optimizer's arithmetic takes for itself.

With micro-batches the same walk is taken by several at once (`Flow`). Images, target and the buffers of what arrives
are there for all of them; while one is at work, each other one in flight holds what a finished forward holds; gradients
of parameters are there from the end of the first backward on. GPipe sends the gradients of what arrived without
waiting, and holds them until all backward is over.

    GPipe, 3 micro-batches   F0 F1 F2 B0 B1 B2      in flight: 3
    1F1B, last but one of    F0 F1 B0 F2 B1 B2      in flight: 2, as many as stages are left

Gradients also stay all step where they are collected over several passes (accumulation), and where they lie in the
buckets of DistributedDataParallel, of which they are views. A fresh gradient lives only until it is added or copied.

Source: torch/distributed/pipelining/schedules.py and stage.py, torch/csrc/distributed/c10d/reducer.cpp, torch 2.14.1.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property

from memseg.levels import Recompute
from memseg.planning.costs import IMAGES, TARGET, LevelCost, ModelCosts, SegmentCost, SharedGradient, Stretch, Work

Pick = tuple[int, int]
"""A segment's position in the model, and a position in its `levels`."""


class Category(StrEnum):
    """What bytes are for."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    OPTIMIZER_STATE = "optimizer_state"
    INPUT = "input"
    """Images and target."""
    TRANSFER = "transfer"
    """Buffers in which tensors and gradients of other stages arrive."""
    ACTIVATION = "activation"
    """Tensors between segments, and what segments save."""
    GRADIENT = "gradient"
    """Of parameters and of tensors between segments, once they are made."""
    TEMPORARY = "temporary"
    """What the segment at work takes meanwhile, its new output and gradients included."""


@dataclass(frozen=True)
class Term:
    """Bytes that are alive at a moment, always or for certain choices."""

    size: int
    """Below zero where other terms count the same bytes twice."""
    category: Category
    picks: frozenset[Pick] | None = None
    """Counts if any of these is chosen; None counts always."""


@dataclass(frozen=True)
class Moment:
    """A point of the step at which the peak may lie."""

    phase: str
    """ "forward", "backward" or "optimizer"."""
    segment: str | None
    """The segment at work; None in the optimizer step."""
    terms: tuple[Term, ...]

    def __str__(self) -> str:
        return f"{self.phase} of {self.segment}" if self.segment else f"{self.phase} step"

    def least_bytes(self) -> int:
        """A lower bound over all choices of levels: for each segment the level that is best at this moment alone.

        Terms that hang on several segments are left out.
        """
        always = 0
        by_segment: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for term in self.terms:
            if term.picks is None:
                always += term.size
            elif len({position for position, _ in term.picks}) == 1:
                for position, level in term.picks:
                    by_segment[position][level] += term.size
        return always + sum(min(sizes.values()) for sizes in by_segment.values())


@dataclass(frozen=True)
class Peak:
    """The most bytes alive at once during a step, and when."""

    size: int
    moment: Moment
    by_category: dict[str, int]
    """Bytes of each category at that moment; they add up to `size`."""


@dataclass(frozen=True)
class Flow:
    """How the images of a step pass through a stage."""

    micro_batches: int = 1
    """One after the other, each of the batch that the costs are for."""
    in_flight: int = 1
    """The most of them between the start of their forward and the end of their backward."""
    keeps_gradients: bool = False
    """Do gradients of parameters live all step: accumulated, or in buckets of DistributedDataParallel?"""

    @property
    def is_gpipe(self) -> bool:
        """Are all forwards over before the first backward begins?"""
        return self.in_flight == self.micro_batches


@dataclass(frozen=True)
class _Staying:
    """Of what a segment's backward lets go of, what others hold."""

    input_bytes: tuple[int, ...]
    """Of each tensor that it reads; 0 for those that nobody else holds."""
    summed_bytes: tuple[int, ...]
    """Of the sum of each gradient that it makes and one that is there; 0 where there is none, or it can be added to."""
    output: bool
    gradient: bool


class Stage:
    """Consecutive segments `first`..`last` (positions in the model, both included) on one card.

    Args:
        costs: Of the whole model, for one micro-batch.
        first: Position of the first segment.
        last: Position of the last one.
        flow: How micro-batches pass through it.
    """

    def __init__(self, costs: ModelCosts, first: int, last: int, flow: Flow | None = None) -> None:
        self.costs, self.first, self.last, self.flow = costs, first, last, flow or Flow()
        self._position = {segment.name: position for position, segment in enumerate(costs.segments)}
        self._readers: dict[str, list[int]] = defaultdict(list)
        for position, segment in enumerate(costs.segments):
            for name in segment.reads:
                self._readers[name].append(position)

    @property
    def positions(self) -> range:
        """Of the stage's segments in the model."""
        return range(self.first, self.last + 1)

    @property
    def segments(self) -> tuple[SegmentCost, ...]:
        """The stage's segments, in order."""
        return self.costs.segments[self.first : self.last + 1]

    def peak_of(self, levels: Sequence[int]) -> Peak:
        """The exact peak of one choice.

        Args:
            levels: For each segment of the stage, a position in its `levels`.
        """
        chosen = set(zip(self.positions, levels, strict=True))
        size, moment = -1, self.moments[0]
        for candidate in self.moments:
            total = sum(term.size for term in candidate.terms if term.picks is None or term.picks & chosen)
            if total > size:
                size, moment = total, candidate
        by_category: dict[str, int] = defaultdict(int)
        for term in moment.terms:
            if term.size and (term.picks is None or term.picks & chosen):
                by_category[term.category.value] += term.size
        return Peak(size, moment, dict(by_category))

    def recompute_of(self, levels: Sequence[int]) -> tuple[Recompute, ...]:
        """The recompute level that each segment gets by `levels`."""
        return tuple(segment.levels[level].recompute for segment, level in zip(self.segments, levels, strict=True))

    def work_of(self, levels: Sequence[int]) -> Work:
        """Forward and backward of all the stage's segments."""
        return sum(
            (segment.levels[level].work for segment, level in zip(self.segments, levels, strict=True)), Work(0, 0)
        )

    @cached_property
    def entering(self) -> tuple[SegmentCost, ...]:
        """Makers of the tensors that come from an earlier stage, read here or later."""
        return tuple(
            s for s in self.costs.segments[: self.first] if any(r >= self.first for r in self._readers[s.name])
        )

    @cached_property
    def leaving(self) -> tuple[SegmentCost, ...]:
        """Makers of the tensors that go to a later stage; some may only pass through."""
        made_so_far = self.costs.segments[: self.last + 1]
        return tuple(s for s in made_so_far if any(r > self.last for r in self._readers[s.name]))

    @cached_property
    def moments(self) -> tuple[Moment, ...]:
        """Every moment at which the peak may lie, in the order of the step."""
        always, flow = self._always(), self.flow
        gradients = [Term(segment.gradient_bytes, Category.GRADIENT) for segment in self.segments]
        if flow.keeps_gradients:
            always += gradients
        held, sent = self._held(), self._sent()
        most = flow.in_flight - 1
        steady = flow.micro_batches > flow.in_flight
        forward_around = [*always, *_times(held, most), *(gradients if steady and not flow.keeps_gradients else ())]
        moments = [self._forward(position, forward_around) for position in self.positions]
        # The first backward makes the gradients of parameters, later ones add to them.
        moments += self._backwards([*always, *_times(held, most)], made=flow.keeps_gradients)
        if flow.micro_batches > 1:
            there = [*always, *(() if flow.keeps_gradients else gradients)]
            for done in {1, flow.micro_batches - 1} if flow.is_gpipe else {1}:
                others = most if steady else max(0, most - done)
                away = _times(sent, done) if flow.is_gpipe else []
                moments += self._backwards([*there, *_times(held, others), *away], made=True)
        moments.append(Moment("optimizer", None, (*always, *(() if flow.keeps_gradients else gradients))))
        return tuple(moments)

    def _always(self) -> list[Term]:
        terms, count = [], self.flow.micro_batches
        for segment in self.segments:
            terms.append(Term(segment.parameter_bytes, Category.PARAMETER))
            terms.append(Term(segment.buffer_bytes, Category.BUFFER))
            terms.append(Term(segment.optimizer_bytes, Category.OPTIMIZER_STATE))
        for name, size in ((IMAGES, self.costs.image_bytes), (TARGET, self.costs.target_bytes)):
            if self._local_readers(name):
                terms.append(Term(size * count, Category.INPUT))
        arriving = [*self.entering, *(maker for maker in self.leaving if maker.output_needs_grad)]
        terms += [Term(maker.output_bytes * count, Category.TRANSFER) for maker in arriving]
        return terms

    def _held(self) -> list[Term]:
        """What a micro-batch holds between its forward and its backward, beside what is there always."""
        terms = self._saved(self.positions)
        for maker in self.positions:
            terms += self._tensor(maker, held=False, before=self.last + 1)
        return terms

    def _sent(self) -> list[Term]:
        """Gradients that a finished backward sends to an earlier stage."""
        return [Term(maker.output_bytes, Category.GRADIENT) for maker in self.entering if maker.output_needs_grad]

    def _forward(self, position: int, around: list[Term]) -> Moment:
        segment = self.costs.segments[position]
        terms = [*around, *self._saved(range(self.first, position))]
        for maker in range(self.first, position):
            still_to_read = max(self._local_readers(self.costs.segments[maker].name), default=-1) >= position
            terms += self._tensor(maker, held=still_to_read, before=self.last + 1)
        terms += [
            Term(level.forward_peak_bytes, Category.TEMPORARY, frozenset({(position, number)}))
            for number, level in enumerate(segment.levels)
        ]
        return Moment("forward", segment.name, tuple(terms))

    def _backwards(self, around: list[Term], *, made: bool) -> list[Moment]:
        return [self._backward(position, around, made=made) for position in reversed(self.positions)]

    def _backward(self, position: int, around: list[Term], *, made: bool) -> Moment:
        """`made`: `around` has the gradients of all parameters already."""
        segment = self.costs.segments[position]
        terms = [*around, *self._saved(range(self.first, position + 1))]
        for maker in self.positions:
            terms += self._tensor(maker, held=False, before=position + 1)
        if not made:
            terms += [
                Term(done.gradient_bytes, Category.GRADIENT)
                for done in self.costs.segments[position + 1 : self.last + 1]
            ]
        terms += [
            Term(maker.output_bytes, Category.GRADIENT)
            for maker in (*self.entering, *self.costs.segments[self.first : position + 1])
            if maker.output_needs_grad and self._gradient_made(maker, position)
        ]
        terms += self._around_gradients(position)
        for number, level in enumerate(segment.levels):
            memory = level.backward_memory_adding if made else level.backward_memory
            sizes = [0, *(self._taken(position, one) for one in memory.stretches)]
            sizes += [
                self._taken(position, arrival.then) + self._staying[position].summed_bytes[arrival.place]
                for arrival in memory.arrivals
            ]
            terms.append(Term(max(sizes), Category.TEMPORARY, frozenset({(position, number)})))
        return Moment("backward", segment.name, tuple(terms))

    def _gradient_made(self, maker: SegmentCost, position: int) -> bool:
        """Has the gradient of `maker`'s output been made here when the backward of `position` begins?"""
        readers = self._local_readers(maker.name)
        if not readers:
            return maker in self.entering
        return max(readers) > position

    def _around_gradients(self, position: int) -> list[Term]:
        """What storages that gradients lie in take beside these, when the backward of `position` begins."""
        terms = []
        for reader in range(position + 1, self.last + 1):
            levels = self.costs.segments[reader].levels
            sizes = [
                sum(shared.size_bytes - sum(map(self._output_bytes, makers)) for shared, makers in found if makers)
                for found in (self._lying_in(reader, level, position) for level in levels)
            ]
            if any(sizes):
                terms += [
                    Term(size, Category.GRADIENT, frozenset({(reader, number)})) for number, size in enumerate(sizes)
                ]
        return terms

    def _lying_in(self, reader: int, level: LevelCost, position: int) -> list[tuple[SharedGradient, list[int]]]:
        """Each storage that `reader` leaves gradients in, and whose of them lie there as `position`'s backward begins.

        A gradient that a second reader has added to is a tensor of its own; so is that of what leaves and is read here
        too, for a later stage has sent its share before. What came from an earlier stage is sent back at the end.
        """
        reads = self.costs.segments[reader].reads
        found = []
        for shared in level.shared_gradients:
            makers = [self._position.get(reads[place], -1) for place in shared.places]
            found.append((shared, [maker for maker in makers if self._is_reached_by(reader, maker, position)]))
        return found

    def _is_reached_by(self, reader: int, maker: int, position: int) -> bool:
        """Is the gradient of `maker` there when the backward of `position` begins, and that of `reader` alone?"""
        if not 0 <= maker <= position:
            return False
        segment = self.costs.segments[maker]
        reached = [one for one in self._local_readers(segment.name) if one > position]
        return reached == [reader] and segment not in self.leaving

    def _taken(self, position: int, stretch: Stretch) -> int:
        """The most that a stretch of a backward takes, with what it lets go of and others hold."""
        segment, staying = self.costs.segments[position], self._staying[position]
        size = stretch.peak_bytes
        size += sum(staying.input_bytes[place] for place in stretch.inputs)
        size += segment.output_bytes * (stretch.output and staying.output)
        return size + segment.output_bytes * (stretch.gradient and staying.gradient)

    @cached_property
    def _staying(self) -> dict[int, "_Staying"]:
        """For each segment, what others hold of what its backward lets go of, at any of their levels."""
        return {
            position: _Staying(
                tuple(self._input_staying(position, name) for name in self.costs.segments[position].reads),
                tuple(self._summed_bytes(position, name) for name in self.costs.segments[position].reads),
                self._outlives_backward(position),
                self._gradient_stays(position),
            )
            for position in self.positions
        }

    def _input_staying(self, position: int, name: str) -> int:
        """Bytes of a tensor that `position` reads, if others hold it when the backward of `position` is over."""
        maker = self._position.get(name)
        if maker is None:
            return self.costs.image_bytes if name == IMAGES else self.costs.target_bytes
        is_saved = any(level.saves_output for level in self.costs.segments[maker].levels) or any(
            level.saves_inputs[self.costs.segments[reader].reads.index(name)]
            for reader in self._local_readers(name)
            if reader < position
            for level in self.costs.segments[reader].levels
        )
        stays = maker < self.first or self._outlives_backward(maker) or is_saved
        return self._output_bytes(maker) if stays else 0

    def _summed_bytes(self, position: int, name: str) -> int:
        """Autograd adds in place to a gradient that nobody else holds and that lies in a storage of its own."""
        maker = self._position.get(name)
        if maker is None or not self.costs.segments[maker].output_needs_grad:
            return 0
        is_view = any(
            maker in makers
            for reader in self._local_readers(name)
            if reader > position
            for level in self.costs.segments[reader].levels
            for _, makers in self._lying_in(reader, level, position)
        )
        return self._output_bytes(maker) if is_view or self.costs.segments[maker] in self.leaving else 0

    def _outlives_backward(self, position: int) -> bool:
        """Is the output of a segment of this stage held until all backward is over?"""
        segment = self.costs.segments[position]
        return segment in self.leaving or self._is_output(segment)

    def _gradient_stays(self, position: int) -> bool:
        """Does the gradient of a segment's output outlive its backward?"""
        segment = self.costs.segments[position]
        if segment in self.leaving and segment.output_needs_grad and not self._local_readers(segment.name):
            return True
        return any(
            position in makers and len(makers) > 1
            for reader in self._local_readers(segment.name)
            for level in self.costs.segments[reader].levels
            for _, makers in self._lying_in(reader, level, position)
        )

    def _output_bytes(self, position: int) -> int:
        return self.costs.segments[position].output_bytes

    def _saved(self, positions: Iterable[int]) -> list[Term]:
        return [
            Term(level.saved_bytes, Category.ACTIVATION, frozenset({(position, number)}))
            for position in positions
            for number, level in enumerate(self.costs.segments[position].levels)
        ]

    def _tensor(self, position: int, *, held: bool, before: int) -> list[Term]:
        """The output of a segment of this stage, if it is alive: `held` anyway, or saved by a segment below `before`.

        A tensor that leaves, or that nobody reads (the result of the step), is held until all backward is over. In a
        split the pipeline holds the model's outputs as well, which a model on one card lets go of once the loss has
        read them.
        """
        maker = self.costs.segments[position]
        leaves = maker in self.leaving
        if leaves or held or self._is_output(maker) or not self._readers[maker.name]:
            return [Term(maker.output_bytes, Category.ACTIVATION)]
        picks: set[Pick] = set()
        if position < before:
            picks |= {(position, number) for number, level in enumerate(maker.levels) if level.saves_output}
        for reader in self._local_readers(maker.name):
            segment = self.costs.segments[reader]
            place = segment.reads.index(maker.name)
            if reader < before:
                picks |= {(reader, number) for number, level in enumerate(segment.levels) if level.saves_inputs[place]}
        return [Term(maker.output_bytes, Category.ACTIVATION, frozenset(picks))] if picks else []

    def _is_output(self, maker: SegmentCost) -> bool:
        """Does the pipeline hold it for the loss?"""
        return self.first > 0 and len(self.costs.segments) - 1 in self._local_readers(maker.name)

    def _local_readers(self, name: str) -> list[int]:
        return [reader for reader in self._readers[name] if reader in self.positions]


def _times(terms: Iterable[Term], count: int) -> list[Term]:
    """The same for `count` micro-batches at once."""
    return [replace(term, size=term.size * count) for term in terms] if count else []
