"""Batch norm with a mode, and with statistics that count each batch once.

torch's BatchNorm2d forgets that it is frozen at the next `.train()`, counts a batch twice when a forward is rebuilt for
backward (pytorch/pytorch#96136), and its SyncBatchNorm does not run on CPUs. This one keeps its mode, holds still
inside `statistics_paused`, and syncs over any process group, gloo's included.

Source: Ioffe and Szegedy, arXiv:1502.03167; statistics of several parts together: Chan, Golub and LeVeque, 1979.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from memseg.levels import NormMode
from memseg.nn.autograd import HALF_DTYPES, once_differentiable, refuse_scripting, wide_dtype

_aten = torch.ops.aten
_paused: ContextVar[bool] = ContextVar("memseg_statistics_paused", default=False)


@contextmanager
def statistics_paused() -> Iterator[None]:
    """Inside, no BatchNorm2d of ours updates its running statistics: a forward that is rebuilt has been counted."""
    token = _paused.set(True)
    try:
        yield
    finally:
        _paused.reset(token)


class Statistics(NamedTuple):
    """What a norm normalises with: mean and biased variance, each (C,), and over how many values they were taken."""

    mean: Tensor
    var: Tensor
    values: Tensor | int
    """Over all replicas: a 0-dim tensor. 0: fixed numbers, through which no gradient flows."""


def batch_statistics(x: Tensor) -> Statistics:
    """Of the channels of (N, C, H, W), in float32 or better; of one value the variance is 0."""
    running: tuple[Tensor | None, Tensor | None] = (None, None)
    if x.dtype in HALF_DTYPES:
        # With running statistics in float32, which a momentum of 0 leaves alone, torch accumulates in float32.
        zeros = x.new_zeros(x.shape[1], dtype=torch.float32)
        running = (zeros, zeros.clone())
    mean, var = _aten.batch_norm_update_stats(x, *running, 0.0)
    return Statistics(mean, var, x.numel() // x.shape[1])


def join_statistics(means: Tensor, variances: Tensor, counts: Tensor) -> Statistics:
    """Statistics of the union of R parts, of means and variances (R, C) over counts (R, 1)."""
    total = counts.sum()
    share = counts / total
    mean = (share * means).sum(0)
    return Statistics(mean, (share * (variances + (means - mean).square())).sum(0), total)


def sync_statistics(local: Statistics, group: distributed.ProcessGroup) -> Statistics:
    """Of all replicas of a group, whose batches may differ in size: one all-gather of 2 C + 1 numbers."""
    channels = local.mean.numel()
    count = local.mean.new_tensor([local.values])
    mine = torch.cat([local.mean, local.var, count])
    parts = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, mine, group=group)
    stacked = torch.stack(parts)
    return join_statistics(stacked[:, :channels], stacked[:, channels : 2 * channels], stacked[:, 2 * channels :])


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with a NormMode; the same state dict.

    Args:
        num_features: Channels C of the (N, C, H, W) input.
        norm: `batch` behaves as torch's. `frozen` normalises with the running statistics, in training too, and its
            affine takes no gradient; it stays so after `.train()`. `synced` normalises with the statistics of all
            replicas of a process group; their batches may differ in size. Gradients of the affine stay local, as in
            torch's SyncBatchNorm: DistributedDataParallel averages them.
        eps: Added to the variance.
        momentum: Weight of the newest batch in the running statistics.

    A `synced` norm uses `process_group`, an attribute; None, which it is at first, stands for the default group, if one
    is initialised. Without a group, and in one of a single process, the norm behaves as `batch`.
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
        self.process_group: distributed.ProcessGroup | None = None
        if norm is NormMode.FROZEN:
            self.weight.requires_grad_(False)
            self.bias.requires_grad_(False)

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether a forward now would normalise with the statistics of its batch."""
        return self.training and self.norm is not NormMode.FROZEN

    @property
    def replicas(self) -> distributed.ProcessGroup | None:
        """The group to sync over; None where there is nothing to sync."""
        if self.norm is not NormMode.SYNCED or not distributed.is_available():
            return None
        group = self.process_group or (distributed.group.WORLD if distributed.is_initialized() else None)
        return group if group is not None and distributed.get_world_size(group) > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalised (N, C, H, W), kept by autograd as torch does."""
        if not self.uses_batch_statistics:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        if self.replicas is not None:
            statistics = self.statistics(x)
            out: Tensor = _SyncedNorm.apply(x, self.weight, self.bias, *statistics, self.eps, self.replicas)
            return out
        mean, var = self.running_mean, self.running_var
        if _paused.get():
            # Copies take the update: torch.utils.checkpoint wants the second run to save as many tensors as the first.
            mean, var = mean.clone(), var.clone()
        elif not is_fx_symbolic_tracing():  # There it would count at once, and never again.
            self.num_batches_tracked.add_(1)
        return F.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum, self.eps)

    @torch.no_grad()
    def statistics(self, x: Tensor) -> Statistics:
        """What to normalise x (N, C, H, W) with now; the running statistics follow a batch.

        A layer that normalises by itself calls this once per forward.
        """
        if not self.uses_batch_statistics:
            return self.running_statistics
        return self.follow(self.join_replicas(batch_statistics(x)))

    @property
    def running_statistics(self) -> Statistics:
        """The running ones, as fixed numbers; in float32 or better, of a module in half precision too."""
        wide = wide_dtype(self.running_mean.dtype)
        return Statistics(self.running_mean.to(wide), self.running_var.to(wide), 0)

    def join_replicas(self, statistics: Statistics) -> Statistics:
        """This replica's statistics joined with those of the others, if this norm is synced.

        Raises:
            ValueError: there is one value per channel in all, so that no variance exists (as torch's batch norm does).
        """
        group = self.replicas
        if group is not None:
            return sync_statistics(statistics, group)
        if statistics.values == 1:
            raise ValueError("batch statistics need more than 1 value per channel, got 1: one image's map of 1x1")
        return statistics

    @torch.no_grad()
    def follow(self, statistics: Statistics) -> Statistics:
        """Move the running statistics towards those of a batch, and hand these back."""
        if self.uses_batch_statistics and not _paused.get():
            mean, var, count = statistics
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), self.momentum)
        return statistics

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy that syncs over the same group, which itself cannot be copied."""
        memo[id(self.process_group)] = self.process_group
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))  # type: ignore[no-untyped-call]
        return twin

    def __prepare_scriptable__(self) -> None:
        refuse_scripting(self)

    def extra_repr(self) -> str:
        return f"{self.num_features}, norm={self.norm}, eps={self.eps}, momentum={self.momentum}"


def check_norm(norm: nn.Module) -> None:
    """Do nothing for a norm that the layers' own backward knows.

    Raises:
        TypeError: it is another module, such as torch's SyncBatchNorm.
    """
    if not isinstance(norm, BatchNorm2d):
        raise TypeError(
            f"norms must be memseg.nn.BatchNorm2d, got {type(norm).__name__}; "
            "where SyncBatchNorm.convert_sync_batchnorm put it, leave that out and set each norm's `norm` to 'synced'"
        )


class _SyncedNorm(torch.autograd.Function):
    """Batch norm with statistics of several replicas, for the plain network."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
        group: distributed.ProcessGroup,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.group = eps, group
        return F.batch_norm(x, mean, var, weight.to(mean.dtype), bias.to(mean.dtype), False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        std_inverse = (var + ctx.eps).rsqrt()
        centred = (x - mean.view(-1, 1, 1)) * std_inverse.view(-1, 1, 1)
        wide = grad.to(centred.dtype)
        sums = torch.stack([wide.sum((0, 2, 3)), (wide * centred).sum((0, 2, 3))])
        total = sums.clone()
        distributed.all_reduce(total, group=ctx.group)
        mean_grad, mean_moment = (total / count).unbind()
        grad_x = wide - mean_grad.view(-1, 1, 1) - centred * mean_moment.view(-1, 1, 1)
        grad_x *= (weight * std_inverse).view(-1, 1, 1)
        return grad_x.to(x.dtype), sums[1].to(weight.dtype), sums[0].to(weight.dtype), None, None, None, None, None
