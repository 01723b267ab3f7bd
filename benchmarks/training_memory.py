"""Memory and time of a training step: plain, by today's alternatives, and at memseg's levels, in one run.

    python -m benchmarks.training_memory [--model densenet121] [--image 512x1024] [--json]
    python -m benchmarks.training_memory --model ladder-densenet169 --image 1024x2048 --whole-step --limit 4GiB

`benchmarks.training_alternatives` says what each row is. Each runs in a fresh process, with the same environment,
weights and batch, and never two at once:

    idle                after small steps of another network, so that torch's libraries and threads are there
    warm-up             untimed; the first one's outputs and gradients are compared with plain's
    timed steps         median -> step_seconds; highest resident set - that before the first step -> rss_rise_bytes
    one counted step    allocator's events -> peak_allocated_bytes (counting costs time and memory, so it comes last)

Peak bytes are those of every tensor alive at the worst moment of the counted step, tensors that outlive steps included,
less what `counted` names in the output: without --whole-step parameters, buffers, images, and the target or the
output's gradient; with it nothing. The resident set is the operating system's view: it also has the libraries' scratch
and the heap's slack. Compiling swells it for good, but only what is still there once steps are timed counts.

With --limit, the system lets a row's process have no more than so much above its idle size (RLIMIT_DATA) until its
timed steps are done; a row that runs into it has `fits` false, and that is a result, not a failure.
Where other programs compute beside it take several --rounds: ratios of times are medians over rounds, each of which
runs every row once.
"""

import argparse
import gc
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import training_alternatives
from benchmarks.result import count, progress, tell
from benchmarks.training_alternatives import DEFAULT, EXTRACTORS, VARIANTS, Task, Variant, Work, check_task
from memseg.errors import MemsegError, UnknownNameError
from memseg.models import model_names
from memseg.profiling.machine import machine, versions
from memseg.profiling.measure import watch_allocator
from memseg.running import end_with_parent, is_out_of_memory, lift_memory_limit, limit_memory
from memseg.running.launch import environment as environment_of_runs
from memseg.units import format_bytes, format_seconds, parse_bytes, parse_image

_COUNTED = {
    False: "forward, loss and backward: bytes beyond parameters, buffers, images, and the target or the output's "
    "gradient; the parameters' gradients are in",
    True: "forward, loss, backward and Adam: all bytes from before the model is built, parameters, buffers, gradients, "
    "optimizer state and batch included",
}
_TELLING = ("OMP_", "KMP_", "GOMP_", "MKL_", "ONEDNN_", "DNNL_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "TORCH")
"""How names of environment variables begin that can change the figures."""

_FIGURES, _RESULTS, _OUTPUT = "figures.json", "results.pt", "output.txt"
"""What a row's process leaves in its folder."""

_SIGNS_OF_EXHAUSTION = (
    "could not create a",
    "could not execute a",
    "bad_alloc",
    "annot allocate memory",
    "out of memory",
)
"""What oneDNN, the C++ library and compilers say where torch names memory itself; heeded only under a limit."""


@dataclass(frozen=True)
class Options:
    """How rows are measured."""

    task: Task
    steps: int
    warmup: int
    threads: int
    limit_bytes: int | None


@dataclass
class Figures:
    """What one process found out of one row."""

    first_step_s: float | None = None
    seconds: list[float] = field(default_factory=list)
    rss_rise_bytes: int | None = None
    peak_bytes: int | None = None
    fits: bool | None = None
    error: str | None = None


@dataclass(frozen=True)
class Difference:
    """Of a row's first step from that of the plain network with the same kind of norm: |a - b| / |b|."""

    outputs: float
    gradients: float


# In a row's own process.


def measure_row(options: Options, variant: Variant, folder: Path) -> Figures:
    """Run the phases that the top of this module lists; results of the first step go into `folder`."""
    torch.set_num_threads(options.threads)
    _load_libraries(variant)
    standing, resident = live_bytes(), _status_bytes("VmRSS")
    figures = Figures()
    try:
        if options.limit_bytes is not None:
            limit_memory(torch.device("cpu"), options.limit_bytes)
        work = Work(options.task, variant)
        if not options.task.whole_step:
            resident = _status_bytes("VmRSS")
        _time_steps(work, options, figures, folder)
        figures.rss_rise_bytes = _status_bytes("VmHWM") - resident
    except Exception as error:
        if options.limit_bytes is None or not (is_out_of_memory(error) or _is_exhaustion(error)):
            raise
        return Figures(fits=False)
    if options.limit_bytes is not None:
        lift_memory_limit()
        figures.fits = True
    work.clear()
    if not options.task.whole_step:
        standing += _storage_bytes(work.given)
    alive = live_bytes()
    with watch_allocator() as peak:
        work.step()
    figures.peak_bytes = alive - standing + peak.peak_bytes
    return figures


def _load_libraries(variant: Variant) -> None:
    """Steps of a small network, plain and in the row's way: what torch loads and starts for them is nobody's rise.

    Nothing is compiled here, so that the first step of the row shows what compiling costs.
    """
    eager = replace(variant, fused=False, way="plain" if variant.compile_budget else variant.way)
    for each in (Variant("plain"), eager):
        Work(Task("ladder-densenet-mini", (64, 64), 2, True), each).step()


def _time_steps(work: Work, options: Options, figures: Figures, folder: Path) -> None:
    figures.first_step_s = _first_step(work, folder)
    for _ in range(options.warmup - 1):
        work.step()
    # The highest resident set begins anew, where the system allows it.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    figures.seconds = [_seconds(work.step) for _ in range(options.steps)]


def _first_step(work: Work, folder: Path) -> float:
    """Its seconds; its outputs and gradients go into `folder`."""
    outputs: list[Tensor] = []
    seconds = _seconds(lambda: work.step(lambda found: outputs.extend(one.detach() for one in found)))
    gradients = [parameter.grad for parameter in work.parameters]
    torch.save({"outputs": outputs, "gradients": gradients}, folder / _RESULTS)
    return seconds


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def live_bytes() -> int:
    """Of the storages of all tensors that Python knows: what persists between steps is found, wherever it is kept."""
    gc.collect()
    # Exactly these types: a compiler's fake tensors have no storage that is real.
    return _storage_bytes([held for held in gc.get_objects() if type(held) in (Tensor, nn.Parameter)])


def _storage_bytes(tensors: Sequence[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _status_bytes(name: str) -> int:
    """A figure of /proc/self/status: VmRSS, the resident set, or VmHWM, its highest."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _is_exhaustion(error: Exception) -> bool:
    return any(sign in str(error) for sign in _SIGNS_OF_EXHAUSTION)


# In the process that starts them.


def run_in_fresh_process(command: Sequence[str], folder: Path, *, timeout_s: float, is_limited: bool) -> Figures:
    """What a process of its own finds out of a row; where it dies of something else than the limit, `error` says so."""
    with (folder / _OUTPUT).open("w", encoding="utf-8") as output:
        # A session of its own, so that a compiler's helpers end with it.
        process = subprocess.Popen(
            [*command, "--into", str(folder)], stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return Figures(error=f"not done after {timeout_s:.0f} s")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code == 0:
        return Figures(**json.loads((folder / _FIGURES).read_text(encoding="utf-8")))
    if code < 0:
        return Figures(fits=False) if is_limited else Figures(error=f"ended by signal {-code}")
    said = (folder / _OUTPUT).read_text(encoding="utf-8", errors="replace").splitlines()
    return Figures(
        error=next((line.strip() for line in reversed(said) if line.strip()), f"ended with exit code {code}")
    )


def differences(found: Path, expected: Path) -> Difference | None:
    """Between two processes' first steps; None where one has left none."""
    if not (found / _RESULTS).exists() or not (expected / _RESULTS).exists():
        return None
    ours, theirs = (torch.load(folder / _RESULTS, weights_only=True) for folder in (found, expected))
    return Difference(
        _relative_difference(ours["outputs"], theirs["outputs"]),
        _relative_difference(ours["gradients"], theirs["gradients"]),
    )


def _relative_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    pairs = [(ours.double(), theirs.double()) for ours, theirs in zip(found, expected, strict=True)]
    squared = sum((ours - theirs).square().sum().item() for ours, theirs in pairs)
    return math.sqrt(squared / sum(theirs.square().sum().item() for _, theirs in pairs))


def rows_of(
    rounds: Sequence[Mapping[str, Figures]], found: Mapping[str, Difference | None], limit_bytes: int | None
) -> list[dict[str, Any]]:
    """One row for each variant: what its processes found out, and ratios to plain's."""
    return [_row(name, rounds, found[name], limit_bytes) for name in rounds[0]]


def _row(
    name: str, rounds: Sequence[Mapping[str, Figures]], found: Difference | None, limit_bytes: int | None
) -> dict[str, Any]:
    own = [each[name] for each in rounds]
    peak, plain_peak = (_largest(rounds, of, "peak_bytes") for of in (name, "plain"))
    with_batch_norm = VARIANTS[name].with_batch_norm.name if VARIANTS[name].frozen else None
    fits = [figures.fits for figures in own if figures.fits is not None]
    return {
        "name": name,
        "peak_allocated_bytes": peak,
        "peak_ratio_to_plain": peak / plain_peak if peak is not None and plain_peak else None,
        "rss_rise_bytes": _largest(rounds, name, "rss_rise_bytes"),
        "step_seconds": _median([seconds for figures in own for seconds in figures.seconds]),
        "step_ratio_to_plain": _time_ratio(rounds, name, "plain"),
        "step_ratio_to_batch_norm": _time_ratio(rounds, name, with_batch_norm) if with_batch_norm else None,
        "first_step_seconds": own[0].first_step_s,
        "output_difference_to_plain": found.outputs if found else None,
        "gradient_difference_to_plain": found.gradients if found else None,
        "limit_bytes": limit_bytes,
        "fits": all(fits) if fits else None,
        "error": next((figures.error for figures in own if figures.error), None),
    }


def _largest(rounds: Sequence[Mapping[str, Figures]], name: str, key: str) -> int | None:
    values = [getattr(each[name], key) for each in rounds if name in each]
    return max((value for value in values if value is not None), default=None)


def _time_ratio(rounds: Sequence[Mapping[str, Figures]], name: str, to: str) -> float | None:
    """Median over rounds of the ratio of the two medians of each."""
    pairs = [(each[name].seconds, each[to].seconds) for each in rounds if to in each]
    return _median([statistics.median(ours) / statistics.median(theirs) for ours, theirs in pairs if ours and theirs])


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def measure_all(arguments: argparse.Namespace, names: Sequence[str], options: Options) -> list[dict[str, Any]]:
    """All rows, one after the other, as often as there are rounds."""
    rounds: list[dict[str, Figures]] = []
    found: dict[str, Difference | None] = {}
    with TemporaryDirectory() as scratch, progress(len(names) * arguments.rounds) as begin:
        for index in range(arguments.rounds):
            rounds.append({})
            for name in names:
                begin(f"{name}, round {index + 1} of {arguments.rounds}")
                folder = Path(scratch, str(index), name)
                folder.mkdir(parents=True)
                command = [sys.executable, "-m", "benchmarks.training_memory", *sys.argv[1:], "--row", name]
                rounds[-1][name] = run_in_fresh_process(
                    command, folder, timeout_s=arguments.timeout, is_limited=options.limit_bytes is not None
                )
                if index == 0:
                    reference = "plain-frozen" if VARIANTS[name].frozen else "plain"
                    found[name] = differences(folder, folder.with_name(reference))
                if index > 0 or not name.startswith("plain"):
                    (folder / _RESULTS).unlink(missing_ok=True)
    return rows_of(rounds, found, options.limit_bytes)


# What is asked and what is told.


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Rows as people read them; columns in which no row has anything are left out."""
    cells = [
        {
            "row": row["name"],
            "peak": _shown(row["peak_allocated_bytes"], format_bytes),
            "peak/plain": _shown(row["peak_ratio_to_plain"], "{:.3f}".format),
            "resident rise": _shown(row["rss_rise_bytes"], format_bytes),
            "step": _shown(row["step_seconds"], format_seconds),
            "step/plain": _shown(row["step_ratio_to_plain"], "{:.3f}".format),
            "step/batch norm": _shown(row["step_ratio_to_batch_norm"], "{:.3f}".format),
            "first step": _shown(row["first_step_seconds"], format_seconds),
            "outputs off": _shown(row["output_difference_to_plain"], "{:.0e}".format),
            "gradients off": _shown(row["gradient_difference_to_plain"], "{:.0e}".format),
            "fits": _shown(row["fits"], lambda fits: "yes" if fits else "no"),
            "error": row["error"] or "",
        }
        for row in rows
    ]
    used = [column for column in cells[0] if any(row[column] for row in cells)]
    return [{column: row[column] for column in used} for row in cells]


def _shown(value: Any, form: Callable[[Any], str]) -> str:
    return "" if value is None else form(value)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_memory",
        description=f"{__doc__}\n{training_alternatives.__doc__}",
        epilog=f"without --only: {', '.join(DEFAULT)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    models = ", ".join((*EXTRACTORS, *model_names()))
    add("--model", default=EXTRACTORS[0], help=f"an extractor or a whole network with its losses: {models}")
    add("--image", default="512x1024", help="HEIGHTxWIDTH in pixels (512x1024)")
    add("--batch", type=count, default=2, help="images in the batch (2)")
    add("--only", metavar="ROW,...", help="these rows, whatever their order; below are those of a run without it")
    add("--whole-step", action="store_true", help="with Adam's step, and everything counted from an empty process on")
    add("--limit", metavar="SIZE", help="run each row in a process that may grow by no more than this, as in 4GiB")
    add("--steps", type=count, default=5, help="steps that are timed in each round (5)")
    add("--warmup", type=count, default=2, help="steps before them (2)")
    add("--rounds", type=count, default=1, help="how often every row is run, one row after the other (1)")
    add("--threads", type=count, default=torch.get_num_threads(), help="threads of a step (%(default)s)")
    add(
        "--environment",
        choices=("own", "memseg"),
        default="own",
        help="rows get the environment of this command, with threads that do not spin while they wait unless it has "
        "set OMP_WAIT_POLICY; or all that `memseg train` gives its processes: the heap also returns large tensors to "
        "the system when they are freed",
    )
    add("--timeout", type=count, default=3600, metavar="SECONDS", help="of one row's process (3600)")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    add("--row", help=argparse.SUPPRESS)
    add("--into", type=Path, help=argparse.SUPPRESS)
    return parser


def chosen_rows(only: str | None) -> list[str]:
    """Names of rows, each once, in the order in which they are run.

    Raises:
        UnknownNameError: there is no row of that name.
    """
    asked = list(DEFAULT) if only is None else [name.strip() for name in only.split(",")]
    for name in asked:
        if name not in VARIANTS:
            raise UnknownNameError("row", name, VARIANTS)
    return [name for name in VARIANTS if name in asked]


def main() -> None:
    """Run the rows, or, in a process of its own, one of them."""
    parser = build_parser()
    arguments = parser.parse_args()
    try:
        task = Task(arguments.model, parse_image(arguments.image), arguments.batch, arguments.whole_step)
        check_task(task)
        limit_bytes = parse_bytes(arguments.limit) if arguments.limit else None
        names = chosen_rows(arguments.only)
    except MemsegError as error:
        parser.error(str(error))
    options = Options(task, arguments.steps, arguments.warmup, arguments.threads, limit_bytes)
    if arguments.row:
        end_with_parent()
        figures = measure_row(options, VARIANTS[arguments.row], arguments.into)
        (arguments.into / _FIGURES).write_text(json.dumps(asdict(figures)), encoding="utf-8")
        return
    torch.set_num_threads(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    # Threads that spin while they wait for a core that is taken make a step many times longer.
    given = environment_of_runs() if arguments.environment == "memseg" else {"OMP_WAIT_POLICY": "PASSIVE"}
    for name, value in given.items():
        os.environ.setdefault(name, value)
    rows = measure_all(arguments, names, options)
    counted = _COUNTED[task.whole_step]
    if arguments.json:
        told = {
            "machine": machine(),
            "versions": versions(),
            "environment": {name: value for name, value in os.environ.items() if name.startswith(_TELLING)},
            "model": task.model,
            "image": "x".join(map(str, task.image)),
            "batch": task.batch,
            "counted": counted,
            "steps": options.steps,
            "rounds": arguments.rounds,
            "rows": rows,
        }
        print(json.dumps(told, allow_nan=False))
        return
    tell(table(rows), as_json=False)
    print(f"{task.model}, {task.batch} images of {arguments.image}; peak counts {counted}")


if __name__ == "__main__":
    main()
