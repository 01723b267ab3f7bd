"""What a run refuses before anything is lost: a second trainer, another model, sizes that cannot be trained on."""

import fcntl
import json

import pytest

from memseg.cli.main import main
from memseg.data import ClassList
from memseg.training.checkpoint import write_run
from memseg.training.recipe import load_recipe

SMALL = ["data.image=64x128", "train.batch=2", "data.streets.length=8", "data.streets.val_length=2", "train.workers=0"]


@pytest.fixture
def begun(tmp_path):
    """A run folder as it is before the first checkpoint."""
    recipe = load_recipe("streets_demo", SMALL)
    streets = recipe.data.open_train().classes
    write_run(tmp_path, recipe, ClassList(streets.names, streets.colours))
    return tmp_path


def refusal(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_a_folder_that_is_being_trained_in_is_left_alone(begun, capsys):
    before = {path.name: path.read_bytes() for path in begun.iterdir()}
    with (begun / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "trained by another process" in refusal(capsys, "train", "--resume", begun, "--cards", "cpu:2GiB")
    assert {path.name: path.read_bytes() for path in begun.iterdir() if path.name != ".lock"} == before


@pytest.mark.parametrize("override", ["model.name=ladder-densenet121", "model.norm=frozen", "train.precision=float64"])
def test_a_run_does_not_become_another_network(begun, capsys, override):
    described = (begun / "recipe.json").read_text()
    found = refusal(capsys, "train", "--resume", begun, "--set", override, "--cards", "cpu:2GiB")
    assert "the model, the precision and the optimizer it began with" in found
    assert (begun / "recipe.json").read_text() == described


def test_a_run_does_not_learn_other_classes(begun, capsys):
    stored = json.loads((begun / "classes.json").read_text())
    stored["names"][0] = "sea"
    (begun / "classes.json").write_text(json.dumps(stored))
    assert "sea" in refusal(capsys, "train", "--resume", begun, "--cards", "cpu:2GiB")


@pytest.mark.parametrize("command", ["profile", "plan", "train"])
def test_a_single_value_per_channel_is_refused_before_batch_norm_meets_it(command, capsys, tmp_path):
    job = ["ladder-densenet-mini", "--image", "64x64", "--batch", "1"]
    arguments = {
        "profile": ["profile", *job],
        "plan": ["plan", *job, "--cards", "cpu:2GiB"],
        "train": ["train", "streets_demo", "--set", "data.image=64x64", "--set", "train.batch=1", "--out", tmp_path],
    }[command]
    assert "more than one value per channel" in refusal(capsys, *arguments)
    assert main(["profile", *job, "--norm", "frozen"]) == 0


def test_a_plan_that_has_nowhere_to_go_is_refused_before_it_is_made(tmp_path, capsys):
    job = ["plan", "ladder-densenet-mini", "--image", "64x128", "--batch", "2", "--cards", "cpu:2GiB"]
    assert "-o must name a file" in refusal(capsys, *job, "-o", tmp_path / "nowhere" / "plan.json")
    assert "-o must name a file" in refusal(capsys, *job, "-o", tmp_path)


def test_a_region_beyond_the_images_is_refused_before_planning(tmp_path, capsys):
    settings = [part for text in (*SMALL, "data.region=[0, 500, 0, 10]") for part in ("--set", text)]
    refusal(capsys, "train", "streets_demo", *settings, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
