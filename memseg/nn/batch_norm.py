"""Batch norm with a mode, and with statistics that count each batch once.

torch's BatchNorm2d forgets that it is frozen at the next `.train()`, and counts a batch twice when a forward is
rebuilt for backward (pytorch/pytorch#96136). This one keeps its mode, and holds still inside `statistics_paused`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memseg.levels import NormMode

_paused: ContextVar[bool] = ContextVar("memseg_statistics_paused", default=False)


@contextmanager
def statistics_paused() -> Iterator[None]:
    """Inside, no BatchNorm2d of ours updates its running statistics: a forward that is rebuilt has been counted."""
    token = _paused.set(True)
    try:
        yield
    finally:
        _paused.reset(token)


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with a NormMode; the same state dict.

    Args:
        num_features: Channels C of the (N, C, H, W) input.
        norm: `batch` behaves as torch's. `frozen` normalises with the running statistics, in training too, and its
            affine takes no gradient; it stays so after `.train()`.
        eps: Added to the variance.
        momentum: Weight of the newest batch in the running statistics.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(
        self, num_features: int, *, norm: NormMode = NormMode.BATCH, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.norm = norm
        if norm is NormMode.FROZEN:
            self.weight.requires_grad_(False)
            self.bias.requires_grad_(False)

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether a forward now would normalise with the statistics of its batch."""
        return self.training and self.norm is NormMode.BATCH

    def forward(self, x: Tensor) -> Tensor:
        """Normalised (N, C, H, W), kept by autograd as torch does."""
        if not self.uses_batch_statistics:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        mean, var = self.running_mean, self.running_var
        if _paused.get():
            # Copies take the update: torch.utils.checkpoint wants the second run to save as many tensors as the first.
            mean, var = mean.clone(), var.clone()
        else:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum, self.eps)

    @torch.no_grad()
    def follow(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Move the running statistics towards a batch's mean and biased variance (C,), over `count` values each.

        A layer that computes its own statistics calls this once per forward.
        """
        if not self.uses_batch_statistics or _paused.get():
            return
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * (count / (count - 1)), self.momentum)

    def extra_repr(self) -> str:
        return f"{self.num_features}, norm={self.norm}, eps={self.eps}, momentum={self.momentum}"
