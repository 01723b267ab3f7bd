"""The figures of a run while it runs: lines of JSON for programs, event files for TensorBoard.

A run may be killed at any moment and resumed from its last checkpoint. The log then ends in half a line, and holds
steps that will be done again. So each line goes to the operating system whole, at once; and opening the log for a
step first cuts it back to that step, into a new file that takes the place of the old one in a single rename.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter

from memseg.files import replace_file

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"


class MetricsLog:
    """Appends to `metrics.jsonl` and to the TensorBoard events of one run folder.

    Args:
        folder: The run folder; made if absent.
        resume_step: Steps that the run has behind it. Lines of later steps are cut, and TensorBoard is told to drop
            its points of later steps; 0 begins anew.

    Raises:
        OSError: the disk is full or cannot be written.
    """

    def __init__(self, folder: Path, *, resume_step: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        replace_file(path, "".join(_line(record) for record in read_metrics(folder) if record["step"] <= resume_step))
        self._folder, self._lines = folder, path.open("a", encoding="utf-8")
        with self._named():
            self._events = SummaryWriter(log_dir=str(folder / EVENTS_FOLDER), purge_step=resume_step + 1, flush_secs=10)

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Log values of one step under their names.

        A value that is not finite becomes null in the line, as JSON knows no nan; TensorBoard gets it as it is.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        with self._named():
            self._lines.write(_line({"step": step, **values}))
            self._lines.flush()
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def sync(self) -> None:
        """Put the lines on the disk: a checkpoint that relies on them, as the best one does, comes after."""
        with self._named():
            os.fsync(self._lines.fileno())

    def close(self) -> None:
        """Write out what TensorBoard still buffers, and close the files.

        Raises:
            OSError: as for `write`.
        """
        with self._named():
            self._lines.close()
            self._events.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Inside, errors of the disk say where: neither open files nor TensorBoard, which writes in a thread, do."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._folder)) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's `metrics.jsonl`, oldest first, up to the first torn line; none where there is no file."""
    path = folder / METRICS_FILE
    records = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(record, dict) or "step" not in record:
            break
        records.append(record)
    return records


def _line(record: Mapping[str, float | int | None]) -> str:
    finite = {name: value if value is None or math.isfinite(value) else None for name, value in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
