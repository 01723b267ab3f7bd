"""Parts of a step that know nothing of each other make the loss, and the gradient, of the whole."""

import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from memseg.data import IGNORE_INDEX
from memseg.levels import NormMode, Precision
from memseg.models import build_model
from memseg.models.objective import Objective
from memseg.running import Batch, Grid, MeanLoss, WholeRunner
from processes import CLASSES, IMAGE, MODEL

CPU = torch.device("cpu")
ALONE = ((0,),)


@pytest.fixture(scope="module", autouse=True)
def process_group():
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def batch(images=4):
    """Logits and targets, of each image another part unlabelled; of the last one all."""
    torch.manual_seed(0)
    logits = torch.randn(images, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randint(3, (images, 16, 32), dtype=torch.uint8)
    for index in range(images):
        target[index, :, : 32 * (index + 1) // images] = IGNORE_INDEX
    return logits, target


def in_parts(logits, target, sizes, replicas=1, objective=None):
    """Loss and gradient of a step whose parts are so many images each."""
    loss = MeanLoss(objective or Objective(), pixels=target.numel(), replicas=replicas, device=CPU)
    for images, labels in zip(logits.split(sizes), target.split(sizes), strict=True):
        loss(images, images * 2, labels).backward()
    if replicas > 1:
        logits.grad /= replicas
    return loss.finish([logits]), logits.grad


@pytest.mark.parametrize("sizes", [[4], [1, 3], [3, 1], [1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("replicas", [1, 2])
def test_parts_make_the_gradient_of_the_mean_over_all_labelled_pixels(sizes, replicas):
    logits, target = batch()
    expected = Objective()(logits, logits * 2, target)
    (gradient,) = torch.autograd.grad(expected, logits)
    found, found_gradient = in_parts(logits, target, sizes, replicas)
    assert found == pytest.approx(expected.item(), abs=1e-14)
    torch.testing.assert_close(found_gradient, gradient, rtol=0, atol=1e-16)
    assert (gradient != 0).any()


@pytest.mark.parametrize("sizes", [[4], [1, 3], [1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize(("weight", "smoothing"), [(0.0, 0.0), (0.1, 0.2)])
def test_parts_make_the_weighted_mean_of_torch_over_the_whole_step(sizes, weight, smoothing):
    logits, target = batch()
    # The third image counts little, or nothing.
    target[2].masked_fill_(target[2] != IGNORE_INDEX, 1)
    objective = Objective(class_weights=[0.5, weight, 3.0], label_smoothing=smoothing)
    expected = sum(
        share * F.cross_entropy(
            F.interpolate(logits * scale, target.shape[1:], mode="bilinear"),
            target.long(),
            objective.class_weights,
            ignore_index=IGNORE_INDEX,
            label_smoothing=smoothing,
        )
        for share, scale in ((0.7, 1), (0.3, 2))
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(expected, logits)
    found, found_gradient = in_parts(logits, target, sizes, objective=objective)
    assert found == pytest.approx(expected.item(), abs=1e-13)
    torch.testing.assert_close(found_gradient, gradient, rtol=0, atol=1e-15)


def test_a_step_without_any_labelled_pixel_changes_nothing():
    logits, target = batch()
    loss, gradient = in_parts(logits, target.fill_(IGNORE_INDEX), [2, 2])
    assert loss == 0
    assert (gradient == 0).all()


def test_a_step_in_a_single_part_is_the_plain_mean():
    logits, target = batch()
    expected = Objective()(logits, target)
    (gradient,) = torch.autograd.grad(expected, logits)
    loss = MeanLoss(Objective(), pixels=None, replicas=1, device=CPU)
    loss(logits, target).backward()
    assert loss.finish([logits]) == expected.item()
    assert torch.equal(logits.grad, gradient)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_pass_is_read_when_the_one_before_it_is_over_and_free(accumulation):
    model = build_model(MODEL, num_classes=CLASSES, norm=NormMode.BATCH).train()
    loss = MeanLoss(Objective(), pixels=accumulation * 2 * IMAGE[0] * IMAGE[1], replicas=1, device=CPU)
    runner = WholeRunner(model, loss, grid=Grid.of(ALONE, CPU), accumulation=accumulation, precision=Precision.FLOAT32)
    read = []

    def passes():
        for _ in range(accumulation + 1):
            assert not [one for one in read if one() is not None]
            made = [torch.randn(2, 3, *IMAGE), torch.randint(CLASSES, (2, *IMAGE), dtype=torch.uint8)]
            read.extend(map(weakref.ref, made))
            yield Batch(made.pop(0), made.pop())

    remaining = passes()
    runner.step(remaining)
    assert len(read) == 2 * accumulation
    next(remaining)
