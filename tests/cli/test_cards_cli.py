"""`memseg cards` as its users run it: real processes, a short measurement, a machine without NVIDIA's driver."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memseg.cli.main import main
from memseg.planning import load_card, parse_cards
from memseg.units import GIB


def memseg(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "memseg.cli.main", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180, check=False
    )


def test_a_calibrated_machine_is_a_card_that_profile_uses_and_no_file_is_overwritten_unasked(tmp_path: Path):
    done = memseg("cards", "--calibrate", "--quick", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "wrote this-machine.toml; use it by --card this-machine.toml" in done.stderr
    (told,) = json.loads(done.stdout)["cards"]
    path = tmp_path / "this-machine.toml"
    card = load_card(path)
    assert told["flops_per_s"] == card.flops
    assert told["half_flops_per_s"] == card.half_flops > 0
    assert told["overhead_s"] == card.overhead_s > 0
    assert set(told["sources"]) == {
        *("capacity", "reserve", "flops", "convolution_flops", "half_flops", "bandwidth", "link", "overhead"),
        "efficiency",
    }
    written = path.read_text()

    again = memseg("cards", "--calibrate", "--quick", folder=tmp_path)
    assert again.returncode == 2
    assert "this-machine.toml is there already; --force overwrites it" in again.stderr
    assert path.read_text() == written

    small = ("ladder-densenet-mini", "--image", "128x256", "--batch", "1")
    profiled = memseg("profile", *small, "--card", "this-machine.toml", "--json", folder=tmp_path)
    assert profiled.returncode == 0, profiled.stderr
    assert json.loads(profiled.stdout)["model"] == "ladder-densenet-mini"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--calibrate", "mine.txt"], "must end in .toml"),
        (["--calibrate", "nowhere/mine.toml"], "make nowhere first"),
        (["gtx1070", "--calibrate"], "no card goes with it, got 'gtx1070'"),
        (["--quick"], "--quick goes with --calibrate"),
        (["--force"], "--force goes with --calibrate"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_at_once(arguments: list[str], told: str, tmp_path: Path):
    done = memseg("cards", *arguments, folder=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def has_nvml() -> bool:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    pynvml.nvmlShutdown()
    return True


@pytest.mark.skipif(has_nvml(), reason="this machine has an NVIDIA driver")
@pytest.mark.parametrize(
    "arguments",
    [
        ("cards", "here"),
        ("cards", "here:0", "--json"),
        ("plan", "ladder-densenet-mini", "--image", "128x256", "--batch", "1", "--cards", "gtx1070,here"),
    ],
)
def test_where_nvml_is_not_there_an_error_says_what_was_looked_for_and_what_would_mend_it(
    arguments: tuple[str, ...], tmp_path: Path
):
    done = memseg(*arguments, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "known to NVML (libnvidia-ml, a part of NVIDIA's driver), which answers: " in done.stderr
    assert "as in --cards gtx1070; memseg cards lists them" in done.stderr
    assert "Traceback" not in done.stderr


def test_cards_of_this_machine_are_listed_with_what_others_use(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    (profile,) = parse_cards("rtx3090")
    busy = replace(profile, name="here:0", reserve_bytes=profile.reserve_bytes + 2 * GIB, used_bytes=2 * GIB)
    monkeypatch.setattr("memseg.planning.cards.local_cards", lambda: (busy,))
    assert main(["cards", "here"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert "in use" in header
    assert row.split()[:9] == ["here:0", "23.56", "GiB", "2.75", "GiB", "2.00", "GiB", "20.81", "GiB"]
    assert main(["cards", "here", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["cards"]
    assert (told["name"], told["used_bytes"], told["reserve_bytes"]) == ("here:0", 2 * GIB, busy.reserve_bytes)
