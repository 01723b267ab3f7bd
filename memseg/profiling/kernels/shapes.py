"""Operators of which a trace makes the outputs itself, instead of running them on tensors without memory.

For most operators torch knows shapes and types of the outputs without computing. A few it knows only by a decomposition
into other operators: a trace would see allocations that no kernel makes, and spend most of its time on them. One has no
kernel for the meta device at all, and one leaves out what it keeps for backward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from memseg.profiling.kernels.lstm import lstm_layer
from memseg.profiling.kernels.shortcuts import shortcut

_aten = torch.ops.aten


def run_by_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operator returns, on tensors without memory."""
    make = _OUTPUTS.get(func.overloadpacket)
    if make is not None and _is_without_memory(args[0]):
        return make(*args, **kwargs)
    short = shortcut(func)
    out = NotImplemented if short is None else short(func, args, kwargs)
    return func(*args, **kwargs) if out is NotImplemented else out


def _is_without_memory(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor) or tensor.is_meta


def _statistics_dtype(x: Tensor, weight: Tensor | None) -> torch.dtype:
    """Of the mean and the deviation that a norm keeps."""
    return x.dtype if weight is None else weight.dtype


def _normed(x: Tensor) -> Tensor:
    """A map of one pixel lies in both layouts; a norm takes it for contiguous, and so does all that comes after it."""
    return torch.empty_like(x, memory_format=torch.contiguous_format if x.is_contiguous() else torch.preserve_format)


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = x.shape[1] if training else 0
    dtype = _statistics_dtype(x, weight)
    return _normed(x), x.new_empty(kept, dtype=dtype), x.new_empty(kept, dtype=dtype)


def _norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    save_mean: Tensor | None,
    save_invstd: Tensor | None,
    train: bool,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    dtype = _statistics_dtype(x, weight)
    of_input, *of_affine = output_mask
    return (
        _normed(x) if of_input else None,
        *(x.new_empty(x.shape[1], dtype=dtype) if wanted else None for wanted in of_affine),
    )


def _layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = (*x.shape[: x.dim() - len(shape)], *[1] * len(shape))
    dtype = _statistics_dtype(x, weight)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, x.new_empty(rows, dtype=dtype), x.new_empty(rows, dtype=dtype)


def _update_stats(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    dtype = _statistics_dtype(x, running_mean)
    return x.new_empty(x.shape[1], dtype=dtype), x.new_empty(x.shape[1], dtype=dtype)


def _loss(x: Tensor, target: Tensor, reduction: int = 1, *_: Any) -> Tensor:
    """Its sum or mean is a number in a storage as large as the input: it is made whole, and then resized."""
    whole = torch.empty_like(x)
    return whole.as_strided((), ()) if reduction else whole


def _binary_cross_entropy(x: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = 1) -> Tensor:
    return _loss(x, target, reduction)


def _upsample(x: Tensor, size: list[int], *_: Any) -> Tensor:
    layout = suggest_memory_format(x)
    return torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=layout)


_OUTPUTS: dict[Any, Callable[..., Any]] = {
    _aten.native_batch_norm: _norm,
    _aten.native_batch_norm_backward: _norm_backward,
    _aten.batch_norm_update_stats: _update_stats,
    _aten.native_layer_norm: _layer_norm,
    _aten.mse_loss: _loss,
    _aten.smooth_l1_loss: _loss,
    _aten.binary_cross_entropy: _binary_cross_entropy,
    _aten.upsample_bilinear2d: _upsample,
    _aten.mkldnn_rnn_layer: lstm_layer,
}
