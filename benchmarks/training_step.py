"""Memory and time of one training step at each recompute level, predicted and measured.

    python -m benchmarks.training_step --model ladder-densenet121 --image 512x1024 --batch 2 [--json]

Every level runs in a process of its own. Time is the median of several steps after one to warm up; peak bytes are the
allocator's own count, taken in further steps, because counting slows them down. Ratios are to level `none`.
Where other programs compute beside it, set OMP_WAIT_POLICY=passive: threads that spin while they wait for a core that
is taken can make a step ten times longer.
"""

import argparse
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.result import tell
from memseg.errors import MemsegError
from memseg.levels import Recompute
from memseg.models import build_model
from memseg.models.objective import Objective, training_step
from memseg.profiling.measure import measure_step
from memseg.profiling.step import fused_adam, profile_step
from memseg.units import parse_image


@dataclass(frozen=True)
class Case:
    """What is trained."""

    model: str
    image: tuple[int, int]
    batch: int
    steps: int
    """Steps that are timed."""


@dataclass(frozen=True)
class Figures:
    """Of one level."""

    peak_bytes: int
    predicted_bytes: int
    step_s: float


def run_level(case: Case, level: Recompute) -> Figures:
    """Time, then predict and measure."""
    build = partial(build_model, case.model)
    step_s = median_step_s(case, level)
    profile = profile_step(build, image=case.image, batch=case.batch, recompute=level)
    measured = measure_step(build, image=case.image, batch=case.batch, recompute=level)
    return Figures(measured, profile.timeline.peak_allocated_bytes, step_s)


def median_step_s(case: Case, level: Recompute) -> float:
    """Median seconds of a training step on random data."""
    model = build_model(case.model).train()
    model.set_recompute(level)
    optimizer = fused_adam(model.parameters())
    images = torch.randn(case.batch, 3, *case.image)
    target = torch.randint(model.num_classes, (case.batch, *case.image), dtype=torch.uint8)
    seconds = []
    for _ in range(case.steps + 1):
        start = time.perf_counter()
        training_step(model, Objective(), optimizer, images, target)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def main() -> None:
    """Run all levels, one after the other."""
    parser = argparse.ArgumentParser(description="Memory and time of a training step at each recompute level.")
    parser.add_argument("--model", default="ladder-densenet121")
    parser.add_argument("--image", default="512x1024", help="HEIGHTxWIDTH in pixels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="steps to time, after one to warm up")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_args()
    try:
        case = Case(arguments.model, parse_image(arguments.image), arguments.batch, arguments.steps)
        with torch.device("meta"):
            build_model(case.model).check_image(case.image)
    except MemsegError as error:
        parser.error(str(error))
    figures = {level: _in_a_fresh_process(case, level) for level in Recompute}
    plain = figures[Recompute.NONE]
    rows = [
        {
            "name": level.value,
            "peak_allocated_bytes": found.peak_bytes,
            "predicted_peak_allocated_bytes": found.predicted_bytes,
            "step_s": found.step_s,
            "peak_ratio": found.peak_bytes / plain.peak_bytes,
            "step_ratio": found.step_s / plain.step_s,
        }
        for level, found in figures.items()
    ]
    tell(rows, as_json=arguments.json)


def _in_a_fresh_process(case: Case, level: Recompute) -> Figures:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run_level, case, level).result()


if __name__ == "__main__":
    main()
