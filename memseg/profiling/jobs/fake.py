"""Twins without memory: a module or a batch of a user's, real, on the meta device or fake already, as fake CPU tensors.

Fake tensors of one mode must not meet those of another, or real ones. So everything is made anew from shapes, strides
and types; values are never looked at, and the user's objects are not changed.
"""

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from memseg.errors import InputError

Module = TypeVar("Module", bound=nn.Module)


def fake_batch(value: Any, dtype: torch.dtype | None = None) -> Any:
    """The same structure of lists, tuples and dicts, each tensor a fake twin; called under a fake mode.

    Args:
        dtype: Of tensors of floating-point numbers; their own where none is given.
    """
    return tree_map(lambda leaf: fake_tensor(leaf, dtype) if isinstance(leaf, Tensor) else leaf, value)


def fake_module(module: Module, dtype: torch.dtype | None = None) -> Module:
    """A copy of a module whose tensors are fake, tied ones tied as before; called under a fake mode.

    Args:
        dtype: Of tensors of floating-point numbers; their own where none is given.

    Raises:
        InputError: a parameter has no shape yet (a lazy module), or the module cannot be copied.
    """
    twins: dict[int, Any] = {}
    # Whatever tensor an attribute holds would be copied with its values; so each is replaced beforehand.
    for tensor in _tensors_of(module):
        if id(tensor) not in twins:
            twins[id(tensor)] = fake_tensor(tensor, dtype)
    try:
        return copy.deepcopy(module, twins)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"{type(module).__name__} cannot be copied ({error}); give a function that makes the model instead"
        ) from error


def fake_tensor(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A twin with the same shape, strides and type on the CPU; a parameter where it is one."""
    if is_lazy(tensor):
        raise InputError("lazy modules have no shapes before their first batch; run one through the model first")
    wanted = dtype if dtype and tensor.is_floating_point() else tensor.dtype
    twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=wanted)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(twin, requires_grad=tensor.requires_grad)
    return twin.requires_grad_(tensor.requires_grad and tensor.is_leaf)


def real_module(module: Module) -> Module:
    """A copy on the CPU, whose training leaves the user's module as it is.

    Raises:
        InputError: it is on the meta device.
    """
    if any(tensor.is_meta for tensor in _tensors_of(module)):
        raise InputError("a step on real tensors needs a real model, got one on the meta device")
    return copy.deepcopy(module).cpu()


def real_batch(value: Any, dtype: torch.dtype | None = None) -> Any:
    """The same structure on the CPU; what has no values, on the meta device, gets zeros.

    Args:
        dtype: Of tensors of floating-point numbers; their own where none is given.
    """

    def real(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        values = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype).zero_() if leaf.is_meta else leaf
        return values.detach().to("cpu", dtype if dtype and leaf.is_floating_point() else None)

    return tree_map(real, value)


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that modules hold as plain attributes."""
    yield from module.parameters()
    yield from module.buffers()
    for part in module.modules():
        yield from (leaf for leaf in tree_leaves(list(vars(part).values())) if isinstance(leaf, Tensor))
