"""What a process takes of a GPU beside its tensors.

`nvidia-smi` shows more than torch's allocator holds: the CUDA context, the kernels that were loaded, NCCL's buffers.
None of it can be seen without a GPU, and nothing here has been measured by us: every figure is a report, or a reading
of source code, and says so.

    context     The driver's own state, and local memory for every thread that a card can run at once; so it grows with
                the number of multiprocessors, which a compute capability does not tell. Reports for one generation
                differ by tens of MiB with card and driver.
    kernels     Code and handles of torch, cuDNN and cuBLAS. With lazy loading (CUDA_MODULE_LOADING=LAZY, the default
                since CUDA 12.2, and torch's since 1.13) only kernels that were run are on the card. Loaded eagerly,
                the same libraries took 720 to 1500 MiB with their context (pytorch/pytorch issues 49877 and 55277).
    cuBLAS      A workspace for each handle and stream. torch takes it from its caching allocator, so it is in
                `memory_allocated`, not beside it. Each thread has a handle of its own, and autograd runs backward in
                another thread than forward: two workspaces. cuBLASLt uses the same ones.
    NCCL        Buffers for each channel of a ring.

Left out: what cuDNN takes inside one call (`memseg.profiling.kernels.cuda`), and what other processes and a desktop
hold.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from memseg.errors import InputError
from memseg.planning.cards import parse_capability
from memseg.units import format_bytes

_MIB = 2**20

FORWARD_AND_BACKWARD = 2
"""Threads with a cuBLAS handle: the one that runs forward, and autograd's for the device."""


@dataclass(frozen=True)
class Term:
    """A part of what a process holds on a GPU."""

    name: str
    size_bytes: int
    source: str
    """Where the figure is from, and what was assumed."""
    in_allocator: bool = False
    """Whether torch's allocator counts it: then it is in `memory_allocated`, else only nvidia-smi shows it."""


class Link(StrEnum):
    """How NCCL gets from one GPU of a machine to another."""

    HOST = "host"
    """Through host memory, as between GeForce cards."""
    PCIE = "pcie"
    """Peer to peer over PCI Express."""
    NVLINK = "nvlink"


@dataclass(frozen=True)
class _Context:
    size_bytes: int
    source: str


_CONTEXTS: Mapping[tuple[int, int], _Context] = MappingProxyType(
    {
        (7, 0): _Context(
            319 * _MIB, "reported for a Titan V, PyCUDA without torch's kernels, 2019: pytorch/pytorch issue 28394"
        ),
        (8, 0): _Context(
            341 * _MIB,
            "derived for an A100 with NVLink: 789 MiB beside the allocator in a run of two ranks (pull request 3580 of "
            "meta-pytorch/torchrec), less 288 of NCCL and 160 of kernels as counted here",
        ),
        (8, 6): _Context(
            256 * _MIB, "reported for an RTX 3090, torch 2.7.1, CUDA 12.8, driver 610: invoke-ai/InvokeAI issue 9413"
        ),
        (8, 9): _Context(
            426 * _MIB, "reported for an RTX 6000 Ada, torch 2.10, CUDA 13.0: unslothai/unsloth-zoo pull request 1053"
        ),
    }
)
"""Of a process that has created its context and run no kernel, by compute capability."""

_KERNEL_BYTES = 160 * _MIB
_KERNEL_SOURCE = (
    "reported as 0.16 GiB beyond context and allocator after a forward pass of Llama 3.2 Vision on an H100: "
    "vllm-project/vllm pull request 12126; taken for every card and network"
)

_WORKSPACE_SOURCE = (
    "torch's aten/src/ATen/cuda/CublasHandlePool.cpp: 4096 KiB x 2 + 16 KiB x 8, and 32 MiB for compute capabilities "
    "9.x to 12.x; read in the source and in the machine code of the torch 2.14.1 wheel"
)

_NCCL_SOURCE = (
    "NCCL 2.30's src/init.cc and src/transport/p2p.cc: buffers of 4 MiB (Simple), 4.69 MiB (LL128) and 0.5 MiB (LL), "
    "12 MiB for the two ends of a channel with 2 MiB rounding, as the allocations of 10485760 and 2097152 bytes in "
    "NVIDIA/nccl issue 1685"
)
_CHANNEL_BYTES = 12 * _MIB
_CHANNELS: Mapping[Link, tuple[int, str]] = MappingProxyType(
    {
        Link.HOST: (
            0,
            "the 2 channels seen through host memory (NVIDIA/nccl-tests issue 307) have their buffers there",
        ),
        Link.PCIE: (2, "2 channels, assumed as seen between GPUs without NVLink (NVIDIA/nccl-tests issue 307)"),
        Link.NVLINK: (24, "24 channels seen on A100 and H100 (NVIDIA/nccl-tests issue 100, NVIDIA/nccl issue 1161)"),
    }
)


def context_bytes(compute_capability: str) -> Term:
    """The CUDA context of one process, before any kernel has run.

    Args:
        compute_capability: As in CUDA's documentation, "8.6". Of one without a report, the nearest that has one is
            taken, the older of two as near, and the source says so.

    Raises:
        InputError: not a compute capability.

    >>> context_bytes("8.6").size_bytes // 2**20
    256
    """
    wanted = parse_capability(compute_capability)
    nearest = min(_CONTEXTS, key=lambda known: (abs(_number(known) - _number(wanted)), known))
    context = _CONTEXTS[nearest]
    known_as = "" if nearest == wanted else f"no report for {compute_capability}; nearest known is {_text(nearest)}: "
    return Term("CUDA context", context.size_bytes, f"{known_as}{context.source}; not measured by us")


def kernel_bytes() -> Term:
    """Kernels and handles of torch, cuDNN and cuBLAS, loaded lazily."""
    return Term("kernels", _KERNEL_BYTES, f"{_KERNEL_SOURCE}; not measured by us")


def cublas_workspace_bytes(
    compute_capability: str, *, threads: int = FORWARD_AND_BACKWARD, config: str | None = None
) -> Term:
    """cuBLAS workspaces that stay allocated once a training step has run matrix products.

    A network without matrix products (convolutions are not, on a GPU) has none.

    Args:
        compute_capability: As in CUDA's documentation.
        threads: That run matrix products; each on one stream.
        config: The environment's CUBLAS_WORKSPACE_CONFIG, if it is set.

    Raises:
        InputError: not a compute capability, or not a configuration.

    >>> cublas_workspace_bytes("8.0").size_bytes, cublas_workspace_bytes("9.0").size_bytes
    (17039360, 67108864)
    """
    major, _ = parse_capability(compute_capability)
    size, source = (32 * _MIB if 9 <= major <= 12 else 4096 * 1024 * 2 + 16 * 1024 * 8), _WORKSPACE_SOURCE
    if config is not None:
        size, source = _configured_bytes(config), f"CUBLAS_WORKSPACE_CONFIG={config}"
    return Term(
        "cuBLAS workspaces",
        threads * size,
        f"{format_bytes(size)} for each of {threads} threads; {source}; not measured by us",
        in_allocator=True,
    )


def nccl_bytes(world_size: int, link: Link = Link.NVLINK) -> Term:
    """Buffers of one NCCL communicator, for all-reduce in a ring, on one card.

    A second communicator takes as much again. Trees between more than two cards, NVLink SHARP, networks between
    machines and send/receive connect more and are not counted, nor are NCCL's kernels: 544 MB for 2 and 688 MB for 4
    A100 were seen in 2023 (NVIDIA/nccl issue 964).

    Args:
        world_size: Ranks in the communicator.
        link: Between the cards.

    Raises:
        InputError: `world_size` is less than 1.

    >>> nccl_bytes(2).size_bytes // 2**20, nccl_bytes(1).size_bytes
    (288, 0)
    """
    if world_size < 1:
        raise InputError(f"world_size must be at least 1, got {world_size}")
    if world_size == 1:
        return Term("NCCL buffers", 0, "a single rank has nobody to talk to")
    channels, seen = _CHANNELS[link]
    return Term("NCCL buffers", channels * _CHANNEL_BYTES, f"{seen}; {_NCCL_SOURCE}; not measured by us")


def device_terms(compute_capability: str, *, world_size: int = 1, link: Link = Link.NVLINK) -> tuple[Term, ...]:
    """All of it for one training process; those with `in_allocator` are part of the allocator's own figures.

    Args:
        compute_capability: As in CUDA's documentation.
        world_size: Processes that train together.
        link: Between their cards.

    Raises:
        InputError: not a compute capability, or `world_size` is less than 1.
    """
    nccl = nccl_bytes(world_size, link)
    return (
        context_bytes(compute_capability),
        kernel_bytes(),
        cublas_workspace_bytes(compute_capability),
        *([nccl] if world_size > 1 else []),
    )


def _configured_bytes(config: str) -> int:
    """What torch makes of CUBLAS_WORKSPACE_CONFIG: pairs of KiB and count."""
    if not re.fullmatch(r"(?::[0-9]+:[0-9]+)+", config):
        raise InputError(
            f"CUBLAS_WORKSPACE_CONFIG must be pairs of :KIBIBYTES:COUNT, got {config!r}; try :4096:2:16:8 or :4096:8"
        )
    return sum(int(size) * 1024 * int(count) for size, count in re.findall(r":([0-9]+):([0-9]+)", config))


def _number(capability: tuple[int, int]) -> int:
    major, minor = capability
    return 10 * major + minor


def _text(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
