"""What a CPU process takes beside torch's allocator: python -m benchmarks.process_memory [--json].

A CPU card's limit counts all that a process maps privately and writably, of which the allocator knows only tensors; a
plan predicts the rest as a term of its own (memseg/planning/outside.py). Each row plans a run on generated streets,
trains two steps as planned, and looks every few milliseconds at what the system counts of each process (VmData):

    measured    the most it counted, less what it counted when the limit was set, less the allocator's peak
    predicted   `outside_bytes` of the plan

Both are of the process where they differ most. The allocator's peak and the system's need not be at the same moment, so
measured is what must at least be there. The heap's holes differ from run to run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.result import Row, progress, tell

CAPACITY = 8 * 2**30
_LOOK_SECONDS = 0.004
MODELS = {"mini": "ladder-densenet-mini", "121": "ladder-densenet121"}
CASES: tuple[tuple[str, str, int, tuple[str, ...]], ...] = (
    ("mini", "512x1024", 1, ("--recompute", "none")),
    ("mini", "512x1024", 1, ("--recompute", "units")),
    ("121", "512x1024", 1, ("--recompute", "none")),
    ("121", "512x1024", 1, ("--recompute", "units")),
    ("121", "512x1024", 2, ("--recompute", "none")),
    ("121", "512x1024", 2, ("--recompute", "units")),
    ("121", "256x512", 1, ("--strategy", "split")),
    ("121", "256x512", 1, ("--strategy", "replicate")),
)


def measure(model: str, image: str, threads: int, options: tuple[str, ...], folder: Path) -> Row:
    """One row."""
    plan_file, run = folder / "plan.json", folder / "run"
    cards = "cpu:8GiB,cpu:8GiB" if "--strategy" in options else "cpu:8GiB"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    asked = [MODELS[model], "--image", image, "--batch", 2, "--classes", 8, "--cards", cards, *options, "-o", plan_file]
    subprocess.run(_command("plan", *asked, "--json"), check=True, env=environment, stdout=subprocess.DEVNULL)
    settings = {
        "model.name": MODELS[model],
        "data.image": image,
        "data.streets.length": 8,
        "train.batch": 2,
        "train.workers": 0,
        "train.evaluate_every": 0,
        "train.checkpoint_every": 2,
        "schedule.steps": 2,
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    line = _command("train", "streets_demo", *overrides, "--plan", plan_file, "--out", run, "--json")
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as train:
        above = _watch(train, run)
        told = train.stdout.read() if train.stdout else ""
    if train.returncode:
        raise SystemExit(f"{model} {image}: the run ended with {train.returncode}")
    planned: list[dict[str, Any]] = json.loads(plan_file.read_text())["cards"]
    peaks = [card["measured_peak_bytes"] for card in json.loads(told)["cards"]]
    beside = [above[rank] - peak for rank, peak in enumerate(peaks)]
    worst = max(range(len(peaks)), key=lambda rank: abs(planned[rank]["outside_bytes"] - beside[rank]))
    whole = peaks[worst] + beside[worst]
    return {
        "name": f"{model} {image}, {threads} thread{'s' if threads > 1 else ''}, {options[-1]}",
        "allocator_bytes": peaks[worst],
        "predicted_outside_bytes": planned[worst]["outside_bytes"],
        "measured_outside_bytes": beside[worst],
        "difference_of_whole": (planned[worst]["predicted_peak_bytes"] + planned[worst]["outside_bytes"]) / whole - 1,
    }


def _watch(train: "subprocess.Popen[str]", run: Path) -> dict[int, int]:
    """Until the run is over: the most that each rank took above what it had when its limit was set."""
    above: dict[int, int] = {}
    ranks: dict[int, int] = {}
    while train.poll() is None:
        for process in _processes(run):
            if process not in ranks:
                ranks[process] = _rank(process)
        for process, rank in ranks.items():
            data, limit = _data_bytes(process), _limit_bytes(process)
            if data and limit:
                above[rank] = max(above.get(rank, 0), data - (limit - CAPACITY))
        time.sleep(_LOOK_SECONDS)
    return above


def _processes(run: Path) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"memseg.cli.worker" in words and os.fsencode(run) in words:
            found.append(int(folder.name))
    return found


def _rank(process: int) -> int:
    words = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return int(next(word for word in words if word.startswith(b"RANK=")).partition(b"=")[2])


def _data_bytes(process: int) -> int:
    return 1024 * _number(process, "status", "VmData:")


def _limit_bytes(process: int) -> int:
    """Of RLIMIT_DATA; 0 while there is none."""
    return _number(process, "limits", "Max data size")


def _number(process: int, file: str, heading: str) -> int:
    try:
        lines = Path(f"/proc/{process}/{file}").read_text().splitlines()
    except OSError:
        return 0
    line = next((line for line in lines if line.startswith(heading)), heading)
    first, *_ = [*line.removeprefix(heading).split(), "0"]
    return int(first) if first.isdecimal() else 0


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "memseg.cli.main", *map(str, arguments)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    rows = []
    with progress(len(CASES)) as begin:
        for case in CASES:
            begin(" ".join((*case[:2], *case[3])))
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(*case, Path(folder)))
    tell(rows, as_json=args.json)


if __name__ == "__main__":
    main()
