"""What every autograd node of ours shares: it runs outside autocast, in a dtype it is told, and backward goes once."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

HALF_DTYPES = (torch.float16, torch.bfloat16)
_TWICE = (
    "trying to differentiate twice a function of memseg's, whose backward is marked with @once_differentiable; "
    "layers at level none can be, if their norms are not synced"
)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that convolutions of x would compute in: that of autocast where it is on, else x's own."""
    device = x.device.type
    if is_autocast_on(device) and x.dtype in (torch.float32, *HALF_DTYPES):
        return torch.get_autocast_dtype(device)
    return x.dtype


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, sums and per-channel numbers: float32, or float64 where maps are in float64.

    >>> wide_dtype(torch.bfloat16)
    torch.float32
    """
    return torch.float32 if dtype in HALF_DTYPES else dtype


def is_autocast_on(device: str) -> bool:
    """Whether autocast is on for a type of device; there are such without any, as "meta"."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Inside, operations compute in the dtypes of what they are given."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that computes without a graph of its own, outside autocast.

    A gradient that is asked to be differentiable (`create_graph=True`) is refused when it is differentiated. torch's
    decorator of this name lets one through, as a constant, where the gradient it came from needs none, as in
    `grad(out.sum(), x, create_graph=True)`: a penalty on it would then train nothing, in silence.
    """

    @wraps(backward)
    def once(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad(), without_autocast(grads[0].device.type):
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        refuse = torch._C._functions.DelayedError(_TWICE, len(found))
        marked = [None if grad is None else grad.detach().requires_grad_() for grad in found]
        return refuse(*cast(list[Tensor], marked))

    return once


def is_traced() -> bool:
    """Whether a tracer or exporter records (torch.jit.trace, torch.fx, torch.export): it wants plain operations."""
    by_jit = torch._C._get_tracing_state() is not None
    return by_jit or torch.compiler.is_exporting() or is_fx_symbolic_tracing()


def check_dtypes(x: Tensor, weight: Tensor) -> None:
    """Do nothing where a map and a weight can be convolved, as torch itself would judge.

    Raises:
        RuntimeError: their dtypes differ outside autocast.
    """
    if x.dtype != weight.dtype and not is_autocast_on(x.device.type):
        raise RuntimeError(
            f"input and weights must have the same dtype outside autocast, got {x.dtype} and {weight.dtype}"
        )


def check_shapes(inputs: Sequence[Tensor], channels: int) -> None:
    """Do nothing where the inputs are maps of equally many images, and have so many channels together.

    Raises:
        RuntimeError: they are not, or have not; broadcasting would make something of many such inputs.
    """
    are_maps = all(x.dim() == 4 and x.shape[0] == inputs[0].shape[0] for x in inputs)
    if not are_maps or sum(x.shape[1] for x in inputs) != channels:
        found = " and ".join(str(tuple(x.shape)) for x in inputs)
        raise RuntimeError(f"input must be (N, C, H, W) with {channels} channels, got {found}")


def refuse_scripting(module: torch.nn.Module) -> None:
    """Raise the one clear error of torch.jit.script.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        f"{type(module).__name__} cannot be compiled by torch.jit.script, as its backward is written in Python; "
        "use torch.export or torch.compile, or torch.jit.trace in eval mode"
    )
