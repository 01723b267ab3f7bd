"""Memory that memseg's own operators take while they run: a few bands, whatever the size of the map.

A trace sees an operator of `memseg.nn` as one operation, with its outputs alone. What it allocates and frees inside
itself is found by tracing its body too, on fake tensors of a few bands, once for each shape.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map

from memseg.nn.banded import BANDED_OPERATORS
from memseg.nn.layout import bands_of

PeakOf = Callable[[Callable[[], Any], list[Tensor]], int]
"""Peak bytes while a function runs, beyond what given tensors take."""

_known: dict[Any, int] = {}


def operator_scratch(func: Any, args: tuple[Any, ...], device: str, peak_of: PeakOf) -> int | None:
    """Bytes that an operator of ours allocates beside what it returns, at the most; None for other operators.

    Args:
        func: The operator (an overload of torch.ops).
        args: Its arguments.
        device: "cpu" or "cuda", where the operation would run.
        peak_of: Traces what it is given.
    """
    operator = BANDED_OPERATORS.get(func.overloadpacket)
    if operator is None:
        return None
    key = func, device, torch.get_num_threads(), _description(args)
    if key not in _known:
        with unset_fake_temporarily(), bands_of(device):
            narrow = operator.narrow(*tree_map(_fake_twin, list(args)))
            made: list[Any] = []
            tensors = [leaf for leaf in tree_leaves(narrow) if isinstance(leaf, Tensor)]
            peak = peak_of(lambda: made.append(operator.body(*narrow)), tensors)
            _known[key] = peak - sum(leaf.nbytes for leaf in tree_leaves(made) if isinstance(leaf, Tensor))
    return _known[key]


def _fake_twin(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _description(args: Any) -> tuple[Any, ...]:
    """Everything that the memory of a call depends on, as a key."""
    return tuple(
        (tuple(leaf.shape), leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else leaf
        for leaf in tree_leaves(list(args))
    )
