"""The element-wise chains of the layers, each over one band: as ATen calls, or fused by torch.compile on request.

Eager, every call below passes once over a band that stays in a processor's caches. `fused_kernels(True)` compiles the
same functions, so that a chain is one pass; it needs what torch.compile needs (a C++ compiler on CPUs, Triton on GPUs).
Bands of all sizes share a kernel, but dtypes do not, nor do bands that lie in one piece and slices of wider ones.

A result is written to `out=` where that saves a pass, and copied there where the compiler, which refuses an `out=` that
is not contiguous, makes one pass of both.

Bands are (..., C), per-channel numbers (C,). Maps may be in half precision; per-channel numbers, sums and the
arithmetic between them are then in float32.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

_aten = torch.ops.aten


def _norm_relu(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    if out.dtype == scale.dtype and not is_compiling():
        torch.addcmul(shift, x, scale, out=out).relu_()
    else:
        out.copy_(torch.addcmul(shift, x.to(scale.dtype), scale).relu_())


def _centre_norm_relu(
    x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, centred: Tensor, normalised: Tensor
) -> None:
    torch.sub(x, mean, out=centred)
    _norm_relu(centred, scale, bias, normalised)


def _mask(grad: Tensor, normalised: Tensor, out: Tensor) -> None:
    _aten.threshold_backward.grad_input(grad, normalised, 0, grad_input=out)


def _spread(
    grad: Tensor, normalised: Tensor, centred: Tensor | None, scale: Tensor, sums: Tensor | None, to: Tensor, add: bool
) -> None:
    _mask(grad, normalised, grad)
    wide = grad if grad.dtype == scale.dtype else grad.to(scale.dtype)
    if sums is not None and centred is not None:
        sums += _moments(wide, centred)
    if wide is not grad:
        to.add_(wide.mul_(scale)) if add else to.copy_(wide.mul_(scale))
    elif add:
        to.addcmul_(grad, scale)
    else:
        torch.mul(grad, scale, out=to)


def _moments(grad: Tensor, x: Tensor, mean: Tensor | None = None) -> Tensor:
    channels = grad.shape[-1]
    wide = grad.dtype if grad.dtype == torch.float64 else torch.float32
    ones, zeros = (grad.new_full((channels,), value, dtype=wide) for value in (1, 0))
    # The part of batch norm's backward that sums, with a standard deviation of 1.
    _, moment, total = _aten.native_batch_norm_backward(
        _as_map(grad),
        _as_map(x),
        ones,
        None,
        None,
        zeros if mean is None else mean,
        ones,
        True,
        0.0,
        [False, True, True],
    )
    return torch.stack([total, moment])


def _as_map(x: Tensor) -> Tensor:
    """Contiguous (..., C) as channels-last (1, C, M, 1)."""
    return x.reshape(-1, x.shape[-1]).t()[None, :, :, None]


def _complete(grad: Tensor, x: Tensor, scale: Tensor, constant: Tensor, slope: Tensor) -> None:
    line = torch.addcmul(constant, x.to(slope.dtype), slope)
    if grad.dtype == scale.dtype:
        torch.addcmul(line, grad, scale, out=grad)
    else:
        grad.copy_(line.addcmul_(grad.to(scale.dtype), scale))


_EAGER: dict[str, Callable[..., Any]] = {
    "norm_relu": _norm_relu,
    "centre_norm_relu": _centre_norm_relu,
    "mask": _mask,
    "moments": _moments,
    "spread": _spread,
    "complete": _complete,
}
_chains = dict(_EAGER)
_MOST_KERNELS = 64
"""Of each chain: torch's own limit of 8 is passed by layers of several dtypes."""


def fused_kernels(enabled: bool = True) -> None:
    """From now on, in this process, the layers' element-wise chains run fused by torch.compile, or eager again.

    The first use of each chain compiles it, which takes some seconds; results agree to rounding.
    """
    for name, chain in _EAGER.items():
        _chains[name] = _fused(chain) if enabled else chain


def _fused(chain: Callable[..., Any]) -> Callable[..., Any]:
    # One over the limit runs eager.
    # The keyword is in torch.compile's documentation and not in its overloads.
    compiled = torch.compile(chain, dynamic=True, recompile_limit=_MOST_KERNELS)  # type: ignore[call-overload]

    def run(*arguments: Any) -> Any:
        try:
            matrices = [_as_matrix(x) if isinstance(x, Tensor) else x for x in arguments]
        except RuntimeError:  # Rows that lie apart, as those that pooling reads of a map of odd width.
            return chain(*arguments)
        return compiled(*matrices)

    return run


def _as_matrix(x: Tensor) -> Tensor:
    """(..., C) as (M, C), so that bands of one image, of several and of pixels share kernels.

    A tensor of its own on the same memory: of a parameter each size would be compiled for itself, and of a view what
    lies around it matters.
    """
    return x.view(-1, x.shape[-1]).data if x.dim() > 2 else x.data


def _run(name: str, *arguments: Any) -> Any:
    with torch.no_grad():
        return _chains[name](*arguments)


def norm_relu(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """out = relu(scale * x + shift); `out` may be x."""
    _run("norm_relu", x, scale, shift, out)


def centre_norm_relu(
    x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, *, centred: Tensor, normalised: Tensor
) -> None:
    """centred = x - mean, in the dtype of the mean, and normalised = relu(scale * centred + bias)."""
    _run("centre_norm_relu", x, mean, scale, bias, centred, normalised)


def mask(grad: Tensor, normalised: Tensor, out: Tensor) -> None:
    """ReLU's backward: out = grad where `normalised` is positive, else 0; `out` may be `grad`."""
    _run("mask", grad, normalised, out)


def moments(grad: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """What batch norm's backward sums: sum(grad) and sum(grad * (x - mean)) as (2, C), of contiguous bands."""
    found: Tensor = _run("moments", grad, x, mean)
    return found


def spread(
    grad: Tensor,
    normalised: Tensor,
    scale: Tensor,
    *,
    to: Tensor,
    add: bool,
    centred: Tensor | None,
    sums: Tensor | None,
) -> None:
    """`grad` masked in place, then scale * grad written to `to`, or added to it.

    With `centred` = x - mean and `sums` (2, C), the masked gradient's moments are added to the sums.
    """
    _run("spread", grad, normalised, centred, scale, sums, to, add)


def complete(grad: Tensor, x: Tensor, scale: Tensor, constant: Tensor, slope: Tensor) -> None:
    """grad = scale * grad + constant + slope * x, in place."""
    _run("complete", grad, x, scale, constant, slope)
