"""Checkpoints on a disk that fills, tears and forgets."""

import json
import shutil
import signal

import pytest

from memseg.cli.main import main
from memseg.errors import CheckpointError
from memseg.training.checkpoint import (
    BEST,
    CHECKPOINTS_FOLDER,
    LAST,
    RECIPE_FILE,
    checkpoint_folders,
    find_checkpoint,
    load_trained,
    steps_of,
)
from processes import python

_SAVES = """
import resource, sys
from pathlib import Path
import torch, torch.distributed as dist
from memseg.models import build_model
from memseg.training.checkpoint import save_checkpoint, write_run
from memseg.training.recipe import load_recipe
from memseg.training.optimizer import make_optimizer
run = Path(sys.argv[1])
recipe = load_recipe("streets_demo")
write_run(run, recipe, recipe.data.open_train().classes)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = build_model(recipe.model.name, num_classes=8)
optimizer = make_optimizer(recipe, model, ())
for step in (1, 2, 3):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step)
    save_checkpoint(run, step, model, optimizer, keep=2)
# As on a full disk: no file may grow beyond 1 MiB; the system answers EFBIG.
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
try:
    save_checkpoint(run, 4, model, optimizer, keep=2)
except OSError as error:
    print(error.filename, error.strerror, sep="\\n")
"""


@pytest.fixture(scope="module")
def run_and_output(tmp_path_factory):
    """A run folder with checkpoints of steps 2 and 3, all weights the step's number, and what a failed save said."""
    run = tmp_path_factory.mktemp("saved") / "run"
    done = python(_SAVES, run)
    assert done.returncode == 0, done.stderr
    return run, done.stdout


@pytest.fixture
def run(run_and_output, tmp_path):
    """A copy to damage."""
    shutil.copytree(run_and_output[0], tmp_path / "run")
    return tmp_path / "run"


def test_a_save_that_the_system_refuses_raises_oserror_and_leaves_what_was_there(run_and_output):
    run, output = run_and_output
    part = run / CHECKPOINTS_FOLDER / "step-00000004.part"
    assert output.splitlines() == [str(part), "File too large"]
    assert not part.exists()
    assert [path.name for path in checkpoint_folders(run)] == ["step-00000002", "step-00000003"]
    trained = load_trained(run)
    assert trained.step == 3
    assert all((parameter == 3).all() for parameter in trained.model.parameters())


def test_an_earlier_checkpoint_is_loaded_by_its_folder(run_and_output):
    trained = load_trained(checkpoint_folders(run_and_output[0])[0])
    assert trained.step == 2
    assert not trained.model.training
    assert all((parameter == 2).all() for parameter in trained.model.parameters())


def tear(newest):
    file = newest / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lose_tensors(newest):
    (newest / "__0_0.distcp").unlink()


def lose_index(newest):
    (newest / ".metadata").unlink()


def tear_index(newest):
    (newest / ".metadata").write_bytes((newest / ".metadata").read_bytes()[:1000])


def swap_model(newest):
    recipe = newest.parent.parent / RECIPE_FILE
    content = json.loads(recipe.read_text())
    content["model"]["name"] = "ladder-densenet121"
    recipe.write_text(json.dumps(content))


@pytest.mark.parametrize("damage", [tear, lose_tensors, lose_index, tear_index, swap_model], ids=lambda f: f.__name__)
def test_a_checkpoint_that_cannot_be_read_is_named_in_one_line(damage, run, capsys):
    newest = checkpoint_folders(run)[-1]
    damage(newest)
    with pytest.raises(CheckpointError):
        load_trained(run)
    assert main(["eval", str(run), "--device", "cpu"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith(f"memseg eval: {newest}: the checkpoint is damaged or of another model (")
    assert len(line) < 500


def test_what_is_no_run_is_said_to_be_none(tmp_path, run):
    with pytest.raises(
        CheckpointError, match=r"must be a run folder as memseg train makes it, .*recipe\.json is missing"
    ):
        load_trained(tmp_path)
    shutil.rmtree(run / CHECKPOINTS_FOLDER)
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        load_trained(run)


_KILLED = """
import os, signal, sys
from pathlib import Path
import torch, torch.distributed as dist
from memseg.models import build_model
from memseg.training import checkpoint
from memseg.training.optimizer import make_optimizer
from memseg.training.recipe import load_recipe
from memseg.training.standing import Standing

def die(path, *arguments, **options):
    # Before a checkpoint is written, what is not there is cleared away.
    if isinstance(path, dict) or path.exists():
        os.kill(os.getpid(), signal.SIGKILL)

def save(run, *, killed_by=None):
    # The first is the best, until the third is.
    recipe = load_recipe("streets_demo")
    checkpoint.write_run(run, recipe, recipe.data.open_train().classes)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = build_model(recipe.model.name, num_classes=8)
    optimizer = make_optimizer(recipe, model, ())
    standing = Standing()
    for step, miou in ((1, 0.5), (2, 0.4), (3, 0.6)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(step)
        standing = standing.after(step, miou)
        if step == 3 and killed_by:
            owner, name = killed_by
            setattr(owner, name, die)
        checkpoint.save_checkpoint(run, step, model, optimizer, keep=1, standing=standing)
    dist.destroy_process_group()

root = Path(sys.argv[1])
moments = {
    "writing": (checkpoint, "dcp_save"),
    "renaming": (Path, "rename"),
    "naming the best": (checkpoint, "replace_file"),
    "deleting": (checkpoint.shutil, "rmtree"),
    "never": None,
}
for moment, killed_by in moments.items():
    # Before anything has threads.
    if not (child := os.fork()):
        save(root / moment, killed_by=killed_by)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(moment, os.WTERMSIG(status) if os.WIFSIGNALED(status) else "ended", sep=": ")
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Runs whose process was killed while it saved a checkpoint that is a new best, each at another moment."""
    root = tmp_path_factory.mktemp("killed")
    done = python(_KILLED, root)
    assert done.returncode == 0, done.stderr
    kill = int(signal.SIGKILL)
    assert done.stdout.splitlines() == [
        f"writing: {kill}", f"renaming: {kill}", f"naming the best: {kill}", f"deleting: {kill}", "never: ended",
    ]  # fmt: skip
    return root


@pytest.mark.parametrize(
    ("moment", "last", "best"),
    [("writing", 2, 1), ("renaming", 2, 1), ("naming the best", 3, 1), ("deleting", 3, 3), ("never", 3, 3)],
)
def test_a_process_that_is_killed_while_saving_leaves_a_best_and_a_last_that_load(moment, last, best, killed):
    run = killed / moment
    for which, step in ((LAST, last), (BEST, best)):
        trained = load_trained(run, which)
        assert trained.step == step
        assert all((parameter == step).all() for parameter in trained.model.parameters())


def test_the_best_stays_beside_the_newest_until_there_is_a_better_one(killed):
    assert [steps_of(folder) for folder in checkpoint_folders(killed / "writing")] == [1, 2]
    assert [steps_of(folder) for folder in checkpoint_folders(killed / "never")] == [3]


def test_checkpoints_are_found_by_name_and_those_that_are_not_there_are_said_not_to_be(killed, run):
    first, second = checkpoint_folders(killed / "writing")
    for which in (first.name, str(first)):
        assert find_checkpoint(killed / "writing", which) == first
    assert find_checkpoint(killed / "writing") == second
    with pytest.raises(CheckpointError, match=r"must be last, best or one of step-00000001, step-00000002, got bst"):
        find_checkpoint(killed / "writing", "bst")
    with pytest.raises(CheckpointError, match="was never evaluated in training, so none is its best; take the last"):
        load_trained(run, BEST)
    (run / "best.json").write_text('{"checkpoint": "step-00000001"}')
    with pytest.raises(CheckpointError, match="its best checkpoint was step-00000001, which is there no more"):
        load_trained(run, BEST)
    (run / "best.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"is damaged: .*; take the last checkpoint"):
        load_trained(run, BEST)
