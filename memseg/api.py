"""`memseg.profile`: the memory of a training step of any model, before anything runs."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from memseg.errors import InputError, UnknownNameError
from memseg.levels import Precision
from memseg.planning.cards import Card, parse_cards
from memseg.profiling import DataParallel, StepProfile, foreign_job, named_optimizer, trace_job
from memseg.profiling.allocator.settings import AllocatorSettings
from memseg.profiling.card_memory import card_memory
from memseg.profiling.jobs.foreign import Loss
from memseg.profiling.jobs.job import OptimizerFactory
from memseg.profiling.jobs.placement import Placement
from memseg.reports.profile import ProfileReport


def profile(
    model: nn.Module | Callable[[], nn.Module],
    inputs: Any = None,
    target: Any = None,
    *,
    loss: str | Loss | None = None,
    optimizer: str | OptimizerFactory | None = "adam",
    precision: str | Precision = Precision.FLOAT32,
    card: str | Card = "cpu",
    accumulation: int = 1,
    data_parallel: DataParallel | None = None,
    allocator: str = "",
    keep_gradients: bool = False,
    keep_output: bool = True,
    real: bool = False,
    name: str | None = None,
) -> ProfileReport:
    """What a training step of a model would allocate on a card, without the card and without the memory.

    Args:
        model: Any module that fake tensors can run: real, on the meta device or fake; or a function that makes it, or
            a tuple of it, its inputs and, where wanted, its loss. It is copied in training mode, and not changed; a
            function may be called twice, first for a model on the meta device.
        inputs: What the model is called with: a tensor, a tuple of arguments, or a dict of keyword arguments. Tensors
            may be real, meta or fake; their values do not matter.
        target: What the loss is called with beside the model's output: a tensor, or a tuple of them.
        loss: Called as loss(output) or loss(output, *target), returns a scalar; or "mean" (of every output, also where
            none is given), or "cross-entropy" (of every output (N, K, ...) against a target (N, ...) of int64, made up
            where none is given).
        optimizer: Called with the trained parameters; or a name such as "sgd", "momentum", "adam", "adamw-fused"; None
            for a step without one.
        precision: float32 trains in the model's own types, float64 in float64; bfloat16 and float16 are autocast.
        card: Whose kernels, workspaces and allocator to count: a name that `memseg cards` lists, a TOML file, a Card.
        accumulation: Batches whose gradients are added up before the optimizer steps.
        data_parallel: Count the buckets of DistributedDataParallel, and NCCL's buffers.
        allocator: Settings as in PYTORCH_CUDA_ALLOC_CONF.
        keep_gradients: Whether gradients stay from step to step: zero_grad(set_to_none=False).
        keep_output: Whether the model's output lives through backward, as where a loop gives it a name.
        real: Run on real tensors, which takes memory and time, where fake ones do not do.
        name: What reports call the model; by default its class or function.

    Returns:
        A report: `rich.print` shows it; `memory` has the three peaks, `timeline` every allocation, `alive` what is
        alive at the peak, `rows()` the layers; `memseg.reports.page` and its neighbours write it to files.

    Raises:
        UntraceableError: the model needs values that fake tensors do not have; with its layer and a way round.
        InputError: the step fails, with its layer; or an argument does not hold.
        UnknownNameError: no such card, optimizer or loss.

    >>> import torch, torchvision
    >>> found = profile(torchvision.models.resnet18, torch.empty(8, 3, 224, 224, device="meta"), optimizer="momentum")
    >>> found.profile.model, found.peak_moment, round(found.memory.peak_allocated_bytes / 2**20)
    ('resnet18', 'backward of layer4.0.conv2', 295)
    """
    where = _one_card(card)
    precision = _precision(precision)
    if allocator and where.kind == "cpu":
        raise InputError(f"allocator is about CUDA's, so card must be a CUDA card, got {where.name}; try v100")
    make = partial(
        foreign_job,
        model,
        inputs,
        target,
        loss=loss,
        optimizer=named_optimizer(optimizer) if isinstance(optimizer, str) else optimizer,
        precision=precision,
        accumulation=accumulation,
        keep_gradients=keep_gradients,
        keep_output=keep_output,
        real=real,
        name=name,
    )
    found = trace_job(make, device=where.kind, data_parallel=data_parallel, real=real)
    memory = card_memory(
        found,
        where,
        settings=AllocatorSettings.parse(allocator) if allocator else None,
        replicas=data_parallel.replicas if data_parallel else 1,
    )
    settings = {
        **_settings(found, optimizer),
        **({"accumulate": accumulation} if accumulation > 1 else {}),
        **({"replicas": data_parallel.replicas} if data_parallel else {}),
        **({"allocator": allocator} if allocator else {}),
    }
    return ProfileReport(found, where, memory, settings, judge_fit=where.name != "cpu")


def profile_placed(
    model: nn.Module | Callable[[], nn.Module],
    inputs: Any,
    target: Any = None,
    *,
    placement: Placement,
    cards: str,
    loss: str | Loss | None = None,
    optimizer: str | OptimizerFactory | None = "adam",
    precision: str | Precision = Precision.FLOAT32,
) -> list[ProfileReport]:
    """The same for a model whose layers are placed on several cards, one report for each card.

    What a layer reads from another card is copied to its own, as `tensor.to(device)` in a forward written by hand does.

    Args:
        placement: By name of layer, the index of its card; all others are on the first.
        cards: A comma-separated list as for `memseg plan`, all of one kind.
        model, inputs, target, loss, optimizer, precision: As for `profile`.

    Raises:
        InputError: CUDA and CPU cards together, or a card that is not there; and as for `profile`.
        UnknownNameError: no layer of that name; and as for `profile`.
    """
    where = parse_cards(cards)
    kinds = {card.kind for card in where}
    if len(kinds) > 1:
        raise InputError(f"cards must all be CUDA cards or all CPU cards, got {cards}")
    make = partial(
        foreign_job,
        model,
        inputs,
        target,
        loss=loss,
        optimizer=named_optimizer(optimizer) if isinstance(optimizer, str) else optimizer,
        precision=_precision(precision),
    )
    found = trace_job(make, device=kinds.pop(), placement=placement, num_cards=len(where))
    settings = _settings(found, optimizer)
    parts = [found.on_card(index) for index in range(len(where))]
    return [
        ProfileReport(
            part,
            card,
            card_memory(part, card),
            {**settings, "card_number": f"{index + 1} of {len(where)}"},
            judge_fit=True,
        )
        for index, (part, card) in enumerate(zip(parts, where, strict=True))
    ]


def _one_card(card: str | Card) -> Card:
    if isinstance(card, Card):
        return card
    cards = parse_cards(card)
    if len(cards) > 1:
        raise InputError(f"card must name one card, got {card!r}; memseg.profile_placed takes several")
    return cards[0]


def _precision(precision: str | Precision) -> Precision:
    if precision not in list(Precision):
        raise UnknownNameError("precision", precision, Precision)
    return Precision(precision)


def _settings(found: StepProfile, optimizer: Any) -> dict[str, Any]:
    """What every report tells of the step."""
    name = optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", type(optimizer).__name__)
    return {"inputs": list(found.inputs), "optimizer": "none" if optimizer is None else name, "loss": found.loss}
