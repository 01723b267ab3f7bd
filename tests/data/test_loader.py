"""Batches from other processes: in order, the right samples, and errors as they were."""

import os
import signal

import numpy as np
import pytest
import torch
from numbered import Numbered
from PIL import Image

from memseg.data import Fit, open_dataset
from memseg.data.loader import is_lost_process, make_loader
from memseg.data.training_view import TrainingView
from memseg.errors import DataError

CPU = torch.device("cpu")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_as_asked_over_the_end_of_an_epoch(workers):
    view = TrainingView(Numbered(*[(15, 16)] * 4), size=(4, 4), fit=Fit.CROP, flip=True, seed=0)
    batches = [[(0, 3), (0, 1)], [(0, 0), (0, 2)], [(1, 1), (1, 0)], [(1, 2), (1, 3)]]
    loaded = list(make_loader(view, iter(batches), workers=workers, device=CPU))
    for batch, samples in zip(batches, loaded, strict=True):
        for number, place in enumerate(batch):
            assert torch.equal(samples["image"][number], view[place]["image"])
            assert torch.equal(samples["target"][number], view[place]["target"])


def test_no_more_is_asked_for_than_is_decoded_ahead():
    view = TrainingView(Numbered(*[(4, 4)] * 4), size=(4, 4), fit=Fit.PAD, flip=True, seed=0)
    asked = []

    def endless():
        while True:
            asked.append([(len(asked), 0)])
            yield asked[-1]

    for workers, ahead in ((0, 0), (1, 2)):
        asked.clear()
        loader = make_loader(view, endless(), workers=workers, device=CPU)
        for _ in range(3):
            next(loader)
        assert len(asked) == 3 + ahead
        loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_while_decoding_is_raised_as_it_is(tmp_path, workers):
    (tmp_path / "classes.txt").write_text("road\nsky\n")
    for kind, shape in (("images", (6, 8, 3)), ("labels", (6, 8))):
        (tmp_path / kind / "train").mkdir(parents=True)
        for stem in "ab":
            Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / kind / f"train/{stem}.png")
    Image.fromarray(np.full((6, 8), 7, np.uint8)).save(tmp_path / "labels/train/b.png")
    view = TrainingView(open_dataset("folder", "train", root=tmp_path), size=(6, 8), fit=Fit.PAD, flip=False, seed=0)
    loader = make_loader(view, [[(0, 0)], [(0, 1)]], workers=workers, device=CPU)
    next(loader)
    with pytest.raises(DataError, match=r"b\.png: 1 problem\n  label values must be 0-1, 255") as caught:
        next(loader)
    assert caught.value.where.endswith("labels/train/b.png")


class Deadly(TrainingView):
    """A view that the process which decodes for another does not survive."""

    def __getitem__(self, place):
        if os.getpid() != self.reader:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(place)


def test_a_process_that_was_killed_while_it_decoded_is_told_from_other_errors():
    view = Deadly(Numbered((4, 4)), size=(4, 4), fit=Fit.PAD, flip=False, seed=0)
    view.reader = os.getpid()
    with pytest.raises(RuntimeError) as caught:
        next(make_loader(view, [[(0, 0)]], workers=1, device=CPU))
    assert is_lost_process(caught.value)
    assert not is_lost_process(RuntimeError("another"))
