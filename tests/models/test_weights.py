"""Pretrained weights: found by torchvision's names or in files, and every key in its place or accounted for."""

import copy
import urllib.error

import pytest
import torch
import torchvision

from memseg.errors import InputError, ProblemsError, UnknownNameError
from memseg.models import build_model, check_encoder, check_pretrained, find_weights, load_encoder, load_pretrained

RESNET50_FILE = "resnet50-0676ba61.pth"
"""As torchvision names the file of ResNet50_Weights.IMAGENET1K_V1."""


def on_meta(name):
    with torch.device("meta"):
        return build_model(name)


def random_numbers(model):
    """Other numbers in every tensor of a network of torchvision's."""
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.is_floating_point():
            value.normal_(std=0.05)
    return model.eval()


@pytest.fixture(scope="module")
def resnet50():
    torch.manual_seed(0)
    return random_numbers(torchvision.models.resnet50(weights=None))


@pytest.fixture
def checkpoints(tmp_path):
    """The folder of downloads, empty and elsewhere."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    yield tmp_path / "checkpoints"
    torch.hub.set_dir(before)


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)


def test_every_key_of_a_resnet_is_loaded_but_those_of_the_classifier(resnet50):
    model = build_model("ladder-resnet50")
    report = load_encoder(model, resnet50.state_dict())
    assert report.ignored == ("fc.weight", "fc.bias")
    assert len(report.loaded) + 2 == len(resnet50.state_dict())
    assert report.new == tuple(name for name in model.segments if name != "stem" and not name.startswith("layer"))


def test_the_encoder_computes_what_torchvisions_resnet_does(resnet50):
    model = build_model("ladder-resnet50").eval()
    load_encoder(model, resnet50.state_dict())
    with torch.no_grad():
        ours = theirs = torch.randn(1, 3, 64, 96)
        theirs = resnet50.maxpool(resnet50.relu(resnet50.bn1(resnet50.conv1(theirs))))
        for name in ("stem", "layer1", "layer2", "layer3", "layer4"):
            ours = model.segments[name](ours)
            theirs = theirs if name == "stem" else resnet50.get_submodule(name)(theirs)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_dilated_encoder_computes_what_torchvisions_does(resnet50):
    dilated = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=[False, True, True]).eval()
    dilated.load_state_dict(resnet50.state_dict())
    model = build_model("dilated-resnet50").eval()
    load_encoder(model, dilated.state_dict())
    with torch.no_grad():
        x = torch.randn(1, 64, 16, 24)
        ours = theirs = x
        for name in ("layer1", "layer2", "layer3", "layer4"):
            ours, theirs = model.segments[name](ours), dilated.get_submodule(name)(theirs)
    assert ours.shape == (1, 2048, 8, 12)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "halves"), [("ladder-densenet169-split34", ("block3", "block4")), ("dilated-densenet121", ())]
)
def test_halves_take_the_filters_of_the_whole_block(name, halves):
    model = build_model(name)
    theirs = torchvision.models.get_model(model.origin.name, weights=None)
    report = load_encoder(model, theirs.state_dict())
    assert len(report.loaded) + len(report.ignored) == len(theirs.state_dict())
    for number in (3, 4):
        block = theirs.features.get_submodule(f"denseblock{number}")
        parts = ["a", "b"] if f"block{number}" in halves else [""]
        layers = [layer for part in parts for layer in model.segments[f"block{number}{part}"].layers]
        for ours, layer in zip(layers, block.children(), strict=True):
            assert torch.equal(ours.conv2.weight, layer.conv2.weight)


def test_checking_changes_nothing_and_works_without_tensors(resnet50):
    model = build_model("resnet50-32x")
    before = copy.deepcopy(model.state_dict())
    report = check_encoder(model, resnet50.state_dict())
    assert report == check_encoder(on_meta("resnet50-32x"), resnet50.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_of_another_network_are_refused_before_anything_is_changed(resnet50):
    with pytest.raises(ProblemsError, match=r"encoder weights \(a torchvision DenseNet of the same size is needed\)"):
        check_encoder(on_meta("ladder-densenet121"), resnet50.state_dict())
    with pytest.raises(ProblemsError, match=r"nothing in it fills segments\.layer3\.10\.bn1\.bias"):
        check_encoder(on_meta("ladder-resnet101"), resnet50.state_dict())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    ],
    ids=["plain", "state_dict", "module.", "both"],
)
def test_a_file_may_wrap_the_state_dict(resnet50, wrap, tmp_path):
    path = tmp_path / "mine.bin"
    torch.save(wrap(resnet50.state_dict()), path)
    report = check_pretrained(on_meta("resnet50-32x"), str(path))
    assert len(report.loaded) == len(resnet50.state_dict()) - 2


def test_what_is_no_state_dict_is_refused(tmp_path):
    listed, mixed, text = (tmp_path / name for name in ("list.pth", "mixed.pth", "text.pth"))
    torch.save([torch.ones(1)], listed)
    torch.save({"weight": torch.ones(1), "epoch": 3}, mixed)
    text.write_text("not a checkpoint")
    model = on_meta("resnet50-32x")
    for path, says in (
        (listed, r"list\.pth: must hold a state dict .* got list"),
        (mixed, r"mixed\.pth: must hold a state dict .* but epoch is no tensor"),
        (text, r"text\.pth: must be a torchvision ResNet state dict saved by torch\.save, cannot be read"),
        (tmp_path / "absent.pth", r"there is no file .*absent\.pth"),
    ):
        with pytest.raises(InputError, match=says):
            load_encoder(model, path)


@pytest.mark.parametrize("name", ["IMAGENET1K_V1", "ResNet50_Weights.IMAGENET1K_V1"])
def test_torchvisions_weights_are_found_among_the_downloads(resnet50, name, checkpoints, offline):
    # A file that is there is taken as it is, as torchvision does: its hash is checked when it is downloaded.
    torch.save(resnet50.state_dict(), checkpoints / RESNET50_FILE)
    model = build_model("ladder-resnet50")
    report = load_pretrained(model, name)
    assert len(report.loaded) == len(resnet50.state_dict()) - 2
    assert torch.equal(model.segments.layer4.get_parameter("2.conv3.weight"), resnet50.layer4[2].conv3.weight)


def test_without_a_network_the_error_says_what_to_do(checkpoints, offline):
    with pytest.raises(InputError) as caught:
        find_weights(on_meta("ladder-resnet50"), "IMAGENET1K_V1")
    text = str(caught.value)
    assert text.startswith("ResNet50_Weights.IMAGENET1K_V1 could not be downloaded (<urlopen error no network>)")
    assert f"there is no {RESNET50_FILE} in {checkpoints}" in text
    assert text.endswith("or give the path of one in place of the name")


def test_a_download_is_asked_for_with_its_hash_and_lands_among_the_downloads(checkpoints, monkeypatch):
    asked = []

    def download(url, path, hash_prefix, progress):
        asked.append((url.rpartition("/")[2], hash_prefix, progress))
        torch.save({}, path)

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    assert find_weights(on_meta("ladder-resnet50"), "IMAGENET1K_V1") == checkpoints / RESNET50_FILE
    assert asked == [(RESNET50_FILE, "0676ba61", False)]


@pytest.mark.parametrize("name", ["IMAGENET1K_V3", "DenseNet121_Weights.IMAGENET1K_V1"])
def test_unknown_names_are_answered_with_the_known_ones(name, checkpoints):
    with pytest.raises(UnknownNameError, match=r"unknown weights for the encoder .*ResNet50_Weights"):
        find_weights(on_meta("ladder-resnet50"), name)


def test_a_network_that_torchvision_has_no_weights_for_says_so():
    with pytest.raises(InputError, match="torchvision has no weights for the encoder of ladder-densenet-mini"):
        find_weights(on_meta("ladder-densenet-mini"), "DEFAULT")


def test_a_network_of_others_takes_a_file(tmp_path):
    address = "torchvision.models:squeezenet1_1"
    model = build_model(address, num_classes=5)
    with pytest.raises(InputError, match=f"weights of {address} must be a file with its state dict, .*IMAGENET1K_V1"):
        load_pretrained(model, "IMAGENET1K_V1")
    theirs = torchvision.models.squeezenet1_1(num_classes=5)
    torch.save(theirs.state_dict() | {"more": torch.ones(1)}, tmp_path / "theirs.pth")
    report = load_pretrained(model, str(tmp_path / "theirs.pth"))
    assert (len(report.loaded), report.new, report.ignored) == (len(theirs.state_dict()), (), ("more",))
