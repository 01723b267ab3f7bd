"""A run in half precision: what it learns is float32, and a stopped one goes on with its gradient scaler."""

import shutil

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.nn import functional as F

from memseg.levels import Precision, Recompute
from memseg.training.checkpoint import checkpoint_folders
from memseg.training.log import read_metrics
from processes import hand_written_plan, memseg, streets, train, weights

STEPS = 4


def computes(precision):
    """Whether convolutions on this CPU take the type."""
    dtype = getattr(torch, precision)
    try:
        F.conv2d(torch.ones(1, 1, 2, 2, dtype=dtype), torch.ones(1, 1, 1, 1, dtype=dtype))
    except RuntimeError:
        return False
    return True


@pytest.fixture(
    scope="module",
    params=[(Precision.BFLOAT16, (2,)), (Precision.FLOAT16, (2,)), (Precision.FLOAT16, (1, 1))],
    ids=lambda param: f"{param[0]}, {len(param[1])} replicas",
)
def run(request, tmp_path_factory):
    """(precision, run folder) of STEPS steps, everything rebuilt, a checkpoint after each two."""
    precision, shares = request.param
    if not computes(precision):
        pytest.skip(f"convolutions on this CPU do not take {precision}")
    folder = tmp_path_factory.mktemp(precision)
    plan = hand_written_plan(folder / "plan.json", shares=shares, recompute=Recompute.UNITS, precision=precision)
    return precision, train(folder / "run", *streets(STEPS, precision=precision), "--plan", plan)


def test_weights_are_float32_and_the_loss_falls(run):
    _, folder = run
    floating = [value for value in weights(folder).values() if value.is_floating_point()]
    assert {value.dtype for value in floating} == {torch.float32}
    assert all(value.isfinite().all() for value in floating)
    losses = [record["loss"] for record in read_metrics(folder) if "loss" in record]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]


def test_the_scaler_of_float16_alone_is_in_the_checkpoint(run):
    precision, folder = run
    names = FileSystemReader(checkpoint_folders(folder)[-1]).read_metadata().state_dict_metadata
    found = {name for name in names if name.startswith("scaler.")}
    assert found == ({"scaler.scale", "scaler.steps"} if precision is Precision.FLOAT16 else set())


def test_a_stopped_run_ends_with_the_weights_of_one_that_was_not(run, tmp_path):
    _, folder = run
    stopped = tmp_path / "run"
    shutil.copytree(folder, stopped)
    first, last = checkpoint_folders(stopped)
    shutil.rmtree(last)
    done = memseg("train", "--resume", stopped)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in checkpoint_folders(stopped)] == [first.name, last.name]
    expected = weights(folder)
    for name, value in weights(stopped).items():
        assert torch.equal(value, expected[name]), name
