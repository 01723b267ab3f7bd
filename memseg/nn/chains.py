"""The element-wise chains of the layers, each over one band: as ATen calls, or fused by torch.compile on request.

Eager, every call below passes once over a band that stays in a processor's caches. `fused_kernels(True)` compiles the
same functions, each once for all shapes, so that a chain is one pass; it needs what torch.compile needs (a C++ compiler
on CPUs, Triton on GPUs).

Bands are (..., C), per-channel numbers (C,). Maps may be in half precision; per-channel numbers, sums and the
arithmetic between them are then in float32.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


def _norm_relu(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    if out.dtype == scale.dtype:
        torch.addcmul(shift, x, scale, out=out).relu_()
    else:
        out.copy_(torch.addcmul(shift, x.to(scale.dtype), scale).relu_())


def _mask_and_sum(grad: Tensor, normalised: Tensor, x: Tensor, mean: Tensor, sums: Tensor | None) -> None:
    _aten.threshold_backward.grad_input(grad, normalised, 0, grad_input=grad)
    if sums is None:
        return
    bands = list(range(grad.dim() - 1))
    if grad.dtype == mean.dtype:
        moment = torch.sub(x, mean, out=normalised).mul_(grad)
        sums[0] += grad.sum(bands)
    else:
        wide = grad.to(mean.dtype)
        moment = (x.to(mean.dtype) - mean).mul_(wide)
        sums[0] += wide.sum(bands)
    sums[1] += moment.sum(bands)


def _spread(
    grad: Tensor, normalised: Tensor, x: Tensor, scale: Tensor, mean: Tensor, sums: Tensor | None, to: Tensor, add: bool
) -> None:
    _mask_and_sum(grad, normalised, x, mean, sums)
    if grad.dtype != scale.dtype:
        scaled = grad.to(scale.dtype).mul_(scale)
        to.add_(scaled) if add else to.copy_(scaled)
    elif add:
        to.addcmul_(grad, scale)
    else:
        torch.mul(grad, scale, out=to)


def _complete(grad: Tensor, x: Tensor, scale: Tensor, constant: Tensor, slope: Tensor) -> None:
    if grad.dtype == scale.dtype:
        grad.mul_(scale).add_(constant).addcmul_(x, slope)
    else:
        grad.copy_(grad.to(scale.dtype).mul_(scale).add_(constant).addcmul_(x.to(scale.dtype), slope))


_EAGER: dict[str, Callable[..., None]] = {
    "norm_relu": _norm_relu,
    "mask_and_sum": _mask_and_sum,
    "spread": _spread,
    "complete": _complete,
}
_chains = dict(_EAGER)


def fused_kernels(enabled: bool = True) -> None:
    """From now on, in this process, the layers' element-wise chains run fused by torch.compile, or eager again.

    The first use of each chain compiles it, which takes some seconds; results agree to rounding.
    """
    for name, chain in _EAGER.items():
        _chains[name] = torch.compile(chain, dynamic=True, fullgraph=True) if enabled else chain


def _run(name: str, *arguments: Any) -> None:
    with torch.no_grad():
        _chains[name](*arguments)


def norm_relu(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """out = relu(scale * x + shift); `out` may be x."""
    _run("norm_relu", x, scale, shift, out)


def mask_and_sum(grad: Tensor, normalised: Tensor, x: Tensor, mean: Tensor, sums: Tensor | None) -> None:
    """ReLU's backward in place, and what batch norm's needs of it.

    Args:
        grad: Zeroed where `normalised` is not positive.
        normalised: relu(bn(x)); overwritten.
        x: What was normalised.
        mean: Of x.
        sums: (2, C), to which sum(grad) and sum(grad * (x - mean)) are added; None where nobody needs them.
    """
    _run("mask_and_sum", grad, normalised, x, mean, sums)


def spread(
    grad: Tensor,
    normalised: Tensor,
    x: Tensor,
    scale: Tensor,
    mean: Tensor,
    sums: Tensor | None,
    *,
    to: Tensor,
    add: bool,
) -> None:
    """`mask_and_sum`, then scale * grad written to `to`, or added to it."""
    _run("spread", grad, normalised, x, scale, mean, sums, to, add)


def complete(grad: Tensor, x: Tensor, scale: Tensor, constant: Tensor, slope: Tensor) -> None:
    """grad = scale * grad + constant + slope * x, in place."""
    _run("complete", grad, x, scale, constant, slope)
