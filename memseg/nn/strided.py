"""The 3x3 convolution of stride 2 of a normalised, rectified map, without keeping that map.

Few layers of a network stride. So bands here are whole images, one at a time, instead of rows: one image's normalised
map and its gradient exist beside the maps themselves.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memseg.nn import chains
from memseg.nn.banded import banded
from memseg.nn.layout import channels_last, images, rows
from memseg.nn.products import gradients_like

_aten = torch.ops.aten


@banded(
    mutates=["out"],
    narrow=lambda x, scale, shift, weight, stride, dilation, out: (
        x[:1], scale, shift, weight, stride, dilation, out[:1],
    ),
)  # fmt: skip
def convolve_strided(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, stride: int, dilation: int, out: Tensor
) -> None:
    """out (N, O, h, w): convolution of relu(scale * x + shift) by a 3x3 kernel, padded by `dilation`."""
    weight = channels_last(weight)
    for image in range(x.shape[0]):
        normalised = torch.empty_like(rows(x)[image : image + 1])
        chains.norm_relu(rows(x)[image : image + 1], scale, shift, normalised)
        made = F.conv2d(images(normalised), weight, None, stride, dilation, dilation)
        del normalised
        out[image : image + 1].copy_(made)
        del made


def _narrow_backward(grad_out: Tensor, x: Tensor, *others: Any) -> tuple[Any, ...]:
    *numbers, grad, wants_sums = others
    return grad_out[:1], x[:1], *numbers, grad[:1], wants_sums


@banded(mutates=["grad"], narrow=_narrow_backward, fake=lambda *args: gradients_like(args[5], args[9]))
def convolve_strided_backward(
    grad_out: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    weight: Tensor,
    stride: int,
    dilation: int,
    grad: Tensor,
    wants_sums: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of the weight (O, C, 3, 3), and sum(g) and sum(g * (x - mean)) as (2, C), both in `wide_dtype`.

    g itself, the gradient at the normalised and rectified map, is written to `grad` (N, C, H, W).
    """
    grad_weight, sums = gradients_like(weight, wants_sums)
    kernel = channels_last(weight)
    for image in range(x.shape[0]):
        source, target = rows(x)[image : image + 1], rows(grad)[image : image + 1]
        normalised = torch.empty_like(source)
        chains.norm_relu(source, scale, shift, normalised)
        grad_x, of_weight, _ = _aten.convolution_backward(
            channels_last(grad_out[image : image + 1]),
            images(normalised),
            kernel,
            None,
            [stride] * 2,
            [dilation] * 2,
            [dilation] * 2,
            False,
            [0, 0],
            1,
            [True, True, False],
        )
        grad_weight += of_weight
        chains.mask(rows(channels_last(grad_x)), normalised, target)
        del grad_x, of_weight, normalised
        if wants_sums:
            sums += chains.moments(target, source, mean)
    return grad_weight, sums


@register_flop_formula(torch.ops.memseg.convolve_strided)
def _(x: Any, scale: Any, shift: Any, weight: Any, stride: Any, dilation: Any, out: Any, **_: Any) -> int:
    return int(2 * weight[0] * weight[1] * 9 * out[0] * out[2] * out[3])


@register_flop_formula(torch.ops.memseg.convolve_strided_backward)
def _(grad_out: Any, x: Any, scale: Any, shift: Any, mean: Any, weight: Any, *_: Any, **__: Any) -> int:
    return int(4 * weight[0] * weight[1] * 9 * grad_out[0] * grad_out[2] * grad_out[3])
