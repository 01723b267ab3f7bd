"""`memseg replay` through the whole command line, on recordings small enough to be followed in the head."""

import json
import os
import pickle

import pytest
from PIL import Image

from memseg.cli.main import main
from memseg.profiling.allocator.replay import FREE, Event
from memseg.profiling.allocator.settings import AllocatorSettings
from memseg.profiling.allocator.snapshot import write_snapshot

MIB = 2**20
STEP = [Event(0, 3 * MIB), Event(1, 12 * MIB), Event(1, FREE), Event(2, 18 * MIB)]
"""3 MiB come out of a segment of 20, and 12 MiB of what is left of it; 18 MiB get a segment of their own."""
WORTH_KNOWING = ["", "expandable_segments:True", "max_split_size_mb:128", "roundup_power2_divisions:4"]


def record(path, text="", events=STEP, capacity_bytes=None):
    write_snapshot(events, path, settings=AllocatorSettings.parse(text), capacity_bytes=capacity_bytes)
    return path


@pytest.fixture
def recording(tmp_path):
    return record(tmp_path / "step.pickle")


def replay(capsys, *arguments):
    assert main(["replay", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def replay_json(capsys, *arguments):
    return json.loads(replay(capsys, *arguments, "--json"))


def refusal(capsys, *arguments):
    assert main(["replay", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


def test_json_has_the_figures_of_the_replay_and_of_the_device(recording, capsys):
    found = replay_json(capsys, recording)
    assert (found["settings"], found["capacity_bytes"], found["notes"]) == ("", None, [])
    (device,) = found["devices"]
    assert (device["device"], device["events"], device["alive_before"], device["unknown"]) == (0, 4, 0, [])
    assert device["measured_peak_reserved_bytes"] == 38 * MIB
    own = device["replays"][0]
    assert own == {
        "settings": "",
        "own": True,
        "peak_allocated_bytes": 21 * MIB,
        "peak_allocated_event": 3,
        "peak_requested_bytes": 21 * MIB,
        "peak_active_bytes": 21 * MIB,
        "peak_reserved_bytes": 38 * MIB,
        "peak_reserved_event": 3,
        "reserved_but_not_allocated_bytes": 17 * MIB,
        "largest_free_block_bytes": 17 * MIB,
        "segments": 2,
        "out_of_memory": None,
    }


def test_a_few_settings_are_tried_where_none_are_given(recording, capsys):
    (device,) = replay_json(capsys, recording)["devices"]
    assert [one["settings"] for one in device["replays"]] == WORTH_KNOWING
    assert [one["own"] for one in device["replays"]] == [True, False, False, False]


def test_settings_other_than_the_defaults_are_compared_with_the_defaults_too(tmp_path, capsys):
    found = replay_json(capsys, record(tmp_path / "own.pickle", "max_split_size_mb:64"))
    (device,) = found["devices"]
    assert found["settings"] == "max_split_size_mb:64"
    assert [one["settings"] for one in device["replays"]] == ["max_split_size_mb:64", *WORTH_KNOWING]
    own = record(tmp_path / "expandable.pickle", "expandable_segments:True")
    (device,) = replay_json(capsys, own)["devices"]
    assert [one["settings"] for one in device["replays"]] == [WORTH_KNOWING[1], "", *WORTH_KNOWING[2:]]


def test_those_that_are_given_are_tried_in_their_order_each_once(recording, capsys):
    given = ["roundup_power2_divisions:8,expandable_segments:True", "", "large_segment_size_mb:32"]
    options = [part for text in (*given, given[0]) for part in ("--allocator", text)]
    (device,) = replay_json(capsys, recording, *options)["devices"]
    texts = [one["settings"] for one in device["replays"]]
    assert texts == ["", "expandable_segments:True,roundup_power2_divisions:8", "large_segment_size_mb:32"]
    # One segment of 32 MiB serves 3 and 12 MiB; 18 MiB ask for a segment of their own, but fit into the 29 left.
    assert device["replays"][2]["peak_reserved_bytes"] == 32 * MIB
    assert device["best_settings"] == "large_segment_size_mb:32"


def test_under_a_capacity_the_refused_request_is_named(recording, capsys):
    found = replay_json(capsys, recording, "--capacity", "30MiB", "--allocator", "large_segment_size_mb:24")
    (device,) = found["devices"]
    assert device["replays"][0]["out_of_memory"] == {
        "event": 3,
        "requested_bytes": 18 * MIB,
        "needed_bytes": 18 * MIB,
        "free_bytes": 10 * MIB,
        "allocated_bytes": 3 * MIB,
        "reserved_bytes": 20 * MIB,
        "largest_free_block_bytes": 17 * MIB,
    }
    assert device["replays"][1]["out_of_memory"] is None
    assert device["best_settings"] == "large_segment_size_mb:24"
    out = replay(capsys, recording, "--capacity", "30MiB", "--allocator", "large_segment_size_mb:24")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "torch's defaults (own) 15.0 15.0 20.0 no fit 17.0 1" in lines
    assert "large_segment_size_mb:24 21.0 21.0 24.0 fits 21.0 1" in lines
    assert "torch's defaults 4 18.0 18.0 10.0 17.0 17.0" in lines
    assert "PYTORCH_CUDA_ALLOC_CONF=large_segment_size_mb:24 fits, with 24.0 MiB reserved" in lines


def test_text_compares_with_the_own_settings_and_with_the_device(recording, capsys):
    lines = [" ".join(line.split()) for line in replay(capsys, recording).splitlines()]
    assert lines[0] == f"{recording}, recorded under torch's defaults"
    assert "device 0: 4 events, nothing was alive before" in lines
    assert "recorded: at most 38.0 MiB reserved, and the replay says the same" in lines
    assert "torch's defaults (own) 21.0 21.0 38.0 17.0 2" in lines
    assert any(line.startswith("max_split_size_mb:128 21.0 21.0 38.0 same ") for line in lines)


@pytest.mark.parametrize("capacity", [[], ["--capacity", "30MiB"]])
def test_no_figure_is_cut_off_at_80_columns(recording, capsys, monkeypatch, capacity):
    monkeypatch.setattr("memseg.cli.console.PIPED_WIDTH", 80)
    lines = replay(capsys, recording, *capacity).splitlines()
    for name in ("torch's defaults (own)", *WORTH_KNOWING[1:]):
        row = next(line for line in lines if line.startswith(f"{name} "))
        assert len(row.rstrip()) <= 80
        assert row.count(".0 ") + row.count(".0%") >= 4, row


def test_garbage_is_collected_only_below_a_fraction_of_a_capacity(tmp_path, recording, capsys):
    collecting = "garbage_collection_threshold:0.8"
    alone = replay_json(capsys, recording, "--allocator", collecting, "--capacity", "40MiB")
    assert "does nothing here" in alone["notes"][0]
    limited = record(tmp_path / "limited.pickle", "per_process_memory_fraction:0.9")
    assert "say that with --capacity" in replay_json(capsys, limited)["notes"][0]
    found = replay_json(capsys, limited, "--capacity", "60MiB")
    assert found["notes"] == []
    texts = [one["settings"] for one in found["devices"][0]["replays"]]
    assert texts[-1] == f"{collecting},per_process_memory_fraction:0.9"
    assert all("per_process_memory_fraction:0.9" in text for text in texts)


def test_what_the_recording_does_not_say_is_told(tmp_path, recording, capsys):
    content = pickle.loads(recording.read_bytes())
    # As if recording had begun after the first allocation: its block is in the last state alone.
    trace = content["device_traces"][0]
    content["device_traces"][0] = [entry for entry in trace if entry.get("time_us") != 0]
    content["device_traces"].append([*trace])
    content["segments"] += [{**segment, "device": 1} for segment in content["segments"]]
    middle = tmp_path / "middle.pickle"
    middle.write_bytes(pickle.dumps(content))
    first, second = replay_json(capsys, middle)["devices"]
    assert (first["alive_before"], first["alive_before_bytes"], second["alive_before"]) == (1, 3 * MIB, 0)
    assert "alive before the recording began" in first["unknown"][0]
    out = replay(capsys, middle, "--png", tmp_path / "both.png")
    assert "not known, so figures may be off by it:\n  1 blocks that were alive before" in out
    assert "device 0: 4 events, the first 1 for 3.0 MiB that were alive before" in out
    assert "device 1: 4 events, nothing was alive before" in out
    with Image.open(tmp_path / "both.png") as picture:
        assert picture.size == (1600, 1200)


def test_a_profiles_own_snapshot_can_be_replayed_and_drawn(tmp_path, capsys):
    path, picture = tmp_path / "step.pickle", tmp_path / "replay.png"
    job = ["ladder-densenet-mini", "--image", "128x256", "--batch", "1", "--recompute", "units", "--card", "v100"]
    assert main(["profile", *job, "--json", "--snapshot", str(path)]) == 0
    profile = json.loads(capsys.readouterr().out)
    (device,) = replay_json(capsys, path, "--png", picture)["devices"]
    own = device["replays"][0]
    assert own["peak_reserved_bytes"] == profile["peak_reserved_bytes"] == device["measured_peak_reserved_bytes"]
    assert own["peak_allocated_bytes"] == profile["peak_allocated_bytes"]
    with Image.open(picture) as drawn:
        assert (drawn.format, drawn.size) == ("PNG", (1600, 600))


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a whole memory snapshot of torch"),
        (b"{}", "must be a whole memory snapshot of torch"),
        (pickle.dumps({"segments": []}), "must be a snapshot with segments and device_traces"),
        (pickle.dumps({"segments": [], "device_traces": [[]]}), "must hold recorded allocations, got none"),
        (pickle.dumps(Evil()), "which no snapshot has and which is not loaded"),
    ],
)
def test_a_file_that_is_no_recording_is_refused_in_one_line(tmp_path, capsys, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad.pickle"
    bad.write_bytes(content)
    found = refusal(capsys, bad)
    assert message in found
    assert found.count("\n") == 1
    assert found.startswith(f"memseg replay: {bad}: ")
    assert "_record_memory_history" in found
    assert not (tmp_path / "evil").exists()


def test_half_a_recording_is_refused(recording, capsys):
    recording.write_bytes(recording.read_bytes()[:-40])
    assert "must be a whole memory snapshot of torch" in refusal(capsys, recording)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--capacity", "8"], "a size must be a number with a unit"),
        (["--capacity", "0GiB"], "a size must be more than 0 bytes"),
        (["--allocator", "expandable_segment:True"], "unknown key; did you mean expandable_segments?"),
        (["--allocator", "max_split_size_mb:1"], "max_split_size_mb: must be 20 (a large segment) or more, got 1"),
        (["--png", "nowhere/replay.png"], "No such file or directory"),
    ],
)
def test_bad_options_are_refused(recording, capsys, monkeypatch, tmp_path, options, message):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, recording, *options)


def test_a_file_that_is_not_there_is_told(tmp_path, capsys):
    assert "must be a readable file, got: No such file or directory" in refusal(capsys, tmp_path / "no.pickle")
