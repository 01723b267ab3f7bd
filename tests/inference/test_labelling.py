"""The class of every pixel: at the picture's own size, whatever the network saw of it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from memseg.data import Fit, pad_to_multiple, resize_image, to_tensor
from memseg.errors import InputError
from memseg.inference.labelling import Framing, label_image
from memseg.levels import Precision
from memseg.models import build_model
from memseg.training.tables import DataConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model("ladder-densenet-mini", num_classes=5).eval()


def picture(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def agrees(labels, strength):
    """Where two classes are equally strong but for rounding, either may win."""
    agree = torch.from_numpy(labels) == strength.argmax(0)
    margin = strength.topk(2, dim=0).values
    return bool(agree[margin[0] - margin[1] > 1e-5].all()) and float(agree.float().mean()) > 0.999


def test_labels_are_the_argmax_of_the_padded_pictures_full_size_logits(model):
    image = picture(100, 150)
    labels = label_image(model, image, framing=Framing(), device=CPU)
    with torch.inference_mode():
        logits = model(pad_to_multiple(to_tensor(image), model.output_stride)[None])[0, :, :100, :150]
    assert labels.shape == (100, 150)
    assert agrees(labels, logits)


def test_a_resized_region_comes_back_at_its_own_size(model):
    image = picture(100, 150)
    framing = Framing(region=(10, 90, 20, 140), size=(64, 128))
    labels = label_image(model, image, framing=framing, device=CPU)
    outside = np.ones((100, 150), dtype=bool)
    outside[10:90, 20:140] = False
    assert ((labels == 255) == outside).all()


@pytest.mark.parametrize("region", [None, (10, 90, 20, 140)])
def test_views_are_averaged_as_full_size_softmaxes_would_be(model, region):
    image = picture(100, 150)
    top, bottom, left, right = region or (0, 100, 0, 150)
    seen = image[top:bottom, left:right]
    total = 0.0
    for scale in (0.75, 1.0, 1.3):
        height, width = round(seen.shape[0] * scale), round(seen.shape[1] * scale)
        scaled = resize_image(seen, (height, width))
        for mirrored in (False, True):
            given = pad_to_multiple(to_tensor(scaled[:, ::-1] if mirrored else scaled), model.output_stride)
            with torch.inference_mode():
                coarse = model.coarse_outputs(given[None])[0]
            factors = tuple(
                given.shape[1 + axis] / coarse.shape[2 + axis] * whole / part
                for axis, (whole, part) in enumerate(zip(seen.shape[:2], (height, width), strict=True))
            )
            # Room at the end, for sizes are rounded down.
            roomy = F.pad(coarse, (0, 1, 0, 1), mode="replicate")
            logits = F.interpolate(roomy, scale_factor=factors, mode="bilinear", recompute_scale_factor=False)
            probabilities = logits[0, :, : seen.shape[0], : seen.shape[1]].softmax(0)
            total = total + (probabilities.flip(2) if mirrored else probabilities)
    labels = label_image(model, image, framing=Framing(region, scales=(0.75, 1.0, 1.3), flip=True), device=CPU)
    assert agrees(labels[top:bottom, left:right], total / 6)


def test_one_view_at_another_scale_is_that_view_alone(model):
    image = picture(64, 128)
    small = resize_image(image, (32, 64))
    with torch.inference_mode():
        coarse = model.coarse_outputs(pad_to_multiple(to_tensor(small), model.output_stride)[None])[0]
    logits = F.interpolate(coarse, (128, 128), mode="bilinear")[0, :, :64]
    assert agrees(label_image(model, image, framing=Framing(scales=(0.5,)), device=CPU), logits)


@pytest.mark.parametrize("scales", [(1.0,), (0.7, 1.0, 1.5)])
def test_with_flip_a_mirrored_picture_has_mirrored_labels(model, scales):
    image, framing = picture(70, 101), Framing(scales=scales, flip=True)
    labels = label_image(model, image, framing=framing, device=CPU)
    mirrored = label_image(model, np.ascontiguousarray(image[:, ::-1]), framing=framing, device=CPU)
    assert np.array_equal(mirrored, labels[:, ::-1])
    plain = label_image(model, image, framing=Framing(scales=scales), device=CPU)
    assert not np.array_equal(labels, plain)


def test_half_precision_agrees_but_for_near_ties(model):
    image = picture(64, 64)
    whole = label_image(model, image, framing=Framing(), device=CPU)
    half = label_image(model, image, framing=Framing(), device=CPU, precision=Precision.BFLOAT16)
    assert (whole == half).mean() > 0.7


def test_a_picture_smaller_than_the_region_is_refused(model):
    with pytest.raises(InputError, match=r"must reach row 900 and column 2048.*got 448x1024"):
        label_image(model, picture(448, 1024), framing=Framing(region=(30, 900, 0, 2048)), device=CPU)


@pytest.mark.parametrize("scales", [(), (1.0, 0.0), (float("nan"),), (float("inf"),)])
def test_scales_that_are_none_are_refused(scales):
    with pytest.raises(InputError, match="scales must be one or more numbers above 0"):
        Framing(scales=scales)


def test_framing_follows_the_recipe():
    region = (30, 900, 0, 2048)
    padded = DataConfig(dataset="streets", image="448x1024")
    resized = DataConfig(dataset="streets", image="448x1024", fit=Fit.RESIZE, region=region)
    assert Framing.of(padded) == Framing()
    assert Framing.of(resized) == Framing(region, (448, 1024))
    assert Framing.of(resized, scales=[0.5, 1], flip=True) == Framing(region, (448, 1024), (0.5, 1), True)
