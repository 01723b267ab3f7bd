"""What an operator of ours allocates inside itself is what is predicted of it, by the allocator's own count."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from memseg.nn.layout import channels_last, pixels
from memseg.profiling.measure import watch_allocator
from memseg.profiling.timeline import Category
from memseg.profiling.trace import StepTracer

OPS = torch.ops.memseg


def feature_map(batch, channels, height, width):
    return channels_last(torch.randn(batch, channels, height, width))


def numbers(channels):
    """Scale, shift, mean and bias, all alike."""
    return torch.ones(channels)


def cases():
    """Operator and arguments, of maps of several bands each and of one band."""
    for name, batch, channels, out_channels, height, width in (
        ("several bands", 2, 64, 32, 128, 256),
        ("one band", 2, 24, 16, 16, 32),
        ("wide", 2, 256, 128, 64, 64),
    ):
        x, grown = feature_map(batch, channels, height, width), feature_map(batch, out_channels, height, width)
        c, weight = numbers(channels), torch.randn(out_channels, channels)
        kernel = torch.randn(out_channels, channels, 3, 3)
        grad = torch.empty_like(x)
        flat = pixels(x), c, c
        yield f"project, {name}", OPS.project, (*flat, weight, None, pixels(grown))
        for sums in (True, False):
            backward = (pixels(grown), *flat, c, c, weight, pixels(grad), True, sums)
            yield f"project_backward, {name}, sums {sums}", OPS.project_backward, backward
        wide, thin = feature_map(batch, 2 * channels, height, width), numbers(2 * channels)
        yield f"add_shortcut, {name}", OPS.add_shortcut, (pixels(wide), thin, thin, pixels(wide).clone(), [thin, thin])
        for given in ([c] * 4, []):
            moments = (pixels(wide), pixels(x), given, True)
            yield f"project_moments of {len(given)}, {name}", OPS.project_moments, moments
            back, fold = torch.randn(2 * channels, channels), torch.randn(channels, channels)
            folded = (pixels(wide), pixels(x), given, back, fold, c, c, pixels(grad), bool(given))
            yield f"project_folded_backward of {len(given)}, {name}", OPS.project_folded_backward, folded
        strided = feature_map(batch, out_channels, height // 2, width // 2)
        yield f"convolve_strided, {name}", OPS.convolve_strided, (x, c, c, kernel, 2, 1, strided)
        backward = (strided, x, c, c, c, kernel, 2, 1, grad, True)
        yield f"convolve_strided_backward, {name}", OPS.convolve_strided_backward, backward
        pooled = feature_map(batch, out_channels, height // 2, width // 2)
        yield f"project_pooled, {name}", OPS.project_pooled, (x, c, c, weight, None, pooled)
        backward = (pooled, x, c, c, c, c, weight, grad, True)
        yield f"project_pooled_backward, {name}", OPS.project_pooled_backward, backward
        coarse = feature_map(batch, channels, height // 2, width // 2)
        both, twice = [coarse, x], numbers(2 * channels)
        yield f"convolve, {name}", OPS.convolve, ([x], c, c, kernel, None, 1, grown)
        wide = torch.randn(out_channels, 2 * channels, 3, 3)
        yield f"convolve joined, {name}", OPS.convolve, (both, twice, twice, wide, None, 1, grown)
        for sums in (True, False):
            backward = (grown, [x], c, c, c, kernel, 1, [grad], sums)
            yield f"convolve_backward, {name}, sums {sums}", OPS.convolve_backward, backward
            backward = (grown, both, twice, twice, twice, wide, 1, [grad, torch.empty_like(x)], sums)
            yield f"convolve_backward joined, {name}, sums {sums}", OPS.convolve_backward, backward
        yield f"upsampled_statistics, {name}", OPS.upsampled_statistics, (coarse, height, width)
        yield f"complete_upsampled, {name}", OPS.complete_upsampled, (grad, coarse, c, c, c)
        for kernel_size, padding in ((2, 0), (3, 1)):
            window = (kernel_size, 2, padding)
            yield f"pool_normalised {kernel_size}, {name}", OPS.pool_normalised, (x, c, c, *window, True)
            made, offsets = OPS.pool_normalised(x, c, c, *window, True)
            yield f"pool_sums {kernel_size}, {name}", OPS.pool_sums, (made, offsets, x, c, *window)
            yield f"pool_backward {kernel_size}, {name}", OPS.pool_backward, (made, offsets, x, c, c, c, *window)


@pytest.mark.parametrize(("operator", "arguments"), [pytest.param(*rest, id=name) for name, *rest in cases()])
def test_scratch_is_predicted(operator, arguments):
    with watch_allocator() as peak:
        operator(*arguments)
    tracer = StepTracer()
    tracer.know([leaf for leaf in tree_leaves(list(arguments)) if isinstance(leaf, torch.Tensor)], Category.INPUT)
    before = tracer.allocated_bytes
    with tracer:
        operator(*arguments)
    predicted = tracer.peak_bytes - before
    assert peak.peak_bytes == pytest.approx(predicted, rel=0.02, abs=64 * 2**10)
