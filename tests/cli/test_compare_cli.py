"""`memseg compare` through the whole command line, with profiles that the command line made."""

import contextlib
import io
import json
import subprocess
import sys

import pytest
from PIL import Image

from memseg.cli.main import main
from memseg.reports.comparison import Order

JOB = ["ladder-densenet-mini", "--image", "128x256", "--batch", "1", "--card", "v100"]
PROFILES = {
    "none": [],
    "units": ["--recompute", "units"],
    "deep": ["--recompute", "block1=units", "--depth", "2"],
    "cpu": ["--card", "cpu"],
}


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    """Files by name."""
    folder = tmp_path_factory.mktemp("profiles")
    for name, options in PROFILES.items():
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            assert main(["profile", *JOB, *options, "--json"]) == 0
        (folder / f"{name}.json").write_text(text.getvalue())
    return {name: folder / f"{name}.json" for name in PROFILES}


def content(profiles, name):
    return json.loads(profiles[name].read_text())


def compare(capsys, *arguments):
    assert main(["compare", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refusal(capsys, *arguments):
    assert main(["compare", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


def test_json_has_the_figures_of_both_files_and_their_differences(profiles, capsys):
    before, after = content(profiles, "none"), content(profiles, "units")
    found = json.loads(compare(capsys, profiles["none"], profiles["units"], "--json"))
    assert found["differs"] is True
    assert found["settings"] == {"recompute": {"before": "none", "after": "units"}}
    assert found["same_settings"]["image"] == "128x256"
    assert found["peak_moment"] == {"before": before["peak_moment"], "after": after["peak_moment"]}
    for key in ("peak_allocated_bytes", "peak_reserved_bytes", "device_total_bytes", "step_seconds"):
        assert (found[key]["before"], found[key]["after"]) == (before[key], after[key])
        assert found[key]["difference"] == after[key] - before[key]
        assert found[key]["percent"] == pytest.approx(100 * (after[key] / before[key] - 1))
    differences = [change["difference"] for change in found["by_category"].values()]
    assert sum(differences) == after["peak_tensor_bytes"] - before["peak_tensor_bytes"]
    rows = [{row["name"]: row for row in one["layers"]} for one in (before, after)]
    assert {layer["name"] for layer in found["layers"]} == set(rows[0])
    for layer in found["layers"]:
        assert layer["only_in"] is None
        for side, row in zip(("before", "after"), (one[layer["name"]] for one in rows), strict=True):
            for key in ("saved_bytes", "peak_bytes", "parameter_bytes"):
                assert layer[key][side] == row[key]
            assert layer["seconds"][side] == row["forward_s"] + row["backward_s"]
    assert found["layers"][0]["saved_bytes"]["difference"] < 0


def test_the_layers_that_changed_most_come_first_by_what_is_asked_for(profiles, capsys):
    keys = {"saved": "saved_bytes", "peak": "peak_bytes", "parameters": "parameter_bytes", "time": "seconds"}
    for sort, key in keys.items():
        text = compare(capsys, profiles["none"], profiles["units"], "--json", "--sort", sort, "--top", "5")
        sizes = [abs(layer[key]["difference"]) for layer in json.loads(text)["layers"]]
        assert sizes == sorted(sizes, reverse=True)
        assert len(sizes) == 5
    text = compare(capsys, profiles["none"], profiles["units"], "--json", "--sort", "order")
    names = [layer["name"] for layer in content(profiles, "none")["layers"]]
    assert [layer["name"] for layer in json.loads(text)["layers"]] == names


def test_the_orders_that_help_names_are_those_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert "--sort {" + ",".join(Order) + "}" in " ".join(capsys.readouterr().out.split())


def test_a_profile_does_not_differ_from_itself(profiles, capsys, tmp_path):
    same = profiles["none"], profiles["none"]
    assert "\nnothing differs\n" in compare(capsys, *same, "--png", tmp_path / "same.png")
    found = json.loads(compare(capsys, *same, "--json"))
    assert found["differs"] is False
    assert found["settings"] == {}
    assert all(layer["saved_bytes"]["difference"] == 0 for layer in found["layers"])
    with Image.open(tmp_path / "same.png") as picture:
        assert picture.format == "PNG"


def test_text_tells_what_was_changed_and_what_it_did(profiles, capsys, monkeypatch):
    out = compare(capsys, profiles["none"], profiles["units"], "--top", "3")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "recompute none units" in lines
    for name in ("peak allocated", "peak reserved", "device total", "step time", "block1"):
        assert any(line.startswith(f"{name} ") and "%" in line for line in lines), name
    assert any(line.startswith("parameters by layer: nothing differs") for line in lines)
    (start,) = (index for index, line in enumerate(lines) if line.startswith("saved by layer"))
    assert [line.startswith("all ") for line in lines[start + 1 : start + 5]] == [False, False, False, True]
    assert "more layers changed, together by -" in lines[start + 5]


def test_layers_that_are_told_deeper_are_added_up(profiles, capsys):
    found = json.loads(compare(capsys, profiles["none"], profiles["deep"], "--json"))
    assert [layer for layer in found["layers"] if layer["only_in"]] == []
    assert {layer["name"]: layer for layer in found["layers"]}["block1"]["saved_bytes"]["difference"] < 0
    total = sum(layer["saved_bytes"]["after"] for layer in found["layers"])
    assert total == sum(row["saved_bytes"] for row in content(profiles, "deep")["layers"])
    assert all(layer["parameter_bytes"]["difference"] == 0 for layer in found["layers"])
    assert "profile both at the same --depth" in found["notes"][0]


def test_what_a_cpu_has_not_is_not_counted_as_saved(profiles, capsys):
    found = json.loads(compare(capsys, profiles["none"], profiles["cpu"], "--json"))
    assert found["peak_reserved_bytes"]["after"] is None
    assert found["peak_reserved_bytes"]["difference"] is None
    assert "device total" in compare(capsys, profiles["none"], profiles["cpu"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "must be one whole JSON object, but: "),
        (lambda text: "", "the file is empty"),
        (lambda text: "[1, 2]", "must be one JSON object, got list"),
        (
            lambda text: '{"feasible": true, "cards": []}',
            "missing: model, precision, device, card, peak_allocated_bytes",
        ),
        (lambda text: text.replace('"flops"', '"flop"'), "missing: layers.0.flops\n  layers.0.flop: unknown key"),
        (lambda text: text.replace('"step_seconds": 0', '"step_seconds": -1'), "step_seconds: "),
        (lambda text: text.replace('"parameter": ', '"parameter": 1'), "by_category: must add up to peak_tensor_bytes"),
        (lambda text: text.replace('"name": "block2"', '"name": "block1"'), "layers: block1 is there twice"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_with_what_is_wrong_and_how_to_make_one(
    profiles, capsys, tmp_path, damage, message
):
    bad = tmp_path / "bad one.json"
    bad.write_text(damage(profiles["none"].read_text()))
    found = refusal(capsys, profiles["none"], bad)
    assert message in found
    assert f"memseg compare: {bad}: not a profile; make a new one: memseg profile " in found
    assert f"--json > '{bad}'\n" in found


def test_an_older_profile_is_told_the_command_that_makes_it_anew(profiles, capsys, tmp_path):
    older = content(profiles, "none")
    for key in ("peak_reserved_bytes", "device_total_bytes"):
        del older[key]
    (tmp_path / "old.json").write_text(json.dumps(older))
    found = refusal(capsys, tmp_path / "old.json", profiles["none"])
    assert (
        "memseg profile ladder-densenet-mini --image 128x256 --batch 1 --precision float32 --card v100 --json" in found
    )
    assert found.endswith("\n  missing: peak_reserved_bytes, device_total_bytes\n")


def test_files_that_are_not_there_or_not_text_are_refused(profiles, capsys, tmp_path):
    assert "cannot be read: No such file or directory" in refusal(capsys, tmp_path / "none.json", profiles["none"])
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    assert "must be text in UTF-8" in refusal(capsys, profiles["none"], tmp_path / "binary.json")
    assert "--top must be at least 1, got 0" in refusal(capsys, profiles["none"], profiles["none"], "--top", "0")


def test_comparing_loads_no_torch(profiles):
    script = (
        "import sys; from memseg.cli.main import main\n"
        "assert main(['compare', *sys.argv[1:]]) == 0; assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", script, str(profiles["none"]), str(profiles["units"])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
