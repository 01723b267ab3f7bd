"""The training step of any module: a user's, a library's, real, on the meta device, or made by a function."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map

from memseg.errors import InputError, UnknownNameError
from memseg.levels import Precision, Recompute
from memseg.profiling.fake import fake_batch, fake_module, real_batch, real_module
from memseg.profiling.job import Job, OptimizerFactory

Loss = Callable[..., Tensor]

MEAN = "mean"
CROSS_ENTROPY = "cross-entropy"


def foreign_job(
    model: nn.Module | Callable[[], nn.Module],
    inputs: Any,
    target: Any = None,
    *,
    loss: str | Loss = MEAN,
    optimizer: OptimizerFactory | None,
    precision: Precision = Precision.FLOAT32,
    accumulation: int = 1,
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
    twin = _module(model, real=real).train()
    make_batch = real_batch if real else fake_batch
    inputs, target, loss = make_batch(inputs), make_batch(target), _loss(loss, real=real)
    if precision is Precision.FLOAT64:
        twin, inputs, target = twin.double(), _in_float64(inputs), _in_float64(target)
    targets: tuple[Any, ...] = () if target is None else target if isinstance(target, tuple) else (target,)
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    if not trained:
        raise InputError(
            f"{type(twin).__name__} has no parameter that requires a gradient, so there is no step to profile"
        )

    def compute() -> Any:
        if isinstance(inputs, Mapping):
            return twin(**inputs)
        return twin(*inputs) if isinstance(inputs, tuple) else twin(inputs)

    return Job(
        name=name or _name(model, twin),
        model=twin,
        compute=compute,
        loss=lambda output: loss(output, *targets),
        inputs=tuple(leaf for leaf in tree_leaves((inputs, targets)) if isinstance(leaf, Tensor)),
        layers=tuple((layer, module) for layer, module in twin.named_modules() if layer),
        optimizer=optimizer(trained) if optimizer else None,
        levels=dict(_levels(twin)),
        precision=precision,
        accumulation=accumulation,
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


def loss_names() -> list[str]:
    """Names of losses that need no code of the user's."""
    return list(_LOSSES)


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


def _loss(loss: str | Loss, *, real: bool) -> Loss:
    if isinstance(loss, str):
        if loss not in _LOSSES:
            raise UnknownNameError("loss", loss, _LOSSES)
        return _LOSSES[loss]
    if isinstance(loss, nn.Module):
        return _module(loss, real=real)
    return loss


def _module(model: nn.Module | Callable[[], nn.Module], *, real: bool) -> nn.Module:
    if isinstance(model, nn.Module):
        return real_module(model) if real else fake_module(model)
    try:
        made = model()
    except DataDependentOutputException:
        # Constructors that read values (drop rates by .item()) need real tensors; their values are dropped again.
        with unset_fake_temporarily():
            built = model()
        made = fake_module(built)
    if not isinstance(made, nn.Module):
        raise InputError(f"a model must be a torch.nn.Module or a function that makes one, got {type(made).__name__}")
    return made


def _name(model: Any, twin: nn.Module) -> str:
    name = getattr(model, "__name__", "")
    return name if name and name != "<lambda>" else type(twin).__name__


def _in_float64(batch: Any) -> Any:
    return tree_map(
        lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, batch
    )
