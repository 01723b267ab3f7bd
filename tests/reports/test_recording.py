"""A recording of a profile replays to the profile's own figures, and PyTorch's viewer opens it."""

import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from memseg.planning.cards import parse_cards
from memseg.profiling import foreign_job, named_optimizer, trace_job
from memseg.profiling.allocator.recording import read_snapshot, replay_recording
from memseg.profiling.allocator.settings import AllocatorSettings
from memseg.profiling.card_memory import card_memory
from memseg.reports.profile import MODEL_ITSELF, ProfileReport
from memseg.reports.recording import save_recording

VIEWER = Path(torch.__file__).parent / "cuda" / "_memory_viz.py"
(V100,) = parse_cards("v100")


class Products(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(256, 512), nn.Linear(512, 64)

    def forward(self, images):
        return self.last(torch.tanh(self.first(images)))


def convolutions():
    return nn.Sequential(nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 16, 3, padding=1))


def report_of(build, settings=None):
    shape = (512, 256) if build is Products else (2, 16, 64, 64)
    make = partial(foreign_job, build, torch.empty(shape, device="meta"), optimizer=named_optimizer("adam"))
    profile = trace_job(make, device="cuda")
    return ProfileReport(profile, V100, card_memory(profile, V100, settings=settings))


@pytest.mark.parametrize("text", ["", "expandable_segments:True", "max_split_size_mb:32"])
@pytest.mark.parametrize("build", [Products, convolutions])
def test_what_is_recorded_replays_to_the_figures_of_the_report(build, text, tmp_path):
    settings = AllocatorSettings.parse(text)
    report = report_of(build, settings)
    save_recording(report, tmp_path / "step.pickle", settings)
    recording = read_snapshot(tmp_path / "step.pickle")
    assert recording.settings == settings
    found = replay_recording(recording)[0]
    assert found.peak_allocated_bytes == report.memory.peak_allocated_bytes
    assert found.peak_reserved_bytes == report.memory.peak_reserved_bytes
    assert found.num_segments == report.memory.replay.num_segments


def test_every_allocation_has_operator_layer_phase_and_category(tmp_path):
    save_recording(report_of(Products), tmp_path / "step.pickle")
    (trace, *_) = pickle.loads((tmp_path / "step.pickle").read_bytes())["device_traces"]
    named = {
        tuple((frame["filename"], frame["name"]) for frame in entry["frames"])
        for entry in trace
        if entry["action"] == "alloc"
    }
    assert {tuple(kind for kind, _ in frames) for frames in named} <= {
        ("operator", "layer", "phase", "category"),
        ("operator", "category"),
    }
    assert (("operator", "cuBLAS workspace"), ("category", "workspace")) in named
    of_tanh = ("operator", "aten.tanh"), ("layer", MODEL_ITSELF), ("phase", "forward"), ("category", "saved activation")
    assert of_tanh in named
    assert ("layer", "first") in {part for frames in named for part in frames}


def test_three_steps_are_recorded(tmp_path):
    save_recording(report_of(Products), tmp_path / "step.pickle")
    (trace, *_) = pickle.loads((tmp_path / "step.pickle").read_bytes())["device_traces"]
    tanh = [entry for entry in trace if entry["action"] == "alloc" and entry["frames"][0]["name"] == "aten.tanh"]
    assert [entry["size"] for entry in tanh] == 3 * [512 * 512 * 4]


@pytest.mark.parametrize("command", ["trace_plot", "segment_plot"])
def test_torchs_viewer_opens_it(command, tmp_path):
    save_recording(report_of(Products), tmp_path / "step.pickle")
    arguments = [command, str(tmp_path / "step.pickle"), "-o", str(tmp_path / "page.html")]
    done = subprocess.run([sys.executable, str(VIEWER), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '"base64"' in (tmp_path / "page.html").read_text()


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        save_recording(report_of(convolutions), tmp_path / "nowhere" / "step.pickle")
