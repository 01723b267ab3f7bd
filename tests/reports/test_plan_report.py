"""A plan in words and as a picture: every kind of plan, made by hand."""

import io
import re
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from plan_cases import (
    CASES,
    LADDER,
    LEVELS,
    MIB,
    card,
    infeasible,
    other,
    plan,
    replicate,
    replicate_split,
    single,
    split,
)
from rich.console import Console

from memseg.levels import NormMode, Recompute, Strategy
from memseg.planning import parse_cards
from memseg.profiling import Category
from memseg.reports.colours import CATEGORY_COLOURS
from memseg.reports.plan import cards_in_order, infeasible_text, plan_table, share_bar, shortage_lines
from memseg.reports.plan_memory import MemoryScale, apart, memory_legend
from memseg.reports.plan_parts import LEVEL_COLOURS, LEVEL_WORDS, OTHER_COLOUR, OUTSIDE_COLOUR, Kind, memory_parts
from memseg.reports.plan_picture import draw_plan
from memseg.reports.sheet import fitted, measured, wrapped
from memseg.units import GIB


def text_of(value, width=200):
    console = Console(file=io.StringIO(), width=width)
    console.print(plan_table(value))
    return console.file.getvalue()


def drawn(value, folder):
    """The pixels of the picture, (height, width, 3)."""
    draw_plan(value, folder / "plan.png")
    with Image.open(folder / "plan.png") as picture:
        return np.asarray(picture.convert("RGB"))


def colours_of(pixels):
    """Every colour of a picture, as "#rrggbb", and of how many pixels."""
    values, counts = np.unique(pixels.reshape(-1, 3) @ np.array([1 << 16, 1 << 8, 1]), return_counts=True)
    return {f"#{value:06x}": int(count) for value, count in zip(values, counts, strict=True)}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


def test_every_segment_is_told_once_for_each_replica(case):
    told = Counter(re.findall(r"[\w.]+", text_of(case).split("also fits")[0]))
    moments = Counter(re.findall(r"at \w+ of (\w+)", text_of(case).split("\n\n")[1]))
    moments += Counter(re.findall(r"at \w+ of (\w+)", text_of(case).split("\n\n")[0]))
    for name in LADDER:
        assert told[name] - moments[name] == case.replicas, name


def test_levels_are_told_as_runs_in_the_order_of_the_step():
    lines = text_of(split())
    for name, level in zip(LADDER[:5], [*LEVELS, LEVELS[0]], strict=True):
        assert f"{level}: {name} " in lines
    assert f"none: {', '.join(LADDER[:5])}" in text_of(single())


def test_the_headline_tells_how_it_is_trained_and_how_fast():
    text = text_of(split())
    assert text.startswith("ladder-densenet169, 19 classes, 1024x2048, batch 8, frozen norm, float32\n")
    assert "split on gtx1070, cpu:24GiB: 1.75 images/s, 1.14 s a step, 43.0 ms of transfers between cards; " in text
    assert "4 micro-batches, 1f1b" in text
    text = text_of(replicate())
    assert "batch 8 x 2 passes a step, batch norm, synced over replicas" in text
    assert "micro-batches, " not in text.split("also fits")[0]
    assert "on t4, v100, t4, v100, 2 nodes" in text_of(replicate_split())


def test_cards_are_told_in_the_order_of_replicas_and_stages():
    # The second process has the last stage of the first replica, as nodes are filled one after the other.
    mixed = plan(
        Strategy.REPLICATE_SPLIT,
        *(
            card(f"card{rank}", LADDER[11 * stage :][:11], replica=replica, stage=stage, position=rank)
            for rank, (replica, stage) in enumerate([(1, 1), (0, 1), (1, 0), (0, 0)])
        ),
        batch=4,
    )
    assert [one.card for one in cards_in_order(mixed)] == ["card3", "card1", "card2", "card0"]
    assert re.findall(r"│ (card\d)", text_of(mixed)) == ["card3", "card1", "card2", "card0"]
    assert re.findall(r"replica \d of 2|stage \d of 2", text_of(mixed))[:4] == [
        "replica 1 of 2", "stage 1 of 2", "replica 1 of 2", "stage 2 of 2",
    ]  # fmt: skip


def test_shares_and_nodes_are_told_where_there_are_several():
    assert re.findall(r"\d of 8 images", text_of(replicate())) == ["6 of 8 images", "2 of 8 images"]
    assert re.findall(r"│ node (\d)", text_of(replicate_split())) == ["0", "0", "1", "1"]
    assert "node" not in text_of(split())
    assert "replica 1" not in text_of(split())


def test_runners_up_are_told_with_cards_stages_and_schedule():
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in text_of(single()).split("also fits")[1].splitlines()
        if line.startswith("│")
    ]
    assert rows == [
        ["split", "gtx1070 (2), titanx (2)", "stem, block3", "1", "12.50", "160.0 ms", "72%"],
        ["replicate-split", "4 x v100 (4)", "stem, transition2", "4, 1f1b", "9.00", "222.2 ms", "93%"],
        ["single", "gtx1070 (2)", "stem", "1", "1.75", "1.14 s", "100%"],
    ]
    assert "also fits" not in text_of(plan(Strategy.SINGLE, card("t4", LADDER), alternatives=()))


def test_a_plan_that_does_not_fit_says_so_and_by_how_much():
    line = "does not fit: gtx1070 is 0.75 GiB short at backward of skip4; it needs 8.00 GiB and has 7.25 GiB"
    assert shortage_lines(infeasible()) == [line]
    text = text_of(infeasible())
    assert line in text
    assert "0.75 GiB short" in text.split(line)[1]
    assert shortage_lines(single()) == []
    assert "short" not in text_of(single())


def test_of_several_cards_those_that_are_short_are_told_with_their_place():
    cards = [card("t4", LADDER, needs=size * GIB, replica=i, position=i) for i, size in enumerate((5, 9))]
    forced = plan(Strategy.REPLICATE, *cards, batch=4, feasible=False)
    (line,) = shortage_lines(forced)
    assert line.startswith("does not fit: t4 (replica 2 of 2) is 1.75 GiB short")
    marked = plan(Strategy.SINGLE, card("t4", LADDER), feasible=False)
    assert shortage_lines(marked) == ["marked as a plan that does not fit, though every card has room"]


@pytest.mark.parametrize(("columns", "where"), [(1, "the whole model"), (2, "stage 1 of 2")])
def test_where_nothing_fits_stages_are_counted_and_not_cards(columns, where):
    # The closest has two replicas, so twice as many cards as stages.
    one = parse_cards("cpu:2GiB")[0]
    error = SimpleNamespace(
        closest=SimpleNamespace(columns=[()] * columns), card=one, shortfall_bytes=GIB // 2, needed_bytes=2 * GIB,
        available_bytes=one.available_bytes, moment="backward of block3", stage_number=1, segments=("stem", "block3"),
        by_category={"activation": GIB, "optimizer_state": GIB // 2, "outside": GIB // 2}, advice=["batch 1"],
    )  # fmt: skip
    lines = infeasible_text(error).splitlines()
    assert lines[0] == "no plan fits; the closest is 0.50 GiB short on cpu:2GiB at backward of block3"
    assert lines[1].startswith(f"  {where} (stem .. block3) needs 2.00 GiB, has 1.80 GiB (2.00 GiB - ")
    assert lines[2] == "    of these: activation 1.00 GiB, optimizer state 0.50 GiB, outside 0.50 GiB"
    assert lines[3:] == ["  each of these alone would fit:", "    batch 1"]


def test_the_bar_has_all_parts_of_the_capacity():
    # 24 characters for 24 GiB; the reserve of 0.75 is rounded to one.
    assert share_bar(split().cards[1]) == "█" * 9 + "▓" + "░" * 13 + "▒"
    assert share_bar(infeasible().cards[0]) == "█" * 22 + "▒▒"
    for one in (one for case in CASES.values() for one in case().cards):
        assert len(share_bar(one)) == 24


def test_names_that_are_markup_of_the_terminal_are_shown_as_they_are():
    names = ["[bold]stem[/bold]", "[/red]", "loss"]
    hostile = plan(
        Strategy.SINGLE,
        card("[link=x]t4[/link]", names),
        model="[blink]",
        alternatives=(other(Strategy.SINGLE, ("[i]t4[/i]",), (2,), ("[b]",), 1.0, 0.5),),
    )
    text = text_of(hostile)
    for name in [*names, "[link=x]t4[/link]", "[blink]", "[i]t4[/i]", "[b]"]:
        assert name in text


def test_parts_of_a_memory_add_up_to_the_capacity(case):
    for one in case.cards:
        parts = memory_parts(one)
        short = max(0, one.needed_bytes - one.available_bytes)
        assert sum(part.size_bytes for part in parts) == one.capacity_bytes + short
        assert sum(part.size_bytes for part in parts if part.kind is Kind.PEAK) == one.predicted_peak_bytes
        ends = [part.start_bytes + part.size_bytes for part in parts if part.kind is not Kind.RESERVE]
        assert [part.start_bytes for part in parts if part.kind is not Kind.RESERVE] == [0, *ends[:-1]]
        assert parts[-1].start_bytes + parts[-1].size_bytes == one.capacity_bytes


def test_parts_have_the_names_and_colours_of_a_profile():
    parts = {part.name: part for part in memory_parts(split().cards[1])}
    for category in Category:
        if category in parts:
            assert parts[category].colour == CATEGORY_COLOURS[category]
    assert set(parts) == set(Category) - {Category.AUTOCAST, Category.WORKSPACE} | {
        "outside the allocator", "free", "reserve",
    }  # fmt: skip
    sizes = split().cards[1].by_category
    assert parts[Category.PARAMETER].size_bytes == sizes["parameter"] + sizes["buffer"]


def test_a_category_that_nobody_knows_is_drawn_beside_the_others():
    one = card("t4", LADDER).model_copy(update={"by_category": {"my_cache": GIB, "activation": 5 * GIB}})
    assert [(part.name, part.colour) for part in memory_parts(one)][:2] == [
        (Category.SAVED, CATEGORY_COLOURS[Category.SAVED]), ("my cache", OTHER_COLOUR),
    ]  # fmt: skip


def test_the_legend_has_each_part_once_in_the_order_of_the_bars():
    names = [part.name for part in memory_legend(split().cards)]
    assert names == [part.name for part in memory_parts(split().cards[1])]
    assert names[-3:] == ["outside the allocator", "free", "reserve"]


def test_levels_get_darker_and_can_be_told_apart_without_colours():
    assert set(LEVEL_COLOURS) == set(LEVEL_WORDS) == set(Recompute)
    greys = [Image.new("RGB", (1, 1), LEVEL_COLOURS[level]).convert("L").getpixel((0, 0)) for level in Recompute]
    assert all(one - darker > 30 for one, darker in pairwise(greys))


def test_the_picture_is_whole_and_has_the_colours_of_levels_and_memory(case, tmp_path):
    pixels = drawn(case, tmp_path)
    found = colours_of(pixels)
    used = {segment.recompute for one in case.cards for segment in one.segments}
    for level, colour in LEVEL_COLOURS.items():
        # More than the square in a legend, or nothing.
        assert (found.get(colour, 0) > 1000) == (level in used), level
    for category in (Category.SAVED, Category.TEMPORARY, Category.GRADIENT):
        assert found[CATEGORY_COLOURS[category]] > 500
    assert (found.get(OUTSIDE_COLOUR, 0) > 500) == any(one.outside_bytes for one in case.cards)
    assert (found.get("#c62828", 0) > 200) == (not case.feasible)
    # Nothing is cut off.
    for edge in (pixels[:12], pixels[-6:], pixels[:, :12], pixels[:, -12:]):
        assert (edge == 255).all()


@pytest.mark.parametrize("replicas", [8, 9])
def test_eight_cards_stand_beside_each_other_and_more_below(replicas, tmp_path):
    cards = [card("rtx2080ti", LADDER, replica=i, position=i, levels=LEVELS[i % 4 :]) for i in range(replicas)]
    height, width, _ = drawn(plan(Strategy.REPLICATE, *cards, batch=2 * replicas, norm=NormMode.FROZEN), tmp_path).shape
    assert 1500 < width < 2500
    assert (height > 2500) == (replicas > 8)


def test_a_picture_takes_any_name(tmp_path):
    # A formula that matplotlib would refuse, letters its font lacks, a line break, and far too much.
    names = ["$\\frac{", "\N{CJK UNIFIED IDEOGRAPH-6A21}", "a\nb\tc\x00", "encoder.layers." * 40, "loss"]
    strange = plan(Strategy.SINGLE, card("$x_{" + "y" * 200, names), model="$m_{odel" * 40)
    pixels = drawn(strange, tmp_path)
    assert pixels.shape[1] < 2000
    assert (pixels[:, -12:] == 255).all()


def test_what_is_drawn_is_replaced_whole(tmp_path):
    path = tmp_path / "plan.png"
    path.write_bytes(b"old")
    draw_plan(single(), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OSError, match="nowhere"):
        draw_plan(single(), tmp_path / "nowhere" / "plan.png")


def test_words_are_shortened_in_the_middle_until_they_fit():
    name = "backbone.encoder.layers.3.attention.query_key_value"
    for width in (0.5, 1.0, 2.0, 5.0):
        shown, size = fitted(name, width, 8)
        assert measured(shown, size) <= width
    assert fitted(name, 10, 8) == (name, 8)
    shown, _ = fitted(name, 1.5, 8)
    start, end = shown.split("…")
    assert name.startswith(start)
    assert name.endswith(end)
    assert wrapped("one two three", 100, 8) == ["one two three"]
    assert wrapped("one two three", 0.01, 8) == ["one", "two", "three"]


def test_labels_keep_apart_and_stay_in_their_place():
    places = apart([3.0, 2.99, 2.98, 0.1], top=0.0, bottom=3.0)
    assert all(lower - upper >= 0.16 for lower, upper in pairwise(places))
    assert min(places) >= 0.0
    assert max(places) <= 3.0


def test_all_bars_have_one_scale():
    cards = [card("large", LADDER, capacity=80 * GIB), card("tiny", LADDER, capacity=GIB, needs=100 * MIB)]
    scale = MemoryScale(cards, height=4.0)
    assert [scale.inches(one.capacity_bytes) for one in cards] == [4.0, 0.05]
    assert MemoryScale(infeasible().cards, height=4.0).inches(8 * GIB) == 4.0
