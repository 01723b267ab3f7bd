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
from torch.utils._pytree import tree_map

from memseg.errors import InputError

Module = TypeVar("Module", bound=nn.Module)


def fake_batch(value: Any) -> Any:
    """The same structure of lists, tuples and dicts, each tensor a fake twin; called under a fake mode."""
    return tree_map(lambda leaf: fake_tensor(leaf) if isinstance(leaf, Tensor) else leaf, value)


def fake_module(module: Module) -> Module:
    """A copy of a module whose tensors are fake, tied ones tied as before; called under a fake mode.

    Raises:
        InputError: a parameter has no shape yet (a lazy module), or the module cannot be copied.
    """
    twins: dict[int, Any] = {}
    # Whatever tensor an attribute holds would be copied with its values; so each is replaced beforehand.
    for tensor in _tensors_of(module):
        if id(tensor) not in twins:
            twins[id(tensor)] = fake_tensor(tensor)
    try:
        return copy.deepcopy(module, twins)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"{type(module).__name__} cannot be copied ({error}); give a function that makes the model instead"
        ) from error


def fake_tensor(tensor: Tensor) -> Tensor:
    """A twin with the same shape, strides and type on the CPU; a parameter where it is one."""
    if is_lazy(tensor):
        raise InputError("lazy modules have no shapes before their first batch; run one through the model first")
    twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
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


def real_batch(value: Any) -> Any:
    """The same structure on the CPU; what has no values, on the meta device, gets zeros."""

    def real(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return torch.zeros(leaf.shape, dtype=leaf.dtype) if leaf.is_meta else leaf.detach().cpu()

    return tree_map(real, value)


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that modules hold as plain attributes."""
    yield from module.parameters()
    yield from module.buffers()
    for part in module.modules():
        for value in vars(part).values():
            for leaf in value if isinstance(value, list | tuple) else [value]:
                if isinstance(leaf, Tensor):
                    yield leaf
