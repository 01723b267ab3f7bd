"""A step for a CUDA card keeps what CUDA's operators keep, and leaves the CPU's as they were."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memseg.levels import Precision
from memseg.profiling import Category, Phase, foreign_job, named_optimizer, trace_job
from memseg.profiling.kernels.cuda_semantics import cuda_semantics, foreach_by_default

IMAGES = torch.ones(64, 16)
TOKENS = torch.ones(4, 128, 16)
HALF = [Precision.BFLOAT16, Precision.FLOAT16]


def trace(build, inputs=IMAGES, *, device="cuda", loss="mean", optimizer="sgd", precision=Precision.FLOAT32):
    make = partial(
        foreign_job, build, inputs, loss=loss, optimizer=named_optimizer(optimizer), precision=precision, name="net"
    )
    return trace_job(make, device=device)


def kept(*step, **settings):
    """(layer, type, shape) of all that waits for backward."""
    timeline = trace(*step, **settings).timeline
    alive = timeline.alive(timeline.backward_start - 1)
    return [(one.layer, one.dtype, one.shape) for one in alive if one.category is Category.SAVED]


def dropping():
    return nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.5))


class Attention(nn.Module):
    def __init__(self, dropout, heads=2):
        super().__init__()
        self.project, self.dropout, self.heads = nn.Linear(16, 16), dropout, heads

    def forward(self, tokens):
        query = self.project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(query, query, query, dropout_p=self.dropout)


def test_dropout_keeps_one_byte_for_each_value():
    assert ("1", "bool", (64, 32)) in kept(dropping)
    masks = [one for one in kept(dropping, device="cpu") if one[:1] == ("1",) and one[1] != "float32"]
    assert masks == []


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.BFLOAT16])
def test_attention_keeps_no_matrix_of_weights(dropout, precision):
    shapes = [shape for _, _, shape in kept(partial(Attention, dropout), TOKENS, precision=precision)]
    assert not any(shape[-2:] == (128, 128) for shape in shapes)
    # The output, and the logarithm of a sum for each query and head.
    assert (4, 2, 128, 8) in shapes
    assert (4, 2, 128) in shapes


def test_on_the_cpu_attention_with_dropout_keeps_the_matrix():
    assert any(shape == (4, 2, 128, 128) for _, _, shape in kept(partial(Attention, 0.1), TOKENS, device="cpu"))


@pytest.mark.parametrize("shape", [(128, 8), (4, 128, 8), (4, 2, 128, 8), (3, 4, 2, 128, 8)])
def test_attention_over_any_batch_has_the_shape_of_its_queries(shape):
    query = torch.ones(shape, requires_grad=True)
    with cuda_semantics(Precision.FLOAT32):
        out = F.scaled_dot_product_attention(query, query, query, dropout_p=0.1)
    assert out.shape == shape
    assert torch.allclose(out, query)


def test_values_may_be_narrower_than_queries():
    query, value = torch.ones(2, 4, 128, 8, requires_grad=True), torch.ones(2, 4, 128, 4)
    with cuda_semantics(Precision.FLOAT32):
        assert F.scaled_dot_product_attention(query, query, value).shape == value.shape


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_attention_takes_masks(dtype):
    query, mask = torch.ones(2, 4, 128, 8, requires_grad=True), torch.ones(128, 128, dtype=dtype)
    with cuda_semantics(Precision.FLOAT32):
        out = F.scaled_dot_product_attention(query, query, query, attn_mask=mask, dropout_p=0.1)
    assert torch.allclose(out, query)


def test_grouped_queries_share_keys():
    query, key = torch.ones(2, 4, 6, 8, requires_grad=True), torch.ones(2, 2, 6, 8)
    with cuda_semantics(Precision.FLOAT32):
        out = F.scaled_dot_product_attention(query, key, key, dropout_p=0.1, enable_gqa=True)
    assert out.shape == query.shape


@pytest.mark.parametrize("precision", HALF)
def test_under_autocast_cross_entropy_keeps_log_probabilities_in_float32(precision):
    found = kept(partial(nn.Linear, 16, 32), loss="cross-entropy", precision=precision)
    assert ("loss", "float32", (64, 32)) in found
    assert ("loss", str(precision), (64, 32)) not in found


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize(
    "layer",
    [partial(nn.LayerNorm, 32), partial(nn.GroupNorm, 4, 32), partial(nn.Softmax, 1), partial(nn.LogSoftmax, 1)],
    ids=lambda one: one.func.__name__,
)
def test_under_autocast_these_layers_compute_in_float32(layer, precision):
    timeline = trace(lambda: nn.Sequential(nn.Linear(16, 32), layer(), nn.Linear(32, 4)), precision=precision).timeline
    made = [one for one in timeline.allocations if (one.layer, one.phase) == ("1", Phase.FORWARD)]
    assert {one.dtype for one in made if one.shape == (64, 32)} == {"float32"}


@pytest.mark.parametrize("precision", HALF)
def test_products_stay_in_half_precision(precision):
    assert ("1", str(precision), (64, 32)) in kept(
        lambda: nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 32), nn.GELU()), precision=precision
    )


# Optimizers.

SIDE, COUNT = 100, 8


class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(16, SIDE, bias=False) for _ in range(COUNT))

    def forward(self, images):
        return torch.cat([part(images) for part in self.parts], 1)


def at_optimizer(device, optimizer):
    """The most that an optimizer's temporaries are at once, in steady steps."""
    timeline = trace(Parallel, device=device, optimizer=optimizer).timeline
    born = [one.born for one in timeline.allocations if one.phase is Phase.OPTIMIZER]
    return max((timeline.by_category(instant)[Category.TEMPORARY] for instant in born), default=0)


def test_adam_by_lists_is_the_default_on_cuda_and_takes_temporaries_as_large_as_the_parameters():
    parameter = 16 * SIDE * 4
    assert at_optimizer("cuda", "adam") == at_optimizer("cuda", "adam-foreach") == COUNT * parameter
    # One after the other: a root and a denominator, and the denominator of the parameter before.
    assert at_optimizer("cpu", "adam") == at_optimizer("cuda", "adam-loop") == 3 * parameter


@pytest.mark.parametrize("name", ["adam-loop", "adam-fused", "sgd-loop", "momentum-fused"])
def test_an_optimizer_that_was_told_its_kernels_keeps_them(name):
    optimizer = named_optimizer(name)([nn.Parameter(torch.ones(2))])
    before = dict(optimizer.param_groups[0])
    foreach_by_default(optimizer)
    assert optimizer.param_groups[0] == before


# What is left behind.


def test_afterwards_the_cpu_computes_as_before():
    everything = nn.Sequential(nn.Linear(16, 16), Attention(0.1), nn.LayerNorm(8), nn.Dropout(0.5))

    def figures():
        return [
            kept(everything, TOKENS, device="cpu", loss="cross-entropy", precision=precision)
            for precision in (Precision.FLOAT32, Precision.BFLOAT16)
        ]

    before = figures()
    for precision in Precision:
        if precision is not Precision.FLOAT64:
            assert kept(everything, TOKENS, loss="cross-entropy", precision=precision) not in before
    assert figures() == before


def test_nothing_stays_registered_where_a_step_fails():
    images = torch.ones(1000, requires_grad=True)
    with cuda_semantics(Precision.BFLOAT16):
        assert F.dropout(images).grad_fn.name() == "NativeDropoutBackward0"
    with pytest.raises(IndexError), cuda_semantics(Precision.BFLOAT16):
        images[1000]
    assert F.dropout(images).grad_fn.name() == "MulBackward0"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.softmax(torch.ones(2, 2, dtype=torch.bfloat16), 1).dtype is torch.bfloat16
