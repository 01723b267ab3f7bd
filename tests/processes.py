"""memseg as its users run it: real processes, small runs, plans written by hand."""

import os
import subprocess
import sys
from pathlib import Path

from memseg.levels import NormMode, Precision, Recompute
from memseg.models import build_model
from memseg.planning import LOSS, CardPlan, PlacedSegment, Plan, save_plan
from memseg.training.checkpoint import load_trained

MODEL = "ladder-densenet-mini"
CLASSES = 8
"""Of the generated streets."""
IMAGE, BATCH = (64, 128), 2
STAGE_STARTS = {1: ["stem"], 2: ["stem", "transition2"], 3: ["stem", "skip1", "block4b"]}
"""The first segment of each card. Blocks 1 and 3 are read by skips: their outputs cross borders, and with three cards
some pass through the middle one unread."""

_SEGMENTS = list(build_model(MODEL).segments)


def streets(steps, *, precision="float64", norm=NormMode.BATCH, length=6):
    """Arguments of `memseg train` for a small run on generated streets, 3 steps an epoch."""
    settings = {
        "data.image": f"{IMAGE[0]}x{IMAGE[1]}",
        "data.streets.length": length,
        "model.norm": norm.value,
        "schedule.steps": steps,
        "train.batch": BATCH,
        "train.precision": precision,
        "train.workers": 0,
        "train.log_every": 1,
        "train.checkpoint_every": 2,
    }
    return ["streets_demo", *(part for key, value in settings.items() for part in ("--set", f"{key}={value}"))]


def hand_written_plan(path, cards, *, recompute=Recompute.NONE, capacity=2**32, precision="float64", **other):
    """A plan file that no planner made: equal cards, one level for all segments, a peak that nobody predicted."""
    starts = [_SEGMENTS.index(name) for name in STAGE_STARTS[cards]]
    stages = [_SEGMENTS[start:stop] for start, stop in zip(starts, [*starts[1:], None], strict=True)]
    stages[-1] = [*stages[-1], LOSS]
    plan = Plan(
        **{
            "model": MODEL, "num_classes": CLASSES, "image": IMAGE, "batch": BATCH, "norm": NormMode.BATCH,
            "precision": Precision(precision), **other,
        },
        strategy="split" if cards > 1 else "single",
        step_seconds=0.0,
        images_per_second=0.0,
        cards=tuple(
            CardPlan(
                card="cpu:4GiB",
                capacity_bytes=capacity,
                reserve_bytes=0,
                predicted_peak_bytes=0,
                peak_moment="unknown",
                batch_share=BATCH,
                by_category={},
                segments=tuple(
                    PlacedSegment(name=name, recompute=Recompute.NONE if name == LOSS else recompute) for name in stage
                ),
                compute_seconds=0.0,
            )
            for stage in stages
        ),
        transfer_seconds=0.0,
        alternatives=(),
    )  # fmt: skip
    save_plan(plan, path)
    return path


def command(*arguments):
    """A command line of memseg for a process of its own."""
    return [sys.executable, "-m", "memseg.cli.main", *map(str, arguments)]


def environment():
    """Kind to the machine: one thread for each process, which do not spin while they wait."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def memseg(*arguments, timeout=240):
    """Run one command line to its end."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=timeout, check=False, env=environment()
    )


def train(folder, *arguments):
    """Train to the end, successfully; the run folder."""
    done = memseg("train", *arguments, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


def python(script, *arguments, timeout=120):
    """Run a script in a process of its own."""
    line = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout, check=False, env=environment())


def weights(run: Path):
    """Every tensor that a run has learnt, by name."""
    return load_trained(run).model.state_dict()


def largest_difference(run, other):
    """Between any two numbers of two runs' weights."""
    mine, theirs = weights(run), weights(other)
    assert mine.keys() == theirs.keys()
    return max((mine[name] - theirs[name]).abs().max().item() for name in mine)
