"""What torch's own CPU kernels allocate beside their outputs, held against the allocator."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from memseg.profiling.kernels.workspace import Transient, kernel_workspace
from memseg.profiling.measure import watch_allocator
from memseg.profiling.trace import StepTracer

aten = torch.ops.aten
SMALL_BYTES = 64
"""Numbers that torch wraps as tensors."""


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def both_peaks(run: Callable[..., object], *operands: Tensor | list[Tensor]) -> tuple[int, int]:
    """Predicted and measured peak of a call, outputs included."""
    with FakeTensorMode() as mode:
        fake = tree_map(mode.from_tensor, list(operands))
        tracer = StepTracer()
        tracer.know([one for one in fake if isinstance(one, Tensor)], "input")
        before = tracer.allocated_bytes
        tracer.reset_peak()
        with tracer:
            kept = run(*fake)
        predicted = tracer.peak_bytes - before
        del kept
    run(*operands)
    with watch_allocator() as peak:
        kept = run(*operands)
    del kept
    return predicted, peak.peak_bytes


def batch_norm_backward(grad, x, weight):
    statistics = (weight, weight, weight, weight, weight)
    return aten.native_batch_norm_backward(grad, x, *statistics, True, 1e-5, [True] * 3)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm_makes_the_gradient_of_its_input_twice(dtype, layout, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.randn(2, 32, 16, 24, dtype=dtype).contiguous(memory_format=layout)
        predicted, measured = both_peaks(batch_norm_backward, x, x.clone(), torch.ones(32))
    finally:
        torch.set_num_threads(before)
    assert predicted == measured
    assert predicted >= 2 * x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layer_norm_copies_what_is_not_contiguous(dtype):
    x = torch.randn(4, 64, 49, dtype=dtype).transpose(1, 2)
    weight = torch.ones(64, dtype=dtype)
    predicted, measured = both_peaks(lambda x, w: aten.native_layer_norm(x, [64], w, w, 1e-5), x, weight)
    assert predicted == measured

    def backward(grad, x, w, mean):
        return aten.native_layer_norm_backward(grad, x, [64], mean, mean, w, w, [True] * 3)

    mean = torch.zeros(4, 49, 1, dtype=dtype)
    for grad in (x, x.contiguous()):
        predicted, measured = both_peaks(backward, grad, x, weight, mean)
        assert predicted == measured


def test_softmax_copies_channels_last_maps():
    logits = last(torch.randn(2, 19, 32, 48))
    predicted, measured = both_peaks(lambda x: torch.log_softmax(x, 1), logits)
    assert predicted == measured == 2 * logits.nbytes
    output = torch.log_softmax(logits, 1)
    predicted, measured = both_peaks(
        lambda grad, out: aten._log_softmax_backward_data(grad, out, 1, torch.float32), logits, output
    )
    assert predicted == measured


def test_a_safe_softmax_marks_what_is_masked():
    weights = torch.randn(2, 4, 64, 64)
    predicted, measured = both_peaks(lambda x: aten._safe_softmax(x, -1), weights)
    assert 0 <= measured - predicted <= SMALL_BYTES
    assert predicted == weights.nbytes + weights.numel() + 2 * 4 * 64


def test_an_embedding_copies_a_gradient_that_is_not_contiguous():
    grad = torch.randn(128, 32, 64).transpose(0, 1)
    ids = torch.randint(100, (32, 128))
    predicted, measured = both_peaks(
        lambda grad, ids: aten.embedding_dense_backward(grad, ids, 100, -1, False), grad, ids
    )
    assert predicted == measured == grad.nbytes + 100 * 64 * 4


@pytest.mark.parametrize(
    ("shape", "size"), [((2, 32, 8, 16), (16, 32)), ((2, 32, 8, 16), (96, 96)), ((2, 32, 1, 1), (96, 96))]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_upsampling_goes_through_channels_last_maps_when_they_are_small(shape, size, layout):
    x = torch.randn(*shape).contiguous(memory_format=layout)
    predicted, measured = both_peaks(lambda x: F.interpolate(x, size, mode="bilinear", align_corners=False), x)
    assert predicted == measured


def test_a_slice_of_channels_last_gradients_is_copied_before_it_is_downsampled():
    grad = last(torch.randn(2, 64, 32, 32))[:, :32]
    predicted, measured = both_peaks(
        lambda grad: aten.upsample_bilinear2d_backward(grad, [32, 32], [2, 32, 16, 16], False), grad
    )
    assert predicted == measured == grad.numel() * 4 + 2 * grad.numel()


def test_a_mean_of_half_precision_is_taken_of_a_float32_copy():
    x = torch.randn(2, 64, 32, 32).to(torch.bfloat16)
    predicted, measured = both_peaks(lambda x: x.mean((2, 3)), x)
    assert abs(predicted - measured) <= 64 * 2 * 8
    assert predicted > 2 * x.nbytes


@pytest.mark.parametrize("operation", [torch.add, torch.mul, torch.sub, lambda x, y: x.add_(y)])
def test_arithmetic_casts_the_narrower_operand_as_a_whole(operation):
    wide, narrow = torch.randn(8, 3, 64, 64), torch.randn(8, 3, 64, 64).to(torch.bfloat16)
    predicted, measured = both_peaks(operation, wide, narrow)
    assert predicted == measured
    # 4 bytes for each value of the cast, whatever the result takes.
    assert Transient(0, 4 * narrow.numel()) in kernel_workspace(aten.add.Tensor, (wide, narrow), {}, "cpu")


def test_nothing_is_cast_between_equal_types_or_for_numbers():
    x = torch.randn(4, 4)
    assert kernel_workspace(aten.mul.Tensor, (x, x), {}, "cpu") == []
    assert kernel_workspace(aten.mul.Tensor, (x, 2.0), {}, "cpu") == []
    assert kernel_workspace(aten.mul.Tensor, (x, torch.tensor(2.0, dtype=torch.float64)), {}, "cpu") == []


def test_rolling_over_two_dimensions_goes_one_after_the_other():
    x = torch.randn(2, 28, 28, 32)
    assert both_peaks(lambda x: x.roll((-3, -3), (1, 2)), x) == (2 * x.nbytes, 2 * x.nbytes)
    assert both_peaks(lambda x: x.roll(-3, 1), x) == (x.nbytes, x.nbytes)


@pytest.mark.parametrize("length", [49, 197, 800])
def test_attention_takes_a_block_of_weights_for_each_thread(length):
    query, key, value = torch.randn(2, length, 3, 4, 32).permute(2, 0, 3, 1, 4).unbind(0) * 1
    forward = aten._scaled_dot_product_flash_attention_for_cpu
    predicted, measured = both_peaks(lambda q, k, v: forward(q, k, v), query, key, value)
    assert predicted == measured
    output, logsumexp = forward(query, key, value)
    predicted, measured = both_peaks(
        lambda g, q, k, v, o, s: aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, o, s, 0.0, False
        ),
        torch.ones_like(output), query, key, value, output, logsumexp,
    )  # fmt: skip
    assert abs(predicted - measured) <= torch.get_num_threads() * 256 * 4


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_fused_step_copies_the_largest_gradient_that_is_not_contiguous(optimizer):
    weights = [last(torch.randn(32, 16, 3, 3)), last(torch.randn(16, 16, 3, 3)), torch.randn(64, 64)]
    parameters = [torch.nn.Parameter(weight) for weight in weights]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    stepper = optimizer(parameters, lr=0.1, fused=True)
    stepper.step()
    with watch_allocator() as peak:
        stepper.step()
    grads = [parameter.grad for parameter in parameters]
    (transient,) = kernel_workspace(aten._fused_adam_.default, (parameters, grads), {}, "cpu")
    assert 0 <= peak.peak_bytes - transient.size_bytes <= SMALL_BYTES
    assert transient == Transient(0, 32 * 16 * 9 * 4)


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_steps_of_optimizers_take_what_the_trace_sees(optimizer, how):
    def build():
        parameters = [torch.nn.Parameter(torch.randn(64, 64)), torch.nn.Parameter(torch.randn(32, 16, 3, 3))]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        stepper = optimizer(parameters, lr=0.1, weight_decay=0.1, **how)
        stepper.step()
        return stepper, parameters

    stepper, parameters = build()
    with watch_allocator() as peak:
        stepper.step()
    with FakeTensorMode():
        stepper, parameters = build()
        tracer = StepTracer()
        tracer.know([tensor for one in parameters for tensor in (one, one.grad)], "parameter")
        held = [value for state in stepper.state.values() for value in state.values() if isinstance(value, Tensor)]
        tracer.know(held, "optimizer state")
        before = tracer.allocated_bytes
        tracer.reset_peak()
        with tracer:
            stepper.step()
        assert 0 <= peak.peak_bytes - (tracer.peak_bytes - before) <= SMALL_BYTES
