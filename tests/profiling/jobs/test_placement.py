"""A model over several cards: each byte is on one card, and what crosses is there twice."""

from collections import OrderedDict
from functools import partial

import pytest
import torch
from torch import nn

from memseg.errors import InputError, UnknownNameError
from memseg.profiling import Category, Phase, foreign_job, named_optimizer, trace_job
from memseg.profiling.jobs.placement import card_of, check_placement

IMAGES, HIDDEN, OUT = 64 * 16 * 4, 64 * 32 * 4, 64 * 8 * 4
"""Bytes of the maps."""


def linear(*sizes):
    return nn.Linear(*sizes, bias=False)


def chain():
    return nn.Sequential(OrderedDict(first=linear(16, 32), act=nn.Tanh(), second=linear(32, 8), last=linear(8, 4)))


def trace(placement, build=chain, num_cards=2):
    make = partial(foreign_job, build, torch.ones(64, 16), optimizer=named_optimizer("momentum"))
    return trace_job(make, placement=placement, num_cards=num_cards)


def copies(found, card):
    """(bytes, phase, layer) of what came from another card."""
    return [
        (one.size_bytes, one.phase, one.layer)
        for one in found.on_card(card).timeline.allocations
        if one.category is Category.COMMUNICATION
    ]


def on_cards(found, category, num_cards=2):
    return [found.on_card(card).timeline.by_category()[category] for card in range(num_cards)]


def test_a_layer_is_where_the_nearest_placed_module_is_that_holds_it():
    placement = {"layer4": 1, "layer4.0": 2}
    names = "layer4.0.conv1", "layer4.0", "layer4.1", "layer40", "layer3", ""
    assert [card_of(placement, name) for name in names] == [2, 2, 1, 0, 0, 0]


@pytest.mark.parametrize("placement", [{"second": 1, "last": 1}, {"act": 1}, {"first": 1}, {"first": 2, "second": 1}])
def test_parameters_gradients_and_states_of_all_cards_add_up(placement):
    found, alone = trace(placement, num_cards=3), trace({})
    for category in (Category.PARAMETER, Category.OPTIMIZER_STATE, Category.INPUT):
        assert sum(on_cards(found, category, 3)) == alone.timeline.by_category()[category], category
    at_end = [found.on_card(card).timeline for card in range(3)]
    gradients = [one.by_category(one.instants - 1)[Category.GRADIENT] for one in at_end]
    assert gradients == on_cards(found, Category.PARAMETER, 3) == on_cards(found, Category.OPTIMIZER_STATE, 3)


def test_parameters_are_on_the_card_of_their_layer():
    found = trace({"second": 1, "last": 1})
    assert on_cards(found, Category.PARAMETER) == [16 * 32 * 4, (32 * 8 + 8 * 4) * 4]


def test_what_a_layer_reads_is_copied_to_its_card_and_its_gradient_copied_back():
    found = trace({"second": 1, "last": 1})
    assert copies(found, 1) == [(HIDDEN, Phase.FORWARD, "second")]
    assert copies(found, 0) == [(HIDDEN, Phase.BACKWARD, "second")]


def test_a_batch_that_wants_no_gradient_is_copied_and_nothing_comes_back():
    found = trace({"first": 1, "act": 1, "second": 1, "last": 1})
    assert copies(found, 1) == [(IMAGES, Phase.FORWARD, "first")]
    assert copies(found, 0) == []


def test_a_layer_in_the_middle_reads_from_one_side_and_is_read_from_the_other():
    found = trace({"second": 1})
    assert copies(found, 1) == [(HIDDEN, Phase.FORWARD, "second"), (OUT, Phase.BACKWARD, "last")]
    assert copies(found, 0) == [(OUT, Phase.FORWARD, "last"), (HIDDEN, Phase.BACKWARD, "second")]


def test_inside_a_placed_module_nothing_is_copied_twice():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(OrderedDict(a=linear(16, 16), b=linear(16, 16), c=linear(16, 16)))
            self.head = linear(16, 4)

        def forward(self, images):
            return self.head(self.body(images))

    whole = trace({"body": 1}, Nested)
    assert copies(whole, 1) == [(IMAGES, Phase.FORWARD, "body"), (IMAGES, Phase.BACKWARD, "head")]
    assert copies(whole, 0) == [(IMAGES, Phase.FORWARD, "head")]
    part = trace({"body.b": 1}, Nested)
    assert [layer for _, _, layer in copies(part, 1)] == ["body.b", "body.c"]
    assert on_cards(part, Category.PARAMETER) == [(16 * 16 * 2 + 16 * 4) * 4, 16 * 16 * 4]


def test_keyword_arguments_cross_too():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.scale = linear(16, 16), Scale()

        def forward(self, images):
            return self.scale(images=self.first(images))

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16))

        def forward(self, images):
            return images * self.weight

    assert copies(trace({"scale": 1}, Keyword), 1) == [(IMAGES, Phase.FORWARD, "scale")]


@pytest.mark.parametrize("placement", [{"second": 1, "last": 1}, {"act": 1}, {"first": 1}])
def test_no_card_holds_more_than_all_together_and_all_together_hold_the_copies_more(placement):
    found, alone = trace(placement), trace({})
    together = found.timeline.peak_allocated_bytes
    peaks = [found.on_card(card).timeline.peak_allocated_bytes for card in range(2)]
    assert max(peaks) <= together <= sum(peaks)
    assert together >= alone.timeline.peak_allocated_bytes


def test_everything_on_the_first_card_is_as_without_a_placement():
    placed, alone = trace({"second": 0}), trace({})
    assert placed.on_card(0).timeline.allocations == alone.timeline.allocations
    assert placed.on_card(1).peak_allocated_bytes == 0


def test_names_and_cards_that_are_not_there_are_refused():
    layers = dict(chain().named_modules())
    with pytest.raises(UnknownNameError, match="unknown layer 'secnd'; did you mean second"):
        check_placement({"secnd": 1}, layers, 2)
    for card in (2, -1):
        with pytest.raises(InputError, match=f"second must be placed on one of 2 cards, 0 to 1, got {card}"):
            trace({"second": card})


def test_no_hooks_stay_on_the_model():
    models = []

    def make():
        job = foreign_job(chain, torch.ones(64, 16), optimizer=None)
        models.append(job.model)
        return job

    trace_job(make, placement={"second": 1}, num_cards=2)
    assert not any(part._forward_pre_hooks for part in models[0].modules())
