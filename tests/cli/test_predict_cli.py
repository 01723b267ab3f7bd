"""memseg predict from outside: pictures and videos in one call."""

import numpy as np
import pytest
from PIL import Image

from memseg.cli.main import main
from memseg.data.streets import STREETS_CLASSES
from runs import untrained_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained_run(tmp_path_factory.mktemp("predict") / "run", STREETS_CLASSES, dataset="streets", image="64x64")


@pytest.fixture
def files(tmp_path):
    """A folder with a picture of noise and a video of four."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 70, 3), np.uint8)
    folder = tmp_path / "files"
    folder.mkdir()
    Image.fromarray(noise[0]).save(folder / "still.png")
    with av.open(str(folder / "drive.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 70, "yuv420p"
        for pixels in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return folder


def test_pictures_and_videos_of_a_folder_are_labelled(run, files, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["predict", str(run), str(files), "--every", "2", "--out", str(out), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"labelled 3 pictures in {out}\n"
    written = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert written == [
        *("drive/000000_labels.png", "drive/000002_labels.png", "drive_overlay.mp4"),
        *("still_labels.png", "still_overlay.png"),
    ]


def test_views_change_the_labels_and_overlays_can_be_left_out(run, files, tmp_path):
    command = ["predict", str(run), str(files / "still.png"), "--device", "cpu", "--no-overlay", "--out"]
    assert main([*command, str(tmp_path / "plain")]) == 0
    assert main([*command, str(tmp_path / "views"), "--scales", "1,2", "--flip"]) == 0
    (plain,), (views,) = ([*(tmp_path / name).iterdir()] for name in ("plain", "views"))
    assert plain.name == "still_labels.png"
    assert plain.read_bytes() != views.read_bytes()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--no-overlay", "--no-labels"], "--no-overlay and --no-labels together leave nothing to write"),
        (["--every", "0"], "--every must be 1 or more pictures, got 0"),
    ],
)
def test_what_would_write_nothing_is_refused(run, files, tmp_path, capsys, options, told):
    assert main(["predict", str(run), str(files), "--out", str(tmp_path / "out"), *options]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
