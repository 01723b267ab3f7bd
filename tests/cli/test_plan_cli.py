"""memseg plan from outside: a plan, or why there is none."""

import json

import pytest

from memseg.cli.main import main
from memseg.planning import load_plan
from memseg.units import format_bytes

MINI = "ladder-densenet-mini"


def test_a_plan_is_shown_and_written(tmp_path, capsys):
    file = tmp_path / "plan.json"
    arguments = [
        "plan",
        MINI,
        "--image",
        "64x128",
        "--batch",
        "2",
        "--cards",
        "cpu:1GiB,cpu:2GiB",
        "--strategy",
        "split",
    ]
    assert main([*arguments, "-o", str(file), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(file.read_text())
    assert printed["feasible"] is True
    plan = load_plan(file)
    assert (plan.strategy, plan.batch, plan.image) == ("split", 2, (64, 128))
    assert {card.card for card in plan.cards} == {"cpu:1GiB", "cpu:2GiB"}


def test_when_nothing_fits_words_and_json_say_by_how_much_where_and_what_would(capsys):
    request = [MINI, "--image", "512x1024", "--batch", "2", "--norm", "frozen", "--cards", "cpu:640MiB"]
    assert main(["plan", *request, "--json"]) == 2
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["feasible"] is False
    assert found["available_bytes"] == 128 * 2**20
    assert found["shortfall_bytes"] == found["needed_bytes"] - found["available_bytes"] > 0
    changes = [change.partition(" (needs ")[0] for change in found["advice"]]
    assert {"batch 1", "cpu:1GiB in place of cpu:640MiB"} < set(changes)
    told = printed.err.partition("memseg plan: ")[2].splitlines()
    short = format_bytes(found["shortfall_bytes"])
    assert told[0] == f"no plan fits; the closest is {short} short on cpu:640MiB at {found['moment']}"
    assert told[-len(changes) :] == [f"    {change}" for change in found["advice"]]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["ladder-densenet-mni", "--image", "64x128", "--cards", "cpu:1GiB"], f"did you mean {MINI}?"),
        ([MINI, "--image", "100x128", "--cards", "cpu:1GiB"], "multiples of 64"),
        ([MINI, "--image", "64", "--cards", "cpu:1GiB"], "HEIGHTxWIDTH"),
        ([MINI, "--image", "64x128", "--cards", "gtx107"], "unknown card 'gtx107'; did you mean gtx1070?"),
        ([MINI, "--image", "64x128", "--cards", "cpu:100MiB"], "cpu:100MiB"),
    ],
)
def test_bad_input_is_refused_in_one_message(arguments, told, capsys):
    assert main(["plan", *arguments, "--batch", "2"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.rpartition("memseg plan: ")[2].count("\n") == 1
    assert told in printed.err


@pytest.mark.parametrize("option", [("--precision", "bfloat16"), ("--norm", "synced")])
def test_a_split_that_cannot_be_is_refused_before_anything_is_profiled(option, capsys, monkeypatch):
    monkeypatch.setattr("memseg.profiling.costs.model_costs", lambda *_, **__: pytest.fail("it was profiled"))
    split = ["--cards", "cpu:4GiB,cpu:4GiB", "--strategy", "split"]
    assert main(["plan", MINI, "--image", "64x128", "--batch", "2", *option, *split]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("memseg plan: ")
    assert printed.err.endswith("; take --strategy single\n")
    assert printed.err.count("\n") == 1
