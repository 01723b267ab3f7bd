"""Operators that walk over bands: one operation to a tracer, with a body that can be looked into.

A walk over bands is thousands of small operations. Registered with `torch.library.custom_op` it is one to a trace on
fake tensors, and a node that torch.compile need not look into. What it allocates inside itself is the same for every
band of a size; so each operator also says how to narrow its arguments to the fewest bands that show it all, and
`memseg.profiling.kernels.inside` traces the body over those.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar, cast

import torch

Body = TypeVar("Body", bound=Callable[..., Any])


class BandedOperator(NamedTuple):
    """What an operator does, and its arguments narrowed."""

    body: Callable[..., Any]
    narrow: Callable[..., tuple[Any, ...]]


BANDED_OPERATORS: dict[Any, BandedOperator] = {}
"""By overload packet, as torch.ops.memseg.project."""


def banded(
    *, mutates: Iterable[str] = (), narrow: Callable[..., tuple[Any, ...]], fake: Callable[..., Any] | None = None
) -> Callable[[Body], Body]:
    """Register a function as an operator `memseg::` of its own name.

    Args:
        mutates: Names of the arguments that it writes to.
        narrow: Takes its arguments and returns them, all of them, over as few bands as show the most it allocates.
        fake: Makes its outputs without computing them; None where it returns nothing.
    """

    def register(body: Body) -> Body:
        name = body.__name__
        operator = torch.library.custom_op(f"memseg::{name}", body, mutates_args=tuple(mutates))
        operator.register_fake(fake or (lambda *_: None))
        BANDED_OPERATORS[getattr(torch.ops.memseg, name)] = BandedOperator(body, narrow)
        # It is called as the body is; the library has no type that says so.
        return cast(Body, operator)

    return register
