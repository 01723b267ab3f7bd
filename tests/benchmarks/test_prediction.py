"""Predictions held against real steps: small cases run for real, and results that were written by hand."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from processes import environment

ROOT = Path(__file__).resolve().parents[2]
LADDER = "ladder-densenet-mini/2x3x128x256/none/frozen/float64/momentum"
OTHER = "resnet18/2x3x256x512/sgd-loop"


def run(*arguments):
    """The command to its end, from the top of the repository, as its users run it."""
    line = [sys.executable, "-m", "benchmarks.prediction", "--threads", "1", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=600, check=False, cwd=ROOT, env=environment())


def results(path, *rows, version=torch.__version__):
    """A file as --results writes it, of rows (name, predicted bytes, measured bytes, error)."""
    keys = ("name", "predicted_bytes", "measured_bytes", "error")
    lines = [{"torch": version, "threads": 1, "row": dict(zip(keys, row, strict=True))} for row in rows]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def test_predictions_are_near_what_is_measured(tmp_path):
    file = tmp_path / "results.jsonl"
    done = run("--only", f"{LADDER},{OTHER}", "--json", "--check", "--results", file)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told.keys() == {"machine", "versions", "rows", "summary"}
    assert [row["name"] for row in told["rows"]] == [LADDER, OTHER]
    for row in told["rows"]:
        assert row["relative_error"] == (row["predicted_bytes"] - row["measured_bytes"]) / row["measured_bytes"]
        assert abs(row["relative_error"]) < 0.01
        assert (row["peak_step"], row["peak_phase"], row["error"]) == ("steady", "backward", None)
        # Parameters, gradients and the momentum of the ladder; parameters and gradients of the ResNet.
        assert row["predicted_bytes"] > 2e7
    assert told["summary"]["failed"] == 0
    written = [json.loads(line)["row"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert written == [{key: row[key] for key in row if key != "relative_error"} for row in told["rows"]]


def test_rows_of_a_results_file_are_told_again_and_checked(tmp_path):
    file = results(tmp_path / "results.jsonl", (LADDER, 102, 100, None), (OTHER, 96, 100, None))
    before = file.read_text(encoding="utf-8")
    done = run("--only", f"{LADDER},{OTHER}", "--json", "--results", file, "--check")
    told = json.loads(done.stdout)
    assert [row["relative_error"] for row in told["rows"]] == [0.02, -0.04]
    summary = told["summary"]
    assert (summary["median_error"], summary["worst_error"], summary["worst_case"]) == (0.03, 0.04, OTHER)
    assert file.read_text(encoding="utf-8") == before
    assert done.returncode == 1
    for message in ("median error is 3.00%, must be at most 1%", "worst error is 4.00%, must be at most 3%"):
        assert message in done.stderr


def test_rows_that_failed_or_are_of_another_torch_are_run_again(tmp_path):
    file = results(tmp_path / "results.jsonl", (LADDER, None, None, "failed"))
    other = results(tmp_path / "other.jsonl", (OTHER, 100, 100, None), version="1.13.1")
    with file.open("a", encoding="utf-8") as joined:
        joined.write(other.read_text(encoding="utf-8"))
    done = run("--only", f"{LADDER},{OTHER}", "--results", file, "--timeout", "1")
    # They begin again: a second is too short for them, and the old rows stay where they are.
    assert done.returncode == 1
    assert done.stdout.count("not done after 1 s") == 2
    assert len(file.read_text(encoding="utf-8").splitlines()) == 4


def test_the_list_has_each_case_once():
    done = run("--list")
    names = done.stdout.split()
    assert done.returncode == 0, done.stderr
    assert len(names) == len(set(names)) >= 60


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("my notes\n", encoding="utf-8")
    done = run("--results", file)
    assert (done.returncode, done.stdout) == (2, "")
    assert "line 1 must be a row that --results wrote, got 'my notes'" in done.stderr.splitlines()[-1]
    assert file.read_text(encoding="utf-8") == "my notes\n"
