"""How large a band should be on this machine, and which product is fastest: python -m benchmarks.bands [--json]

The layers walk over bands of a map (`memseg.nn.layout`), which must be large enough for a convolution to reach its
rate, and small enough to stay in the caches between the passes over it. Here a dense block runs forward and backward
with bands of several sizes; and a band's 1x1 convolution runs as a matrix product of torch's BLAS and as oneDNN's
convolution, of which `memseg.nn.operators` takes the faster.

Milliseconds are medians of several runs, the sizes taking turns; ratios are to the size in use, or to the BLAS.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch.nn import functional as F

from benchmarks.result import Row, tell
from memseg.levels import Recompute
from memseg.nn import DenseBlock, layout

RUNS = 7
SIZES_MIB = (1, 2, 4, 8, 16, 64)
CHANNELS = (96, 192, 320, 640)


def medians(runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of each, taking turns, after one of each that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(RUNS + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(found) for name, found in seconds.items()}


def band_sizes() -> list[Row]:
    """A dense block of DenseNet-121's second kind, at 1/8 of two 512x1024 images, by the size of its bands."""
    block = DenseBlock(6, in_channels=128, growth_rate=32, recompute=Recompute.UNITS)
    images = torch.randn(2, 128, 64, 128).contiguous(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn(2, block.out_channels, 64, 128).contiguous(memory_format=torch.channels_last)
    used = layout._BAND_BYTES["cpu"]

    def step(size_mib: int) -> None:
        layout._BAND_BYTES["cpu"] = size_mib * 2**20
        block(images).backward(grad)

    try:
        found = medians({f"{size} MiB": partial(step, size) for size in SIZES_MIB})
    finally:
        layout._BAND_BYTES["cpu"] = used
    reference = found[f"{used // 2**20} MiB"]
    return [
        {"name": f"dense block, bands of {name}", "milliseconds": value, "ratio": value / reference}
        for name, value in found.items()
    ]


def products() -> list[Row]:
    """A band of pixels times a bottleneck's weight, by the library that multiplies."""
    rows: list[Row] = []
    for channels in CHANNELS:
        pixels = layout._BAND_BYTES["cpu"] // (4 * channels)
        x, weight = torch.randn(pixels, channels), torch.randn(128, channels)
        as_map = layout.images(x.view(1, pixels, 1, channels))
        kernel = weight[:, :, None, None]
        found = medians(
            {
                "BLAS": partial(F.linear, x, weight),
                "oneDNN": partial(F.conv2d, as_map, kernel),
            }
        )
        rows += [
            {"name": f"{channels} to 128 channels, {name}", "milliseconds": value, "ratio": value / found["BLAS"]}
            for name, value in found.items()
        ]
    return rows


def main() -> None:
    """Both tables in one."""
    parser = argparse.ArgumentParser(description="Band sizes and matrix products on this machine.")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_args()
    tell([*band_sizes(), *products()], as_json=arguments.json)


if __name__ == "__main__":
    main()
