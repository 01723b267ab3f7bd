"""One process per card, started and watched by torch.distributed.run."""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

_MMAP_THRESHOLD_BYTES = 16 * 2**20
"""Tensors from here on get pages of their own, which go back to the system when they are freed; the bands that layers
walk over are smaller, and come from the heap again and again. By default the heap keeps what was freed, up to 32 MiB
apiece."""

_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def environment() -> dict[str, str]:
    """What our processes get unless the user has set it: it must be there before they start."""
    return {
        "OMP_NUM_THREADS": str(os.cpu_count() or 1),
        # Threads that wait for each other by spinning starve the other processes of the same cores.
        "OMP_WAIT_POLICY": "PASSIVE",
        "MALLOC_MMAP_THRESHOLD_": str(_MMAP_THRESHOLD_BYTES),
        # Fresh pages of 2 MiB where the system gives them: 512 times fewer page faults.
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        # torch's profiler, which counts a CPU card's allocations, would log its progress.
        "KINETO_LOG_LEVEL": "99",
    }


def launch(module: str, arguments: Sequence[str], *, processes: int) -> int:
    """Run `python -m module *arguments` once per rank on this machine and wait for all of them.

    When one ends badly the others are ended too. A process may use every core: the stages of a split take turns.

    Args:
        module: With a main that exits by sys.exit.
        arguments: The same for all ranks.
        processes: How many.

    Returns:
        0, or the exit code of the process that failed first.
    """
    for name, value in environment().items():
        os.environ.setdefault(name, value)
    options = ["--standalone", f"--nproc-per-node={processes}", "--module", module, *arguments]
    # Our processes say themselves what went wrong; the agent's account of it would drown their line.
    prefix = "torch.distributed.elastic"
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith(prefix)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        run(get_args_parser().parse_args(options))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    return 0


def end_with_parent() -> None:
    """Have the system end this process when the one that launched it dies, however that happens.

    Each launched process leads a session of its own, so a launcher that is killed outright takes none with it: they
    would train on, and write into the run folder beside those that resume the run.

    Source: PR_SET_PDEATHSIG in prctl(2). Only Linux has it; elsewhere nothing is done.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
