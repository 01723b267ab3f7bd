"""Label maps for pictures of any size, and what a broken picture among good ones does."""

import numpy as np
import pytest
import torch
from PIL import Image

from memseg.data import ClassList
from memseg.errors import DataError
from memseg.inference.images import label_png, overlay_png
from memseg.inference.labelling import Framing
from memseg.inference.predict import Inputs, find_inputs, predict_images
from memseg.models import build_model

CLASSES = ClassList(("road", "car", "sky"), ((128, 64, 128), (0, 0, 142), (70, 130, 180)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model("ladder-densenet-mini", num_classes=3)


def write_picture(path, size, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def test_results_have_the_size_of_the_picture_and_the_colours_of_the_classes(model, tmp_path):
    paths = [write_picture(tmp_path / "odd.png", (61, 97)), write_picture(tmp_path / "grey.jpg", (70, 65), "L")]
    predictions = predict_images(model, paths, tmp_path / "out", CLASSES)
    assert [prediction.image for prediction in predictions] == paths
    for prediction, size in zip(predictions, [(97, 61), (65, 70)], strict=True):
        with Image.open(prediction.labels) as labels, Image.open(prediction.overlay) as overlay:
            assert (labels.size, labels.mode) == (size, "P")
            assert (overlay.size, overlay.mode) == (size, "RGB")
            assert set(np.unique(labels)) <= {0, 1, 2}
            assert labels.getpalette()[:9] == [128, 64, 128, 0, 0, 142, 70, 130, 180]
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_unlabelled_is_black_and_shows_the_picture_in_the_overlay():
    labels = np.array([[1, 255]], dtype=np.uint8)
    image = np.full((1, 2, 3), 100, dtype=np.uint8)
    assert np.asarray(label_png(labels, CLASSES).convert("RGB")).tolist() == [[[0, 0, 142], [0, 0, 0]]]
    assert np.array_equal(label_png(labels, CLASSES), labels)
    assert np.asarray(overlay_png(image, labels, CLASSES)).tolist() == [[[50, 50, 121], [100, 100, 100]]]


def test_what_shows_in_names_and_headers_is_told_before_anything_is_written(model, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    paths = [
        write_picture(tmp_path / "good.png", (64, 64)),
        write_picture(tmp_path / "other" / "good.jpg", (64, 64)),
        tmp_path / "text.png",
        tmp_path / "absent.png",
        write_picture(tmp_path / "small.png", (10, 64)),
    ]
    with pytest.raises(DataError) as caught:
        predict_images(model, paths, tmp_path / "out", CLASSES, framing=Framing(region=(0, 64, 0, 64)))
    clash, text, absent, small = caught.value.problems
    assert clash.startswith(f"{paths[1]}: its results would overwrite those of {paths[0]}")
    assert text == f"{paths[2]}: must be a picture that Pillow can read (PNG, JPEG, ...), it is not"
    assert absent == f"{paths[3]}: cannot be read: No such file or directory"
    assert small.startswith(f"{paths[4]}: a picture must reach row 64")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_picture_is_named_and_costs_nothing_that_was_written(model, tmp_path, suffix):
    good, torn = write_picture(tmp_path / "good.png", (64, 64)), write_picture(tmp_path / f"torn.{suffix}", (64, 64))
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size * 2 // 3])
    with pytest.raises(DataError, match=rf"torn\.{suffix}: 1 problem\n.*cannot be decoded .*truncated"):
        predict_images(model, [good, torn], tmp_path / "out", CLASSES)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good_labels.png", "good_overlay.png"]


def test_only_what_is_asked_for_is_written(model, tmp_path):
    path = write_picture(tmp_path / "one.png", (64, 64))
    (prediction,) = predict_images(model, [path], tmp_path / "out", CLASSES, overlay=False)
    assert (prediction.labels, prediction.overlay) == (tmp_path / "out" / "one_labels.png", None)
    (prediction,) = predict_images(model, [path], tmp_path / "other", CLASSES, labels=False)
    assert (prediction.labels, prediction.overlay) == (None, tmp_path / "other" / "one_overlay.png")
    assert [file.name for folder in ("out", "other") for file in (tmp_path / folder).iterdir()] == [
        "one_labels.png",
        "one_overlay.png",
    ]


def test_folders_are_searched_for_pictures_and_videos(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("notes.txt", "drive.MP4"):
        (tmp_path / name).write_text("")
    deep, top = write_picture(tmp_path / "b" / "c" / "deep.JPG", (2, 2)), write_picture(tmp_path / "a.png", (2, 2))
    notes, drive = tmp_path / "notes.txt", tmp_path / "drive.MP4"
    assert find_inputs([tmp_path]) == Inputs([top, deep], [drive])
    assert find_inputs([drive, deep, notes]) == Inputs([deep, notes], [drive])
    assert find_inputs([deep, tmp_path, tmp_path / "b" / ".." / "a.png"]) == Inputs([deep, top], [drive])
    with pytest.raises(DataError, match=r"2 problems\n.*absent: no such file or folder\n.*empty: .*has none"):
        find_inputs([tmp_path / "absent", tmp_path / "empty"])


def test_what_an_earlier_run_left_is_not_labelled_again(tmp_path):
    picture, other = (write_picture(tmp_path / name, (2, 2)) for name in ("a.png", "truth/a_labels.png"))
    out = tmp_path / "out"
    left = [write_picture(out / name, (2, 2)) for name in ("a_labels.png", "a_overlay.png", "drive/000000_labels.png")]
    (out / "drive_overlay.mp4").write_text("")
    assert find_inputs([tmp_path], out) == Inputs([picture, other], [])
    assert find_inputs([left[0]], out) == Inputs([left[0]], [])


def test_a_picture_of_more_than_8_bits_is_refused(model, tmp_path):
    # Pillow would make white of all but the darkest 255 of its 65536 values.
    Image.fromarray(np.full((64, 64), 30_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png: must have 8 bits a channel, has more \(Pillow's mode I;16\)"):
        predict_images(model, [tmp_path / "deep.png"], tmp_path / "out", CLASSES)
