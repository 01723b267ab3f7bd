"""Dropout inside a dense block: one mask for forward and backward, drawn as the plain network draws it.

The plain network's maps lie as its input does, and a layer that rebuilds makes channels-last ones. Random numbers are
drawn in the order of memory: so the same seed gives the same masks where the input is channels-last.
"""

import copy

import pytest
import torch
from test_autocast import HALF
from twins import assert_same, gradients, output_gradient, step, twins

from memseg.levels import NormMode, Recompute
from memseg.nn import DenseBlock

REBUILDING = [level for level in Recompute if level is not Recompute.NONE]
DROP, KEEP = 0.25, 0.75


def pair(norm=NormMode.BATCH, **other):
    """(plain, other) with dropout, in float64."""
    torch.manual_seed(1)
    return twins(DenseBlock(3, in_channels=5, growth_rate=4, bn_size=2, drop_rate=DROP, norm=norm, **other))


def features(batch=2, size=(6, 7)):
    x = torch.randn(batch, 5, *size, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last)


def seeded(run, *arguments):
    torch.manual_seed(7)
    return run(*arguments)


@pytest.mark.parametrize("level", REBUILDING)
@pytest.mark.parametrize("norm", NormMode)
def test_the_same_seed_gives_outputs_and_gradients_of_the_plain_block(norm, level):
    plain, other = pair(norm)
    other.recompute = level
    for batch in (2, 1):
        x = features(batch)
        assert_same(seeded(step, other, [x]), seeded(step, plain, [x]))


@pytest.mark.parametrize("level", REBUILDING)
def test_two_batches_that_accumulate_have_masks_of_their_own(level):
    plain, other = pair()
    other.recompute = level
    batches = [features(), features()]

    def accumulate(block):
        outputs = [block(x) for x in batches]
        for out in outputs:
            out.backward(output_gradient(out))
        return gradients(block)

    assert_same(seeded(accumulate, other), seeded(accumulate, plain))


@pytest.mark.parametrize("level", REBUILDING)
def test_a_graph_that_is_walked_again_has_the_same_masks(level):
    plain, other = pair()
    other.recompute = level
    x = features()

    def twice(block):
        leaf = x.clone().requires_grad_()
        out = block(leaf)
        for _ in range(2):
            torch.rand(3)
            out.backward(output_gradient(out), retain_graph=True)
        return gradients(block, [leaf])

    assert_same(seeded(twice, other), seeded(twice, plain))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("level", REBUILDING)
def test_under_autocast_the_same_numbers_are_dropped(level, dtype):
    plain, other = (block.float() for block in pair())
    other.recompute = level

    def run(block):
        with torch.autocast("cpu", dtype):
            return block(x)

    x = features().to(dtype)
    found, expected = seeded(run, other), seeded(run, plain)
    assert found.dtype == dtype
    assert torch.equal(found == 0, expected == 0)
    assert (found == 0).any()


@pytest.mark.parametrize("level", Recompute)
def test_the_expected_share_of_what_layers_add_is_dropped_and_nothing_of_the_input(level):
    torch.manual_seed(2)
    block = DenseBlock(3, in_channels=5, growth_rate=16, drop_rate=DROP, recompute=level)
    x = torch.randn(2, 5, 32, 32)
    with torch.no_grad():
        out = block(x)
    assert torch.equal(out[:, :5], x)
    # 98304 draws: the share's standard deviation is sqrt(0.25 * 0.75 / 98304) = 0.0014.
    assert abs((out[:, 5:] == 0).double().mean() - DROP) < 5 * 0.0014
    shares = (out[:, 5:] == 0).double().mean((0, 2, 3))
    assert shares.min() > 0.15
    assert shares.max() < 0.35


@pytest.mark.parametrize("level", Recompute)
def test_what_is_kept_is_scaled_up(level):
    _, block = pair()
    block.recompute = level
    x = features()
    dropped, layer = block(x)[:, 5:9], block.denselayer1
    layer.drop_rate = 0.0
    whole = layer(x)
    expected = torch.where(dropped == 0, 0, whole / KEEP)
    torch.testing.assert_close(dropped, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("level", Recompute)
def test_backward_drops_what_forward_dropped(level):
    # Of a map of one pixel, the gradient of the 3x3 kernel's middle is that of the number it made, times what it read.
    torch.manual_seed(3)
    layers = DenseBlock(1, in_channels=5, growth_rate=64, bn_size=1, drop_rate=DROP, norm=NormMode.FROZEN).double()
    layers.recompute = level
    layer = layers.denselayer1
    torch.nn.init.uniform_(layer.norm2.bias, 1, 2)
    x, grad = torch.randn(1, 5, 1, 1).double(), torch.randn(1, 69, 1, 1).double()
    out = layers(x)
    torch.rand(9)
    out.backward(grad)
    read = layer.norm2(layer.conv1(layer.norm1(x).relu())).relu().flatten()
    kept = out[0, 5:, 0, 0] != 0
    assert 0 < kept.sum() < 64
    expected = torch.outer(grad[0, 5:, 0, 0] * kept / KEEP, read)
    torch.testing.assert_close(layer.conv2.weight.grad[:, :, 1, 1], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("level", Recompute)
def test_in_eval_mode_nothing_is_drawn_and_nothing_dropped(level):
    _, block = pair()
    block.recompute = level
    block.eval()
    x = features()
    before = torch.get_rng_state()
    found = step(block, [x])
    assert torch.equal(torch.get_rng_state(), before)
    without = copy.deepcopy(block)
    for layer in without.layers:
        layer.drop_rate = 0.0
    assert_same(found, step(without, [x]))
    assert (found["output"] != 0).all()


@pytest.mark.parametrize("level", Recompute)
def test_a_forward_draws_once_and_backward_leaves_the_random_state_as_it_was(level):
    plain, block = pair()
    block.recompute = level
    x = features()
    torch.manual_seed(7)
    plain(x)
    after_plain = torch.get_rng_state()
    torch.manual_seed(7)
    out = block(x)
    assert torch.equal(torch.get_rng_state(), after_plain)
    torch.rand(5)
    before = torch.get_rng_state()
    out.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("level", REBUILDING)
def test_without_gradients_a_block_in_training_mode_drops_all_the_same(level):
    plain, other = pair()
    other.recompute = level
    x = features()
    expected = seeded(plain, x).detach()
    with torch.no_grad():
        found = seeded(other, x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("drop_rate", [-0.1, 1.0])
def test_a_drop_rate_that_leaves_nothing_or_is_negative_is_refused(drop_rate):
    with pytest.raises(ValueError, match=f"drop_rate must be at least 0 and less than 1, got {drop_rate}"):
        DenseBlock(1, in_channels=2, growth_rate=2, drop_rate=drop_rate)
