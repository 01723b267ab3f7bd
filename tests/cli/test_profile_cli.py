"""`memseg profile` and `memseg cards` through their own parsers."""

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
    for layer in found["layers"]:
        assert set(layer) == {"name", "saved_bytes", "peak_bytes", "parameter_bytes", "forward_s", "backward_s"}
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
    lines = [line.rstrip() for line in out.splitlines()]
    for name in (row["name"] for row in csv.DictReader(table.read_text().splitlines())):
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
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
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
