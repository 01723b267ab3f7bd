"""Decoded pictures on disk: the same pixels, each decoded once, whatever happens to the files."""

import itertools
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from memseg.data import Fit, open_dataset
from memseg.data.cache import DecodedCache
from memseg.data.dataset import Pixels
from memseg.data.prepare import PreparedSamples
from memseg.data.training_view import TrainingView
from memseg.errors import InputError


@pytest.fixture
def pairs(tmp_path):
    """A folder with two classes and two pairs of 40x60 pixels."""
    draws = np.random.default_rng(0)
    root = tmp_path / "pairs"
    for kind, high, shape in (("images", 256, (40, 60, 3)), ("labels", 2, (40, 60))):
        (root / kind / "train").mkdir(parents=True)
        for stem in "ab":
            Image.fromarray(draws.integers(0, high, shape, dtype=np.uint8)).save(root / kind / f"train/{stem}.png")
    (root / "classes.txt").write_text("road\nsky\n")
    return root


def kept(cache):
    return sorted(cache.glob("*.npy"))


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files that were decoded so far."""
    names = []
    original = Image.open

    def opened(path, *rest):
        image = original(path, *rest)
        load = image.load
        image.load = lambda: (names.append(Path(path).name), load())[1]
        return image

    monkeypatch.setattr(Image, "open", opened)
    return names


@pytest.mark.parametrize("fit", list(Fit))
def test_samples_are_the_same_with_a_cache_and_decoded_once(pairs, tmp_path, fit, decoded):
    train = open_dataset("folder", "train", root=pairs)
    options = {"size": (40, 60) if fit is Fit.PAD else (20, 30), "fit": fit, "flip": True, "seed": 0}
    options["region"] = (0, 38, 2, 60)
    plain = TrainingView(train, **options)
    expected = [plain[epoch, index] for epoch in range(3) for index in range(2)]
    decoded.clear()
    for _ in range(2):
        # A view made later, as by another process or another run, finds what the first has kept.
        view = TrainingView(train, **options, cache=tmp_path / "deep/cache")
        samples = [view[epoch, index] for epoch in range(3) for index in range(2)]
        for sample, same in zip(samples, expected, strict=True):
            assert torch.equal(sample["image"], same["image"])
            assert torch.equal(sample["target"], same["target"])
    assert sorted(decoded) == ["a.png", "a.png", "b.png", "b.png"]
    assert len(kept(tmp_path / "deep/cache")) == 4


def test_other_sources_and_preparations_are_kept_apart(pairs, tmp_path):
    cache = tmp_path / "cache"

    def image(**options) -> Pixels:
        return PreparedSamples(open_dataset("folder", "train", root=pairs), cache=cache, **options).image(0).copy()

    whole = image()
    assert np.array_equal(image(region=(0, 40, 0, 30)), whole[:, :30])
    assert image(size=(20, 30)).shape == (20, 30, 3)
    # Another picture of the same name and size, even written within the same second.
    state = (pairs / "images/train/a.png").stat()
    Image.fromarray(255 - whole).save(pairs / "images/train/a.png")
    os.utime(pairs / "images/train/a.png", ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert np.array_equal(image(), 255 - whole)
    assert len(kept(cache)) == 4


def test_another_class_list_does_not_read_the_targets_of_the_first(pairs, tmp_path):
    def target():
        return PreparedSamples(open_dataset("folder", "train", root=pairs), cache=tmp_path / "cache").target(0)

    first = target().copy()
    (pairs / "classes.txt").write_text("road\nsky\ncar\n")
    assert np.array_equal(target(), first)
    assert len(kept(tmp_path / "cache")) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:50],
        lambda content: content[:-1000],
        lambda content: content[:-1],
        lambda content: content[:3000] + bytes([content[3000] ^ 1]) + content[3001:],
        lambda content: content.replace(b"|u1", b"|i1", 1),
        lambda content: content.replace(b"(40, 60, 3)", b"(60, 40, 3)", 1),
        lambda content: b"no array at all" * 100,
    ],
    ids=["empty", "in the header", "in the pixels", "in the checksum", "one bit", "type", "shape", "other file"],
)
def test_a_damaged_file_is_made_anew(pairs, tmp_path, damage):
    samples = PreparedSamples(open_dataset("folder", "train", root=pairs), cache=tmp_path)
    expected = samples.image(0).copy()
    (path,) = kept(tmp_path)
    whole = path.read_bytes()
    damaged = damage(whole)
    assert damaged != whole
    path.write_bytes(damaged)
    assert np.array_equal(samples.image(0), expected)
    assert path.read_bytes() == whole


def test_writing_to_what_was_read_changes_no_file(tmp_path):
    cache = DecodedCache(tmp_path)
    cache.get("one", (2, 2), lambda: np.zeros((2, 2), np.uint8))
    cache.get("one", (2, 2), lambda: pytest.fail("it was kept"))[:] = 7
    assert not cache.get("one", (2, 2), lambda: pytest.fail("it was kept")).any()


def fill(folder, begun):
    """Write 50 arrays again and again."""
    cache = DecodedCache(folder)
    for number in itertools.cycle(range(50)):
        cache._path(str(number)).unlink(missing_ok=True)
        cache.get(str(number), (300, 300), lambda n=number: np.full((300, 300), n, np.uint8))
        begun.set()


def test_processes_that_are_killed_at_any_moment_leave_whole_files_only(tmp_path):
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        begun = context.Event()
        running = [context.Process(target=fill, args=(tmp_path, begun)) for _ in range(2)]
        for process in running:
            process.start()
        assert begun.wait(60)
        for process in running:
            process.kill()
            process.join()
    assert kept(tmp_path)
    assert all(np.ptp(np.load(path)) == 0 for path in kept(tmp_path))
    cache = DecodedCache(tmp_path)
    for number in range(50):
        assert (cache.get(str(number), (300, 300), lambda n=number: np.full((300, 300), n, np.uint8)) == number).all()


def test_a_disk_without_room_is_told_before_the_run_and_costs_speed_later(pairs, tmp_path, monkeypatch):
    train = open_dataset("folder", "train", root=pairs)
    options = {"size": (40, 60), "fit": Fit.PAD, "flip": False, "seed": 0, "cache": tmp_path / "cache"}
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10_000))
    with pytest.raises(InputError, match=r"data.cache needs 18.8 KiB more in .*cache, 9.8 KiB are free there"):
        TrainingView(train, **options)
    TrainingView(train, **options, parts={"target"})
    monkeypatch.undo()
    view = TrainingView(train, **options)
    expected = view[0, 0]["image"]
    for path in kept(tmp_path / "cache"):
        path.unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("memseg.data.cache.replace_file", full)
    assert torch.equal(view[0, 0]["image"], expected)
    assert not kept(tmp_path / "cache")


def test_what_cannot_be_cached_is_told_at_once(pairs, tmp_path):
    with pytest.raises(InputError, match="streets has no files whose decoded form could be kept"):
        PreparedSamples(open_dataset("streets", "train"), cache=tmp_path).image(0)
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match=r"data.cache must be a folder that can be made, .*file/cache: Not a directory"
    ):
        PreparedSamples(open_dataset("folder", "train", root=pairs), cache=tmp_path / "file/cache")
