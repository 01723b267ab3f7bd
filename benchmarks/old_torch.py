"""What PyTorch 1.5 to 1.9 kept in memory and PyTorch of today does not.

Published figures of that time are of runs that allocated more for the same network. Here is what differed, to be put in
place around a trace: they are facts about those versions, no part of memseg's predictions for the torch it runs on.

    softmax, log_softmax    kept their input as well as their result, of which only the result was read: for a loss one
                            more logit tensor of full size for each head. Changed in 1.11 (pytorch/pytorch pull request
                            65242, issues 49600 and 64000)
    ReLU, not in place      kept its input instead of its result; changed in 1.10 (pull request 63089)
    zero_grad               filled gradients with zeros instead of dropping them; changed in 2.0 (`Job.keep_gradients`)
    SyncBatchNorm           the same tensors as today; but it refuses CPU tensors, fake ones too, so it has a stand-in

Source: `struct LogSoftmaxBackward { SavedVariable self_; SavedVariable result_; }` and `struct ReluBackward0 {
SavedVariable self_; }` in torch/include/torch/csrc/autograd/generated/Functions.h of the wheels 1.5.0, 1.6.0, 1.8.1 and
1.9.0; torch/nn/modules/_functions.py of 1.5.0.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

_aten = torch.ops.aten


@contextmanager
def old_autograd() -> Iterator[None]:
    """Inside, softmax, log-softmax and ReLU keep for backward what they kept then.

    Put in place at the dispatcher, so that cross-entropy and attention are met as well, in whatever mode they run.
    """
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in ("_softmax", "_log_softmax"):
            library.impl(name, _old_softmax(name), "AutogradCPU")
        library.impl("relu", _OldReLU.apply, "AutogradCPU")
        yield


def _old_softmax(name: str) -> Callable[[Tensor, int, bool], Tensor]:
    def run(logits: Tensor, dim: int, half_to_float: bool) -> Tensor:
        result: Tensor = _OldSoftmax.apply(logits, dim, half_to_float, name)
        return result

    return run


class _OldSoftmax(torch.autograd.Function):
    """Softmax or log-softmax that keeps its input as well as its result."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, dim: int, half_to_float: bool, name: str) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            result: Tensor = getattr(_aten, name)(logits, dim, half_to_float)
        ctx.save_for_backward(logits, result)
        ctx.dim, ctx.name = dim, name
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, result = ctx.saved_tensors
        grad_logits = getattr(_aten, f"{ctx.name}_backward_data")(grad, result, ctx.dim, logits.dtype)
        return grad_logits, None, None, None


class _OldReLU(torch.autograd.Function):
    """ReLU, not in place, that keeps its input instead of its result."""

    @staticmethod
    def forward(ctx: FunctionCtx, features: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            result: Tensor = _aten.relu(features)
        ctx.save_for_backward(features)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (features,) = ctx.saved_tensors
        grad_features: Tensor = _aten.threshold_backward(grad, features, 0)
        return grad_features


class SyncBatchNormStandIn(nn.BatchNorm2d):
    """torch.nn.SyncBatchNorm on one process and any device: the same tensors saved, made and freed.

    The real one refuses CPU tensors, and its kernels have no CPU form.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise with batch statistics in training, with the running ones otherwise."""
        if not self.training:
            return super().forward(input)
        normalised: Tensor = _SyncBatchNorm.apply(input, self.weight, self.bias)
        return normalised


class _SyncBatchNorm(torch.autograd.Function):
    """What torch/nn/modules/_functions.py allocates (1.5.0 and since), in its order.

    Saved are the contiguous input, the weight and two statistics of each channel, never the output. Values are those
    of one process.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        input = input.contiguous()
        mean = input.new_empty(input.shape[1])
        invstd = torch.empty_like(mean)
        ctx.save_for_backward(input, weight, mean, invstd)
        return torch.empty_like(input)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad = grad.contiguous()
        input, weight, mean, _ = ctx.saved_tensors
        sums = grad.new_empty(2, mean.numel())
        grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(weight)
        grad_input = torch.empty_like(input)
        del sums
        return grad_input, grad_weight, grad_bias


def replace_sync_batch_norm(module: nn.Module) -> nn.Module:
    """The module with every SyncBatchNorm exchanged for its stand-in."""
    for name, child in module.named_children():
        setattr(module, name, replace_sync_batch_norm(child))
    if not isinstance(module, nn.SyncBatchNorm):
        return module
    stand_in = SyncBatchNormStandIn(module.num_features, module.eps, module.momentum, module.affine)
    stand_in.weight.requires_grad_(module.weight.requires_grad)
    stand_in.bias.requires_grad_(module.bias.requires_grad)
    return stand_in
