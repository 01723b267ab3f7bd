"""Two small profiles, of which every difference can be checked in the head."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from memseg.reports.comparison import Change, Comparison, Measure, Order, StoredProfile
from memseg.reports.comparison_picture import save_comparison_picture
from memseg.reports.comparison_view import comparison_view, format_duration, two_way_bar

MIB = 2**20
GREEN, RED = (26, 152, 80), (215, 48, 39)


def layer(name, saved, parameters=0, time=0.0, peak=0):
    return {
        "name": name,
        "saved_bytes": saved * MIB,
        "peak_bytes": peak * MIB,
        "parameter_bytes": parameters * MIB,
        "forward_s": time / 4,
        "backward_s": time * 3 / 4,
        "flops": 0,
        "moved_bytes": 0,
    }


def profile(*layers, saved=60, **changed):
    content = {
        "model": "net",
        "image": "64x64",
        "batch": 2,
        "recompute": "none",
        "precision": "float32",
        "device": "cpu",
        "card": "cpu",
        "peak_allocated_bytes": 100 * MIB,
        "peak_reserved_bytes": None,
        "device_total_bytes": None,
        "peak_tensor_bytes": (saved + 40) * MIB,
        "peak_moment": "backward of block1",
        "first_step_peak_bytes": 100 * MIB,
        "steady_step_peak_bytes": 100 * MIB,
        "step_seconds": 2.0,
        "by_category": {"saved_activation": saved * MIB, "parameter": 40 * MIB, "workspace": 0},
        "layers": list(layers),
        "alive_at_peak": [],
        **changed,
    }
    return StoredProfile.model_validate_json(json.dumps(content))


@pytest.fixture
def comparison():
    before = profile(layer("stem", 10, 1, 0.5, 70), layer("block1", 40, 2, 1.0, 100), layer("pool", 10, 0, 0.1, 90))
    after = profile(
        layer("stem", 10, 1, 0.5, 60),
        layer("attention", 5, 8, 0.25, 80),
        layer("block1", 10, 2, 1.5, 80),
        saved=25,
        recompute={"block1": "units"},
        peak_allocated_bytes=80 * MIB,
    )
    return Comparison(before, after)


def shown(comparison, width=80, **options):
    text = io.StringIO()
    Console(file=text, width=width).print(comparison_view(comparison, names=("a.json", "b.json"), **options))
    return text.getvalue()


def test_layers_of_one_profile_alone_stand_where_they_run(comparison):
    assert [(one.name, one.only_in) for one in comparison.layers] == [
        ("stem", None),
        ("attention", "after"),
        ("block1", None),
        ("pool", "before"),
    ]
    assert comparison.layers[1].changes[Measure.PARAMETERS] == Change(0, 8 * MIB)
    assert comparison.layers[3].changes[Measure.SAVED].percent == -100


def test_the_differences_of_layers_add_up_to_those_of_the_model(comparison):
    assert comparison.total(Measure.SAVED) == Change(60 * MIB, 25 * MIB)
    assert comparison.total(Measure.PEAK) == Change(100 * MIB, 80 * MIB)
    differences = [one.changes[Measure.SAVED].difference for one in comparison.layers]
    assert sum(differences) == comparison.categories["saved_activation"].difference


def test_each_order_has_what_it_says_first(comparison):
    first = {order: [one.name for one in comparison.sorted_layers(order)] for order in Order}
    assert first[Order.AS_RUN] == ["stem", "attention", "block1", "pool"]
    assert first[Order.SAVED] == ["block1", "pool", "attention", "stem"]
    assert first[Order.PARAMETERS][0] == "attention"
    assert first[Order.TIME] == ["block1", "attention", "pool", "stem"]
    # 8 of 11 MiB of parameters are more of all than 30 of 60 MiB that were saved.
    assert first[Order.CHANGE] == ["attention", "block1", "pool", "stem"]


def test_a_peak_that_fell_for_everybody_does_not_decide_who_changed_most():
    before = profile(layer("small", 1, peak=100), layer("large", 59, peak=90))
    after = profile(layer("small", 1, peak=10), layer("large", 9, peak=80), saved=10)
    assert [one.name for one in Comparison(before, after).sorted_layers()] == ["large", "small"]


def test_what_a_layer_has_beside_its_parts_is_called_so():
    before = profile(layer("block1", 1), layer("block1.conv", 9), saved=10)
    after = profile(layer("block1", 5), layer("block1.conv", 2), saved=7)
    lines = [" ".join(line.split()) for line in shown(Comparison(before, after)).splitlines()]
    assert any(line.startswith("block1 (itself) 1.0 MiB 5.0 MiB +4.0 MiB") for line in lines)
    assert any(line.startswith("block1.conv 9.0 MiB 2.0 MiB -7.0 MiB") for line in lines)


def test_settings_of_segments_are_told_one_by_one():
    levels = [{"block1": "units", "block2": "norms"}, {"block1": "units", "block2": "none", "block3": "units"}]
    one, other = (profile(layer("stem", 1), recompute=level) for level in levels)
    assert Comparison(one, other).settings == {
        "recompute block2": ("norms", "none"),
        "recompute block3": (None, "units"),
    }


def test_a_setting_of_one_alone_is_a_difference():
    found = Comparison(profile(layer("stem", 1)), profile(layer("stem", 1), accumulate=4))
    assert found.settings == {"accumulate": (None, 4)}
    assert found.differs
    assert "accumulate  -       4" in shown(found)


def test_times_that_differ_by_rounding_are_the_same():
    parts = [0.1, 0.2, 0.3]
    one, other = (profile(layer("stem", 1), step_seconds=sum(order)) for order in (parts, parts[::-1]))
    assert one.step_seconds != other.step_seconds
    assert not Comparison(one, other).differs


def test_the_same_settings_with_other_figures_are_laid_to_the_code():
    text = shown(Comparison(profile(layer("stem", 1)), profile(layer("stem", 1), step_seconds=3.0)))
    assert "the settings are the same; the code or memseg has changed" in text
    assert "+50.0 %" in text


@pytest.mark.parametrize("width", [80, 120, 160])
def test_no_figure_is_cut_off_and_long_names_fold(width):
    name = "features.denseblock4.denselayer16.bottleneck.conv"
    before = profile(layer(name, 123, 99, 0.01234, 1000), layer("a", 1), saved=124)
    after = profile(layer(name, 1200, 1, 12.34, 2000), layer("a", 1), saved=1201)
    lines = shown(Comparison(before, after), width).splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    for figures in (("0.12 GiB", "1.17 GiB", "+1.05 GiB", "+875.6 %"), ("12.3 ms", "12.34 s", "+12.33 s", ">9999 %")):
        assert any(all(figure in line for figure in figures) for line in lines), figures
    assert "".join(line.split("  ")[0] for line in lines).count(name) == len(Measure)


def test_bars_begin_in_the_middle_and_whatever_differs_is_seen():
    assert two_way_bar(-1, 1000, 4) == "   ▐│    "
    assert two_way_bar(1000, 1000, 4) == "    │████"
    assert two_way_bar(2000, 1000, 4) == "    │████"
    assert two_way_bar(5, 0, 4) == "    │    "
    text = shown(Comparison(profile(layer("stem", 10), saved=10), profile(layer("stem", 30), saved=30)))
    (line,) = (line for line in text.splitlines() if line.startswith("stem "))
    assert "│█" in line
    assert "█│" not in line


def test_durations_have_digits_that_matter():
    assert [format_duration(one) for one in (0, 2e-6, 0.002, -3.0)] == ["0.0 ms", "2.0 us", "2.0 ms", "-3.00 s"]


def colours(path):
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    return {name: int((pixels == colour).all(-1).sum()) for name, colour in (("green", GREEN), ("red", RED))}


def test_the_picture_has_less_in_green_and_more_in_red(comparison, tmp_path):
    save_comparison_picture(comparison, comparison.layers, tmp_path / "all.png", names=("a", "b"))
    assert all(count > 1000 for count in colours(tmp_path / "all.png").values())
    only_pool = [one for one in comparison.layers if one.name == "pool"]
    save_comparison_picture(comparison, only_pool, tmp_path / "pool.png", names=("a", "b"))
    drawn = colours(tmp_path / "pool.png")
    assert drawn["green"] > 1000
    assert drawn["red"] == 0


def test_a_picture_of_no_difference_can_be_drawn(tmp_path):
    same = profile(layer("stem", 1))
    save_comparison_picture(Comparison(same, same), [], tmp_path / "same.png", names=("a", "b"))
    assert colours(tmp_path / "same.png") == {"green": 0, "red": 0}
