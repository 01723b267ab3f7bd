"""Batch norm's modes, and that a batch counts once."""

import pytest
import torch
from torch import nn
from twins import MODULES, build, random_inputs, step

from memseg.levels import NormMode, Recompute
from memseg.nn import BatchNorm2d, DenseBlock, NormReluConv, rebuild, statistics_paused
from memseg.nn.batch_norm import Statistics


def test_batch_mode_is_torchs_batch_norm():
    ours, theirs = BatchNorm2d(3), nn.BatchNorm2d(3)
    for batch in range(3):
        x = torch.randn(2, 3, 4, 4) * batch
        assert torch.equal(ours(x), theirs(x))
    for name, expected in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], expected), name
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_running_statistics_follow_the_unbiased_variance():
    norm = BatchNorm2d(1, momentum=0.5)
    # 1, 1, 5, 5: mean 3, biased variance 4, unbiased 16 / 3; half way from mean 0 and variance 1.
    norm.follow(Statistics(torch.tensor([3.0]), torch.tensor([4.0]), 4))
    assert (norm.running_mean.item(), norm.num_batches_tracked.item()) == (1.5, 1)
    assert norm.running_var.item() == pytest.approx((1 + 16 / 3) / 2)


@pytest.mark.parametrize("level", Recompute)
@pytest.mark.parametrize("name", MODULES)
def test_frozen_stays_frozen_after_train(name, level):
    _, module = build(name, NormMode.FROZEN)
    module.recompute = level
    module.eval().train()
    before = {key: value.clone() for key, value in module.named_buffers()}
    gradients = step(module, random_inputs(MODULES[name][1]))
    for key, value in module.named_buffers():
        assert torch.equal(value, before[key]), key
    norms = [key for key, one in module.named_modules() if isinstance(one, BatchNorm2d)]
    affine = {f"gradient of {key}.{part}" for key in norms for part in ("weight", "bias")}
    assert affine
    assert not affine & gradients.keys()


@pytest.mark.parametrize("level", Recompute)
@pytest.mark.parametrize("name", MODULES)
def test_a_batch_is_counted_once_whatever_is_rebuilt(name, level):
    # A forward that runs again in backward would count it again: pytorch/pytorch#96136.
    _, module = build(name)
    module.recompute = level
    step(module, random_inputs(MODULES[name][1]))
    counts = [value.item() for key, value in module.named_buffers() if key.endswith("num_batches_tracked")]
    assert counts
    assert set(counts) == {1}


def test_paused_statistics_hold_still_and_change_no_output():
    norm, x = BatchNorm2d(3), torch.randn(2, 3, 4, 4)
    with statistics_paused():
        paused = norm(x)
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros(3))
    assert torch.equal(paused, norm(x))
    assert norm.num_batches_tracked == 1


def test_rebuilding_draws_the_same_random_numbers():
    x = torch.ones(1000, requires_grad=True)
    out = rebuild(lambda x: nn.functional.dropout(x), x)
    torch.rand(1)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


@pytest.mark.parametrize("level", Recompute)
def test_a_batch_of_one_value_per_channel_has_no_variance(level):
    # What torch's batch norm says too: one image of 64x64 leaves one pixel at /64.
    x = torch.randn(1, 4, 1, 1)
    for module in (
        DenseBlock(2, in_channels=4, growth_rate=2, recompute=level),
        NormReluConv(4, 2, kernel_size=1, recompute=level),
        NormReluConv(4, 2, kernel_size=3, recompute=level),
    ):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            module(x)


def test_structure_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0, 4, 2 and 1"):
        DenseBlock(0, in_channels=4, growth_rate=2)
    with pytest.raises(ValueError, match="kernel_size must be 1 or 3, got 5"):
        NormReluConv(4, 2, kernel_size=5)
    with pytest.raises(ValueError, match="pool needs kernel_size 1"):
        NormReluConv(4, 2, kernel_size=3, pool=True)
