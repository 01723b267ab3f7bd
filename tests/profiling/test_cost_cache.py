"""Costs that one process has found are read by the next, and never stand for other settings."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from torch import fx, nn

from memseg.levels import NormMode, Precision
from memseg.models import build_model
from memseg.models.segmented import Segment, SegmentedModel
from memseg.profiling import cost_cache, model_costs
from memseg.profiling.cost_cache import cache_folder, cached_model_costs
from memseg.profiling.jobs.job import named_optimizer

MINI = partial(build_model, "ladder-densenet-mini")
STEP = {"image": (64, 128), "batch": 2}
PROGRAM = """
from functools import partial
from memseg.models import build_model
from memseg.profiling.cost_cache import cached_model_costs
calls = []
costs = cached_model_costs(
    partial(build_model, "ladder-densenet-mini"), image=(64, 128), batch=2, progress=lambda *done: calls.append(done)
)
print(len(calls), costs.segments[0].levels[0].forward_peak_bytes)
"""


class Conv(SegmentedModel):
    """A network of one convolution, made in a moment."""

    def __init__(self, channels=4, *, kernel=3):
        conv = nn.Conv2d(3, channels, kernel, padding=kernel // 2)
        super().__init__(
            "conv", [Segment("conv", conv, ("images",))], outputs=["conv"], num_classes=channels, output_stride=1
        )


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A folder for this test alone; where its costs are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "memseg"


@pytest.fixture
def profiled(monkeypatch):
    """Settings of every step that was profiled."""
    found = []

    def count(build, **settings):
        found.append(settings)
        return model_costs(build, **settings)

    monkeypatch.setattr(cost_cache, "model_costs", count)
    return found


def entries(folder):
    return sorted(folder.glob("*.json"))


def run(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    return done.stdout.split()


def test_a_second_process_reads_what_the_first_wrote(cache):
    first, second = run(PROGRAM), run(PROGRAM)
    assert int(first[0]) > 0
    assert second == ["0", first[1]]
    assert len(entries(cache)) == 1


def test_what_is_read_is_what_was_found(profiled):
    found = [cached_model_costs(Conv, **STEP) for _ in range(2)]
    assert found[0] == found[1] == model_costs(Conv, **STEP)
    assert len(profiled) == 1


def test_different_settings_never_share_an_entry(cache, profiled):
    plain = {"build": Conv, **STEP}
    others = [
        {},
        {"image": (128, 64)},
        {"batch": 1},
        {"norm": NormMode.FROZEN},
        {"aux_weight": 0.5},
        {"optimizer": ("momentum", named_optimizer("momentum"))},
        {"precision": Precision.BFLOAT16},
        {"device": "cuda"},
        {"replicas": 2},
        {"build": partial(Conv, 5)},
        {"build": partial(Conv, kernel=5)},
    ]
    for _ in range(2):
        for other in others:
            cached_model_costs(**{**plain, **other})
    assert len(profiled) == len(entries(cache)) == len(others)


def test_how_many_replicas_there_are_changes_no_cost(profiled):
    for replicas in (2, 3):
        cached_model_costs(Conv, **STEP, replicas=replicas)
    assert len(profiled) == 1


def test_a_setting_that_only_the_code_of_a_module_knows_is_told_by_its_attributes(profiled):
    class Scaled(nn.Conv2d):
        def __init__(self, factor):
            super().__init__(3, 4, 1)
            self.factor = factor

    def build(factor):
        model = Conv()
        model.segments["conv"] = Scaled(factor)
        return model

    for factor in (1, 2):
        cached_model_costs(partial(build, factor), **STEP)
    assert len(profiled) == 2


def test_networks_whose_traced_operations_differ_do_not_share_an_entry(profiled):
    class Traced(nn.Conv2d):
        def __init__(self, activation):
            super().__init__(3, 4, 1)
            self.activation = activation
            self.graph = fx.symbolic_trace(lambda images: activation(images)).graph

        def forward(self, images):
            return self.activation(super().forward(images))

    def build(activation):
        model = Conv()
        model.segments["conv"] = Traced(activation)
        return model

    for activation in (torch.relu, torch.sigmoid, torch.relu):
        cached_model_costs(partial(build, activation), **STEP)
    assert len(profiled) == 2


def test_costs_of_other_code_are_not_read(profiled, monkeypatch):
    cached_model_costs(Conv, **STEP)
    monkeypatch.setattr(cost_cache, "_code_digest", lambda: "another version of ours")
    cached_model_costs(Conv, **STEP)
    assert len(profiled) == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[]"])
def test_a_damaged_entry_is_profiled_anew_and_replaced(cache, profiled, damage):
    right = cached_model_costs(Conv, **STEP)
    (entry,) = entries(cache)
    whole = entry.read_bytes()
    entry.write_bytes(damage)
    assert cached_model_costs(Conv, **STEP) == right
    assert len(profiled) == 2
    assert entry.read_bytes() == whole


def test_half_of_an_entry_is_damaged_too(cache, profiled):
    cached_model_costs(Conv, **STEP)
    (entry,) = entries(cache)
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2])
    cached_model_costs(Conv, **STEP)
    assert len(profiled) == 2
    assert entry.read_bytes() == whole


def test_where_nothing_can_be_written_it_is_said_and_costs_are_found_all_the_same(tmp_path, profiled):
    # A file where the folder should be: permissions would not stop root, who runs tests in containers.
    (tmp_path / "memseg").write_text("in the way")
    complaints = []
    assert cached_model_costs(Conv, **STEP, complain=complaints.append) == model_costs(Conv, **STEP)
    assert len(complaints) == 1
    assert str(tmp_path / "memseg") in complaints[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_is_no_error(tmp_path):
    tmp_path.chmod(0o500)
    complaints = []
    cached_model_costs(Conv, **STEP, complain=complaints.append)
    assert "Permission denied" in complaints[0]


def test_only_the_newest_entries_are_kept(cache, monkeypatch):
    monkeypatch.setattr(cost_cache, "MOST_FILES", 3)
    for batch in range(1, 6):
        cached_model_costs(Conv, image=(64, 128), batch=batch)
        (newest,) = set(entries(cache)) - {entry for entry in entries(cache) if entry.stat().st_mtime < 1e9}
        os.utime(newest, (batch, batch))
    assert len(entries(cache)) == 3
    assert {json.loads(entry.read_text())["batch"] for entry in entries(cache)} == {3, 4, 5}


def test_a_process_that_is_killed_while_it_writes_leaves_no_broken_entry(cache):
    # It writes the same entry again and again, so that it is killed inside a write.
    program = PROGRAM + (
        "from memseg.profiling import cost_cache\n"
        "from memseg.files import replace_file\n"
        "(path,) = cost_cache.cache_folder().glob('*.json')\n"
        "print('writing', flush=True)\n"
        "while True: replace_file(path, costs.to_json())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert any(line.startswith("writing") for line in process.stdout)
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    (entry,) = entries(cache)
    assert json.loads(entry.read_text())["model"] == "ladder-densenet-mini"
    assert run(PROGRAM)[0] == "0"


@pytest.mark.parametrize("asked", ["", "not/absolute"])
def test_without_a_folder_of_the_users_own_it_is_in_their_home(asked, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", asked)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/memseg"


def test_a_network_of_others_is_profiled_anew_when_its_forward_has_changed(tmp_path, profiled):
    source = tmp_path / "net.py"
    code = """
from torch import nn

class Repeated(nn.Module):
    def forward(self, x):
        if x.shape[1] != 8:  # The tracer cannot follow, and keeps the layer whole.
            raise ValueError(x.shape)
        for _ in range({times}):
            x = x * 2
        return x

def build(num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Repeated(), nn.Conv2d(8, num_classes, 1))
"""
    peaks = []
    for times in (1, 8, 8):
        source.write_text(code.replace("{times}", str(times)))
        costs = cached_model_costs(partial(build_model, f"{source}:build", num_classes=4), image=(32, 32), batch=1)
        peaks.append(max(one.levels[0].forward_peak_bytes for one in costs.segments))
    assert len(profiled) == 2
    assert peaks[1] == peaks[2]
