"""Predicted peaks of training steps, held against those of real steps.

    python -m benchmarks.prediction [--only PATTERN,...] [--results FILE] [--json] [--check]
    python -m benchmarks.prediction --list
    python -m benchmarks.prediction --published FILE

Each row is a case of `benchmarks.prediction_cases`: its step is traced on fake tensors and then run twice on real ones.
Both peaks are those of the CPU allocator, from before the model is made to the end of the second step, so that they
hold parameters, gradients, optimizer state and batch; the first step and later ones count alike. `error` is
(predicted - measured) / measured: below zero, the prediction was too low.

The allocator's count is exact in any process, but what a process did before is in the way all the same: garbage that is
freed while the next case is counted, memory that the heap keeps, a case that the system ends. So each case has a
process of its own. It is forked from one that has loaded torch and this code and run nothing (multiprocessing's fork
server): it starts at once, and all cases run the same code, even where someone edits it meanwhile.

With --results, rows are written to a file as they come, one JSON object to a line, and rows that the file has are not
run again, unless they failed, or were run with other threads or another torch. Begin a new file when memseg changes.
"""

import argparse
import gc
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import prediction_cases
from benchmarks.prediction_cases import CASES, Case
from benchmarks.published import predicted_peaks, read_runs
from benchmarks.result import count, progress, tell
from memseg.errors import InputError, MemsegError
from memseg.files import replace_file
from memseg.profiling import measure_job, trace_job
from memseg.profiling.machine import machine, versions
from memseg.running.launch import end_with_parent

MOST_MEDIAN, MOST_WORST = 0.01, 0.03
"""What --check demands of the median and of the worst |error|."""
MOST_MEDIAN_PUBLISHED, MOST_PERCENTILE_90_PUBLISHED, MOST_MUCH_TOO_LOW = 0.03, 0.08, 0.1
"""What it demands of published peaks: of the median, of nine in ten, and of the share that is much too low."""
MUCH_TOO_LOW = -0.05
"""Below this a step that was said to fit may well not."""

_KINETO = "KINETO_LOG_LEVEL"


@dataclass(frozen=True)
class Row:
    """A prediction beside what it predicted; Nones where the case failed."""

    name: str
    predicted_bytes: int | None = None
    measured_bytes: int | None = None
    peak_step: str | None = None
    """ "first" or "steady": the step in which the predicted peak lies."""
    peak_phase: str | None = None
    peak_layer: str | None = None
    trace_seconds: float | None = None
    measure_seconds: float | None = None
    error: str | None = None
    """Why there are no figures."""

    @property
    def relative_error(self) -> float | None:
        """Below zero where the prediction was too low."""
        if self.predicted_bytes is None or self.measured_bytes is None:
            return None
        return (self.predicted_bytes - self.measured_bytes) / self.measured_bytes


@dataclass(frozen=True)
class Summary:
    """Of the relative errors of all rows that have one."""

    cases: int
    failed: int
    median_error: float | None
    """The errors' absolute values, here and in the next two."""
    percentile_90_error: float | None
    worst_error: float | None
    worst_case: str | None
    share_much_too_low: float | None
    """Share of the cases whose prediction is more than 5 % below what was measured."""

    def misses(self, *, published: bool = False) -> list[str]:
        """What --check finds wanting, in words."""
        figures = self.median_error, self.percentile_90_error, self.worst_error, self.share_much_too_low
        median, percentile_90, worst, too_low = figures
        if median is None or percentile_90 is None or worst is None or too_low is None:
            return ["no case has figures"]
        demands = (
            ("the median error", median, MOST_MEDIAN_PUBLISHED if published else MOST_MEDIAN),
            ("the error of nine in ten", percentile_90, MOST_PERCENTILE_90_PUBLISHED if published else MOST_WORST),
            ("the worst error", worst, math.inf if published else MOST_WORST),
            ("the share that is more than 5 % too low", too_low, MOST_MUCH_TOO_LOW),
        )
        found = [f"{self.failed} cases failed"] if self.failed else []
        return found + [f"{what} is {is_:.2%}, must be at most {most:.0%}" for what, is_, most in demands if is_ > most]

    def __str__(self) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        if self.median_error is None:
            return f"{self.cases} cases{failed}"
        return (
            f"{self.cases} cases{failed}; errors: median {self.median_error:.3%}, 90th percentile "
            f"{self.percentile_90_error:.3%}, worst {self.worst_error:.3%} ({self.worst_case}); more than "
            f"{-MUCH_TOO_LOW:.0%} too low: {self.share_much_too_low:.1%} of the cases"
        )


def summarize(rows: Sequence[Row]) -> Summary:
    """What all rows together say.

    >>> summarize([Row("a", 99, 100), Row("b", 94, 100), Row("c", 100, 100), Row("d", error="ended by signal 9")])
    ... # doctest: +NORMALIZE_WHITESPACE
    Summary(cases=4, failed=1, median_error=0.01, percentile_90_error=0.06, worst_error=0.06, worst_case='b',
            share_much_too_low=0.3333333333333333)
    """
    errors = {row.name: row.relative_error for row in rows if row.relative_error is not None}
    if not errors:
        return Summary(len(rows), len(rows), None, None, None, None, None)
    absolute = sorted(abs(error) for error in errors.values())
    return Summary(
        cases=len(rows),
        failed=len(rows) - len(errors),
        median_error=statistics.median(absolute),
        percentile_90_error=absolute[math.ceil(0.9 * len(absolute)) - 1],
        worst_error=absolute[-1],
        worst_case=max(errors, key=lambda name: abs(errors[name])),
        share_much_too_low=sum(error < MUCH_TOO_LOW for error in errors.values()) / len(errors),
    )


# In a case's own process.


def predict_and_measure(case: Case) -> Row:
    """Trace the step, then run it."""
    start = time.perf_counter()
    profile = trace_job(partial(case.make, real=False))
    traced = time.perf_counter()
    first, steady = profile.first_timeline, profile.timeline
    is_first = first.peak_allocated_bytes > steady.peak_allocated_bytes
    phase, layer = (first if is_first else steady).peak_moment
    predicted = profile.peak_allocated_bytes
    del profile, first, steady
    gc.collect()
    begun = time.perf_counter()
    measured = measure_job(partial(case.make, real=True))
    return Row(
        name=case.name,
        predicted_bytes=predicted,
        measured_bytes=measured,
        peak_step="first" if is_first else "steady",
        peak_phase=str(phase),
        peak_layer=layer,
        trace_seconds=traced - start,
        measure_seconds=time.perf_counter() - begun,
    )


def _answer(name: str, threads: int, into: Connection) -> None:
    end_with_parent()
    torch.set_num_threads(threads)
    try:
        row = predict_and_measure(CASES[name])
    except Exception as error:
        text = str(error).strip() or "no message"
        row = Row(name, error=f"{type(error).__name__}: {text.splitlines()[0]}")
    into.send(row)


# In the process that starts them.


def run_in_fresh_process(name: str, *, threads: int, timeout_s: float) -> Row:
    """The row of a case from a process of its own; where that ends without one, the row's `error` says so."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.prediction_cases"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(name, threads, there), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(timeout_s):
            return Row(name, error=f"not done after {timeout_s:.0f} s")
        row: Row = here.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        return Row(name, error=f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}")
    finally:
        process.kill()
        process.join()
        here.close()
    return row


class Results:
    """The file of --results: rows of this and of earlier runs.

    Raises:
        InputError: the file is something else.
    """

    def __init__(self, path: Path | None, *, threads: int) -> None:
        self._path = path
        self._conditions = {"torch": torch.__version__, "threads": threads}
        self._lines: list[Mapping[str, Any]] = []
        if path is not None and path.exists():
            self._lines = _read_results(path)

    def row(self, name: str) -> Row | None:
        """The last that was run under the same conditions and did not fail."""
        for line in reversed(self._lines):
            row = Row(**line["row"])
            if row.name == name and row.error is None and self._conditions.items() <= line.items():
                return row
        return None

    def add(self, row: Row) -> None:
        """Write it, so that it is there whatever happens next."""
        self._lines.append({**self._conditions, "row": asdict(row)})
        if self._path is not None:
            replace_file(self._path, "".join(f"{json.dumps(line)}\n" for line in self._lines))


def _read_results(path: Path) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            Row(**line["row"])
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path}: line {number} must be a row that --results wrote, got {text[:60]!r}; give another file, or "
                "delete this one"
            ) from error
        found.append(line)
    return found


def run_all(names: Sequence[str], results: Results, *, threads: int, timeout_s: float) -> list[Row]:
    """All rows, one after the other; those that the results have are taken from there."""
    rows: list[Row] = []
    with progress(len(names)) as begin:
        for name in names:
            begin(name)
            row = results.row(name)
            if row is None:
                row = run_in_fresh_process(name, threads=threads, timeout_s=timeout_s)
                results.add(row)
            rows.append(row)
    return rows


# What is asked and what is told.


def published_rows(path: Path) -> list[Row]:
    """Predictions beside published peaks, in the order of the file.

    Raises:
        InputError: no such table, or MMSegmentation is not installed.
    """
    runs = read_runs(path)
    rows = []
    with progress(len(runs)) as begin:
        for run, predicted, (phase, layer) in predicted_peaks(runs):
            begin(run.name)
            rows.append(Row(run.name, predicted, run.peak_bytes, "steady", phase, layer))
    return rows


def chosen_cases(only: str | None) -> list[str]:
    """Names of cases that any of the patterns matches, in the order in which they are run.

    Raises:
        InputError: a pattern matches none.

    >>> chosen_cases("unet/*,resnet19/*")
    Traceback (most recent call last):
    memseg.errors.InputError: no case matches 'resnet19/*'; --list names them all, and * stands for any part of a name
    >>> chosen_cases("ladder*/float16/*,unet*/momentum")
    ['ladder-densenet-mini/2x3x64x128/units/frozen/float16/adamw-loop', 'unet/2x3x256x512/channels-last/momentum']
    """
    patterns = ["*"] if only is None else [pattern.strip() for pattern in only.split(",")]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in CASES):
            raise InputError(f"no case matches {pattern!r}; --list names them all, and * stands for any part of a name")
    return [name for name in CASES if any(fnmatchcase(name, pattern) for pattern in patterns)]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prediction",
        description=f"{__doc__}\n{prediction_cases.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", metavar="PATTERN,...", help="cases whose name one of the patterns matches, as *float64* (all)")
    add("--published", type=Path, metavar="FILE", help="a table of published peaks of GPUs to hold predictions against")
    add("--list", action="store_true", help="print the cases' names and run nothing")
    add("--results", type=Path, metavar="FILE", help="rows as JSON lines; those that are there are not run again")
    add("--threads", type=count, default=torch.get_num_threads(), help="threads of a step (%(default)s)")
    add("--timeout", type=count, default=900, metavar="SECONDS", help="of one case (900)")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    add(
        "--check",
        action="store_true",
        help=f"exit with 1 unless the median |error| is at most {100 * MOST_MEDIAN:.0f} %% and the worst "
        f"{100 * MOST_WORST:.0f} %%",
    )
    return parser


def table(rows: Sequence[Row]) -> list[dict[str, str | int | float]]:
    """Rows as people read them."""
    return [
        {
            "case": row.name,
            "predicted": "" if row.predicted_bytes is None else row.predicted_bytes,
            "measured": "" if row.measured_bytes is None else row.measured_bytes,
            "error": row.error or f"{row.relative_error:+.3%}",
            "predicted peak at": " ".join(part for part in (row.peak_step, row.peak_phase, row.peak_layer) if part),
        }
        for row in rows
    ]


def main() -> None:
    """Run the cases and tell how far off the predictions were."""
    parser = build_parser()
    arguments = parser.parse_args()
    try:
        names = chosen_cases(arguments.only)
        results = Results(arguments.results, threads=arguments.threads)
    except MemsegError as error:
        parser.error(str(error))
    if arguments.list:
        print("\n".join(names))
        return
    torch.set_num_threads(arguments.threads)
    # What the cases' processes must find when they start.
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    # Threads that spin while they wait for a core that is taken make a step many times longer.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault(_KINETO, "99")
    try:
        if arguments.published:
            rows = published_rows(arguments.published)
        else:
            rows = run_all(names, results, threads=arguments.threads, timeout_s=arguments.timeout)
    except MemsegError as error:
        parser.error(str(error))
    summary = summarize(rows)
    if arguments.json:
        told = [{**asdict(row), "relative_error": row.relative_error} for row in rows]
        print(json.dumps({"machine": machine(), "versions": versions(), "rows": told, "summary": asdict(summary)}))
    else:
        tell(table(rows), as_json=False)
        print(summary)
    misses = summary.misses(published=bool(arguments.published)) if arguments.check else []
    for miss in misses:
        print(f"benchmarks.prediction: {miss}", file=sys.stderr)
    if misses or summary.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
