"""memseg plan from outside: a plan, or why there is none."""

import json
from pathlib import Path

import pytest

from memseg.cli.main import main
from memseg.planning import Plan, known_cards, load_plan
from memseg.units import format_bytes

MINI = "ladder-densenet-mini"
SMALL = [MINI, "--image", "64x128"]
TINY = [f"{Path(__file__).with_name('tiny_network.py')}:build", "--image", "64x128", "--classes", "8"]
TWO = ["--cards", "cpu:1GiB,cpu:2GiB"]


def plan(capsys, *arguments):
    """What `memseg plan --json` prints, of a command that ends well."""
    assert main(["plan", *arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_a_plan_is_shown_and_written(tmp_path, capsys):
    file = tmp_path / "plan.json"
    printed = plan(capsys, *SMALL, "--batch", "2", *TWO, "--strategy", "split", "-o", str(file))
    assert {key: printed[key] for key in printed if key != "published"} == json.loads(file.read_text())
    assert printed["feasible"] is True
    found = load_plan(file)
    assert (found.strategy, found.batch, found.image) == ("split", 2, (64, 128))
    assert {card.card for card in found.cards} == {"cpu:1GiB", "cpu:2GiB"}


def test_pictures_and_pages_are_written_beside_the_table(tmp_path, capsys):
    png, html = tmp_path / "plan.png", tmp_path / "plan.html"
    assert main(["plan", *SMALL, "--batch", "2", *TWO, "--png", str(png), "--html", str(html)]) == 0
    told = capsys.readouterr().out
    assert "replicate on cpu:1GiB, cpu:2GiB" in told
    assert [line for line in told.splitlines() if line.startswith("written")] == [f"written: {png}", f"written: {html}"]
    assert png.read_bytes().startswith(b"\x89PNG")
    assert html.read_text().startswith("<!doctype html>")


def test_what_the_papers_placement_would_cost_is_told(capsys):
    found = plan(capsys, *SMALL, "--batch", "2", *TWO)["published"]
    assert [one["change"] for one in found] == ["cut at transition2", "cut at transition2, nothing rebuilt"]
    for one in found:
        stages = sorted(one["plan"]["cards"], key=lambda card: card["stage"])
        assert [segment["name"] for segment in stages[1]["segments"]][:2] == ["transition2", "block3"]
    assert main(["plan", *SMALL, "--batch", "2", *TWO]) == 0
    assert "as its authors split it" in capsys.readouterr().out


def test_replicas_share_the_batch_and_norms_sync(capsys):
    found = plan(capsys, *SMALL, "--batch", "3", *TWO, "--strategy", "replicate")
    assert sorted(card["batch_share"] for card in found["cards"]) == [1, 2]
    assert Plan.from_json(json.dumps(found), "printed").trained_norm == "synced"


def test_frozen_norms_are_split_into_micro_batches(capsys):
    options = ["--batch", "4", *TWO, "--strategy", "split", "--norm", "frozen"]
    found = plan(capsys, *SMALL, *options)
    assert (found["micro_batches"], found["schedule"]) == (4, "1f1b")
    gpipe = plan(capsys, *SMALL, *options, "--schedule", "gpipe", "--micro-batches", "2")
    assert (gpipe["micro_batches"], gpipe["schedule"]) == (2, "gpipe")
    batch = plan(capsys, *SMALL, "--batch", "4", *TWO, "--strategy", "split")
    assert (batch["micro_batches"], batch["schedule"]) == (1, None)


def test_the_largest_batch_fits_and_one_image_more_does_not(capsys):
    card = ["--cards", "cpu:512MiB"]
    most = plan(capsys, *TINY, "--max-batch", *card)["batch"]
    assert most > 8
    assert main(["plan", *TINY, "--batch", str(most + 1), *card, "--json"]) == 2


def test_the_largest_image_has_the_same_proportions_and_one_step_more_does_not_fit(capsys):
    request = ["--batch", "1", "--cards", "cpu:512MiB"]
    found = plan(capsys, *TINY, "--max-image", *request)["image"]
    height, width = map(int, found.split("x"))
    assert width == 2 * height
    larger = f"{height + 1}x{width + 2}"
    assert main(["plan", *TINY, "--image", larger, *request, "--json"]) == 2


def test_any_cards_are_the_smallest_that_do(capsys):
    answers = plan(capsys, *TINY, "--image", "2048x4096", "--batch", "8", "--cards", "any")["answers"]
    assert len(answers[0]["cards"]) == 1
    assert all(answer["feasible"] for answer in answers)
    smallest = answers[0]["cards"][0]
    assert smallest["predicted_peak_bytes"] > 6 * 2**30
    known = [card for card in known_cards() if card.kind == "cuda" and card.capacity_bytes < smallest["capacity_bytes"]]
    assert all(card.available_bytes < smallest["predicted_peak_bytes"] for card in known)
    capacities = [answer["cards"][0]["capacity_bytes"] for answer in answers]
    assert capacities == sorted(set(capacities), reverse=True)


def test_offers_are_plans_with_one_change_each(capsys):
    found = plan(capsys, *TINY, "--batch", "2", "--cards", "cpu:1GiB", "--offer", "precision,accumulation")
    offers = {offer["change"]: offer["plan"] for offer in found["offers"]}
    assert set(offers) == {"precision bfloat16", "precision float16", "batch 1 with accumulation 2"}
    assert offers["precision bfloat16"]["precision"] == "bfloat16"
    passes = offers["batch 1 with accumulation 2"]
    assert (passes["batch"], passes["accumulation"]) == (1, 2)


def test_by_memory_the_fullest_card_is_less_full_than_by_speed(capsys):
    fullest = {}
    for objective in ("speed", "memory"):
        found = plan(capsys, *TINY, "--image", "512x1024", "--batch", "2", *TWO, "--objective", objective)
        fullest[objective] = max(
            (card["predicted_peak_bytes"] + card["outside_bytes"]) / (card["capacity_bytes"] - card["reserve_bytes"])
            for card in found["cards"]
        )
    assert fullest["memory"] < fullest["speed"]


def test_when_nothing_fits_words_and_json_say_by_how_much_where_and_what_would(capsys):
    request = [*TINY, "--image", "512x1024", "--batch", "2", "--cards", TIGHT]
    assert main(["plan", *request, "--json"]) == 2
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["feasible"] is False
    assert found["available_bytes"] == 700 * 2**20 - int(0.2 * 2**30)
    assert found["shortfall_bytes"] == found["needed_bytes"] - found["available_bytes"] > 0
    changes = [change.partition(" (needs ")[0] for change in found["advice"]]
    assert {"batch 1", "batch 1 with accumulation 2", "cpu:1GiB in place of cpu:700MiB"} < set(changes)
    told = printed.err.partition("memseg plan: ")[2].splitlines()
    short = format_bytes(found["shortfall_bytes"])
    assert told[0] == f"no plan fits; the closest is {short} short on {TIGHT} at {found['moment']}"
    assert told[-len(changes) :] == [f"    {change}" for change in found["advice"]]
    forced = plan(capsys, *request, "--force")
    assert forced["feasible"] is False
    assert forced["cards"][0]["predicted_peak_bytes"] + forced["cards"][0]["outside_bytes"] == found["needed_bytes"]


TIGHT = "cpu:700MiB"
"""Too small for two images of 512x1024, not for one."""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["ladder-densenet-mni", "--image", "64x128", "--cards", "cpu:1GiB"], f"did you mean {MINI}?"),
        ([MINI, "--image", "100x128", "--cards", "cpu:1GiB"], "multiples of 64"),
        ([MINI, "--image", "64", "--cards", "cpu:1GiB"], "HEIGHTxWIDTH"),
        ([MINI, "--image", "64x128", "--cards", "gtx107"], "unknown card 'gtx107'; did you mean gtx1070?"),
        ([MINI, "--image", "64x128", "--cards", "cpu:1MiB"], "cpu:1MiB"),
        ([*SMALL, "--cards", "cpu:0GiB"], "more than 0 bytes"),
        ([*SMALL, "--cards", "cpu:1GiB,gtx1070"], "must all be CUDA cards or all CPU cards"),
        ([*SMALL, *TWO, "--strategy", "split", "--precision", "bfloat16"], "a split computes in float32"),
        ([*SMALL, *TWO, "--micro-batches", "2"], "micro-batches need norm frozen"),
        ([*SMALL, *TWO, "--cut", "transition9"], "unknown segment 'transition9'"),
        ([*SMALL, *TWO, "--cut", "block2", "--strategy", "single"], "a cut is of a split"),
        ([*SMALL, *TWO, "--nnodes", "3"], "2 cards for 3 machines"),
        ([*SMALL, *TWO, "--network", "1GB/s"], "give --nnodes too"),
        ([*SMALL, *TWO, "--nnodes", "2", "--network", "fast"], "a size per second"),
        ([*SMALL, *TWO, "--recompute", "some"], "--recompute takes none,norms,units,segment"),
        ([*SMALL, *TWO, "--offer", "cards"], "--offer takes precision,batch,accumulation"),
        ([*SMALL, *TWO, "--max-batch"], "leave out --batch"),
        ([*SMALL, "--cards", "any", "--max-image"], "name the cards"),
        ([*SMALL, "--cards", "any", "--force"], "name the cards"),
        ([*SMALL, *TWO, "--max-image", "--force"], "look for one that does"),
        ([*SMALL, *TWO, "-o", "/nowhere/plan.json"], "-o must name a file in a folder that exists"),
        ([*SMALL, *TWO, "--html", "/"], "--html must name a file"),
    ],
)
def test_bad_input_is_refused_in_one_message(arguments, told, capsys):
    assert main(["plan", *arguments, "--batch", "2"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.rpartition("memseg plan: ")[2].count("\n") == 1
    assert told in printed.err


def test_a_batch_must_be_asked_for(capsys):
    assert main(["plan", *SMALL, "--cards", "cpu:1GiB"]) == 2
    assert "give --batch 2, or --max-batch" in capsys.readouterr().err


def test_what_cannot_be_is_refused_before_anything_is_profiled(capsys, monkeypatch):
    monkeypatch.setattr("memseg.profiling.costs.model_costs", lambda *_, **__: pytest.fail("it was profiled"))
    monkeypatch.setattr("memseg.profiling.cost_cache.model_costs", lambda *_, **__: pytest.fail("it was profiled"))
    split = ["--cards", "cpu:4GiB,cpu:4GiB", "--strategy", "split"]
    assert main(["plan", *SMALL, "--batch", "2", "--precision", "bfloat16", *split]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "memseg plan: a split computes in float32 or float64, got bfloat16; take --strategy single or replicate\n"
    )
