"""The ladder: its sizes, and one gradient whatever is rebuilt."""

import copy

import pytest
import torch
import torchvision
from torch.nn import functional as F

from memseg.errors import InputError, UnknownNameError
from memseg.levels import NormMode, Recompute
from memseg.models import build_model, describe, model_names
from memseg.models.objective import Objective
from memseg.nn import BatchNorm2d

# Channels, height and width of every segment's output for an image of 1024x2048.
PYRAMID_121 = {
    "stem": (64, 256, 512),
    "block1": (256, 256, 512),
    "skip1": (128, 256, 512),
    "transition1": (128, 128, 256),
    "block2": (512, 128, 256),
    "skip2": (128, 128, 256),
    "transition2": (256, 64, 128),
    "block3": (1024, 64, 128),
    "skip3": (128, 64, 128),
    "transition3": (512, 32, 64),
    "block4a": (768, 32, 64),
    "skip4": (128, 32, 64),
    "transition4": (768, 16, 32),
    "block4b": (1024, 16, 32),
    "context": (128, 16, 32),
    "aux_logits": (19, 16, 32),
    "blend4": (128, 32, 64),
    "blend3": (128, 64, 128),
    "blend2": (128, 128, 256),
    "blend1": (128, 256, 512),
    "logits": (19, 256, 512),
}


def test_the_pyramid_of_densenet_121_at_full_resolution():
    with torch.device("meta"):
        model, images = build_model("ladder-densenet121"), torch.empty(2, 3, 1024, 2048)
    shapes = {}
    for name, segment in model.segments.items():
        segment.register_forward_hook(lambda _, __, out, name=name: shapes.update({name: tuple(out.shape)}))
    outputs = model.train()(images)
    assert shapes == {name: (2, *shape) for name, shape in PYRAMID_121.items()}
    assert [tuple(out.shape) for out in outputs] == [(2, 19, 256, 512), (2, 19, 16, 32)]
    with torch.no_grad():
        assert model.eval()(images).shape == (2, 19, 1024, 2048)


@pytest.mark.parametrize(
    ("depth", "skips", "end"),
    [
        (121, (256, 512, 1024, 768), 1024),
        (161, (384, 768, 2112, 1632), 2208),
        (169, (256, 512, 1280, 1152), 1664),
        (201, (256, 512, 1792, 1408), 1920),
    ],
)
def test_parameters_are_those_of_the_encoder_and_of_the_paper_s_up_path(depth, skips, end):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"densenet{depth}")(weights=None)
    theirs.features.norm5 = torch.nn.Identity()
    encoder = sum(parameter.numel() for parameter in theirs.features.parameters())
    projections = sum(2 * channels + channels * 128 for channels in skips)
    context = 2 * end + end * 512 + 2 * 512 + 512 * 128 * 9
    blends = 4 * (2 * 256 + 256 * 128 * 9)
    logits = 2 * (2 * 128 + 128 * 19 + 19)
    assert describe(f"ladder-densenet{depth}").parameters == encoder + projections + context + blends + logits


def test_image_sides_must_be_multiples_of_the_output_stride():
    model = build_model("ladder-densenet-mini")
    with pytest.raises(InputError) as caught:
        model(torch.zeros(1, 3, 700, 30))
    assert str(caught.value) == (
        "image sides must be multiples of 64 (the output stride of ladder-densenet-mini), got 700x30; nearest is 704x64"
    )


def test_an_unknown_model_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean ladder-densenet121"):
        build_model("ladder-densenet-121")


@pytest.mark.parametrize("name", model_names())
def test_a_frozen_model_has_the_same_state_and_trains_no_norm(name):
    with torch.device("meta"):
        batch, frozen = build_model(name), build_model(name, norm=NormMode.FROZEN)
    assert batch.state_dict().keys() == frozen.state_dict().keys()
    fixed = {key for key, parameter in frozen.train().named_parameters() if not parameter.requires_grad}
    norms = {key for key, module in frozen.named_modules() if isinstance(module, BatchNorm2d)}
    assert fixed == {f"{key}.{name}" for key in norms for name in ("weight", "bias")}


MIXED = {"stem": Recompute.NORMS, "block1": Recompute.SEGMENT, "block2": Recompute.UNITS, "blend1": Recompute.UNITS}


@pytest.mark.parametrize("norm", NormMode)
@pytest.mark.parametrize("levels", [*list(Recompute)[1:], MIXED], ids=[*list(Recompute)[1:], "mixed"])
def test_a_whole_step_has_the_plain_network_s_gradients(levels, norm):
    plain = build_model("ladder-densenet-mini", num_classes=5, norm=norm).double()
    other = copy.deepcopy(plain)
    other.set_recompute(levels)
    images, target = torch.randn(2, 3, 64, 128, dtype=torch.float64), torch.randint(5, (2, 64, 128))
    losses = [Objective()(*model.train()(images), target) for model in (plain, other)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    expected = dict(plain.named_parameters())
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-8, atol=1e-10, msg=name)
    for name, buffer in other.named_buffers():
        torch.testing.assert_close(buffer, plain.get_buffer(name), rtol=1e-10, atol=1e-10, msg=name)


def test_a_bare_model_s_logits_are_its_main_coarse_output_upsampled():
    model = build_model("ladder-densenet-mini").eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        main, _ = model.coarse_outputs(images)
        expected = F.interpolate(main, (64, 64), mode="bilinear", align_corners=False)
        assert torch.equal(model(images), expected)


def test_the_objective_weighs_the_main_loss_7_to_3():
    main, auxiliary = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 2, 2)
    target = torch.randint(4, (1, 32, 32))
    one, other = (
        F.cross_entropy(F.interpolate(logits, (32, 32), mode="bilinear"), target) for logits in (main, auxiliary)
    )
    torch.testing.assert_close(Objective()(main, auxiliary, target), 0.7 * one + 0.3 * other)
    # The auxiliary weight is shared, and where there is nothing to share it with, the main loss is all.
    torch.testing.assert_close(Objective(0.5)(main, auxiliary, auxiliary, target), 0.5 * one + 0.5 * other)
    torch.testing.assert_close(Objective()(main, target), one)
    with pytest.raises(ValueError, match=r"within 0\.\.1, got 1\.5"):
        Objective(1.5)
