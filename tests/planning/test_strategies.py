import itertools
import math
import random

import pytest

from memseg.planning import Card, ModelCosts, Stage
from memseg.planning.strategies import Placer, num_orders

from .cases import card, level, model, random_model, segment


def edges_across(costs: ModelCosts, cut: int) -> int:
    """Bytes that cross from segment cut-1 to cut, forward and back."""
    total = 0
    for position, maker in enumerate(costs.segments[:cut]):
        if any(maker.name in reader.reads for reader in costs.segments[max(cut, position + 1) :]):
            total += maker.output_bytes * (2 if maker.output_needs_grad else 1)
    return total


def every_split(costs: ModelCosts, cards: tuple[Card, ...]) -> list[tuple[float, float]]:
    """(seconds of the fastest levels that fit, worst shortfall of the smallest) of each order and each cut."""
    results = []
    n = len(costs.segments)
    for order in itertools.permutations(cards):
        for cuts in itertools.combinations(range(1, n - 1), len(cards) - 1):  # before n - 1: the loss is never alone
            seconds, shortfall = 0.0, -math.inf
            for on, first, end in zip(order, (0, *cuts), (*cuts, n), strict=True):
                stage = Stage(costs, first, end - 1)
                choices = list(itertools.product(*(range(len(s.levels)) for s in stage.segments)))
                peaks = [stage.peak_of(levels).size for levels in choices]
                fitting = [on.seconds(stage.work_of(levels)) for levels, peak in zip(choices, peaks, strict=True)
                           if peak <= on.available_bytes]  # fmt: skip
                seconds += min(fitting, default=math.inf)
                shortfall = max(shortfall, min(peaks) - on.available_bytes)
            links = zip(cuts, itertools.pairwise(order), strict=True)
            seconds += sum(edges_across(costs, cut) / min(a.link, b.link) for cut, (a, b) in links)
            results.append((seconds, shortfall))
    return results


@pytest.mark.parametrize("seed", range(25))
def test_a_split_is_the_best_of_all_cuts_orders_and_levels(seed: int):
    generator = random.Random(seed)
    num_cards = generator.choice([2, 2, 3])
    costs = random_model(generator, num_segments=generator.randint(num_cards + 1, 6), num_levels=3)
    cards = tuple(
        card(
            generator.randint(150, 500),
            f"c{n}",
            flops=generator.choice([1.0, 3.0]),
            link=generator.choice([10.0, 50.0]),
        )
        for n in range(num_cards)
    )
    splits = every_split(costs, cards)
    placer = Placer(costs)
    found, closest = placer.split(cards), placer.closest_split(cards)
    best = min(seconds for seconds, _ in splits)
    assert (found is None) == (best == math.inf)
    if found:
        assert found.step_seconds == pytest.approx(best)
        assert found.fits
        assert sorted(placed.card.name for placed in found.stages) == [on.name for on in cards]
    assert closest is not None
    assert closest.worst_stage.shortfall_bytes == min(shortfall for _, shortfall in splits)


def test_the_cut_falls_where_least_crosses_the_link():
    # The paper's reason to put skip projections with their block: 1 byte crosses instead of 100.
    costs = model(
        segment("block", ("images",), level(), output=100),
        segment("skip", ("block",), level(), output=1),
        segment("upsample", ("skip",), level(), output=100),
        segment("logits", ("upsample",), level(), output=50),
        segment("loss", ("logits",), level(), output=4),
    )
    found = Placer(costs).split([card(1000, "a"), card(1000, "b")])
    assert found is not None
    assert [len(placed.stage.segments) for placed in found.stages] == [2, 3]
    assert found.transfer_seconds == 2.0


def test_the_loss_is_never_alone_on_a_card():
    # Alone it would be faster, since a hundredth crosses, and less short: its card is the fuller one, even without 100.
    costs = model(
        segment("block", ("images",), level(inputs=(False,)), output=100),
        segment("logits", ("block",), level(inputs=(False,)), output=1),
        segment("loss", ("logits",), level(inputs=(False,)), output=4, parameter_bytes=500),
    )
    found = Placer(costs).split([card(1000, "a"), card(1000, "b")])
    assert found is not None
    assert [[s.name for s in placed.stage.segments] for placed in found.stages] == [["block"], ["logits", "loss"]]
    assert found.transfer_seconds == 200.0
    tight = Placer(costs).closest_split([card(10, "a"), card(10, "b")])
    assert tight is not None
    assert [[s.name for s in placed.stage.segments] for placed in tight.stages] == [["block"], ["logits", "loss"]]


@pytest.mark.parametrize("blocks", [0, 1])
def test_more_cards_than_segments_beside_the_loss_cannot_be_used(blocks: int):
    made = [segment("block", ("images",), level())][:blocks]
    costs = model(*made, segment("loss", ("images",), level()))
    assert Placer(costs).split([card(10), card(10)]) is None
    assert Placer(costs).closest_split([card(10), card(10)]) is None


def test_equal_cards_make_no_new_orders():
    a, b = card(10, "a"), card(10, "b")
    assert [num_orders(cards) for cards in ([a], [a, a], [a, b], [a, a, b], [a] * 8)] == [1, 1, 2, 3, 1]
