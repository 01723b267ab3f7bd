"""A Precision as torch has it: a type of parameters, and a context to compute in."""

from contextlib import AbstractContextManager, nullcontext

import torch

from memseg.levels import Precision


def parameter_dtype(precision: Precision) -> torch.dtype:
    """Of parameters, and of the images that are fed.

    >>> parameter_dtype(Precision.BFLOAT16)
    torch.float32
    """
    dtype: torch.dtype = getattr(torch, precision.parameters)
    return dtype


def computing(precision: Precision, device: str) -> AbstractContextManager[object]:
    """The context of forward and loss, not of backward.

    Args:
        precision: Half precisions are autocast.
        device: Type of the device, "cpu" or "cuda".
    """
    return torch.autocast(device, getattr(torch, precision)) if precision.is_half else nullcontext()
