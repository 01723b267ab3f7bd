from pathlib import Path

import pytest
import torch

from memseg.planning import Work, load_card
from memseg.planning.roofline import ProductKind
from memseg.profiling import calibrate
from memseg.profiling.calibrate import QUICK, Calibration, Measured, profile_text

CPU = torch.device("cpu")


def measured(value: float, what: str = "a kernel") -> Measured:
    return Measured(value, 0.9 * value, 1.1 * value, what)


def calibration() -> Calibration:
    return Calibration(
        CPU,
        convolutions=measured(120e9, "float32 convolutions"),
        products=measured(100e9, "float32 matrix products"),
        half=measured(200.06e9, "bfloat16 convolutions"),
        copy=measured(20e9, "copying"),
        overhead=measured(400e3, "additions"),
        link=measured(1.5e9, "sending"),
        capacity_bytes=24 * 2**30,
        reserve_bytes=2**30,
        reserve_reason="what others held",
    )


def test_the_written_file_is_a_card_with_every_figure_and_where_it_comes_from(tmp_path: Path):
    path = tmp_path / "this-machine.toml"
    path.write_text(profile_text(calibration(), ["memseg", "cards", "--calibrate"]), encoding="utf-8")
    card = load_card(path)
    assert (card.kind, card.efficiency, card.compute_capability) == ("cpu", 1.0, None)
    assert (card.capacity_bytes, card.reserve_bytes) == (24 * 2**30, 2**30)
    assert (card.flops, card.convolution_flops, card.half_flops) == (100e9, 120e9, 200.1e9)
    assert (card.bandwidth, card.link, card.overhead_s) == (20e9, 1.5e9, 2.5e-6)
    assert card.flops_of(ProductKind.BFLOAT16) == 200.1e9
    for name, source in card.sources.items():
        if name != "efficiency":
            assert "memseg cards --calibrate, 20" in source, name
            assert f"torch {torch.__version__}" in source, name
            assert card.title in source, name
    assert "median of runs from 90.0 to 110.0 GFLOP/s" in card.sources["flops"]
    assert card.sources["reserve"].startswith("what others held")


def test_titles_with_quotes_and_backslashes_survive_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calibrate, "_processor", lambda device: 'a "chip" \\ of ours™')
    path = tmp_path / "this.toml"
    path.write_text(profile_text(calibration(), ["memseg"]), encoding="utf-8")
    assert load_card(path).title == 'a "chip" \\ of ours™'


def test_runs_that_differ_by_more_than_half_are_named():
    assert calibration().disturbed == []
    assert Measured(10.0, 8.0, 12.0, "steady").is_disturbed is False
    assert Measured(10.0, 8.0, 12.1, "shaken").is_disturbed is True


def test_a_rate_is_the_median_without_the_first_run():
    pauses = iter([0.5, 0.01, 0.02, 0.01])
    clock = iter([0.0, 5.0, 10.0, 12.0, 20.0, 24.0, 30.0, 33.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate.time, "perf_counter", lambda: next(clock))
        rate = calibrate._rate(lambda: next(pauses), 12.0, CPU, QUICK, "a kernel")
    assert (rate.value, rate.slowest, rate.fastest) == (4.0, 3.0, 6.0)


def test_the_memory_of_this_machine_leaves_something_to_train_in():
    capacity, reserve, reason = calibrate._cpu_memory()
    assert 0 < reserve < capacity
    assert "oneDNN" in reason


def test_more_work_takes_more_time_on_a_calibrated_card(tmp_path: Path):
    path = tmp_path / "this.toml"
    path.write_text(profile_text(calibration(), ["memseg"]), encoding="utf-8")
    card = load_card(path)
    assert card.seconds(Work(10**9, 10**6, 10)) == pytest.approx(0.01 + 5e-5 + 25e-6)
