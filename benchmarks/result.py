"""How a benchmark tells its result: where it was measured, then a line for each row, or one JSON object."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from memseg.profiling.machine import machine, versions

Row = Mapping[str, str | int | float]


def tell(rows: Sequence[Row], *, as_json: bool) -> None:
    """Print rows that all have the same keys, with the machine and the versions."""
    if as_json:
        print(json.dumps({"machine": machine(), "versions": versions(), "rows": rows}))
        return
    print(", ".join(f"{name} {value}" for name, value in {**machine(), **versions()}.items()))
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        aligned = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *aligned]))


def _cell(value: str | int | float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if isinstance(value, float) else value


def count(text: str) -> int:
    """An option that counts something.

    Raises:
        ArgumentTypeError: not a whole number above 0.
    """
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return number


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Which row runs, on standard error; nothing where nobody looks."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=total)
        begun = 0

        def begin(what: str) -> None:
            nonlocal begun
            bar.update(task, description=what, completed=begun)
            begun += 1

        yield begin
        bar.update(task, completed=total)
