"""What comes before anything random: regions and sizes, right to the pixel."""

import numpy as np
import pytest
import torch
from numbered import Numbered
from PIL import Image
from torchvision.transforms.v2 import functional as reference

from memseg.data import open_dataset, resize_image
from memseg.data.prepare import PreparedSamples, resize_labels
from memseg.errors import InputError

PAPER = {"region": (30, 900, 0, 2048), "size": (448, 1024)}
"""The half-resolution runs: no bonnet, then half the columns."""


def test_resizing_is_torchvisions_and_within_one_of_pillows():
    image = np.random.default_rng(0).integers(0, 256, (87, 205, 3), dtype=np.uint8)
    for size in ((45, 102), (100, 300)):
        resized = resize_image(image, size)
        expected = reference.resize(torch.from_numpy(image).permute(2, 0, 1), list(size), antialias=True)
        assert np.array_equal(resized, expected.permute(1, 2, 0).numpy())
        pillows = np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
        assert np.abs(resized.astype(int) - pillows).max() <= 1


def test_labels_are_those_at_the_centres_of_the_new_pixels():
    labels = np.random.default_rng(0).integers(0, 256, (87, 205), dtype=np.uint8)
    for height, width in ((45, 102), (100, 300)):
        rows = ((np.arange(height) + 0.5) * 87 / height).astype(int)
        columns = ((np.arange(width) + 0.5) * 205 / width).astype(int)
        assert np.array_equal(resize_labels(labels, (height, width)), labels[np.ix_(rows, columns)])


def test_a_region_is_cut_out_before_resizing():
    samples = PreparedSamples(Numbered((10, 12)), region=(3, 7, 0, 12), size=(2, 6))
    assert samples.size(0) == (2, 6)
    # Nearest takes rows 4 and 6, columns 1, 3, ...; bilinear lies half a pixel before them.
    assert samples.target(0).tolist() == [[(row + 16 * column) % 256 for column in range(1, 12, 2)] for row in (4, 6)]
    # Row 3.5 as far as the filter reaches: rows 3 to 5 and 4 to 6, with weights 3, 3, 1 and 1, 3, 3 over 7.
    assert samples.image(0)[:, 0, 0].tolist() == [4, 5]


def test_the_papers_preparation_of_a_real_frame_is_right_to_the_pixel(shared_data):
    val = open_dataset("cityscapes", "val", root=shared_data / "cityscapes")
    samples = PreparedSamples(val, **PAPER)
    seen = val.image(0)[30:900]
    assert samples.size(0) == (448, 1024)
    half = Image.fromarray(seen).resize((1024, 448), Image.Resampling.BILINEAR)
    difference = np.abs(samples.image(0).astype(int) - np.array(half))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01
    rows = 30 + ((np.arange(448) + 0.5) * 870 / 448).astype(int)
    assert np.array_equal(samples.target(0), val.target(0)[np.ix_(rows, np.arange(1, 2048, 2))])


def test_a_region_beyond_the_smallest_image_is_refused():
    with pytest.raises(InputError, match=r"bottom <= 8 .*\(the smallest image\), got \[0, 9, 0, 8\]"):
        PreparedSamples(Numbered((8, 8), (9, 12)), region=(0, 9, 0, 8))
