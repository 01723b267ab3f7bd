"""Memory that DistributedDataParallel adds to a replica: buckets in which gradients travel.

Gradients are copied into flat buckets, which are all-reduced while backward goes on. Together the buckets are one more
copy of all gradients, alive from the wrapping of the model on. With `gradient_as_bucket_view` the gradients are views
of the buckets, and there is no second copy.

Buckets are filled with parameters from the last to the first; a bucket is closed when it reaches its cap, 1 MiB for the
first and 25 MiB for the others, so it may be larger than that.

Source: torch/nn/parallel/distributed.py and torch/csrc/distributed/c10d/reducer.cpp (compute_bucket_assignment_by_size)
of torch 2.14.1.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memseg.errors import InputError

_FIRST_BUCKET_BYTES = 2**20
_BUCKET_MB = 25


@dataclass(frozen=True)
class DataParallel:
    """How a model is replicated.

    Raises:
        InputError: fewer than one replica, or a cap that is not positive.
    """

    replicas: int = 2
    """Processes, each with the whole model."""
    gradient_as_bucket_view: bool = False
    """As in DistributedDataParallel."""
    bucket_cap_mb: int | None = None
    """As in DistributedDataParallel, MiB; None for torch's 25, with a first bucket of 1."""

    def __post_init__(self) -> None:
        if self.replicas < 1 or (self.bucket_cap_mb is not None and self.bucket_cap_mb < 1):
            raise InputError(
                f"replicas and bucket_cap_mb must be at least 1, got {self.replicas} and {self.bucket_cap_mb}"
            )


def make_buckets(parameters: Iterable[nn.Parameter], settings: DataParallel) -> list[Tensor]:
    """Buckets for the gradients of parameters; with `gradient_as_bucket_view`, the gradients are made views of them."""
    buckets = []
    trained = [parameter for parameter in parameters if parameter.requires_grad][::-1]
    for dtype in {one.dtype: None for one in trained}:
        later = (settings.bucket_cap_mb or _BUCKET_MB) * 2**20
        cap, filled = later if settings.bucket_cap_mb else _FIRST_BUCKET_BYTES, 0
        members: list[nn.Parameter] = []
        for parameter in (one for one in trained if one.dtype is dtype):
            members.append(parameter)
            filled += parameter.nbytes
            if filled >= cap:
                buckets.append(_bucket(members, dtype, settings))
                cap, filled, members = later, 0, []
        if members:
            buckets.append(_bucket(members, dtype, settings))
    return buckets


def _bucket(members: list[nn.Parameter], dtype: torch.dtype, settings: DataParallel) -> Tensor:
    bucket = torch.zeros(sum(one.numel() for one in members), dtype=dtype)
    if settings.gradient_as_bucket_view:
        start = 0
        for one in members:
            one.grad = bucket[start : start + one.numel()].view(one.shape)
            start += one.numel()
    return bucket
