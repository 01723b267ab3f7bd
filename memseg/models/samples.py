"""What a traced network makes of images of several sizes: shapes, sizes, aliases, on the meta device.

A network is run on three batches that differ in number, height and width, with sides that are odd multiples of a power
of two. The smallest power of two that it runs with is its output stride: a U-Net that halves three times and joins
what it halved takes multiples of 8, a network that pads or resizes takes any side, that is multiples of 1. A network
that takes a single size alone (position embeddings) is found by trying the usual ones.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from memseg.errors import InputError
from memseg.models.factory import empty_copy
from memseg.models.tracing import TRAINING, first_line, module_path

STRIDES = (1, 2, 4, 8, 16, 32, 64)
"""Output strides that are tried."""
_SIDE = 320
"""Sides of the images are near this: no less than what networks pretrained on ImageNet read, so nothing shrinks to
nothing."""
_FURTHER = (0, 70, 146, 282)
"""How far sides differ: coarse maps of different images must differ too, or their sides would be taken for constants;
and sides must leave different rests, or it would not show whether they are rounded up or down."""
_FIXED_SIDES = (224, 256, 384, 512, 240, 299, 448, 518, 128, 64, 32, 28, 1024)
"""Of networks that take one size: the usual ones first."""


@dataclass(eq=False)
class Sample:
    """One run."""

    images: tuple[int, ...]
    """(N, 3, H, W)."""
    values: dict[fx.Node, Any] = field(default_factory=dict)
    """Of each node; tensors are on the meta device."""
    flops: dict[fx.Node, int] = field(default_factory=dict)
    overwrites: dict[fx.Node, set[int]] = field(default_factory=dict)
    """Of a node that changes tensors in place: their storages."""


@dataclass(frozen=True)
class Samples:
    """All runs of one network."""

    runs: tuple[Sample, ...]
    output_stride: int
    image: tuple[int, int] | None
    """The only (height, width) that the network takes, if so."""

    def values(self, node: fx.Node) -> list[Any]:
        """Of a node, in each run."""
        return [run.values[node] for run in self.runs]


def storage_of(tensor: Tensor) -> int:
    """What tensors that share memory have in common."""
    return cast(int, tensor.untyped_storage()._cdata)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a structure of lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def take_samples(model: nn.Module, graph: fx.Graph, *, least_stride: int = 1) -> Samples:
    """Run a traced network in training mode.

    Args:
        model: The network.
        graph: Its operations.
        least_stride: The output stride is no less, even if a smaller one will do.

    Raises:
        InputError: it runs at no size that is tried, and why not.
    """
    with unset_fake_temporarily(), torch.device("meta"):
        twin = empty_copy(model).train()
        failure: _StoppedError | None = None
        for stride, image, sizes in _attempts(model, least_stride):
            try:
                return Samples(tuple(_run(twin, graph, size) for size in sizes), stride, image)
            except _StoppedError as error:
                failure = error
    raise InputError(
        f"{type(model).__name__} runs on images of no size that was tried (sides that are multiples of 1 to 64 near "
        f"{_SIDE}, and {_FIXED_SIDES[0]}x{_FIXED_SIDES[0]} and other fixed sizes); the last try ended in {failure}. "
        "It must read float images (N, 3, H, W), and values of tensors may not decide what it does"
    )


class _StoppedError(Exception):
    """An operation that does not run, and why."""


_Attempt = tuple[int, tuple[int, int] | None, list[tuple[int, ...]]]


def _attempts(model: nn.Module, least_stride: int) -> Iterator[_Attempt]:
    """Stride, fixed size if any, and shapes of the batches."""
    for stride in (stride for stride in STRIDES if stride >= least_stride):
        first = -(-_SIDE // stride) | 1
        a, b, c, d = (stride * (first + 2 * -(-further // (2 * stride))) for further in _FURTHER)
        yield stride, None, [(2, 3, a, c), (3, 3, b, a), (2, 3, d, b)]
    if least_stride > 1:
        return
    own = getattr(model, "image_size", None)
    for side in dict.fromkeys([*([own] if isinstance(own, int) else []), *_FIXED_SIDES]):
        yield 1, (side, side), [(2, 3, side, side), (3, 3, side, side)]


def _run(model: nn.Module, graph: fx.Graph, shape: tuple[int, ...]) -> Sample:
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    sample = Sample(shape)
    values = sample.values
    with _Flops() as flops:  # type: ignore[no-untyped-call]
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = torch.empty(shape, dtype=dtype)
            elif node.op == "output":
                continue
            else:
                args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                try:
                    with _watched(node, sample, tensors_in((args, kwargs))):
                        values[node] = _call(model, node, args, kwargs)
                except Exception as error:
                    path = module_path(node) or "the network itself"
                    raise _StoppedError(f"{node.name} of {path} with {first_line(error)}") from error
            sample.flops[node], flops.total = flops.total, 0
    return sample


class _Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations of products.

    torch's own FlopCounterMode takes norms apart, and torch computes the shapes of a norm in Python: seconds together.
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.native_batch_norm.default:
            per_channel = args[0].new_empty(args[0].shape[1])
            return torch.empty_like(args[0]), per_channel, torch.empty_like(per_channel)
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


@contextmanager
def _watched(node: fx.Node, sample: Sample, tensors: Iterable[Tensor]) -> Iterator[None]:
    versions = [(tensor, tensor._version) for tensor in tensors]
    yield
    if changed := {storage_of(tensor) for tensor, version in versions if tensor._version != version}:
        sample.overwrites[node] = changed


def _call(model: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> Any:
    target: Any = node.target
    if node.op == "get_attr":
        owner, _, name = target.rpartition(".")
        if target == TRAINING:
            return model.training
        value = getattr(model.get_submodule(owner), name)
        # A constant that the tracer met is none of the copied tensors.
        return value.to("meta") if isinstance(value, Tensor) and not value.is_meta else value
    if node.op == "call_module":
        return model.get_submodule(target)(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)
