"""The view that training reads: parts that belong together wherever and whenever they are read."""

import numpy as np
import pytest
import torch
from numbered import Numbered

from memseg.data import IGNORE_INDEX, Fit
from memseg.data.training_view import TrainingView
from memseg.errors import InputError


def pixels(sample):
    """The image as it was before normalisation, float (3, H, W)."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    return (sample["image"] * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) + mean) * 255


def place(sample):
    """The target that the image's own colours stand for."""
    rows, columns = pixels(sample)[:2]
    return (rows + 16 * columns).round().to(torch.uint8)


@pytest.mark.parametrize("fit", [Fit.CROP, Fit.PAD])
def test_image_and_target_stay_together_even_when_read_apart(fit):
    data = Numbered((9, 13), (9, 12), (8, 13))
    options = {"size": (6, 8) if fit is Fit.CROP else (9, 13), "fit": fit, "flip": True, "seed": 3}
    both = TrainingView(data, **options)
    image_only, target_only = (TrainingView(data, **options, parts={part}) for part in ("image", "target"))
    for epoch in range(4):
        for index in range(len(data)):
            sample = both[epoch, index]
            inside = sample["target"] != IGNORE_INDEX
            assert torch.equal(place(sample)[inside], sample["target"][inside])
            assert torch.equal(image_only[epoch, index]["image"], sample["image"])
            assert torch.equal(target_only[epoch, index]["target"], sample["target"])


@pytest.mark.parametrize("fit", list(Fit))
def test_scaled_images_and_targets_stay_together_even_when_read_apart(fit):
    data = Numbered((15, 14), (8, 14), (12, 10))
    options = {"size": (10, 10), "fit": fit, "flip": True, "seed": 3, "scale": (0.5, 2.0), "color_jitter": 0.3}
    plain = TrainingView(data, **options | {"color_jitter": 0.0})
    both = TrainingView(data, **options)
    image_only, target_only = (TrainingView(data, **options, parts={part}) for part in ("image", "target"))
    padded = 0
    for epoch in range(6):
        for index in range(len(data)):
            sample = plain[epoch, index]
            inside = sample["target"] != IGNORE_INDEX
            padded += int((~inside).any())
            row, column = sample["target"] % 16, sample["target"] // 16
            seen = pixels(sample)
            # Red and green, interpolated, lie within a pixel of the row and the column that the label was taken from.
            assert (seen[0] - row)[inside].abs().max() < 1.6
            assert (seen[1] - column)[inside].abs().max() < 1.6
            jittered = both[epoch, index]
            assert torch.equal(jittered["target"], sample["target"])
            assert torch.equal(image_only[epoch, index]["image"], jittered["image"])
            assert torch.equal(target_only[epoch, index]["target"], jittered["target"])
    assert padded


def test_a_factor_of_one_changes_nothing_and_two_doubles():
    data = Numbered((6, 7))
    plain = TrainingView(data, size=(6, 7), fit=Fit.PAD, flip=False, seed=0)[0, 0]
    same = TrainingView(data, size=(6, 7), fit=Fit.PAD, flip=False, seed=0, scale=(1.0, 1.0))[0, 0]
    assert torch.equal(same["image"], plain["image"])
    assert torch.equal(same["target"], plain["target"])
    double = TrainingView(data, size=(12, 14), fit=Fit.CROP, flip=False, seed=0, scale=(2.0, 2.0))[0, 0]
    assert torch.equal(double["target"], plain["target"].repeat_interleave(2, 0).repeat_interleave(2, 1))
    half = TrainingView(data, size=(6, 7), fit=Fit.CROP, flip=False, seed=0, scale=(0.5, 0.5))[0, 0]
    assert half["target"].tolist()[0] == [1, 33, 65, 97, 255, 255, 255]


def test_factors_cover_their_range():
    view = TrainingView(Numbered((100, 4)), size=(200, 8), fit=Fit.CROP, flip=False, seed=0, scale=(0.5, 2.0))
    heights = [int((view[epoch, 0]["target"][:, 0] != IGNORE_INDEX).sum()) for epoch in range(60)]
    assert min(heights) < 70
    assert max(heights) > 180
    assert 50 <= min(heights) <= max(heights) <= 200


def test_colours_change_only_when_asked_and_can_be_read_again():
    data = Numbered((40, 40))
    options = {"size": (40, 40), "fit": Fit.PAD, "flip": False, "seed": 0, "parts": {"image"}}
    plain = TrainingView(data, **options)[0, 0]["image"]
    seen = [TrainingView(data, **options, color_jitter=0.5)[epoch, 0]["image"] for epoch in range(3)]
    assert all(not torch.equal(image, plain) for image in seen)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(TrainingView(data, **options, color_jitter=0.5)[1, 0]["image"], seen[1])


def test_only_the_parts_asked_for_are_decoded():
    data = Numbered((4, 4))
    TrainingView(data, size=(4, 4), fit=Fit.PAD, flip=False, seed=0, parts={"target"})[0, 0]
    assert data.decoded == ["target"]


def test_targets_stay_bytes():
    for fit in Fit:
        view = TrainingView(Numbered((9, 13)), size=(9, 13), fit=fit, flip=True, seed=0, scale=(0.5, 2.0))
        assert view[0, 0]["target"].dtype == torch.uint8
        assert type(view[0, 0]["target"]) is type(view[0, 0]["image"]) is torch.Tensor


def test_epochs_differ_and_can_be_read_again():
    view = TrainingView(Numbered((15, 16)), size=(4, 4), fit=Fit.CROP, flip=True, seed=0)
    seen = [view[epoch, 0]["target"] for epoch in (0, 1, 2, 3, 0)]
    assert torch.equal(seen[0], seen[4])
    assert len({tuple(target.flatten().tolist()) for target in seen}) > 1


def test_flips_are_half_of_the_samples_or_none():
    data = Numbered(*[(1, 2)] * 200)
    flipped = TrainingView(data, size=(1, 2), fit=Fit.PAD, flip=True, seed=1)
    assert 70 < sum(flipped[0, index]["target"][0, 0] == 16 for index in range(200)) < 130
    plain = TrainingView(data, size=(1, 2), fit=Fit.PAD, flip=False, seed=1)
    assert all(plain[0, index]["target"][0, 0] == 0 for index in range(200))


def test_padding_is_mean_colour_and_unlabelled_at_the_right_and_the_bottom():
    sample = TrainingView(Numbered((2, 3)), size=(4, 5), fit=Fit.PAD, flip=False, seed=0)[0, 0]
    assert sample["target"].tolist() == [[0, 16, 32, 255, 255], [1, 17, 33, 255, 255], [255] * 5, [255] * 5]
    assert sample["image"][:, 2:].abs().max() == 0
    assert sample["image"][:, :, 3:].abs().max() == 0


def test_every_crop_position_is_reached_and_small_images_are_padded():
    view = TrainingView(Numbered((3, 15), (2, 2)), size=(2, 13), fit=Fit.CROP, flip=False, seed=0)
    corners = set()
    for epoch in range(80):
        corners.add(int(view[epoch, 0]["target"][0, 0]))
        assert view[epoch, 1]["target"][0].tolist() == [0, 16] + [255] * 11
    assert corners == {row + 16 * column for row in (0, 1) for column in (0, 1, 2)}


def test_what_is_drawn_without_scales_is_what_earlier_versions_drew():
    # A run that was begun before there were scales goes on with the crops that it would have seen.
    view = TrainingView(Numbered((15, 16)), size=(4, 4), fit=Fit.CROP, flip=True, seed=5)
    for epoch in range(3):
        random = np.random.default_rng([5, epoch, 0])
        flipped = random.random() < 0.5
        top, left = (int(random.integers(0, room, endpoint=True)) for room in (11, 12))
        corner = view[epoch, 0]["target"][0, 3 if flipped else 0]
        assert corner == top + 16 * left - 256 * (top + 16 * left > 255)


def test_sizes_that_cannot_fit_are_refused_before_training():
    data = Numbered((8, 8), (9, 12))
    with pytest.raises(InputError, match=r"training size 8x8, found up to 9x12; take fit = crop or resize"):
        TrainingView(data, size=(8, 8), fit=Fit.PAD, flip=False, seed=0)
    with pytest.raises(ValueError, match="parts must be"):
        TrainingView(data, size=(9, 12), fit=Fit.PAD, flip=False, seed=0, parts=())
