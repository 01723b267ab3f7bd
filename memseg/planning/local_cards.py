"""The cards of this machine, from what NVIDIA's management library (NVML) tells of them.

A plan for the machine at hand needs no profile chosen by hand: NVML, a part of the driver, knows each card's product,
its memory and what other processes hold of it. It knows no rates. So a product that memseg ships a profile of has that
profile's; of others NVML's clocks make an upper bound, and what cannot be had is asked for.

    LocalFigures    what NVML tells of one card; `read_local_figures` asks it, `visible_figures` leaves out what
                    CUDA_VISIBLE_DEVICES hides
    local_card      the Card made of it

NVML's total is the memory that is built in. CUDA, and so torch, shows less: the driver keeps some, which NVML calls
reserved where it tells it (24576 MiB and 23.56 GiB on an RTX 3090, noonghunna/club-3090 issue 58). What processes hold
is the total less the reserved and the free; it counts every process, so ask before taking memory of your own.

Cards count as CUDA counts them under CUDA_DEVICE_ORDER=PCI_BUS_ID. Left out: cards divided by MIG are refused, as CUDA
shows only their parts; mobile Turing cards have the same names as desktop ones (RTX 2060 to 2080), and slower clocks.
None of this has been run by us on a machine with an NVIDIA card.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from memseg.errors import InputError
from memseg.planning.card import Card
from memseg.units import GIB, format_bytes

HERE = "here"
"""Names the cards of this machine: `here` all of them, `here:0` the first."""

_MEND = "name cards by product instead, as in --cards gtx1070; memseg cards lists them"
_RESERVE_BYTES = 3 * GIB // 4
_RESERVE_SOURCE = "an allowance, as in the shipped profiles: CUDA context, kernels, fragmentation, a desktop"
_EFFICIENCY = 0.5
_EFFICIENCY_SOURCE = "an assumption, as in the shipped profiles: half of both peak rates"
_SAME_SIZE = 0.1
"""How far, as a fraction, NVML's total may lie from a profile's capacity: products come in sizes under one name, which
differ by a fifth and more (10 and 12 GB), while error correction and the driver take up to a sixteenth."""
_TRANSFERS_PER_CLOCK = 2
"""Of the memory clock that NVML tells: published clock, bus and bandwidth of GDDR5, 5X, 6, 6X, 7 and HBM2 agree so."""
_LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9}
"""Of one PCI Express lane in one direction, by generation: 2.5 and 5 GT/s with 8b/10b coding, 8, 16 and 32 GT/s with
128b/130b. Later generations count as the fifth."""


@dataclass(frozen=True)
class LocalFigures:
    """What NVML tells of one card. None where the driver does not support the question."""

    product: str
    """"NVIDIA GeForce RTX 3090"; older drivers leave out the first word."""
    uuid: str
    """"GPU-d0b2b12b-...", by which CUDA_VISIBLE_DEVICES may name it."""
    total_bytes: int
    reserved_bytes: int
    """Of the total, for driver and firmware; 0 where NVML does not tell it apart from what is used."""
    free_bytes: int
    compute_capability: str
    is_divided: bool
    """Whether MIG has divided it into instances."""
    num_cores: int | None
    clock_mhz: int | None
    """The highest of its multiprocessors."""
    memory_clock_mhz: int | None
    """The highest."""
    bus_bits: int | None
    pcie_generation: int | None
    """The highest that card and slot have in common."""
    pcie_lanes: int | None

    @property
    def used_bytes(self) -> int:
        """What processes hold."""
        return max(0, self.total_bytes - self.reserved_bytes - self.free_bytes)

    @property
    def flops(self) -> float | None:
        """float32 operations per second at the highest clock, multiply-add counted as two."""
        return 2e6 * self.num_cores * self.clock_mhz if self.num_cores and self.clock_mhz else None

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second to and from its memory."""
        if not self.memory_clock_mhz or not self.bus_bits:
            return None
        return _TRANSFERS_PER_CLOCK * 1e6 * self.memory_clock_mhz * self.bus_bits / 8

    @property
    def link(self) -> float | None:
        """Bytes per second over PCI Express, one direction."""
        if not self.pcie_generation or not self.pcie_lanes:
            return None
        return _LANE_BYTES_PER_S[min(self.pcie_generation, max(_LANE_BYTES_PER_S))] * self.pcie_lanes


def local_card(figures: LocalFigures, index: int, known: Iterable[Card]) -> Card:
    """One card of this machine.

    Its reserve holds, beside the usual, what other processes use of it now. So its available bytes may be negative.

    Args:
        figures: What NVML tells of it.
        index: Among the cards of this machine; it makes the name, `here:0`.
        known: The cards whose rates are known.

    Raises:
        InputError: MIG has divided it; or it is no known product, and NVML tells too little of it.
    """
    name = f"{HERE}:{index}"
    if figures.is_divided:
        raise InputError(
            f"{name}: {figures.product} must be one whole, MIG has divided it; describe the part to be used in a TOML "
            "file (memseg cards --calibrate writes one, where CUDA shows that part)"
        )
    profile = known_product(figures, known)
    card = _unknown(figures, name) if profile is None else _known(figures, name, profile)
    held = (
        f"{format_bytes(figures.used_bytes)} that other processes held when NVML was asked"
        if figures.used_bytes
        else "other processes held nothing when NVML was asked"
    )
    return replace(
        card,
        reserve_bytes=card.reserve_bytes + figures.used_bytes,
        used_bytes=figures.used_bytes,
        device=index,
        sources={**card.sources, "reserve": f"{card.sources['reserve']}; and {held}"},
    )


def known_product(figures: LocalFigures, known: Iterable[Card]) -> Card | None:
    """The known card that this one is: of the same name, as a whole, and of about the same size; None if there is none.

    An RTX 3080 Ti is no RTX 3080, nor is an RTX 3080 Laptop GPU, nor the RTX 3080 with 12 GB, whose name is the same.
    """
    product = _plain(figures.product)
    for card in known:
        if product in map(_plain, card.products):
            off = abs(figures.total_bytes - card.capacity_bytes)
            if off <= _SAME_SIZE * card.capacity_bytes:
                return card
    return None


def visible_figures(figures: Sequence[LocalFigures], setting: str | None) -> tuple[LocalFigures, ...]:
    """Those that CUDA shows under a setting of CUDA_VISIBLE_DEVICES, in its order.

    Args:
        figures: In the order of the PCI bus.
        setting: Numbers, or the beginnings of UUIDs, with commas. CUDA ignores all from the first on that it does not
            know. None where it is not set.
    """
    if setting is None:
        return tuple(figures)
    shown: list[LocalFigures] = []
    for entry in (part.strip() for part in setting.split(",")):
        if re.fullmatch(r"[0-9]+", entry):
            found = figures[int(entry) : int(entry) + 1]
        else:
            found = [one for one in figures if entry and one.uuid.startswith(entry)]
        if len(found) != 1:
            break
        shown += found
    return tuple(shown)


def read_local_figures(setting: str | None) -> tuple[LocalFigures, ...]:
    """What NVML tells of every CUDA card that this process may use, in CUDA's order.

    Args:
        setting: Of CUDA_VISIBLE_DEVICES; None where it is not set.

    Raises:
        InputError: no NVML, no driver, no card, or one that does not tell its product and memory.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise InputError(
            "the cards of this machine must be known to NVML (libnvidia-ml, a part of NVIDIA's driver), which answers: "
            f"{error}; install the driver, until nvidia-smi lists the cards, or {_MEND}"
        ) from None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        figures = [_figures(pynvml, handle) for handle in sorted(handles, key=lambda one: _bus(pynvml, one))]
    except pynvml.NVMLError as error:
        raise InputError(
            f"the cards of this machine must tell NVML their product and memory, one answers: {error}; on a Jetson "
            f"name the board, as in --cards jetson-agx-orin-64gb; else {_MEND}"
        ) from None
    finally:
        pynvml.nvmlShutdown()
    shown = visible_figures(figures, setting)
    if not shown:
        hidden = f"; CUDA_VISIBLE_DEVICES={setting} hides {len(figures)}" if figures else ""
        raise InputError(f"this machine must have a CUDA card, NVML shows none{hidden}; {_MEND}")
    return shown


def _known(figures: LocalFigures, name: str, profile: Card) -> Card:
    capacity, source = profile.capacity_bytes, profile.sources["capacity"]
    if figures.total_bytes < capacity:
        capacity, source = figures.total_bytes, "NVML's total, which is less than the profile's capacity"
    return replace(profile, name=name, capacity_bytes=capacity, sources={**profile.sources, "capacity": source})


def _unknown(figures: LocalFigures, name: str) -> Card:
    flops, bandwidth, link = figures.flops, figures.bandwidth, figures.link
    if flops is None or bandwidth is None or link is None:
        rates = {"cores and clock": flops, "memory clock and bus": bandwidth, "PCI Express link": link}
        missing = ", ".join(what for what, rate in rates.items() if rate is None)
        raise InputError(
            f"{name}: rates of {figures.product} must be known, memseg has no profile of it and NVML does not tell its "
            f"{missing}; measure it (memseg cards --calibrate) or describe it in a TOML file, and give --cards FILE"
        )
    return Card(
        name=name,
        title=figures.product,
        kind="cuda",
        capacity_bytes=figures.total_bytes - figures.reserved_bytes,
        reserve_bytes=_RESERVE_BYTES,
        flops=flops,
        bandwidth=bandwidth,
        link=link,
        efficiency=_EFFICIENCY,
        compute_capability=figures.compute_capability,
        sources={
            "capacity": f"NVML's total, {format_bytes(figures.total_bytes)}, less the "
            f"{format_bytes(figures.reserved_bytes)} that it calls reserved; what CUDA shows may be less still",
            "reserve": _RESERVE_SOURCE,
            "flops": f"NVML: {figures.num_cores} cores at {figures.clock_mhz} MHz, the highest clock, two operations "
            "each; NVML tells no rate of tensor cores, so none is used: memseg cards --calibrate measures it",
            "bandwidth": f"NVML: {figures.bus_bits} bit at {figures.memory_clock_mhz} MHz, two transfers each",
            "link": f"NVML: PCI Express {figures.pcie_generation} x{figures.pcie_lanes}, one direction",
            "efficiency": _EFFICIENCY_SOURCE,
            "compute_capability": "NVML",
        },
    )


def _plain(product: str) -> str:
    """A product's name without what drivers write now so, now otherwise: case, blanks and the maker."""
    return " ".join(product.split()).casefold().removeprefix("nvidia ")


def _bus(nvml: Any, handle: Any) -> tuple[int, int, int]:
    place = nvml.nvmlDeviceGetPciInfo(handle)
    return place.domain, place.bus, place.device


def _figures(nvml: Any, handle: Any) -> LocalFigures:
    def told(question: Callable[..., Any], *arguments: Any) -> Any:
        """The answer, or None where driver or card have none."""
        try:
            return question(handle, *arguments)
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
            return None

    memory = told(nvml.nvmlDeviceGetMemoryInfo, nvml.nvmlMemory_v2)
    if memory is None:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return LocalFigures(
        product=nvml.nvmlDeviceGetName(handle),
        uuid=nvml.nvmlDeviceGetUUID(handle),
        total_bytes=memory.total,
        reserved_bytes=getattr(memory, "reserved", 0),
        free_bytes=memory.free,
        compute_capability=f"{major}.{minor}",
        is_divided=bool((told(nvml.nvmlDeviceGetMigMode) or [0])[0]),
        num_cores=told(nvml.nvmlDeviceGetNumGpuCores),
        clock_mhz=told(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
        memory_clock_mhz=told(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_MEM),
        bus_bits=told(nvml.nvmlDeviceGetMemoryBusWidth),
        pcie_generation=told(nvml.nvmlDeviceGetMaxPcieLinkGeneration),
        pcie_lanes=told(nvml.nvmlDeviceGetMaxPcieLinkWidth),
    )
