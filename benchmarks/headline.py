"""The paper's headline on real processes: python -m benchmarks.headline DATA [--json].

Whole frames of 2048x1024, two at a time: the paper needed 8 + 8 GB for DenseNet-121 and 12 + 8 GB for DenseNet-169.
Each row plans such a run for some cards, trains real frames as planned for a few steps, a process per card under the
system's limit of that card, and holds the prediction against what the allocator counted:

    peak        the allocator's peak on the fullest card, predicted and measured
    outside     what the process is predicted to take beside the allocator

The last rows run, by force, what is predicted not to fit; "killed" says that the limit ended it.

Args:
    DATA: A folder with Cityscapes' leftImg8bit and gtFine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.result import progress, tell

IMAGE, BATCH, STEPS = "1024x2048", 2, 2


@dataclass(frozen=True)
class Case:
    """A model on cards."""

    model: str
    cards: str
    options: tuple[str, ...] = ()
    """Further ones of `memseg plan`."""
    hopeless: bool = False
    """Is it predicted not to fit, and run by force?"""

    @property
    def name(self) -> str:
        """As the table has it."""
        return " ".join([self.model.removeprefix("ladder-densenet"), self.cards, *self.options])


CARDS = ("cpu:12GiB,cpu:8GiB", "cpu:8GiB,cpu:8GiB", "cpu:4GiB", "cpu:2GiB,cpu:2GiB")
MODELS = ("ladder-densenet169", "ladder-densenet121")
CASES = (
    *(Case(model, cards) for model in MODELS for cards in CARDS),
    *(Case(model, CARDS[0], ("--strategy", "split")) for model in MODELS),
    *(Case(model, "cpu:2GiB,cpu:2GiB", ("--strategy", "split")) for model in MODELS),
    *(Case(model, "cpu:1GiB", hopeless=True) for model in MODELS),
)


def measure(case: Case, data: Path, folder: Path) -> dict[str, str | int | float]:
    """One row."""
    plan_file, run = folder / "plan.json", folder / "run"
    asked = [case.model, "--image", IMAGE, "--batch", BATCH, "--cards", case.cards, *case.options, "-o", plan_file]
    plan = _memseg("plan", *asked, "--json", *(["--force"] if case.hopeless else []))
    planned: dict[str, Any] = json.loads(plan.stdout)
    assert planned["feasible"] is not case.hopeless, f"{case.name}: predicted otherwise than the table says"
    recipe = "ldn169_cityscapes" if "169" in case.model else "ldn121_cityscapes"
    settings = {
        "data.root": data.resolve(),
        "model.name": case.model,
        "model.encoder_weights": "none",
        "schedule.steps": STEPS,
        "train.evaluate_every": 0,
        "train.workers": 0,
        "train.checkpoint_every": STEPS,
        "train.log_every": 1,
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    forced = ["--force"] if case.hopeless else []
    done = _memseg(
        "train", recipe, *overrides, "--plan", plan_file, "--out", run, "--json", *forced, fails=case.hopeless
    )
    cards = planned["cards"]
    fullest = max(
        range(len(cards)), key=lambda rank: cards[rank]["predicted_peak_bytes"] / cards[rank]["capacity_bytes"]
    )
    row: dict[str, str | int | float] = {
        "name": case.name,
        "strategy": planned["strategy"],
        "predicted_peak_bytes": cards[fullest]["predicted_peak_bytes"],
        "outside_bytes": cards[fullest]["outside_bytes"],
        "limit_bytes": cards[fullest]["capacity_bytes"],
        "predicted_step_s": planned["step_seconds"],
    }
    if case.hopeless:
        last = done.stderr.strip().splitlines()[-1]
        told = "the memory of this card ran out" in last or "was ended by" in last
        return row | {"measured_peak_bytes": 0, "worst_error": 0.0, "outcome": "killed" if told else last[:60]}
    measured = [card["measured_peak_bytes"] for card in json.loads(done.stdout)["cards"]]
    errors = [
        card["predicted_peak_bytes"] / peak - 1 for card, peak in zip(cards, measured, strict=True)
    ]  # fmt: skip
    return row | {
        "measured_peak_bytes": measured[fullest],
        "worst_error": max(errors, key=abs),
        "outcome": "ran",
    }


def _memseg(*arguments: object, fails: bool = False) -> subprocess.CompletedProcess[str]:
    """A command of memseg, which must end well unless it `fails`."""
    line = [sys.executable, "-m", "memseg.cli.main", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=os.environ)
    if (done.returncode != 0) != fails:
        raise SystemExit(f"{' '.join(map(str, arguments))} ended with {done.returncode}: {done.stderr}")
    return done


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cases, or those named, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder with Cityscapes' leftImg8bit and gtFine")
    parser.add_argument("--only", metavar="WORD", default="", help="cases whose name has this in it")
    parser.add_argument("--results", type=Path, metavar="FILE", help="keep finished rows there, and go on from them")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(arguments)
    cases = [case for case in CASES if args.only in case.name]
    kept = args.results.read_text().splitlines() if args.results and args.results.exists() else []
    rows = {row["name"]: row for row in map(json.loads, kept)}
    with progress(len(cases)) as begin:
        for case in cases:
            begin(case.name)
            if case.name in rows:
                continue
            with tempfile.TemporaryDirectory() as folder:
                rows[case.name] = measure(case, args.data, Path(folder))
            if args.results:
                with args.results.open("a") as file:
                    file.write(json.dumps(rows[case.name]) + "\n")
    tell([rows[case.name] for case in cases], as_json=args.json)


if __name__ == "__main__":
    main()
