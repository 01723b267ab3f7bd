"""`memseg bench infer` and `memseg export` as they are called."""

import json

import pytest

from memseg.cli.main import main
from memseg.data.streets import STREETS_CLASSES
from runs import untrained_run


def test_bench_prints_one_object(capsys):
    arguments = ["bench", "infer", "ladder-densenet-mini", "--image", "64x64", "--configs", "folded", "--rounds", "1"]
    assert main([*arguments, "--classes", "3", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert set(found) == {
        "model", "weights", "image", "batch", "pictures", "output", "machine", "versions", "rows",
    }  # fmt: skip
    assert (found["weights"], found["image"], found["pictures"]) == ("random", "64x64", "generated streets")
    eager, folded = found["rows"]
    assert set(folded) == {
        "name", "images_per_second", "median_s", "min_s", "max_s", "speedup", "min_speedup", "max_speedup",
        "prepare_s", "max_difference", "changed_share", "within_tolerance",
    }  # fmt: skip
    assert (eager["name"], eager["speedup"], folded["within_tolerance"]) == ("eager", 1.0, True)
    assert "memseg bench: preparing folded" in printed.err


def test_bench_prints_a_table_and_what_is_best(capsys):
    arguments = ["bench", "infer", "ladder-densenet-mini", "--image", "64x64", "--configs", "folded", "--rounds", "1"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "images to full-size logits, 64x64, batch 1" in printed
    assert "\nbest within tolerance: " in printed


def test_a_run_is_exported_at_the_size_of_its_recipe(tmp_path, capsys):
    run = untrained_run(tmp_path / "run", STREETS_CLASSES, dataset="streets", image="64x128")
    out = tmp_path / "streets.pt2"
    assert main(["export", str(run), "--format", "torch", "--out", str(out)]) == 0
    assert out.stat().st_size > 100_000
    assert capsys.readouterr().out.startswith(f"wrote {out}, ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "ladder-densenet-mini", "--out", "x.onnx"], "--image must say how large the images are"),
        (["export", "ladder-densnet-mini", "--image", "64x64", "--out", "x"], "did you mean ladder-densenet-mini?"),
        (["export", "ladder-densenet-mini", "--image", "64x64", "--batch", "0", "--out", "x"], "--batch must be 1"),
        (["bench", "infer", "ladder-densenet-mini", "--image", "65x64"], "nearest is 64x64"),
        (["bench", "infer", "ladder-densenet-mini", "--configs", "foldd"], "did you mean folded"),
        (["bench", "infer", "ladder-densenet-mini", "--tolerance", "2"], "--tolerance must be a share"),
    ],
)
def test_bad_input_exits_with_2_and_one_message(arguments, message, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
