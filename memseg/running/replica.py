"""One of several copies of a module, whose gradients are averaged over all copies.

DistributedDataParallel does it, in buckets that travel while backward goes on. With `gradient_as_bucket_view` the
gradients are views of the buckets, so that there is one copy of them and not two. But they only become so in the first
backward that is averaged; one that is not, as in all passes but the last of a step, makes a second copy. And after the
first one the buckets are made anew, in the order in which gradients arrived. So at first, until the final buckets hold
the gradients, every pass is averaged (a mean of equal numbers changes nothing), and gradients that lie elsewhere are
freed before the next step; from then on gradients stay where they are, and are set to zero.

    passes of a step   1           2           1           2
    averaged           yes         yes         no          yes
    gradients in       1st bucket  2nd bucket  2nd bucket  2nd bucket
"""

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

_UNTIL_SETTLED = 2
"""Averaged passes after which gradients are views of buckets that stay. Source: `DistributedDataParallel._pre_forward`
and Reducer::rebuild_buckets in torch/csrc/distributed/c10d/reducer.cpp, torch 2.14.1."""
_STRIDES_OF_1X1 = r"Grad strides do not match bucket view strides[\s\S]*grad\.sizes\(\) = \[\d+, \d+, 1, 1\]"
"""A warning about 1x1 convolutions, whose gradients lie as their weights do but for strides that are never taken.
Source: Reducer::check_grad_layout, which compares those too."""


class Replica:
    """A module and what averages its gradients.

    Args:
        module: Trained here; its copies must have the same weights, and do at first: they are sent from the first copy.
        group: Of the copies; None for a single one, whose gradients are its own.
    """

    def __init__(self, module: nn.Module, group: distributed.ProcessGroup | None) -> None:
        self._module, self._averaged = module, 0
        self._parallel: DistributedDataParallel | None = None
        if group is not None:
            warnings.filterwarnings("ignore", _STRIDES_OF_1X1, UserWarning)
            # DistributedDataParallel would send a flat copy of all of them.
            for tensor in (*module.parameters(), *module.buffers()):
                distributed.broadcast(tensor.detach(), group=group, group_src=0)
            self._parallel = DistributedDataParallel(
                module,
                process_group=group,
                forward_sync_buffers=False,
                gradient_as_bucket_view=True,
                init_sync=False,
            )

    @property
    def called(self) -> nn.Module:
        """What to call instead of the module, so that gradients are averaged."""
        return self._parallel or self._module

    def clear_gradients(self) -> None:
        """Before a step."""
        if self._averaged >= _UNTIL_SETTLED:
            torch._foreach_zero_([one.grad for one in self._module.parameters() if one.grad is not None])
        else:
            self._module.zero_grad(set_to_none=True)

    def begin_pass(self, *, last: bool) -> bool:
        """Whether gradients are to be averaged in the pass that begins.

        Args:
            last: Whether it is the last one of its step.
        """
        averages = self._parallel is not None and (last or self._averaged < _UNTIL_SETTLED)
        self._averaged += averages
        return averages

    def alone(self, *, unless: bool) -> AbstractContextManager[None]:
        """The context of a pass, forward and backward: inside, gradients are not averaged, `unless` they are to be."""
        return nullcontext() if unless or self._parallel is None else self._parallel.no_sync()
