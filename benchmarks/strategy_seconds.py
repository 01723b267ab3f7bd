"""How long a step takes by each strategy: python -m benchmarks.strategy_seconds [--json].

Two CPU processes of one thread each, against one process of one thread: the same model on generated streets, the same
batch. The machine is calibrated first, one thread, in the same run; a plan for the cards so described predicts the
step, and the ratio to one process is predicted and measured side by side.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.result import count, progress, tell

MODEL, IMAGE, BATCH, CLASSES = "ladder-densenet121", "256x512", 4, 8
CASES: dict[str, tuple[str, ...]] = {
    "one process": ("--strategy", "single"),
    "split": ("--strategy", "split"),
    "replicate": ("--strategy", "replicate"),
    "one process, frozen": ("--strategy", "single", "--norm", "frozen"),
    "split, frozen, 2 micro-batches": ("--strategy", "split", "--norm", "frozen", "--micro-batches", "2"),
    "split, frozen, 4 micro-batches": ("--strategy", "split", "--norm", "frozen", "--micro-batches", "4"),
    "replicate, frozen": ("--strategy", "replicate", "--norm", "frozen"),
}
_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def measure(options: tuple[str, ...], card: Path, folder: Path, steps: int) -> tuple[float, float]:
    """(predicted, measured) seconds of a step; measured is the median of all but the first two."""
    plan_file, run = folder / "plan.json", folder / "run"
    asked = [MODEL, "--image", IMAGE, "--batch", BATCH, "--classes", CLASSES, "--cards", f"{card},{card}"]
    plan: dict[str, Any] = json.loads(_memseg("plan", *asked, *options, "--json", "-o", plan_file))
    settings = {
        "model.name": MODEL,
        "model.norm": plan["norm"],
        "data.image": IMAGE,
        "data.streets.length": 8 * BATCH,
        "train.batch": BATCH,
        "train.workers": 0,
        "train.log_every": 1,
        "train.checkpoint_every": steps,
        "schedule.steps": steps,
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    _memseg("train", "streets_demo", *overrides, "--plan", plan_file, "--out", run, "--json")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [record["step_seconds"] for record in metrics if "step_seconds" in record]
    return plan["step_seconds"], statistics.median(seconds[2:])


def _memseg(*arguments: object) -> str:
    line = [sys.executable, "-m", "memseg.cli.main", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=_ENVIRONMENT)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))} ended with {done.returncode}: {done.stderr}")
    return done.stdout


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=count, default=8, help="of each run (default: 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    rows: list[dict[str, str | int | float]] = []
    alone = {}
    with tempfile.TemporaryDirectory() as name, progress(len(CASES) + 1) as begin:
        card = Path(name) / "machine.toml"
        begin("calibrating")
        _memseg("cards", "--calibrate", card)
        for case, options in CASES.items():
            begin(case)
            folder = Path(name) / str(len(rows))
            folder.mkdir()
            predicted, measured = measure(options, card, folder, args.steps)
            norm = "frozen" if "frozen" in case else "batch"
            alone.setdefault(norm, (predicted, measured))
            row = {"name": case, "predicted_step_s": predicted, "measured_step_s": measured}
            ratios = [mine / theirs for mine, theirs in zip((predicted, measured), alone[norm], strict=True)]
            rows.append(row | {"predicted_ratio": ratios[0], "measured_ratio": ratios[1]})
    tell(rows, as_json=args.json)


if __name__ == "__main__":
    main()
