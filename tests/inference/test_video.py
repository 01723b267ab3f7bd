"""Videos: which pictures are labelled, what is written, and what a damaged file costs."""

import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from memseg.data import ClassList
from memseg.errors import DataError, InputError
from memseg.inference.labelling import Framing, label_image
from memseg.inference.predict import Inputs, check_inputs, predict_video
from memseg.inference.video import VideoWriter, open_video
from memseg.models import build_model

av = pytest.importorskip("av", reason="PyAV is not installed")

CLASSES = ClassList(("road", "car", "sky"), ((128, 64, 128), (0, 0, 142), (70, 130, 180)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model("ladder-densenet-mini", num_classes=3)


def write_video(path, *, pictures=8, size=(64, 96), rate=10, codec="mpeg4"):
    """Pictures whose grey rises by 20 from one to the next, with a little noise."""
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for number in range(pictures):
            pixels = (20 * number + random.integers(0, 40, (*size, 3))).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def read(path):
    with open_video(path) as video:
        return [(number, pixels) for number, pixels in video.pictures()]


def test_every_nth_picture_is_labelled_as_a_picture_would_be(model, tmp_path):
    path = write_video(tmp_path / "drive.mp4")
    told = []
    done = predict_video(
        model, path, tmp_path / "out", CLASSES, every=3, progress=lambda now, total: told.append((now, total))
    )
    assert (done.frames, told) == (3, [(1, 3), (2, 3), (3, 3)])
    names = [f"{number:06d}_labels.png" for number in (0, 3, 6)]
    assert sorted(file.name for file in done.labels.iterdir()) == names
    assert done.labels == tmp_path / "out" / "drive"
    for name, (_, pixels) in zip(names, read(path)[::3], strict=True):
        expected = label_image(model.eval(), pixels, framing=Framing(), device=torch.device("cpu"))
        with Image.open(done.labels / name) as picture:
            assert np.array_equal(np.asarray(picture), expected)
    with open_video(done.overlay) as overlay:
        assert (overlay.rate, overlay.size, overlay.frames) == (Fraction(10, 3), (64, 96), 3)


def test_a_video_of_odd_sides_comes_back_with_even_ones(tmp_path):
    pictures = [np.full((33, 47, 3), grey, np.uint8) for grey in (0, 120, 240)]
    with VideoWriter(tmp_path / "odd.mp4", Fraction(5)) as writer:
        for picture in pictures:
            writer.add(picture)
    found = read(tmp_path / "odd.mp4")
    assert [number for number, _ in found] == [0, 1, 2]
    for (_, pixels), grey in zip(found, (0, 120, 240), strict=True):
        assert pixels.shape == (34, 48, 3)
        assert abs(int(pixels.mean()) - grey) <= 6


def test_labels_and_overlay_can_be_left_out(model, tmp_path):
    path = write_video(tmp_path / "drive.avi", pictures=2)
    done = predict_video(model, path, tmp_path / "labels", CLASSES, overlay=False)
    assert done.overlay is None
    assert [file.name for file in (tmp_path / "labels").iterdir()] == ["drive"]
    done = predict_video(model, path, tmp_path / "overlay", CLASSES, labels=False)
    assert done.labels is None
    assert [file.name for file in (tmp_path / "overlay").iterdir()] == ["drive_overlay.mp4"]


def damaged(tmp_path):
    """A video with rubbish in its middle."""
    path = write_video(tmp_path / "damaged.mkv", pictures=16)
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    content[half : half + len(content) // 6] = b"U" * (len(content) // 6)
    path.write_bytes(content)
    return path, "cannot be decoded after"


def cut_off(tmp_path):
    """A video of which the last third is missing; its header still promises all of it."""
    path = write_video(tmp_path / "cut.mkv", pictures=48)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return path, r"breaks off after \d\.\d of 4\.8 s"


@pytest.mark.parametrize("make", [damaged, cut_off])
def test_a_video_broken_in_the_middle_keeps_what_was_written_and_says_so_in_one_line(model, tmp_path, make):
    path, told = make(tmp_path)
    with pytest.raises(DataError, match=told) as caught:
        predict_video(model, path, tmp_path / "out", CLASSES, every=4)
    assert len(caught.value.problems) == 1
    labels = sorted((tmp_path / "out" / path.stem).iterdir())
    assert len(labels) >= 2
    for number, file in enumerate(labels):
        assert file.name == f"{4 * number:06d}_labels.png"
        with Image.open(file) as picture:
            assert np.asarray(picture).shape == (64, 96)
    assert len(read(tmp_path / "out" / f"{path.stem}_overlay.mp4")) == len(labels)


def test_what_is_no_picture_or_video_and_what_would_overwrite_is_told_at_once(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "text.mp4").write_text("no video")
    good, twin = write_video(tmp_path / "one.mp4"), write_video(tmp_path / "other" / "one.avi")
    videos = [good, twin, tmp_path / "text.mp4", tmp_path / "absent.mp4"]
    with pytest.raises(DataError) as caught:
        check_inputs(Inputs([tmp_path / "text.png"], videos), Framing(region=(0, 64, 0, 90)))
    picture, clash, text, absent = caught.value.problems
    assert picture.startswith(f"{tmp_path / 'text.png'}: must be a picture that Pillow can read")
    assert clash.startswith(f"{twin}: its results would overwrite those of {good}")
    assert text.startswith(f"{tmp_path / 'text.mp4'}: must be a video that FFmpeg can read")
    assert "No such file" in absent
    with pytest.raises(DataError, match="must reach row 65"):
        check_inputs(Inputs([], [good]), Framing(region=(0, 65, 0, 96)))


def test_without_pyav_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r'videos need PyAV.*pip install "memseg\[video\]"'):
        check_inputs(Inputs([], [tmp_path / "drive.mp4"]), Framing())
    check_inputs(Inputs([], []), Framing())
