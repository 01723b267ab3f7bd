"""The banded loss is the plain one, in value and in gradient, and it is small."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from memseg.nn import IGNORE_INDEX, banded_cross_entropy, layout, loss
from memseg.profiling.measure import watch_allocator
from memseg.profiling.trace import StepTracer

MEBIBYTE = 2**20


def plain_loss(logits, target, ignore_index=IGNORE_INDEX, **options):
    full = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(full, target.long(), ignore_index=ignore_index, **options)


def value_and_gradient(function, logits, target, **options):
    """The gradient as the function hands it back, before a leaf could lay it out anew."""
    logits = logits.detach().requires_grad_()
    value = function(logits, target, **options)
    return value.detach(), *torch.autograd.grad(value, logits)


def assert_is_plain(logits, target, **options):
    found, expected = (value_and_gradient(of, logits, target, **options) for of in (banded_cross_entropy, plain_loss))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-12)


def labels(batch, height, width, classes, dtype=torch.uint8):
    """Random labels, the top third unlabelled."""
    target = torch.randint(classes, (batch, height, width), dtype=dtype)
    target[:, : height // 3] = IGNORE_INDEX
    return target


@pytest.mark.parametrize("rows_per_band", [1, 5, 1000])
@pytest.mark.parametrize(
    ("coarse", "full"),
    [
        pytest.param((6, 8), (24, 32), id="4 times"),
        pytest.param((5, 7), (18, 23), id="no whole number of times"),
        pytest.param((1, 1), (9, 9), id="from one pixel"),
        pytest.param((9, 8), (9, 8), id="same size"),
        pytest.param((12, 12), (7, 5), id="smaller"),
    ],
)
def test_value_and_gradient_are_those_of_the_plain_loss(coarse, full, rows_per_band, monkeypatch):
    classes = 5
    monkeypatch.setattr(layout, "_BAND_BYTES", {"cpu": rows_per_band * full[1] * (classes * 8 + loss._PIXEL_BYTES)})
    target = labels(2, *full, classes)
    logits = 5 * torch.randn(2, classes, *coarse, dtype=torch.float64)
    banded, plain = (logits.clone().requires_grad_() for _ in range(2))
    # The factor of 3 stands for a weighted sum of losses.
    found, expected = 3 * banded_cross_entropy(banded, target), 3 * plain_loss(plain, target)
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(banded.grad, plain.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ignore_index", [IGNORE_INDEX, 1, -100])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_weights_smoothing_and_the_unlabelled_value_mean_what_they_mean_to_torch(weighted, smoothing, ignore_index):
    classes = 5
    target = labels(2, 22, 30, classes, dtype=torch.int64)
    target[target == IGNORE_INDEX] = ignore_index
    # One class weighs nothing.
    weight = torch.tensor([0.3, 2, 0, 1, 7], dtype=torch.float64) if weighted else None
    logits = 5 * torch.randn(2, classes, 6, 7, dtype=torch.float64)
    assert_is_plain(logits, target, ignore_index=ignore_index, weight=weight, label_smoothing=smoothing)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("classes", [1, 2, 19, 150, 171, 256, 1000])
def test_any_number_of_classes_will_do(classes, dtype, monkeypatch):
    monkeypatch.setattr(layout, "_BAND_BYTES", {"cpu": 5 * 12 * (classes * 8 + loss._PIXEL_BYTES)})
    target = torch.randint(min(classes, 256) if dtype is torch.uint8 else classes, (2, 12, 12), dtype=dtype)
    target[0, 3, 3:] = 0
    logits = torch.randn(2, classes, 3, 3, dtype=torch.float64)
    weight = torch.rand(classes, dtype=torch.float64) + 0.1
    assert_is_plain(logits, target, ignore_index=0 if classes > 1 else -1, weight=weight, label_smoothing=0.1)


def test_class_255_is_not_taken_for_an_unlabelled_value_of_minus_1():
    # As a uint8, -1 is 255.
    logits = torch.randn(1, 256, 2, 2, dtype=torch.float64)
    assert_is_plain(logits, torch.full((1, 8, 8), 255, dtype=torch.uint8), ignore_index=-1)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "lay_out",
    [
        pytest.param(torch.clone, id="contiguous"),
        pytest.param(channels_last, id="channels last"),
        pytest.param(lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), id="transposed"),
        pytest.param(lambda x: torch.cat([x, x], 1)[:, : x.shape[1]], id="sliced classes"),
        pytest.param(lambda x: channels_last(torch.cat([x, x], 1))[:, : x.shape[1]], id="sliced channels last"),
        pytest.param(lambda x: torch.cat([x, x], 3)[..., ::2], id="every other column"),
        pytest.param(lambda x: x[:1].expand(x.shape), id="expanded"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_logits_may_lie_in_memory_as_they_like_and_a_dense_gradient_lies_as_they_do(lay_out, dtype, monkeypatch):
    classes = 5
    monkeypatch.setattr(layout, "_BAND_BYTES", {"cpu": 7 * 24 * (classes * 8 + loss._PIXEL_BYTES)})
    logits = lay_out(torch.randn(2, classes, 6, 6).to(dtype))
    target = labels(2, 24, 24, classes)
    value, gradient = value_and_gradient(banded_cross_entropy, logits, target)
    expected = value_and_gradient(banded_cross_entropy, logits.contiguous(), target)
    assert torch.equal(value, expected[0])
    assert torch.equal(gradient, expected[1])
    assert gradient.stride() == torch.empty_like(logits).stride()
    if dtype is torch.float64:
        assert_is_plain(logits, target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"weight": torch.tensor([0.5, 1, 3, 0, 1]), "label_smoothing": 0.1}])
def test_of_half_precision_only_the_logits_and_the_last_rounding_of_their_gradient_are(dtype, options):
    logits, target = 5 * torch.randn(2, 5, 6, 8), labels(2, 24, 32, 5)
    logits = logits.to(dtype)
    value, gradient = value_and_gradient(banded_cross_entropy, logits, target, **options)
    exact = value_and_gradient(banded_cross_entropy, logits.float(), target, **options)
    assert value.dtype == torch.float32
    assert torch.equal(value, exact[0])
    assert torch.equal(gradient, exact[1].to(dtype))
    plain = value_and_gradient(plain_loss, logits.float(), target, **options)
    torch.testing.assert_close(value, plain[0], rtol=1e-6, atol=0)
    # Float16's last bits of small numbers are 2**-24.
    torch.testing.assert_close(gradient.float(), plain[1], rtol=torch.finfo(dtype).eps, atol=2**-24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    logits, target = torch.randn(2, 5, 6, 8).to(dtype), labels(2, 24, 32, 5)
    options = {"weight": torch.rand(5), "label_smoothing": 0.1}
    expected = value_and_gradient(banded_cross_entropy, logits, target, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value_and_gradient(banded_cross_entropy, logits, target, **options)
    assert all(map(torch.equal, found, expected))


def test_a_gradient_scaler_saves_what_float16_alone_would_lose():
    logits, target = torch.randn(1, 3, 16, 16).half().requires_grad_(), labels(1, 64, 64, 3)
    exact = logits.detach().float().requires_grad_()
    # Stands for the many more pixels of a real batch.
    share, scale = 2.0**-16, 2.0**16
    for each in (logits, exact):
        (banded_cross_entropy(each, target) * share * scale).backward()
    assert torch.equal(logits.grad, exact.grad.half())
    lost = ((exact.grad / scale).half() == 0) & (exact.grad != 0)
    assert lost.sum() > 0.1 * exact.grad.count_nonzero()
    assert logits.grad[lost].count_nonzero() > 0.9 * lost.sum()


def test_bands_are_as_many_as_their_size_asks_for():
    assert loss.bands(7, row_bytes=100, limit=300) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert loss.bands(2, row_bytes=1000, limit=300) == [slice(0, 1), slice(1, 2)]


@pytest.mark.parametrize("rows", [slice(0, 1), slice(3, 11), slice(0, 24), slice(23, 24)])
@pytest.mark.parametrize("coarse", [(6, 8), (5, 7), (1, 1), (24, 30), (40, 50)])
def test_upsampled_rows_are_rows_of_the_whole(coarse, rows):
    images = torch.randn(2, 3, *coarse, dtype=torch.float64)
    whole = F.interpolate(images, (24, 30), mode="bilinear", align_corners=False)
    for lie in (torch.clone, channels_last):
        found = loss.upsample_rows(lie(images), (24, 30), rows)
        torch.testing.assert_close(found, whole[:, :, rows], rtol=0, atol=1e-14)
        assert found.is_contiguous()


def test_upsampled_rows_of_half_precision_are_float32():
    images = torch.randn(1, 3, 6, 8, dtype=torch.bfloat16)
    found, expected = (loss.upsample_rows(each, (24, 32), slice(2, 9)) for each in (images, images.float()))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_value_needs_no_graph(mode):
    logits, target = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True), labels(1, 16, 16, 3)
    with mode():
        value = banded_cross_entropy(logits, target)
    assert not value.requires_grad
    torch.testing.assert_close(value, plain_loss(logits, target).detach())


def test_the_target_is_left_alone():
    target = labels(1, 8, 8, 3, dtype=torch.int64)
    before = target.clone()
    banded_cross_entropy(torch.randn(1, 3, 2, 2), target)
    assert torch.equal(target, before)


def test_target_types_and_the_unlabelled_value_are_the_users_choice():
    logits = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    target = torch.randint(4, (1, 8, 8))
    torch.testing.assert_close(
        banded_cross_entropy(logits, target, ignore_index=2), plain_loss(logits, target, ignore_index=2)
    )
    assert torch.equal(banded_cross_entropy(logits, target), banded_cross_entropy(logits, target.to(torch.uint8)))


def test_a_batch_without_labels_costs_nothing_and_teaches_nothing():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    value = banded_cross_entropy(logits, torch.full((1, 16, 16), IGNORE_INDEX, dtype=torch.uint8))
    value.backward()
    assert value == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_of_weight_0_alone_cost_nothing_and_teach_nothing(smoothing):
    value, gradient = value_and_gradient(
        banded_cross_entropy,
        torch.randn(1, 3, 4, 4),
        torch.full((1, 16, 16), 1, dtype=torch.uint8),
        weight=torch.tensor([1.0, 0, 1]),
        label_smoothing=smoothing,
    )
    assert value == 0
    assert not gradient.any()


def test_no_images_cost_nothing():
    assert banded_cross_entropy(torch.empty(0, 3, 4, 4), torch.empty(0, 16, 16, dtype=torch.uint8)) == 0


def test_extreme_logits_stay_finite():
    logits = torch.tensor([1e4, -1e4]).view(1, 2, 1, 1).requires_grad_()
    value = banded_cross_entropy(logits, torch.ones(1, 2, 2, dtype=torch.uint8))
    value.backward()
    assert value.item() == pytest.approx(2e4)
    assert logits.grad.flatten().tolist() == [1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extreme_logits_cost_what_exact_arithmetic_says(dtype):
    # Float16 ends at 65504. Multiples of 64 * 937.5 are upsampled without rounding, so that ties stay ties.
    logits = (torch.randn(2, 5, 6, 6).sign() * 6e4).to(dtype)
    target, weight = labels(2, 24, 24, 5), torch.tensor([1.0, 2, 3, 4, 5])
    found = value_and_gradient(banded_cross_entropy, logits, target, weight=weight, label_smoothing=0.1)
    exact = value_and_gradient(plain_loss, logits.double(), target, weight=weight.double(), label_smoothing=0.1)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-6, atol=0)
    atol = 1e-6 if dtype is torch.float32 else 2**-13
    torch.testing.assert_close(found[1].double(), exact[1], rtol=0, atol=atol)


def test_a_kept_graph_gives_the_same_gradient_again():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    value = banded_cross_entropy(logits, labels(1, 16, 16, 3))
    first, second = (torch.autograd.grad(factor * value, logits, retain_graph=True)[0] for factor in (1, 2))
    assert torch.equal(second, 2 * first)


def test_differentiating_twice_is_refused():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    value = banded_cross_entropy(logits, labels(1, 8, 8, 3))
    (grad,) = torch.autograd.grad(value.square(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_what_does_not_fit_together_is_refused():
    logits = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"same N, got \(2, 3, 4, 4\) and \(1, 16, 16\)"):
        banded_cross_entropy(logits, labels(1, 16, 16, 3))
    with pytest.raises(ValueError, match=r"target \(N, H, W\)"):
        banded_cross_entropy(logits, labels(2, 16, 16, 3).unsqueeze(1))
    with pytest.raises(ValueError, match=r"uint8 or int64, got torch\.int32"):
        banded_cross_entropy(logits, labels(2, 16, 16, 3, dtype=torch.int32))


@pytest.mark.parametrize(
    "weight", [torch.ones(4), torch.ones(1), torch.ones(()), torch.ones(3, 1), torch.ones(3, dtype=torch.int64)]
)
def test_weights_that_are_not_a_float_for_each_class_are_refused(weight):
    with pytest.raises(
        ValueError, match=r"weight must be floats of shape \(3,\), one for each class, got torch\.\w+ of"
    ):
        banded_cross_entropy(torch.randn(2, 3, 4, 4), labels(2, 16, 16, 3), weight=weight)


@pytest.mark.parametrize("value", [-0.5, torch.nan, torch.inf])
def test_negative_and_infinite_weights_are_refused(value):
    with pytest.raises(ValueError, match="weight must be finite and not negative, got "):
        banded_cross_entropy(torch.randn(2, 3, 4, 4), labels(2, 16, 16, 3), weight=torch.tensor([1, value, 1]))


@pytest.mark.parametrize("smoothing", [-0.1, 1.5, torch.nan])
def test_smoothing_beyond_0_to_1_is_refused(smoothing):
    with pytest.raises(ValueError, match=r"label_smoothing must be within 0\.\.1, got "):
        banded_cross_entropy(torch.randn(2, 3, 4, 4), labels(2, 16, 16, 3), label_smoothing=smoothing)


@pytest.mark.parametrize("weight", [None, torch.ones(3)])
@pytest.mark.parametrize("label", [3, -1])
def test_a_label_beyond_the_classes_is_refused(label, weight):
    with pytest.raises(RuntimeError, match=f"index {label} is out of bounds"):
        banded_cross_entropy(torch.randn(1, 3, 4, 4), torch.full((1, 8, 8), label), weight=weight)
    if label > 0:
        with pytest.raises(RuntimeError, match=f"index {label} is out of bounds"):
            banded_cross_entropy(
                torch.randn(1, 3, 4, 4), torch.full((1, 8, 8), label, dtype=torch.uint8), weight=weight
            )


def peak_bytes(logits, target, **options):
    """What forward takes at most, beside the gradient that it keeps."""
    kept = 4 * logits.numel() if logits.requires_grad else 0
    with watch_allocator() as peak:
        banded_cross_entropy(logits, target, **options)
    return peak.peak_bytes - kept


@pytest.mark.parametrize(
    ("classes", "height", "limit"),
    [
        # In float32 the full-size logits of one image have 8, 152, 1200 and 8000 MiB at 2048x1024.
        pytest.param(1, 160, 5, id="1 class"),
        pytest.param(19, 80, 5, id="19 classes"),
        pytest.param(150, 16, 8, id="150 classes"),
        pytest.param(1000, 8, 28, id="1000 classes"),
    ],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_band_is_small_for_any_height_and_batch(classes, height, limit, smoothing, dtype):
    found = []
    for times, batch, lie in [(1, 1, torch.clone), (2, 1, torch.clone), (1, 2, channels_last)]:
        logits = lie(torch.zeros(batch, classes, times * height // 4, 512).to(dtype)).requires_grad_()
        target = torch.zeros(batch, times * height, 2048, dtype=torch.uint8)
        found.append(peak_bytes(logits, target, label_smoothing=smoothing, weight=torch.ones(classes)))
    assert max(found) <= limit * MEBIBYTE
    # Bands of the same height read one coarse row more or less, from where they begin.
    assert max(found) - min(found) < 0.2 * max(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lie", [torch.clone, channels_last])
def test_fake_tensors_foretell_its_bytes(lie, dtype):
    shape, size = (2, 19, 16, 32), (64, 128)
    logits = lie(torch.randn(shape)).to(dtype).requires_grad_()
    weight, target = torch.rand(19), labels(2, *size, 19)
    measured = peak_bytes(logits, target, weight=weight, label_smoothing=0.1)
    with FakeTensorMode(), StepTracer() as tracer:
        logits = lie(torch.randn(shape)).to(dtype).requires_grad_()
        weight, target = torch.rand(19), torch.empty(2, *size, dtype=torch.uint8)
        tracer.reset_peak()
        before = tracer.allocated_bytes
        value = banded_cross_entropy(logits, target, weight=weight, label_smoothing=0.1)
        foretold = tracer.peak_bytes - before - 4 * logits.numel()
        value.backward()
    assert logits.grad.stride() == logits.stride()
    # Kernels take some hundred bytes for themselves.
    assert foretold == pytest.approx(measured, abs=4096)
