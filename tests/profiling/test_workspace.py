"""What a convolution allocates beside its result."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memseg.profiling.workspace import Transient, convolution_workspace

BARRIERS_BYTES = 16 * 2**10
"""oneDNN's own bookkeeping of threads: 8 KiB on two cores."""


@pytest.fixture(scope="module")
def rows():
    """The benchmark's own, from a process that nothing else has warmed up."""
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.convolution_workspace", "--json"],
        cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(run.stdout)["rows"]


needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or "AVX512" not in torch.backends.cpu.get_cpu_capability(),
    reason="the layouts are those of oneDNN under AVX-512",
)


@needs_onednn
def test_forward_is_exact(rows):
    for row in rows:
        assert row["forward_predicted_bytes"] == row["forward_measured_bytes"], row["name"]


@needs_onednn
def test_backward_is_exact_but_for_one_copy_of_the_weight(rows):
    for row in rows:
        error = row["backward_measured_bytes"] - row["backward_predicted_bytes"]
        assert -row["blocked_weight_bytes"] <= error <= BARRIERS_BYTES, row["name"]
        if row["name"].endswith("channels-last"):
            assert abs(error) <= BARRIERS_BYTES, row["name"]


def test_a_gpu_transforms_3x3_tiles():
    x, weight = torch.empty(2, 64, 8, 8, device="meta"), torch.empty(32, 64, 3, 3, device="meta")
    args = (x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    (transient,) = convolution_workspace(torch.ops.aten.convolution.default, args, "cuda")
    # float32: 4 bytes; 2.25 values for each one of input and output, 4 for each one of the weight.
    # The output is there already when the workspace is taken.
    assert transient == Transient(1, 4 * (9 * (2 * 64 * 64 + 2 * 32 * 64) // 4 + 4 * 32 * 64 * 9))
    strided = (x, weight, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1)
    assert convolution_workspace(torch.ops.aten.convolution.default, strided, "cuda") == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nothing_is_predicted_for_other_types_and_operations(device):
    x, weight = torch.empty(1, 4, 8, 8, dtype=torch.float64), torch.empty(4, 4, 3, 3, dtype=torch.float64)
    args = (x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    assert convolution_workspace(torch.ops.aten.convolution.default, args, device) == []
    assert convolution_workspace(torch.ops.aten.mm.default, (x, x), device) == []
