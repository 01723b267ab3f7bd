"""An nn.Sequential that runs what it recognises among its children as single nodes.

BN, ReLU, convolution [, 2x2 average pooling]         one node (`norm_relu_conv`)
convolution of images, BN, ReLU, max-pooling          one node (`conv_norm_relu_pool`)
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from typing import Any, ClassVar, cast

from torch import nn
from torch._compile import _disable_dynamo
from torch.nn.modules.batchnorm import _BatchNorm

from memseg.levels import Recompute
from memseg.nn.autograd import is_traced, refuse_scripting
from memseg.nn.batch_norm import BatchNorm2d
from memseg.nn.norm_relu_conv import norm_relu_conv
from memseg.nn.recompute import has_levels, rebuild
from memseg.nn.stem import conv_norm_relu_pool

_MOST_IMAGE_CHANNELS = 4
"""A convolution that reads more than these (colour and alpha or depth) is not taken to read the images."""
_LARGEST_WINDOW = 11
"""Of a stem's max-pooling, whose offsets are kept as int8: 11 * 11 - 1 = 120 is the last that fits."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class FusedSequential(nn.Sequential):
    """An nn.Sequential that runs what it recognises among its children as one node each; `convert` makes it.

    Its children are recognised at every forward: they may be changed, replaced or given hooks at any time, and then
    run by themselves. At level `none` all do; `norms` also keeps the output of a stem's convolution; `units` keeps
    what each run reads; `segment` keeps only what a stretch of children reads, from one child that has a level of its
    own to the next.
    """

    levels: ClassVar[tuple[Recompute, ...]] = tuple(Recompute)
    recompute: Recompute = Recompute.UNITS

    def forward(self, input: Any) -> Any:
        """What nn.Sequential makes of it."""
        if is_traced() or self.recompute is Recompute.NONE:
            return super().forward(input)  # type: ignore[no-untyped-call]
        return self._run(input)

    @_disable_dynamo(recursive=False)  # Not worth a graph: it only decides what runs. The children may be compiled.
    def _run(self, input: Any) -> Any:
        pieces, keep_conv = pieces_of(self, BatchNorm2d), self.recompute is Recompute.NORMS
        if self.recompute is not Recompute.SEGMENT:
            return _run(pieces, keep_conv, input)
        for with_levels, group in groupby(pieces, Piece.has_levels):
            stretch = list(group)
            rebuilt = len(stretch) > 1 and not with_levels
            run = partial(_run, stretch, keep_conv)
            input = rebuild(run, input, owner=self) if rebuilt else run(input)
        return input

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new_fused, (_class_before(type(self)),), self.__getstate__()  # type: ignore[no-untyped-call]

    def __prepare_scriptable__(self) -> None:
        refuse_scripting(self)


@cache
def fused_class(kind: type[Any]) -> type[FusedSequential]:
    """FusedSequential itself, or a class that also is of `kind`, with its methods."""
    if kind is nn.Sequential:
        return FusedSequential
    return type(f"Fused{kind.__name__}", (FusedSequential, kind), {"__module__": __name__})


def _class_before(fused: type[FusedSequential]) -> type[nn.Sequential]:
    return nn.Sequential if fused is FusedSequential else cast(type[nn.Sequential], fused.__bases__[1])


def _new_fused(kind: type[nn.Sequential]) -> FusedSequential:
    fused = fused_class(cast(Any, kind))
    return fused.__new__(fused)


@dataclass(frozen=True)
class Piece:
    """Children of a Sequential that run together."""

    members: Mapping[str, Any]
    """By name; more than one is a run that can be one node."""
    why_not: str | None = None
    """Why the run that seems to begin here is none."""

    @property
    def is_stem(self) -> bool:
        return isinstance(next(iter(self.members.values())), nn.Conv2d)

    def has_levels(self) -> bool:
        """Whether anything inside rebuilds by a level of its own."""
        return any(has_levels(module) for member in self.members.values() for module in member.modules())

    @_disable_dynamo(recursive=False)
    def run(self, x: Any, keep_conv: bool) -> Any:
        modules = list(self.members.values())
        if len(modules) == 1:
            return modules[0](x)
        if self.is_stem:
            return conv_norm_relu_pool(x, conv=modules[0], norm=modules[1], pool=modules[3], keep_conv=keep_conv)
        return norm_relu_conv(x, norm=modules[0], conv=modules[2], pool=len(modules) == 4)


@_disable_dynamo(recursive=False)
def _run(pieces: Iterable[Piece], keep_conv: bool, x: Any) -> Any:
    for piece in pieces:
        x = piece.run(x, keep_conv)
    return x


def pieces_of(sequential: nn.Sequential, *norms: type[nn.Module]) -> list[Piece]:
    """All children in order, a run as one piece. Norms of a run are exactly of one of the classes."""
    children = list(sequential._modules.items())
    found: list[Piece] = []
    start = 0
    while start < len(children):
        found.append(_piece(children[start : start + 4], norms))
        start += len(found[-1].members)
    return found


_Children = list[tuple[str, Any]]


def _piece(ahead: _Children, norms: tuple[type[nn.Module], ...]) -> Piece:
    """The piece that begins with the first of four children."""
    run, why = ahead[:1], None
    if _begins(ahead, nn.Conv2d, _BatchNorm, nn.ReLU, nn.MaxPool2d):
        run, why = ahead, member_refusal(ahead, norms) or _stem_refusal(*(module for _, module in ahead))
    elif _begins(ahead, _BatchNorm, nn.ReLU, nn.Conv2d):
        pooled = _halves(ahead) and not member_refusal(ahead[3:], norms)
        run = ahead if pooled else ahead[:3]
        why = member_refusal(run, norms) or _unit_refusal(ahead[0][1], ahead[2][1])
    elif _begins(ahead, nn.Conv2d, _BatchNorm, nn.ReLU) and not _begins(ahead[1:], _BatchNorm, nn.ReLU, nn.Conv2d):
        run, why = ahead, "convolution, norm, ReLU in this order are one node only where max-pooling follows"
    return Piece(dict(ahead[:1]), why) if why else Piece(dict(run))


def _begins(ahead: _Children, *kinds: type[nn.Module]) -> bool:
    return len(ahead) >= len(kinds) and all(isinstance(one[1], kind) for one, kind in zip(ahead, kinds, strict=False))


def member_refusal(members: _Children, norms: tuple[type[nn.Module], ...]) -> str | None:
    """Why some member cannot be inside a node, whatever its sizes are."""
    exactly = (nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, *norms)
    for name, module in members:
        kind = type(module)
        if kind not in exactly:
            return f"{name} is of {kind.__name__}, which may compute something else than torch's own layer"
        if "forward" in module.__dict__:
            return f"the forward of {name} has been replaced"
        if has_hooks(module):
            return f"{name} carries hooks, which one node would not fire"
        if issubclass(kind, nn.BatchNorm2d) and (module.weight is None or module.bias is None):
            return f"{name} has no weight or no bias"
        if issubclass(kind, nn.BatchNorm2d) and (module.running_mean is None or module.momentum is None):
            return f"{name} has no running statistics that follow with a momentum"
    return None


def _stem_refusal(conv: nn.Conv2d, norm: nn.BatchNorm2d, relu: nn.ReLU, pool: nn.MaxPool2d) -> str | None:
    if conv.in_channels > _MOST_IMAGE_CHANNELS:
        return f"convolution, norm, ReLU, max-pooling are one node only for up to {_MOST_IMAGE_CHANNELS} channels"
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros" or conv.out_channels != norm.num_features:
        return f"a stem's convolution must pad by zeros, as told in numbers, got {conv}"
    kernel, stride, padding, dilation = map(_side, (pool.kernel_size, pool.stride, pool.padding, pool.dilation))
    known = None not in (stride, padding) and kernel in range(1, _LARGEST_WINDOW + 1) and dilation == 1
    if not known or pool.ceil_mode or pool.return_indices:
        return f"a stem's pooling must have a plain square window of up to {_LARGEST_WINDOW}, got {pool}"
    return None


def _unit_refusal(norm: nn.BatchNorm2d, conv: nn.Conv2d) -> str | None:
    if not _keeps_size(conv) or norm.num_features != conv.in_channels:
        return "its convolution must keep the map's size: stride 1, one group, an odd square kernel, padding by zeros"
    return None


def _keeps_size(conv: nn.Conv2d) -> bool:
    kernel, dilation = _side(conv.kernel_size), _side(conv.dilation)
    if kernel is None or dilation is None:
        return False
    needed = dilation * (kernel - 1) // 2
    padding = {"valid": 0, "same": needed}[conv.padding] if isinstance(conv.padding, str) else _side(conv.padding)
    plain = _side(conv.stride) == 1 and conv.groups == 1 and conv.padding_mode == "zeros"
    return plain and kernel % 2 == 1 and padding == needed


def _halves(ahead: _Children) -> bool:
    """Whether a 1x1 convolution is followed by plain 2x2 average pooling."""
    if not _begins(ahead, nn.Module, nn.Module, nn.Conv2d, nn.AvgPool2d):
        return False
    conv, pool = ahead[2][1], ahead[3][1]
    plain = not pool.ceil_mode and pool.divisor_override is None
    return plain and [_side(x) for x in (conv.kernel_size, pool.kernel_size, pool.stride, pool.padding)] == [1, 2, 2, 0]


def _side(size: int | tuple[int, ...]) -> int | None:
    """Of a square; None where it is none."""
    sides = {size} if isinstance(size, int) else set(size)
    return sides.pop() if len(sides) == 1 else None


def has_hooks(module: nn.Module) -> bool:
    return any(module.__dict__[hooks] for hooks in _HOOKS)
