"""Memory that an operation takes while it runs: not a tensor of ours, but allocated all the same.

A trace sees what an operation returns. This module knows what its kernel allocates beside that, and where a fake
operation returns something else than the real one. One file for each family of kernels knows the details.
"""

from typing import Any

from memseg.profiling.kernels.aten import torch_kernel_workspace
from memseg.profiling.kernels.convolution import cpu_convolution_workspace
from memseg.profiling.kernels.cuda import cuda_workspace
from memseg.profiling.kernels.transient import Transient

__all__ = ["Transient", "kernel_workspace"]


def kernel_workspace(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: str) -> list[Transient]:
    """What a kernel allocates beside its outputs, in order; nothing for kernels that take nothing.

    Args:
        func: The operator (an overload of torch.ops.aten).
        args: Its positional arguments.
        kwargs: Its arguments by name.
        device: "cpu" or "cuda", where the operation would run.
    """
    if device != "cpu":
        return cuda_workspace(func, args)
    return cpu_convolution_workspace(func, args) or torch_kernel_workspace(func, args, kwargs)
