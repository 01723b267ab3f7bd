"""The generated streets: one seed is one picture, everywhere and at every size."""

import hashlib

import numpy as np
import pytest

from memseg.data import IGNORE_INDEX, open_dataset
from memseg.data.streets_canvas import Canvas, polygon, rectangle
from memseg.errors import InputError, UnknownNameError


def test_a_scene_is_the_same_on_every_machine():
    scenes = open_dataset("streets", "train", size=(64, 128))
    digest = hashlib.sha256(scenes.image(3).tobytes() + scenes.target(3).tobytes()).hexdigest()
    assert digest == "ec196561b38b62d00da5e48d372cac496609347f081fd4b8bb1a937b06203e27"


def test_a_scene_depends_on_seed_split_and_index_alone():
    def target(index, *, split="train", **options):
        return open_dataset("streets", split, size=(64, 128), **options).target(index)

    scenes = open_dataset("streets", "train", size=(64, 128), length=5)
    scenes.target(4), scenes.image(0)
    np.testing.assert_array_equal(scenes.target(2), target(2, length=50))
    assert not np.array_equal(target(2), target(3))
    assert not np.array_equal(target(2), target(2, seed=1))
    assert not np.array_equal(target(2), target(2, split="val"))


def test_changing_what_was_returned_does_not_change_the_scene():
    scenes = open_dataset("streets", "val", size=(64, 128))
    before = scenes.target(0)
    scenes.target(0)[:] = IGNORE_INDEX
    np.testing.assert_array_equal(scenes.target(0), before)


@pytest.mark.parametrize("size", [(32, 32), (97, 211), (256, 512)])
def test_every_pixel_of_any_size_has_a_class(size):
    scenes = open_dataset("streets", "val", size=size)
    assert scenes.size(0) == size
    assert scenes.image(0).shape == (*size, 3)
    assert scenes.target(0).shape == size
    assert scenes.target(0).max() < len(scenes.classes.names)


def test_the_same_street_is_drawn_at_every_size():
    small = open_dataset("streets", "val", size=(64, 128)).target(1)
    large = open_dataset("streets", "val", size=(256, 512)).target(1)
    assert (large[2::4, 2::4] == small).mean() > 0.9


def test_every_class_appears_and_no_class_fills_the_view():
    scenes = open_dataset("streets", "train", size=(128, 256))
    names = scenes.classes.names
    counts = sum(np.bincount(scenes.target(index).ravel(), minlength=len(names)) for index in range(20))
    share = dict(zip(names, counts / counts.sum(), strict=True))
    assert min(share.values()) > 0.003, share
    assert max(share.values()) < 0.5, share


def test_colour_alone_does_not_tell_the_classes():
    # Means of building and car over scenes overlap: a threshold on colour must not be enough.
    scenes = open_dataset("streets", "train", size=(128, 256))
    means = {name: [] for name in ("building", "car")}
    for index in range(20):
        image, target = scenes.image(index), scenes.target(index)
        for name, values in means.items():
            inside = target == scenes.classes.names.index(name)
            if inside.sum() > 50:
                values.append(image[inside].mean())
    assert min(means["car"]) < max(means["building"])
    assert min(means["building"]) < max(means["car"])


def test_labels_go_to_the_pixels_whose_centre_lies_inside():
    canvas = Canvas(4, 6)
    canvas.paint(rectangle(1, 3, 1.6, 4.4), (1.0, 1.0, 1.0), 7)
    assert canvas.target.tolist() == [[0] * 6, [0, 0, 7, 7, 0, 0], [0, 0, 7, 7, 0, 0], [0] * 6]
    # The second column is covered by four tenths, so it is that bright and yet not labelled.
    assert canvas.image[0, 1].tolist() == pytest.approx([0, 0.4, 1, 1, 0.4, 0], abs=1e-6)


def test_a_polygon_is_the_same_either_way_round():
    points = [(1.0, 1.0), (1.0, 7.0), (6.0, 4.0)]
    canvases = Canvas(8, 8), Canvas(8, 8)
    canvases[0].paint(polygon(*points), (1.0, 0.5, 0.0), 3)
    canvases[1].paint(polygon(*reversed(points)), (1.0, 0.5, 0.0), 3)
    np.testing.assert_array_equal(canvases[0].target, canvases[1].target)
    assert canvases[0].target[2, 4] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (16, 512)}, "each side must be at least 32 pixels, got 16x512"),
        ({"length": 0}, "length must be at least 1 scene, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        open_dataset("streets", "train", **options)


def test_unknown_split_and_option_are_refused_with_a_suggestion():
    with pytest.raises(UnknownNameError, match="did you mean train"):
        open_dataset("streets", "trian")
    with pytest.raises(UnknownNameError, match="did you mean length"):
        open_dataset("streets", "train", lenght=3)


def test_an_index_beyond_the_split_is_an_index_error():
    scenes = open_dataset("streets", "val", length=2)
    with pytest.raises(IndexError):
        scenes.target(2)
