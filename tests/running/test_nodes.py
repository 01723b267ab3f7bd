"""Several machines, stood for by several launchers on one: they share the run folder and meet on its loopback."""

import json
import socket
import subprocess

import pytest
from side_by_side import free_ports

from memseg.cli.main import main
from memseg.levels import Recompute
from memseg.training.checkpoint import load_run
from processes import command, environment, hand_written_plan, largest_difference, memseg, streets

TWO = ["--nnodes", "2", "--node-rank", "0", "--master-addr", "127.0.0.1"]


def on_two(run, steps, plans, timeout=600, *, other_run=None):
    """The same command on two machines, but for the plan or the folder; what each printed, and its exit code."""
    (port,) = free_ports(1)
    meeting = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    line = ["train", *streets(steps), *meeting, "--json"]
    started = [
        subprocess.Popen(
            command(*line, "--plan", plan, "--out", (other_run or run) if rank else run),
            env=environment() | {"NODE_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, plan in enumerate(plans)
    ]
    try:
        told = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return [(process.returncode, *texts) for process, texts in zip(started, told, strict=True)]


def test_two_machines_learn_what_one_process_learns(single_run, tmp_path):
    # The first has one stage of both replicas and one of the second, so they differ in their numbers of processes.
    plan = hand_written_plan(
        tmp_path / "plan.json", 2, shares=(1, 1), order=[(0, 0), (1, 0), (1, 1), (0, 1)], nodes=[0, 0, 0, 1]
    )
    run = tmp_path / "run"
    steps = load_run(single_run)[0].schedule.steps
    (code, result, stderr), (other_code, other_result, other_stderr) = on_two(run, steps, [plan, plan])
    assert code == 0, stderr
    assert other_code == 0, other_stderr
    assert json.loads(result) == json.loads(other_result) == json.loads((run / "result.json").read_text())
    assert len(json.loads(result)["cards"]) == 4
    assert largest_difference(run, single_run) < 1e-9


def test_machines_with_different_plans_say_so_and_end(tmp_path):
    plans = [
        hand_written_plan(tmp_path / f"{level}.json", shares=(1, 1), nodes=[0, 1], recompute=level)
        for level in (Recompute.NONE, Recompute.UNITS)
    ]
    for code, result, stderr in on_two(tmp_path / "run", 2, plans):
        assert (code, result) == (2, "")
        assert "Traceback" not in stderr
        assert stderr.splitlines()[-1].startswith(
            "memseg train: all machines must have the same recipe and plan, but machine 1 has others than machine 0; "
        )


def test_machines_that_do_not_share_the_run_folder_say_so_and_end(tmp_path):
    plan = hand_written_plan(tmp_path / "plan.json", shares=(1, 1), nodes=[0, 1])
    for code, result, stderr in on_two(tmp_path / "run", 2, [plan, plan], other_run=tmp_path / "other"):
        assert (code, result) == (2, "")
        assert "Traceback" not in stderr
        assert "must be on a file system that all machines share; here there is no" in stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--node-rank", "1"], "--node-rank is for several machines; say how many: --nnodes 2"),
        (["--master-port", "1234"], "--master-port is for several machines"),
        (["--nnodes", "0"], "--nnodes must be at least 1, got 0"),
        (["--nnodes", "2", "--node-rank", "2"], "the number of this machine must be 0 to 1 with --nnodes 2, got 2"),
        (["--nnodes", "2", "--node-rank", "-1"], "the number of this machine must be 0 to 1 with --nnodes 2, got -1"),
        (
            ["--nnodes", "2", "--master-addr", "there"],
            "needs the number of this machine; give --node-rank",
        ),
        (["--nnodes", "2", "--node-rank", "0"], "2 machines need to find machine 0; give its address: --master-addr"),
        ([*TWO, "--master-port", "70000"], "--master-port must be 1 to 65535, got 70000"),
        (TWO, "the plan is for 1 machine, --nnodes says 2; give --nnodes 1, or make a plan for 2"),
    ],
)
def test_contradictory_machines_are_refused_before_anything_starts(arguments, told, tmp_path, capsys, monkeypatch):
    for name in ("NODE_RANK", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    plan = hand_written_plan(tmp_path / "plan.json")
    run = tmp_path / "run"
    assert main(["train", *streets(2), "--plan", str(plan), "--out", str(run), *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1
    assert not run.exists()


def test_machines_that_cannot_meet_say_where_they_tried_to(tmp_path):
    plan = hand_written_plan(tmp_path / "plan.json", shares=(1, 1), nodes=[0, 1])
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = memseg("train", *streets(2), "--plan", plan, "--out", tmp_path / "run", *TWO, "--master-port", port)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    told = f"memseg train: machine 0 of 2 did not meet the others at 127.0.0.1:{port} ("
    assert done.stderr.splitlines()[-1].startswith(told)


def test_a_plan_for_two_machines_is_not_run_on_one(tmp_path, capsys):
    plan = hand_written_plan(tmp_path / "plan.json", shares=(1, 1), nodes=[0, 1])
    assert main(["train", *streets(2), "--plan", str(plan), "--out", str(tmp_path / "run")]) == 2
    assert "the plan is for 2 machines, --nnodes says 1; give --nnodes 2" in capsys.readouterr().err
