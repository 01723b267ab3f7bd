"""memseg train from outside: what it prints, what it leaves, and what it refuses."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from memseg.cli.main import main
from memseg.planning import load_plan
from memseg.training.log import read_metrics
from processes import hand_written_plan, memseg, streets


def folder_data(root, images=4):
    """A data set of JPEG noise, 64x128, two classes."""
    random = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (root / kind / "train").mkdir(parents=True)
    (root / "classes.txt").write_text("left\nright\n")
    for number in range(images):
        pixels = random.integers(0, 256, (64, 128, 3), np.uint8)
        Image.fromarray(pixels).save(root / "images" / "train" / f"{number}.jpg")
        label = (np.arange(128) >= 64).astype(np.uint8)
        Image.fromarray(np.tile(label, (64, 1))).save(root / "labels" / "train" / f"{number}.png")
    return root


def on_folder(root):
    """Arguments to train on such data."""
    settings = {
        "data.dataset": "folder",
        "data.root": root,
        "data.image": "64x128",
        "data.fit": "pad",
        "train.batch": 2,
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["camvid_mini", *overrides, "--set", "train.evaluate_every=0"]


@pytest.fixture(scope="module")
def split_run(tmp_path_factory):
    """30 steps in float32 on two cards so small that something must be rebuilt; the folder, and what was printed."""
    folder = tmp_path_factory.mktemp("split") / "run"
    arguments = streets(30, precision="float32", length=40)
    size = ["--set", "data.image=128x256", "--set", "train.workers=1", "--set", "train.checkpoint_every=500"]
    cards = ["--cards", "cpu:372MiB,cpu:386MiB", "--strategy", "split"]
    return folder, memseg("train", *arguments, *size, *cards, "--json", "--out", folder)


def test_json_is_the_result_and_all_that_stands_on_standard_output(split_run):
    folder, done = split_run
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((folder / "result.json").read_text())
    assert set(result) == {"steps", "stopped_early", "loss", "best", "cards"}
    assert (result["steps"], result["stopped_early"], result["best"]) == (30, False, None)
    assert result["loss"] == pytest.approx(read_metrics(folder)[-1]["loss"])
    assert [card["card"] for card in result["cards"]] == [card.card for card in load_plan(folder / "plan.json").cards]
    assert "Traceback" not in done.stderr


def test_every_card_is_predicted_within_5_percent_of_what_it_allocated(split_run):
    folder, done = split_run
    plan = load_plan(folder / "plan.json")
    assert {segment.recompute.value for card in plan.cards for segment in card.segments} > {"none"}
    for card, planned in zip(json.loads(done.stdout)["cards"], plan.cards, strict=True):
        assert card["predicted_peak_bytes"] == planned.predicted_peak_bytes <= planned.available_bytes
        assert card["predicted_peak_bytes"] == pytest.approx(card["measured_peak_bytes"], rel=0.05)


def test_the_loss_falls(split_run):
    losses = [record["loss"] for record in read_metrics(split_run[0])]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["stretes"], "unknown recipe 'stretes'; did you mean streets?"),
        (["streets_demo", "--set", "model.name=ladder-densenet-mni"], "did you mean ladder-densenet-mini?"),
        (["streets_demo", "--set", "train.bach=4"], "train.bach: unknown key; did you mean batch?"),
        (["streets_demo", "--cards", "gtx107"], "unknown card 'gtx107'; did you mean gtx1070?"),
        (["streets_demo", "--cards", "cpu:2XB"], "a size must be a number with a unit"),
        (["streets_demo", "--cards", "cpu:2GiB,gtx1070"], "cards must all be CUDA cards or all CPU cards"),
        (
            ["streets_demo", "--set", "data.image=100x256"],
            "multiples of 64 (the output stride of ladder-densenet-mini)",
        ),
        (["streets_demo", "--set", "data.streets.length=7"], "train.batch is 8, there are 7 images"),
        (["streets_demo", "--resume", "runs/some"], "give either a recipe to begin with, or --resume"),
        ([], "give either a recipe to begin with, or --resume"),
        (["--resume", "runs/some", "--out", "elsewhere"], "a run goes on in its own folder, runs/some; leave out"),
        (["--resume", "nowhere"], "nowhere: must be a run folder as memseg train makes it"),
        (["streets_demo", "--plan", "absent.json"], "absent.json: cannot be read as a plan"),
        (["camvid_mini", "--set", "data.root=nowhere"], "found no such folder; correct data.root"),
        (["streets_demo", "--set", "model.initial_weights=nowhere"], "or a state dict file, there is none at nowhere"),
        (["streets_demo", "--set", "loss.class_weights=[1, 2]"], "a number for each of the 8 classes road, "),
        (["streets_demo", "--set", "schedule.warmup_steps=10000"], "the warm-up must be shorter than the run"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("memseg train: ")
    assert told in printed.err
    assert not list(tmp_path.iterdir())


def test_a_plan_for_another_model_is_refused_with_the_command_for_a_new_one(tmp_path, capsys):
    plan = hand_written_plan(tmp_path / "plan.json", 2, model="ladder-densenet121")
    assert main(["train", *streets(4), "--plan", str(plan), "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "the plan was made for model ladder-densenet121, the recipe trains ladder-densenet-mini" in told
    assert "memseg plan ladder-densenet-mini --image 64x128 --batch 2 --classes 8 --accumulate 1 --norm batch" in told


def test_a_folder_that_holds_a_run_is_not_trained_over(split_run, capsys):
    folder = split_run[0]
    before = (folder / "recipe.json").read_text()
    assert main(["train", "streets_demo", "--out", str(folder)]) == 2
    assert (
        f"{folder} holds a run already; go on with --resume {folder}, or give another --out" in capsys.readouterr().err
    )
    assert (folder / "recipe.json").read_text() == before


def test_an_image_without_label_is_named_before_training(tmp_path, capsys):
    root = folder_data(tmp_path / "data")
    (root / "labels" / "train" / "2.png").unlink()
    assert main(["train", *on_folder(root), "--cards", "cpu:2GiB", "--out", str(tmp_path / "run")]) == 2
    assert "images/train/2.jpg: has no label; add labels/train/2.png" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_validation_picture_that_the_region_does_not_fit_is_named_before_training(tmp_path, capsys):
    root = folder_data(tmp_path / "data")
    for kind in ("images", "labels"):
        (root / kind / "val").mkdir()
    Image.new("RGB", (128, 32)).save(root / "images" / "val" / "low.png")
    Image.new("L", (128, 32)).save(root / "labels" / "val" / "low.png")
    region = ["--set", "data.region=[0, 64, 0, 128]", "--set", "train.evaluate_every=1"]
    assert main(["train", *on_folder(root), *region, "--cards", "cpu:2GiB", "--out", str(tmp_path / "run")]) == 2
    assert "folder, split val: 1 problem\n  low: a picture must reach row 64" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_torn_image_is_named_although_another_process_decoded_it(tmp_path):
    root = folder_data(tmp_path / "data")
    torn = root / "images" / "train" / "2.jpg"
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    plan = hand_written_plan(tmp_path / "plan.json", 1, num_classes=2, precision="float32")
    workers = ["--set", "train.workers=1"]
    done = memseg("train", *on_folder(root), *workers, "--plan", plan, "--out", tmp_path / "run")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    told = done.stderr.partition("memseg train: ")[2].splitlines()
    assert told[0] == f"{torn}: 1 problem"
    assert told[1].startswith("  cannot be decoded (")
    assert len(told) == 2


def test_a_torn_validation_image_is_named_and_costs_no_step(tmp_path):
    root, run = folder_data(tmp_path / "data"), tmp_path / "run"
    for kind in ("images", "labels"):
        shutil.copytree(root / kind / "train", root / kind / "val")
    torn = root / "images" / "val" / "0.jpg"
    whole = torn.read_bytes()
    torn.write_bytes(whole[: len(whole) // 2])
    plan = hand_written_plan(tmp_path / "plan.json", 1, num_classes=2, precision="float32")
    scored = ["--set", "train.evaluate_every=1", "--set", "train.checkpoint_every=1000", "--set", "schedule.epochs=2"]
    done = memseg("train", *on_folder(root), *scored, "--plan", plan, "--out", run)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert f"memseg train: {torn}: 1 problem" in done.stderr
    (checkpoint,) = (run / "checkpoints").iterdir()

    torn.write_bytes(whole)
    done = memseg("train", "--resume", run, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["best"]["step"] == json.loads(done.stdout)["steps"]
    assert json.loads(done.stdout)["steps"] == 2 * int(checkpoint.name.removeprefix("step-"))
