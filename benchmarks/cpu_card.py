"""The rates in profiles/cpu.toml, measured on this machine: python -m benchmarks.cpu_card.

A data sheet says what a CPU could do with every lane busy; a `cpu:8GiB` card needs what PyTorch reaches. Three rates,
each the median of several runs after one to warm up, in float32:

    products    forward and backward of a 3x3 convolution and of a matrix product, both of the shapes that a dense layer
                has at 1/8 of a 512x1024 image, batch 2; the profile takes the lower of the two
    copy        a tensor far larger than the caches copied onto another: bytes read and written
    link        a tensor sent from one process to another by gloo, as the stages of a split do
"""

import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue

import torch
from torch import distributed
from torch.nn import functional as F

RUNS = 9
COPY_ELEMENTS = 2**26
LINK_ELEMENTS = 2**24


def median_seconds(run: Callable[[], object]) -> float:
    """Of `RUNS` calls, after one that is not counted."""
    seconds = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def convolution_flops() -> float:
    """Operations per second of a 3x3 convolution, 128 to 32 channels, forward and both gradients."""
    images = torch.randn(2, 128, 64, 128, requires_grad=True)
    weight = torch.randn(32, 128, 3, 3, requires_grad=True)
    gradient = torch.ones(2, 32, 64, 128)

    def step() -> None:
        torch.autograd.grad(F.conv2d(images, weight, padding=1), (images, weight), gradient)

    return 3 * 2 * 2 * 64 * 128 * 32 * 128 * 9 / median_seconds(step)


def product_flops() -> float:
    """Operations per second of a matrix product, 256 to 128 channels, forward and both gradients."""
    features = torch.randn(256, 2 * 64 * 128, requires_grad=True)
    weight = torch.randn(128, 256, requires_grad=True)
    gradient = torch.ones(128, 2 * 64 * 128)

    def step() -> None:
        torch.autograd.grad(weight @ features, (features, weight), gradient)

    return 3 * 2 * 128 * 256 * 2 * 64 * 128 / median_seconds(step)


def copy_bytes() -> float:
    """Bytes per second, read and written, of copying 256 MiB."""
    source, destination = torch.ones(COPY_ELEMENTS), torch.empty(COPY_ELEMENTS)
    return 2 * 4 * COPY_ELEMENTS / median_seconds(lambda: destination.copy_(source))


def link_bytes() -> float:
    """Bytes per second of sending 64 MiB to another process and back, one direction counted at a time."""
    context = multiprocessing.get_context("spawn")
    rates: SimpleQueue[float] = context.SimpleQueue()
    processes = [context.Process(target=_echo, args=(rank, rates)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("link: a process failed; its message is above")
    return rates.get()


def _echo(rank: int, rates: SimpleQueue[float]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    buffer = torch.ones(LINK_ELEMENTS)

    def there_and_back() -> None:
        for sender in (0, 1):
            (distributed.send if rank == sender else distributed.recv)(buffer, 1 - rank)

    seconds = median_seconds(there_and_back)
    if rank == 0:
        rates.put(2 * 4 * LINK_ELEMENTS / seconds)
    distributed.destroy_process_group()


def main() -> None:
    print(f"machine: {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"convolution: {convolution_flops() / 1e9:.0f} GFLOP/s")
    print(f"matrix product: {product_flops() / 1e9:.0f} GFLOP/s")
    print(f"copy: {copy_bytes() / 1e9:.1f} GB/s")
    print(f"link: {link_bytes() / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
