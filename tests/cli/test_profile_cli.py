"""`memseg profile` and `memseg cards` through their own parsers, networks of ours and of others."""

import argparse
import csv
import io
import json
import subprocess
import sys

import pytest
from PIL import Image

from memseg.cli import cards, profile
from memseg.errors import InputError, UnknownNameError
from memseg.levels import Recompute
from memseg.planning.cards import known_cards
from memseg.profiling import UntraceableError
from memseg.reports.profile import SortKey

SMALL = ["ladder-densenet-mini", "--image", "128x256", "--batch", "1"]


def build_parser():
    parser = argparse.ArgumentParser(prog="memseg")
    subparsers = parser.add_subparsers()
    for module in (cards, profile):
        module.add_parser(subparsers)
    return parser


def run(*arguments):
    parsed = build_parser().parse_args(arguments)
    return parsed.run(parsed)


def test_json_has_the_promised_keys_and_adds_up(capsys):
    assert run("profile", *SMALL, "--measure", "--json") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == ""
    assert {
        key: found[key] for key in ("model", "image", "batch", "norm", "recompute", "precision", "device", "card")
    } == {
        "model": "ladder-densenet-mini",
        "image": "128x256",
        "batch": 1,
        "norm": "batch",
        "recompute": "none",
        "precision": "float32",
        "device": "cpu",
        "card": "cpu",
    }
    peak = found["peak_allocated_bytes"]
    assert sum(found["by_category"].values()) == peak
    assert {"parameter", "optimizer_state", "saved_activation"} <= set(found["by_category"])
    assert found["peak_moment"].startswith(("forward of ", "backward of "))
    assert found["optimizer"] == "adam-fused"
    assert (found["peak_reserved_bytes"], found["device_total_bytes"]) == (None, None)
    assert max(found["first_step_peak_bytes"], found["steady_step_peak_bytes"]) == found["peak_tensor_bytes"] == peak
    assert sum(one["size_bytes"] for one in found["alive_at_peak"]) <= peak
    assert found["step_seconds"] > 0
    for layer in found["layers"]:
        assert set(layer) == {
            *("name", "saved_bytes", "peak_bytes", "parameter_bytes"),
            *("forward_s", "backward_s", "flops", "moved_bytes"),
        }
        assert all(type(layer[key]) is int for key in layer if key.endswith("_bytes"))
    # Real steps, counted by the allocator: the prediction must hold within 2 %.
    assert found["measured_peak_allocated_bytes"] == pytest.approx(peak, rel=0.02)


def test_csv_on_standard_output_is_the_table_and_nothing_else(capsys):
    assert run("profile", *SMALL, "--csv", "-", "--sort", "saved") == 0
    by_csv = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert run("profile", *SMALL, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(int(row["parameter_bytes"]) for row in by_csv) == found["by_category"]["parameter"]
    assert {row["name"]: float(row["backward_s"]) for row in by_csv} == {
        layer["name"]: layer["backward_s"] for layer in found["layers"]
    }
    saved = [int(row["saved_bytes"]) for row in by_csv]
    assert saved == sorted(saved, reverse=True)


def test_rebuilding_saves_less_takes_longer_and_is_told_by_segment(capsys):
    found = []
    for options in ([], ["--recompute", "block1=units,block2=norms"]):
        assert run("profile", *SMALL, "--json", *options) == 0
        found.append(json.loads(capsys.readouterr().out))
    keep, rebuild = found
    assert rebuild["recompute"] == {"block1": "units", "block2": "norms"}
    layers = [{layer["name"]: layer for layer in one["layers"]} for one in found]
    for block in ("block1", "block2"):
        assert layers[1][block]["saved_bytes"] < layers[0][block]["saved_bytes"]
        assert layers[1][block]["backward_s"] > layers[0][block]["backward_s"]
    assert layers[1]["block3"]["saved_bytes"] == layers[0]["block3"]["saved_bytes"]
    assert rebuild["peak_allocated_bytes"] < keep["peak_allocated_bytes"]


def test_text_is_not_squeezed_when_piped_and_files_are_written_beside_it(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    table, picture = tmp_path / "layers.csv", tmp_path / "curve.png"
    assert run("profile", *SMALL, "--card", "gtx1070", "--depth", "2", "--csv", str(table), "--png", str(picture)) == 0
    out = capsys.readouterr().out
    assert "\npeak " in out
    assert "\nfits gtx1070 with " in out
    lines = [line.strip() for line in out.splitlines()]
    for name in (row["name"].rpartition(".")[2] for row in csv.DictReader(table.read_text().splitlines())):
        assert any(line.startswith(f"{name} ") and line.count("iB") + line.count(" B") >= 2 for line in lines), name
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["ladder-densnet121"], UnknownNameError, "unknown model 'ladder-densnet121'; did you mean ladder-densenet121"),
        ([*SMALL, "--image", "100x256"], InputError, "must be multiples of 64 .* nearest is 128x256"),
        ([*SMALL, "--image", "big"], InputError, "must be HEIGHTxWIDTH"),
        ([*SMALL, "--batch", "0"], InputError, "--batch must be at least 1, got 0"),
        ([*SMALL, "--depth", "0"], InputError, "--depth must be at least 1"),
        ([*SMALL, "--classes", "256"], InputError, "--classes must be from 1 to 255, got 256"),
        ([*SMALL, "--recompute", "unit"], UnknownNameError, "unknown recompute level 'unit'; did you mean units"),
        ([*SMALL, "--recompute", "blok1=units"], UnknownNameError, "unknown segment 'blok1'; did you mean block1"),
        ([*SMALL, "--recompute", "units,block1=none"], InputError, "must be one level, or a level for each"),
        ([*SMALL, "--recompute", "block1=none,block1=units"], InputError, "each named once"),
        ([*SMALL, "--card", "gtx1070,titanx"], InputError, "--card must name one card"),
        ([*SMALL, "--card", "gtx1070", "--measure"], InputError, "--card must be a cpu card, got gtx1070"),
        ([*SMALL, "--json", "--csv", "-"], InputError, "neither --json nor --measure"),
        ([*SMALL, "--optimizer", "adm"], UnknownNameError, "unknown optimizer 'adm'; did you mean adam"),
        ([*SMALL, "--accumulate", "0"], InputError, "--accumulate must be at least 1, got 0"),
        ([*SMALL, "--replicas", "0"], InputError, "--replicas must be at least 1, got 0"),
        ([*SMALL, "--bucket-view"], InputError, "--bucket-view is about replicas, .* try --replicas 2"),
        ([*SMALL, "--snapshot", "step.pickle"], InputError, "--snapshot is about CUDA's allocator"),
        ([*SMALL, "--allocator", "expandable_segments:True"], InputError, "--allocator is about CUDA's allocator"),
        ([*SMALL, "--card", "v100", "--allocator", "expandable:True"], InputError, "expandable: unknown key"),
        ([*SMALL, "--loss", "mean"], InputError, "--loss is for models given as MODULE:FUNCTION, got it with ladder"),
        ([*SMALL, "--channels", "3"], InputError, "--channels is for models given as MODULE:FUNCTION"),
    ],
)
def test_bad_input_is_refused_with_what_would_mend_it(arguments, error, message, capsys):
    with pytest.raises(error, match=message):
        run("profile", *arguments)
    assert capsys.readouterr().out == ""


def test_memory_that_is_not_there_is_told_with_the_prediction():
    # The process holds what it needs to trace and 400 MiB more; the first maps of four large images are larger.
    script = """
import argparse, resource, torch
from memseg.cli import profile
from memseg.errors import MemsegError
from memseg.models import build_model
from memseg.profiling import measure, step
held = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + 400 * 2**20,) * 2)
parser = argparse.ArgumentParser()
profile.add_parser(parser.add_subparsers())
arguments = parser.parse_args(["profile", "ladder-densenet-mini", "--image", "1024x2048", "--batch", "4", "--measure"])
try:
    arguments.run(arguments)
except MemsegError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("to measure, this process must get the ")
    assert "GiB that were predicted" in done.stdout
    assert "leave out --measure" in done.stdout


def test_the_orders_and_levels_that_help_names_are_those_there_are(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["profile", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--sort {" + ",".join(SortKey) + "}" in text
    *levels, last = Recompute
    assert f"{', '.join(levels)} or {last};" in text


# Networks of others.

NETS = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 5, 1))

def dense():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 64), nn.Tanh(), nn.Linear(64, 5))

def gray():
    return nn.Conv2d(1, 4, 3)

def mixed():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(1), nn.Linear(10, 2))

class Picky(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)

    def forward(self, images):
        maps = self.first(images)
        return maps[maps.mean((1, 2, 3)) > -1e9]

def squares(output):
    return output.square().mean()

def number():
    return 3

def failing():
    raise ValueError("no weights at hand")

def needing(width):
    return nn.Linear(width, width)

weights = 3
"""
TINY = ["--image", "16x16"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a file of models, and modules that cannot be imported."""
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").write_text("from nets import build\n")
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    (tmp_path / "unfinished.py").write_text("def build(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in ("nets", "shop", "broken", "unfinished"):
        sys.modules.pop(name, None)


def profiled(capsys, *arguments):
    """The JSON that a profile prints; nothing else is told."""
    assert run("profile", *arguments, *TINY, "--json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


@pytest.mark.parametrize("address", ["nets:build", "nets.py:build", "shop:build", "./nets.py:build"])
def test_a_model_is_given_by_the_address_of_what_makes_it(address, folder, capsys):
    found = profiled(capsys, address, "--batch", "3")
    assert (found["model"], found["loss"], found["optimizer"]) == (address, "mean", "adam")
    assert [layer["name"] for layer in found["layers"]] == ["0", "1", "2", "loss"]
    assert found["by_category"]["input"] == 3 * 3 * 16 * 16 * 4
    assert found["by_category"]["parameter"] == 4 * (16 * 27 + 16 + 5 * 16 + 5)


def test_a_file_is_read_again_where_another_of_its_name_was_read_before(folder, capsys):
    before = profiled(capsys, "nets.py:build")
    other = folder / "other"
    other.mkdir()
    (other / "nets.py").write_text(NETS.replace("16", "32"))
    assert profiled(capsys, "other/nets.py:build")["by_category"]["parameter"] > before["by_category"]["parameter"]


def test_images_have_the_channels_that_are_asked_for(folder, capsys):
    assert profiled(capsys, "nets.py:gray", "--channels", "1")["by_category"]["input"] == 2 * 1 * 16 * 16 * 4
    with pytest.raises(InputError, match=r"nets\.py:gray does not run on float32 2x3x16x16: .* 1 channels"):
        run("profile", "nets.py:gray", *TINY)


@pytest.mark.parametrize("loss", ["mean", "cross-entropy", "nets.py:squares"])
def test_the_loss_is_a_name_or_an_address(loss, folder, capsys):
    found = profiled(capsys, "nets.py:build", "--loss", loss)
    assert found["loss"] == loss
    saved = {layer["name"]: layer["saved_bytes"] for layer in found["layers"]}["loss"]
    # Log-probabilities, and targets of 8 bytes a pixel that were made up.
    assert (saved > 2 * 16 * 16 * (5 * 4 + 8)) == (loss == "cross-entropy")


@pytest.mark.parametrize(("optimizer", "copies"), [("none", 0), ("sgd", 0), ("momentum-foreach", 1), ("adamw-loop", 2)])
def test_the_optimizers_state_is_counted(optimizer, copies, folder, capsys):
    found = profiled(capsys, "nets.py:build", "--optimizer", optimizer)
    counts = 4 * 4 if copies == 2 else 0
    assert found["by_category"]["optimizer_state"] == copies * found["by_category"]["parameter"] + counts
    assert found["optimizer"] == optimizer


def test_accumulated_batches_are_told_and_take_their_time(folder, capsys):
    once, thrice = (profiled(capsys, "nets.py:build", "--accumulate", count) for count in ("1", "3"))
    assert "accumulate" not in once
    assert thrice["accumulate"] == 3
    flops = [{layer["name"]: layer["flops"] for layer in found["layers"]} for found in (once, thrice)]
    for layer in ("0", "2"):
        assert flops[1][layer] == 3 * flops[0][layer] > 0
    assert thrice["peak_allocated_bytes"] >= once["peak_allocated_bytes"]


def test_replicas_hold_buckets_or_gradients_in_them(folder, capsys):
    alone, plain, view = (
        profiled(capsys, "nets.py:build", "--card", "v100", *options)
        for options in ([], ["--replicas", "2"], ["--replicas", "2", "--bucket-view"])
    )
    assert plain["by_category"]["communication_buffer"] == plain["by_category"]["parameter"]
    assert view["peak_tensor_bytes"] < plain["peak_tensor_bytes"]
    names = [[term["name"] for term in one["beyond_tensors"]["terms"]] for one in (alone, plain)]
    assert set(names[1]) - set(names[0]) == {"NCCL buffers"}


def test_a_cuda_card_has_reserved_bytes_and_settings_of_its_allocator(folder, capsys):
    usual, expandable = (
        profiled(capsys, "nets.py:build", "--card", "v100", *options)
        for options in ([], ["--allocator", "expandable_segments:True"])
    )
    for found in (usual, expandable):
        assert found["peak_tensor_bytes"] <= found["peak_allocated_bytes"] <= found["peak_reserved_bytes"]
        outside = sum(term["size_bytes"] for term in found["beyond_tensors"]["terms"] if not term["in_allocator"])
        assert found["device_total_bytes"] == found["peak_reserved_bytes"] + outside
        assert all(term["source"] for term in found["beyond_tensors"]["terms"])
    assert expandable["peak_reserved_bytes"] <= usual["peak_reserved_bytes"]


def test_files_are_written_and_torchs_viewer_opens_the_snapshot(folder, capsys):
    files = [folder / name for name in ("layers.csv", "step.png", "step.html", "step.pickle")]
    options = [part for path in files for part in (f"--{path.suffix.removeprefix('.')}", str(path))]
    options[options.index("--pickle")] = "--snapshot"
    assert run("profile", "nets.py:build", *TINY, "--card", "v100", *options) == 0
    assert files[0].read_text().startswith("name,saved_bytes,")
    assert "nets.py:build" in files[2].read_text()
    viewer = [
        sys.executable,
        "-m",
        "torch.cuda._memory_viz",
        "trace_plot",
        str(files[3]),
        "-o",
        str(folder / "out.html"),
    ]
    done = subprocess.run(viewer, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "Active Memory Timeline" in (folder / "out.html").read_text()


def test_a_model_that_reads_values_is_told_so_and_traced_on_real_tensors(folder, capsys):
    with pytest.raises(UntraceableError, match=r"nets\.py:Picky: .*--real on the command line"):
        run("profile", "nets.py:Picky", *TINY)
    found = profiled(capsys, "nets.py:Picky", "--real")
    assert found["by_category"]["input"] == 2 * 3 * 16 * 16 * 4


def test_real_steps_of_a_model_of_others_are_measured(folder, capsys):
    found = profiled(capsys, "nets.py:dense", "--measure")
    # But for single numbers.
    assert abs(found["measured_peak_allocated_bytes"] - found["peak_tensor_bytes"]) <= 64


@pytest.mark.parametrize("precision", ["float64", "bfloat16", "float16"])
def test_other_precisions_are_profiled(precision, folder, capsys):
    found = profiled(capsys, "nets.py:build", "--precision", precision)
    assert found["precision"] == precision
    width = 8 if precision == "float64" else 4
    assert found["by_category"]["parameter"] == width * (16 * 27 + 16 + 5 * 16 + 5)
    assert (found["by_category"]["autocast_copy"] > 0) == (precision != "float64")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["nets.py:biuld"], UnknownNameError, "unknown function of nets.py 'biuld'; did you mean build"),
        (["nets.py:weights"], UnknownNameError, "unknown function of nets.py 'weights'"),
        (["nets.py:"], InputError, "an address must be MODULE:FUNCTION or file.py:FUNCTION, got 'nets.py:'"),
        (["nts.py:build"], InputError, "nts.py: no such file"),
        (["no_such_nets:build"], InputError, "importing no_such_nets fails with ModuleNotFoundError"),
        (["broken:build"], InputError, "importing broken fails with ModuleNotFoundError: .*no_such_module"),
        (["broken.py:build"], InputError, "importing broken.py fails with ModuleNotFoundError: .*no_such_module"),
        (["unfinished.py:build"], InputError, "importing unfinished.py fails with SyntaxError"),
        (["nets.py:number"], InputError, "a torch.nn.Module or a function that makes one, got int"),
        (["nets.py:failing"], InputError, "no weights at hand"),
        (["nets.py:needing"], InputError, "needing.*width"),
        (["nets.py:mixed"], InputError, "nets.py:mixed does not run on float32 2x3x16x16: layer 2 fails"),
        (["nets.py:build", "--norm", "batch"], InputError, "--norm is for networks of memseg's, got it with nets.py"),
        (["nets.py:build", "--recompute", "units"], InputError, "--recompute is for networks of memseg's"),
        (["nets.py:build", "--classes", "3"], InputError, "--classes is for networks of memseg's"),
        (["nets.py:build", "--loss", "means"], UnknownNameError, "unknown loss 'means'; did you mean mean"),
        (["nets.py:build", "--loss", "nets.py:sqares"], UnknownNameError, "'sqares'; did you mean squares"),
        (["nets.py:build", "--channels", "0"], InputError, "--channels must be at least 1, got 0"),
    ],
)
def test_what_is_no_model_of_others_is_refused_with_what_would_mend_it(arguments, error, message, folder, capsys):
    with pytest.raises(error, match=message):
        run("profile", *arguments, *TINY)
    assert capsys.readouterr() == ("", "")


# Cards.


def test_cards_lists_every_card_and_shows_one_with_the_source_of_each_figure(capsys):
    assert run("cards") == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[1:]] == [card.name for card in known_cards()]
    assert run("cards", "gtx1070") == 0
    shown = capsys.readouterr().out
    (card,) = (card for card in known_cards() if card.name == "gtx1070")
    assert all(source in shown for source in card.sources.values())
    assert run("cards", "cpu:4GiB", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["cards"]
    assert found["capacity_bytes"] == 4 * 2**30
    assert found["available_bytes"] == found["capacity_bytes"] - found["reserve_bytes"]
    assert found["sources"]["capacity"] == "given by the user"


def test_an_unknown_card_is_told_with_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown card 'gtx1071'; did you mean gtx1070"):
        run("cards", "gtx1071")
    with pytest.raises(InputError, match="one card can be shown at a time"):
        run("cards", "gtx1070,titanx")
