"""What a card must hold: what is allocated is within what is reserved, which is within what the process takes."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from memseg.errors import InputError
from memseg.planning.cards import known_cards, parse_cards
from memseg.profiling import Category, DataParallel, foreign_job, named_optimizer, trace_job
from memseg.profiling.allocator.replay import FREE
from memseg.profiling.allocator.settings import AllocatorSettings
from memseg.profiling.card_memory import card_memory, named_events, training_events
from memseg.profiling.device_memory import Link, cublas_workspace_bytes, nccl_bytes

MIB = 2**20
CUDA_CARDS = [card for card in known_cards() if card.kind == "cuda"]


def products():
    return nn.Sequential(nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 256))


def convolutions():
    return nn.Sequential(nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 16, 3, padding=1))


def trace(build, *, device="cuda", optimizer="adam", **settings):
    shape = (512, 1024) if build is products else (2, 16, 64, 64)
    make = partial(foreign_job, build, torch.empty(shape, device="meta"), optimizer=named_optimizer(optimizer))
    return trace_job(make, device=device, **settings)


@pytest.fixture(scope="module")
def profiles():
    return {build: trace(build) for build in (products, convolutions)}


def card(name):
    return parse_cards(name)[0]


@pytest.mark.parametrize("where", CUDA_CARDS, ids=lambda one: one.name)
@pytest.mark.parametrize("build", [products, convolutions])
def test_allocated_is_within_reserved_is_within_the_total(profiles, build, where):
    memory = card_memory(profiles[build], where)
    peak = profiles[build].peak_allocated_bytes
    assert peak <= memory.peak_allocated_bytes <= memory.peak_reserved_bytes < memory.device_total_bytes
    outside = sum(term.size_bytes for term in memory.terms if not term.in_allocator)
    assert memory.device_total_bytes == memory.peak_reserved_bytes + outside
    assert memory.peak_reserved_bytes % (2 * MIB) == 0
    assert 0 <= memory.unallocated_bytes < memory.peak_reserved_bytes


def test_what_is_asked_for_at_the_peak_are_the_tensors_and_workspaces_of_the_step(profiles):
    found = card_memory(profiles[convolutions], card("v100"))
    assert found.replay.peak_requested_bytes == profiles[convolutions].peak_allocated_bytes
    # Blocks are multiples of 512 bytes.
    alive = len(profiles[convolutions].timeline.alive(profiles[convolutions].timeline.peak_instant))
    assert found.peak_allocated_bytes - found.replay.peak_requested_bytes < 512 * alive


def test_matrix_products_take_cublas_workspaces_and_convolutions_alone_do_not(profiles):
    found = card_memory(profiles[products], card("v100"))
    workspaces = cublas_workspace_bytes("7.0").size_bytes
    assert found.replay.peak_requested_bytes == profiles[products].peak_allocated_bytes + workspaces
    assert card_memory(profiles[convolutions], card("v100")).peak_allocated_bytes < workspaces


@pytest.mark.parametrize("build", [products, convolutions])
def test_expandable_segments_reserve_no_more(profiles, build):
    usual, expandable = (
        card_memory(profiles[build], card("v100"), settings=AllocatorSettings.parse(text))
        for text in ("", "expandable_segments:True")
    )
    assert expandable.peak_reserved_bytes <= usual.peak_reserved_bytes
    assert expandable.peak_allocated_bytes == usual.peak_allocated_bytes


def test_replicas_hold_the_buffers_of_nccl_and_their_buckets():
    alone = card_memory(trace(convolutions), card("v100"))
    replica = card_memory(trace(convolutions, data_parallel=DataParallel(2)), card("v100"), replicas=2)
    assert [term.name for term in replica.terms if term not in alone.terms] == ["NCCL buffers"]
    outside = replica.device_total_bytes - replica.peak_reserved_bytes
    buffers = nccl_bytes(2, Link.PCIE).size_bytes
    assert outside == alone.device_total_bytes - alone.peak_reserved_bytes + buffers
    assert replica.peak_allocated_bytes > alone.peak_allocated_bytes


def test_the_cpu_has_what_tensors_take_and_nothing_reserved():
    profile = trace(convolutions, device="cpu")
    memory = card_memory(profile, card("cpu:8GiB"))
    assert memory.peak_allocated_bytes == profile.peak_allocated_bytes
    assert (memory.peak_reserved_bytes, memory.device_total_bytes, memory.replay) == (None, None, None)
    assert (memory.terms, memory.unallocated_bytes) == ((), 0)


@pytest.mark.parametrize(("device", "where"), [("cpu", "v100"), ("cuda", "cpu")])
def test_a_profile_of_another_kind_of_device_is_refused(device, where):
    with pytest.raises(InputError, match=f"the profile is of a step on {device}"):
        card_memory(trace(convolutions, device=device), card(where))


# What the allocator is asked for.


def test_all_that_a_step_allocates_it_frees_and_what_outlives_it_stays(profiles):
    profile = profiles[products]
    alive = {}
    for event in training_events(profile, [8 * MIB]):
        if event.size_bytes == FREE:
            del alive[event.key]
        else:
            assert event.key not in alive
            alive[event.key] = event.size_bytes
    lasting = [
        one.size_bytes
        for one in profile.timeline.allocations
        if one.category in (Category.PARAMETER, Category.OPTIMIZER_STATE, Category.INPUT)
    ]
    assert sorted(alive.values()) == sorted([*lasting, 8 * MIB])


def test_three_steps_are_asked_for_and_the_state_of_the_optimizer_is_born_in_the_first(profiles):
    profile = profiles[products]
    named = [(event, one) for event, one in named_events(profile) if event.size_bytes != FREE]
    state = [index for index, (_, one) in enumerate(named) if one.category is Category.OPTIMIZER_STATE]
    gradients = [index for index, (_, one) in enumerate(named) if one.category is Category.GRADIENT]
    parameters = len(list(products().parameters()))
    assert len(gradients) == 3 * parameters
    # Two moments for each parameter, after the gradients of the first step; counts of steps stay on the host.
    assert len(state) == 2 * parameters
    assert gradients[parameters - 1] < state[0] <= state[-1] < gradients[parameters]


def test_later_steps_ask_for_the_same_again(profiles):
    _, one, other = steps_of(profiles[products])
    assert one == other
    assert sum(one.values())


def steps_of(profile):
    """What each of the three steps asks for and gives back, by size; a step begins with its forward."""
    steps, phase = [], None
    for event, one in named_events(profile):
        if event.size_bytes == FREE or one is None or one.category is Category.OPTIMIZER_STATE or one.phase == "setup":
            continue
        if one.phase == "forward" and phase != "forward":
            steps.append(Counter())
        phase = one.phase
        steps[-1][event.size_bytes] += 1
    return steps


def test_no_optimizer_is_fine():
    found = trace_job(partial(foreign_job, convolutions, torch.empty(2, 16, 8, 8), optimizer=None), device="cuda")
    assert card_memory(found, card("v100")).replay.peak_requested_bytes == found.peak_allocated_bytes


def test_on_a_small_card_the_allocator_gives_back_or_is_refused():
    profile = trace(convolutions)
    roomy = card_memory(profile, card("v100"))
    outside = roomy.device_total_bytes - roomy.peak_reserved_bytes
    enough = card_memory(profile, replace(card("v100"), capacity_bytes=outside + roomy.peak_reserved_bytes))
    assert (enough.out_of_memory, enough.peak_reserved_bytes) == (None, roomy.peak_reserved_bytes)
    tight = card_memory(profile, replace(card("v100"), capacity_bytes=outside + roomy.peak_allocated_bytes // 2))
    assert tight.out_of_memory is not None
    assert tight.peak_allocated_bytes == roomy.peak_allocated_bytes
