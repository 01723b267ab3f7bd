"""What a step computes otherwise on a CUDA card, for traces that run on fake CPU tensors.

Fake CUDA tensors cannot run backward where there is no CUDA. Fake CPU ones can, and most operators keep the same
tensors on both. Where they do not, the CUDA way is put in their place, at the dispatcher, so that calls from inside
other operators are met too:

    dropout                         on the CPU a mask of the input's type; on CUDA native_dropout's, one byte a value
    scaled_dot_product_attention    with dropout the CPU keeps the whole matrix of weights; the fused kernels on CUDA
                                    keep output and logsumexp, and draw the mask again
    under autocast: softmax, log_softmax, layer_norm and group_norm (so cross_entropy too) compute in float32 on CUDA
    optimizers                      foreach is the default on CUDA, the loop on the CPU

Source: torch 2.14.1, aten/src/ATen/native/Dropout.cpp (is_fused_kernel_acceptable), native/transformers/attention.cpp,
autocast_mode.h (AT_FORALL_FP32), torch/optim/optimizer.py (_default_to_fused_or_foreach). Which attention kernel a real
card takes depends on its architecture; that it is a fused one is an assumption.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from memseg.levels import Precision

_aten = torch.ops.aten


@contextmanager
def cuda_semantics(precision: Precision) -> Iterator[None]:
    """Inside, operators on CPU tensors keep what they would keep on CUDA."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("dropout", _dropout, "AutogradCPU")
        library.impl("scaled_dot_product_attention", _attention, "AutogradCPU")
        if precision.is_half:
            for name in ("softmax.int", "log_softmax.int"):
                library.impl(name, _in_float32(getattr(_aten, name.partition(".")[0]).int), "AutocastCPU")
            for name in ("layer_norm", "group_norm"):
                library.impl(name, _in_float32(getattr(_aten, name).default), "AutocastCPU")
        yield


def foreach_by_default(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer take the kernels that it would choose for parameters on CUDA."""
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True


def _dropout(images: Tensor, p: float, train: bool) -> Tensor:
    if not train or p == 0 or images.numel() == 0:
        return images
    dropped: Tensor = _aten.native_dropout(images, p, train)[0]
    return dropped


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (tensor.repeat_interleave(groups, -3) for tensor in (key, value))
    if value.shape[-1] != query.shape[-1]:
        out: Tensor = _aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale
        )[0]
        return out
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
    shape = query.shape
    query, key, value = (
        tensor.reshape(-1, *tensor.shape[-3:]) if tensor.dim() > 4 else tensor for tensor in (query, key, value)
    )
    missing = 4 - query.dim()
    for _ in range(missing):
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    out = _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return out.reshape(*shape[:-1], value.shape[-1])


def _in_float32(operator: Any) -> Any:
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            wide = [
                arg.float() if isinstance(arg, Tensor) and arg.is_floating_point() and arg.itemsize == 2 else arg
                for arg in args
            ]
            return operator(*wide, **kwargs)

    return run
