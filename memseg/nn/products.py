"""Products of tiles of pixels with the matrix of a 1x1 convolution; what a tile is normalised into, and sums go to."""

import torch
import torch.nn.functional as F
from torch import Tensor

from memseg.nn import chains
from memseg.nn.autograd import wide_dtype
from memseg.nn.layout import channels_last, device_type, images, pixels


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, C) @ weight.T (C, O) + bias.

    On CPUs with several threads as a 1x1 convolution over one row of pixels: oneDNN's is faster than the matrix product
    of the BLAS that torch comes with (`python -m benchmarks.bands`). With one thread, or in float64, torch does not
    take oneDNN's; and it would copy rows that do not follow each other.
    """
    by_blas = x.dtype == torch.float64 or torch.get_num_threads() == 1 or not x.is_contiguous()
    if device_type(x) != "cpu" or by_blas:
        return F.linear(x, weight, bias)
    return pixels(F.conv2d(images(x.reshape(1, -1, 1, x.shape[1])), channels_last(weight[:, :, None, None]), bias))


def add_product(total: Tensor, grad_out: Tensor, x: Tensor) -> None:
    """total (O, C) += grad_out.T @ x, in the total's dtype."""
    if total.dtype == x.dtype:
        total.addmm_(grad_out.t(), x)
    else:
        total += torch.mm(grad_out.t(), x)


def gradients_like(weight: Tensor, wants_sums: bool) -> tuple[Tensor, Tensor]:
    """Zeros to add gradients up in: of a weight (O, C, ...), and a norm's two sums as (2, C) or (2, 0)."""
    wide = wide_dtype(weight.dtype)
    return torch.zeros_like(weight, dtype=wide), weight.new_zeros(2, weight.shape[1] if wants_sums else 0, dtype=wide)


def add_square(total: Tensor, x: Tensor) -> None:
    """total (C, C) += x.T @ x, in the total's dtype; x may be overwritten."""
    if total.dtype == x.dtype:
        total.addmm_(x.t(), x)
    else:
        # No loss scaling sees to it that such sums fit float16, so x is made about 1 / sqrt(M) of itself: exactly.
        share = 0.5 ** (x.shape[0].bit_length() // 2)
        x.mul_(share)
        total.add_(torch.mm(x.t(), x), alpha=share**-2)


class Scratch:
    """A band's normalised map, and what is centred where sums are wanted, in memory that serves band after band."""

    def __init__(
        self, like: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, bias: Tensor, wants_sums: bool
    ) -> None:
        self._normalised = like
        self._centred = torch.empty_like(like, dtype=mean.dtype) if wants_sums else None
        self._scale, self._shift, self._mean, self._bias = scale, shift, mean, bias

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """relu(bn(x)), and x - mean or None."""
        normalised = self._normalised[: x.shape[0]]
        if self._centred is None:
            chains.norm_relu(x, self._scale, self._shift, normalised)
            return normalised, None
        centred = self._centred[: x.shape[0]]
        chains.centre_norm_relu(x, self._mean, self._scale, self._bias, centred=centred, normalised=normalised)
        return normalised, centred
