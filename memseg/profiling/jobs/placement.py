"""A model over several cards in one trace: every tensor belongs to a card, and one timeline becomes one for each.

Modules are placed by name. What a module reads from another card is copied to its own first, as `tensor.to(device)`
would do it in a forward written by hand, and the gradient is copied back. Everything else stays where it is made: an
output lies on the card of the first tensor that it is made of.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from memseg.errors import InputError, UnknownNameError
from memseg.profiling.trace import StepTracer

Placement = Mapping[str, int]
"""The index of a card for each of some modules; all others are on card 0, or on that of the module that holds them."""


def card_of(placement: Placement, layer: str) -> int:
    """The card of a layer: that of the nearest placed module that is it or holds it, else 0.

    >>> card_of({"layer4": 1, "layer4.0": 2}, "layer4.0.conv1"), card_of({"layer4": 1}, "layer3")
    (2, 0)
    """
    while layer and layer not in placement:
        layer = layer.rpartition(".")[0]
    return placement.get(layer, 0)


def check_placement(placement: Placement, layers: Mapping[str, nn.Module], num_cards: int) -> None:
    """Do nothing where every name is a layer and every card is there.

    Raises:
        UnknownNameError: a name is no layer.
        InputError: an index is no card's.
    """
    for name, card in placement.items():
        if name not in layers:
            raise UnknownNameError("layer", name, layers)
        if not 0 <= card < num_cards:
            raise InputError(f"{name} must be placed on one of {num_cards} cards, 0 to {num_cards - 1}, got {card}")


@contextmanager
def placed(tracer: StepTracer, layers: Mapping[str, nn.Module], placement: Placement) -> Iterator[None]:
    """Inside, tensors are copied to the cards of the modules that read them."""
    tracer.card_of = lambda layer: card_of(placement, layer)
    holders = {"", *(name[:index] for name in placement for index, letter in enumerate(name) if letter == ".")}
    hooks = []
    for name, module in layers.items():
        # The placed modules, and those beside them; what is further inside is where its holder is.
        if name in placement or (name.rpartition(".")[0] in holders and name not in holders):
            hook = _copying_to(card_of(placement, name), tracer)
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _copying_to(card: int, tracer: StepTracer) -> Callable[..., tuple[Any, Any]]:
    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor) or tracer.card(value) == card:
            return value
        return _Copy.apply(value, tracer, card)

    return lambda module, args, kwargs: (tree_map(copy, args), tree_map(copy, kwargs))


class _Copy(torch.autograd.Function):
    """A tensor on another card; its gradient comes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, tracer: StepTracer, card: int) -> Tensor:
        ctx.tracer, ctx.source = tracer, tracer.card(tensor)
        return tracer.copy_to(tensor, card)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.tracer.copy_to(grad, ctx.source), None, None
