"""One process per card, started and watched by torch.distributed.run, on one machine or on several.

With several, each starts its own processes. The first one keeps the store where all of them meet; the others look for
it there until it is up, so the order in which the commands are given does not matter.
"""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

_MMAP_THRESHOLD_BYTES = 16 * 2**20
"""Tensors from here on get pages of their own, which go back to the system when they are freed; the bands that layers
walk over are smaller, and come from the heap again and again. By default the heap keeps what was freed, up to 32 MiB
apiece."""

_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""

_LAUNCHER = "MEMSEG_LAUNCHER"
"""Environment variable of a launched process: the id of the one that launched it."""

_PATIENCE_SECONDS = 1800
"""How long machines wait for each other: the first may still be planning when the others have begun."""


@dataclass(frozen=True)
class Nodes:
    """The machines of a run, and which of them this is."""

    count: int = 1
    rank: int = 0
    address: str = ""
    """Of the first one, for the others to find it; not needed with a single one."""
    port: int = 29500
    """On the first one; torch's default."""

    @property
    def is_first(self) -> bool:
        """Whether this one writes the run folder."""
        return self.rank == 0


def environment(at_once: int = 1) -> dict[str, str]:
    """What our processes get unless the user has set it: it must be there before they start.

    Args:
        at_once: How many of them compute at the same time, and so share the cores.
    """
    return {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // at_once)),
        # Threads that wait for each other by spinning starve the other processes of the same cores.
        "OMP_WAIT_POLICY": "PASSIVE",
        "MALLOC_MMAP_THRESHOLD_": str(_MMAP_THRESHOLD_BYTES),
        # Fresh pages of 2 MiB where the system gives them: 512 times fewer page faults.
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        # CUDA would count the fastest card first; NVML, and so a plan, counts in the order of slots.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        # torch's profiler, which counts a CPU card's allocations, would log its progress.
        "KINETO_LOG_LEVEL": "99",
    }


def launch(
    module: str, arguments: Sequence[str], *, processes: int, at_once: int = 1, nodes: Nodes | None = None
) -> int:
    """Run `python -m module *arguments` once per rank and wait for all of this machine's.

    When one ends badly the others of its machine are ended too; on other machines they lose their peer.

    Args:
        module: With a main that exits by sys.exit.
        arguments: The same for all ranks.
        processes: How many on this machine. Ranks count through the machines in order.
        at_once: How many of those compute at the same time; the stages of a split may take turns.
        nodes: The machines; None for this one alone.

    Returns:
        0, or the exit code of the process that failed first.

    Raises:
        ConnectionError: the machines did not find each other.
    """
    for name, value in environment(at_once).items():
        os.environ.setdefault(name, value)
    os.environ[_LAUNCHER] = str(os.getpid())
    options = [*_meeting(nodes or Nodes()), f"--nproc-per-node={processes}", "--module", module, *arguments]
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
    except DistError as error:
        raise ConnectionError(str(error).splitlines()[0]) from None
    finally:
        del os.environ[_LAUNCHER]
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    return 0


def _meeting(nodes: Nodes) -> list[str]:
    """Where processes meet, as options of torch.distributed.run."""
    if nodes.count == 1:
        return ["--standalone"]
    return [
        f"--nnodes={nodes.count}",
        f"--node-rank={nodes.rank}",
        f"--master-addr={nodes.address}",
        f"--master-port={nodes.port}",
        f"--rdzv-conf=timeout={_PATIENCE_SECONDS}",
    ]


def end_with_parent() -> None:
    """Have the system end this process when the one that launched it dies, however that happens, or has died already.

    Each launched process leads a session of its own, so a launcher that is killed outright takes none with it: they
    would train on, and write into the run folder beside those that resume the run.

    Source: PR_SET_PDEATHSIG in prctl(2). Only Linux has it; elsewhere nothing is done.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # Loading torch takes seconds: whoever died in them sends no signal any more.
        if os.getppid() != int(os.environ.get(_LAUNCHER, os.getppid())):
            os.kill(os.getpid(), signal.SIGKILL)
