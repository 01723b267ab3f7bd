"""Rebuilding a whole segment: keep its inputs, run its forward again in backward.

torch.utils.checkpoint does this, except that batch norm would count the batch twice (pytorch/pytorch#96136); here the
second run happens inside `statistics_paused`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Self

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memseg.nn.batch_norm import statistics_paused


class _StatisticsPaused(ExitStack):
    """`statistics_paused` that may be entered again: a retained graph is rebuilt in every backward."""

    def __enter__(self) -> Self:
        self.enter_context(statistics_paused())
        return self


def _contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    return nullcontext(), _StatisticsPaused()


def recompute(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), keeping only the inputs for backward, which runs the function a second time.

    Random state is restored for the second run, running statistics are left alone in it.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=_contexts)
