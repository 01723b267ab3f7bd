import random
from dataclasses import replace

import pytest

from memseg.levels import Recompute
from memseg.planning import ModelCosts, Stage
from memseg.planning.costs import SharedGradient, Stretch
from memseg.planning.memory import Flow

from .cases import level, model, random_model, segment


def three_segments() -> ModelCosts:
    """images 100 -> a (output 40) -> b (output 20) -> loss, which also reads a's output and the target 10."""
    return model(
        segment("a", ("images",), level(saved=7, forward=50, backward=3), output=40,
                parameter_bytes=1, buffer_bytes=2, gradient_bytes=1, optimizer_bytes=2),
        segment("b", ("a",), level(saved=5, inputs=(False,), forward=30, backward=60), output=20,
                parameter_bytes=10, gradient_bytes=10, optimizer_bytes=20),
        segment("loss", ("b", "a", "target"), level(inputs=(True, False, True), forward=4, backward=70), output=4),
        images=100, target=10,
    )  # fmt: skip


def moments_of(stage: Stage, levels: tuple[int, ...]) -> dict[str, int]:
    chosen = set(zip(stage.positions, levels, strict=True))
    return {
        str(moment): sum(t.size for t in moment.terms if t.picks is None or t.picks & chosen)
        for moment in stage.moments
    }


def test_the_moments_of_a_small_model_add_up_in_the_head():
    fixed = (1 + 2 + 2) + (10 + 20) + 100 + 10
    assert moments_of(Stage(three_segments(), 0, 2), (0, 0, 0)) == {
        "forward of a": fixed + 50,
        "forward of b": fixed + 7 + 40 + 30,
        "forward of loss": fixed + 7 + 5 + 40 + 20 + 4,
        # a's output died with its last reader's forward: nobody saves it. The loss itself (4) is the caller's.
        "backward of loss": fixed + 7 + 5 + 20 + 4 + 70,
        # Gradients of a's and b's outputs are there; b's output is not: only the loss saved it.
        "backward of b": fixed + 7 + 5 + 4 + (40 + 20) + 60,
        "backward of a": fixed + 7 + 4 + 40 + 10 + 3,
        "optimizer step": fixed + 1 + 10,
    }


def test_the_peak_names_its_moment_and_adds_up_by_category():
    peak = Stage(three_segments(), 0, 2).peak_of((0, 0, 0))
    assert (peak.size, str(peak.moment), peak.moment.segment) == (281, "backward of b", "b")
    assert peak.by_category == {
        "parameter": 11,
        "buffer": 2,
        "optimizer_state": 22,
        "input": 110,
        "activation": 7 + 5 + 4,
        "gradient": 40 + 20,
        "temporary": 60,
    }


def test_a_stage_holds_receive_buffers_and_what_leaves_until_its_backward_is_over():
    costs = three_segments()
    first = moments_of(Stage(costs, 0, 0), (0,))
    assert first == {
        "forward of a": 5 + 100 + 40 + 50,  # 40: the gradient of its output will arrive there
        "backward of a": 5 + 100 + 40 + 7 + 40 + 3,
        "optimizer step": 5 + 100 + 40 + 1,
    }
    # Stage b alone: a comes in, is read, and goes on to the loss; so there is a buffer for it and one for its gradient.
    middle = moments_of(Stage(costs, 1, 1), (0,))
    assert middle == {
        "forward of b": 30 + 40 + (40 + 20) + 30,
        "backward of b": 30 + 40 + (40 + 20) + 5 + 20 + 60,
        "optimizer step": 30 + 40 + (40 + 20) + 10,
    }


def test_what_leaves_outlives_its_own_backward():
    # The stage returned it, so whoever called the stage holds it until all of its backward is over.
    costs = model(
        segment("a", ("images",), level(), output=40),
        segment("b", ("a",), level(inputs=(False,)), output=20),
        segment("loss", ("b",), level()),
    )
    assert moments_of(Stage(costs, 0, 1), (0, 0))["backward of a"] == 20 + 20 + 40


@pytest.mark.parametrize("batch", [2, 1])
def test_what_leaves_is_held_once_even_where_it_is_saved_too(batch: int):
    # a's output crosses to the loss as it lies, and b saves it.
    costs = model(
        segment("a", ("images",), level(), output=40),
        segment("b", ("a",), level(), output=20),
        segment("c", ("b",), level(), output=10),
        segment("loss", ("c", "a"), level(inputs=(True, True))),
        batch=batch,
    )
    gradients_arrive = 40 + 10
    assert moments_of(Stage(costs, 0, 2), (0, 0, 0)) == {
        "forward of a": gradients_arrive,
        "forward of b": gradients_arrive + 40,
        "forward of c": gradients_arrive + 40 + 20,
        "backward of c": gradients_arrive + 40 + 20 + 10,
        # Its own output, saved by c, is gone; the gradient of it is there.
        "backward of b": gradients_arrive + 40 + 20 + 10,
        # What b saved is gone; b made a gradient for a's output beside the one that arrived.
        "backward of a": gradients_arrive + 40 + 40 + 10,
        "optimizer step": gradients_arrive,
    }


@pytest.mark.parametrize("batch", [2, 1])
def test_a_maker_that_saves_what_leaves_holds_nothing_more(batch: int):
    costs = model(
        segment("a", ("images",), level(), output=20),
        segment("b", ("a",), level(inputs=(False,), output=True), level(Recompute.SEGMENT, inputs=(False,)), output=40),
        segment("loss", ("b",), level()),
        batch=batch,
    )
    saved, not_saved = (moments_of(Stage(costs, 0, 1), (0, number)) for number in (0, 1))
    assert not_saved == {
        "forward of a": 40,
        "forward of b": 40 + 20,
        "backward of b": 40 + 40,
        "backward of a": 40 + 40 + 20,
        "optimizer step": 40,
    }
    assert saved == not_saved


def test_a_gradient_that_arrived_is_not_freed_while_its_segment_works():
    def costs(**loss_reads: tuple[str, ...]) -> ModelCosts:
        work = level(inputs=(False,), backward=100, then=(Stretch(95, gradient=True),))
        return model(
            segment("a", ("images",), work, output=40),
            segment("b", ("a",), work, output=20),
            segment("c", ("b",), work, output=10),
            segment("loss", loss_reads["loss"], level(inputs=(False,) * len(loss_reads["loss"]))),
        )

    chain, skip = costs(loss=("c",)), costs(loss=("c", "a"))
    # The gradient of b's output arrives; that of a's is made here, by b.
    first = moments_of(Stage(chain, 0, 1), (0, 0))
    assert first["backward of b"] == 20 + 20 + (95 + 20)
    assert first["backward of a"] == 20 + 20 + 40 + 100
    # For a's output one arrives from the loss too, but b reads it here: the sum of both is a new tensor.
    skipped = moments_of(Stage(skip, 0, 1), (0, 0))
    assert skipped["backward of b"] == (40 + 20) + (40 + 20) + (95 + 20)
    assert skipped["backward of a"] == (40 + 20) + (40 + 20) + 40 + 100
    # On one card nothing arrives.
    assert moments_of(Stage(chain, 0, 3), (0, 0, 0, 0))["backward of b"] == 20 + 100


def test_an_arrived_gradient_takes_no_more_where_the_output_needs_none():
    costs = model(
        replace(
            segment("a", ("images",), level(then=(Stretch(100, gradient=True),)), output=40),
            output_needs_grad=False,
        ),
        segment("loss", ("a",), level()),
    )
    assert moments_of(Stage(costs, 0, 0), (0,))["backward of a"] == 40 + 100


def test_a_tensor_that_skips_a_stage_unread_takes_three_buffers_in_backward():
    # Autograd clones the gradient that a leaf is handed, so the received one and the clone live side by side.
    costs = model(
        segment("a", ("images",), level(), output=40),
        segment("b", ("a",), level(), output=20),
        segment("c", ("b",), level(), output=10),
        segment("loss", ("c", "a"), level(inputs=(True, True))),
    )
    skipped = moments_of(Stage(costs, 2, 2), (0,))
    assert skipped["forward of c"] == (20 + 40) + (10 + 40)
    assert skipped["backward of c"] == (20 + 40) + (10 + 40) + 40 + 10


def test_recomputing_a_segment_keeps_its_input_and_frees_the_rest():
    costs = model(
        segment("a", ("images",), level(), output=40),
        segment(
            "b",
            ("a",),
            level(saved=100, inputs=(False,)),
            level(Recompute.SEGMENT, inputs=(True,), backward=100),
            output=20,
        ),
        segment("loss", ("b",), level()),
    )
    stage = Stage(costs, 0, 2)
    assert moments_of(stage, (0, 0, 0))["forward of loss"] == 100 + 20
    assert moments_of(stage, (0, 1, 0))["forward of loss"] == 40 + 20
    assert stage.recompute_of((0, 1, 0)) == ("none", "segment", "none")


def test_a_part_of_a_gradient_keeps_the_whole_alive_until_its_maker_has_read_it():
    # As in a U-Net: c concatenates the outputs of a and b, whose gradients are views of one of 40 + 20.
    views = SharedGradient((0, 1), 60)
    costs = model(
        segment("a", ("images",), level(backward=1), output=40),
        segment("b", ("a",), level(backward=1), output=20),
        segment("c", ("a", "b"), level(inputs=(False, False), shared=(views,)), output=0),
        segment("loss", ("c",), level(inputs=(False,))),
    )
    found = moments_of(Stage(costs, 0, 3), (0, 0, 0, 0))
    # b has saved what a made; where it adds its share to the gradient of that, the sum is a tensor of its own.
    assert (found["backward of b"], found["backward of a"]) == (40 + 60 + 1, 40 + 1)
    alone = replace(
        costs, segments=(costs.segments[0], replace(costs.segments[1], reads=("images",)), *costs.segments[2:])
    )
    found = moments_of(Stage(alone, 0, 3), (0, 0, 0, 0))
    assert (found["backward of b"], found["backward of a"]) == (60 + 1, 60 + 1)


def test_a_fresh_gradient_is_let_go_of_where_there_is_one_to_add_it_to():
    costs = model(
        segment("a", ("images",), level(backward=70, adding=30), gradient_bytes=50),
        segment("loss", ("a",), level(inputs=(False,))),
    )
    one_pass, several = (moments_of(Stage(costs, 0, 1, Flow(keeps_gradients=keeps)), (0, 0)) for keeps in (False, True))
    assert (one_pass["backward of a"], several["backward of a"]) == (70, 50 + 30)


def schedule_of(flow: Flow) -> list[tuple[str, int]]:
    """Forward and backward of each micro-batch, in order."""
    count, warm = flow.micro_batches, flow.in_flight
    order = [("F", number) for number in range(warm)]
    for number in range(count):
        order.append(("B", number))
        order += [("F", warm + number)] if warm + number < count else []
    return order


class Walk:
    """A stage's step, holding and letting go of each tensor: no terms, no moments."""

    def __init__(self, costs: ModelCosts, first: int, last: int, levels: tuple[int, ...], flow: Flow) -> None:
        self.segments, self.first, self.last, self.flow = costs.segments, first, last, flow
        self.chosen = {p: self.segments[p].levels[n] for p, n in zip(range(first, last + 1), levels, strict=True)}
        self.readers = {s.name: [p for p, r in enumerate(self.segments) if s.name in r.reads] for s in self.segments}
        self.entering = {s.name for s in self.segments[:first] if any(r >= first for r in self.readers[s.name])}
        self.leaving = {s.name for s in self.segments[: last + 1] if any(r > last for r in self.readers[s.name])}
        self.output = {s.name: s.output_bytes for s in self.segments}
        self.needs_grad = {s.name: s.output_needs_grad for s in self.segments} | {"images": False, "target": False}
        self.batch = {"images": costs.image_bytes, "target": costs.target_bytes}
        here = self.segments[first : last + 1]
        self.fixed = sum(s.parameter_bytes + s.buffer_bytes + s.optimizer_bytes for s in here)
        batch = sum(size for name, size in (("images", costs.image_bytes), ("target", costs.target_bytes))
                    if any(name in self.segments[p].reads for p in self.chosen))  # fmt: skip
        batch += sum(self.output[name] for name in self.entering)
        batch += sum(self.output[name] for name in self.leaving if self.needs_grad[name])
        self.fixed += batch * flow.micro_batches
        self.with_gradient = {p for p in self.chosen if flow.keeps_gradients}
        self.held: dict[tuple[int, str], set[object]] = {}  # tensors of each micro-batch, and who holds each
        self.saved: dict[tuple[int, int], int] = {}
        self.sent = self.peak = 0

    def alive(self) -> int:
        tensors = sum(self.output[name] for (_, name), holders in self.held.items() if holders)
        gradients = sum(self.segments[p].gradient_bytes for p in self.with_gradient)
        return self.fixed + tensors + sum(self.saved.values()) + gradients + self.sent

    def forward(self, number: int) -> None:
        for p, cost in self.chosen.items():
            self.peak = max(self.peak, self.alive() + cost.forward_peak_bytes)
            self.saved[number, p] = cost.saved_bytes
            name = self.segments[p].name
            own = self.held[number, name] = {("saves", p)} if cost.saves_output else set()
            if name in self.leaving:
                own.add("caller")
            elif self.readers[name]:
                own |= {("reads", r) for r in self.readers[name]}
            else:
                own.add("caller")
            if self.first > 0 and self.last == len(self.segments) - 1 and name in self.segments[-1].reads:
                own.add("pipeline")  # a model's outputs, in a split
            for place, read in enumerate(self.segments[p].reads):
                if (number, read) in self.held:
                    self.held[number, read] -= {("reads", p)}
                    self.held[number, read] |= {("saves", p)} if cost.saves_inputs[place] else set()

    def backward(self, number: int) -> None:
        arrived = {name for name in self.entering if self.needs_grad[name]}
        made = {name for name in arrived if not any(p in self.chosen for p in self.readers[name])}
        storages = {name: (name, self.output[name]) for name in made}  # of gradients: which, and its size
        first_reader: dict[str, int] = {}
        for p in reversed(self.chosen):
            own, cost = self.segments[p].name, self.chosen[p]
            received = (
                own in self.leaving and self.needs_grad[own] and not any(r in self.chosen for r in self.readers[own])
            )
            lives_on = bool(self.held[number, own] & {"caller", "pipeline"}) and bool(self.readers[own])
            # Which level the reader has is not looked at: any that would share counts.
            beside = own in first_reader and any(
                self.segments[first_reader[own]].reads.index(own) in shared.places
                and any(
                    first_reader.get(other) == first_reader[own] and other in storages and other != own
                    for other in (self.segments[first_reader[own]].reads[place] for place in shared.places)
                )
                for level in self.segments[first_reader[own]].levels
                for shared in level.shared_gradients
            )
            with_gradients = len(self.with_gradient) == len(self.chosen)
            memory = cost.backward_memory_adding if with_gradients else cost.backward_memory
            stays = received or beside
            sums = [self.summed(p, place, first_reader) for place in range(len(self.segments[p].reads))]
            working = max(
                more
                + one.peak_bytes
                + sum(self.staying(number, p, place) for place in one.inputs)
                + self.output[own] * (one.output and lives_on)
                + self.output[own] * (one.gradient and stays)
                for more, one in [
                    *((0, one) for one in memory.stretches),
                    *((sums[one.place], one.then) for one in memory.arrivals),
                ]
            )
            working = max(0, working)
            gradients = sum(dict(storages.values()).values())
            self.peak = max(self.peak, self.alive() + gradients + working)
            del self.saved[number, p]
            self.with_gradient.add(p)
            for (batch, _), holders in self.held.items():
                if batch == number:
                    holders -= {("saves", p)}
            storages.pop(own, None)
            for place, name in enumerate(self.segments[p].reads):
                if self.needs_grad[name]:
                    lies_in = next((one for one in cost.shared_gradients if place in one.places), None)
                    alone = name not in storages and name not in self.leaving
                    shares = alone and lies_in is not None
                    storages[name] = ((p, lies_in), lies_in.size_bytes) if shares else (name, self.output[name])
                    if alone:
                        first_reader[name] = p
                    else:
                        first_reader.pop(name, None)
        self.held = {key: holders for key, holders in self.held.items() if key[0] != number}
        if self.flow.is_gpipe and self.flow.micro_batches > 1:
            self.sent += sum(self.output[name] for name in arrived)

    def summed(self, p: int, place: int, first_reader: dict[str, int]) -> int:
        """Of the sum with a gradient that is there, where that is no tensor of its own, at any level of its reader."""
        name = self.segments[p].reads[place]
        if name in self.batch or not self.needs_grad[name]:
            return 0
        reader = first_reader.get(name)
        is_view = reader is not None and any(
            self.segments[reader].reads.index(name) in shared.places
            for level in self.segments[reader].levels
            for shared in level.shared_gradients
        )
        return self.output[name] if is_view or name in self.leaving else 0

    def staying(self, number: int, p: int, place: int) -> int:
        """Of what p reads, if others hold it: at any of their levels, whichever they have."""
        name = self.segments[p].reads[place]
        if name in self.batch:
            return self.batch[name]
        maker = [one.name for one in self.segments].index(name)
        others = [r for r in self.readers[name] if self.first <= r < p]
        saved = any(one.saves_output for one in self.segments[maker].levels) or any(
            one.saves_inputs[self.segments[r].reads.index(name)] for r in others for one in self.segments[r].levels
        )
        held = maker < self.first or self.held[number, name] & {"caller", "pipeline"}
        return self.output[name] if held or saved else 0

    def run(self) -> int:
        for phase, number in schedule_of(self.flow):
            self.forward(number) if phase == "F" else self.backward(number)
        self.sent = 0
        return max(self.peak, self.alive())


FLOWS = [
    Flow(),
    Flow(keeps_gradients=True),
    Flow(2, 2),
    Flow(2, 1),
    Flow(4, 4),
    Flow(4, 2),
    Flow(4, 3, keeps_gradients=True),
    Flow(3, 3, keeps_gradients=True),
]


@pytest.mark.parametrize("seed", range(40))
def test_the_sum_of_terms_is_what_a_walk_through_the_step_holds(seed: int):
    generator = random.Random(seed)
    costs = random_model(generator, num_segments=generator.randint(2, 8), num_levels=4)
    for _ in range(20):
        first, last = sorted(generator.choices(range(len(costs.segments)), k=2))
        levels = tuple(generator.randrange(len(s.levels)) for s in costs.segments[first : last + 1])
        flow = generator.choice(FLOWS)
        assert Stage(costs, first, last, flow).peak_of(levels).size == Walk(costs, first, last, levels, flow).run(), (
            flow
        )


def test_schedules_are_those_of_the_papers():
    # Huang et al., figure 2c; Narayanan et al., figure 4: the last but one of its stages.
    assert schedule_of(Flow(3, 3)) == [("F", 0), ("F", 1), ("F", 2), ("B", 0), ("B", 1), ("B", 2)]
    assert schedule_of(Flow(3, 2)) == [("F", 0), ("F", 1), ("B", 0), ("F", 2), ("B", 1), ("B", 2)]


def test_micro_batches_hold_what_is_in_flight():
    costs = model(
        segment("a", ("images",), level(saved=100, forward=150, backward=30), output=40, gradient_bytes=7),
        segment("loss", ("a",), level(inputs=(False,))),
        images=10,
    )
    fixed, held = 2 * (10 + 40), 100 + 40  # images and a gradient that arrives, for both; saved and sent by each
    assert moments_of(Stage(costs, 0, 0, Flow(2, 2)), (0,)) == {
        "forward of a": fixed + held + 150,
        "backward of a": fixed + 7 + held + 30,
        "optimizer step": fixed + 7,
    }
    assert Stage(costs, 0, 0, Flow(2, 2)).peak_of((0,)).size == fixed + held + held + 30
    # Alone in flight; but once the first backward is over, its parameters' gradients stay.
    assert moments_of(Stage(costs, 0, 0, Flow(2, 1)), (0,)) == {
        "forward of a": fixed + 7 + 150,
        "backward of a": fixed + 7 + held + 30,
        "optimizer step": fixed + 7,
    }
