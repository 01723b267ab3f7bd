"""memseg plan from outside: a plan, or why there is none."""

import json

import pytest
from processes import memseg

from memseg.cli.main import main
from memseg.planning import load_plan

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


def test_when_nothing_fits_words_and_json_say_by_how_much_where_and_what_would():
    # 1024x2048 at batch 4, where every single change takes a profile of its own.
    done = memseg("plan", MINI, "--image", "1024x2048", "--batch", "4", "--cards", "cpu:600MiB", "--json")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    found = json.loads(done.stdout)
    assert found["feasible"] is False
    assert found["shortfall_bytes"] == found["needed_bytes"] - found["available_bytes"] > 0
    assert found["available_bytes"] == 88 * 2**20
    assert any("cpu:600MiB" in change for change in found["advice"])
    told = done.stderr.partition("memseg plan: ")[2].splitlines()
    gib = f"{found['shortfall_bytes'] / 2**30:.2f} GiB"
    assert told[0] == f"no plan fits; the closest is {gib} short on cpu:600MiB at {found['moment']}"
    assert told[-len(found["advice"]) :] == [f"    {change}" for change in found["advice"]]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["ladder-densenet-mni", "--image", "64x128", "--cards", "cpu:1GiB"], f"did you mean {MINI}?"),
        ([MINI, "--image", "100x128", "--cards", "cpu:1GiB"], "multiples of 64"),
        ([MINI, "--image", "64", "--cards", "cpu:1GiB"], "HEIGHTxWIDTH"),
        ([MINI, "--image", "64x128", "--cards", "gtx107"], "unknown card 'gtx107'; did you mean gtx1070?"),
        ([MINI, "--image", "64x128", "--cards", "cpu:100MiB"], "cpu:100MiB"),
        ([MINI, "--image", "64x128", "--cards", "cpu:1GiB", "--strategy", "split"], "a split needs at least two cards"),
    ],
)
def test_bad_input_is_refused_in_one_message(arguments, told, capsys):
    assert main(["plan", *arguments, "--batch", "2"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.rpartition("memseg plan: ")[2].count("\n") == 1
    assert told in printed.err
