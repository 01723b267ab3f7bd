"""Anybody's network with memseg's layers inside: dense blocks and BN-ReLU-convolution runs, found and converted.

A network is converted where it stands. Modules keep their identity, and so parameters, buffers, hooks, names and the
optimizer that was made for them; what changes is their class. Only what is known to compute the same is touched: a
class whose forward we have read (torchvision's dense block, nn.Sequential), around members that are exactly torch's
own. Everything else that looks alike is left, and said to be left, with the reason.

    torchvision's _DenseBlock                             a DenseBlock
    BN, ReLU, convolution [, 2x2 average pooling]         one node (`norm_relu_conv`) in a FusedSequential
    convolution of images, BN, ReLU, max-pooling          one node (`conv_norm_relu_pool`) in a FusedSequential
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.nn.modules.batchnorm import _BatchNorm

from memseg.errors import UnknownNameError
from memseg.levels import NormMode, Recompute
from memseg.nn.autograd import is_traced, refuse_scripting
from memseg.nn.batch_norm import BatchNorm2d
from memseg.nn.dense_block import DenseBlock
from memseg.nn.norm_relu_conv import norm_relu_conv
from memseg.nn.recompute import has_levels, parse_level, rebuild
from memseg.nn.stem import conv_norm_relu_pool

_MOST_IMAGE_CHANNELS = 4
"""A convolution that reads more than these (colour and alpha or depth) is not taken to read the images."""
_LARGEST_WINDOW = 11
"""Of a stem's max-pooling, whose offsets are kept as int8: 11 * 11 - 1 = 120 is the last that fits."""
_MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)
"""What every module has: parameters, buffers, children, hooks, the training flag."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Change:
    """One part of a network that was converted."""

    name: str
    """Of the module, as in `named_modules`; "" is the model itself."""
    what: str
    """What it was; of a run, its members."""
    became: str


@dataclass(frozen=True)
class Left:
    """One part that looks as if it could be converted, and was not."""

    name: str
    """Of the module, or of the first member of a run."""
    why: str


@dataclass(frozen=True)
class Conversion:
    """What `convert` did; its text is a list for people."""

    model: nn.Module
    """The model that was given, converted."""
    changed: tuple[Change, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        kind = type(self.model).__name__
        lines = [f"{kind}: {len(self.changed)} changed, {len(self.left)} left as they were"]
        if not self.changed:
            lines = [f"{kind}: nothing to convert" + (f", {len(self.left)} left as they were" if self.left else "")]
        lines += [f"  {_shown(change.name)}: {change.what} -> {change.became}" for change in self.changed]
        reasons: dict[str, list[str]] = {}
        for left in self.left:
            reasons.setdefault(left.why, []).append(_shown(left.name))
        for why, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  left {', '.join(names[:3])}{more}: {why}")
        return "\n".join(lines)


def convert(
    model: nn.Module, *, recompute: Recompute | str = Recompute.UNITS, norm: NormMode | str | None = None
) -> Conversion:
    """Convert the dense blocks and BN-ReLU-convolution runs of a model in place, and tell what became of what.

    Outputs, gradients, running statistics and state dict stay what they were, and so do hooks on what is converted;
    a run whose members carry hooks is left, for one node would not fire them. torchvision's `memory_efficient=True`
    is switched off: `recompute` stands in its place. A second call finds nothing more to change.

    Args:
        model: Changed in place. A module that occurs in several places is converted once, for all of them.
        recompute: The level of all that is converted; later, `memseg.nn.recompute` changes it.
        norm: The NormMode of all norms in what is converted; None leaves them as they are. `frozen` also stops the
            training of their affine.

    Raises:
        UnknownNameError: `recompute` or `norm` is none of Recompute's or NormMode's names.

    >>> from torchvision.models import DenseNet
    >>> print(convert(DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=16)))
    DenseNet: 4 changed, 0 left as they were
      features: conv0-norm0-relu0-pool0 -> one node that keeps the images
      features.denseblock1: _DenseBlock of 2 layers -> DenseBlock
      features.transition1: norm-relu-conv-pool -> one node that keeps what it reads
      features.denseblock2: _DenseBlock of 2 layers -> DenseBlock
    """
    level = parse_level(recompute)
    if norm is not None and norm not in list(NormMode):
        raise UnknownNameError("norm mode", str(norm), NormMode)
    mode = None if norm is None else NormMode(norm)
    entries = list(_convert(model, "", level, mode))
    if mode not in (None, NormMode.BATCH):
        why = f"a norm outside all that is converted stays torch's own, and not {mode}"
        entries += [Left(name, why) for name, module in model.named_modules() if type(module) is nn.BatchNorm2d]
    changed = tuple(entry for entry in entries if isinstance(entry, Change))
    return Conversion(model, changed, tuple(entry for entry in entries if isinstance(entry, Left)))


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
        pieces, keep_conv = _pieces(self, BatchNorm2d), self.recompute is Recompute.NORMS
        if self.recompute is not Recompute.SEGMENT:
            return _run(pieces, keep_conv, input)
        for with_levels, group in groupby(pieces, _Piece.has_levels):
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
def _fused_class(kind: type[Any]) -> type[FusedSequential]:
    """FusedSequential itself, or a class that also is of `kind`, with its methods."""
    if kind is nn.Sequential:
        return FusedSequential
    return type(f"Fused{kind.__name__}", (FusedSequential, kind), {"__module__": __name__})


def _class_before(fused: type[FusedSequential]) -> type[nn.Sequential]:
    return nn.Sequential if fused is FusedSequential else cast(type[nn.Sequential], fused.__bases__[1])


def _new_fused(kind: type[nn.Sequential]) -> FusedSequential:
    fused = _fused_class(cast(Any, kind))
    return fused.__new__(fused)


@dataclass(frozen=True)
class _Piece:
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
def _run(pieces: Iterable[_Piece], keep_conv: bool, x: Any) -> Any:
    for piece in pieces:
        x = piece.run(x, keep_conv)
    return x


def _pieces(sequential: nn.Sequential, *norms: type[nn.Module]) -> list[_Piece]:
    """All children in order, a run as one piece. Norms of a run are exactly of one of the classes."""
    children = list(sequential._modules.items())
    found: list[_Piece] = []
    start = 0
    while start < len(children):
        found.append(_piece(children[start : start + 4], norms))
        start += len(found[-1].members)
    return found


_Children = list[tuple[str, Any]]


def _piece(ahead: _Children, norms: tuple[type[nn.Module], ...]) -> _Piece:
    """The piece that begins with the first of four children."""
    run, why = ahead[:1], None
    if _begins(ahead, nn.Conv2d, _BatchNorm, nn.ReLU, nn.MaxPool2d):
        run, why = ahead, _member_refusal(ahead, norms) or _stem_refusal(*(module for _, module in ahead))
    elif _begins(ahead, _BatchNorm, nn.ReLU, nn.Conv2d):
        pooled = _halves(ahead) and not _member_refusal(ahead[3:], norms)
        run = ahead if pooled else ahead[:3]
        why = _member_refusal(run, norms) or _unit_refusal(ahead[0][1], ahead[2][1])
    elif _begins(ahead, nn.Conv2d, _BatchNorm, nn.ReLU) and not _begins(ahead[1:], _BatchNorm, nn.ReLU, nn.Conv2d):
        run, why = ahead, "convolution, norm, ReLU in this order are one node only where max-pooling follows"
    return _Piece(dict(ahead[:1]), why) if why else _Piece(dict(run))


def _begins(ahead: _Children, *kinds: type[nn.Module]) -> bool:
    return len(ahead) >= len(kinds) and all(isinstance(one[1], kind) for one, kind in zip(ahead, kinds, strict=False))


def _member_refusal(members: _Children, norms: tuple[type[nn.Module], ...]) -> str | None:
    """Why some member cannot be inside a node, whatever its sizes are."""
    exactly = (nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, *norms)
    for name, module in members:
        kind = type(module)
        if kind not in exactly:
            return f"{name} is of {kind.__name__}, which may compute something else than torch's own layer"
        if "forward" in module.__dict__:
            return f"the forward of {name} has been replaced"
        if _has_hooks(module):
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


def _convert(module: nn.Module, name: str, level: Recompute, mode: NormMode | None) -> Iterator[Change | Left]:
    """Convert a module and all in it."""
    if has_levels(module) and not isinstance(module, FusedSequential):
        return
    if _looks_dense(module):
        why = _block_refusal(module)
        yield Left(name, why) if why else _convert_block(module, name, level, mode)
        return
    forward = None if "forward" in module.__dict__ else type(module).forward
    if isinstance(module, nn.Sequential) and forward in (nn.Sequential.forward, FusedSequential.forward):
        yield from _convert_runs(module, name, level, mode)
    elif forward is not nn.Module.forward and _has(module, nn.Conv2d) and _has(module, _BatchNorm):
        why = f"{type(module).__name__} runs its layers in a forward of its own; `recompute` may rebuild it"
        yield Left(name, why)
    for child_name, child in module.named_children():
        yield from _convert(child, _joined(name, child_name), level, mode)


def _convert_runs(
    sequential: nn.Sequential, name: str, level: Recompute, mode: NormMode | None
) -> Iterator[Change | Left]:
    """Convert the runs among the children; what was converted before is passed over."""
    for piece in _pieces(sequential, nn.BatchNorm2d, BatchNorm2d):
        if piece.why_not:
            yield Left(_joined(name, next(iter(piece.members))), piece.why_not)
        if len(piece.members) == 1:
            continue
        norm = next(member for member in piece.members.values() if isinstance(member, nn.BatchNorm2d))
        if isinstance(sequential, FusedSequential) and isinstance(norm, BatchNorm2d):
            continue
        _convert_norm(norm, mode)
        if not isinstance(sequential, FusedSequential):
            sequential.__class__ = _fused_class(cast(Any, type(sequential)))
            sequential.__dict__["recompute"] = level
        became = f"one node that keeps {'the images' if piece.is_stem else 'what it reads'}"
        yield Change(name, "-".join(piece.members), became)


def _convert_block(block: nn.Module, name: str, level: Recompute, mode: NormMode | None) -> Change:
    """Convert a dense block that nothing speaks against."""
    layers: list[Any] = list(block.children())
    kind, efficient = type(block).__name__, any(layer.memory_efficient for layer in layers)
    in_channels, bn_size, growth_rate = _block_numbers(layers[0])
    with torch.device("meta"):
        converted = DenseBlock(
            len(layers),
            in_channels=in_channels,
            growth_rate=growth_rate,
            bn_size=bn_size,
            drop_rate=layers[0].drop_rate,
            recompute=level,
        )
    for layer, converted_layer in zip(layers, converted.children(), strict=True):
        _convert_norm(layer.norm1, mode)
        _convert_norm(layer.norm2, mode)
        del layer.relu1, layer.relu2, layer.memory_efficient
        _become(layer, converted_layer)
    _become(block, converted)
    off = ", memory_efficient switched off" if efficient else ""
    return Change(name, f"{kind} of {len(layers)} layers", f"DenseBlock{off}")


def _convert_norm(norm: nn.BatchNorm2d, mode: NormMode | None) -> None:
    if not isinstance(norm, BatchNorm2d):
        with torch.device("meta"):
            _become(norm, BatchNorm2d(norm.num_features, eps=norm.eps, momentum=cast(float, norm.momentum)))
    if mode is not None:
        norm.__dict__["norm"] = mode
    if mode is NormMode.FROZEN:
        norm.weight.requires_grad_(False)
        norm.bias.requires_grad_(False)


def _become(module: nn.Module, other: nn.Module) -> None:
    """`module` turns into what `other` is, but keeps what every module has: its parameters, children, hooks."""
    module.__class__ = type(other)
    module.__dict__.update({name: value for name, value in vars(other).items() if name not in _MODULE_ATTRIBUTES})


def _looks_dense(module: nn.Module) -> bool:
    """Whether it is torchvision's dense block, or its layers have such names and read everything before them."""
    layers: list[Any] = list(module.children())
    if isinstance(module, _densenet()._DenseBlock):
        return True
    if len(layers) < 2 or not all(hasattr(layer, name) for layer in layers for name in ("norm1", "conv1", "conv2")):
        return False
    read = [getattr(layer.norm1, "num_features", 0) for layer in layers]
    made = [getattr(layer.conv2, "out_channels", 0) for layer in layers]
    return all(more == less + new > less for less, new, more in zip(read, made, read[1:], strict=False))


def _block_refusal(block: nn.Module) -> str | None:
    """Why a dense block cannot be converted, if so: it must be what torchvision makes of its first layer's numbers."""
    densenet, kind = _densenet(), type(block).__name__
    layers: list[Any] = list(block.children())
    if not isinstance(block, densenet._DenseBlock):
        return f"it looks like a dense block, but {kind} is not torchvision's"
    if not layers or not _runs_as(block, densenet._DenseBlock):
        return f"{kind} has no layers, or a forward of its own"
    for name, layer in block.named_children():
        if not _runs_as(layer, densenet._DenseLayer):
            return f"{name}, of {type(layer).__name__}, has a forward of its own"
        if _has_hooks(layer):
            return f"{name} carries hooks, which one node would not fire"
    rates = {layer.drop_rate for layer in layers}
    if len(rates) > 1 or not 0 <= min(rates) < 1:
        return f"its layers must have one drop rate below 1, got {', '.join(map(str, sorted(rates)))}"
    numbers = _block_numbers(layers[0])
    with torch.device("meta"):
        expected = densenet._DenseBlock(len(layers), *numbers, drop_rate=0)
    if [name for name, _ in block.named_modules()] != [name for name, _ in expected.named_modules()]:
        return "its layers and their members must be named as torchvision names them, none missing and none added"
    norms = [norm for norm in block.modules() if isinstance(norm, nn.BatchNorm2d)]
    for (name, module), made in zip(block.named_modules(), expected.modules(), strict=True):
        if "." not in name:
            continue
        if why := _member_refusal([(name, module)], (nn.BatchNorm2d, BatchNorm2d)):
            return why
        if not isinstance(module, type(made)) or _sizes(module) != _sizes(made):
            return f"{name} must be {made}, got {module}"
    if len({(norm.training, getattr(norm, "norm", NormMode.BATCH)) for norm in norms}) > 1:
        return "its norms must be of one mode, and in training or in eval mode all together"
    return None


def _block_numbers(first: Any) -> tuple[int, int, int]:
    """Channels that a block reads, bottleneck width in multiples of the growth rate, and that: of its first layer."""
    growth_rate = getattr(first.conv2, "out_channels", 1)
    return getattr(first.norm1, "num_features", 1), getattr(first.conv1, "out_channels", 1) // growth_rate, growth_rate


def _sizes(module: Any) -> Any:
    """What must be the same: of a convolution everything, of a norm its channels but neither momentum nor eps."""
    return getattr(module, "num_features", None) or (isinstance(module, nn.Conv2d) and str(module))


def _runs_as(module: nn.Module, trusted: type[Any]) -> bool:
    """Whether a module's forward is the one that we have read."""
    methods = [name for name in ("forward", "bn_function") if hasattr(trusted, name)]
    same = all(getattr(type(module), name, None) is getattr(trusted, name) for name in methods)
    return isinstance(module, trusted) and same and "forward" not in module.__dict__


def _has(module: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(child, kind) for child in module.children())


def _has_hooks(module: nn.Module) -> bool:
    return any(module.__dict__[hooks] for hooks in _HOOKS)


def _joined(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _shown(name: str) -> str:
    return name or "the model itself"


def _densenet() -> Any:
    from torchvision.models import densenet  # Not above: it takes a second, which only a conversion needs.

    return densenet
