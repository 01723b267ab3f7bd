"""ADE20K and folders like it."""

import numpy as np
import pytest
from PIL import Image

from memseg.data import open_dataset, open_images
from memseg.data.ade20k import read_object_info
from memseg.errors import DataError


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


@pytest.fixture
def root(tmp_path):
    """One pair to train on and one to validate, with three classes."""
    for split, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        save(tmp_path / f"images/{split}/{name}.jpg", np.full((2, 4, 3), 90))
        save(tmp_path / f"annotations/{split}/{name}.png", [[0, 1, 2, 3]] * 2)
    # Blanks behind numbers and names are there in the real file too.
    rows = ["Idx\tRatio\tTrain\tVal\tName", "1\t0.1576\t11664\t1172\twall"]
    rows += ["2\t0.1072\t6046\t612\tbuilding, edifice", "3 \t0.0878\t8265\t796\tsky "]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    return tmp_path


@pytest.mark.parametrize(("split", "key"), [("train", "ADE_train_00000001"), ("validation", "ADE_val_00000001")])
def test_values_from_one_on_are_classes_and_zero_is_unlabelled(root, split, key):
    dataset = open_dataset("ade20k", split, root=root)
    assert dataset.key(0) == key
    assert dataset.classes.names == ("wall", "building", "sky")
    assert dataset.target(0).tolist() == [[255, 0, 1, 2]] * 2


def test_a_value_above_the_number_of_classes_is_told(root):
    save(root / "annotations/training/ADE_train_00000001.png", [[0, 1, 2, 4]] * 2)
    with pytest.raises(DataError, match=r"label values must be 0-3 \(ade20k\), found 4"):
        open_dataset("ade20k", "train", root=root).target(0)


def test_a_class_list_of_any_length_will_do(root):
    (root / "classes.txt").write_text("wall #787878\nbuilding #b47878\nsky\ntree\n")
    classes = open_dataset("ade20k", "val", root=root).classes
    assert classes.names == ("wall", "building", "sky", "tree")
    assert classes.colours[0] == (120, 120, 120)
    (root / "classes.txt").unlink()
    (root / "objectInfo150.txt").unlink()
    with pytest.raises(DataError, match=r"classes.txt: 1 problem\n  must be a text file"):
        open_dataset("ade20k", "val", root=root)


def test_folders_may_have_the_short_names_and_splits_no_labels(root):
    save(root / "images/val/a/b.jpg", np.full((2, 4, 3), 90))
    assert open_images("ade20k", "val", root=root).key(0) == "a_b"
    with pytest.raises(DataError, match="split 'val' has 1 images and not one label"):
        open_dataset("ade20k", "val", root=root)
    with pytest.raises(DataError, match="there is no split 'trainin', found training, val, validation; did you mean"):
        open_dataset("ade20k", "trainin", root=root)


def test_classes_that_share_their_first_name_keep_all_names(tmp_path):
    path = tmp_path / "objectInfo150.txt"
    path.write_text("Idx\tName\n1\tscreen, monitor\n2\tdoor;gate\n3\tscreen;grid\n")
    assert read_object_info(path).names == ("screen, monitor", "door", "screen;grid")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "must be a table with tabs"),
        ("Idx Name\n1 wall\n", "must be a table with tabs and the columns Idx and Name, begins with"),
        ("Idx\tName\n1\twall\n3\tsky\n", "Idx must count from 1 .*, found 1, 3, ... in 2 rows"),
        ("Idx\tName\n1\twall\n2\n", "Idx must count from 1"),
        ("Idx\tName\n1\twall\n", "Idx must count from 1"),
        ("Idx\tName\n1\twall\n2\twall\n", "a name of its own, found twice: wall; rename one"),
    ],
)
def test_a_table_that_is_none_is_told(tmp_path, text, problem):
    path = tmp_path / "objectInfo150.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=problem):
        read_object_info(path)
