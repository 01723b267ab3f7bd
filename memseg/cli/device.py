"""Which device a subcommand runs a network on."""

import torch

from memseg.errors import InputError


def choose_device(text: str | None) -> torch.device:
    """A device of this machine by its name; without one, the first CUDA device or else the CPU.

    Raises:
        InputError: this machine has no such device.
    """
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    known = ["cpu", *(["cuda", *cuda] if cuda else [])]
    if text is not None and text not in known:
        raise InputError(f"--device must name a device of this machine ({', '.join(known)}), got {text!r}; try cpu")
    return torch.device(text or ("cuda" if cuda else "cpu"))
