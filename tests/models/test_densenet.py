"""torchvision's DenseNet weights fill the encoder, and it then computes what torchvision computes."""

import re

import pytest
import torch
import torch.nn.functional as F
import torchvision

from memseg.errors import ProblemsError
from memseg.models import build_model, load_encoder


def torchvision_densenet(depth):
    """With random numbers in every tensor: no pretrained file is needed for what is tested here."""
    model = getattr(torchvision.models, f"densenet{depth}")(weights=None)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif "norm" in name and value.dtype == torch.float32:
            value.normal_()
    return model


def old_spelling(key):
    """As the files of torchvision's model zoo name the members of dense layers: norm.1 for norm1."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key)


@pytest.fixture(scope="module")
def densenet121():
    return torchvision_densenet(121)


@pytest.mark.parametrize("spelling", [str, old_spelling], ids=["new spelling", "old spelling"])
@pytest.mark.parametrize("depth", [121, 169])
def test_every_key_is_loaded_or_named_as_unused(depth, spelling):
    theirs = torchvision_densenet(depth).state_dict()
    model = build_model(f"ladder-densenet{depth}")
    report = load_encoder(model, {spelling(key): value for key, value in theirs.items()})
    unused = report.ignored
    assert len(report.loaded) + len(unused) == len(theirs)
    assert {key.rpartition(".")[0] for key in unused} == {"features.norm5", "classifier"}
    encoder = {key: value for key, value in model.state_dict().items() if key.split(".")[1] in model.encoder}
    assert len(encoder) + len(unused) == len(theirs)
    # Whether each stands in its place is seen below, by what it computes; here, that none stands in two.
    loaded = [float(value.double().sum()) for key, value in theirs.items() if spelling(key) not in unused]
    assert sorted(loaded) == sorted(float(value.double().sum()) for value in encoder.values())


def test_the_encoder_computes_what_torchvisions_does(densenet121):
    model = build_model("ladder-densenet121").eval()
    load_encoder(model, densenet121.state_dict())
    ours, theirs = model.segments, densenet121.eval().features
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 96)
        # The paper pools the stem by 2x2, torchvision by 3x3.
        expected = F.max_pool2d(F.relu(theirs.norm0(theirs.conv0(x))), 2)
        x = ours.stem(x)
        torch.testing.assert_close(x, expected)
        for index in (1, 2, 3):
            expected = theirs.get_submodule(f"denseblock{index}")(x)
            x = ours[f"block{index}"](x)
            torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
            expected = theirs.get_submodule(f"transition{index}")(x)
            x = ours[f"transition{index}"](x)
            torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
        # Without the pooling between them the halves of block 4 are torchvision's block 4.
        halves = ours.block4b(ours.block4a(x))
        torch.testing.assert_close(halves, theirs.denseblock4(x), rtol=1e-4, atol=1e-4)


def test_files_from_before_batches_were_counted_are_taken(densenet121):
    weights = {key: value for key, value in densenet121.state_dict().items() if "num_batches" not in key}
    load_encoder(build_model("ladder-densenet121"), weights)


def test_weights_of_another_size_are_refused_by_name_and_change_nothing(densenet121):
    model = build_model("ladder-densenet-mini")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ProblemsError) as caught:
        load_encoder(model, densenet121.state_dict())
    text = str(caught.value)
    assert text.startswith("encoder weights (a torchvision DenseNet of the same size is needed): 11 problems")
    assert "features.conv0.weight: shape must be (32, 3, 7, 7), got (64, 3, 7, 7)" in text
    assert re.search(r"and \d+ more$", text)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_each_missing_and_unknown_key_is_named(densenet121):
    weights = densenet121.state_dict()
    del weights["features.denseblock4.denselayer9.conv2.weight"]
    weights["features.denseblock1.denselayer7.conv1.weight"] = torch.zeros(128, 256, 1, 1)
    with pytest.raises(ProblemsError) as caught:
        load_encoder(build_model("ladder-densenet121"), weights)
    assert caught.value.problems == [
        "features.denseblock1.denselayer7.conv1.weight: the encoder of ladder-densenet121 has no such layer",
        "nothing in it fills segments.block4b.denselayer1.conv2.weight",
    ]
