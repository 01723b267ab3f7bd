"""The groups of an optimizer, and gradients that are clipped."""

import math

import pytest
import torch
from torch import nn

from memseg.errors import MemsegError
from memseg.models import build_model
from memseg.training.optimizer import clip_gradients, make_optimizer
from memseg.training.recipe import load_recipe
from memseg.training.trainer import training_length

MODEL = "ladder-densenet-mini"


def made(*overrides):
    model = build_model(MODEL, num_classes=8)
    optimizer = make_optimizer(load_recipe("streets_demo", overrides), model, model.encoder)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [({names[one] for one in group["params"]}, group) for group in optimizer.param_groups]
    assert set().union(*(group for group, _ in groups)) == set(names.values())
    assert sum(len(group) for group, _ in groups) == len(names)
    return optimizer, groups


@pytest.mark.parametrize(
    ("overrides", "kind", "kept"),
    [
        ((), torch.optim.Adam, 2),
        (("optimizer.name=adamw",), torch.optim.AdamW, 2),
        (("optimizer.name=sgd", "optimizer.nesterov=true"), torch.optim.SGD, 1),
        (("optimizer.name=sgd", "optimizer.momentum=0"), torch.optim.SGD, 0),
    ],
    ids=["adam", "adamw", "nesterov", "sgd"],
)
def test_each_kind_keeps_so_many_tensors_like_its_parameter(overrides, kind, kept):
    optimizer, _ = made(*overrides)
    assert type(optimizer) is kind
    for group in optimizer.param_groups:
        assert group["fused"]
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    parameter = optimizer.param_groups[0]["params"][0]
    held = [one for one in optimizer.state.get(parameter, {}).values() if getattr(one, "shape", ()) == parameter.shape]
    assert len(held) == kept


def test_momentum_begins_at_zero_where_the_first_step_in_float16_overflows():
    # torch skips such a step, but would have made the sum of gradients in fresh memory, and would go on with that.
    optimizer, _ = made("optimizer.name=sgd", "train.precision=float16")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert not any(optimizer.state[parameter]["momentum_buffer"].any() for parameter in parameters)
    scaler = torch.amp.GradScaler("cpu")
    before = parameters[0].detach().clone()
    for value, momentum in ((math.inf, 0.0), (scaler.get_scale() / 2, 1.0)):
        scaler.scale(torch.zeros(()))
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, value)
        scaler.step(optimizer)
        scaler.update()
        expected = momentum + (1e-4 * before if momentum else 0)
        assert torch.allclose(optimizer.state[parameters[0]]["momentum_buffer"], expected + torch.zeros_like(before))


def test_norms_and_biases_decay_like_the_rest_unless_told_otherwise():
    _, ((_, group),) = made("optimizer.weight_decay=0.5")
    assert group["weight_decay"] == 0.5
    _, groups = made("optimizer.weight_decay=0.5", "optimizer.decay_norms=false")
    ((free, _),) = [one for one in groups if one[1]["weight_decay"] == 0]
    ((decays, _),) = [one for one in groups if one[1]["weight_decay"] == 0.5]
    assert all(".norm" in name or name.endswith(".bias") for name in free)
    assert not any(".norm" in name for name in decays)


def test_only_the_encoder_learns_slowly_and_only_from_encoder_weights():
    factor = "optimizer.pretrained_lr_factor=0.25"
    _, groups = made(factor, "model.encoder_weights=some.pth")
    scales = {group["lr_scale"]: names for names, group in groups}
    assert set(scales) == {0.25, 1.0}
    assert any(name.startswith("segments.stem.") for name in scales[0.25])
    assert any(name.startswith("segments.logits.") for name in scales[1.0])
    _, ((_, group),) = made(factor, "model.initial_weights=runs/some")
    assert group["lr_scale"] == 1.0


@pytest.mark.parametrize(("max_norm", "left"), [(2.5, 2.5), (100.0, 5.0)])
def test_gradients_are_scaled_to_the_norm_that_is_allowed(max_norm, left):
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert clip_gradients(parameters, max_norm, None, torch.device("cpu")) == 5.0
    found = math.hypot(*(one.grad.item() for one in parameters[:2]))
    # torch divides by the norm and 1e-6 more.
    assert found == pytest.approx(left, rel=1e-5)
    assert parameters[2].grad is None


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimizer.name=adm", "must be adam, adamw or sgd, got 'adm'; did you mean adam"),
        ("loss.class_weights=median", "must be none, median-frequency, enet or a list of numbers"),
        ("loss.class_weights=[1, -1]", "none below 0, got [1, -1]"),
        ("loss.class_weights=[0, 0]", "got [0, 0]"),
        ("train.clip_norm=0", "train.clip_norm: must be greater than 0"),
    ],
)
def test_a_setting_that_does_not_hold_is_refused(override, told):
    with pytest.raises(MemsegError) as caught:
        load_recipe("streets_demo", [override])
    assert told in str(caught.value)


def test_settings_that_need_others_are_refused_without_them():
    with pytest.raises(MemsegError, match=r"is along the momentum; give optimizer.momentum"):
        load_recipe("streets_demo", ["optimizer.nesterov=true", "optimizer.momentum=0"])
    with pytest.raises(MemsegError, match=r"some loss\.class_weights are 0; leave one of them out"):
        load_recipe("streets_demo", ["loss.class_weights=[0, 1]", "loss.label_smoothing=0.1"])
    with pytest.raises(MemsegError, match=r"train.early_stop: counts evaluations, but train.evaluate_every is 0"):
        load_recipe("streets_demo", ["train.early_stop=3", "train.evaluate_every=0"])


def test_a_warm_up_is_shorter_than_the_run():
    recipe = load_recipe("streets_demo", ["schedule.steps=10", "schedule.warmup_steps=10"])
    with pytest.raises(MemsegError, match=r"schedule.warmup_steps is 10, the run has 10 steps"):
        training_length(recipe, 100)
