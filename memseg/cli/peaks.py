"""The measured peak of each process of a run, known to all of them while it runs.

Each process knows its own allocator only. So it leaves the figure in the store where the processes met, and whoever
wants to show it looks there, without waiting for those that have none yet.
"""

import time
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch
from torch.distributed.distributed_c10d import Store

from memseg.profiling.measure import watch_allocator

MEASURED_STEPS = 2
"""Peaks are measured over building the model and these steps: the second is the steady state."""
_SECONDS_BETWEEN = 5.0
"""Of looks at a CUDA allocator, which goes on counting."""


class PeakWatch:
    """Measures this process from when it is entered until its first steps are done, and tells the others.

    Args:
        device: Of this process.
        store: Of all processes.
        rank: Of this process.
    """

    def __init__(self, device: torch.device, store: Store, rank: int) -> None:
        self._device, self._store, self._key = device, store, _key(rank)
        self._measuring = ExitStack()
        self._told_at = 0.0

    def __enter__(self) -> Self:
        self._peak = self._measuring.enter_context(watch_allocator(self._device))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._measuring.close()

    @property
    def peak_bytes(self) -> int:
        """The most that was allocated at once; 0 before it is known."""
        return self._peak.peak_bytes

    def steps_done(self, count: int) -> None:
        """To be called after each step with how many there have been."""
        now = time.monotonic()
        if count == MEASURED_STEPS:
            self._measuring.close()
            self._tell(self.peak_bytes, now)
        elif count > MEASURED_STEPS and self._device.type == "cuda" and now - self._told_at > _SECONDS_BETWEEN:
            self._tell(torch.cuda.max_memory_allocated(self._device), now)

    def _tell(self, peak_bytes: int, now: float) -> None:
        self._store.set(self._key, str(peak_bytes))
        self._told_at = now


def known_peaks(store: Store, processes: int) -> list[int | None]:
    """The peak of each process; None where it has told none yet."""
    return [int(store.get(_key(rank))) if store.check([_key(rank)]) else None for rank in range(processes)]


def _key(rank: int) -> str:
    return f"memseg/peak/{rank}"
