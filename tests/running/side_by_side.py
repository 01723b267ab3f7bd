"""Many runs in a few processes, for loading torch takes longer than a small run.

Each process takes its rank's part in one run after the other, as `memseg train` would have started it.
"""

import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

# Beside this folder, where pytest finds it and Python does not.
sys.path.append(str(Path(__file__).parents[1]))

from memseg.cli.worker import ERROR_FILE
from memseg.cli.worker import main as work
from memseg.planning import load_plan
from memseg.training.checkpoint import PLAN_FILE, write_run
from processes import environment


def prepare(folder, recipe, write_plan):
    """A run folder, as `memseg train` makes it; `write_plan` is told where to."""
    write_run(folder, recipe, recipe.data.open_train().classes)
    write_plan(folder / PLAN_FILE)
    return folder


def carry_out(folders, logs, timeout=1200):
    """Carry out the runs in folders that are prepared, all of them successfully.

    Args:
        folders: Of the runs.
        logs: A folder for what processes print.
        timeout: Seconds for all of them together.
    """
    folders = list(folders)
    count = max(len(load_plan(folder / PLAN_FILE).cards) for folder in folders)
    ports = ",".join(map(str, free_ports(len(folders))))
    with ExitStack() as stack:
        started = []
        for rank in range(count):
            log = stack.enter_context((logs / f"rank{rank}.txt").open("w"))
            line = [sys.executable, __file__, str(rank), ports, *map(str, folders)]
            started.append(stack.enter_context(subprocess.Popen(line, env=environment(), stdout=log, stderr=log)))
            # Where one fails, the others would wait for it.
            stack.callback(started[-1].kill)
        end = time.monotonic() + timeout
        while any(process.poll() is None for process in started) and not any(process.poll() for process in started):
            assert time.monotonic() < end, "the runs take too long"
            time.sleep(0.05)
        failed = [rank for rank, process in enumerate(started) if process.poll()]
    told = [(logs / f"rank{rank}.txt").read_text()[-4000:] for rank in failed]
    told += [path.read_text() for folder in folders for path in folder.glob(ERROR_FILE)]
    assert not failed, "\n".join(told)


def free_ports(count):
    """Of this machine, each its own."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def main():
    """One rank: RANK PORT,PORT,... FOLDER..."""
    rank = int(sys.argv[1])
    for port, folder in zip(sys.argv[2].split(","), sys.argv[3:], strict=True):
        processes = len(load_plan(Path(folder) / PLAN_FILE).cards)
        if rank >= processes:
            continue
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "GROUP_RANK": "0",
        }  # fmt: skip
        sys.argv = ["worker", folder, "one-plan"]
        if code := work():
            sys.exit(code)


if __name__ == "__main__":
    main()
