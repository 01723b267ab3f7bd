"""This machine as a card: its rates measured, its memory read, in the form of profiles/*.toml.

A data sheet says what a processor could do with every lane busy; predictions need what torch reaches on it. Each rate
is the median of several runs, after one to warm up:

    convolutions  float32, forward and both gradients: the median of a dense layer's 3x3, a residual network's 3x3 and a
                  1x1 (`convolution_flops`)
    products      float32 matrix product, forward and both gradients, of a dense layer's shape (`flops`)
    half          both in bfloat16, or in float16 where a GPU has no bfloat16; the lower of the two (`half_flops`)
    copy          a tensor far larger than the caches copied onto another: bytes read and written (`bandwidth`)
    operation     a thousand additions to eight numbers, of one of them (`overhead`)
    link          CPU: a tensor sent to another process by gloo, as the stages of a split do. CUDA: a copy from another
                  GPU, or from pinned host memory where there is only one

Other work on the machine makes all of it slower, so every source tells the slowest and the fastest run.

CUDA devices go the same way, with the device waited for around each run. That has not been run by us.
"""

import json
import multiprocessing
import os
import platform
import shlex
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from memseg.errors import RunFailedError
from memseg.profiling.machine import processor_name
from memseg.units import format_bytes

DISTURBED = 1.5
"""Slowest over fastest run, from which on a figure says more about the moment than about the machine."""
_RESERVED_BYTES = 2**29
_OPERATIONS = 1000
_LINK_TIMEOUT_S = 120


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    runs: int
    """Of each kernel, after one that is not counted."""
    scale: int
    """Images in a batch of the kernels."""
    copied_elements: int
    sent_elements: int


THOROUGH = Effort(runs=9, scale=8, copied_elements=2**26, sent_elements=2**24)
QUICK = Effort(runs=3, scale=1, copied_elements=2**22, sent_elements=2**20)


@dataclass(frozen=True)
class Measured:
    """A rate, with what tells how far to trust it."""

    value: float
    """Per second; of several runs the median."""
    slowest: float
    fastest: float
    what: str

    @property
    def is_disturbed(self) -> bool:
        """Whether the runs differ so much that other work must have run beside them."""
        return self.fastest > DISTURBED * self.slowest

    def __lt__(self, other: "Measured") -> bool:
        return self.value < other.value


@dataclass(frozen=True)
class Calibration:
    """One device of this machine."""

    device: torch.device
    convolutions: Measured
    products: Measured
    half: Measured
    copy: Measured
    overhead: Measured
    """Its `value` is operations per second."""
    link: Measured
    capacity_bytes: int
    reserve_bytes: int
    reserve_reason: str

    @property
    def disturbed(self) -> list[str]:
        """Figures whose runs differ too much, in words."""
        rates = (self.convolutions, self.products, self.half, self.copy, self.overhead, self.link)
        return [rate.what for rate in rates if rate.is_disturbed]


def devices() -> list[torch.device]:
    """What can be calibrated here: the CPU and every CUDA device."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def calibrate(
    device: torch.device, *, effort: Effort = THOROUGH, progress: Callable[[int, int], None] = lambda done, total: None
) -> Calibration:
    """Measure one device.

    Args:
        device: One of `devices()`.
        effort: How long to measure.
        progress: Told what is done and what there is.

    Raises:
        RunFailedError: a process that the link was measured with failed.
    """
    half = _half_dtype(device)
    measure: list[Callable[[], Measured]] = [
        partial(_convolutions, device, torch.float32, effort),
        partial(_products, device, torch.float32, effort),
        partial(_convolutions, device, half, effort),
        partial(_products, device, half, effort),
        partial(_copy, device, effort),
        partial(_overhead, device, effort),
        partial(_gloo_link if device.type == "cpu" else _cuda_link, device, effort),
    ]
    found: list[Measured] = []
    for index, one in enumerate(measure):
        progress(index, len(measure))
        found.append(one())
    progress(len(measure), len(measure))
    convolutions, products, half_convolutions, half_products, copy, overhead, link = found
    capacity, reserve, reason = _cpu_memory() if device.type == "cpu" else _cuda_memory(device)
    return Calibration(
        device,
        convolutions,
        products,
        min(half_convolutions, half_products),
        copy,
        overhead,
        link,
        capacity,
        reserve,
        reason,
    )


def profile_text(calibration: Calibration, command: Sequence[str]) -> str:
    """The TOML file that describes the device; `memseg.planning.load_card` reads it.

    Args:
        calibration: What was measured.
        command: That measured it, for the sources.
    """
    device = calibration.device
    processor = _processor(device)
    when = datetime.now(UTC).date().isoformat()
    by = f"{shlex.join(command)}, {when}, torch {torch.__version__}, {processor}"
    figures = {
        "capacity": (_mib(calibration.capacity_bytes), f"read from the {_memory_reader(device)}; {by}"),
        "reserve": (_mib(calibration.reserve_bytes), f"{calibration.reserve_reason}; {by}"),
        "flops": (_gflops(calibration.products), _source(calibration.products, 1e9, "GFLOP/s", by)),
        "convolution_flops": (_gflops(calibration.convolutions), _source(calibration.convolutions, 1e9, "GFLOP/s", by)),
        "half_flops": (_gflops(calibration.half), _source(calibration.half, 1e9, "GFLOP/s", by)),
        "bandwidth": (f"{calibration.copy.value / 1e9:.2f} GB/s", _source(calibration.copy, 1e9, "GB/s", by)),
        "link": (f"{calibration.link.value / 1e9:.3f} GB/s", _source(calibration.link, 1e9, "GB/s", by)),
        "overhead": (
            f"{1e6 / calibration.overhead.value:.2f} us",
            _source(calibration.overhead, 1e3, "thousand operations a second", by),
        ),
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        figures["compute_capability"] = f"{major}.{minor}", f"read from the {_memory_reader(device)}; {by}"
    tables = [
        f"[{name}]\nvalue = {json.dumps(value)}\nsource = {json.dumps(source)}"
        for name, (value, source) in figures.items()
    ]
    reached = json.dumps("the rates above were reached, not read from a data sheet")
    tables.append(f"[efficiency]\nvalue = 1.0\nsource = {reached}")
    return "\n\n".join([f"title = {json.dumps(processor)}\nkind = {json.dumps(device.type)}", *tables]) + "\n"


def _convolutions(device: torch.device, dtype: torch.dtype, effort: Effort) -> Measured:
    shapes = [(128, 32, 3, 64, 128, max(1, effort.scale // 4)), (256, 256, 3, 28, 28, effort.scale)]
    shapes.append((256, 256, 1, 28, 28, effort.scale))
    rates = []
    for inputs, outputs, kernel, height, width, images in shapes:
        x = torch.randn(images, inputs, height, width, device=device, dtype=dtype, requires_grad=True)
        weight = torch.randn(outputs, inputs, kernel, kernel, device=device, dtype=dtype, requires_grad=True)
        gradient = torch.ones(images, outputs, height, width, device=device, dtype=dtype)
        flops = 3 * 2 * gradient.numel() * inputs * kernel**2
        run = partial(_convolve, x, weight, gradient)
        rates.append(_rate(run, flops, device, effort, f"{dtype_name(dtype)} convolutions"))
    return sorted(rates)[1]


def _convolve(x: Tensor, weight: Tensor, gradient: Tensor) -> None:
    torch.autograd.grad(F.conv2d(x, weight, padding=weight.shape[-1] // 2), (x, weight), gradient)


def _products(device: torch.device, dtype: torch.dtype, effort: Effort) -> Measured:
    pixels = effort.scale * 2048
    features = torch.randn(256, pixels, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(128, 256, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.ones(128, pixels, device=device, dtype=dtype)

    def run() -> None:
        torch.autograd.grad(weight @ features, (features, weight), gradient)

    flops = 3 * 2 * 128 * 256 * pixels
    return _rate(run, flops, device, effort, f"{dtype_name(dtype)} matrix products")


def _copy(device: torch.device, effort: Effort) -> Measured:
    source = torch.ones(effort.copied_elements, device=device)
    destination = torch.empty_like(source)
    what = f"copying {format_bytes(source.nbytes)}, bytes read and written"
    return _rate(lambda: destination.copy_(source), 2 * source.nbytes, device, effort, what)


def _overhead(device: torch.device, effort: Effort) -> Measured:
    numbers = torch.ones(8, device=device)

    def run() -> None:
        for _ in range(_OPERATIONS):
            numbers.add_(1)

    return _rate(run, _OPERATIONS, device, effort, "additions to eight numbers")


def _cuda_link(device: torch.device, effort: Effort) -> Measured:
    others = [index for index in range(torch.cuda.device_count()) if index != device.index]
    if others:
        source = torch.ones(effort.sent_elements, device=torch.device("cuda", others[0]))
        what = f"copying {format_bytes(source.nbytes)} from cuda:{others[0]}"
    else:
        source = torch.ones(effort.sent_elements).pin_memory()
        what = f"copying {format_bytes(source.nbytes)} from pinned host memory, for want of a second GPU"
    destination = torch.empty_like(source, device=device)
    return _rate(lambda: destination.copy_(source), source.nbytes, device, effort, what)


def _gloo_link(_: torch.device, effort: Effort) -> Measured:
    context = multiprocessing.get_context("spawn")
    found: SimpleQueue[Measured] = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [context.Process(target=_echo, args=(rank, store, effort, found)) for rank in (0, 1)]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(_LINK_TIMEOUT_S)
            if any(process.exitcode != 0 for process in processes):
                raise RunFailedError("the link could not be measured: a process failed; its message is above")
        finally:
            for process in processes:
                if process.is_alive():
                    process.terminate()
    return found.get()


def _echo(rank: int, store: str, effort: Effort, found: "SimpleQueue[Measured]") -> None:
    """One of two processes that send a tensor to each other in turn; the one that started them ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    timeout = timedelta(seconds=_LINK_TIMEOUT_S / 2)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    buffer = torch.ones(effort.sent_elements)

    def there_and_back() -> None:
        for sender in (0, 1):
            (distributed.send if rank == sender else distributed.recv)(buffer, 1 - rank)

    what = f"sending {format_bytes(buffer.nbytes)} to another process by gloo"
    rate = _rate(there_and_back, 2 * buffer.nbytes, torch.device("cpu"), effort, what)
    if rank == 0:
        found.put(rate)
    distributed.destroy_process_group()


def _rate(run: Callable[[], object], amount: float, device: torch.device, effort: Effort, what: str) -> Measured:
    """`amount` per second of calls of `run`."""
    seconds = []
    for _ in range(effort.runs + 1):
        _wait_for(device)
        start = time.perf_counter()
        run()
        _wait_for(device)
        seconds.append(time.perf_counter() - start)
    counted = seconds[1:]
    return Measured(amount / statistics.median(counted), amount / max(counted), amount / min(counted), what)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _half_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return torch.bfloat16


def _cpu_memory() -> tuple[int, int, str]:
    """What there is, what to keep back, and why."""
    total = _meminfo("MemTotal")
    held = total - _meminfo("MemAvailable")
    limit = _container_bytes()
    reason = f"{format_bytes(_RESERVED_BYTES)} for oneDNN's scratch buffers and fragmentation of the heap"
    if limit is not None and limit < total:
        return limit, _RESERVED_BYTES, f"{reason}; the capacity is this container's limit"
    return total, _RESERVED_BYTES + held, f"{reason}, and {format_bytes(held)} that were in use when this was measured"


def _meminfo(key: str) -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RunFailedError(f"/proc/meminfo has no {key}; CPU cards need Linux")


def _container_bytes() -> int | None:
    """The limit of a control group, where there is one."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    return None if text == "max" else int(text)


def _cuda_memory(device: torch.device) -> tuple[int, int, str]:
    free, total = torch.cuda.mem_get_info(device)
    held = total - free - torch.cuda.memory_reserved(device)
    reason = (
        f"{format_bytes(held)} that the CUDA context, loaded kernels and other processes held when this was measured, "
        f"and {format_bytes(_RESERVED_BYTES)} for fragmentation"
    )
    return total, held + _RESERVED_BYTES, reason


def _memory_reader(device: torch.device) -> str:
    return "kernel" if device.type == "cpu" else "driver"


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()} ({platform.machine()}), {torch.get_num_threads()} of {os.cpu_count()} threads"


def dtype_name(dtype: torch.dtype) -> str:
    """As torch prints it, without the module.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def _mib(size: int) -> str:
    """Whole mebibytes, rounded down."""
    return f"{size // 2**20} MiB"


def _gflops(rate: Measured) -> str:
    return f"{rate.value / 1e9:.1f} GFLOP/s"


def _source(rate: Measured, unit: float, name: str, by: str) -> str:
    return f"{rate.what}: median of runs from {rate.slowest / unit:.1f} to {rate.fastest / unit:.1f} {name}; {by}"
