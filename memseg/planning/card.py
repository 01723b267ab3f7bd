"""What planning knows of a device: what it has, what it keeps back, how fast it is.

Where the figures come from is other modules' business: `memseg.planning.cards` reads them from files,
`memseg.planning.local_cards` from the driver of this machine.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from memseg.errors import InputError
from memseg.planning.costs import Work
from memseg.planning.roofline import ProductKind, products_seconds


@dataclass(frozen=True)
class Card:
    """A device that can run segments."""

    name: str
    """As the user wrote it: gtx1070, cpu:8GiB, here:0, my_card.toml. `parse_cards` reads it back."""
    title: str
    kind: Literal["cuda", "cpu"]
    capacity_bytes: int
    """What a process sees of it; a little less than is printed on the box."""
    reserve_bytes: int
    """Kept back for what no prediction counts: context, workspaces, fragmentation, the display."""
    flops: float
    """Peak float32 operations per second, multiply-add counted as two, without TF32."""
    bandwidth: float
    """Peak bytes per second to and from its memory."""
    link: float
    """Bytes per second to another card."""
    efficiency: float
    """The fraction of the peak rates that training reaches, in (0, 1]."""
    compute_capability: str | None
    """As in CUDA's documentation, "6.1"; None for a cpu card."""
    sources: Mapping[str, str] = field(compare=False, repr=False)
    """Where each figure comes from, by its name in the profile."""
    convolution_flops: float | None = None
    """Of float32 convolutions, where they run at another rate than float32 matrix products; on a card with TF32, in
    TF32, as torch does by default."""
    half_flops: float | None = None
    """Of bfloat16 and float16 products, summed in float32; None where they run no faster than in float32."""
    overhead_s: float = 0.0
    """Seconds that each operation takes beside its arithmetic and its traffic."""
    used_bytes: int = 0
    """What other processes hold of a card of this machine; part of the reserve."""
    device: int | None = None
    """Of a card of this machine its number, in the order of PCI slots; None of any other."""
    products: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """What the driver calls it."""

    @property
    def available_bytes(self) -> int:
        """What a prediction may fill."""
        return self.capacity_bytes - self.reserve_bytes

    def flops_of(self, kind: ProductKind) -> float:
        """Peak operations per second of one kind of products.

        bfloat16 needs compute capability 8.0; before, it runs at the rate of float32. float64 is taken at half that
        rate, as on CPUs and on cards for data centres; on other cards it is slower.
        """
        match kind:
            case ProductKind.CONVOLUTION:
                return self.convolution_flops or self.flops
            case ProductKind.FLOAT16:
                return self.half_flops or self.flops
            case ProductKind.BFLOAT16:
                return self.half_flops or self.flops if self._has_bfloat16 else self.flops
            case ProductKind.FLOAT64:
                return self.flops / 2
            case ProductKind.MATRIX:
                return self.flops

    def seconds(self, work: Work) -> float:
        """Predicted time of `work`, one operation after the other (`memseg.planning.roofline`).

        The seconds of a sum are the sum of the seconds.
        """
        products = products_seconds(work.products, self.flops_of, self.bandwidth)
        other_flops = work.flops - sum(one.flops for one in work.products)
        at_peak = products + other_flops / self.flops + work.moved_bytes / self.bandwidth
        return at_peak / self.efficiency + work.operations * self.overhead_s

    @property
    def _has_bfloat16(self) -> bool:
        return self.compute_capability is None or parse_capability(self.compute_capability) >= (8, 0)


def parse_capability(text: str) -> tuple[int, int]:
    """CUDA's compute capability as numbers that compare.

    >>> parse_capability("8.6") < parse_capability("12.0")
    True
    """
    match = re.fullmatch(r"\s*([0-9]+)\.([0-9]+)\s*", text)
    if not match:
        raise InputError(f"a compute capability must be MAJOR.MINOR, got {text!r}; try 8.6")
    return int(match[1]), int(match[2])
