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
    assert 10e9 < loaded.flops < 100e12
    assert 10e9 < loaded.bandwidth < 4e12
    assert 1e9 < loaded.link < 100e9
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


def test_the_cards_of_the_paper_and_of_today_are_known_from_small_to_large():
    cards = known_cards()
    assert {"gtx1070", "titanx", "rtx3060", "a100", "cpu"} <= {known.name for known in cards}
    assert len(cards) == len(PROFILES) >= 14
    assert [known.available_bytes for known in cards] == sorted(known.available_bytes for known in cards)


def test_a_list_may_repeat_cards_and_give_sizes():
    first, second, third = parse_cards("gtx1070, cpu:12GiB ,gtx1070:7.5GiB")
    assert [first.name, second.name, third.name] == ["gtx1070", "cpu:12GiB", "gtx1070:7.5GiB"]
    assert (second.kind, second.capacity_bytes) == ("cpu", 12 * GIB)
    assert (third.capacity_bytes, third.flops) == (7.5 * GIB, first.flops)
    assert third.sources["capacity"] == "given by the user"
    assert parse_cards("gtx1070,gtx1070")[0] == first


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
        ("cpu:0GiB", InputError, "more than 0 bytes"),
        ("cpu:8", InputError, "a number with a unit"),
        ("cpu:100MiB", InputError, "larger than what it keeps back, 0.50 GiB"),
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
