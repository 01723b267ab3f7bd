"""What a step really allocates on this machine, by the CPU allocator's own count.

torch keeps peak statistics for CUDA but none for its CPU allocator. Its profiler, though, is told of every allocation
and free; adding them up in order gives the allocator's exact count. Memory that libraries take behind the allocator's
back (oneDNN's scratch, the heap's slack) is not in it.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from memseg.levels import Precision, Recompute
from memseg.models.objective import Objective, training_step
from memseg.models.segmented import SegmentedModel
from memseg.profiling.step import OptimizerFactory, fused_adam

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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as watched:
        yield peak
    results = watched.profiler.kineto_results if watched.profiler else None
    events = [
        (event.start_ns(), event.nbytes())
        for event in (results.events() if results else ())
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    ]
    allocated = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        allocated += size
        peak.peak_bytes = max(peak.peak_bytes, allocated)


def measure_step(
    build: Callable[[], SegmentedModel],
    *,
    image: tuple[int, int],
    batch: int,
    recompute: Recompute | Mapping[str, Recompute] = Recompute.NONE,
    aux_weight: float = 0.3,
    optimizer: OptimizerFactory = fused_adam,
    precision: Precision = Precision.FLOAT32,
) -> int:
    """Peak bytes of real training steps on random data on the CPU, everything counted from building the model on.

    Arguments as for `profile_step`, whose prediction this checks. Takes the memory and the time of real steps.

    Raises:
        RuntimeError: the memory is not there.
    """
    with watch_allocator() as peak:
        model = build().train()
        model.check_image(image, batch=batch)
        model.set_recompute(recompute)
        objective = Objective(aux_weight)
        stepper = optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])
        dtype = next(model.parameters()).dtype
        images = torch.randn(batch, 3, *image, dtype=dtype).contiguous(memory_format=torch.channels_last)
        target = torch.randint(model.num_classes, (batch, *image), dtype=torch.uint8)
        for _ in range(_MEASURED_STEPS):
            training_step(model, objective, stepper, images, target, precision=precision)
    return peak.peak_bytes
