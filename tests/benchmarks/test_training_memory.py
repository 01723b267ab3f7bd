"""Alternatives and levels side by side: small real runs, each row in a process of its own as it always is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from memseg.units import parse_bytes
from processes import environment, python

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--model", "ladder-densenet-mini", "--image", "64x128", "--steps", "5", "--warmup", "1")


def run(*arguments):
    """The command to its end, from the top of the repository, as its users run it."""
    line = [sys.executable, "-m", "benchmarks.training_memory", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=600, check=False, cwd=ROOT, env=environment())


def told_by(*arguments):
    """What a small run that succeeds prints."""
    done = run(*SMALL, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def rows_of(*arguments):
    """Its rows."""
    return told_by(*arguments)["rows"]


def test_units_takes_less_than_plain_and_computes_the_same():
    told = told_by("--only", "memseg-units,plain")
    assert {"machine", "versions", "model", "image", "batch", "counted", "rows"} <= told.keys()
    assert (told["model"], told["image"], told["batch"]) == ("ladder-densenet-mini", "64x128", 2)
    plain, units = told["rows"]
    assert (plain["name"], units["name"]) == ("plain", "memseg-units")
    for row in (plain, units):
        assert isinstance(row["peak_allocated_bytes"], int)
        assert isinstance(row["rss_rise_bytes"], int)
        assert row["step_seconds"] > 0
        assert (row["error"], row["fits"], row["limit_bytes"]) == (None, None, None)
    assert (plain["step_ratio_to_plain"], plain["peak_ratio_to_plain"]) == (1, 1)
    assert units["step_ratio_to_plain"] == units["step_seconds"] / plain["step_seconds"]
    assert units["peak_allocated_bytes"] < plain["peak_allocated_bytes"]
    assert units["output_difference_to_plain"] < 1e-3


def test_a_whole_step_counts_what_is_allocated_from_building_the_model_on():
    measured = python(
        """
from functools import partial
from memseg.levels import Recompute
from memseg.models import build_model
from memseg.profiling import measure_step
build = partial(build_model, "ladder-densenet-mini")
print(measure_step(build, image=(64, 128), batch=2, recompute=Recompute.NORMS))
"""
    )
    assert measured.returncode == 0, measured.stderr
    (norms,) = rows_of("--only", "memseg-norms", "--whole-step")
    assert norms["peak_allocated_bytes"] == int(measured.stdout)


@pytest.mark.parametrize(("limit", "fits"), [("1GiB", True), ("1MiB", False)])
def test_a_limit_tells_whether_a_row_fits(limit, fits):
    (row,) = rows_of("--only", "memseg-units", "--limit", limit)
    assert (row["fits"], row["error"], row["limit_bytes"]) == (fits, None, parse_bytes(limit))
    assert (row["peak_allocated_bytes"] is not None) == fits


def test_a_row_that_fails_says_so_and_the_others_go_on():
    rows = rows_of("--only", "plain,memseg-units", "--timeout", "1")
    assert [row["error"] for row in rows] == ["not done after 1 s"] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "plain,memseg-unit"), "unknown row 'memseg-unit'; did you mean memseg-units?"),
        (("--model", "densenet12"), "unknown model 'densenet12'; did you mean densenet121?"),
        (("--image", "64x100"), "image sides must be multiples of 32, got 64x100; nearest is 64x96"),
        (("--batch", "1", "--image", "32x32"), "batch statistics need more than one value per channel"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(arguments, message):
    done = run(*arguments, "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr.splitlines()[-1]
