"""Work of single operations, whose operations and bytes can be counted in the head."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from memseg.nn import operators  # noqa: F401
from memseg.planning import Work
from memseg.planning.roofline import ProductKind
from memseg.profiling.kernels.work import operation_work
from memseg.profiling.trace import StepTracer

FLOAT = 4


class Recorder(TorchDispatchMode):
    """The work of each operation, by name."""

    def __init__(self):
        super().__init__()
        self.seen: dict[str, Work] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.seen[name] = self.seen.get(name, Work(0, 0)) + operation_work(func, args, kwargs or {}, out)
        return out


def works(run) -> dict[str, Work]:
    with Recorder() as recorder:
        run()
    return {name: work for name, work in recorder.seen.items() if work != Work(0, 0)}


def moved(work: Work) -> int:
    return work.moved_bytes + sum(product.moved_bytes for product in work.products)


def test_a_matrix_product_reads_two_and_writes_one():
    a, b = torch.ones(30, 50), torch.ones(50, 70)
    (work,) = works(lambda: a @ b).values()
    (products,) = work.products
    assert (work.flops, work.operations, work.moved_bytes) == (2 * 30 * 50 * 70, 1, 0)
    assert products.kind is ProductKind.MATRIX
    assert moved(work) == FLOAT * (30 * 50 + 50 * 70 + 30 * 70)


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_the_gradients_of_a_grouped_convolution_are_two_products_of_its_own_size(groups):
    # torch's flop counter takes the gradient of the weight for that of an ungrouped convolution.
    images = torch.ones(2, 8, 10, 12, requires_grad=True)
    layer = nn.Conv2d(8, 16, 3, padding=1, groups=groups, bias=False)
    forward = works(lambda: layer(images))["convolution"]
    output = layer(images)
    backward = works(lambda: output.sum().backward())["convolution_backward"]
    assert forward.flops == 2 * 2 * 16 * 10 * 12 * (8 // groups) * 9
    assert backward.flops == 2 * forward.flops
    assert (forward.operations, backward.operations) == (1, 2)
    assert {product.kind for product in backward.products} == {ProductKind.CONVOLUTION}
    maps = FLOAT * (images.numel() + output.numel() + layer.weight.numel())
    assert moved(forward) == maps
    # The gradient of a sum is one number, spread out.
    assert moved(backward) == 2 * (maps - output.nbytes + FLOAT)


def test_a_transposed_convolution_counts_each_input_pixel():
    images = torch.ones(1, 6, 5, 7, requires_grad=True)
    layer = nn.ConvTranspose2d(6, 4, 2, stride=2, bias=False)
    output = layer(images)
    backward = works(lambda: output.sum().backward())["convolution_backward"]
    assert backward.flops == 2 * 2 * images.numel() * 4 * 2 * 2


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.bfloat16, ProductKind.BFLOAT16), (torch.float64, ProductKind.FLOAT64)]
)
def test_products_in_other_types_have_kinds_of_their_own(dtype, kind):
    a = torch.ones(8, 8, dtype=dtype)
    (work,) = works(lambda: a @ a).values()
    assert work.products[0].kind is kind


def test_attention_on_a_cpu_is_two_products_forward_and_five_backward():
    query = torch.ones(1, 2, 16, 8, requires_grad=True)
    output = F.scaled_dot_product_attention(query, query, query)
    forward = works(lambda: F.scaled_dot_product_attention(query, query, query))
    backward = works(lambda: output.sum().backward())
    one = 2 * 2 * 16 * 16 * 8
    assert sum(work.flops for work in forward.values()) == 2 * one
    assert sum(work.flops for work in backward.values()) == 5 * one


def test_batch_norm_goes_over_its_input_once_for_the_statistics_and_once_to_normalise():
    images, norm = torch.ones(2, 8, 10, 12, requires_grad=True), nn.BatchNorm2d(8)
    maps = FLOAT * images.numel()
    small = FLOAT * 8 * 6
    output = norm(images)
    forward = works(lambda: norm(images))["native_batch_norm"]
    backward = works(lambda: output.backward(torch.ones_like(output)))["native_batch_norm_backward"]
    assert 3 * maps <= forward.moved_bytes <= 3 * maps + small
    assert 5 * maps <= backward.moved_bytes <= 5 * maps + 2 * small
    still = works(lambda: norm.eval()(images))["native_batch_norm"]
    assert 2 * maps <= still.moved_bytes <= 2 * maps + small


@pytest.mark.parametrize(
    ("run", "times"),
    [
        (lambda x, y: x + y, 3),
        (lambda x, y: x.add_(y), 3),
        (lambda x, y: x.relu_(), 2),
        (lambda x, y: x.copy_(y), 2),
        (lambda x, y: x.zero_(), 1),
        (lambda x, y: torch._foreach_add_([x], [y]), 3),
        (lambda x, y: x.view(-1), 0),
        (lambda x, y: torch.empty_like(x), 0),
        (lambda x, y: x[:0].expand(0, 100), 0),
    ],
)
def test_other_operations_move_what_they_read_and_what_they_write(run, times):
    x, y = torch.ones(100, 100), torch.ones(100, 100)
    found = sum(works(lambda: run(x, y)).values(), Work(0, 0))
    assert (found.flops, found.moved_bytes) == (0, times * x.nbytes)
    assert found.operations == (1 if times else 0)


def test_a_lookup_reads_the_rows_it_returns_and_not_the_table():
    table, rows = torch.ones(10_000, 64), torch.arange(5)
    (work,) = works(lambda: F.embedding(rows, table)).values()
    assert work.moved_bytes == 2 * 5 * 64 * FLOAT + rows.nbytes


def test_a_banded_operator_counts_what_runs_inside_it_at_every_size():
    def project(pixels: int) -> Work:
        with FakeTensorMode():
            x, out = torch.empty(pixels, 64), torch.empty(pixels, 32)
            numbers, weight = torch.empty(64), torch.empty(32, 64)
            tracer = StepTracer()
            with tracer:
                torch.ops.memseg.project(x, numbers, numbers, weight, None, out)
        return Work.total(tracer.take_work().values())

    small, large = project(2**20), project(2**22)
    assert small.flops == 2 * 2**20 * 64 * 32
    assert large.flops == 4 * small.flops
    # Normalised and rectified, then multiplied: more than operands and result.
    assert moved(small) > FLOAT * 2**20 * (64 + 64 + 32)
    assert moved(large) == pytest.approx(4 * moved(small), rel=0.01)
    assert large.operations == pytest.approx(4 * small.operations, rel=0.1)
    assert small.operations > 10


def test_fake_tensors_have_the_work_of_real_ones():
    layer, norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def step(images: Tensor) -> None:
        norm(layer(images)).relu().sum().backward()

    real = works(lambda: step(torch.ones(2, 3, 16, 16)))
    with torch.device("meta"):
        layer, norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        meta = works(lambda: step(torch.ones(2, 3, 16, 16)))
    assert {name: real[name].flops for name in real} == {name: meta[name].flops for name in real}
