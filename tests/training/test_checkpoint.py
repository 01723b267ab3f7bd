"""Checkpoints on a disk that fills, tears and forgets."""

import json
import shutil

import pytest
from processes import python

from memseg.cli.main import main
from memseg.errors import CheckpointError
from memseg.training.checkpoint import CHECKPOINTS_FOLDER, RECIPE_FILE, checkpoint_folders, load_trained

_SAVES = """
import resource, sys
from pathlib import Path
import torch, torch.distributed as dist
from memseg.models import build_model
from memseg.training.checkpoint import save_checkpoint, write_run
from memseg.training.recipe import load_recipe
from memseg.training.trainer import make_optimizer
run = Path(sys.argv[1])
recipe = load_recipe("streets_demo")
write_run(run, recipe, recipe.data.open("train").classes)
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
    assert part.is_dir()
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
