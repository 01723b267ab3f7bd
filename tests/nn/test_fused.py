"""Fused by torch.compile, the layers compute what they compute eager, to rounding.

Compiling takes seconds a kernel, so one block is; elsewhere chains are captured as for compiling, with the same demands
on what is given to them, and then run by torch's own kernels.
"""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from twins import MODULES, build, random_inputs, step, twins

from memseg.levels import NormMode, Recompute
from memseg.nn import DenseBlock, chains, fused_kernels

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Relative to the largest number of a result: sums of some hundred numbers in another order."""


@pytest.fixture(scope="module", autouse=True)
def _leave_nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def fused():
    fused_kernels(True)
    yield
    fused_kernels(False)


@pytest.fixture
def captured(monkeypatch):
    counters.clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        fused_kernels(True)
    assert not set(chains._chains.values()) & set(chains._EAGER.values())
    yield
    fused_kernels(False)


def results(name, dtype, norm, shapes):
    torch.manual_seed(0)
    _, module = build(name, norm)
    module.to(dtype).recompute = Recompute.UNITS
    return [copied(step(module, [x.to(dtype) for x in random_inputs(each)])) for each in shapes]


def copied(found):
    """Running statistics are the module's own, and move on."""
    return {name: value.clone() for name, value in found.items()}


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, value.abs().max().item())
        assert (found[name] - value).abs().max() <= tolerance * scale, name


CASES = [
    *((name, NormMode.BATCH) for name in ("dense block", "1x1", "transition", "transition of odd size", "3x3")),
    *((name, NormMode.BATCH) for name in ("blend", "stem")),
    *((name, NormMode.FROZEN) for name in ("dense block", "transition of odd size", "blend")),
]


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_chains_that_are_captured_compute_what_they_compute_eager(name, norm, request):
    shapes = [[(n, shape[1], n * shape[2], shape[3]) for shape in MODULES[name][1]] for n in (1, 2, 3)]
    expected = results(name, torch.float32, norm, shapes)
    request.getfixturevalue("captured")
    for found, eager in zip(results(name, torch.float32, norm, shapes), expected, strict=True):
        assert_close(found, eager, TOLERANCE[torch.float32])
    assert not counters["graph_break"]


@pytest.mark.usefixtures("captured")
def test_layers_of_all_widths_and_sizes_and_dtypes_share_a_few_kernels():
    # A norm's bias is a parameter, and torch.compile takes the size of one for a constant: each layer had a kernel.
    torch._dynamo.reset()

    def train(in_channels, growth_rate, dtype, batch):
        block = DenseBlock(3, in_channels=in_channels, growth_rate=growth_rate, recompute=Recompute.UNITS).to(dtype)
        step(block, [torch.randn(batch, in_channels, 6, 5 + batch, dtype=dtype)])
        return counters["stats"]["unique_graphs"]

    first = train(5, 2, torch.float32, 2)
    # Each chain at most twice: for bands in one piece, and for slices of wider ones.
    assert 0 < first <= 2 * len(chains._EAGER)
    assert train(9, 4, torch.float32, 1) == train(12, 3, torch.float32, 3) == first
    assert train(7, 2, torch.bfloat16, 2) <= 2 * first
    assert not counters["graph_break"]


@pytest.mark.usefixtures("captured")
def test_what_is_captured_beyond_the_limit_runs_eager(monkeypatch):
    monkeypatch.setattr(chains, "_MOST_KERNELS", 1)
    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        fused_kernels(True)
    for dtype in (torch.float32, torch.float64):
        found = results("dense block", dtype, NormMode.BATCH, [[(2, 5, 6, 7)]])
        fused_kernels(False)
        expected = results("dense block", dtype, NormMode.BATCH, [[(2, 5, 6, 7)]])
        assert_close(found[0], expected[0], TOLERANCE[dtype])


@pytest.mark.usefixtures("captured")
def test_switched_off_the_layers_run_eager_again():
    before = counters["stats"]["calls_captured"]
    fused_kernels(False)
    assert chains._chains == chains._EAGER
    results("dense block", torch.float32, NormMode.BATCH, [[(2, 5, 6, 7)]])
    assert counters["stats"]["calls_captured"] == before


def has_compiler():
    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


@pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler")
def test_a_compiled_dense_block_computes_what_it_computes_eager(request):
    torch.manual_seed(0)
    eager, compiled = (block.float() for block in twins(DenseBlock(2, in_channels=3, growth_rate=2, bn_size=2)))
    eager.recompute = compiled.recompute = Recompute.UNITS
    inputs = [[torch.randn(batch, 3, 4, 5)] for batch in (2, 3)]
    expected = [copied(step(eager, x)) for x in inputs]
    request.getfixturevalue("fused")
    torch._dynamo.reset()
    counters.clear()
    # Trying what the compiler can do with each of the processor's instruction sets would take most of the time.
    with torch._inductor.config.patch({"cpp.vec_isa_ok": True}):
        for x, each in zip(inputs, expected, strict=True):
            assert_close(step(compiled, x), each, TOLERANCE[torch.float32])
    assert counters["inductor"]
    assert not counters["graph_break"]
