"""Exact bytes: what stays allocated between forward and backward, counted by the allocator itself.

float32, so 4 bytes a number. M is the pixels of all images; the input is there before and is not counted.
"""

import pytest
import torch

from memseg.levels import NormMode, Recompute
from memseg.models import build_model
from memseg.models.context import DilatedContext
from memseg.models.stem import Stem
from memseg.nn import Blend, DenseBlock, NormReluConv, ResidualLayer, banded_cross_entropy, layout
from memseg.profiling.measure import watch_allocator

FLOAT_BYTES = 4
RANDOM_STATE_BYTES = torch.get_rng_state().nbytes
"""What every `recompute` keeps, to draw the same random numbers again."""
MARKER_BYTES = 2**28


def kept_bytes(forward, *inputs):
    """Bytes still allocated when `forward` is over, its output among them."""
    with watch_allocator() as peak:
        out = forward(*inputs)
        # Far larger than anything before it, so that the peak is here. It is never touched: no memory is taken.
        torch.empty(MARKER_BYTES, dtype=torch.uint8)
    assert out.requires_grad
    return peak.peak_bytes - MARKER_BYTES


def dense_block(level, norm=NormMode.BATCH):
    """3 layers on 8 channels, growing by 4 through bottlenecks of 16: the layers read 8, 12 and 16, and make 20."""
    return DenseBlock(3, in_channels=8, growth_rate=4, norm=norm, recompute=level)


M = 2 * 8 * 8
BLOCK_INPUT = (2, 8, 8, 8)


@pytest.mark.parametrize(
    ("level", "norm", "features", "statistics"),
    [
        # Every layer keeps its normalised input, its bottleneck and that normalised; every concatenation is kept.
        ("none", "batch", (8 + 12 + 16) + 3 * (16 + 16) + (12 + 16 + 20), 2 * (8 + 12 + 16) + 3 * 2 * 16),
        # The buffer and the bottlenecks. Mean and variance of a channel that is read once, those of a bottleneck for
        # each layer.
        ("norms", "batch", 20 + 3 * 16, 2 * 16 + 3 * 2 * 16),
        ("units", "batch", 20, 2 * 16 + 3 * 2 * 16),
        # The buffer is the output; it lives as long as the block's reader wants it.
        ("segment", "batch", 20, 0),
        ("norms", "frozen", 20 + 3 * 16, 0),
        ("units", "frozen", 20, 0),
        ("segment", "frozen", 20, 0),
    ],
)
def test_a_dense_block_keeps(level, norm, features, statistics):
    block = dense_block(Recompute(level), NormMode(norm))
    kept = kept_bytes(block, torch.randn(BLOCK_INPUT, requires_grad=True))
    random_state = RANDOM_STATE_BYTES if level == "segment" else 0
    assert kept == FLOAT_BYTES * (features * M + statistics) + random_state


@pytest.mark.parametrize(
    ("level", "norm", "features", "statistics"),
    [
        # Of each bottleneck the outputs of its first two convolutions, these normalised, and its third's output; the
        # shortcut's, and both results. Mean and deviation of each norm.
        ("none", "batch", 2 * (4 * 4 + 16) + 16 + 2 * 16, 2 * (2 * (4 + 4 + 16) + 16)),
        ("norms", "batch", 2 * 2 * 4 + 2 * 16, 2 * (2 * (4 + 4 + 16) + 16)),
        ("units", "batch", 2 * 16, 2 * (2 * (4 + 4 + 16) + 16)),
        ("segment", "batch", 16, 0),
        ("norms", "frozen", 2 * 2 * 4 + 2 * 16, 0),
        ("units", "frozen", 2 * 16, 0),
        ("segment", "frozen", 16, 0),
    ],
)
def test_two_bottlenecks_keep(level, norm, features, statistics):
    layer = ResidualLayer(2, in_channels=8, width=4, norm=NormMode(norm), recompute=Recompute(level))
    kept = kept_bytes(layer, torch.randn(BLOCK_INPUT, requires_grad=True))
    random_state = RANDOM_STATE_BYTES if level == "segment" else 0
    assert kept == FLOAT_BYTES * (features * M + statistics) + random_state


def test_a_bottlenecks_backward_takes_no_map_as_wide_as_its_result_beside_the_gradient(monkeypatch):
    monkeypatch.setattr(layout, "_BAND_BYTES", {"cpu": 1})
    layer = ResidualLayer(1, in_channels=64, width=16, recompute=Recompute.UNITS)
    x = layout.channels_last(torch.randn(2, 64, 32, 64)).requires_grad_()
    out = layer(x).sum()
    with watch_allocator() as peak:
        out.backward()
    # Of 16 channels each: 4 maps are the gradient; 3 at a time are outputs of convolutions and gradients of these.
    assert 7 <= peak.peak_bytes / (FLOAT_BYTES * 16 * 2 * 32 * 64) < 8


@pytest.mark.parametrize(
    ("build", "shapes", "numbers"),
    [
        pytest.param(lambda: NormReluConv(6, 4, kernel_size=1), [(2, 6, 8, 8)], 4 * M + 2 * 6, id="1x1"),
        pytest.param(lambda: NormReluConv(6, 4, kernel_size=3), [(2, 6, 8, 8)], 4 * M + 2 * 6, id="3x3"),
        pytest.param(
            lambda: NormReluConv(6, 4, kernel_size=1, pool=True), [(2, 6, 8, 8)], 4 * M // 4 + 2 * 6, id="transition"
        ),
        # Neither the upsampled map nor the joined one.
        pytest.param(lambda: Blend(3, 5, 4), [(2, 3, 4, 4), (2, 5, 8, 8)], 4 * M + 2 * (3 + 5), id="blend"),
        # The bottleneck of 7 channels is what the second unit reads.
        pytest.param(
            lambda: DilatedContext(6, 7, 4, norm=NormMode.BATCH),
            [(2, 6, 8, 8)],
            (7 + 4) * M + 2 * (6 + 7),
            id="context",
        ),
    ],
)
def test_at_units_a_unit_keeps_its_output_and_the_statistics_of_its_norm(build, shapes, numbers):
    module = build()
    module.recompute = Recompute.UNITS
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    assert kept_bytes(module, *inputs) == FLOAT_BYTES * numbers


def test_a_context_rebuilt_whole_keeps_its_output_and_the_random_state():
    context = DilatedContext(6, 7, 4, norm=NormMode.BATCH)
    context.recompute = Recompute.SEGMENT
    kept = kept_bytes(context, torch.randn(2, 6, 8, 8, requires_grad=True))
    assert kept == FLOAT_BYTES * 4 * M + RANDOM_STATE_BYTES


@pytest.mark.parametrize(
    ("level", "convolved"),
    [
        ("units", 0),
        # What the stem's convolution makes lies at half the images' side, its output at a quarter.
        ("norms", 4 * 4 * M),
    ],
)
def test_a_stem_keeps_its_output_and_a_byte_for_each_number_of_it(level, convolved):
    stem = Stem(4, norm=NormMode.BATCH)
    stem.recompute = Recompute(level)
    kept = kept_bytes(stem, torch.randn(2, 3, 32, 32, requires_grad=True))
    assert kept == FLOAT_BYTES * (4 * M + convolved + 2 * 4) + 4 * M


def test_the_loss_keeps_the_coarse_gradient_and_nothing_of_full_size():
    logits = torch.randn(2, 5, 8, 8, requires_grad=True)
    target = torch.randint(5, (2, 64, 64), dtype=torch.uint8)
    assert kept_bytes(banded_cross_entropy, logits, target) == FLOAT_BYTES * (5 * M + 1)


@pytest.mark.parametrize("level", Recompute)
def test_gradients_take_no_more_than_what_they_are_of(level):
    model = build_model("ladder-densenet-mini", num_classes=5)
    model.set_recompute(level)
    images, target = torch.randn(2, 3, 64, 64), torch.randint(5, (2, 64, 64))
    model.objective(0.3)(*model.coarse_outputs(images), target).backward()
    storages = {one.grad.untyped_storage()._cdata: one.grad.untyped_storage().nbytes() for one in model.parameters()}
    assert sum(storages.values()) == sum(one.nbytes for one in model.parameters())


@pytest.mark.parametrize("pool", [False, True])
def test_the_gradient_of_a_part_of_a_concatenation_is_read_where_it_lies(pool):
    unit = NormReluConv(16, 64, kernel_size=1, pool=pool, recompute=Recompute.UNITS)
    x = torch.randn(2, 16, 64, 64, requires_grad=True)
    out = unit(x)
    channels_last = torch.randn(out.shape[0], 2 * 64, *out.shape[2:]).contiguous(memory_format=torch.channels_last)
    part, peaks, found = channels_last[:, 64:], [], []
    for gradient in (part, part.contiguous(memory_format=torch.channels_last)):
        with watch_allocator() as peak:
            found += torch.autograd.grad(out, x, gradient, retain_graph=True)
        peaks.append(peak.peak_bytes)
    in_place, dense = peaks
    assert in_place <= dense
    torch.testing.assert_close(*found)


def test_each_level_of_a_dense_block_peaks_lower_than_the_one_before_and_units_below_half_of_none():
    x = torch.randn(2, 64, 32, 64, requires_grad=True)
    peaks = []
    for level in (Recompute.NONE, Recompute.NORMS, Recompute.UNITS):
        block = DenseBlock(6, in_channels=64, growth_rate=32, recompute=level)
        with watch_allocator() as peak:
            block(x).sum().backward()
        peaks.append(peak.peak_bytes)
    none, norms, units = peaks
    assert none > norms > units
    assert units < none / 2
