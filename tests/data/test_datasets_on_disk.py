"""Data sets on disk: the real ones load as their authors describe them, damaged ones say what is wrong."""

import numpy as np
import pytest
from PIL import Image

from memseg.data import IGNORE_INDEX, open_dataset
from memseg.data.folder import read_classes
from memseg.errors import DataError, InputError, UnknownNameError


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes and three good pairs of 6x8 pixels."""
    (tmp_path / "classes.txt").write_text("road #804080\nsky\n")
    for stem in "abc":
        save(tmp_path / f"images/train/{stem}.png", np.full((6, 8, 3), 90))
        save(tmp_path / f"labels/train/{stem}.png", np.tile([0, 1, 1, 255], (6, 2)))
    return tmp_path


def test_cityscapes_frames_load_with_the_nineteen_train_ids(shared_data):
    val = open_dataset("cityscapes", "val", root=shared_data / "cityscapes")
    assert len(val) == 10
    assert len(val.classes.names) == 19
    assert val.key(0) == "frankfurt_000000_000294"
    assert val.size(0) == (1024, 2048)
    assert val.image(0).shape == (1024, 2048, 3)
    raw = np.array(Image.open(next((shared_data / "cityscapes/gtFine/val").rglob(f"{val.key(0)}*labelIds.png"))))
    target = val.target(0)
    # Ids and trainIds as the table of cityscapesScripts pairs them.
    for label_id, train_id in {7: 0, 8: 1, 11: 2, 17: 5, 23: 10, 26: 13, 33: 18, 3: 255, 18: 255, 29: 255}.items():
        assert (target[raw == label_id] == train_id).all(), label_id
    assert set(np.unique(target)) <= {*range(19), IGNORE_INDEX}


def test_camvid_frames_load_with_void_ignored(shared_data):
    train = open_dataset("camvid", "train", root=shared_data / "camvid")
    val = open_dataset("camvid", "val", root=shared_data / "camvid")
    assert (len(train), len(val)) == (367, 101)
    assert train.size(0) == (360, 480)
    assert len(train.classes.names) == 11
    # The share of road and of void over the validation split that the data set's description states.
    counts = sum(np.bincount(val.target(index).ravel(), minlength=256) for index in range(len(val)))
    share = 100 * counts / counts.sum()
    assert share[train.classes.names.index("road")] == pytest.approx(28.953, abs=5e-4)
    assert share[IGNORE_INDEX] == pytest.approx(1.703, abs=5e-4)


def test_camvid_without_its_test_split_names_the_splits_there_are(shared_data):
    with pytest.raises(DataError, match="no split 'test', found train, val"):
        open_dataset("camvid", "test", root=shared_data / "camvid")


def test_camvid_also_loads_as_its_repository_lays_it_out(tmp_path):
    save(tmp_path / "train/x.png", np.zeros((4, 4, 3)))
    save(tmp_path / "trainannot/x.png", np.full((4, 4), 11))
    assert open_dataset("camvid", "train", root=tmp_path).target(0).tolist() == [[255] * 4] * 4


def test_every_cityscapes_label_id_becomes_its_train_id(tmp_path):
    save(tmp_path / "leftImg8bit/train/ulm/ulm_1_leftImg8bit.png", np.zeros((1, 34, 3)))
    save(tmp_path / "gtFine/train/ulm/ulm_1_gtFine_labelIds.png", [range(34)])
    # The trainId column of cityscapesScripts' table, ids 0 to 33.
    expected = [255] * 7 + [0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    expected += [255, 255, 16, 17, 18]
    assert open_dataset("cityscapes", "train", root=tmp_path).target(0).tolist() == [expected]


def test_cityscapes_reads_train_ids_where_label_ids_are_absent(tmp_path):
    save(tmp_path / "leftImg8bit/train/ulm/ulm_1_leftImg8bit.png", np.zeros((2, 2, 3)))
    save(tmp_path / "gtFine/train/ulm/ulm_1_gtFine_labelTrainIds.png", [[0, 18], [255, 7]])
    cityscapes = open_dataset("cityscapes", "train", root=tmp_path)
    assert cityscapes.key(0) == "ulm_1"
    assert cityscapes.target(0).tolist() == [[0, 18], [255, 7]]


def test_folder_gives_what_was_put_in(folder):
    save(folder / "images/train/deep/d.png", np.zeros((6, 8, 3)))
    palette = Image.fromarray(np.ones((6, 8), np.uint8))
    palette.putpalette([0, 0, 0, 255, 0, 0])
    (folder / "labels/train/deep").mkdir()
    palette.save(folder / "labels/train/deep/d.png")
    (folder / "images/train/._a.png").write_bytes(b"what some systems leave behind")
    train = open_dataset("folder", "train", root=folder)
    assert [train.key(index) for index in range(len(train))] == ["a", "b", "c", "deep_d"]
    assert train.classes.names == ("road", "sky")
    assert train.classes.colours[0] == (128, 64, 128)
    assert train.target(0)[0].tolist() == [0, 1, 1, 255, 0, 1, 1, 255]
    assert (train.target(3) == 1).all()
    assert train.image(0).dtype == np.uint8


def test_all_that_is_wrong_with_a_split_is_told_at_once(folder):
    (folder / "labels/train/a.png").unlink()
    save(folder / "labels/train/b.png", np.zeros((6, 7)))
    (folder / "images/train/c.png").write_bytes(b"GIF")
    save(folder / "images/train/d.png", np.zeros((6, 8, 3)))
    save(folder / "labels/train/d.png", np.zeros((6, 8, 3)))
    with pytest.raises(DataError) as caught:
        open_dataset("folder", "train", root=folder)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{folder}: 4 problems"
    assert lines == [
        "  images/train/a.png: has no label; add labels/train/a.png, or remove the image",
        "  labels/train/b.png: must be 6x8 like its image, found 6x7 (height x width);"
        " take the label that was drawn on this image",
        "  images/train/c.png: cannot be read as an image (no known image format); restore or remove it",
        "  labels/train/d.png: must hold one 8-bit class number a pixel (Pillow mode L or P), found mode RGB",
    ]


def test_an_error_shows_ten_problems_and_carries_all(folder):
    for number in range(12):
        save(folder / f"images/train/{number:02d}.png", np.zeros((6, 8, 3)))
    with pytest.raises(DataError) as caught:
        open_dataset("folder", "train", root=folder)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{folder}: 12 problems"
    assert len(lines) == 12
    assert lines[-1] == "  ... and 2 more"
    assert len(caught.value.problems) == 12


def test_two_images_that_would_share_a_label_are_refused(folder):
    save(folder / "images/train/a.jpg", np.zeros((6, 8, 3)))
    with pytest.raises(DataError, match=r"images/train/a.jpg and images/train/a.png share one label"):
        open_dataset("folder", "train", root=folder)


def test_a_split_without_any_label_is_told_in_one_line(folder):
    save(folder / "images/test/a.png", np.zeros((6, 8, 3)))
    save(folder / "images/test/b.png", np.zeros((6, 8, 3)))
    with pytest.raises(DataError, match=r"1 problem\n  split 'test' has 2 images and not one label"):
        open_dataset("folder", "test", root=folder)


def test_an_empty_split_and_a_wrong_root_are_told(folder):
    (folder / "images/val").mkdir()
    with pytest.raises(DataError, match="split 'val' must hold at least one image, found none"):
        open_dataset("folder", "val", root=folder)
    with pytest.raises(DataError, match="did you mean train"):
        open_dataset("folder", "trian", root=folder)
    with pytest.raises(DataError, match="must hold a folder images, found train"):
        open_dataset("folder", "train", root=folder / "labels")
    with pytest.raises(DataError, match="found no such folder"):
        open_dataset("folder", "train", root=folder / "nowhere")


@pytest.mark.parametrize("part", ["image", "target"])
def test_a_file_that_breaks_off_is_named_when_it_is_read(folder, part):
    path = folder / f"{part.replace('target', 'label')}s/train/b.png"
    save(path, np.random.default_rng(0).integers(0, 2, (6, 8, 3) if part == "image" else (6, 8)))
    path.write_bytes(path.read_bytes()[:-30])
    train = open_dataset("folder", "train", root=folder)
    with pytest.raises(DataError, match=r"b\.png: 1 problem\n  cannot be decoded \(.+\); restore it"):
        getattr(train, part)(1)


def test_a_label_value_that_is_no_class_is_told_with_its_place(folder):
    label = np.zeros((6, 8), np.uint8)
    label[2, 5], label[4, 4] = 7, 9
    save(folder / "labels/train/c.png", label)
    with pytest.raises(DataError, match=r"c\.png: 1 problem\n  label values must be 0-1, 255 .*7, 9, first at row 2"):
        open_dataset("folder", "train", root=folder).target(2)


def test_class_lists_are_read_in_every_spelling(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("\ufefftraffic light #ff8000\nlane 2\nsky 70 130 180\n\n", encoding="utf-8")
    classes = read_classes(path)
    assert classes.names == ("traffic light", "lane 2", "sky")
    assert classes.colours == ((255, 128, 0), (0, 128, 0), (70, 130, 180))


def test_all_that_is_wrong_with_a_class_list_is_told_at_once(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("road\n\nroad\nsky 1 2 300\n")
    with pytest.raises(DataError) as caught:
        read_classes(path)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["line 2", "line 3", "line 4"]
    path.write_text("\n".join(f"class{number}" for number in range(256)))
    with pytest.raises(DataError, match="2 to 255 classes, one a line, found 256"):
        read_classes(path)


def test_names_and_roots_are_checked_before_any_file(tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean cityscapes"):
        open_dataset("cityscape", "val", root=tmp_path)
    with pytest.raises(InputError, match="camvid lies on disk and needs its folder"):
        open_dataset("camvid", "val")
    with pytest.raises(InputError, match="camvid takes no options, got length"):
        open_dataset("camvid", "val", root=tmp_path, length=3)
    with pytest.raises(InputError, match="streets are drawn and take no folder"):
        open_dataset("streets", "val", root=tmp_path)
