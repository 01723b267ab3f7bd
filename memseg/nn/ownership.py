"""Whether a gradient that autograd hands to a backward may be overwritten, and so serve as the node's own buffer.

torch's own nodes take over a gradient that nobody else holds (AccumulateGrad does); a backward in Python is told
nothing. But every holder counts: another node waiting for the same gradient, or a captured one, as a reference to the
tensor; a view as one to its storage; a hook or a variable in Python as one to the Python object. So we look once at a
gradient that surely nobody else holds, and compare: whatever counts more is copied. If torch ever counts otherwise, the
look tells that too.
"""

import sys
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from memseg.nn.autograd import once_differentiable
from memseg.nn.layout import CHANNELS_LAST


class _Holders(NamedTuple):
    tensor: int
    storage: int
    object: int


def take_over(grad: Tensor, *, like: Tensor) -> Tensor:
    """The gradient as channels-last (N, C, H, W) that may be overwritten: itself where nobody else holds it.

    To be called from a backward (of `once_differentiable`) with the argument it was given.
    """
    fits = grad.is_contiguous(memory_format=CHANNELS_LAST) and grad.dtype == like.dtype and grad._base is None
    if fits and all(found <= alone for found, alone in zip(_holders(grad), _alone(), strict=True)):
        return grad
    copy = torch.empty_like(like, memory_format=CHANNELS_LAST)
    return copy.copy_(grad)


def _holders(grad: Tensor) -> _Holders:
    storage = grad.untyped_storage()
    return _Holders(grad._use_count(), torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(grad))  # type: ignore[attr-defined]


@cache
def _alone() -> _Holders:
    """The counts of a gradient that nobody else holds, taken where `take_over` takes them.

    Outside dispatch modes: one that keeps what it sees (tracers do) would hold the gradient that is looked at.
    """
    found: list[_Holders] = []
    with torch.enable_grad(), torch.inference_mode(False), _disable_current_modes():
        leaf = torch.zeros(1, requires_grad=True)
        (_Look.apply(leaf, found) * 1).sum().backward()
    return found[0]


def _look(grad: Tensor, *, found: list[_Holders]) -> None:
    found.append(_holders(grad))


class _Look(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, found: list[_Holders]) -> Tensor:
        ctx.found = found
        return leaf.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        _look(grad_out, found=ctx.found)
        return grad_out, None
