"""What torch's own CPU kernels allocate while they run, beside their outputs: copies, casts and per-thread sums.

A kernel that is written for maps in one layout first copies what lies otherwise. Arithmetic on two types first casts
the narrower operand as a whole. Means of bfloat16 are taken of a float32 copy. Per-channel sums go through a buffer
with a row for each thread.

Each rule was read off the allocator's own events (torch 2.14.1; tests/profiling/kernels/test_workspace_kernels.py
repeats it) and names the source that explains it, below pytorch's aten/src/ATen/native/.
"""

from collections.abc import Callable
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from memseg.nn.autograd import HALF_DTYPES
from memseg.profiling.kernels.lstm import lstm_backward, lstm_forward
from memseg.profiling.kernels.transient import Ledger, Transient

_aten = torch.ops.aten
_Rule = Callable[..., list[Transient]]

_PROMOTING = {
    getattr(_aten, name + suffix)
    for name in ("add", "sub", "mul", "div", "addcmul", "addcdiv", "lerp")
    for suffix in ("", "_")
} | {_aten.threshold_backward, _aten.maximum, _aten.minimum, _aten.eq, _aten.ne, _aten.lt, _aten.le, _aten.gt, _aten.ge}


def torch_kernel_workspace(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Transient]:
    """What one of torch's own CPU kernels allocates beside its outputs; nothing for those that are not known.

    Args:
        func: The operator (an overload of torch.ops.aten).
        args: Its positional arguments.
        kwargs: Its arguments by name.
    """
    packet = func.overloadpacket
    if packet in _PROMOTING:
        return _casts(func, args, kwargs)
    rule = _RULES.get(packet)
    return rule(*args, **kwargs) if rule is not None else []


def _casts(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Transient]:
    """TensorIterator.cpp, compute_types: operands of another type than the common one are cast as a whole.

    What is written in place, or given to be written, is computed in a tensor of the common type first.
    """
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    written = {one.name for one in func._schema.arguments if one.alias_info is not None and one.alias_info.is_write}
    read = [value for name, value in given.items() if isinstance(value, Tensor) and name not in written & kwargs.keys()]
    common = reduce(_promoted, (tensor.dtype for tensor in read if tensor.dim()), torch.bool)
    operands = [*read, *(given[name] for name in written if name in given)]
    cast = sum(one.numel() * common.itemsize for one in operands if one.dim() and one.dtype != common)
    return [Transient(0, cast), Transient(1, cast)] if cast else []


@cache
def _promoted(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """torch.promote_types, which under a fake mode is an operation like all others."""
    return torch.promote_types(first, second)


def _batch_norm_backward(
    grad: Tensor, x: Tensor, weight: Any, _m: Any, _v: Any, _sm: Any, _sv: Any, train: bool, _eps: float, wanted: Any
) -> list[Transient]:
    """Normalization.cpp: the fast path makes the gradient of the input anew before it drops the first one."""
    made = sum(wanted)
    ledger = _after(made)
    channels = x.shape[1]
    layout = suggest_memory_format(x)
    if not (_lies(x, layout) and _lies(grad, layout)):
        return []
    if wanted[0]:
        ledger.pass_by(_bytes(x))
    if layout is not torch.contiguous_format and layout is not None:
        wide = 4 if x.dtype in HALF_DTYPES else x.element_size()
        ledger.pass_by((2 * torch.get_num_threads() + (3 if x.dtype in HALF_DTYPES else 0)) * channels * wide)
    return ledger.transients()


def _layer_norm(x: Tensor, *_: Any) -> list[Transient]:
    """layer_norm.cpp: rows are read as they lie, else from a copy."""
    return _held(0 if x.is_contiguous() else _bytes(x), outputs=3)


def _layer_norm_backward(
    grad: Tensor, x: Tensor, shape: list[int], _mean: Tensor, _rstd: Tensor, _w: Any, _b: Any, wanted: Any
) -> list[Transient]:
    """layer_norm.cpp and layer_norm_kernel.cpp: copies of both, and sums of two gradients for each thread."""
    ledger = Ledger()
    ledger.take(0 if x.is_contiguous() else _bytes(x))
    for _ in range(sum(wanted)):
        ledger.make()
    ledger.take(0 if grad.is_contiguous() else _bytes(grad))
    columns = torch.Size(shape).numel()
    if wanted[1] or wanted[2]:
        ledger.take(2 * torch.get_num_threads() * columns * x.element_size())
    return ledger.transients()


def _softmax(x: Tensor, *_: Any) -> list[Transient]:
    """SoftMax.cpp: of a contiguous copy."""
    return _after_outputs(1, 0 if x.is_contiguous() else _bytes(x))


def _safe_softmax(x: Tensor, dim: int, *_: Any, **__: Any) -> list[Transient]:
    """SoftMax.cpp: beside the softmax, which values are masked, and which rows are so as a whole."""
    return _after_outputs(1, x.numel(), x.numel() // x.shape[dim])


def _softmax_backward(grad: Tensor, output: Tensor, *_: Any) -> list[Transient]:
    """SoftMax.cpp: of contiguous copies."""
    return _after_outputs(1, *(0 if one.is_contiguous() else _bytes(one) for one in (grad, output)))


def _mean(x: Tensor, *_: Any, dtype: torch.dtype | None = None) -> list[Transient]:
    """ReduceOps.cpp: means of half-precision values are sums of a float32 copy."""
    if (dtype or x.dtype) not in HALF_DTYPES:
        return _sum(x, dtype=dtype)
    return _after_outputs(1, x.numel() * 4)


def _sum(x: Tensor, *_: Any, dtype: torch.dtype | None = None) -> list[Transient]:
    """ReduceOps.cpp, make_reduction: of a copy in the type asked for."""
    wide = dtype or (x.dtype if x.dtype.is_floating_point else torch.int64)
    return _after_outputs(1, 0 if wide == x.dtype else x.numel() * wide.itemsize)


def _roll(x: Tensor, shifts: Any, dims: Any = ()) -> list[Transient]:
    """TensorTransformations.cpp: over several dimensions, one after the other."""
    return _held(_bytes(x) if len(dims) != 1 else 0, outputs=1)


def _upsample(x: Tensor, output_size: list[int], *_: Any, **__: Any) -> list[Transient]:
    """UpSampleKernel.cpp: channels-last maps, and small ones of up to 128 rows and columns together, are made so."""
    channels_last = torch.channels_last
    lies_last = x.is_contiguous(memory_format=channels_last)
    if not (lies_last and x.shape[1] > 3) and sum(output_size) > 128:
        # For each row and column made, the indices and weights of the two that it is made of.
        tables = sum(output_size) * 2 * (8 + _wide(x))
        return _after_outputs(1, tables, 0 if x.is_contiguous() else _bytes(x))
    made = x.shape[0] * x.shape[1] * output_size[0] * output_size[1] * x.element_size()
    return _after_outputs(1, 0 if lies_last else _bytes(x), 0 if suggest_memory_format(x) is channels_last else made)


def _upsample_backward(grad: Tensor, _output_size: Any, input_size: list[int], *_: Any, **__: Any) -> list[Transient]:
    """UpSampleMoreKernel.cpp: gradients that lie neither way are copied, and so is what is made of them."""
    if suggest_memory_format(grad) is torch.channels_last:
        if grad.is_contiguous(memory_format=torch.channels_last):
            return []
        return _after_outputs(1, _bytes(grad), torch.Size(input_size).numel() * grad.element_size())
    return _after_outputs(1, 0 if grad.is_contiguous() else _bytes(grad))


def _attention(
    query: Tensor, key: Tensor, _value: Tensor, *_: Any, attn_mask: Tensor | None = None, **__: Any
) -> list[Transient]:
    """cpu/FlashAttentionKernel.cpp: a block of weights for each thread, and of its output, in float32 at least."""
    rows, columns = _attention_block(query, key)
    wide, threads = _wide(query), torch.get_num_threads()
    block = threads * rows * (columns + 2 + query.shape[3]) * wide
    reduced = threads * rows * columns * query.element_size() if query.dtype in HALF_DTYPES else 0
    return _after_outputs(2, block, reduced)


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, *_: Any, attn_mask: Tensor | None = None, **__: Any
) -> list[Transient]:
    """cpu/FlashAttentionKernel.cpp: a contiguous gradient, and two blocks of weights for each thread."""
    rows, columns = _attention_block(query, key)
    wide, threads = _wide(query), torch.get_num_threads()
    reduced = threads * 2 * rows * columns * query.element_size() if query.dtype in HALF_DTYPES else 0
    # The kernel's tensors are (N, length, heads, size): the gradient's own transposition.
    copied = 0 if grad.transpose(1, 2).is_contiguous() else _bytes(grad)
    return _after_outputs(3, copied, threads * 2 * rows * columns * wide, reduced, threads * rows * wide)


def _attention_block(query: Tensor, key: Tensor) -> tuple[int, int]:
    length = query.shape[2]
    rows = 256 if length >= 768 else 64 if length >= 192 else 32
    return min(rows, length), min(512, key.shape[2])


def _embedding_backward(grad: Tensor, *_: Any) -> list[Transient]:
    """Embedding.cpp: rows of a contiguous gradient."""
    return _held(0 if grad.is_contiguous() else _bytes(grad), outputs=1)


def _fused_step(_params: list[Tensor], grads: list[Tensor], *_: Any, **__: Any) -> list[Transient]:
    """FusedSGD.cpp, FusedAdam.cpp: a gradient that is not contiguous is copied, one after the other."""
    copied = max((_bytes(grad) for grad in grads if not grad.is_contiguous()), default=0)
    return [Transient(0, copied)] if copied else []


def _wide(x: Tensor) -> int:
    return 4 if x.dtype in HALF_DTYPES else x.element_size()


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _lies(x: Tensor, layout: torch.memory_format) -> bool:
    return suggest_memory_format(x) is layout and x.is_contiguous(memory_format=layout)


def _after(outputs: int) -> Ledger:
    ledger = Ledger()
    for _ in range(outputs):
        ledger.make()
    return ledger


def _after_outputs(outputs: int, *sizes_bytes: int) -> list[Transient]:
    """Taken when all outputs are there."""
    ledger = _after(outputs)
    ledger.take(*sizes_bytes)
    return ledger.transients()


def _held(size_bytes: int, outputs: int) -> list[Transient]:
    """Taken before the first output and given back after the last."""
    ledger = Ledger()
    ledger.take(size_bytes)
    for _ in range(outputs):
        ledger.make()
    return ledger.transients()


_RULES: dict[Any, _Rule] = {
    _aten.native_batch_norm_backward: _batch_norm_backward,
    _aten.native_layer_norm: _layer_norm,
    _aten.native_layer_norm_backward: _layer_norm_backward,
    _aten._safe_softmax: _safe_softmax,
    _aten._softmax: _softmax,
    _aten._log_softmax: _softmax,
    _aten._softmax_backward_data: _softmax_backward,
    _aten._log_softmax_backward_data: _softmax_backward,
    _aten.mean: _mean,
    _aten.sum: _sum,
    _aten.mkldnn_rnn_layer: lstm_forward,
    _aten.mkldnn_rnn_layer_backward: lstm_backward,
    _aten.roll: _roll,
    _aten.upsample_bilinear2d: _upsample,
    _aten.upsample_nearest2d: _upsample,
    _aten.upsample_bilinear2d_backward: _upsample_backward,
    _aten.upsample_nearest2d_backward: _upsample_backward,
    _aten.embedding_dense_backward: _embedding_backward,
    _aten._fused_sgd_: _fused_step,
    _aten._fused_adam_: _fused_step,
    _aten._fused_adamw_: _fused_step,
    _aten._fused_adagrad_: _fused_step,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
