"""memseg submit from outside: what the test servers are sent, and what Cityscapes' own script says of it."""

import json
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from memseg.cli.main import main
from memseg.data.cityscapes import CITYSCAPES_CLASSES, LABEL_IDS
from memseg.data.voc import VOC_CLASSES
from official import made_frame, official_scores
from runs import untrained_run

KEYS = [f"somewhere_000000_00000{number}" for number in range(3)]


@pytest.fixture(scope="module")
def cityscapes(tmp_path_factory):
    """A small data set in Cityscapes' layout, whose test split has pictures only; and a run on it."""
    root = tmp_path_factory.mktemp("cityscapes")
    for seed, key in enumerate(KEYS):
        made_frame(root, "val", key, (64, 128), seed)
    for seed in range(2):
        label = made_frame(root, "test", f"elsewhere_000000_00000{seed}", (64, 128), seed)
        label.with_name(label.name.replace("labelIds", "instanceIds")).unlink()
        label.unlink()
    data = {"dataset": "cityscapes", "root": str(root), "image": "64x128"}
    return root, untrained_run(root / "run", CITYSCAPES_CLASSES, steps=(1, 2), **data)


def submit(*arguments):
    return main(["submit", *map(str, arguments), "--device", "cpu"])


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture), picture.mode


def test_cityscapes_own_script_finds_the_scores_that_eval_tells(cityscapes, tmp_path, monkeypatch, capsys):
    root, run = cityscapes
    views = ["--scales", "1,1.5", "--flip"]
    assert submit(run, "--format", "cityscapes", "--split", "val", "--out", tmp_path, *views) == 0
    capsys.readouterr()
    assert main(["eval", str(run), "--json", "--device", "cpu", *views]) == 0
    told = json.loads(capsys.readouterr().out)
    pytest.importorskip("cityscapesscripts", reason="cityscapesscripts is not installed")
    monkeypatch.setenv("CITYSCAPES_RESULTS", str(tmp_path))
    from cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling import args, getPrediction

    monkeypatch.setattr(args, "predictionPath", None)
    monkeypatch.setattr(args, "predictionWalk", None)
    truths = sorted((root / "gtFine/val").rglob("*_gtFine_labelIds.png"))
    official = official_scores([getPrediction(args, str(truth)) for truth in truths], truths, monkeypatch)
    for name, theirs in {
        "miou": "averageScoreClasses",
        "miiou": "averageScoreInstClasses",
        "category_miou": "averageScoreCategories",
        "category_miiou": "averageScoreInstCategories",
    }.items():
        assert told[name] == pytest.approx(official[theirs], rel=1e-12, abs=0), name
    assert 0 < told["miou"] < 1


def test_a_test_split_needs_no_labels_and_is_packed_in_label_ids(cityscapes, tmp_path, capsys):
    _, run = cityscapes
    assert submit(run, "--format", "cityscapes", "--out", tmp_path) == 0
    names = [f"elsewhere_000000_00000{number}_predLabelIds.png" for number in range(2)]
    assert capsys.readouterr().out == f"2 pictures; to upload: {tmp_path / 'cityscapes_test.zip'}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cityscapes_test.json", "cityscapes_test.zip", *names]
    with zipfile.ZipFile(tmp_path / "cityscapes_test.zip") as archive:
        assert sorted(archive.namelist()) == names
        assert archive.read(names[0]) == (tmp_path / names[0]).read_bytes()
    values, mode = pixels(tmp_path / names[0])
    assert (values.shape, mode) == ((64, 128), "L")
    assert set(np.unique(values)) <= set(LABEL_IDS)


def test_what_was_broken_off_goes_on_and_what_is_there_is_kept(cityscapes, tmp_path, capsys):
    _, run = cityscapes
    command = (run, "--format", "cityscapes", "--split", "val", "--out", tmp_path)
    assert submit(*command) == 0
    first, second, _ = (tmp_path / f"{key}_predLabelIds.png" for key in KEYS)
    whole = second.read_bytes()
    first.write_bytes(b"kept as it is")
    second.unlink()
    capsys.readouterr()
    assert submit(*command) == 0
    assert capsys.readouterr().out.startswith("3 pictures, 2 of them there already; to upload: ")
    assert (first.read_bytes(), second.read_bytes()) == (b"kept as it is", whole)
    assert submit(*command, "--overwrite") == 0
    assert pixels(first)[0].shape == (64, 128)


def test_pictures_of_two_networks_are_never_mixed(cityscapes, tmp_path, capsys):
    _, run = cityscapes
    command = (run, "--format", "cityscapes", "--split", "val", "--out", tmp_path)
    assert submit(*command) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert submit(*command, "--checkpoint", "step-00000001", "--flip") == 2
    told = capsys.readouterr().err
    assert "holds 3 pictures that something else made (flip was False, now True, steps was 2, now 1, weights" in told
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "cityscapes_val.json").unlink()
    assert submit(*command) == 2
    assert "(cityscapes_val.json is not there)" in capsys.readouterr().err
    assert submit(*command, "--flip", "--overwrite") == 0


def test_pixels_outside_the_region_have_the_class_of_the_nearest_inside(cityscapes, tmp_path):
    root, _ = cityscapes
    data = {"dataset": "cityscapes", "root": str(root), "image": "64x64", "region": [8, 56, 16, 100], "fit": "resize"}
    run = untrained_run(tmp_path / "run", CITYSCAPES_CLASSES, **data)
    assert submit(run, "--format", "cityscapes", "--split", "val", "--out", tmp_path / "out") == 0
    values, _ = pixels(tmp_path / "out" / f"{KEYS[0]}_predLabelIds.png")
    inside = values[8:56, 16:100]
    assert len(np.unique(inside)) > 1
    assert np.array_equal(values, np.pad(inside, ((8, 8), (16, 28)), mode="edge"))


def test_a_region_that_a_picture_does_not_have_is_told_before_anything_is_written(cityscapes, tmp_path, capsys):
    root, _ = cityscapes
    data = {"dataset": "cityscapes", "root": str(root), "image": "64x64", "region": [0, 900, 0, 100], "fit": "resize"}
    run = untrained_run(tmp_path / "run", CITYSCAPES_CLASSES, **data)
    assert submit(run, "--format", "cityscapes", "--out", tmp_path / "out") == 2
    assert "elsewhere_000000_000001: a picture must reach row 900" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    root = tmp_path_factory.mktemp("voc")
    folder = root / "VOCdevkit" / "VOC2012"
    for part in ("JPEGImages", "ImageSets/Segmentation", "SegmentationClass"):
        (folder / part).mkdir(parents=True)
    names = ["2008_000006", "2008_000011"]
    (folder / "ImageSets/Segmentation/test.txt").write_text("\n".join(names) + "\n")
    random = np.random.default_rng(0)
    for name, size in zip(names, [(50, 70), (64, 64)], strict=True):
        Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(folder / "JPEGImages" / f"{name}.jpg")
    data = {"dataset": "voc", "root": str(root), "image": "64x64"}
    return untrained_run(root / "run", VOC_CLASSES, **data), names


def test_voc_gets_palette_pictures_in_the_folders_of_its_kit_and_an_archive(voc, tmp_path, capsys):
    run, names = voc
    assert submit(run, "--format", "voc", "--out", tmp_path) == 0
    folder = tmp_path / "results" / "VOC2012" / "Segmentation" / "comp6_test_cls"
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.png" for name in names]
    values, mode = pixels(folder / f"{names[0]}.png")
    assert (values.shape, mode) == ((50, 70), "P")
    assert values.max() <= 20
    with Image.open(folder / f"{names[0]}.png") as picture:
        assert picture.getpalette()[: 3 * 21] == [part for colour in VOC_CLASSES.colours for part in colour]
    archive = tmp_path / "voc_comp6_test.tar.gz"
    assert str(archive) in capsys.readouterr().out
    with tarfile.open(archive) as packed:
        assert sorted(packed.getnames()) == [
            f"results/VOC2012/Segmentation/comp6_test_cls/{name}.png" for name in names
        ]


def test_comp5_is_for_what_learnt_from_voc_alone(voc, tmp_path):
    assert submit(voc[0], "--format", "voc", "--competition", "comp5", "--out", tmp_path) == 0
    assert (tmp_path / "results/VOC2012/Segmentation/comp5_test_cls").is_dir()
    assert (tmp_path / "voc_comp5_test.tar.gz").is_file()


def test_a_run_on_other_classes_is_refused(voc, tmp_path, capsys):
    assert submit(voc[0], "--format", "cityscapes", "--out", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "a submission to cityscapes must have the classes that the run was trained on (background, aero" in told
    assert not (tmp_path / "out").exists()
