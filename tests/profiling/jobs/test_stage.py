"""Each card of a split, traced as the pipeline runs it, holds what the planner predicted of it."""

import json
from dataclasses import replace
from functools import partial

import pytest

from memseg.cli import main as cli
from memseg.levels import NormMode, Recompute, Schedule, Strategy
from memseg.models import build_model
from memseg.planning import LOSS, Aim, ModelCosts, Plan, Settings, Workload, make_plan, parse_cards, save_plan
from memseg.profiling import Category, Phase, model_costs, trace_job
from memseg.profiling.jobs.stage import stage_job

BUILD = partial(build_model, "ladder-densenet-mini")
IMAGE, BATCH = (128, 256), 2


def planned(cards: str, accumulation: int = 1, **settings: object) -> Plan:
    def costs(images: int, replicas: int) -> ModelCosts:
        norm = NormMode.SYNCED if replicas > 1 else NormMode.BATCH
        build = partial(BUILD, norm=norm)
        return replace(model_costs(build, image=IMAGE, batch=images, norm=norm, replicas=replicas), norm=NormMode.BATCH)

    return make_plan(Workload(costs, BATCH, accumulation), parse_cards(cards), Settings(**settings))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned("cpu:1GiB,cpu:1GiB", strategy=Strategy.SPLIT)


def stages_of(plan):
    return [[one.name for one in card.segments if one.name != LOSS] for card in plan.cards]


def profile_of(plan, index):
    levels = {one.name: one.recompute for one in plan.cards[index].segments if one.name != LOSS}
    return trace_job(partial(stage_job, BUILD, stages_of(plan), index, image=IMAGE, batch=BATCH, recompute=levels))


def test_every_card_of_a_split_holds_what_was_planned(plan):
    for index, card in enumerate(plan.cards):
        assert abs(profile_of(plan, index).peak_allocated_bytes - card.predicted_peak_bytes) <= 256


def test_buffers_for_what_crosses_are_there_all_step(plan):
    first, second = (profile_of(plan, index).timeline for index in (0, 1))
    for timeline in (first, second):
        buffers = [one for one in timeline.allocations if one.category is Category.COMMUNICATION]
        assert buffers
        assert {(one.phase, one.died) for one in buffers} == {(Phase.SETUP, timeline.instants)}
    # What leaves the first card comes back as a gradient of the same size.
    sizes = [
        sorted(one.size_bytes for one in timeline.allocations if one.category is Category.COMMUNICATION)
        for timeline in (first, second)
    ]
    assert sizes[0] == sizes[1]


def test_stages_that_are_not_consecutive_are_refused():
    make = partial(
        stage_job, BUILD, [["stem", "block2"]], 0, image=IMAGE, batch=BATCH, recompute={"stem": Recompute.NONE}
    )
    with pytest.raises(ValueError, match="not consecutive segments"):
        trace_job(make)


def test_a_plan_is_profiled_card_by_card(plan, tmp_path, capsys):
    save_plan(plan, tmp_path / "plan.json")
    page = tmp_path / "cards.html"
    assert cli.main(["profile", "--plan", str(tmp_path / "plan.json"), "--json", "--html", str(page)]) == 0
    cards = json.loads(capsys.readouterr().out)["cards"]
    assert [one["card_number"] for one in cards] == ["1 of 2", "2 of 2"]
    for one, card in zip(cards, plan.cards, strict=True):
        assert abs(one["peak_allocated_bytes"] - card.predicted_peak_bytes) <= 256
    assert sorted(path.name for path in tmp_path.glob("*.html")) == ["cards-1.html", "cards-2.html"]


@pytest.mark.parametrize(
    ("cards", "settings"),
    [
        ("2*cpu:1GiB", {"strategy": Strategy.REPLICATE}),
        ("2*cpu:1GiB", {"strategy": Strategy.REPLICATE, "aim": Aim.MEMORY}),
        ("4*cpu:1GiB", {"strategy": Strategy.REPLICATE_SPLIT}),
        ("2*cpu:1GiB", {"strategy": Strategy.SPLIT, "accumulation": 2}),
        ("cpu:1GiB", {"accumulation": 2}),
    ],
)
def test_replicas_and_passes_hold_what_was_planned(cards, settings, tmp_path, capsys):
    plan = planned(cards, **settings)
    save_plan(plan, tmp_path / "plan.json")
    assert cli.main(["profile", "--plan", str(tmp_path / "plan.json"), "--json"]) == 0
    traced = json.loads(capsys.readouterr().out)
    for one, card in zip(traced.get("cards", [traced]), plan.cards, strict=True):
        # A bucket holds what a segment's own gradients would take for an instant, before they are copied there.
        gradients = max(segment_gradients(plan).values()) if plan.replicas > 1 else 0
        assert -256 <= card.predicted_peak_bytes - one["peak_allocated_bytes"] <= 256 + gradients


def segment_gradients(plan):
    model = BUILD()
    return {name: sum(parameter.nbytes for parameter in model.segments[name].parameters()) for name in model.segments}


def test_a_plan_with_micro_batches_is_not_profiled(plan, tmp_path, capsys):
    several = plan.model_copy(update={"micro_batches": 2, "schedule": Schedule.GPIPE, "norm": NormMode.FROZEN})
    (tmp_path / "plan.json").write_text(several.to_json())
    assert cli.main(["profile", "--plan", str(tmp_path / "plan.json")]) == 2
    assert "must have one micro-batch" in capsys.readouterr().err


def test_what_a_plan_says_is_not_asked_for_again(tmp_path, capsys):
    assert cli.main(["profile", "--plan", str(tmp_path / "plan.json"), "--batch", "7"]) == 2
    assert "--batch does not go with --plan" in capsys.readouterr().err
    assert cli.main(["profile"]) == 2
    assert "must be a MODEL or a --plan, got neither" in capsys.readouterr().err
