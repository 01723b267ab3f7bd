"""One training step as something that can be run: on fake tensors to be traced, on real ones to be measured.

A step is more than a model: the loss, the optimizer, the batch and the precision decide its memory too. A `Job` holds
them all, made and ready; `run_step` runs it, the same for everybody. What a Job is made of is made where it is made:
under a fake mode everything is fake. So predictions and measurements take a function that makes the Job.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memseg.errors import UnknownNameError
from memseg.levels import Precision, Recompute
from memseg.nn.precision import computing
from memseg.profiling.timeline import Phase

LOSS = "loss"
"""The name of the loss among the layers."""

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def fused_adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam in one kernel: two moments for each parameter, and no temporaries on either device."""
    return torch.optim.Adam(parameters, lr=5e-4, fused=True)


_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters, **kind: torch.optim.SGD(parameters, lr=1e-3, **kind),
    "momentum": lambda parameters, **kind: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, **kind),
    "adam": lambda parameters, **kind: torch.optim.Adam(parameters, lr=1e-3, **kind),
    "adamw": lambda parameters, **kind: torch.optim.AdamW(parameters, lr=1e-3, **kind),
}
_KERNELS: dict[str, dict[str, bool]] = {
    "": {},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "loop": {"foreach": False},
}


def optimizer_names() -> list[str]:
    """Names that `named_optimizer` takes.

    >>> optimizer_names()[:4]
    ['sgd', 'sgd-fused', 'sgd-foreach', 'sgd-loop']
    """
    return [f"{name}-{kernel}" if kernel else name for name in _OPTIMIZERS for kernel in _KERNELS]


def named_optimizer(name: str) -> OptimizerFactory:
    """An optimizer by name: sgd, momentum (SGD with it), adam, adamw; with torch's choice of kernels or one's own.

    Args:
        name: Such as "adam", "adam-fused" (one kernel), "adam-foreach" (kernels over lists of parameters, with
            temporaries as large as all of them), "adam-loop" (parameter by parameter).

    Raises:
        UnknownNameError: not one of `optimizer_names`.
    """
    if name not in optimizer_names():
        raise UnknownNameError("optimizer", name, optimizer_names())
    base, _, kernel = name.partition("-")
    return lambda parameters: _OPTIMIZERS[base](parameters, **_KERNELS[kernel])


@dataclass(frozen=True)
class Job:
    """A training step, ready to run."""

    name: str
    model: nn.Module
    compute: Callable[[], Any]
    """Forward of the model on the batch: what it returns."""
    loss: Callable[[Any], Any]
    """Of what the model returned, a scalar."""
    inputs: tuple[Tensor, ...]
    """The batch: all that `compute` and `loss` read beside the model."""
    layers: tuple[tuple[str, nn.Module], ...]
    """Modules whose names are told, in order, "block1" before "block1.conv"."""
    optimizer: torch.optim.Optimizer | None
    loss_name: str = ""
    """What reports call it."""
    levels: Mapping[str, tuple[Recompute, ...]] = field(default_factory=dict)
    """Of each segment, the recompute levels that it has."""
    precision: Precision = Precision.FLOAT32
    accumulation: int = 1
    """Batches whose gradients are added up before the optimizer steps."""
    backward: Callable[[Any], None] = Tensor.backward
    """Of what `loss` returned; for a stage that ends without one, of its outputs."""
    buffers: tuple[Tensor, ...] = ()
    """In which tensors of other cards arrive, there all step."""
    keep_gradients: bool = False
    """Whether gradients are filled with zeros after a step instead of being freed: zero_grad(set_to_none=False)."""
    keep_output: bool = False
    """Whether what the model returned lives through backward, as where a training loop gives it a name."""


def run_batch(
    job: Job,
    *,
    begin: Callable[[Phase], object] = lambda phase: None,
    layer: Callable[[str], AbstractContextManager[object]] = lambda name: nullcontext(),
) -> Tensor | None:
    """Forward and backward of one batch; the loss, without a graph.

    Args:
        job: What to run.
        begin: Called as each phase begins.
        layer: A context for what belongs to a layer that is no module.
    """
    begin(Phase.FORWARD)
    with computing(job.precision, "cpu"):
        output = job.compute()
        with layer(LOSS):
            loss = job.loss(output)
            # What a stage passes on is no loss.
            if job.accumulation > 1 and isinstance(loss, Tensor):
                loss = loss / job.accumulation
        if not job.keep_output:
            del output
    begin(Phase.BACKWARD)
    job.backward(loss)
    return loss.detach() if isinstance(loss, Tensor) else None


def run_step(job: Job) -> None:
    """A whole step: all its batches, and the optimizer."""
    if job.optimizer is not None:
        job.optimizer.zero_grad(set_to_none=not job.keep_gradients)
    for _ in range(job.accumulation):
        run_batch(job)
    if job.optimizer is not None:
        job.optimizer.step()
    else:
        job.model.zero_grad(set_to_none=True)
