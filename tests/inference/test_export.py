"""Exported files answer as the network does, whatever is left free in them, and are refused where they do not."""

import json
from pathlib import Path

import pytest
import torch
from small_networks import small_network

from memseg.data import ClassList
from memseg.errors import InputError
from memseg.inference import export
from memseg.inference.export import METADATA_FILE, Format, export_network

CLASSES = ClassList(("road", "car", "sky"), ((128, 64, 128), (0, 0, 142), (70, 130, 180)))


@pytest.fixture(scope="module")
def model():
    return small_network("ladder-densenet")


def test_onnx_of_any_size_answers_as_the_network(model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    out = tmp_path / "ladder.onnx"
    worst = export_network(model, out, wanted=Format.ONNX, size=(128, 192), dynamic=True, classes=CLASSES)
    assert worst < 1e-4
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    for batch, height, width in ((1, 128, 128), (3, 192, 256)):
        images = torch.randn(batch, 3, height, width)
        (found,) = session.run(["logits"], {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(images), rtol=1e-3, atol=1e-4)
    known = session.get_modelmeta().custom_metadata_map
    assert json.loads(known["classes"]) == ["road", "car", "sky"]
    assert json.loads(known["mean"]) == [0.485, 0.456, 0.406]
    assert (known["image"], known["output"], known["dynamic"]) == ("128x192", "logits", "true")
    assert [path.name for path in tmp_path.iterdir()] == ["ladder.onnx"]


def test_a_program_read_again_gives_the_labels_of_the_network(model, tmp_path):
    out = tmp_path / "ladder.pt2"
    assert export_network(model, out, wanted=Format.TORCH, size=(64, 128), batch=2, labels=True) == 0
    files = {METADATA_FILE: ""}
    program = torch.export.load(out, extra_files=files).module()
    images = torch.randn(2, 3, 64, 128)
    with torch.no_grad():
        labels = program(images)
        assert labels.dtype == torch.uint8
        assert torch.equal(labels.long(), model(images).argmax(1))
    assert json.loads(files[METADATA_FILE])["output"] == "labels"


def test_a_program_of_free_size_answers_as_the_network(tmp_path):
    out = tmp_path / "network.pt2"
    assert (
        export_network(small_network("ladder-resnet"), out, wanted=Format.TORCH, size=(128, 192), dynamic=True) < 1e-4
    )
    assert out.is_file()


def test_a_file_that_answers_otherwise_is_not_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_program", lambda *_: (b"", lambda images: model(images) + 0.1))
    with pytest.raises(InputError, match=r"would not answer as ladder-densenet does: .*nothing was written"):
        export_network(model, tmp_path / "wrong.pt2", wanted=Format.TORCH, size=(64, 64))
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named_with_what_brings_them(model, monkeypatch):
    found = export.importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(InputError, match=r"not installed: onnxscript; pip install 'memseg\[export\]'"):
        export_network(model, Path("never.onnx"), wanted=Format.ONNX, size=(64, 64))


def test_what_cannot_be_is_told_before_the_work(model, tmp_path):
    with pytest.raises(InputError, match=r"multiples of 64 .* got 64x100; nearest is 64x128"):
        export_network(model, tmp_path / "a.pt2", wanted=Format.TORCH, size=(64, 100))
    with pytest.raises(InputError, match=r"each side must be at least 128, .*got 64x128"):
        export_network(model, tmp_path / "a.pt2", wanted=Format.TORCH, size=(64, 128), dynamic=True)
    with pytest.raises(InputError, match=r"the folder of .*absent.*a\.pt2 must exist"):
        export_network(model, tmp_path / "absent" / "a.pt2", wanted=Format.TORCH, size=(64, 64))
