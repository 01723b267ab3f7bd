"""Every network of the paper's tables: the maps that it makes, and how large it is."""

import copy
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
import torchvision

from memseg.levels import NormMode, Recompute
from memseg.models import build_model, describe, model_names
from memseg.models.context import PyramidPooling
from memseg.models.densenet import DenseNetConfig
from memseg.models.ladder import Architecture, build_architecture
from memseg.models.resnet import ResNetConfig
from memseg.profiling import measure_step, profile_step

LADDER_RESNET = {
    "stem": (64, 256, 512),
    "layer1": (256, 256, 512),
    "skip1": (128, 256, 512),
    "layer2": (512, 128, 256),
    "skip2": (128, 128, 256),
    "layer3": (1024, 64, 128),
    "skip3": (128, 64, 128),
    "layer4": (2048, 32, 64),
    "context": (128, 32, 64),
    "aux_logits": (19, 32, 64),
    "blend3": (128, 64, 128),
    "blend2": (128, 128, 256),
    "blend1": (128, 256, 512),
    "logits": (19, 256, 512),
}
PYRAMIDS = {
    "ladder-resnet50": LADDER_RESNET,
    "ladder-resnet101": LADDER_RESNET,
    "densenet121-32x": {
        "stem": (64, 256, 512),
        "block1": (256, 256, 512),
        "transition1": (128, 128, 256),
        "block2": (512, 128, 256),
        "transition2": (256, 64, 128),
        "block3": (1024, 64, 128),
        "transition3": (512, 32, 64),
        "block4": (1024, 32, 64),
        "context": (128, 32, 64),
        "logits": (19, 32, 64),
    },
    "resnet50-32x": {
        "stem": (64, 256, 512),
        "layer1": (256, 256, 512),
        "layer2": (512, 128, 256),
        "layer3": (1024, 64, 128),
        "layer4": (2048, 32, 64),
        "context": (128, 32, 64),
        "logits": (19, 32, 64),
    },
    "dilated-densenet121": {
        "stem": (64, 256, 512),
        "block1": (256, 256, 512),
        "skip1": (128, 256, 512),
        "transition1": (128, 128, 256),
        "block2": (512, 128, 256),
        "transition2": (256, 128, 256),
        "block3": (1024, 128, 256),
        "transition3": (512, 128, 256),
        "block4": (1024, 128, 256),
        "context": (128, 128, 256),
        "aux_logits": (19, 128, 256),
        "blend1": (128, 256, 512),
        "logits": (19, 256, 512),
    },
    "dilated-resnet50": {
        "stem": (64, 256, 512),
        "layer1": (256, 256, 512),
        "skip1": (128, 256, 512),
        "layer2": (512, 128, 256),
        "layer3": (1024, 128, 256),
        "layer4": (2048, 128, 256),
        "context": (128, 128, 256),
        "aux_logits": (19, 128, 256),
        "blend1": (128, 256, 512),
        "logits": (19, 256, 512),
    },
    "ladder-densenet169-split34": {
        "stem": (64, 256, 512),
        "block1": (256, 256, 512),
        "skip1": (128, 256, 512),
        "transition1": (128, 128, 256),
        "block2": (512, 128, 256),
        "skip2": (128, 128, 256),
        "transition2": (256, 64, 128),
        "block3a": (768, 64, 128),
        "skip3a": (128, 64, 128),
        "transition3a": (768, 32, 64),
        "block3b": (1280, 32, 64),
        "skip3b": (128, 32, 64),
        "transition3": (640, 16, 32),
        "block4a": (1152, 16, 32),
        "skip4": (128, 16, 32),
        "transition4": (1152, 8, 16),
        "block4b": (1664, 8, 16),
        "context": (128, 8, 16),
        "aux_logits": (19, 8, 16),
        "blend4": (128, 16, 32),
        "blend3b": (128, 32, 64),
        "blend3a": (128, 64, 128),
        "blend2": (128, 128, 256),
        "blend1": (128, 256, 512),
        "logits": (19, 256, 512),
    },
}
"""Channels, height and width of every segment's output for an image of 1024x2048."""
STRIDES = {
    "densenet121-32x": 32,
    "resnet50-32x": 32,
    "ladder-resnet50": 32,
    "ladder-resnet101": 32,
    "dilated-densenet121": 8,
    "dilated-resnet50": 8,
    "ladder-densenet169-split34": 128,
}
"""Of the others it is 64."""
NO_AUX = ("densenet121-32x", "resnet50-32x", "ladder-densenet121-single")


@cache
def on_meta(name):
    with torch.device("meta"):
        return build_model(name).train()


@cache
def shapes_of(name):
    """The maps that a forward makes of 1024x2048, by segment, and those that it returns."""
    shapes = {}
    model = on_meta(name)
    hooks = [
        segment.register_forward_hook(lambda _, __, out, name=name: shapes.update({name: tuple(out.shape[1:])}))
        for name, segment in model.segments.items()
    ]
    outputs = model(torch.empty(1, 3, 1024, 2048, device="meta"))
    for hook in hooks:
        hook.remove()
    return shapes, [tuple(out.shape[1:]) for out in outputs]


@pytest.mark.parametrize("name", PYRAMIDS)
def test_the_pyramid_at_full_resolution(name):
    shapes, outputs = shapes_of(name)
    assert shapes == PYRAMIDS[name]
    assert outputs == [shapes[output] for output in ("logits", "aux_logits") if output in shapes]


@pytest.mark.parametrize("name", ["ladder-densenet121-single", "ladder-densenet169-spp"])
def test_a_variant_has_the_maps_of_what_it_varies(name):
    expected = dict(shapes_of(name.rpartition("-")[0])[0])
    if name in NO_AUX:
        del expected["aux_logits"]
    assert shapes_of(name)[0] == expected


@pytest.mark.parametrize("name", model_names())
def test_the_output_stride_is_that_of_the_coarsest_map(name):
    model, stride = on_meta(name), STRIDES.get(name, 64)
    assert (model.output_stride, describe(name).output_stride) == (stride, stride)
    assert model.outputs == (("logits",) if name in NO_AUX else ("logits", "aux_logits"))
    if name in PYRAMIDS:
        assert min(height for _, height, _ in PYRAMIDS[name].values()) == 1024 // stride


@pytest.mark.parametrize("name", model_names())
def test_the_published_cut_is_that_of_the_papers_ladders(name):
    model = on_meta(name)
    cut = ("transition2",) if name.startswith("ladder-densenet") else ()
    assert model.published_cut == cut
    assert set(cut) <= model.segments.keys()


@pytest.mark.parametrize(
    ("depth", "encoder"),
    # Without the last norm too, which DenseNets have before it.
    [("densenet121", 6_951_808), ("densenet169", 12_481_152), ("resnet50", 23_508_032), ("resnet101", 42_500_160)],
)
def test_an_encoder_has_the_parameters_of_torchvisions_without_its_classifier(depth, encoder):
    with torch.device("meta"):
        theirs = torchvision.models.get_model(depth, weights=None)
    unused = {"densenet": ("features.norm5", "classifier"), "resnet": ("fc",)}[depth.rstrip("0123456789")]
    expected = [value.numel() for key, value in theirs.named_parameters() if not key.startswith(unused)]
    assert sum(expected) == encoder
    for name in model_names():
        model = on_meta(name)
        if model.origin.name == depth:
            found = [value.numel() for key, value in model.named_parameters() if key.split(".")[1] in model.encoder]
            assert sorted(found) == sorted(expected), name


RESNET = ResNetConfig((2, 1, 2, 1), width=4)
DENSENET = DenseNetConfig(4, (2, 2, 4, 2), 8)
DILATIONS = (1, 1, 2, 4)
SMALL = {
    "ladder-resnet": Architecture(RESNET, width=8, context_width=16),
    "dilated-resnet": Architecture(replace(RESNET, dilations=DILATIONS), joined=1, width=8, context_width=16),
    "resnet-32x": Architecture(RESNET, joined=0, has_aux=False, width=8, context_width=16),
    "dilated-densenet": Architecture(
        replace(DENSENET, halved=(), dilations=DILATIONS), joined=1, width=8, context_width=16
    ),
    "ladder-densenet-split34": Architecture(replace(DENSENET, halved=(3, 4)), width=8, context_width=16),
    "ladder-densenet-spp": Architecture(DENSENET, context=PyramidPooling, width=8, context_width=16),
}
"""Networks built as those of the tables are, but small."""


@pytest.mark.parametrize(
    ("name", "norm"), [*((name, NormMode.BATCH) for name in SMALL), ("ladder-resnet", NormMode.FROZEN)]
)
def test_a_step_has_the_plain_networks_gradients_at_every_level(name, norm):
    torch.manual_seed(0)
    plain = build_architecture(name, SMALL[name], num_classes=3, norm=norm).double().train()
    state = copy.deepcopy(plain.state_dict())
    images, target = torch.randn(2, 3, 128, 128, dtype=torch.float64), torch.randint(3, (2, 128, 128))
    found = {}
    for level in Recompute:
        plain.load_state_dict(state)
        plain.zero_grad()
        plain.set_recompute(level)
        plain.objective()(*plain(images), target).backward()
        found[level] = {key: value.grad for key, value in plain.named_parameters() if value.requires_grad}
    for level, gradients in found.items():
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, found["none"][key], rtol=1e-8, atol=1e-10, msg=f"{level}: {key}")
    with torch.no_grad():
        assert plain.eval()(images).shape == (2, 3, 128, 128)


@pytest.mark.parametrize("level", Recompute)
def test_the_predicted_peak_of_a_ladder_resnet_is_the_measured_one(level):
    architecture = Architecture(ResNetConfig((2, 1, 1, 1), width=8), width=16, context_width=32)
    build = partial(build_architecture, "ladder-resnet", architecture, num_classes=5)
    settings = {"image": (128, 256), "batch": 2, "recompute": level}
    predicted = profile_step(build, **settings).timeline.peak_allocated_bytes
    # What is rebuilt whole (four layers and the context) keeps the state of random numbers until then.
    states = 5 * torch.get_rng_state().nbytes if level is Recompute.SEGMENT else 0
    assert -256 <= measure_step(build, **settings) - predicted <= states + 256


def test_a_resnets_convolutions_are_initialised_by_their_fan_out_as_torchvisions():
    model = build_architecture("small", Architecture(ResNetConfig((2, 1, 1, 1), width=32)), num_classes=2)
    weight = model.get_parameter("segments.layer1.1.conv1.weight").detach()
    # From 128 channels to 32: twice the deviation that the fan-in would give.
    assert weight.shape == (32, 128, 1, 1)
    assert float(weight.std()) == pytest.approx((2 / 32) ** 0.5, rel=0.1)
