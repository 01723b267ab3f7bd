"""What `memseg train` shows: a panel on a terminal, lines elsewhere, and the terminal as it was afterwards."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import time

import pytest
from rich.console import Console

from memseg.cli.dashboard import Dashboard
from memseg.planning import load_plan
from memseg.training.recipe import load_recipe
from memseg.training.standing import Standing
from memseg.training.trainer import Score, StepReport
from processes import command, environment, hand_written_plan, streets

SHOWN, HIDDEN = "\x1b[?25h", "\x1b[?25l"


def report(step, total=4):
    return StepReport(step, total, loss=2.0 / step, lr=1e-3, seconds=0.5, images_per_second=4.0, grad_norm=None)


def shown(tmp_path, *, terminal, peaks=(None,)):
    """A whole run of 4 steps, 2 an epoch, with an evaluation after the second; what stood on the console."""
    recipe = load_recipe("streets_demo", ["train.evaluate_every=1", "train.early_stop=3"])
    plan = load_plan(hand_written_plan(tmp_path / "plan.json", predicted=2**20))
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with Dashboard(recipe, plan, (2, 4), lambda: peaks, console) as view:
        view.started(0, Standing())
        for step in range(1, 5):
            view.stepped(report(step))
            if step == 2:
                view.evaluating(1, 2)
                view.evaluated(2, Score(0.25, 0.5), Standing(2, 0.25, 0))
    return console.file.getvalue()


def test_a_terminal_gets_a_panel_with_the_last_state(tmp_path):
    text = shown(tmp_path, terminal=True, peaks=(2**19,))
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text[text.rindex("╭") :])
    for part in ("step 4 of 4", "0.5000", "25.00%", "at step 2", "512.0 KiB", "1.0 MiB", "4.00 GiB", "3 evaluations"):
        assert part in last
    assert text.rindex(SHOWN) > text.rindex(HIDDEN)


def test_a_file_gets_the_first_step_the_last_one_and_the_scores(tmp_path, capsys):
    assert shown(tmp_path, terminal=False) == ""
    assert capsys.readouterr().err.splitlines() == [
        "step 1/4  loss 2.0000  500.0 ms",
        "val mIoU 25.00%, pixel accuracy 50.00%, the best so far",
        "step 4/4  loss 0.5000  500.0 ms",
    ]


@pytest.fixture
def interrupted(tmp_path):
    """What a terminal was sent by a run that was interrupted once it had measured its memory, and the exit code."""
    plan = hand_written_plan(tmp_path / "plan.json", predicted=2**20)
    line = command("train", *streets(100_000), "--plan", plan, "--out", tmp_path / "run")
    ours, theirs = pty.openpty()
    text, interrupted = "", False
    with subprocess.Popen(line, stdout=theirs, stderr=theirs, env=environment() | {"TERM": "xterm"}) as process:
        os.close(theirs)
        end = time.monotonic() + 240
        while time.monotonic() < end and (part := read(ours)) is not None:
            text += part
            if not interrupted and re.search("step [3-9]", text):
                process.send_signal(signal.SIGINT)
                interrupted = True
        process.kill()
    os.close(ours)
    return text, process.returncode


def read(terminal):
    """What has come; None when the other end is closed."""
    if not select.select([terminal], [], [], 0.5)[0]:
        return ""
    try:
        return os.read(terminal, 65536).decode(errors="replace")
    except OSError:
        return None


def test_an_interrupted_run_leaves_the_terminal_with_its_cursor_below_the_panel(interrupted):
    text, code = interrupted
    assert "memseg train: streets_demo" in text
    assert text.rindex(SHOWN) > text.rindex(HIDDEN)
    after = text[text.rindex(SHOWN) :]
    assert "interrupted; go on with memseg train --resume" in after
    assert code == 130
