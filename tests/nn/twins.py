"""The same module twice, once as the plain network under autograd, and everything that training sees of it."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from memseg.levels import NormMode, Recompute
from memseg.models.context import DilatedContext
from memseg.models.stem import Stem
from memseg.nn import BatchNorm2d, Blend, DenseBlock, NormReluConv, ResidualLayer

Shapes = Sequence[tuple[int, ...]]

MODULES: dict[str, tuple[Callable[[NormMode], nn.Module], Shapes]] = {
    "dense block": (lambda norm: DenseBlock(3, in_channels=5, growth_rate=4, bn_size=2, norm=norm), [(2, 5, 6, 7)]),
    "dilated dense block": (
        lambda norm: DenseBlock(2, in_channels=5, growth_rate=4, bn_size=2, dilation=2, norm=norm),
        [(2, 5, 6, 7)],
    ),
    # The first bottleneck has a convolution in its shortcut, the second has none.
    "residual layer": (lambda norm: ResidualLayer(2, in_channels=6, width=2, norm=norm), [(2, 6, 6, 7)]),
    "strided residual layer": (
        lambda norm: ResidualLayer(2, in_channels=6, width=2, stride=2, norm=norm),
        [(2, 6, 5, 8)],
    ),
    "dilated residual layer": (
        lambda norm: ResidualLayer(2, in_channels=8, width=2, dilation=4, first_dilation=2, norm=norm),
        [(2, 8, 6, 7)],
    ),
    "1x1": (lambda norm: NormReluConv(6, 5, kernel_size=1, norm=norm), [(2, 6, 5, 7)]),
    "1x1 with bias": (lambda norm: NormReluConv(6, 5, kernel_size=1, bias=True, norm=norm), [(2, 6, 5, 7)]),
    "transition": (lambda norm: NormReluConv(6, 4, kernel_size=1, pool=True, norm=norm), [(2, 6, 4, 6)]),
    "transition of odd size": (lambda norm: NormReluConv(6, 4, kernel_size=1, pool=True, norm=norm), [(2, 6, 5, 7)]),
    "3x3": (lambda norm: NormReluConv(6, 4, kernel_size=3, norm=norm), [(2, 6, 5, 7)]),
    "3x3 dilated with bias": (
        lambda norm: NormReluConv(6, 4, kernel_size=3, dilation=2, bias=True, norm=norm),
        [(2, 6, 5, 7)],
    ),
    "blend": (lambda norm: Blend(3, 4, 5, norm=norm), [(2, 3, 3, 4), (2, 4, 6, 8)]),
    "blend to odd size": (lambda norm: Blend(3, 4, 5, norm=norm), [(2, 3, 3, 4), (2, 4, 5, 9)]),
    "stem": (lambda norm: Stem(4, norm=norm), [(2, 3, 16, 24)]),
    "context": (lambda norm: DilatedContext(6, 8, 5, norm=norm), [(2, 6, 5, 7)]),
}
"""Every module that can rebuild: how it is built, and the shapes of its inputs."""


def build(name: str, norm: NormMode = NormMode.BATCH) -> tuple[nn.Module, nn.Module]:
    """(plain, other), in float64 and alike: change the `recompute` of the other."""
    return twins(MODULES[name][0](norm))


def twins(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(plain, other), in float64 and alike; norms are given weights of both signs and statistics of their own."""
    module = module.double().train()
    for norm in module.modules():
        if isinstance(norm, BatchNorm2d):
            with torch.no_grad():
                norm.weight.normal_()
                norm.bias.normal_()
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
    module.recompute = Recompute.NONE  # type: ignore[assignment]
    return module, copy.deepcopy(module)


def random_inputs(shapes: Shapes) -> list[Tensor]:
    """Inputs in float64."""
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def step(module: nn.Module, inputs: Sequence[Tensor], grad: Tensor | None = None) -> dict[str, Tensor]:
    """One forward and backward: the output, the gradients, and the buffers afterwards, each by name.

    Args:
        module: Its gradients are cleared first.
        inputs: Taken as leaves, memory layout kept.
        grad: Of the output; where none is given, `output_gradient`.
    """
    leaves = [x.detach().requires_grad_() for x in inputs]
    module.zero_grad()
    out: Tensor = module(*leaves)
    out.backward(output_gradient(out) if grad is None else grad)
    return {"output": out.detach(), **gradients(module, leaves), **dict(module.named_buffers())}


def output_gradient(out: Tensor) -> Tensor:
    """A gradient for an output, always the same and of ordinary layout."""
    return torch.arange(out.numel(), dtype=out.dtype).sin().view(out.shape)


def gradients(module: nn.Module, leaves: Sequence[Tensor] = ()) -> dict[str, Tensor]:
    """The gradients that have arrived, by name; one that has not is left out."""
    named = [*((f"input {index}", x) for index, x in enumerate(leaves)), *module.named_parameters()]
    return {f"gradient of {name}": x.grad for name, x in named if x.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, and under each the same numbers to 1e-10, relative to the largest of them."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, float(value.abs().max())) if value.numel() else 1.0
        error = (found[name] - value).abs().max()
        assert error <= 1e-10 * scale, f"{name} is off by {error:.1e}"
