"""One BN-ReLU with the numbers it used: what forward did and backward must do again.

Batch statistics make each channel's gradient depend on all its pixels, but only by two numbers per channel, so the
terms that need them are a line in x and are added afterwards:

    dx = s * g  -  s * sum(g) / M  -  s * (x - mean) / std^2 * sum(g * (x - mean)) / M  =  s * g + constant + slope * x

with g the gradient at the normalised, rectified map, s = weight / std and M the pixels of all images and replicas. A
map with many readers (every dense layer reads all before it) adds the lines of all of them in one pass: see `Line`.

Source: Ioffe and Szegedy, arXiv:1502.03167, for the gradient.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from memseg.nn import chains
from memseg.nn.banded import banded
from memseg.nn.batch_norm import BatchNorm2d, Statistics
from memseg.nn.join import complete_upsampled
from memseg.nn.layout import rows, tile_rows, tiles


def _narrow(grad: Tensor, x: Tensor, *numbers: Tensor) -> tuple[Tensor, ...]:
    two = slice(0, 2 * tile_rows(x))
    return grad[two], x[two], *numbers


@banded(mutates=["grad"], narrow=_narrow)
def complete(grad: Tensor, x: Tensor, scale: Tensor, constant: Tensor, slope: Tensor) -> None:
    """grad = scale * grad + constant + slope * x in place, of matrices (M, C)."""
    for tile in tiles(x):
        chains.complete(grad[tile], x[tile], scale, constant, slope)


@banded(mutates=["grad"], narrow=_narrow)
def add_line(grad: Tensor, x: Tensor, constant: Tensor, slope: Tensor) -> None:
    """grad += constant + slope * x, of matrices (M, C)."""
    for tile in tiles(x):
        if grad.dtype == slope.dtype:
            grad[tile].add_(constant).addcmul_(x[tile], slope)
        else:
            grad[tile].add_(x[tile].to(slope.dtype).mul_(slope).add_(constant))


class NormGradients(NamedTuple):
    """Of a norm: gradients of weight and bias, and the line that its input's gradient needs. Each (C,)."""

    weight: Tensor
    bias: Tensor
    constant: Tensor
    slope: Tensor


@dataclass(frozen=True)
class NormRelu:
    """A norm's numbers at one forward, each (C,); float32, or float64 for maps in float64."""

    weight: Tensor
    bias: Tensor
    statistics: Statistics
    eps: float
    group: distributed.ProcessGroup | None = None
    """Replicas that the statistics are shared with."""
    trained: bool = True
    """Whether anybody wants the gradients of weight and bias."""

    @classmethod
    def of(cls, norm: BatchNorm2d, weight: Tensor, bias: Tensor, statistics: Statistics) -> "NormRelu":
        """A norm with its parameters and the statistics that it normalises with now."""
        return cls(weight, bias, statistics, norm.eps, norm.replicas, weight.requires_grad or bias.requires_grad)

    def over(self, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> "NormRelu":
        """The same norm with the tensors that backward was given."""
        return NormRelu(weight, bias, Statistics(mean, var, self.statistics.values), self.eps, self.group, self.trained)

    def without_tensors(self) -> "NormRelu":
        """What backward needs beside the tensors that autograd keeps: see `over`."""
        empty = self.weight.new_empty(0)
        return self.over(empty, empty, empty, empty)

    @property
    def uses_batch(self) -> bool:
        """Whether gradients flow through the statistics."""
        return not (isinstance(self.statistics.values, int) and self.statistics.values == 0)

    @property
    def needs_sums(self) -> bool:
        """Whether backward must sum the gradient over all pixels."""
        return self.uses_batch or self.trained

    @cached_property
    def std_inverse(self) -> Tensor:
        """1 / sqrt(var + eps)."""
        return (self.statistics.var + self.eps).rsqrt()

    @cached_property
    def scale(self) -> Tensor:
        """bn(x) = scale * x + shift."""
        return self.weight.to(self.std_inverse.dtype) * self.std_inverse

    @cached_property
    def offset(self) -> Tensor:
        """bn(x) = scale * (x - mean) + offset: the bias."""
        return self.bias.to(self.std_inverse.dtype)

    @cached_property
    def shift(self) -> Tensor:
        """bn(x) = scale * x + shift."""
        return self.offset - self.statistics.mean * self.scale

    def gradients_(self, sums: Tensor) -> NormGradients:
        """From (2, C): this replica's sum(g) and sum(g * (x - mean)); not looked at where `needs_sums` is false.

        The sums become the gradients of bias and weight, in place: these live as long as the parameters' gradients.
        """
        constant = slope = zero = torch.zeros_like(self.std_inverse)
        if not self.needs_sums:
            return NormGradients(zero, zero, zero, zero)
        if self.uses_batch:
            total = sums
            if self.group is not None:
                total = sums.clone()
                distributed.all_reduce(total, group=self.group)
            per_pixel = total / self.statistics.values
            slope = -self.scale * self.std_inverse.square() * per_pixel[1]
            constant = -self.scale * per_pixel[0] - slope * self.statistics.mean
        bias, weight = sums.unbind()
        return NormGradients(weight.mul_(self.std_inverse), bias, constant, slope)

    def complete_(self, grad: Tensor, x: Tensor, gradients: NormGradients, channels: slice = slice(None)) -> None:
        """Turn the gradient at the masked map into that of x, in place.

        Args:
            grad, x: Matrices (M, C), or of `channels` alone.
            gradients: Of this norm.
            channels: Those of the norm that x has.
        """
        scale, constant, slope = (part[channels] for part in (self.scale, gradients.constant, gradients.slope))
        if self.uses_batch:
            complete(grad, x, scale, constant, slope)
        else:
            grad.mul_(scale)

    def complete_upsampled_(self, grad: Tensor, coarse: Tensor, gradients: NormGradients) -> None:
        """As `complete_`, of the first channels, x being `coarse` upsampled to the size of `grad` (N, C, H, W)."""
        channels = slice(0, coarse.shape[1])
        scale, constant, slope = (part[channels] for part in (self.scale, gradients.constant, gradients.slope))
        if self.uses_batch:
            complete_upsampled(grad, coarse, scale, constant, slope)
        else:
            rows(grad).mul_(scale)


class Line:
    """Per channel, the constant and the slope that the batch statistics of several readers add to a gradient."""

    def __init__(self, channels: int, like: Tensor) -> None:
        self.constant, self.slope = like.new_zeros(2, channels).unbind()

    def add(self, gradients: NormGradients) -> None:
        """One more reader, of the first channels."""
        channels = gradients.slope.numel()
        self.constant[:channels] += gradients.constant
        self.slope[:channels] += gradients.slope

    def add_to(self, grad: Tensor, x: Tensor, channels: slice) -> None:
        """Add the line to columns `channels` of `grad` (M, C), x being the map itself."""
        add_line(grad[:, channels], x[:, channels], self.constant[channels], self.slope[channels])
