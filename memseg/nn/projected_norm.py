"""Backward through a 1x1 convolution and the norm behind it, without the convolution's output.

Batch norm's backward reads the map c = W a that it normalised. In a residual network that is the widest map there is,
and it is kept for this alone. But c is linear in what the convolution read, and so is all that backward wants of it.
With g the gradient behind the norm, s the norm's scale and d = a - k for any fixed k near the mean of a:

    sum(g * c)  is a sum over  W * sum(g d'),  and  dc = s * g + constant + slope * c  gives
    dW = s * sum(g d') + slope * W sum(d d') + ...        da = (s W)' g + (W' slope W) d + ...

So three products of a with g and with itself stand for the map. They are made tile by tile, as is a, the rectified
norm of a narrower map (or that map itself, in a shortcut). The centre k keeps the sums from cancelling.

Source: the gradient is that of Ioffe and Szegedy, arXiv:1502.03167.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memseg.nn import chains
from memseg.nn.autograd import wide_dtype
from memseg.nn.banded import banded
from memseg.nn.layout import tile_rows, tiles
from memseg.nn.norm_relu import NormGradients, NormRelu
from memseg.nn.products import Scratch, add_product, add_square, product


class ProjectionGradients(NamedTuple):
    """What comes back beside the gradient of the map."""

    weight: Tensor
    """Of the convolution, (O, C), in `wide_dtype`."""
    norm: NormGradients
    """Of the norm behind it."""
    sums: Tensor
    """Of the norm before it: sum(g) and sum(g * (x - mean)) as (2, C); empty where nobody wants them."""


def projected_norm_backward(
    grad: Tensor, x: Tensor, inner: NormRelu | None, weight: Tensor, norm: NormRelu, to: Tensor
) -> ProjectionGradients:
    """Backward of norm(weight @ a), a = relu(inner(x)) or x itself; of matrices of pixels.

    Args:
        grad: (M, O), behind the norm.
        x: (M, C).
        inner: The norm before the convolution, or None.
        weight: (O, C).
        norm: Of the O channels.
        to: (M, C), written: scale * (the gradient at the masked map) of `inner`, without the terms through its batch
            statistics; without `inner` the gradient of x.
    """
    numbers = [] if inner is None else [inner.scale, inner.shift, inner.statistics.mean, inner.offset]
    centre, cross, own, square = project_moments(grad, x, numbers, norm.uses_batch)
    total = grad.sum(0, dtype=cross.dtype)
    matrix, scale = weight.to(cross.dtype), norm.scale
    base = matrix @ centre
    moment = (matrix * cross).sum(1) + (base - norm.statistics.mean) * total
    gradients = norm.gradients_(torch.stack([total, moment]))
    grad_weight = scale[:, None] * cross + (scale * total).outer(centre)
    fold, row = matrix.new_empty(0, 0), matrix.new_empty(0)
    if norm.uses_batch:
        slope, constant = gradients.slope, gradients.constant + gradients.slope * base
        grad_weight += constant.outer(own) + slope[:, None] * (matrix @ square)
        grad_weight += (x.shape[0] * constant + slope * (matrix @ own)).outer(centre)
        fold, row = matrix.t() @ (slope[:, None] * matrix), constant @ matrix
    back, fold = (scale[:, None] * matrix).to(grad.dtype), fold.to(grad.dtype)
    wants_sums = inner is not None and inner.needs_sums
    sums = project_folded_backward(grad, x, numbers, back, fold, row, centre, to, wants_sums)
    return ProjectionGradients(grad_weight, gradients, sums)


def _narrow_moments(grad: Tensor, x: Tensor, numbers: Any, wants_own: bool) -> tuple[Any, ...]:
    first = slice(0, tile_rows(x))
    return grad[first], x[first], numbers, wants_own


def _empty_moments(grad: Tensor, x: Tensor, wants_own: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (outputs, channels), wide = (grad.shape[1], x.shape[1]), wide_dtype(x.dtype)
    own = channels if wants_own else 0
    sizes = ((channels,), (outputs, channels), (own,), (own, own))
    centre, cross, total, square = (x.new_zeros(size, dtype=wide) for size in sizes)
    return centre, cross, total, square


@banded(narrow=_narrow_moments, fake=lambda grad, x, _, wants_own: _empty_moments(grad, x, wants_own))
def project_moments(
    grad: Tensor, x: Tensor, numbers: list[Tensor], wants_own: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over all pixels, about a centre near the mean of a = relu(scale * x + shift), or of x itself.

    Args:
        grad, x: (M, O) and (M, C).
        numbers: Scale, shift, mean and bias of the norm, or none.
        wants_own: Whether the last two are wanted; else they are empty.

    Returns:
        The centre (C,), sum(grad d') (O, C), sum(d) (C,) and sum(d d') (C, C), d being a - centre; in `wide_dtype`.
    """
    centre, cross, total, square = _empty_moments(grad, x, wants_own)
    scratch = x.new_empty(tile_rows(x), x.shape[1])
    for tile in tiles(x):
        part = scratch[: tile.stop - tile.start]
        if numbers:
            chains.norm_relu(x[tile], numbers[0], numbers[1], part)
        else:
            part.copy_(x[tile])
        if tile.start == 0:
            centre.copy_(part.mean(0, dtype=centre.dtype))
        part.sub_(centre)
        add_product(cross, grad[tile], part)
        if wants_own:
            total += part.sum(0, dtype=total.dtype)
            add_square(square, part)
    return centre, cross, total, square


def _narrow_folded(grad: Tensor, x: Tensor, *others: Any) -> tuple[Any, ...]:
    first = slice(0, tile_rows(x))
    *matrices, to, wants_sums = others
    return grad[first], x[first], *matrices, to[first], wants_sums


def _empty_sums(x: Tensor, wants_sums: bool) -> Tensor:
    return x.new_zeros(2, x.shape[1] if wants_sums else 0, dtype=wide_dtype(x.dtype))


@banded(mutates=["to"], narrow=_narrow_folded, fake=lambda _, x, *others: _empty_sums(x, others[-1]))
def project_folded_backward(
    grad: Tensor,
    x: Tensor,
    numbers: list[Tensor],
    back: Tensor,
    fold: Tensor,
    row: Tensor,
    centre: Tensor,
    to: Tensor,
    wants_sums: bool,
) -> Tensor:
    """grad @ back + (a - centre) @ fold + row written to `to`, behind a norm masked and scaled; the norm's sums.

    Args:
        grad, x, numbers: As of `project_moments`.
        back: (O, C).
        fold, row: (C, C) and (C,), or both empty.
        to: (M, C).
        centre: As returned by `project_moments`.
        wants_sums: Whether sum(g) and sum(g * (x - mean)), as (2, C), are wanted; else they are empty.
    """
    sums = _empty_sums(x, wants_sums)
    scratch = None
    if numbers:
        scale, shift, mean, bias = numbers
        scratch = Scratch(x.new_empty(tile_rows(x), x.shape[1]), scale, shift, mean, bias, wants_sums)
    back = back.t().contiguous()
    for tile in tiles(x):
        read, centred = scratch.normalise(x[tile]) if scratch else (x[tile], None)
        part = product(grad[tile], back)
        if fold.numel():
            part.add_(row).addmm_((read - centre).to(part.dtype), fold)
        if scratch:
            own = sums if wants_sums else None
            chains.spread(part, read, numbers[0], to=to[tile], add=False, centred=centred, sums=own)
        else:
            to[tile] = part
        del part
    return sums


@register_flop_formula(torch.ops.memseg.project_moments)
def _(grad: Any, x: Any, numbers: Any, wants_own: bool, **_: Any) -> int:
    return int(2 * x[0] * x[1] * (grad[1] + x[1] * wants_own))


@register_flop_formula(torch.ops.memseg.project_folded_backward)
def _(grad: Any, x: Any, numbers: Any, back: Any, fold: Any, *_: Any, **__: Any) -> int:
    return int(2 * x[0] * x[1] * (grad[1] + fold[0]))
