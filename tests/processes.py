"""memseg as its users run it: real processes, small runs, plans written by hand."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from memseg.data import IGNORE_INDEX
from memseg.data.streets import Streets
from memseg.levels import NormMode, Precision, Recompute, Strategy
from memseg.models import build_model
from memseg.planning import LOSS, CardPlan, PlacedSegment, Plan, save_plan
from memseg.planning.plan import installed_torch
from memseg.training.checkpoint import load_trained
from memseg.training.recipe import load_recipe

MODEL = "ladder-densenet-mini"
CLASSES = 8
"""Of the generated streets."""
IMAGE, BATCH = (64, 128), 2
SMALLEST_IMAGE = (64, 64)
"""That the model takes: of one such image, its coarsest map has a single value."""
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


def write_masked_streets(root, images=16):
    """A data set in a folder: streets of which from nothing to all is unlabelled, another part in each image."""
    for split, length in (("train", images), ("val", 2)):
        scenes = Streets(split, size=IMAGE, length=length)
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for index in range(length):
            target = scenes.target(index)
            target[:, : IMAGE[1] * (index % 5) // 4] = IGNORE_INDEX
            Image.fromarray(scenes.image(index)).save(root / "images" / split / f"{index:02d}.png")
            Image.fromarray(target).save(root / "labels" / split / f"{index:02d}.png")
    (root / "classes.txt").write_text("\n".join(scenes.classes.names) + "\n")
    return root


def masked_recipe(root, steps, *, batch, image=IMAGE, accumulation=1, norm=NormMode.BATCH):
    """A small run on parts of such images in float64, scored after each epoch and at its end."""
    return load_recipe(
        "camvid_mini",
        [
            "data.dataset=folder",
            f"data.root={root}",
            f"data.image={image[0]}x{image[1]}",
            "data.fit=crop",
            f"model.norm={norm}",
            f"schedule.steps={steps}",
            f"train.batch={batch}",
            f"train.accumulation={accumulation}",
            "train.precision=float64",
            "train.workers=0",
            "train.log_every=1",
            "train.evaluate_every=1",
        ],
    )


def hand_written_plan(
    path, stages=1, *, shares=(BATCH,), recompute=Recompute.NONE, capacity=2**32, precision="float64", order=None,
    nodes=None, predicted=0, **other,
):  # fmt: skip
    """A plan file that no planner made: equal cards, one level for all segments, a peak that nobody predicted.

    Args:
        path: Of the file.
        stages: Cards of each replica, at least 1 and at most 3.
        shares: Images of each replica.
        order: The (replica, stage) of each process; by default stage by stage, replica by replica.
        nodes: The machine of each process; by default one for all.
        predicted: The peak of each card.
        other: Of the plan.
    """
    starts = [_SEGMENTS.index(name) for name in STAGE_STARTS[stages]]
    segments = [_SEGMENTS[start:stop] for start, stop in zip(starts, [*starts[1:], None], strict=True)]
    segments[-1] = [*segments[-1], LOSS]
    order = order or [(replica, stage) for replica in range(len(shares)) for stage in range(stages)]
    nodes = nodes or [0] * len(order)
    settings = {
        "model": MODEL, "num_classes": CLASSES, "image": IMAGE, "batch": sum(shares), "norm": NormMode.BATCH,
        "precision": Precision(precision), "accumulation": 1, "micro_batches": 1, "schedule": None, **other,
    }  # fmt: skip
    strategies = {
        (False, False): Strategy.SINGLE,
        (False, True): Strategy.SPLIT,
        (True, False): Strategy.REPLICATE,
        (True, True): Strategy.REPLICATE_SPLIT,
    }
    plan = Plan(
        **settings,
        torch=installed_torch(),
        parameter_bytes=parameter_bytes(settings["num_classes"], settings["precision"]),
        strategy=strategies[len(shares) > 1, stages > 1],
        step_seconds=0.0,
        images_per_second=0.0,
        cards=tuple(
            CardPlan(
                card="cpu:4GiB",
                position=nodes[:rank].count(nodes[rank]),
                node=nodes[rank],
                replica=replica,
                stage=stage,
                capacity_bytes=capacity,
                reserve_bytes=0,
                predicted_peak_bytes=predicted,
                outside_bytes=0,
                peak_moment="unknown",
                batch_share=shares[replica],
                by_category={"activation": predicted} if predicted else {},
                segments=tuple(
                    PlacedSegment(name=name, recompute=Recompute.NONE if name == LOSS else recompute)
                    for name in segments[stage]
                ),
                compute_seconds=0.0,
            )
            for rank, (replica, stage) in enumerate(order)
        ),
        transfer_seconds=0.0,
        alternatives=(),
    )
    save_plan(plan, path)
    return path


@cache
def parameter_bytes(num_classes, precision):
    """Of the model, as a run makes it."""
    with torch.device("meta"):
        model = build_model(MODEL, num_classes=num_classes, dtype=getattr(torch, precision.parameters))
    return sum(parameter.nbytes for parameter in model.parameters())


def command(*arguments):
    """A command line of memseg for a process of its own."""
    return [sys.executable, "-m", "memseg.cli.main", *map(str, arguments)]


def environment():
    """Kind to the machine: one thread for each process, which do not spin while they wait."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def memseg(*arguments, timeout=600):
    """Run one command line to its end."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=timeout, check=False, env=environment()
    )


def train(folder, *arguments):
    """Train to the end, successfully; the run folder."""
    done = memseg("train", *arguments, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


def python(script, *arguments, timeout=300):
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
