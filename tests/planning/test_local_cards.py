"""NVML's answers made cards: its figures as cards of the field really have them, and the library itself played."""

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from memseg.errors import InputError
from memseg.planning import Card, known_cards, parse_cards
from memseg.planning.cards import local_cards
from memseg.planning.local_cards import LocalFigures, known_product, local_card, read_local_figures, visible_figures
from memseg.units import GIB

MIB = 2**20


def figures(product: str, total_mib: int, **changes: Any) -> LocalFigures:
    """Of a card that nobody uses; of the rest, an RTX 3090's."""
    told = {"reserved_bytes": 0, "free_bytes": total_mib * MIB, "compute_capability": "8.6", "is_divided": False}
    clocks = {"num_cores": 10496, "clock_mhz": 2100, "memory_clock_mhz": 9751, "bus_bits": 384}
    link = {"pcie_generation": 4, "pcie_lanes": 16}
    return LocalFigures(product, "GPU-1", total_mib * MIB, **{**told, **clocks, **link, **changes})


RTX3090 = figures("NVIDIA GeForce RTX 3090", 24576)
RTX3080TI = figures("NVIDIA GeForce RTX 3080 Ti", 12288, num_cores=10240, memory_clock_mhz=9501)


@pytest.mark.parametrize(
    ("product", "total_mib", "name"),
    [
        ("NVIDIA GeForce RTX 3080", 10240, "rtx3080"),
        ("GeForce RTX 2080 Ti", 10989, "rtx2080ti"),
        ("GeForce GTX 1080 Ti", 11178, "gtx1080ti"),
        ("NVIDIA TITAN X (Pascal)", 12196, "titanx"),
        ("NVIDIA GeForce RTX 4060 Ti", 16380, "rtx4060ti-16gb"),
        ("NVIDIA GeForce RTX 5070", 12227, "rtx5070"),
        ("NVIDIA GeForce RTX 5090", 32607, "rtx5090"),
        ("Tesla T4", 15360, "t4"),
        ("Tesla P100-PCIE-16GB", 16276, "p100"),
        ("Tesla V100-SXM2-16GB", 16130, "v100-sxm2-16gb"),
        ("Tesla V100-PCIE-32GB", 32510, "v100-32gb"),
        ("NVIDIA A10", 23028, "a10"),
        ("NVIDIA A100-PCIE-40GB", 40960, "a100"),
        ("NVIDIA A100-SXM4-80GB", 81920, "a100-sxm4-80gb"),
        ("NVIDIA A100 80GB PCIe", 81920, "a100-80gb"),
        ("NVIDIA H100 PCIe", 81559, "h100"),
        ("NVIDIA H100 80GB HBM3", 81559, "h100-sxm5"),
    ],
)
def test_a_product_that_nvml_names_has_the_rates_of_its_profile(product: str, total_mib: int, name: str):
    profile = known_product(figures(product, total_mib), known_cards())
    assert profile is not None
    assert profile.name == name


@pytest.mark.parametrize(
    ("product", "total_mib"),
    [
        ("NVIDIA GeForce RTX 3080 Ti", 12288),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", 8192),
        ("NVIDIA GeForce RTX 3080", 12288),
        ("NVIDIA GeForce RTX 3060", 8192),
        ("NVIDIA GeForce RTX 2060", 12288),
        ("NVIDIA GeForce RTX 4060 Ti", 8188),
        ("NVIDIA GeForce RTX 5090 D", 32607),
        ("NVIDIA GeForce RTX 4080 SUPER", 16376),
        ("GeForce GTX TITAN X", 12207),
        ("NVIDIA A10G", 23028),
        ("NVIDIA H100 NVL", 95830),
        ("NVIDIA L40", 46068),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4864),
        ("NVIDIA", 10240),
    ],
)
def test_no_product_passes_for_one_with_a_name_or_a_size_like_it(product: str, total_mib: int):
    assert known_product(figures(product, total_mib), known_cards()) is None


@pytest.mark.parametrize("known", [card for card in known_cards() if card.kind == "cuda"], ids=lambda card: card.name)
def test_every_cuda_profile_is_found_by_each_name_of_its_own(known: Card):
    total_mib = known.capacity_bytes // MIB
    assert known.products
    assert all(known_product(figures(name, total_mib), known_cards()) == known for name in known.products)


def test_a_known_card_has_the_capacity_of_its_profile_and_never_more_than_nvmls_total():
    (profile,) = parse_cards("rtx3090")
    card = local_card(RTX3090, 1, known_cards())
    assert card == replace(profile, name="here:1", device=1)
    assert card.capacity_bytes == int(23.56 * GIB) < RTX3090.total_bytes
    assert card.sources["capacity"] == profile.sources["capacity"]
    less = local_card(replace(RTX3090, total_bytes=23 * GIB, free_bytes=23 * GIB), 1, known_cards())
    assert less.capacity_bytes == 23 * GIB
    assert less.sources["capacity"].startswith("NVML's total")


def test_what_other_processes_hold_is_added_to_the_reserve_and_told():
    busy = replace(RTX3090, reserved_bytes=316 * MIB, free_bytes=(24576 - 316 - 2048) * MIB)
    card = local_card(busy, 0, known_cards())
    assert card.used_bytes == 2 * GIB
    assert card.reserve_bytes == 2.75 * GIB
    assert card.sources["reserve"].endswith("; and 2.00 GiB that other processes held when NVML was asked")
    assert local_card(RTX3090, 0, known_cards()).sources["reserve"].endswith("held nothing when NVML was asked")


def test_of_an_unknown_product_nvmls_clocks_make_the_rates_and_its_reserved_bytes_are_no_capacity():
    card = local_card(replace(RTX3080TI, reserved_bytes=288 * MIB, free_bytes=12000 * MIB), 0, known_cards())
    assert (card.name, card.title, card.kind) == ("here:0", "NVIDIA GeForce RTX 3080 Ti", "cuda")
    assert card.capacity_bytes == 12000 * MIB
    assert card.reserve_bytes == 0.75 * GIB
    assert card.flops == 2 * 10240 * 2100e6
    assert card.bandwidth == pytest.approx(912e9, rel=0.001)
    assert card.link == pytest.approx(31.5e9, rel=0.001)
    assert card.half_flops is None
    assert card.compute_capability == "8.6"
    assert set(card.sources) == {
        *("capacity", "reserve", "flops", "bandwidth", "link", "efficiency", "compute_capability")
    }


@pytest.mark.parametrize(
    ("name", "memory_clock_mhz", "bus_bits"),
    [
        ("gtx1070", 4004, 256),
        ("gtx1080ti", 5505, 352),
        ("rtx2080ti", 7000, 352),
        ("rtx3090", 9751, 384),
        ("rtx4090", 10501, 384),
        ("rtx5090", 14001, 512),
        ("v100", 877, 4096),
        ("a100", 1215, 5120),
    ],
)
def test_the_memory_clock_and_the_bus_make_the_published_bandwidth(name: str, memory_clock_mhz: int, bus_bits: int):
    (profile,) = parse_cards(name)
    told = figures("a card", 8192, memory_clock_mhz=memory_clock_mhz, bus_bits=bus_bits)
    assert told.bandwidth == pytest.approx(profile.bandwidth, rel=0.005)


def test_an_unknown_product_without_clocks_is_refused_with_what_to_write():
    silent = replace(RTX3080TI, num_cores=None, bus_bits=None)
    with pytest.raises(
        InputError, match="does not tell its cores and clock, memory clock and bus; measure it"
    ) as caught:
        local_card(silent, 2, known_cards())
    assert str(caught.value).startswith("here:2: rates of NVIDIA GeForce RTX 3080 Ti must be known")
    assert "TOML file, and give --cards FILE" in str(caught.value)
    assert local_card(replace(RTX3090, num_cores=None), 0, known_cards()).flops == parse_cards("rtx3090")[0].flops


def test_a_card_that_mig_has_divided_is_refused():
    with pytest.raises(InputError, match="here:0: NVIDIA GeForce RTX 3090 must be one whole, MIG has divided it"):
        local_card(replace(RTX3090, is_divided=True), 0, known_cards())


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        (None, "abc"),
        ("", ""),
        ("2,0", "ca"),
        ("1, 2", "bc"),
        ("0,7,1", "a"),
        ("-1", ""),
        ("GPU-b", "b"),
        ("GPU-c,GPU-", "c"),
        ("MIG-GPU-a/1/0", ""),
    ],
)
def test_cuda_visible_devices_hides_and_orders_cards_as_cuda_reads_it(setting: str | None, shown: str):
    three = [replace(RTX3090, uuid=f"GPU-{letter}") for letter in "abc"]
    assert "".join(one.uuid[-1] for one in visible_figures(three, setting)) == shown


class PlayedNvml:
    """pynvml with cards, as far as it is asked; a handle is an index. Constants and errors are pynvml's own."""

    def __init__(self, cards: list[LocalFigures], *, buses: list[int] | None = None, memory_v2: bool = True) -> None:
        self.cards, self.buses, self.memory_v2 = cards, buses or [*range(len(cards))], memory_v2
        self.open = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(pynvml, name)

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetPciInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(domain=0, bus=self.buses[handle], device=0)

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.cards[handle].product

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return self.cards[handle].uuid

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, ...]:
        return tuple(map(int, self.cards[handle].compute_capability.split(".")))

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> SimpleNamespace:
        card = self.cards[handle]
        if version is None:
            return SimpleNamespace(total=card.total_bytes, free=card.free_bytes)
        if not self.memory_v2:
            raise pynvml.NVMLError_FunctionNotFound
        return SimpleNamespace(total=card.total_bytes, free=card.free_bytes, reserved=card.reserved_bytes)

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        raise pynvml.NVMLError_NotSupported

    def nvmlDeviceGetMaxClockInfo(self, handle: int, which: int) -> int | None:
        return self.cards[handle].clock_mhz if which == pynvml.NVML_CLOCK_SM else self.cards[handle].memory_clock_mhz

    def nvmlDeviceGetNumGpuCores(self, handle: int) -> int | None:
        return self.cards[handle].num_cores

    def nvmlDeviceGetMemoryBusWidth(self, handle: int) -> int | None:
        return self.cards[handle].bus_bits

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: int) -> int | None:
        return self.cards[handle].pcie_generation

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: int) -> int | None:
        return self.cards[handle].pcie_lanes


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives the process another machine: call with its cards."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def put(*cards: LocalFigures, **how: Any) -> PlayedNvml:
        nvml = PlayedNvml(list(cards), **how)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        return nvml

    return put


def test_what_is_played_is_what_pynvml_has():
    played = {name for name in vars(PlayedNvml) if name.startswith("nvml")}
    assert {"nvmlInit", "nvmlDeviceGetMemoryInfo"} <= played
    assert all(callable(getattr(pynvml, name)) for name in played)


def test_nvmls_answers_come_back_as_figures_in_the_order_of_the_bus_and_it_is_closed(machine: Any):
    second = replace(RTX3080TI, uuid="GPU-2", reserved_bytes=288 * MIB, free_bytes=12000 * MIB)
    nvml = machine(second, RTX3090, buses=[65, 1])
    assert read_local_figures(None) == (RTX3090, second)
    assert read_local_figures("1") == (second,)
    assert nvml.open == 0


def test_a_driver_that_does_not_tell_reserved_bytes_counts_them_as_used(machine: Any):
    machine(replace(RTX3090, reserved_bytes=316 * MIB, free_bytes=24260 * MIB), memory_v2=False)
    (told,) = read_local_figures(None)
    assert (told.reserved_bytes, told.used_bytes) == (0, 316 * MIB)


def test_here_stands_for_all_cards_of_the_machine_and_a_plans_name_for_one_finds_it_again(machine: Any):
    machine(RTX3090, RTX3080TI)
    cards = parse_cards("here")
    assert [card.name for card in cards] == ["here:0", "here:1"]
    assert cards == local_cards() == parse_cards("here:0,here:1")
    assert [parse_cards(card.name) for card in cards] == [(card,) for card in cards]
    mixed = parse_cards("2*gtx1070,here:1:6GiB")
    assert [card.name for card in mixed] == ["gtx1070", "gtx1070", "here:1:6GiB"]
    assert mixed[2].capacity_bytes == 6 * GIB
    assert parse_cards(mixed[2].name) == mixed[2:]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("here:2", "here:2: the cards of this machine are here:0 to here:1"),
        ("here:6GiB", "here:6GiB: cards of this machine are here"),
        ("here:01", "here:01: cards of this machine are here"),
        ("here:", "here:: cards of this machine are here"),
        ("here:0:0GiB", "here:0:0GiB: a size must be more than 0 bytes"),
        ("here,here:0", "here:0: a card of this machine must be named once"),
        ("here:1,here:1:6GiB", "here:1: a card of this machine must be named once"),
        ("2*here", "here:0, here:1: a card of this machine must be named once"),
    ],
)
def test_cards_of_this_machine_that_are_not_there_or_named_twice_are_refused(text: str, told: str, machine: Any):
    machine(RTX3090, RTX3080TI)
    with pytest.raises(InputError, match=told):
        parse_cards(text)


def test_a_card_that_others_have_filled_is_listed_and_not_planned_for(machine: Any):
    machine(replace(RTX3090, free_bytes=GIB // 2))
    (full,) = local_cards()
    assert full.available_bytes < 0
    with pytest.raises(InputError, match=r"larger than what it keeps back, 24\.25 GiB, 23\.50 GiB of it held by other"):
        parse_cards("here")


def test_a_machine_without_cards_or_with_hidden_ones_says_so(machine: Any, monkeypatch: pytest.MonkeyPatch):
    machine()
    with pytest.raises(InputError, match="this machine must have a CUDA card, NVML shows none; name cards by product"):
        parse_cards("here")
    machine(RTX3090)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(InputError, match="shows none; CUDA_VISIBLE_DEVICES=-1 hides 1; name cards by product"):
        parse_cards("here")


def test_a_card_that_does_not_tell_its_memory_is_refused_as_on_a_jetson(machine: Any):
    nvml = machine(RTX3090)

    def refuse(handle: int, version: int | None = None) -> SimpleNamespace:
        raise pynvml.NVMLError_NotSupported

    nvml.nvmlDeviceGetMemoryInfo = refuse
    with pytest.raises(InputError, match="one answers: Not Supported; on a Jetson name the board, as in"):
        parse_cards("here")
    assert nvml.open == 0
