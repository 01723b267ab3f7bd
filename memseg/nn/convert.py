"""Anybody's network with memseg's layers inside: dense blocks and BN-ReLU-convolution runs, found and converted.

A network is converted where it stands. Modules keep their identity, and so parameters, buffers, hooks, names and the
optimizer that was made for them; what changes is their class. Only what is known to compute the same is touched: a
class whose forward we have read (torchvision's dense block, nn.Sequential), around members that are exactly torch's
own. Everything else that looks alike is left, and said to be left, with the reason.

    torchvision's _DenseBlock                             a DenseBlock
    BN, ReLU, convolution [, 2x2 average pooling]         one node (`norm_relu_conv`) in a FusedSequential
    convolution of images, BN, ReLU, max-pooling          one node (`conv_norm_relu_pool`) in a FusedSequential
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from memseg.errors import UnknownNameError
from memseg.levels import NormMode, Recompute
from memseg.nn.batch_norm import BatchNorm2d
from memseg.nn.dense_block import DenseBlock
from memseg.nn.fused_sequential import FusedSequential, fused_class, has_hooks, member_refusal, pieces_of
from memseg.nn.recompute import has_levels, parse_level

_MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)
"""What every module has: parameters, buffers, children, hooks, the training flag."""


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
    for piece in pieces_of(sequential, nn.BatchNorm2d, BatchNorm2d):
        if piece.why_not:
            yield Left(_joined(name, next(iter(piece.members))), piece.why_not)
        if len(piece.members) == 1:
            continue
        norm = next(member for member in piece.members.values() if isinstance(member, nn.BatchNorm2d))
        if isinstance(sequential, FusedSequential) and isinstance(norm, BatchNorm2d):
            continue
        _convert_norm(norm, mode)
        if not isinstance(sequential, FusedSequential):
            sequential.__class__ = fused_class(cast(Any, type(sequential)))
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
        if has_hooks(layer):
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
        if why := member_refusal([(name, module)], (nn.BatchNorm2d, BatchNorm2d)):
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


def _joined(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _shown(name: str) -> str:
    return name or "the model itself"


def _densenet() -> Any:
    from torchvision.models import densenet  # Not above: it takes a second, which only a conversion needs.

    return densenet
