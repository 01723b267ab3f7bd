"""How long products take on a card that is chosen later.

A product either keeps a card's arithmetic busy or waits for its memory, whichever takes longer:

    seconds = max(flops / rate, moved_bytes / bandwidth)

Which of the two it is depends on the card: its ridge, rate / bandwidth, is 4 operations per byte on a laptop and 200 on
a card with tensor cores. Costs are summed by layer before any card is known, and a sum of maxima is not the maximum of
sums. So products are summed in classes of alike arithmetic intensity (flops / moved_bytes), half an octave wide. All
products of a class then lie on the same side of a card's ridge, but for the one class that the ridge falls into, where
the middle of the class decides: the error is at most a factor 2**(1/4), 19 %, of those products alone.

For a given card the seconds are a sum over classes, so the seconds of a sum are the sum of the seconds; the solver
relies on that.

Source: Williams, Waterman and Patterson, "Roofline", Communications of the ACM 52(4), 2009.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from pydantic import ConfigDict

CLASSES_PER_OCTAVE = 2


class ProductKind(StrEnum):
    """What a card computes at a rate of its own."""

    CONVOLUTION = "convolution"
    """float32. A card with TF32 uses it here by torch's default, `torch.backends.cudnn.conv.fp32_precision`."""
    MATRIX = "matrix"
    """float32 matrix products. torch's default, `torch.backends.cuda.matmul.fp32_precision`, is no TF32."""
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


@dataclass(frozen=True, order=True)
class Products:
    """Matrix products and convolutions of one kind and of alike arithmetic intensity."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    kind: ProductKind
    intensity: int
    """Class: floor(2 * log2(flops / moved_bytes))."""
    flops: int
    """A multiply-add counts two."""
    moved_bytes: int
    """Operands and results, each once for each product that reads or writes it."""

    @staticmethod
    def of(kind: ProductKind, flops: int, moved_bytes: int) -> "Products":
        """One product, in its class.

        >>> Products.of(ProductKind.MATRIX, flops=6_000, moved_bytes=1_000).intensity
        5
        """
        intensity = math.floor(CLASSES_PER_OCTAVE * math.log2(flops / max(1, moved_bytes)))
        return Products(kind, intensity, flops, moved_bytes)

    def seconds(self, rate: float, bandwidth: float) -> float:
        """On a card with these rates, by the side of its ridge that the class lies on."""
        waits_for_memory = 2 ** ((self.intensity + 0.5) / CLASSES_PER_OCTAVE) < rate / bandwidth
        return self.moved_bytes / bandwidth if waits_for_memory else self.flops / rate


def merged(products: Iterable[Products]) -> tuple[Products, ...]:
    """The same products, each class once, in order."""
    sums: dict[tuple[ProductKind, int], tuple[int, int]] = {}
    for one in products:
        flops, moved_bytes = sums.get((one.kind, one.intensity), (0, 0))
        sums[one.kind, one.intensity] = flops + one.flops, moved_bytes + one.moved_bytes
    return tuple(Products(*key, *sums[key]) for key in sorted(sums))


def products_seconds(products: Iterable[Products], rate_of: Callable[[ProductKind], float], bandwidth: float) -> float:
    """Time of products, one after the other, at the rate of each kind."""
    return sum(one.seconds(rate_of(one.kind), bandwidth) for one in products)
