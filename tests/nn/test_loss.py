"""The banded loss is the plain one, in value and in gradient."""

import pytest
import torch
import torch.nn.functional as F

from memseg.nn import IGNORE_INDEX, banded_cross_entropy, loss


def plain_loss(logits, target, ignore_index=IGNORE_INDEX):
    full = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(full, target.long(), ignore_index=ignore_index)


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
    monkeypatch.setattr(loss, "_BAND_BYTES", rows_per_band * 2 * classes * full[1] * 8)
    target = labels(2, *full, classes)
    logits = 5 * torch.randn(2, classes, *coarse, dtype=torch.float64)
    banded, plain = (logits.clone().requires_grad_() for _ in range(2))
    # The factor of 3 stands for a weighted sum of losses.
    found, expected = 3 * banded_cross_entropy(banded, target), 3 * plain_loss(plain, target)
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(banded.grad, plain.grad, rtol=0, atol=1e-12)


def test_bands_are_as_many_as_their_size_asks_for(monkeypatch):
    monkeypatch.setattr(loss, "_BAND_BYTES", 300)
    assert loss.bands(7, row_bytes=100) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert loss.bands(2, row_bytes=1000) == [slice(0, 1), slice(1, 2)]


def test_the_value_needs_no_graph():
    logits, target = torch.randn(1, 3, 4, 4, dtype=torch.float64), labels(1, 16, 16, 3)
    torch.testing.assert_close(banded_cross_entropy(logits, target), plain_loss(logits, target))


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


def test_extreme_logits_stay_finite():
    logits = torch.tensor([1e4, -1e4]).view(1, 2, 1, 1).requires_grad_()
    value = banded_cross_entropy(logits, torch.ones(1, 2, 2, dtype=torch.uint8))
    value.backward()
    assert value.item() == pytest.approx(2e4)
    assert logits.grad.flatten().tolist() == [1, -1]


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


def test_a_label_beyond_the_classes_is_refused():
    with pytest.raises(RuntimeError, match="index 3 is out of bounds"):
        banded_cross_entropy(torch.randn(1, 3, 4, 4), torch.full((1, 8, 8), 3, dtype=torch.uint8))
