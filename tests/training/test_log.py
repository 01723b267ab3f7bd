"""The log of a run that is killed and resumed."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from memseg.training.log import EVENTS_FOLDER, METRICS_FILE, MetricsLog, read_metrics


def test_lines_are_plain_json_even_where_a_value_is_not_finite(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 0.5, "lr": 1e-3})
        log.write(2, {"loss": float("nan")})
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert lines == ['{"step": 1, "loss": 0.5, "lr": 0.001}', '{"step": 2, "loss": null}']


def test_resuming_cuts_the_torn_line_and_the_steps_that_come_again(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, 8)) + '{"step": 8, "lo')
    with MetricsLog(tmp_path, resume_step=5) as log:
        assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
        log.write(6, {"loss": 0.25})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    assert read_metrics(tmp_path)[-1] == {"step": 6, "loss": 0.25}
    assert sorted(file.name for file in tmp_path.iterdir()) == [METRICS_FILE, EVENTS_FOLDER]


def test_what_was_logged_survives_a_kill(tmp_path):
    script = (
        "import pathlib, sys, time; from memseg.training.log import MetricsLog\n"
        "log = MetricsLog(pathlib.Path(sys.argv[1])); log.write(1, {'loss': 1.0}); print('logged', flush=True)\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "logged\n"
        os.kill(process.pid, signal.SIGKILL)
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": float(step)})
    with MetricsLog(tmp_path, resume_step=1) as log:
        log.write(2, {"loss": 20.0})
    events = EventAccumulator(str(tmp_path / EVENTS_FOLDER)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]


def test_a_disk_that_refuses_a_line_is_named_with_the_folder_of_the_run(tmp_path):
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsLog(tmp_path) as log:
        # As on a full disk: no file may grow beyond 10 bytes; the system answers EFBIG.
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, most))
        try:
            with pytest.raises(OSError, match=f"File too large: '{tmp_path}'"):
                log.write(1, {"loss": 0.5})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
