"""The paper's questions on CamVid, from scratch: python -m benchmarks.camvid DATA OUT [--json].

Cityscapes is out of a CPU's reach, so the questions of the paper's tables are asked again at a smaller scale: 367 real
street scenes at 192x256, the same steps, order, flips and schedule for all, several seeds.

    ladder-densenet121, ladder-resnet50     table 3: which encoder learns more from scratch
    ladder-densenet121-single               table 1: what the auxiliary loss is worth
    finetune-batch, finetune-frozen         table 4: full-size frames from half-size weights, with batch statistics or
                                            with those of the half-size run, frozen

Each run is `memseg train` in a folder OUT/NAME-SEED, and is resumed there when this is started again; finished ones are
not repeated. Scores are those of `memseg eval`, on the labels at their full size of 360x480. The table is followed by a
picture, OUT/curves.png: mIoU over steps.

Args:
    DATA: CamVid's folder, which holds images/ and labels/.
    OUT: Where the runs lie.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.result import count, progress, tell
from memseg.training.checkpoint import checkpoint_folders
from memseg.training.log import read_metrics


@dataclass(frozen=True)
class Variant:
    """One answer to one question."""

    name: str
    model: str
    begins_with: str = ""
    """The variant whose weights it begins with; it then sees whole frames, and fewer steps of them."""
    norm: str = "batch"

    def settings(self, steps: int, seed: int, out: Path) -> dict[str, object]:
        """What it changes of the recipe."""
        settings: dict[str, object] = {"model.name": self.model, "model.norm": self.norm, "train.seed": seed}
        if not self.begins_with:
            return settings | {"schedule.steps": steps}
        return settings | {
            "schedule.steps": steps // 5,
            "data.image": "384x512",
            "data.fit": "pad",
            "train.batch": 2,
            "optimizer.lr": 1e-4,
            "model.initial_weights": out / f"{self.begins_with}-{seed}",
        }


DENSENET = "ladder-densenet121"
VARIANTS = (
    Variant(DENSENET, DENSENET),
    Variant("ladder-resnet50", "ladder-resnet50"),
    Variant("ladder-densenet121-single", "ladder-densenet121-single"),
    Variant("finetune-batch", DENSENET, begins_with=DENSENET),
    Variant("finetune-frozen", DENSENET, begins_with=DENSENET, norm="frozen"),
)


def train(variant: Variant, steps: int, seed: int, *, data: Path, out: Path) -> dict[str, Any]:
    """Its result: what `memseg train` and `memseg eval` found, once both are done."""
    folder = out / f"{variant.name}-{seed}"
    scores = folder / "scores.json"
    if not scores.exists():
        if checkpoint_folders(folder):
            if not (folder / "result.json").exists():
                _memseg("train", "--resume", folder)
        else:
            settings = {
                "data.root": data.resolve(),
                "train.evaluate_every": 4,
                "train.checkpoint_every": 50,
                **variant.settings(steps, seed, out),
            }
            overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
            _memseg("train", "camvid_ladder_densenet121", *overrides, "--out", folder)
        scores.write_text(_memseg("eval", folder, "--json"))
    result = json.loads((folder / "result.json").read_text())
    return {**result, **json.loads(scores.read_text()), "records": read_metrics(folder)}


def row_of(variant: Variant, results: Sequence[dict[str, Any]]) -> dict[str, str | int | float]:
    """A line of the table: one variant over its seeds."""
    scores = [result["miou"] for result in results]
    seconds = [record["step_seconds"] for result in results for record in result["records"] if "step_seconds" in record]
    (card,) = results[0]["cards"]
    return {
        "name": variant.name,
        "seeds": len(results),
        "steps": results[0]["steps"],
        "miou": statistics.fmean(scores),
        "miou_lowest": min(scores),
        "miou_highest": max(scores),
        "pixel_accuracy": statistics.fmean(result["pixel_accuracy"] for result in results),
        "predicted_peak_bytes": card["predicted_peak_bytes"],
        "measured_peak_bytes": card["measured_peak_bytes"],
        "median_step_s": statistics.median(seconds),
    }


def draw(results: dict[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """mIoU over steps: a line for each variant, the mean of its seeds, the span between them shaded.

    What begins with the weights of another variant goes on where that one ends.
    """
    figure = Figure(figsize=(11, 6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    curves = {name: [_curve(run) for run in runs] for name, runs in results.items()}
    for variant in (one for one in VARIANTS if one.name in results):
        own = curves[variant.name]
        if variant.begins_with in curves:
            own = [_continued(base, curve) for base, curve in zip(curves[variant.begins_with], own, strict=True)]
        steps = sorted(set.intersection(*(set(curve) for curve in own)))
        values = np.array([[curve[step] for step in steps] for curve in own])
        style = "--" if variant.begins_with else "-"
        (line,) = axes.plot(steps, values.mean(0), style, marker="o", label=variant.name)
        axes.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.2)
    axes.set_xlabel("step")
    axes.set_ylabel("mIoU on CamVid val, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, format="png")


def _curve(run: dict[str, Any]) -> dict[int, float]:
    """mIoU in percent by step."""
    return {record["step"]: record["miou"] * 100 for record in run["records"] if record.get("miou") is not None}


def _continued(base: dict[int, float], curve: dict[int, float]) -> dict[int, float]:
    """A curve that begins with the last point of another."""
    end = max(base)
    return {end: base[end], **{end + step: miou for step, miou in curve.items()}}


def _memseg(*arguments: object) -> str:
    """What a command of memseg prints; it must end well."""
    line = [sys.executable, "-m", "memseg.cli.main", *map(str, arguments)]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))} ended with {done.returncode}")
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all variants, or those named, and print and draw what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="CamVid's folder, which holds images/ and labels/")
    parser.add_argument("out", type=Path, help="where the runs lie")
    parser.add_argument("--only", metavar="NAMES", default="", help="variants, with commas")
    parser.add_argument("--steps", type=count, default=900, help="of a run from scratch (default: 900, 20 epochs)")
    parser.add_argument("--seeds", type=count, default=1, metavar="N", help="how many (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(arguments)
    names = args.only.split(",") if args.only else [variant.name for variant in VARIANTS]
    chosen = [variant for variant in VARIANTS if variant.name in names]
    if len(chosen) != len(names):
        parser.error(f"--only: known are {', '.join(variant.name for variant in VARIANTS)}")
    results: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in chosen}
    with progress(len(chosen) * args.seeds) as begin:
        for seed in range(args.seeds):
            for variant in chosen:
                begin(f"{variant.name}, seed {seed}")
                found = train(variant, args.steps, seed, data=args.data, out=args.out)
                results[variant.name].append(found)
    draw(results, args.out / "curves.png")
    tell([row_of(variant, results[variant.name]) for variant in chosen], as_json=args.json)


if __name__ == "__main__":
    main()
