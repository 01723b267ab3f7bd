"""A run that is killed outright goes on as if nothing had happened, on the same cards or on others."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from memseg.levels import Recompute
from memseg.training.checkpoint import checkpoint_folders, load_run
from memseg.training.log import read_metrics
from processes import command, environment, hand_written_plan, largest_difference, memseg, python, streets, train


def running(folder):
    """Ids of processes whose command line names `folder`; not those that have ended and wait for their parent."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if os.fsencode(folder) in words:
            found.append(int(process.name))
    return found


def wait_for(condition, what, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def test_a_process_whose_launcher_died_before_it_could_watch_it_ends_at_once():
    done = python(
        """
import os
from memseg.running import end_with_parent
for launcher in (os.getppid(), 1):
    os.environ["MEMSEG_LAUNCHER"] = str(launcher)
    end_with_parent()
    print("goes on", flush=True)
"""
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "goes on\n"), done.stderr


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory, split_run):
    """The split run again, killed between its first checkpoint and its second."""
    folder = tmp_path_factory.mktemp("killed")
    run, plan = folder / "run", hand_written_plan(folder / "plan.json", 2, recompute=Recompute.UNITS)
    # An evaluation after the third step, which changes nothing, leaves time to kill before the fourth.
    slowly = ["--set", "train.evaluate_every=1", "--set", "data.streets.val_length=40"]
    steps = load_run(split_run)[0].schedule.steps
    line = command("train", *streets(steps), *slowly, "--plan", plan, "--out", run)
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(line, stderr=stderr, env=environment(), start_new_session=True)
    with process:
        wait_for(lambda: checkpoint_folders(run) or process.poll() is not None, "no checkpoint was written")
        assert process.poll() is None, (folder / "stderr").read_text()
        assert len(running(run)) == 3
        os.killpg(process.pid, signal.SIGKILL)
    wait_for(lambda: not running(run), "processes outlived the one that launched them", seconds=20)
    assert [path.name for path in checkpoint_folders(run)] == ["step-00000002"]
    # As a kill in the middle of the next save leaves it.
    torn = run / "checkpoints" / "step-00000004.part"
    torn.mkdir(exist_ok=True)
    (torn / "__0_0.distcp").write_bytes(b"torn")
    return run


@pytest.mark.parametrize(
    ("cards", "tolerance"), [([], 1e-12), (["--cards", "cpu:4GiB"], 1e-9)], ids=["same cards", "one card"]
)
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(cards, tolerance, killed_run, split_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(killed_run, run)
    done = memseg("train", "--resume", run, *cards, "--set", "train.evaluate_every=0")
    assert done.returncode == 0, done.stderr
    assert largest_difference(run, split_run) <= tolerance
    losses = [record for record in read_metrics(run) if "loss" in record]
    assert [record["step"] for record in losses] == [1, 2, 3, 4, 5, 6]
    expected = [record["loss"] for record in read_metrics(split_run)]
    assert [record["loss"] for record in losses] == pytest.approx(expected, abs=1e-9)
    assert [path.name for path in (run / "checkpoints").iterdir() if path.suffix == ".part"] == []


def test_a_run_of_replicas_goes_on_in_one_process(single_run, tmp_path):
    steps = load_run(single_run)[0].schedule.steps
    every = ["--set", f"train.keep_checkpoints={steps}"]
    replicas = hand_written_plan(tmp_path / "replicas.json", shares=(1, 1), recompute=Recompute.UNITS)
    run = train(tmp_path / "run", *streets(steps), *every, "--plan", replicas)
    first, *later = checkpoint_folders(run)
    assert first.name == "step-00000002"
    for folder in later:
        shutil.rmtree(folder)
    done = memseg("train", "--resume", run, "--plan", hand_written_plan(tmp_path / "one.json"))
    assert done.returncode == 0, done.stderr
    assert checkpoint_folders(run)[-1].name == f"step-{steps:08d}"
    assert largest_difference(run, single_run) < 1e-9
