"""Tensors as networks take them."""

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as reference

from memseg.data import pad_to, to_tensor
from memseg.errors import InputError


def test_normalisation_is_torchvisions():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    expected = reference.normalize(reference.to_tensor(image), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert torch.equal(to_tensor(image), expected)
    assert to_tensor(image).is_contiguous()


def test_pictures_that_cannot_be_written_become_tensors_too():
    image = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    mirrored = image[:, ::-1]
    image.flags.writeable = False
    assert torch.equal(to_tensor(image), to_tensor(mirrored).flip(2))


def test_padding_never_shrinks():
    with pytest.raises(InputError, match="the image is 8x8, got 8x7"):
        pad_to(torch.zeros(8, 8), (8, 7))
