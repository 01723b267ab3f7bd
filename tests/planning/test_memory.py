import random
from dataclasses import replace

import pytest

from memseg.levels import Recompute
from memseg.planning import ModelCosts, Stage

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
        work = level(inputs=(False,), backward=100, backward_held=130)
        return model(
            segment("a", ("images",), work, output=40),
            segment("b", ("a",), work, output=20),
            segment("c", ("b",), work, output=10),
            segment("loss", loss_reads["loss"], level(inputs=(False,) * len(loss_reads["loss"]))),
        )

    chain, skip = costs(loss=("c",)), costs(loss=("c", "a"))
    # The gradient of b's output arrives; that of a's is made here, by b.
    first = moments_of(Stage(chain, 0, 1), (0, 0))
    assert first["backward of b"] == 20 + 20 + 130
    assert first["backward of a"] == 20 + 20 + 40 + 100
    # For a's output one arrives from the loss too, but b reads it here: the sum of both is a new tensor.
    skipped = moments_of(Stage(skip, 0, 1), (0, 0))
    assert skipped["backward of b"] == (40 + 20) + (40 + 20) + 130
    assert skipped["backward of a"] == (40 + 20) + (40 + 20) + 40 + 100
    # On one card nothing arrives.
    assert moments_of(Stage(chain, 0, 3), (0, 0, 0, 0))["backward of b"] == 20 + 100


def test_an_arrived_gradient_takes_no_more_where_the_output_needs_none():
    costs = model(
        replace(segment("a", ("images",), level(backward=100, backward_held=130), output=40), output_needs_grad=False),
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


def replay(costs: ModelCosts, first: int, last: int, levels: tuple[int, ...]) -> int:
    """The peak of a stage by walking through the step, holding and letting go of each tensor: no terms, no moments."""
    segments = costs.segments
    chosen = {p: segments[p].levels[n] for p, n in zip(range(first, last + 1), levels, strict=True)}
    readers = {s.name: [p for p, r in enumerate(segments) if s.name in r.reads] for s in segments}
    entering = {s.name: s for s in segments[:first] if any(r >= first for r in readers[s.name])}
    leaving = {s.name for s in segments[: last + 1] if any(r > last for r in readers[s.name])}
    output = {s.name: s.output_bytes for s in segments}
    needs_grad = {s.name: s.output_needs_grad for s in segments} | {"images": False, "target": False}

    fixed = sum(s.parameter_bytes + s.buffer_bytes + s.optimizer_bytes for s in segments[first : last + 1])
    fixed += sum(size for name, size in (("images", costs.image_bytes), ("target", costs.target_bytes))
                 if any(name in segments[p].reads for p in chosen))  # fmt: skip
    fixed += sum(output[name] for name in entering) + sum(output[name] for name in leaving if needs_grad[name])
    saved = gradients = peak = 0
    held: dict[str, set[object]] = {}  # tensors, and who holds each
    crossing: set[str] = set()  # tensors that leave, which nobody lets go of

    def alive() -> int:
        names = crossing | {name for name, holders in held.items() if holders}
        return sum(output[name] for name in names)

    for p, cost in chosen.items():
        peak = max(peak, fixed + saved + alive() + cost.forward_peak_bytes)
        saved += cost.saved_bytes
        name = segments[p].name
        held[name] = {("saves", p)} if cost.saves_output else set()
        if name in leaving:
            crossing.add(name)
            for r in readers[name]:
                if r in chosen and chosen[r].saves_inputs[segments[r].reads.index(name)]:
                    held[name].add(("saves", r))
        elif readers[name]:
            held[name] |= {("reads", r) for r in readers[name]}
        else:
            held[name].add("caller")
        if first > 0 and last == len(segments) - 1 and name in segments[-1].reads and p != last:
            held[name].add("pipeline")  # a model's outputs, in a split
        for place, read in enumerate(segments[p].reads):
            if read in held:
                held[read] -= {("reads", p)}
                held[read] |= {("saves", p)} if cost.saves_inputs[place] else set()

    made = {name for name in entering if needs_grad[name] and not any(p in chosen for p in readers[name])}
    for p in reversed(chosen):
        own = segments[p].name
        received = own in leaving and needs_grad[own] and not any(r in chosen for r in readers[own])
        working = chosen[p].backward_peak_held_bytes if received else chosen[p].backward_peak_bytes
        peak = max(peak, fixed + saved + alive() + gradients + sum(output[n] for n in made) + working)
        saved -= chosen[p].saved_bytes
        gradients += segments[p].gradient_bytes
        for holders in held.values():
            holders -= {("saves", p)}
        made |= {name for name in segments[p].reads if needs_grad[name]}
        made -= {segments[p].name}
    return max(peak, fixed + gradients)


@pytest.mark.parametrize("seed", range(40))
def test_the_sum_of_terms_is_what_a_walk_through_the_step_holds(seed: int):
    generator = random.Random(seed)
    costs = random_model(generator, num_segments=generator.randint(2, 8), num_levels=4)
    for _ in range(20):
        first, last = sorted(generator.choices(range(len(costs.segments)), k=2))
        levels = tuple(generator.randrange(len(s.levels)) for s in costs.segments[first : last + 1])
        assert Stage(costs, first, last).peak_of(levels).size == replay(costs, first, last, levels)
