"""What memseg's own operators take and compute inside themselves: a few bands, whatever the size of the map.

A trace sees an operator of `memseg.nn` as one operation, with its outputs alone. What it allocates and frees inside
itself, and what it computes, is found by tracing its body too, on meta tensors of a few bands, once for each shape. The
memory is that of the bands, whatever the size of the map; the work is multiplied up to the whole map.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from memseg.nn.banded import BANDED_OPERATORS
from memseg.nn.layout import planned_for
from memseg.planning.costs import Work


@dataclass(frozen=True)
class Inside:
    """What happens in one call of an operator."""

    scratch_bytes: int
    """Allocated beside what it returns, at the most."""
    work: Work


Trace = Callable[[Callable[[], Any], list[Tensor]], tuple[int, Work]]
"""Runs a function that reads given tensors: peak bytes beyond what they take, and all work."""

_known: dict[Any, Inside] = {}


def look_inside(func: Any, args: tuple[Any, ...], device: str, trace: Trace) -> Inside | None:
    """What an operator of ours takes and computes; None for other operators.

    Args:
        func: The operator (an overload of torch.ops).
        args: Its arguments.
        device: "cpu" or "cuda", where the operation would run.
        trace: Traces what it is given.
    """
    operator = BANDED_OPERATORS.get(func.overloadpacket)
    if operator is None:
        return None
    key = func, device, torch.get_num_threads(), _description(args)
    if key not in _known:
        with unset_fake_temporarily(), planned_for(device):
            narrow = operator.narrow(*tree_map(_meta_twin, list(args)))
            made: list[Any] = []
            peak, work = trace(lambda: made.append(operator.body(*narrow)), list(_tensors(narrow)))
            scratch = peak - sum(tensor.nbytes for tensor in _tensors(made))
            _known[key] = Inside(scratch, _multiplied(work, _times(func, args, narrow, work)))
    return _known[key]


def _times(func: Any, args: tuple[Any, ...], narrow: Any, work: Work) -> float:
    """How much more the whole call computes: by its operations, where there is a formula, else by its largest map."""
    formula = flop_registry.get(func.overloadpacket)
    if formula is not None and work.flops:
        return float(formula(*args, out_val=None)) / work.flops
    whole, part = (max(tensor.numel() for tensor in _tensors(tensors)) for tensors in (args, narrow))
    return whole / part


def _multiplied(work: Work, factor: float) -> Work:
    products = tuple(
        replace(one, flops=round(one.flops * factor), moved_bytes=round(one.moved_bytes * factor))
        for one in work.products
    )
    flops = sum(one.flops for one in products)
    return Work(flops, round(work.moved_bytes * factor), round(work.operations * factor), products)


def _meta_twin(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _description(args: Any) -> tuple[Any, ...]:
    """Everything that a call depends on, as a key."""
    return tuple(
        (tuple(leaf.shape), leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else leaf
        for leaf in tree_leaves(list(args))
    )
