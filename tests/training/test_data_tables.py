"""The table [data] of a recipe: which splits are opened, and what training reads of them."""

import numpy as np
import pytest
import torch
from PIL import Image

from memseg.data import Fit
from memseg.errors import RecipeError
from memseg.training.recipe import parse_recipe
from memseg.training.tables import DataConfig


def recipe(**data):
    values = {"name": "mine", "model": {"name": "ladder-densenet-mini"}, "schedule": {"steps": 1}}
    return parse_recipe(values | {"data": {"image": "64x64"} | data}, "mine.toml")


@pytest.fixture
def root(tmp_path):
    """Splits a (2 pairs) and b (1 pair) of 96x80 pixels."""
    (tmp_path / "classes.txt").write_text("road\nsky\n")
    draws = np.random.default_rng(0)
    for split, names in (("a", "xy"), ("b", "z")):
        for kind, high, shape in (("images", 256, (96, 80, 3)), ("labels", 2, (96, 80))):
            (tmp_path / kind / split).mkdir(parents=True)
            for name in names:
                pixels = draws.integers(0, high, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / kind / split / f"{name}.png")
    return tmp_path


def test_the_splits_to_train_on_and_to_score_have_names(root):
    data = recipe(dataset="folder", root=str(root), train_split="a", val_split="b").data
    assert (data.open_train().split, len(data.open_train())) == ("a", 2)
    assert (data.open_val().split, len(data.open_val())) == ("b", 1)


def test_streets_have_their_own_length_for_whichever_split_is_trained_on():
    streets = {"length": 5, "val_length": 3}
    data = recipe(dataset="streets", streets=streets, train_split="val", val_split="train").data
    assert (len(data.open_train()), len(data.open_val())) == (5, 3)


def test_what_training_reads_is_what_the_recipe_says(root, tmp_path):
    cache = tmp_path / "cache"
    options = {"dataset": "folder", "root": str(root), "train_split": "a", "fit": "crop", "scale": [0.5, 2]}
    data = recipe(**options, color_jitter=0.4, cache=str(cache)).data
    assert data.scale == (0.5, 2.0)
    sample = data.training_view(data.open_train(), seed=3)[0, 1]
    assert sample["image"].shape == (3, 64, 64)
    assert len(list(cache.iterdir())) == 2
    plain = recipe(**options).data
    same = plain.training_view(plain.open_train(), seed=3)[0, 1]
    assert torch.equal(sample["target"], same["target"])
    assert not torch.equal(sample["image"], same["image"])
    assert not torch.equal(plain.training_view(plain.open_train(), seed=4)[0, 1]["target"], same["target"])
    target = plain.training_view(plain.open_train(), seed=3, parts={"target"})[0, 1]
    assert list(target) == ["target"]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"scale": [2.0, 0.5]}, r"data.scale: must be \[smallest, largest\], got \[2.0, 0.5\]; try \[0.5, 2.0\]"),
        ({"scale": [0, 1]}, r"data.scale\[0\]: must be greater than 0, got 0"),
        ({"color_jitter": 1}, "data.color_jitter: must be less than 1, got 1"),
        ({"cache": "x", "dataset": "streets"}, "data.cache: the data set streets is generated and has no files"),
        ({"train_split": ""}, "data.train_split: must not be empty"),
        ({"dataset": "pascal"}, "data.dataset: unknown data set 'pascal'"),
    ],
)
def test_values_that_cannot_be_are_told(data, problem):
    with pytest.raises(RecipeError, match=problem):
        recipe(**({"dataset": "voc", "root": "voc"} | data if data.get("dataset") != "streets" else data))


def test_the_data_tables_defaults_change_no_picture(root):
    data = DataConfig(dataset="folder", root=root, image="96x80", train_split="a", flip=False)
    assert (data.fit, data.scale, data.color_jitter, data.cache) == (Fit.PAD, None, 0.0, None)
    sample = data.training_view(data.open_train(), seed=0)[0, 0]
    assert np.array_equal(sample["target"].numpy(), data.open_train().target(0))
