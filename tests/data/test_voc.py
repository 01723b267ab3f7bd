"""PASCAL VOC 2012, and its training split with the labels of SBD."""

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import SBDataset, VOCSegmentation

from memseg.data import open_dataset, open_images
from memseg.errors import DataError

VOC = "VOCdevkit/VOC2012"


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def save_mat(path, segmentation):
    """As SBD's files are: a struct with the label map, and with boundaries that nobody here reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"GTcls": {"Boundaries": np.zeros((2, 1)), "Segmentation": segmentation}}, do_compression=True)


@pytest.fixture
def root(tmp_path):
    """Two images to train on, one to validate, one to test, and two more that SBD has labels of; each 4x6."""
    for name in ("train_b", "train_a", "val_a", "test_a", "more_a", "more_b"):
        save(tmp_path / VOC / f"JPEGImages/{name}.jpg", np.full((4, 6, 3), 90))
    for name in ("train_b", "train_a", "val_a"):
        save(tmp_path / VOC / f"SegmentationClass/{name}.png", np.tile([0, 20, 255], (4, 2)))
    lists = tmp_path / VOC / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for split, names in (("train", "train_b\ntrain_a\n"), ("val", "val_a\n"), ("test", "test_a\n")):
        (lists / f"{split}.txt").write_text(names)
    return tmp_path


@pytest.fixture
def release(root):
    """SBD's release: it has labels of VOC's own images too, and of those of val."""
    folder = root / "benchmark_RELEASE/dataset"
    for number, name in enumerate(("train_a", "val_a", "more_b", "more_a")):
        save_mat(folder / f"cls/{name}.mat", np.full((4, 6), number, np.uint8))
        save(folder / f"img/{name}.jpg", np.full((4, 6, 3), 90))
    (folder / "train.txt").write_text("train_a\nmore_b\n")
    (folder / "val.txt").write_text("val_a\nmore_a\n")
    return folder


def keys(dataset):
    return [dataset.key(index) for index in range(len(dataset))]


@pytest.mark.parametrize("split", ["train", "val", "trainval"])
def test_real_pairs_load_as_torchvision_loads_them(shared_data, split):
    ours = open_dataset("voc", split, root=shared_data / "voc2012")
    theirs = VOCSegmentation(str(shared_data / "voc2012"), year="2012", image_set=split)
    assert len(ours) == len(theirs) == {"train": 2, "val": 3, "trainval": 5}[split]
    for index, (image, target) in enumerate(theirs):
        assert np.array_equal(ours.image(index), np.array(image))
        assert np.array_equal(ours.target(index), np.array(target))
        assert ours.size(index) == ours.target(index).shape


def test_colours_are_those_of_vocs_own_palette(shared_data):
    val = open_dataset("voc", "val", root=shared_data / "voc2012")
    path = shared_data / "voc2012" / VOC / f"SegmentationClass/{val.key(0)}.png"
    palette = np.array(Image.open(path).getpalette()).reshape(-1, 3)
    assert len(val.classes.names) == 21
    assert palette[:21].tolist() == [list(colour) for colour in val.classes.colours]


@pytest.mark.parametrize("place", [".", "VOCdevkit", VOC])
def test_the_root_may_be_the_folder_itself_or_above_it(root, place):
    train = open_dataset("voc", "train", root=root / place)
    assert keys(train) == ["train_b", "train_a"]
    assert train.target(0)[0].tolist() == [0, 20, 255, 0, 20, 255]


def test_the_augmented_split_is_train_and_what_sbd_adds_without_val(root, release):
    train = open_dataset("voc", "train_aug", root=root)
    assert keys(train) == ["train_b", "train_a", "more_a", "more_b"]
    # Where both have labels VOC's own are taken, which mark the borders.
    assert train.target(1)[0].tolist() == [0, 20, 255, 0, 20, 255]
    assert (train.target(2) == 3).all()
    assert (train.target(3) == 2).all()


def test_label_maps_of_sbd_are_those_that_torchvision_reads(root, release):
    theirs = SBDataset(str(release), image_set="train", mode="segmentation")
    ours = open_dataset("voc", "train_aug", root=root)
    assert np.array_equal(ours.target(3), np.array(theirs[1][1]))


def test_the_augmented_split_also_reads_label_maps_as_pictures(root, release):
    for number, name in enumerate(("train_a", "val_a", "more_b")):
        save(root / VOC / f"SegmentationClassAug/{name}.png", np.full((4, 6), number))
    train = open_dataset("voc", "train_aug", root=root)
    assert keys(train) == ["train_b", "train_a", "more_b"]
    assert (train.target(2) == 2).all()


def test_images_that_voc_has_not_are_taken_from_sbd(root, release):
    (root / VOC / "JPEGImages/more_b.jpg").unlink()
    train = open_dataset("voc", "train_aug", root=root)
    assert train.path(3) == release / "img/more_b.jpg"


def test_without_sbd_one_line_says_where_it_goes(root):
    with pytest.raises(DataError) as caught:
        open_dataset("voc", "train_aug", root=root)
    (problem,) = caught.value.problems
    assert "split 'train_aug' needs the labels of SBD; unpack its benchmark.tgz" in problem
    assert f"so that {root}/benchmark_RELEASE/dataset is there" in problem


def test_what_is_wrong_with_sbds_files_is_told(root, release):
    (release / "cls/more_a.mat").unlink()
    (release / "cls/more_b.mat").write_bytes(b"<html>not found")
    with pytest.raises(DataError) as caught:
        open_dataset("voc", "train_aug", root=root)
    assert caught.value.problems == [
        f"{VOC}/JPEGImages/more_a.jpg: has no label; add benchmark_RELEASE/dataset/cls/more_a.mat, or remove the image",
        "benchmark_RELEASE/dataset/cls/more_b.mat: must be a MATLAB 5.0 file, begins with b'<html>not found';"
        " restore it",
    ]


@pytest.mark.parametrize(
    ("segmentation", "problem"),
    [
        (np.zeros((4, 7), np.uint8), "must be 4x6 like its image, found 4x7"),
        (np.zeros((4, 6), np.int16), r"GTcls.Segmentation must be uint8 \(H, W\), found int16 \(4, 6\)"),
        (np.full((4, 6), 21, np.uint8), "label values must be 0-20, 255 .*, found 21"),
    ],
)
def test_label_maps_of_sbd_that_do_not_fit_are_told_when_read(root, release, segmentation, problem):
    save_mat(release / "cls/more_b.mat", segmentation)
    with pytest.raises(DataError, match=rf"more_b\.mat: 1 problem\n  {problem}"):
        open_dataset("voc", "train_aug", root=root).target(3)


def test_a_file_of_sbd_that_breaks_off_or_holds_something_else_is_told(root, release):
    train = open_dataset("voc", "train_aug", root=root)
    path = release / "cls/more_b.mat"
    whole = path.read_bytes()
    for length in range(130, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"more_b\.mat: 1 problem\n  cannot be decoded"):
            train.target(3)
    savemat(path, {"GTinst": np.zeros(3)})
    with pytest.raises(DataError, match=r"more_b\.mat: 1 problem\n  cannot be decoded"):
        train.target(3)


def test_the_test_split_has_pictures_only(root):
    test = open_images("voc", "test", root=root)
    assert keys(test) == ["test_a"]
    assert test.image(0).shape == (4, 6, 3)
    with pytest.raises(DataError, match=r"split 'test' has 1 images and not one label, .*; take train, val, trainval"):
        open_dataset("voc", "test", root=root)


def test_splits_and_folders_that_are_not_there_are_told(root):
    with pytest.raises(DataError, match=r"there is no split 'tain' .*found test, train, train_aug, val; did you mean"):
        open_dataset("voc", "tain", root=root)
    with pytest.raises(DataError, match="must hold VOCdevkit/VOC2012 with JPEGImages"):
        open_dataset("voc", "train", root=root / VOC / "ImageSets")
    with pytest.raises(DataError, match=r"found no such folder; correct data\.root"):
        open_dataset("voc", "train", root=root / "nowhere")
    (root / VOC / "JPEGImages/train_a.jpg").unlink()
    with pytest.raises(DataError, match=r"JPEGImages/train_a.jpg: cannot be read as an image .*No such file"):
        open_images("voc", "train", root=root)
