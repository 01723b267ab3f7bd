"""What a CPU process takes beside the allocator's peak, by cause."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from memseg.levels import Recompute
from memseg.planning.costs import SegmentCost
from memseg.planning.outside import KERNEL_BYTES, SHARED_KERNELS, Outside, Process, outside_bytes
from memseg.profiling.kernels.compiled import compiled_kernels
from processes import python

from .cases import level

MIB = 2**20
PROCESS = Process(threads=1, stack_bytes=8 * MIB, mmap_threshold_bytes=16 * MIB)


def segment(name, **kernels):
    """With levels of so many kernels."""
    levels = tuple(level(Recompute(one), kernels=count) for one, count in kernels.items())
    return SegmentCost(name, (), 0, True, 0, 0, 0, 0, levels)


SEGMENTS = [segment("one", none=40, units=10), segment("two", none=8)]


def test_the_causes_add_up():
    found = Outside(kernels_bytes=1, stacks_bytes=20, products_bytes=300, python_bytes=4000, heap_bytes=50000)
    assert found.total == 54321


def test_kernels_are_those_of_the_chosen_levels_and_the_most_where_none_is_chosen():
    plain, rebuilt, unknown = (outside_bytes(SEGMENTS, PROCESS, levels) for levels in ([0, 0], [1, 0], None))
    assert plain.kernels_bytes == (SHARED_KERNELS + 48) * KERNEL_BYTES
    assert plain.kernels_bytes - rebuilt.kernels_bytes == 30 * KERNEL_BYTES
    assert unknown == plain


def test_every_thread_but_the_first_has_a_stack():
    four = outside_bytes(SEGMENTS, replace(PROCESS, threads=4, loader_threads=2))
    assert outside_bytes(SEGMENTS, PROCESS).stacks_bytes == 0
    assert four.stacks_bytes == (3 + 2) * 8 * MIB


def test_operands_are_packed_where_several_threads_rebuild():
    two = replace(PROCESS, threads=2)
    assert outside_bytes(SEGMENTS, two, [0, 0]).products_bytes == 0
    assert outside_bytes(SEGMENTS, PROCESS, [1, 0]).products_bytes == 0
    assert outside_bytes(SEGMENTS, two, [1, 0]).products_bytes == 2 * 20 * MIB


def test_a_lower_mmap_threshold_leaves_smaller_holes():
    low = outside_bytes(SEGMENTS, replace(PROCESS, mmap_threshold_bytes=2 * MIB))
    assert outside_bytes(SEGMENTS, PROCESS).heap_bytes == 8 * low.heap_bytes


def test_layers_of_one_shape_share_their_kernels():
    block = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(5)))
    out = torch.empty(2, 16, 32, 32)
    assert compiled_kernels(block, out, Recompute.NONE, threads=1) == 6
    block.append(nn.Conv2d(16, 16, 1))
    assert compiled_kernels(block, out, Recompute.NONE, threads=1) == 6
    assert compiled_kernels(block, out, Recompute.NONE, threads=2) == 6 + 9
    # A tile of 4 MiB, and a rest.
    wide = torch.empty(2, 16, 512, 512)
    rebuilt = [compiled_kernels(block, one, Recompute.UNITS, threads=2) for one in (out, wide)]
    assert rebuilt == [6 + 3, 6 + 6]


def test_labels_have_no_kernels():
    assert compiled_kernels(nn.Linear(8, 8), torch.empty(2, 8), Recompute.NONE, threads=2) == 0


@pytest.mark.skipif("AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="counted with AVX-512 alone")
def test_kernels_of_a_plain_convolution_are_mapped_as_predicted():
    done = python(
        """
import torch
from pathlib import Path
from torch import nn

def mapped():
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split()
        if fields[1] == "rwxp" and len(fields) < 6:
            start, stop = (int(end, 16) for end in fields[0].split("-"))
            total += stop - start
    return total

def step(conv):
    images = torch.ones(2, conv.in_channels, 24, 24, requires_grad=True)
    conv.to(memory_format=torch.channels_last)
    conv(images.contiguous(memory_format=torch.channels_last)).sum().backward()

step(nn.Conv2d(32, 32, 3, padding=1))
before = mapped()
for channels in (48, 64, 80, 96, 112, 128):
    step(nn.Conv2d(channels, 32, 3, padding=1, bias=False))
print("bytes", mapped() - before)
"""
    )
    assert done.returncode == 0, done.stderr
    (taken,) = re.findall(r"bytes (\d+)", done.stdout)
    out = torch.empty(2, 32, 24, 24)
    predicted = sum(
        compiled_kernels(nn.Conv2d(channels, 32, 3), out, Recompute.NONE, threads=1)
        for channels in (48, 64, 80, 96, 112, 128)
    )
    assert int(taken) == pytest.approx(predicted * KERNEL_BYTES, rel=0.15)
