"""What moves the weights: an optimizer of a recipe's kind over groups of parameters.

Each group has `lr_scale`, by which the schedule's rate is multiplied for it. All are torch's fused kernels, which take
no temporaries on either kind of device: a plan counts on that.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from memseg.errors import PlanError
from memseg.levels import Precision
from memseg.training.recipe import Recipe
from memseg.training.tables import OptimizerConfig


def make_optimizer(recipe: Recipe, module: nn.Module, encoder: tuple[str, ...]) -> torch.optim.Optimizer:
    """The recipe's optimizer over what `module` trains, the pretrained part at its lower rate.

    Args:
        recipe: Of the run.
        module: This process's part of the model.
        encoder: Names of the segments that pretrained weights filled.

    Raises:
        PlanError: there is nothing to train.
    """
    options = recipe.optimizer
    factor = options.pretrained_lr_factor if recipe.model.encoder_weights else 1.0
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            scale = factor if name.split(".")[1] in encoder else 1.0
            # Norms and biases are all that has a single dimension.
            decays = options.decay_norms or parameter.dim() > 1
            groups.setdefault((scale, options.weight_decay if decays else 0.0), []).append(parameter)
    if not groups:
        raise PlanError("each card of a plan must have something to train, one has no parameters; make a new plan")
    optimizer = _make(
        options,
        [
            {"params": parameters, "lr_scale": scale, "weight_decay": decay}
            for (scale, decay), parameters in groups.items()
        ],
    )
    if options.kind == "momentum" and recipe.train.precision is Precision.FLOAT16:
        # A first step that overflows and is skipped, as it often does, would leave whatever lies in fresh memory:
        # `_fused_sgd` in torch/optim/sgd.py, torch 2.14.1.
        for parameters in groups.values():
            for parameter in parameters:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _make(options: OptimizerConfig, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    if options.name == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=options.nesterov, fused=True)
    kind = torch.optim.AdamW if options.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)


def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, stages: dist.ProcessGroup | None, device: torch.device
) -> float:
    """Scale gradients down where their norm is larger than allowed; the norm that they had.

    Args:
        parameters: Of this process, with their gradients, unscaled and averaged over replicas.
        max_norm: Of all gradients of the model together, the root of the sum of their squares.
        stages: The processes whose parameters make up the model, each of which calls this; None for this one alone.
        device: Of this process.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    norm = get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None]).to(device)
    if stages is not None:
        square = norm.double().square()
        dist.all_reduce(square, group=stages)
        norm = square.sqrt().to(norm.dtype)
    clip_grads_with_norm_(trained, max_norm, norm)
    return float(norm)
