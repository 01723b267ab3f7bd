"""The tracer sees every storage born and freed, knows whose it is, and leaves nothing behind."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as torch_module

from memseg.profiling.timeline import Category, Phase
from memseg.profiling.trace import StepTracer


def global_hooks():
    return len(torch_module._global_forward_hooks), len(torch_module._global_forward_pre_hooks)


def traced(allocations):
    """(bytes, phase, category, layer) of each, those of no size left out."""
    return [(one.size_bytes, one.phase, one.category, one.layer) for one in allocations if one.size_bytes]


def test_a_tensor_lives_from_its_making_to_its_last_reference():
    tracer = StepTracer()
    with tracer:
        kept = torch.empty(100, dtype=torch.uint8)
        torch.empty(1000, dtype=torch.uint8)
        view = kept.view(10, 10)[2:]
        del kept
        assert (tracer.allocated_bytes, tracer.peak_bytes) == (100, 1100)
        del view
        assert tracer.allocated_bytes == 0
        tracer.reset_peak()
        assert tracer.peak_bytes == 0


def test_allocations_are_named_in_forward_and_in_backward():
    first, second = nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False)
    model = nn.Sequential(first, nn.ReLU(), second)
    x = torch.ones(3, 4)
    tracer = StepTracer([("first", first), ("second", second)])
    tracer.know([first.weight], Category.PARAMETER, "first")
    tracer.know([second.weight], Category.PARAMETER, "second")
    tracer.know([x], Category.INPUT)
    with tracer.tracing():
        tracer.begin(Phase.FORWARD)
        out = model(x)
        tracer.begin(Phase.BACKWARD)
        out.backward(torch.ones_like(out))
    for name, module in (("first", first), ("second", second)):
        tracer.know([module.weight.grad], Category.GRADIENT, name)
    by_layer = traced(tracer.timeline().allocations)
    assert (4 * 8 * 4, Phase.SETUP, Category.PARAMETER, "first") in by_layer
    assert (3 * 4 * 4, Phase.SETUP, Category.INPUT, "") in by_layer
    # The hidden map is saved by ReLU (its own output); the linear layer's output dies at once.
    assert by_layer.count((3 * 8 * 4, Phase.FORWARD, Category.TEMPORARY, "first")) == 1
    assert (8 * 2 * 4, Phase.BACKWARD, Category.GRADIENT, "second") in by_layer
    assert (4 * 8 * 4, Phase.BACKWARD, Category.GRADIENT, "first") in by_layer
    # The gradient of the hidden map is made by the second layer's backward.
    assert (3 * 8 * 4, Phase.BACKWARD, Category.TEMPORARY, "second") in by_layer


def test_work_of_a_linear_layer_is_counted_by_phase():
    layer = nn.Linear(4, 8, bias=False)
    tracer = StepTracer([("layer", layer)])
    with tracer.tracing():
        tracer.begin(Phase.FORWARD)
        out = layer(torch.ones(3, 4, requires_grad=True))
        tracer.begin(Phase.BACKWARD)
        out.backward(out.detach())
    # 2 operations for each product: once in forward, for input and weight in backward.
    work = tracer.take_work()
    assert work[Phase.FORWARD, "layer"].flops == 2 * 3 * 4 * 8
    assert work[Phase.BACKWARD, "layer"].flops == 2 * 2 * 3 * 4 * 8
    assert tracer.take_work() == {}


def test_fake_tensors_of_any_size_are_counted_and_take_no_memory():
    with FakeTensorMode():
        tracer = StepTracer()
        with tracer:
            torch.empty(2**50, dtype=torch.uint8)
    assert tracer.peak_bytes == 2**50


def test_a_trace_leaves_no_hooks_behind_even_when_it_fails():
    before = global_hooks()
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), StepTracer().tracing():
        model(torch.ones(1, 2))
    assert global_hooks() == before
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
