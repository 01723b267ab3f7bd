import re
from pathlib import Path

import pytest

from memseg.errors import InputError, ProblemsError, UnknownNameError
from memseg.planning import Card, Work, known_cards, load_card, parse_cards
from memseg.planning.cards import parse_capability
from memseg.resources import shipped_folder
from memseg.units import GIB

from .cases import card

PROFILES = sorted(shipped_folder("profiles").rglob("*.toml"))


def gtx1070_text() -> str:
    return (shipped_folder("profiles") / "gtx1070.toml").read_text()


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_shipped_profile_is_a_card_with_sources(path: Path):
    loaded = load_card(path)
    assert 0 < loaded.available_bytes < loaded.capacity_bytes
    assert 10e9 < loaded.flops < 110e12
    assert 10e9 < loaded.bandwidth < 4e12
    assert 1e9 < loaded.link < 500e9
    figures = {"capacity", "reserve", "flops", "bandwidth", "link", "efficiency"}
    optional = {"convolution_flops", "half_flops"}
    assert set(loaded.sources) - optional == figures | ({"compute_capability"} if loaded.kind == "cuda" else set())


@pytest.mark.parametrize("known", known_cards(), ids=lambda known: known.name)
def test_cards_with_tensor_cores_know_their_rate_in_half_precision_and_in_tf32_where_it_is_faster(known: Card):
    capability = parse_capability(known.compute_capability or "0.0")
    assert (known.half_flops is not None) == (capability >= (7, 0))
    assert known.half_flops is None or 1.9 < known.half_flops / known.flops < 17
    if known.convolution_flops is not None:
        assert capability >= (8, 0)
        assert known.convolution_flops == pytest.approx(known.half_flops / 2, rel=0.01)


NOMINAL_GB = {
    "gtx1070": 8,
    "gtx1080ti": 11,
    "titanx": 12,
    "p100": 16,
    "v100": 16,
    "v100-32gb": 32,
    "v100-sxm2-16gb": 16,
    "v100-sxm2-32gb": 32,
    "t4": 16,
    "rtx2060": 6,
    "rtx2070": 8,
    "rtx2080": 8,
    "rtx2080ti": 11,
    "rtx3060": 12,
    "rtx3070": 8,
    "rtx3080": 10,
    "rtx3090": 24,
    "a10": 24,
    "a100": 40,
    "a100-80gb": 80,
    "a100-sxm4-40gb": 40,
    "a100-sxm4-80gb": 80,
    "jetson-agx-orin-32gb": 32,
    "jetson-agx-orin-64gb": 64,
    "rtx4060ti-16gb": 16,
    "rtx4070": 12,
    "rtx4080": 16,
    "rtx4090": 24,
    "l4": 24,
    "l40s": 48,
    "h100": 80,
    "h100-sxm5": 80,
    "rtx5070": 12,
    "rtx5080": 16,
    "rtx5090": 32,
}
"""What is printed on the box of each CUDA card."""


def test_the_cards_of_the_paper_and_of_today_are_known_from_small_to_large():
    cards = known_cards()
    assert {known.name for known in cards} == {*NOMINAL_GB, "cpu"}
    assert len(cards) == len(PROFILES) >= 26
    assert [known.available_bytes for known in cards] == sorted(known.available_bytes for known in cards)


@pytest.mark.parametrize("known", [card for card in known_cards() if card.kind == "cuda"], ids=lambda card: card.name)
def test_a_cuda_card_shows_most_of_the_memory_on_its_box_and_never_more(known: Card):
    assert 0.9 < known.capacity_bytes / (NOMINAL_GB[known.name] * GIB) < 1
    if size := re.search(r"(\d+) GB", known.title):
        assert int(size[1]) == NOMINAL_GB[known.name]


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_rate_computed_from_cores_and_a_clock_is_their_product(path: Path):
    card = load_card(path)
    if match := re.match(r"(\d+) CUDA cores at (\d+) MHz", card.sources["flops"]):
        assert card.flops == pytest.approx(2e6 * int(match[1]) * int(match[2]), rel=0.001)
    if match := re.match(r"(\d+) tensor cores of (\d+) multiply-adds at (\d+) MHz", card.sources.get("half_flops", "")):
        peak = 2e6 * int(match[1]) * int(match[2]) * int(match[3])
        is_halved = "halved: GeForce cards sum in float32 at half rate" in card.sources["half_flops"]
        assert is_halved == ("GeForce" in card.title)
        assert card.half_flops == pytest.approx(peak / 2 if is_halved else peak, rel=0.003)
    if match := re.match(r"(\d+) bit at ([\d.]+) Gbit/s", card.sources["bandwidth"]):
        assert card.bandwidth == pytest.approx(int(match[1]) / 8 * float(match[2]) * 1e9, rel=0.002)


def test_a_geforce_card_has_two_or_four_times_the_rate_in_half_precision_and_no_faster_tf32():
    for known in known_cards():
        if "GeForce" in known.title and known.half_flops:
            ratio = 4 if known.compute_capability == "7.5" else 2
            assert known.half_flops / known.flops == pytest.approx(ratio, rel=0.01), known.name
            assert known.convolution_flops is None, known.name


def test_a_list_may_repeat_cards_and_give_sizes():
    first, second, third = parse_cards("gtx1070, cpu:12GiB ,gtx1070:7.5GiB")
    assert [first.name, second.name, third.name] == ["gtx1070", "cpu:12GiB", "gtx1070:7.5GiB"]
    assert (second.kind, second.capacity_bytes) == ("cpu", 12 * GIB)
    assert (third.capacity_bytes, third.flops) == (7.5 * GIB, first.flops)
    assert third.sources["capacity"] == "given by the user"
    assert parse_cards("gtx1070,gtx1070")[0] == first


def test_a_number_before_a_card_repeats_it():
    assert parse_cards("2*gtx1070,titanx") == parse_cards("gtx1070,gtx1070,titanx")
    assert [card.name for card in parse_cards("titanx, 3 * cpu:8GiB")] == ["titanx", *["cpu:8GiB"] * 3]


def test_a_card_of_ones_own_is_a_file_and_keeps_its_path_as_its_name(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(gtx1070_text().replace("7.93 GiB", "4 GiB"))
    assert parse_cards(str(path))[0].capacity_bytes == 4 * GIB
    assert parse_cards(f"{path}:6GiB")[0].name == f"{path}:6GiB"
    assert parse_cards(f"{path}:6GiB")[0].capacity_bytes == 6 * GIB


def test_time_is_products_at_one_rate_and_the_rest_at_the_other():
    assert card(10, flops=4.0).seconds(Work(flops=8, moved_bytes=3)) == 2.0 + 3.0


@pytest.mark.parametrize(
    ("text", "kind", "told"),
    [
        ("gtx1071", UnknownNameError, "did you mean gtx1070?"),
        ("", InputError, "joined by commas"),
        ("gtx1070,,titanx", InputError, "joined by commas"),
        ("cpu:0GiB", InputError, "cpu:0GiB: a size must be more than 0 bytes"),
        ("gtx1070:-6GiB", InputError, "gtx1070:-6GiB: a size must be a number with a unit"),
        ("gtx1070:", InputError, "gtx1070:: a size must be a number with a unit"),
        ("cpu:8", InputError, "cpu:8: a size must be a number with a unit"),
        ("0*gtx1070", InputError, "a whole one from 1 to 999, got '0'; try 2"),
        ("-2*gtx1070", InputError, "a whole one from 1 to 999, got '-2'"),
        ("1.5*gtx1070", InputError, "a whole one from 1 to 999, got '1.5'"),
        ("*gtx1070", InputError, "a whole one from 1 to 999, got ''"),
        ("1000*cpu", InputError, "a whole one from 1 to 999, got '1000'"),
        ("2*", UnknownNameError, "unknown card ''"),
        ("cpu:100MiB", InputError, "larger than what it keeps back, 0.20 GiB"),
        ("nowhere/mine.toml", ProblemsError, "cannot be read as TOML"),
    ],
)
def test_what_is_not_a_card_is_refused_with_a_way_out(text: str, kind: type[Exception], told: str):
    with pytest.raises(kind, match=told.replace("?", r"\?")):
        parse_cards(text)


def test_all_problems_of_a_card_file_are_told_at_once(tmp_path: Path):
    path = tmp_path / "mine.toml"
    text = gtx1070_text().replace("[bandwidth]", "[bandwith]").replace('value = "6.46 TFLOP/s"', "value = 6.46")
    path.write_text(text)
    with pytest.raises(ProblemsError) as caught:
        load_card(path)
    assert caught.value.problems == [
        "flops.value: Input should be a valid string",
        "bandwidth: missing",
        "bandwith: unknown key; did you mean bandwidth?",
    ]
    path.write_text(
        gtx1070_text().replace("256 GB/s", "256 GB").replace("0.75 GiB", "9 GiB").replace("TFLOP/s", "TFLOPS")
    )
    with pytest.raises(ProblemsError) as caught:
        load_card(path)
    assert len(caught.value.problems) == 2
    assert "try 6.5 TFLOP/s" in str(caught.value)
    assert "try 256 GB/s" in str(caught.value)


def test_a_card_file_may_give_rates_of_convolutions_and_half_precision_and_an_overhead(tmp_path: Path):
    path = tmp_path / "mine.toml"
    extra = {"convolution_flops": "7 TFLOP/s", "half_flops": "20.5 TFLOP/s", "overhead": "4.5 us"}
    tables = [f'[{name}]\nvalue = "{value}"\nsource = "a test of the form"\n' for name, value in extra.items()]
    path.write_text("\n".join([gtx1070_text(), *tables]))
    card = load_card(path)
    assert (card.convolution_flops, card.half_flops, card.overhead_s) == (7e12, 20.5e12, 4.5e-6)
    assert set(extra) <= set(card.sources)
    path.write_text(path.read_text().replace("4.5 us", "4.5 s").replace('"6.1"', '"sm_61"'))
    with pytest.raises(ProblemsError) as caught:
        load_card(path)
    assert len(caught.value.problems) == 2
    assert "try 8.6" in str(caught.value)
    assert "try 5 us" in str(caught.value)
