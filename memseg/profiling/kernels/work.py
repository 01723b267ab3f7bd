"""What one operation computes and moves, as far as its time depends on it.

torch's flop counter knows matrix products and convolutions, but not attention as CPUs run it, and it counts the
gradient of a grouped convolution's weight as if it were not grouped. Traffic it does not count. Here every operation
gets both, for `memseg.planning.roofline`.

Bytes are those of operands and results, once for each time that a kernel goes over them: a batch norm reads a map for
its statistics and again to normalise it. What stays in a cache between two operations is counted all the same.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from memseg.planning.costs import Work
from memseg.planning.roofline import ProductKind, Products

_aten = torch.ops.aten
_FREE = {_aten.empty, _aten.new_empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty_strided}
_OVERWRITES = {_aten.copy_, _aten.zero_, _aten.fill_, _aten._foreach_zero_, _aten._foreach_copy_}
"""They do not read the tensor that they write."""
_READS_ROWS = {_aten.embedding, _aten.index, _aten.index_select, _aten.gather}
"""They read of their first tensor only what they return."""
_KINDS = {torch.bfloat16: ProductKind.BFLOAT16, torch.float16: ProductKind.FLOAT16, torch.float64: ProductKind.FLOAT64}


def operation_work(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Work:
    """The work of one operation; none for views and for tensors that are only allocated.

    For operators of ours `memseg.profiling.kernels.inside` looks inside.

    Args:
        func: The operator (an overload of torch.ops), with its `args` and `kwargs`.
        out: What it returned.
    """
    packet = func.overloadpacket
    if func.is_view or packet in _FREE:
        return Work(0, 0)
    moved = _moved_bytes(func, args, kwargs, out)
    flops, kernels = _flops(packet, args, kwargs, out)
    if not flops:
        return Work(0, moved, operations=int(moved > 0))
    products = Products.of(_kind(func, args), flops, moved)
    return Work(flops, 0, kernels, (products,))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _flops(packet: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> tuple[int, int]:
    """Operations of a product, and how many products it is; zeros for anything else."""
    if packet is _aten.convolution_backward:
        grad, x, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
        products = int(wanted[0]) + int(wanted[1])
        pixels = x if transposed else grad
        return products * 2 * pixels.numel() * weight.numel() // weight.shape[0], products
    if packet is _aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3]))), 2  # type: ignore[no-untyped-call]
    if packet is _aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))), 5  # type: ignore[no-untyped-call]
    if packet not in flop_registry:
        return 0, 0
    return int(flop_registry[packet](*args, **kwargs, out_val=out)), 1


def _kind(func: Any, args: tuple[Any, ...]) -> ProductKind:
    dtype = next(_tensors(args)).dtype
    if dtype in _KINDS:
        return _KINDS[dtype]
    matrix = func.namespace == "aten" and "convolution" not in str(func.overloadpacket)
    return ProductKind.MATRIX if matrix else ProductKind.CONVOLUTION


def _moved_bytes(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    packet = func.overloadpacket
    made = sum(map(_size_bytes, _tensors(out)))
    if packet in _READS_ROWS:
        return 2 * made + sum(map(_size_bytes, _tensors(args[1:])))
    read = sum(map(_size_bytes, _tensors(args))) + sum(map(_size_bytes, _tensors(tuple(kwargs.values()))))
    if packet in _OVERWRITES:
        return read
    if out is None:
        # Written in place and not returned, as by fused optimizers.
        written = zip(func._schema.arguments, args, strict=False)
        made = sum(
            _size_bytes(tensor)
            for argument, value in written
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(value)
        )
    return read + made + _second_reads(packet, args)


def _second_reads(packet: Any, args: tuple[Any, ...]) -> int:
    """Bytes of maps that a kernel goes over twice."""
    if packet is _aten.native_batch_norm and args[5]:
        return _size_bytes(args[0])
    if packet is _aten.native_batch_norm_backward:
        return _size_bytes(args[0]) + _size_bytes(args[1])
    if packet is _aten.convolution_backward and args[10][0] and args[10][1]:
        return _size_bytes(args[0])
    return 0


def _size_bytes(tensor: Tensor) -> int:
    """Of an expanded tensor, what is really there."""
    return int(min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()))


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in _leaves(value) if isinstance(leaf, Tensor))
