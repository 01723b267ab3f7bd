"""memseg eval from outside: what it prints and what it leaves."""

import csv
import json

import pytest
from PIL import Image

from memseg.cli.main import main
from memseg.data.streets import STREETS_CLASSES
from runs import untrained_run

DATA = {"dataset": "streets", "image": "64x128", "streets": {"length": 4, "val_length": 3}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained_run(tmp_path_factory.mktemp("eval") / "run", STREETS_CLASSES, steps=(3, 7), **DATA)


@pytest.fixture(scope="module")
def report(run, tmp_path_factory):
    """The folder that `--out` writes."""
    out = tmp_path_factory.mktemp("report") / "deep" / "out"
    assert main(["eval", str(run), "--device", "cpu", "--out", str(out), "--worst", "2"]) == 0
    return out


def printed(capsys, *arguments):
    assert main(["eval", *map(str, arguments), "--device", "cpu"]) == 0
    return capsys.readouterr().out


def test_json_has_every_score_and_null_for_those_that_streets_have_not(run, capsys):
    told = json.loads(printed(capsys, run, "--json"))
    assert list(told) == [
        *("steps", "scales", "flip", "precision", "split", "images", "miou", "pixel_accuracy", "iou"),
        *("category_miou", "category_iou", "miiou", "iiou", "category_miiou", "category_iiou", "instance_images"),
        "seconds",
    ]
    assert (told["steps"], told["split"], told["images"], told["instance_images"]) == (7, "val", 3, 0)
    assert set(told["iou"]) == set(STREETS_CLASSES.names)
    assert [name for name, value in told.items() if value is None] == [
        *("category_miou", "category_iou", "miiou", "iiou", "category_miiou", "category_iiou")
    ]


def test_views_checkpoint_split_and_precision_are_those_asked_for(run, capsys):
    plain = json.loads(printed(capsys, run, "--json"))
    views = json.loads(printed(capsys, run, "--json", "--scales", "0.5,1", "--flip"))
    assert (views["scales"], views["flip"]) == ([0.5, 1.0], True)
    assert views["pixel_accuracy"] != plain["pixel_accuracy"]
    early = json.loads(printed(capsys, run, "--json", "--checkpoint", "step-00000003", "--split", "train"))
    assert (early["steps"], early["split"], early["images"]) == (3, "train", 4)
    exact = json.loads(printed(capsys, run, "--json", "--precision", "float64"))
    assert exact["precision"] == "float64"
    assert exact["pixel_accuracy"] == pytest.approx(plain["pixel_accuracy"], abs=0.01)


def test_the_report_has_the_scores_of_the_split_and_of_each_picture(report):
    results = json.loads((report / "results.json").read_text())
    counts = results["confusion"]
    hits = sum(row[number] for number, row in enumerate(counts))
    assert results["pixel_accuracy"] == pytest.approx(hits / sum(map(sum, counts)), rel=1e-12)
    assert results["classes"] == list(STREETS_CLASSES.names)
    rows = list(csv.DictReader((report / "images.csv").read_text().splitlines()))
    assert [row["key"] for row in rows] == ["val_00000", "val_00001", "val_00002"]
    labelled = [int(row["labelled_pixels"]) for row in rows]
    assert labelled == [64 * 128] * 3
    mean = sum(float(row["pixel_accuracy"]) for row in rows) / 3
    assert results["pixel_accuracy"] == pytest.approx(mean, rel=1e-12)


def test_the_worst_pictures_come_first_in_files_and_page(report):
    rows = list(csv.DictReader((report / "images.csv").read_text().splitlines()))
    worst = [row["key"] for row in sorted(rows, key=lambda row: float(row["miou"]))][:2]
    assert sorted(path.name for path in (report / "worst").iterdir()) == [
        f"{rank:03d}_{key}.png" for rank, key in enumerate(worst, start=1)
    ]
    page = (report / "index.html").read_text()
    assert page.index(f"1. {worst[0]}: mIoU") < page.index(f"2. {worst[1]}: mIoU")
    assert page.count("<figure>") == 2
    with Image.open(report / "worst" / f"001_{worst[0]}.png") as strip, Image.open(report / "confusion.png") as matrix:
        assert strip.width == 3 * 128 + 2 * 8
        assert strip.height > 64
        assert matrix.width > 600


def test_strips_of_an_earlier_report_do_not_stay(run, report, tmp_path):
    (tmp_path / "worst").mkdir()
    (tmp_path / "worst" / "001_old.png").write_bytes(b"")
    (tmp_path / "worst" / "mine.png").write_bytes(b"")
    assert main(["eval", str(run), "--device", "cpu", "--out", str(tmp_path), "--worst", "1"]) == 0
    names = sorted(path.name for path in (tmp_path / "worst").iterdir())
    assert len(names) == 2
    assert names[1] == "mine.png"
    assert names[0].startswith("001_val")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--worst", "-1"], "--worst must be 0 or more pictures, got -1"),
        (["--scales", "1,big"], "must be numbers with commas between, such as 0.75,1,1.25, got 1,big"),
        (["--scales", "0"], "each scale must lie within 0.1 and 10, got 0"),
        (["--set", "model.name=x"], "--set may only replace values of the data set here"),
        (["--checkpoint", "best"], "was never evaluated in training"),
        (["--split", "vall"], "val"),
    ],
)
def test_bad_input_is_refused_in_one_message(run, tmp_path, capsys, arguments, told):
    out = tmp_path / "out"
    try:
        code = main(["eval", str(run), "--device", "cpu", "--out", str(out), *arguments])
    except SystemExit as error:
        code = error.code
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert told in printed.err
    assert not out.exists()
