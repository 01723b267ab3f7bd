"""A card's capacity as a limit that somebody else enforces.

On CUDA torch's allocator refuses what goes beyond a fraction of the card. On the CPU the operating system does:
RLIMIT_DATA bounds what a process may map privately and writably, so a `cpu:8GiB` card is a process that cannot have
more than 8 GiB above what the interpreter held once torch was loaded.

Source: setrlimit(2); since Linux 4.7 RLIMIT_DATA counts private writable mappings.
"""

import errno
import resource
from pathlib import Path

import torch

from memseg.errors import InputError


def limit_memory(device: torch.device, capacity_bytes: int) -> None:
    """Let this process have no more than `capacity_bytes` of the device from now on.

    Call it once torch is loaded and before the model is built.

    Raises:
        InputError: the device has less than that in all.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if capacity_bytes > total:
            raise InputError(f"the plan needs a card of {capacity_bytes} bytes, {device} has {total}")
        torch.cuda.set_per_process_memory_fraction(capacity_bytes / total, device)
        return
    limit = _data_bytes() + capacity_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def lift_memory_limit() -> None:
    """Undo the system's limit, so that a process that ran into it can say so."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def _data_bytes() -> int:
    """What the kernel counts against RLIMIT_DATA now."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmData; memory limits on CPU cards need Linux")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that the device's memory is exhausted."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, torch.OutOfMemoryError | MemoryError):
            return True
        # The second is what a thread says that cannot get its stack.
        if any(sign in str(seen) for sign in ("can't allocate memory", "Resource temporarily unavailable")):
            return True
        if isinstance(seen, OSError) and seen.errno == errno.ENOMEM:
            return True
        seen = seen.__cause__ or seen.__context__
    return False
