"""How long predictions take: python -m benchmarks.trace_seconds [--json].

Each row is a trace in a fresh process, from torch and memseg imported to the profile in hand, so with all that torch
loads and caches on first use; `process` is the whole life of that process, imports and all. One thread.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from benchmarks.result import progress, tell
from memseg.levels import Recompute
from memseg.models import build_model
from memseg.profiling import Job, foreign_job, named_optimizer, segmented_job, trace_job

_IMAGE, _BATCH = (1024, 2048), 2


def _ladder(level: Recompute) -> Job:
    build = partial(build_model, "ladder-densenet169")
    return segmented_job(build, image=_IMAGE, batch=_BATCH, recompute=level)


def _transformer() -> Job:
    from torchvision.models import vit_b_16

    images = torch.empty(64, 3, 224, 224, device="meta")
    return foreign_job(vit_b_16, images, loss="cross-entropy", optimizer=named_optimizer("adamw"))


def _deep() -> Job:
    """100 convolutions, each with batch norm and ReLU: 300 layers."""
    layers = [nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()) for _ in range(100)]
    images = torch.empty(2, 32, 256, 256, device="meta")
    return foreign_job(nn.Sequential(*layers), images, optimizer=named_optimizer("adam"))


CASES: dict[str, Callable[[], Job]] = {
    "ladder-densenet169 1024x2048 batch 2, none": partial(_ladder, Recompute.NONE),
    "ladder-densenet169 1024x2048 batch 2, units": partial(_ladder, Recompute.UNITS),
    "vit_b_16 batch 64": _transformer,
    "300 layers": _deep,
}


def measure(name: str, device: str) -> dict[str, str | int | float]:
    """One row, of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.trace_seconds", "--case", name, "--device", device]
    start = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    found: dict[str, str | int | float] = json.loads(done.stdout)
    return {"case": name, "device": device, **found, "process_seconds": time.perf_counter() - start}


def trace(name: str, device: str) -> None:
    """Trace a case here and print what it took."""
    start = time.perf_counter()
    profile = trace_job(CASES[name], device=device)
    seconds = time.perf_counter() - start
    print(json.dumps({"allocations": len(profile.timeline.allocations), "trace_seconds": seconds}))


def main() -> None:
    """Print all rows, or trace one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        trace(arguments.case, arguments.device)
        return
    wanted = [(name, device) for name in CASES for device in ("cpu", "cuda")]
    rows = []
    with progress(len(wanted)) as begin:
        for name, device in wanted:
            begin(f"{name} on {device}")
            rows.append(measure(name, device))
    tell(rows, as_json=arguments.json)


if __name__ == "__main__":
    main()
