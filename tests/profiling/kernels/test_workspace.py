"""What a convolution allocates beside its result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memseg.profiling.kernels.workspace import Transient, kernel_workspace

UNFOLDED = "pyramid 3x3, wider than the map"
"""Its forward multiplies unfolded blocks of the map, whose size oneDNN picks by its own measure of caches."""


@pytest.fixture(scope="module", params=[1, 2])
def rows(request):
    """The benchmark's own, in a process with so many threads."""
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.convolution_workspace", "--json"],
        cwd=Path(__file__).resolve().parents[3], capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(request.param)},
    )  # fmt: skip
    return json.loads(run.stdout)["rows"]


def errors(rows, direction):
    return {row["name"]: row[f"{direction}_predicted_bytes"] - row[f"{direction}_measured_bytes"] for row in rows}


needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available()
    or "AVX512" not in torch.backends.cpu.get_cpu_capability()
    or torch.cpu._is_amx_tile_supported(),
    reason="the layouts are those of oneDNN under AVX-512 without AMX",
)


@needs_onednn
def test_a_forward_is_exact_but_for_a_weight_that_brgemm_pads_further(rows):
    operands = {row["name"]: row["operand_bytes"] for row in rows}
    for name, error in errors(rows, "forward").items():
        if "channels-last" in name:
            assert abs(error) <= 0.02 * operands[name] + 8 * 4096, name
        elif not name.startswith(UNFOLDED):
            # A bias of bfloat16 is widened: 4 bytes for each of 96 channels, and 128 to align them.
            assert abs(error) <= 512, name


@needs_onednn
def test_a_backward_is_exact_but_for_what_a_bias_takes(rows):
    for name, error in errors(rows, "backward").items():
        assert abs(error) <= 1024, name


@needs_onednn
def test_most_are_exact_to_the_byte(rows):
    exact = [error == 0 for direction in ("forward", "backward") for error in errors(rows, direction).values()]
    assert sum(exact) >= 0.9 * len(exact)


def arguments(x, weight, stride=1, groups=1):
    return x, weight, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], groups


def test_a_gpu_transforms_3x3_tiles():
    x, weight = torch.empty(2, 64, 8, 8, device="meta"), torch.empty(32, 64, 3, 3, device="meta")
    (transient,) = kernel_workspace(torch.ops.aten.convolution.default, arguments(x, weight), {}, "cuda")
    # float32: 4 bytes; 2.25 values for each one of input and output, 4 for each one of the weight.
    # The output is there already when the workspace is taken.
    assert transient == Transient(1, 4 * (9 * (2 * 64 * 64 + 2 * 32 * 64) // 4 + 4 * 32 * 64 * 9))
    assert kernel_workspace(torch.ops.aten.convolution.default, arguments(x, weight, stride=2), {}, "cuda") == []


def test_float64_unfolds_the_whole_batch_before_the_output_is_there():
    x, weight = torch.empty(2, 4, 8, 8, dtype=torch.float64), torch.empty(6, 4, 3, 3, dtype=torch.float64)
    transients = kernel_workspace(torch.ops.aten.convolution.default, arguments(x, weight), {}, "cpu")
    # 9 taps of 4 channels for each of 8 x 8 pixels of 2 images, 8 bytes each.
    unfolded = 9 * 4 * 8 * 8 * 2 * 8
    assert transients == [Transient(0, unfolded), Transient(1, unfolded)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nothing_is_predicted_for_operations_that_take_nothing(device):
    x = torch.empty(4, 4)
    assert kernel_workspace(torch.ops.aten.mm.default, (x, x), {}, device) == []
    assert kernel_workspace(torch.ops.aten.relu.default, (x,), {}, device) == []
