from pathlib import Path

import pytest

from memseg.errors import InputError, ProblemsError, UnknownNameError
from memseg.planning import Work, known_cards, load_card, parse_cards
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
    assert set(loaded.sources) == figures | ({"compute_capability"} if loaded.kind == "cuda" else set())


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
