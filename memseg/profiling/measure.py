"""What a step really allocates on this machine, by the CPU allocator's own count.

torch keeps peak statistics for CUDA but none for its CPU allocator. Its profiler, though, is told of every allocation
and free of the thread that started it; adding them up in order gives the allocator's exact count, as long as no other
thread frees what this one allocated. Memory that libraries take behind the allocator's back (compiled kernels, the
heap's slack) is not in it.

`torch.profiler.profile` would keep a record of every operation too, which takes as much memory as a small step itself:
ladder-densenet121 with 2 images of 512x1024, units, took 1324 MiB under it and 590 without. So the profiler is started
as `profile` does it, but for a scope that nobody opens; allocations are told whatever the scope.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch._C._autograd import (
    DeviceType,
    _disable_profiler,
    _enable_profiler,
    _prepare_profiler,
)
from torch._C._profiler import (
    ProfilerActivity,
    ProfilerConfig,
    ProfilerState,
    RecordScope,
    _ExperimentalConfig,
)

from memseg.profiling.jobs.job import Job, run_step

_MEASURED_STEPS = 2
"""Optimizer state is born in the first step; the second is the steady state."""


class AllocatorPeak:
    """The most bytes that were allocated at once above those at the start; known when the watch is over."""

    def __init__(self) -> None:
        self.peak_bytes = 0


@contextmanager
def watch_allocator(device: torch.device | None = None) -> Iterator[AllocatorPeak]:
    """Count what the allocator hands out inside the block; `peak_bytes` is filled at its end.

    Args:
        device: A CUDA device, whose allocator keeps the count itself, or the CPU (the default).
    """
    peak = AllocatorPeak()
    if device is not None and device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.peak_bytes = torch.cuda.max_memory_allocated(device) - before
        return
    # The profiler's library would tell of its start, and of an absent GPU, on standard error; it asks at its first use.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    config = ProfilerConfig(ProfilerState.KINETO, False, True, False, False, False, _ExperimentalConfig())
    activities = {ProfilerActivity.CPU}
    _prepare_profiler(config, activities)
    _enable_profiler(config, activities, {RecordScope.USER_SCOPE})  # type: ignore[call-arg]  # The stub lacks it.
    try:
        yield peak
    finally:
        results = _disable_profiler()
    events = [
        (event.start_ns(), event.nbytes())  # type: ignore[attr-defined]  # The stub lacks it.
        for event in results.events()
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    ]
    allocated = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        allocated += size
        peak.peak_bytes = max(peak.peak_bytes, allocated)


def measure_job(make: Callable[[], Job]) -> int:
    """Peak bytes of real training steps on the CPU, everything counted from making the step on.

    Takes the memory and the time of real steps.

    Args:
        make: Makes the step, as for `trace_job`, whose prediction this checks.

    Raises:
        RuntimeError: the memory is not there.
    """
    with watch_allocator() as peak:
        job = make()
        for _ in range(_MEASURED_STEPS):
            run_step(job)
    return peak.peak_bytes
