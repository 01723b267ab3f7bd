"""Snapshots: what torch's viewers make of ours, and what we make of recordings, good and bad."""

import pickle
import pickletools
import random
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from memseg.errors import InputError
from memseg.profiling.allocator.recording import read_snapshot, replay_recording
from memseg.profiling.allocator.replay import EMPTY_CACHE, FREE, REQUEST_FREE, Event, replay
from memseg.profiling.allocator.settings import AllocatorSettings
from memseg.profiling.allocator.snapshot import write_snapshot

MIB = 2**20
VIEWER = Path(torch.__file__).parent / "cuda" / "_memory_viz.py"

STEP = [
    Event(0, 3 * MIB),
    Event(1, 12 * MIB),
    Event(1, FREE),
    Event(2, 18 * MIB),
    Event(3, 1000),
    Event(0, FREE),
]
NAMES = {
    0: {"operator": "aten.convolution", "layer": "block1.conv", "phase": "forward", "category": "saved activation"},
    3: {"operator": "aten.sum", "layer": "loss", "phase": "forward", "category": "temporary"},
}


def write(path, events=STEP, names=NAMES, text="", capacity_bytes=None):
    write_snapshot(events, path, names, AllocatorSettings.parse(text), capacity_bytes)
    return path


def view(*arguments, env=None):
    done = subprocess.run([sys.executable, str(VIEWER), *map(str, arguments)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("text", ["", "expandable_segments:True"])
def test_torchs_plots_hold_the_names(tmp_path, text):
    path = write(tmp_path / "step.pickle", text=text)
    for command, kind in (("trace_plot", "Active Memory Timeline"), ("segment_plot", "Allocator State History")):
        view(command, path, "-o", tmp_path / "out.html")
        page = (tmp_path / "out.html").read_text()
        assert kind in page
        assert '"base64"' in page


def test_torchs_trace_tells_the_same_story(tmp_path):
    told = view("trace", write(tmp_path / "step.pickle"))
    assert [line for line in told.splitlines() if "cudaMalloc" not in line and "{" not in line][:8] == [
        "Device 0 ----------------",
        "12 entries",
        "b = a[0:3.0MiB]",
        "c = a[3145728:12.0MiB]",
        "del c # 12.0MiB",
        "# free completed for c 12.0MiB",
        "e = d[0:18.0MiB]",
        "g = f[0:1000.0B]",
    ]
    assert [size for _, size in re.findall(r"cudaMalloc\((\d+), (.+)\)", told)] == ["20.0MiB", "18.0MiB", "2.0MiB"]


def test_torchs_table_adds_up_to_our_figures(tmp_path):
    told = view("stats", write(tmp_path / "step.pickle"))
    assert "segments: 3\n" in told
    assert "total_reserved: 40.0MiB\n" in told
    assert "total_allocated: 18.0MiB\n" in told


def test_torchs_flame_graph_is_by_name(tmp_path):
    # The script that draws is downloaded into ~/.cache; one that passes on what it is given stands in for it.
    home = tmp_path / "home"
    (home / ".cache").mkdir(parents=True)
    (home / ".cache" / "flamegraph.pl").write_text("#!/bin/sh\ncat\n")
    (home / ".cache" / "flamegraph.pl").chmod(0o755)
    view("memory", write(tmp_path / "step.pickle"), "-o", tmp_path / "out.svg", env={"HOME": str(home)})
    drawn = (tmp_path / "out.svg").read_text().splitlines()
    assert (
        "stream_0;active_allocated;category:0:temporary;phase:0:forward;layer:0:loss;operator:0:aten.sum 1000" in drawn
    )
    assert f"stream_0;active_allocated;<non-python> {18 * MIB}" in drawn


def test_the_viewer_in_the_browser_can_read_the_pickle(tmp_path):
    # The opcodes that unpickle() of torch/utils/viz/MemoryViz.js knows.
    known = """
    PROTO FRAME MARK STOP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE
    EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 LIST DICT APPEND APPENDS SETITEM SETITEMS MEMOIZE
    BINGET LONG_BINGET BINPUT LONG_BINPUT
    """
    many = [Event(key, 512 * (key % 700)) for key in range(2000)]
    content = write(tmp_path / "step.pickle", [*many, Event(0, EMPTY_CACHE)]).read_bytes()
    assert {opcode.name for opcode, _, _ in pickletools.genops(content)} <= set(known.split())


def test_an_allocation_has_its_category_and_a_free_the_frames_of_its_allocation(tmp_path):
    trace = pickle.loads(write(tmp_path / "step.pickle").read_bytes())["device_traces"][0]
    first = [entry for entry in trace if entry["time_us"] in (0, 5)]
    assert [entry["action"] for entry in first] == [
        "segment_alloc",
        "alloc",
        "free_requested",
        "free_completed",
        "snapshot",
    ]
    assert first[1]["category"] == "saved activation"
    assert first[3]["frames"] == first[1]["frames"]
    assert first[1]["frames"][0] == {"name": "aten.convolution", "filename": "operator", "line": 0}


def test_a_free_that_another_event_completes_keeps_the_frames_of_its_allocation(tmp_path):
    events = [Event(0, 3 * MIB), Event(0, REQUEST_FREE), Event(9, EMPTY_CACHE)]
    trace = pickle.loads(write(tmp_path / "step.pickle", events).read_bytes())["device_traces"][0]
    frames_of = {entry["action"]: [frame["name"] for frame in entry["frames"]] for entry in trace}
    assert frames_of["free_completed"][0] == "aten.convolution"
    assert frames_of["segment_free"] == ["empty_cache"]


def test_a_refused_request_is_recorded_as_torch_records_it(tmp_path):
    told = view("trace", write(tmp_path / "step.pickle", capacity_bytes=30 * MIB))
    assert "raise OutOfMemoryError # 18.0MiB requested, 10.0MiB free in CUDA" in told


def random_step(seed, *, empties):
    draw = random.Random(seed)
    alive, pending, events = [], [], []
    for key in range(600):
        events.append(Event(key, int(2 ** draw.uniform(0, 25)), draw.randrange(2)))
        alive.append(key)
        for _ in range(draw.randrange(3)):
            if alive:
                freed = alive.pop(draw.randrange(len(alive)))
                events.append(Event(freed, REQUEST_FREE if draw.random() < 0.2 else FREE))
                if events[-1].size_bytes == REQUEST_FREE:
                    pending.append(freed)
        if pending and draw.random() < 0.3:
            events.append(Event(pending.pop(), FREE))
        if empties and draw.random() < 0.02:
            events.append(Event(0, EMPTY_CACHE))
    return events


def figures(found):
    """All but the indices: what changes nothing leaves no trace."""
    curves = list(zip(found.allocated_curve.tolist(), found.reserved_curve.tolist(), strict=True))
    steps = [step for before, step in pairwise([None, *curves]) if step != before]
    peaks = (
        found.peak_allocated_bytes,
        found.peak_requested_bytes,
        found.peak_active_bytes,
        found.peak_reserved_bytes,
        found.unallocated_bytes,
        found.largest_free_block_bytes,
        found.num_segments,
    )
    return peaks, steps


@pytest.mark.parametrize("names", [{}, {key: {"operator": "aten.relu"} for key in range(600)}])
@pytest.mark.parametrize("text", ["", "expandable_segments:True", "max_split_size_mb:20,roundup_power2_divisions:4"])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_written_and_read_replays_to_the_same_figures(tmp_path, seed, text, names):
    settings = AllocatorSettings.parse(text)
    for empties in (False, True):
        events = random_step(seed, empties=empties)
        recording = read_snapshot(write(tmp_path / "step.pickle", events, names, text))
        assert recording.settings == settings
        assert figures(replay_recording(recording)[0]) == figures(replay(events, settings))
        (device,) = recording.devices
        assert device.peak_reserved_bytes == replay(events, settings).peak_reserved_bytes
        assert (device.num_alive_before, device.reserved_before_bytes, device.unknown) == (0, 0, ())
        # An empty_cache that found nothing to give back is not recorded; other settings would have found something.
        if not empties:
            tried = AllocatorSettings.parse("max_split_size_mb:24")
            assert figures(replay_recording(recording, tried)[0]) == figures(replay(events, tried))


def test_memory_given_back_at_the_limit_is_not_taken_for_empty_cache(tmp_path):
    # Under 30 MiB the second request drives the first one's segment out.
    events = [Event(0, 20 * MIB), Event(0, FREE), Event(1, 24 * MIB), Event(1, FREE), Event(2, 20 * MIB)]
    (device,) = read_snapshot(write(tmp_path / "step.pickle", events, {}, capacity_bytes=30 * MIB)).devices
    assert [event.size_bytes for event in device.events] == [event.size_bytes for event in events]


def frames(*names):
    return [{"name": name, "filename": "train.py", "line": 1} for name in names]


def recording_that_begins_in_the_middle():
    """A 20 MiB segment with 3 MiB that are freed and 6 that stay, both allocated before; 12 MiB are new."""

    def entry(action, addr, size, **more):
        return {"action": action, "addr": addr, "size": size, "stream": 0, "time_us": 5, **more}

    blocks = [
        {"address": 0x1000_0000, "size": 3 * MIB, "requested_size": 0, "state": "inactive", "frames": []},
        {
            "address": 0x1000_0000 + 3 * MIB,
            "size": 6 * MIB,
            "requested_size": 6 * MIB,
            "state": "active_allocated",
            "frames": [],
        },
        {"address": 0x1000_0000 + 9 * MIB, "size": 11 * MIB, "requested_size": 0, "state": "inactive", "frames": []},
    ]
    segment = {
        "device": 1,
        "address": 0x1000_0000,
        "total_size": 20 * MIB,
        "stream": 0,
        "segment_type": "large",
        "blocks": blocks,
    }
    new = {
        "device": 1,
        "address": 0x2000_0000,
        "total_size": 12 * MIB,
        "stream": 0,
        "segment_type": "large",
        "blocks": [{"address": 0x2000_0000, "size": 12 * MIB, "requested_size": 12 * MIB, "state": "active_allocated"}],
    }
    trace = [
        entry("free_requested", 0x1000_0000, 3 * MIB),
        entry("free_completed", 0x1000_0000, 3 * MIB),
        entry("segment_alloc", 0x2000_0000, 12 * MIB, frames=frames("step")),
        entry("alloc", 0x2000_0000, 12 * MIB, frames=frames("step")),
        entry("snapshot", 0, 18 * MIB),
    ]
    return {
        "segments": [segment, new],
        "device_traces": [[], trace],
        "allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:40"},
    }


def dump(path, content):
    path.write_bytes(pickle.dumps(content))
    return path


def test_what_was_alive_before_the_recording_is_replayed_first_and_told(tmp_path):
    recording = read_snapshot(dump(tmp_path / "gpu.pickle", recording_that_begins_in_the_middle()))
    (device,) = recording.devices
    assert device.device == 1
    assert [event.size_bytes for event in device.events] == [3 * MIB, 6 * MIB, FREE, 12 * MIB]
    assert (device.num_alive_before, device.alive_before_bytes) == (2, 9 * MIB)
    assert (device.reserved_before_bytes, device.peak_reserved_bytes) == (20 * MIB, 32 * MIB)
    assert len(device.unknown) == 1
    assert "2 blocks that were alive before" in device.unknown[0]
    # 3 MiB are free before the 6 and 11 behind: 12 need a segment of their own, or a page more.
    fixed = replay_recording(recording)[1]
    assert (fixed.peak_reserved_bytes, fixed.peak_requested_bytes) == (32 * MIB, 18 * MIB)
    grown = replay_recording(recording, AllocatorSettings(expandable_segments=True))[1]
    assert grown.peak_reserved_bytes == 40 * MIB
    refused = replay_recording(recording, capacity_bytes=24 * MIB)[1]
    assert refused.out_of_memory.needed_bytes == 12 * MIB


def test_empty_cache_is_known_by_its_frames(tmp_path):
    content = recording_that_begins_in_the_middle()
    free = {"action": "segment_free", "addr": 0x3000_0000, "size": 4 * MIB, "stream": 0}
    for name, expected in (("empty_cache", 1), ("conv2d", 0)):
        content["device_traces"][1].insert(2, free | {"frames": frames(name, "step")})
        (device,) = read_snapshot(dump(tmp_path / "gpu.pickle", content)).devices
        assert sum(event.size_bytes == EMPTY_CACHE for event in device.events) == expected
        assert (device.reserved_before_bytes, device.peak_reserved_bytes) == (24 * MIB, 32 * MIB)
        del content["device_traces"][1][2]


def test_gaps_of_a_recording_are_told(tmp_path):
    content = recording_that_begins_in_the_middle()
    trace = content["device_traces"][1]
    trace[3]["pool_id"] = (0, 7)
    again = dict(trace[3], size=5 * MIB)
    trace += [again, {"action": "dance"}, {"action": "alloc", "addr": 0x4000_0000, "size": 1, "stream": 0}]
    content["allocator_settings"]["PYTORCH_CUDA_ALLOC_CONF"] = "backend:cudaMallocAsync"
    (device,) = read_snapshot(dump(tmp_path / "gpu.pickle", content)).devices
    told = "\n".join(device.unknown)
    for part in (
        "backend:cudaMallocAsync",
        "private pools",
        "frees that are missing",
        "'dance'",
        "whose free is missing",
    ):
        assert part in told
    assert [event.size_bytes for event in device.events[-3:]] == [FREE, 5 * MIB, 1]


def test_a_recording_without_completed_frees_frees_when_asked(tmp_path):
    content = recording_that_begins_in_the_middle()
    del content["device_traces"][1][1]
    (device,) = read_snapshot(dump(tmp_path / "gpu.pickle", content)).devices
    assert [event.size_bytes for event in device.events] == [3 * MIB, 6 * MIB, FREE, 12 * MIB]


class Stranger:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_nothing_in_a_recording_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = recording_that_begins_in_the_middle() | {"extra": Stranger()}
    with pytest.raises(InputError, match="which no snapshot has"):
        read_snapshot(dump(tmp_path / "gpu.pickle", content))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "Ran out of input"),
        (b"not a pickle at all", "must be a whole memory snapshot"),
        (pickle.dumps(recording_that_begins_in_the_middle())[:-100], "must be a whole memory snapshot"),
        (pickle.dumps([1, 2]), "must be a snapshot with segments and device_traces"),
        (pickle.dumps({"segments": []}), "must be a snapshot with segments and device_traces"),
        (pickle.dumps({"segments": [], "device_traces": [[], []]}), "must hold recorded allocations, got none"),
        (pickle.dumps({"segments": [3], "device_traces": []}), "segments[0]: must be dict, got int"),
        (pickle.dumps({"segments": [], "device_traces": [["a"]]}), "device_traces[0][0]: must be dict, got str"),
        (
            pickle.dumps({"segments": [], "device_traces": [[{"action": "alloc", "addr": 1, "size": "big"}]]}),
            "device_traces[0][0].size: must be int, got str",
        ),
        (
            pickle.dumps({"segments": [], "device_traces": [[{"action": "alloc", "addr": 1, "size": -1}]]}),
            "size must be from 0 to 2**60 bytes, got -1",
        ),
    ],
)
def test_what_is_no_recording_is_refused_in_one_message(tmp_path, content, told):
    path = tmp_path / "gpu.pickle"
    path.write_bytes(content)
    with pytest.raises(InputError) as refused:
        read_snapshot(path)
    assert told in str(refused.value)
    assert str(path) in str(refused.value)
    assert "_record_memory_history" in str(refused.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_snapshot(tmp_path / "gpu.pickle")


def test_a_damaged_file_is_read_or_refused_and_nothing_else(tmp_path):
    content = write(tmp_path / "step.pickle").read_bytes()
    draw = random.Random(0)
    path = tmp_path / "damaged.pickle"
    for _ in range(500):
        damaged = bytearray(content)
        for _ in range(draw.randrange(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            replay_recording(read_snapshot(path))
        except InputError:
            continue
