"""The training step of any module: a user's, a library's, real, on the meta device, or made by a function."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from memseg.errors import InputError, MemsegError, UnknownNameError
from memseg.levels import Precision, Recompute
from memseg.profiling.jobs.fake import fake_batch, fake_module, real_batch, real_module
from memseg.profiling.jobs.job import Job, OptimizerFactory

Loss = Callable[..., Tensor]

MEAN = "mean"
CROSS_ENTROPY = "cross-entropy"


def foreign_job(
    model: nn.Module | Callable[[], nn.Module],
    inputs: Any = None,
    target: Any = None,
    *,
    loss: str | Loss | None = None,
    optimizer: OptimizerFactory | None,
    precision: Precision = Precision.FLOAT32,
    accumulation: int = 1,
    keep_gradients: bool = False,
    keep_output: bool = True,
    real: bool = False,
    name: str | None = None,
) -> Job:
    """The step; arguments as for `memseg.profile`.

    Args:
        real: Make it of real tensors; else it is called under a fake mode.

    Raises:
        InputError: the model cannot be copied, or has nothing to train.
        UnknownNameError: no loss of that name.
    """
    made = model if isinstance(model, nn.Module) else _call(model, real=real)
    if isinstance(made, tuple) and len(made) in (2, 3):
        made, inputs, *others = made
        # What is asked for holds; else the function's own loss, or the mean.
        loss = loss or (others[0] if others else None)
    loss = loss or MEAN
    if not isinstance(made, nn.Module):
        raise InputError(
            f"a model must be a torch.nn.Module or a function that makes one, got {type(made).__name__}; "
            "a function may also return a tuple of a model, its inputs and its loss"
        )
    dtype = torch.float64 if precision is Precision.FLOAT64 else None
    # What a function has made for real is nobody else's.
    twin = made.to(dtype) if real and made is not model else _twin(made, dtype, real=real)
    twin.train()
    inputs, target = (_batch_twin(value, dtype, real=real) for value in (inputs, target))
    compute_loss = _loss(loss, dtype, real=real)
    targets: tuple[Any, ...] = () if target is None else target if isinstance(target, tuple) else (target,)
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    if not trained:
        raise InputError(
            f"{type(twin).__name__} has no parameter that requires a gradient, so there is no step to profile"
        )

    if inputs is None:
        raise InputError("the model needs inputs: a tensor, a tuple of arguments or a dict of keyword arguments")

    def compute() -> Any:
        if isinstance(inputs, Mapping):
            return twin(**inputs)
        return twin(*inputs) if isinstance(inputs, tuple) else twin(inputs)

    return Job(
        name=name or _name(model, twin),
        loss_name=loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__),
        model=twin,
        compute=compute,
        loss=lambda output: compute_loss(output, *targets),
        inputs=tuple(leaf for leaf in tree_leaves((inputs, targets)) if isinstance(leaf, Tensor)),
        layers=tuple((layer, module) for layer, module in twin.named_modules() if layer),
        optimizer=optimizer(trained) if optimizer else None,
        levels=dict(_levels(twin)),
        precision=precision,
        accumulation=accumulation,
        keep_gradients=keep_gradients,
        keep_output=keep_output,
    )


def mean_of_outputs(output: Any, *_: Any) -> Tensor:
    """The sum of the means of all outputs that were computed from parameters: a loss that takes next to no memory.

    Raises:
        InputError: there are none.
    """
    means = [tensor.mean() for tensor in _differentiable(output)]
    return torch.stack(means).sum() if len(means) > 1 else means[0]


def cross_entropy_of_outputs(output: Any, *targets: Tensor) -> Tensor:
    """The sum of the cross-entropies of all outputs (N, K, ...), against one target (N, ...) or made-up ones.

    Raises:
        InputError: an output has no class dimension.
    """
    losses = []
    for logits in _differentiable(output):
        if logits.dim() < 2:
            raise InputError(
                f"cross-entropy needs outputs (N, K, ...), got {tuple(logits.shape)}; give a loss of your own"
            )
        made_up = torch.zeros(logits.shape[0], *logits.shape[2:], dtype=torch.long)
        losses.append(F.cross_entropy(logits, targets[0] if targets else made_up))
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


_LOSSES: dict[str, Loss] = {MEAN: mean_of_outputs, CROSS_ENTROPY: cross_entropy_of_outputs}


def _differentiable(output: Any) -> list[Tensor]:
    found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not found:
        raise InputError("the model returns no tensor that depends on its parameters; give a loss that makes one")
    return found


def _levels(model: nn.Module) -> Iterator[tuple[str, tuple[Recompute, ...]]]:
    """Modules of ours that have levels, and the model's children, which `memseg.nn.recompute` rebuilds whole."""
    for name, module in model.named_modules():
        if hasattr(module, "levels"):
            yield name, tuple(module.levels)
        elif name and "." not in name:
            yield name, (Recompute.NONE, Recompute.SEGMENT)


def _loss(loss: str | Loss, dtype: torch.dtype | None, *, real: bool) -> Loss:
    if isinstance(loss, str):
        if loss not in _LOSSES:
            raise UnknownNameError("loss", loss, _LOSSES)
        return _LOSSES[loss]
    if isinstance(loss, nn.Module):
        return _twin(loss, dtype, real=real)
    return loss


def _call(make: Any, *, real: bool) -> Any:
    """What a user's function makes: without memory where it can be made so and need not be `real`, else for real.

    Not under the fake mode: constructors copy layers, convert them and read values, which fake tensors refuse.
    """
    if not callable(make):
        raise InputError(f"a model must be a torch.nn.Module or a function that makes one, got {type(make).__name__}")
    with unset_fake_temporarily():
        if not real:
            with suppress(Exception, SystemExit), torch.device("meta"):
                return make()
        try:
            return make()
        except MemsegError:
            raise
        except (Exception, SystemExit) as error:
            name = getattr(make, "__name__", "the function")
            raise InputError(
                f"{name}, which should make the model, fails with {type(error).__name__}: "
                f"{' '.join(str(error).split())}; it is called without arguments"
            ) from error


def _twin(module: nn.Module, dtype: torch.dtype | None, *, real: bool) -> nn.Module:
    if not real:
        return fake_module(module, dtype)
    copied = real_module(module)
    return copied.to(dtype) if dtype else copied


def _batch_twin(batch: Any, dtype: torch.dtype | None, *, real: bool) -> Any:
    return real_batch(batch, dtype) if real else fake_batch(batch, dtype)


def _name(model: Any, twin: nn.Module) -> str:
    name = getattr(model, "__name__", "")
    return name if name and name != "<lambda>" else type(twin).__name__
