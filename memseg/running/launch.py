"""One process per card, started and watched by torch.distributed.run."""

import logging
import os
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run


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
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    # torch's profiler, which counts a CPU card's allocations, would log its progress.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    options = ["--standalone", f"--nproc-per-node={processes}", "--module", module, *arguments]
    # Our processes say themselves what went wrong; the agent's account of it would drown their line.
    elastic = logging.getLogger("torch.distributed.elastic")
    level = elastic.level
    elastic.setLevel(logging.CRITICAL)
    try:
        run(get_args_parser().parse_args(options))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    finally:
        elastic.setLevel(level)
    return 0
