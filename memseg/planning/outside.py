"""What a CPU process takes beside the allocator's count: what a card must have room for beyond a plan's peak.

A `cpu:2GiB` card is a process under RLIMIT_DATA, and the system counts whatever is mapped privately and writably, of
which torch's allocator knows only tensors. Each cause is a term of its own, and each figure is a size that a library or
the system has fixed, or was measured over networks and image sizes and says so.

    kernels    Machine code that oneDNN has compiled, 256 KiB for each kernel; `memseg.profiling.kernels.compiled`
               counts them.
    stacks     Every thread that is started after the limit is set maps a stack: OpenMP's workers, those of a loader.
    products   Buffers in which MKL packs operands of matrix products; it keeps those of each thread.
    python     What the interpreter imports and makes once training begins.
    heap       Holes. Blocks below the mmap threshold come from a heap that grows at its end, and only the end is ever
               given back. A request finds no hole that is large enough where the blocks around one live on, and glibc
               before 2.38 asks for more than it needs where memory is to be aligned, so that a hole does not even take
               what it was freed of.

oneDNN's scratchpads are not among them: torch has oneDNN take them from its own allocator (`attr-scratchpad:user` in
oneDNN's log), so they are in the peak. Nor are threads and buffers of gloo, which exist before the limit is set; what a
collective takes after that was below what can be told from the heap.

The heap's holes cannot be predicted. With a threshold of 16 MiB one command left about 80 and about 300 MiB
(ladder-densenet121, 2 images of 512x1024, nothing rebuilt, 2 threads); 45 to 195 were usual. With one of 1 MiB there
were at most 45 MiB in any of 8 processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from memseg.planning.costs import SegmentCost

KERNEL_BYTES = 256 * 2**10
"""Of the mapping of one of oneDNN's kernels, whatever the length of its code: jit_generator.hpp, MAX_CODE_SIZE."""
SHARED_KERNELS = 32
"""Once in each process: a table of matrix products that the gradient of the stem's weight makes use of, and the
engine's own."""
_PACKING_BYTES = 20 * 2**20
"""MKL's, of one of several threads: 32 to 45 MiB for two, where backward multiplies matrices, with maps of 256x512 and
512x1024 images; nothing that could be seen with one thread. torch 2.14.1."""
_PYTHON_BYTES = 4 * 2**20
"""3 MiB in blocks and 1 MiB in maps of its own, in every run."""
_HOLES = 8
"""Each smaller than the mmap threshold: else the request that made the heap grow would have found it. How many is an
allowance, not derived: the middle of what 24 processes left with 16 MiB, of which most had 3 to 12 and one had 19."""


@dataclass(frozen=True)
class Process:
    """What decides about it, beside the segments: how the processes of a run are started."""

    threads: int
    """OMP_NUM_THREADS; costs were found with as many."""
    stack_bytes: int
    """Of one thread: RLIMIT_STACK."""
    mmap_threshold_bytes: int
    """MALLOC_MMAP_THRESHOLD_."""
    loader_threads: int = 0
    """That a data loader starts in the process."""


@dataclass(frozen=True)
class Outside:
    """Bytes of one process that its allocator does not count, by cause."""

    kernels_bytes: int
    stacks_bytes: int
    products_bytes: int
    python_bytes: int
    heap_bytes: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.kernels_bytes + self.stacks_bytes + self.products_bytes + self.python_bytes + self.heap_bytes


def outside_bytes(segments: Sequence[SegmentCost], process: Process, levels: Sequence[int] | None = None) -> Outside:
    """What a process that trains some segments takes beside the allocator's peak.

    Args:
        segments: On the card.
        process: How it is started.
        levels: Of each segment, a position in its `levels`; None where they are not chosen yet, for those that take
            the most.
    """
    if levels is None:
        chosen = [segment.levels for segment in segments]
    else:
        chosen = [(segment.levels[level],) for segment, level in zip(segments, levels, strict=True)]
    kernels = SHARED_KERNELS + sum(max(level.compiled_kernels for level in each) for each in chosen)
    multiplies = process.threads > 1 and any(level.recompute != "none" for each in chosen for level in each)
    return Outside(
        kernels_bytes=kernels * KERNEL_BYTES,
        stacks_bytes=(process.threads - 1 + process.loader_threads) * process.stack_bytes,
        products_bytes=process.threads * _PACKING_BYTES if multiplies else 0,
        python_bytes=_PYTHON_BYTES,
        heap_bytes=_HOLES * process.mmap_threshold_bytes,
    )
