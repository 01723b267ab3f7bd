"""The class of every pixel: at the picture's own size, whatever the network saw of it."""

import numpy as np
import pytest
import torch

from memseg.data import pad_to_multiple, to_tensor
from memseg.errors import InputError
from memseg.inference.labelling import Framing, label_image
from memseg.models import build_model
from memseg.training.recipe import load_recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model("ladder-densenet-mini", num_classes=5).eval()


def picture(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_labels_are_the_argmax_of_the_padded_pictures_full_size_logits(model):
    image = picture(100, 150)
    labels = label_image(model, image, framing=Framing(), device=CPU)
    with torch.inference_mode():
        logits = model(pad_to_multiple(to_tensor(image), model.output_stride)[None])[0, :, :100, :150]
    assert labels.shape == (100, 150)
    agree = torch.from_numpy(labels) == logits.argmax(0)
    # Where two classes are equally strong but for rounding, either may win.
    margin = logits.topk(2, dim=0).values
    assert agree[margin[0] - margin[1] > 1e-5].all()
    assert agree.float().mean() > 0.999


def test_a_resized_region_comes_back_at_its_own_size(model):
    image = picture(100, 150)
    framing = Framing(region=(10, 90, 20, 140), size=(64, 128))
    labels = label_image(model, image, framing=framing, device=CPU)
    outside = np.ones((100, 150), dtype=bool)
    outside[10:90, 20:140] = False
    assert ((labels == 255) == outside).all()


def test_a_picture_smaller_than_the_region_is_refused(model):
    with pytest.raises(InputError, match=r"must reach row 900 and column 2048.*got 448x1024"):
        label_image(model, picture(448, 1024), framing=Framing(region=(30, 900, 0, 2048)), device=CPU)


def test_framing_follows_the_recipe():
    assert Framing.of(load_recipe("ldn121_cityscapes").data) == Framing()
    assert Framing.of(load_recipe("ldn121_cityscapes_half").data) == Framing((30, 900, 0, 2048), (448, 1024))
