"""What measured figures depend on: the machine and the software, as a result tells them."""

import os
import platform
from pathlib import Path

import torch
import torchvision

import memseg


def processor_name() -> str:
    """The CPU's name where the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: torch.device | None = None) -> dict[str, str | int]:
    """What figures depend on, but for the software.

    Args:
        device: That they were measured on; None for the CPU.
    """
    if device is not None and device.type == "cuda":
        return {"processor": torch.cuda.get_device_name(device)}
    return {
        "processor": processor_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str]:
    """The software that figures depend on."""
    return {
        "memseg": memseg.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
