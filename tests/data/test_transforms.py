"""The view that training reads: parts that belong together wherever and whenever they are read."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import functional as reference

from memseg.data import IGNORE_INDEX, ClassList, Fit, SegmentationDataset, TrainingView, pad_to, to_tensor
from memseg.errors import InputError


class Numbered(SegmentationDataset):
    """Images whose pixels say where they are: red is the row, green the column; the target is row + 16 x column.

    Only what is asked for may be decoded, so it counts what was.
    """

    name, split = "numbered", "train"
    classes = ClassList(("only",), ((0, 0, 0),))

    def __init__(self, *sizes):
        self.sizes, self.decoded = sizes, []

    def __len__(self):
        return len(self.sizes)

    def key(self, index):
        return str(index)

    def size(self, index):
        return self.sizes[index]

    def image(self, index):
        self.decoded.append("image")
        rows, columns = np.indices(self.sizes[index])
        return np.stack([rows, columns, 0 * rows], 2).astype(np.uint8)

    def target(self, index):
        self.decoded.append("target")
        rows, columns = np.indices(self.sizes[index])
        return (rows + 16 * columns).astype(np.uint8)


def place(sample):
    """The target that the image's own colours stand for."""
    mean = torch.tensor([0.485, 0.456]).view(2, 1, 1)
    rows, columns = (sample["image"][:2] * torch.tensor([0.229, 0.224]).view(2, 1, 1) + mean) * 255
    return (rows + 16 * columns).round().to(torch.uint8)


def test_normalisation_is_torchvisions():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    expected = reference.normalize(reference.to_tensor(image), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert torch.equal(to_tensor(image), expected)
    assert to_tensor(image).is_contiguous()


@pytest.mark.parametrize("fit", [Fit.CROP, Fit.PAD])
def test_image_and_target_stay_together_even_when_read_apart(fit):
    data = Numbered((9, 13), (9, 12), (8, 13))
    options = {"size": (6, 8) if fit is Fit.CROP else (9, 13), "fit": fit, "flip": True, "seed": 3}
    both = TrainingView(data, **options)
    image_only, target_only = (TrainingView(data, **options, parts={part}) for part in ("image", "target"))
    for epoch in range(4):
        for view in (both, image_only, target_only):
            view.set_epoch(epoch)
        for index in range(len(data)):
            sample = both[index]
            inside = sample["target"] != IGNORE_INDEX
            assert torch.equal(place(sample)[inside], sample["target"][inside])
            assert torch.equal(image_only[index]["image"], sample["image"])
            assert torch.equal(target_only[index]["target"], sample["target"])


def test_only_the_parts_asked_for_are_decoded():
    data = Numbered((4, 4))
    TrainingView(data, size=(4, 4), fit=Fit.PAD, flip=False, seed=0, parts={"target"})[0]
    assert data.decoded == ["target"]


def test_epochs_differ_and_can_be_read_again():
    view = TrainingView(Numbered((15, 16)), size=(4, 4), fit=Fit.CROP, flip=True, seed=0)
    seen = []
    for epoch in (0, 1, 2, 3, 0):
        view.set_epoch(epoch)
        seen.append(view[0]["target"])
    assert torch.equal(seen[0], seen[4])
    assert len({tuple(target.flatten().tolist()) for target in seen}) > 1


def test_the_epoch_reaches_the_workers_of_a_loader():
    view = TrainingView(Numbered(*[(15, 16)] * 4), size=(4, 4), fit=Fit.CROP, flip=True, seed=0)
    loader = DataLoader(view, batch_size=2, num_workers=1)
    for epoch in (0, 1):
        view.set_epoch(epoch)
        expected = torch.stack([view[index]["target"] for index in range(4)])
        assert torch.equal(torch.cat([batch["target"] for batch in loader]), expected)


def test_flips_are_half_of_the_samples_or_none():
    data = Numbered(*[(1, 2)] * 200)
    flipped = TrainingView(data, size=(1, 2), fit=Fit.PAD, flip=True, seed=1)
    assert 70 < sum(flipped[index]["target"][0, 0] == 16 for index in range(200)) < 130
    plain = TrainingView(data, size=(1, 2), fit=Fit.PAD, flip=False, seed=1)
    assert all(plain[index]["target"][0, 0] == 0 for index in range(200))


def test_padding_is_mean_colour_and_unlabelled_at_the_right_and_the_bottom():
    sample = TrainingView(Numbered((2, 3)), size=(4, 5), fit=Fit.PAD, flip=False, seed=0)[0]
    assert sample["target"].tolist() == [[0, 16, 32, 255, 255], [1, 17, 33, 255, 255], [255] * 5, [255] * 5]
    assert sample["image"][:, 2:].abs().max() == 0
    assert sample["image"][:, :, 3:].abs().max() == 0


def test_every_crop_position_is_reached_and_small_images_are_padded():
    view = TrainingView(Numbered((3, 15), (2, 2)), size=(2, 13), fit=Fit.CROP, flip=False, seed=0)
    corners = set()
    for epoch in range(80):
        view.set_epoch(epoch)
        corners.add(int(view[0]["target"][0, 0]))
        assert view[1]["target"][0].tolist() == [0, 16] + [255] * 11
    assert corners == {row + 16 * column for row in (0, 1) for column in (0, 1, 2)}


def test_a_region_is_cut_out_before_resizing():
    # As the paper's half-resolution runs: rows from 30 to 900, all columns, then half the size; here in small.
    view = TrainingView(Numbered((10, 12)), size=(2, 6), fit=Fit.RESIZE, flip=False, seed=0, region=(3, 7, 0, 12))
    sample = view[0]
    # Nearest takes rows 4 and 6, columns 1, 3, ...; bilinear lies half a pixel before them.
    assert sample["target"].tolist() == [[(row + 16 * column) % 256 for column in range(1, 12, 2)] for row in (4, 6)]
    rows = (sample["image"][0] * 0.229 + 0.485) * 255
    assert rows[:, 0].tolist() == pytest.approx([3.75, 5.25], abs=0.6)


def test_sizes_that_cannot_fit_are_refused_before_training():
    data = Numbered((8, 8), (9, 12))
    with pytest.raises(InputError, match=r"training size 8x8, found up to 9x12; take fit = crop or resize"):
        TrainingView(data, size=(8, 8), fit=Fit.PAD, flip=False, seed=0)
    with pytest.raises(InputError, match=r"bottom <= 8 .*\(the smallest image\), got \[0, 9, 0, 8\]"):
        TrainingView(data, size=(8, 8), fit=Fit.CROP, flip=False, seed=0, region=(0, 9, 0, 8))
    with pytest.raises(InputError, match="the image is 8x8, got 8x7"):
        pad_to(torch.zeros(8, 8), (8, 7))
    with pytest.raises(ValueError, match="parts must be"):
        TrainingView(data, size=(9, 12), fit=Fit.PAD, flip=False, seed=0, parts=())
