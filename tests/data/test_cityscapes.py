"""Cityscapes: what scores and submissions need beside the classes of pixels."""

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import Cityscapes

from memseg.data import open_dataset, open_images
from memseg.data.cityscapes import CITYSCAPES_CLASSES, INSTANCE_CATEGORIES, INSTANCE_FACTOR, LABEL_IDS
from memseg.errors import DataError, InputError


def save(path, array, kind=np.uint8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, kind)).save(path)


@pytest.fixture
def root(tmp_path):
    """One frame of 2x3 pixels to train on, with instances; one to test."""
    save(tmp_path / "leftImg8bit/train/ulm/ulm_1_leftImg8bit.png", np.zeros((2, 3, 3)))
    save(tmp_path / "leftImg8bit/test/bonn/bonn_1_leftImg8bit.png", np.zeros((2, 3, 3)))
    save(tmp_path / "gtFine/train/ulm/ulm_1_gtFine_labelIds.png", [[7, 26, 26], [7, 26, 26]])
    ids = [[7, 26000, 26001], [7, 26, 26001]]
    save(tmp_path / "gtFine/train/ulm/ulm_1_gtFine_instanceIds.png", ids, np.uint16)
    return tmp_path


def test_classes_are_those_of_torchvisions_table():
    learnt = sorted((one for one in Cityscapes.classes if 0 <= one.train_id < 255), key=lambda one: one.train_id)
    assert tuple(one.name for one in learnt) == CITYSCAPES_CLASSES.names
    assert tuple(one.color for one in learnt) == CITYSCAPES_CLASSES.colours
    assert tuple(one.category for one in learnt) == CITYSCAPES_CLASSES.categories
    assert tuple(one.id for one in learnt) == LABEL_IDS
    told_apart = {one.name for one in learnt if one.has_instances}
    pairs = zip(CITYSCAPES_CLASSES.names, CITYSCAPES_CLASSES.categories, strict=True)
    assert told_apart == {name for name, category in pairs if category in INSTANCE_CATEGORIES}


def test_instances_keep_their_sixteen_bits(root):
    train = open_dataset("cityscapes", "train", root=root)
    assert train.has_instances
    ids = train.instances(0)
    assert ids.dtype == np.uint16
    assert ids.tolist() == [[7, 26000, 26001], [7, 26, 26001]]


def test_frames_without_instances_say_so(root):
    save(root / "leftImg8bit/train/ulm/ulm_2_leftImg8bit.png", np.zeros((2, 3, 3)))
    save(root / "gtFine/train/ulm/ulm_2_gtFine_labelIds.png", np.full((2, 3), 7))
    train = open_dataset("cityscapes", "train", root=root)
    assert not train.has_instances
    assert train.instances(0) is not None
    assert train.instances(1) is None
    assert not open_dataset("streets", "train").has_instances


def test_instances_of_another_size_or_kind_are_told(root):
    path = root / "gtFine/train/ulm/ulm_1_gtFine_instanceIds.png"
    save(path, np.zeros((2, 4)), np.uint16)
    with pytest.raises(DataError, match=r"ulm_1_gtFine_instanceIds.png: must be 2x3 like its image, found 2x4"):
        open_dataset("cityscapes", "train", root=root)
    save(path, np.zeros((2, 3, 3)))
    with pytest.raises(
        DataError, match=r"must hold one 16-bit number a pixel \(Pillow mode I;16 or L\), found mode RGB"
    ):
        open_dataset("cityscapes", "train", root=root)
    path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"ulm_1_gtFine_instanceIds.png: cannot be read as an image"):
        open_dataset("cityscapes", "train", root=root)


def test_the_test_split_has_pictures_only(root):
    test = open_images("cityscapes", "test", root=root)
    assert (len(test), test.key(0), test.size(0)) == (1, "bonn_1", (2, 3))
    assert test.path(0) == root / "leftImg8bit/test/bonn/bonn_1_leftImg8bit.png"
    assert test.classes == CITYSCAPES_CLASSES
    assert test.image(0).shape == (2, 3, 3)
    with pytest.raises(DataError, match="split 'test' has 1 images and not one label"):
        open_dataset("cityscapes", "test", root=root)


def test_pictures_without_labels_are_those_of_a_data_set_on_disk(root):
    with pytest.raises(InputError, match="streets are drawn and have no files of pictures"):
        open_images("streets", "val")
    with pytest.raises(InputError, match="cityscapes lies on disk and needs its folder"):
        open_images("cityscapes", "test")


def test_instances_of_real_frames_agree_with_their_labels(shared_data):
    train = open_dataset("cityscapes", "train", root=shared_data / "cityscapes")
    assert train.has_instances
    ids = train.instances(0)
    labels = np.where(ids < INSTANCE_FACTOR, ids, ids // INSTANCE_FACTOR)
    target = train.target(0)
    for number, label_id in enumerate(LABEL_IDS):
        assert np.array_equal(labels == label_id, target == number), label_id
