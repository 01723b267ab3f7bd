"""What is said of a recording's replays, and what is drawn of them."""

import numpy as np
import pytest
from PIL import Image

from memseg.profiling.allocator.recording import DeviceRecording, Recording
from memseg.profiling.allocator.replay import FREE, Event
from memseg.profiling.allocator.settings import AllocatorSettings
from memseg.reports.replay import settings_text, try_settings, worth_knowing
from memseg.reports.replay_curve import COLUMNS, columns, save_replay_curve
from memseg.reports.replay_view import Unit, best_line, measured_line

MIB = 2**20
OWN, EXPANDABLE_BLUE = (34, 34, 34), (47, 126, 216)
STEP = (Event(0, 3 * MIB), Event(1, 12 * MIB), Event(1, FREE), Event(2, 18 * MIB))


def report(*texts, own="", capacity=None, events=STEP, measured=38 * MIB):
    device = DeviceRecording(0, events, 0, 0, 0, measured, ())
    parse = AllocatorSettings.parse
    return try_settings(Recording((device,), parse(own)), [parse(text) for text in texts], capacity)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "expandable_segments:True,roundup_power2_divisions:8",
        "roundup_power2_divisions:[256:1,512:2,>:4]",
        "garbage_collection_threshold:0.6,per_process_memory_fraction:0.5",
    ],
)
def test_the_short_text_of_settings_is_read_back_to_the_same(text):
    settings = AllocatorSettings.parse(text)
    assert AllocatorSettings.parse(settings_text(settings)) == settings


def test_the_best_settings_reserve_least_of_those_that_fit():
    (device,) = report("large_segment_size_mb:32", "large_segment_size_mb:24").devices
    assert device.best.name == "large_segment_size_mb:24"
    unit = Unit.suiting(MIB)
    assert best_line(device, unit) == (
        "PYTORCH_CUDA_ALLOC_CONF=large_segment_size_mb:24 would reserve least: 14.0 MiB less (-36.8 %)"
    )
    (device,) = report("large_segment_size_mb:32", capacity=30 * MIB).devices
    assert device.best is None
    assert best_line(device, unit) == ""


def test_settings_that_do_no_better_are_not_recommended():
    (device,) = report("max_split_size_mb:128").devices
    assert device.best is None
    (device,) = report("", own="large_segment_size_mb:24").devices
    assert device.best is None


def test_torchs_defaults_are_recommended_by_their_name():
    (device,) = report("", own="large_segment_size_mb:200").devices
    assert best_line(device, Unit.suiting(MIB)).startswith("torch's defaults would reserve least: 162.0 MiB less")


def test_the_replay_is_held_against_what_the_device_measured():
    unit = Unit.suiting(MIB)
    (device,) = report().devices
    assert measured_line(device, unit) == "recorded: at most 38.0 MiB reserved, and the replay says the same"
    (device,) = report(measured=40 * MIB).devices
    assert measured_line(device, unit) == "recorded: at most 40.0 MiB reserved; the replay says 38.0 MiB, -5.0 %"
    (device,) = report(capacity=30 * MIB).devices
    assert measured_line(device, unit) == "recorded: at most 38.0 MiB reserved"


def test_collecting_garbage_is_tried_where_it_applies():
    limited = AllocatorSettings.parse("per_process_memory_fraction:0.5")
    collects = [any(one.garbage_collection_threshold for one in worth_knowing(*case)) for case in (
        (limited, 2**30), (limited, None), (AllocatorSettings(), 2**30),
    )]  # fmt: skip
    assert collects == [True, False, False]


def test_a_column_shows_the_most_of_its_events():
    curve = np.zeros(100 * COLUMNS, np.int64)
    curve[4321] = 7
    places, values = columns(curve)
    assert len(values) == COLUMNS
    assert values.max() == 7
    assert places[values.argmax()] == 4321
    assert [len(one) for one in columns(np.empty(0, np.int64))] == [0, 0]


def pixels(path, colour):
    with Image.open(path) as picture:
        return int((np.asarray(picture.convert("RGB"))[:, :1000] == colour).all(-1).sum())


def test_every_setting_has_its_line(tmp_path):
    save_replay_curve(report("expandable_segments:True"), tmp_path / "both.png", name="step")
    assert pixels(tmp_path / "both.png", OWN) > 100
    assert pixels(tmp_path / "both.png", EXPANDABLE_BLUE) > 100


def test_what_is_refused_at_once_can_be_drawn_too(tmp_path):
    tried = report("expandable_segments:True", capacity=MIB)
    assert all(trial.replay.out_of_memory_event == 0 for trial in tried.devices[0].trials)
    save_replay_curve(tried, tmp_path / "none.png", name="step")
    with Image.open(tmp_path / "none.png") as picture:
        assert picture.format == "PNG"
