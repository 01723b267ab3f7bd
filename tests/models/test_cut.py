"""Networks that are not ours, cut into segments: they compute what they computed, whatever is rebuilt or split."""

from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F

from memseg.errors import InputError, ProblemsError, UnknownNameError
from memseg.levels import NormMode, Recompute, Strategy
from memseg.models import (
    SegmentGraph,
    build_model,
    load_address,
    load_original,
    load_original_file,
    original_name,
    segment_module,
)
from memseg.models.objective import ClassificationObjective, Objective
from memseg.nn import BatchNorm2d, DenseBlock
from memseg.planning import LOSS, Settings, Workload, make_plan, parse_cards
from memseg.profiling import model_costs

NETWORKS = str(Path(__file__).with_name("networks.py"))
CLASSES = 5
# Address, (height, width), and how many segments at least.
MODELS = {
    "fcn": (f"{NETWORKS}:fcn_with_aux", (64, 64), 15),
    "deeplab": ("torchvision.models.segmentation:deeplabv3_resnet50", (64, 64), 15),
    "lraspp": ("torchvision.models.segmentation:lraspp_mobilenet_v3_large", (64, 96), 15),
    "unet": (f"{NETWORKS}:unet", (64, 72), 10),
    "densenet": ("torchvision.models:densenet121", (64, 64), 8),
    "sequence": (f"{NETWORKS}:plain_sequence", (33, 48), 3),
    "sizes": (f"{NETWORKS}:sizes", (52, 64), 6),
    "margin": (f"{NETWORKS}:sizes_with_a_margin", (53, 66), 6),
    "exported": (f"{NETWORKS}:branch", (40, 64), 3),
    "tied": (f"{NETWORKS}:Tied", (20, 24), 2),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """A network as its author wrote it, its segmented twin, a batch, and what the first makes of it in one step."""
    address, size, fewest = MODELS[request.param]
    torch.manual_seed(0)
    model = build_model(address, num_classes=CLASSES, dtype=torch.float64)
    assert len(model.segments) >= fewest
    with torch.device("meta"):
        original = original_of(request.param)
    weights = {original_name(key): value.clone() for key, value in model.state_dict().items()}
    original.load_state_dict(weights, assign=True)
    # As memseg train has them: what is dropped at random depends on how maps lie in memory.
    images = torch.randn(2, 3, *size, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    return request.param, model, images, original, step(original, images)


def original_of(name):
    address = MODELS[name][0]
    settings = {} if name == "tied" else {"num_classes": CLASSES}
    if "segmentation" in address or name == "fcn":
        settings["weights_backbone"] = None
    return load_address(address)(**settings)


def fresh(model):
    """The model before its first step."""
    model.train().zero_grad()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    return model


def outputs_of(made):
    """The main one first, as the segmented model has them."""
    if isinstance(made, dict):
        return [made["out"], *(value for key, value in made.items() if key != "out")]
    return list(made) if isinstance(made, tuple) else [made]


def step(model, images):
    """Outputs, at the images' size if they are near it, gradients and buffers by the original's names."""
    torch.manual_seed(3)
    outputs = outputs_of(fresh(model)(images))
    return finish(outputs, images, [model])


def finish(outputs, images, parts):
    full = [out if out.dim() == 2 else F.interpolate(out, images.shape[2:], mode="bilinear") for out in outputs]
    sum((out.square() * weight).mean() for weight, out in enumerate(full, start=1)).backward()
    named = original_name if isinstance(parts[0], SegmentGraph) else str
    gradients = {named(key): value.grad for part in parts for key, value in part.named_parameters()}
    buffers = {named(key): value.clone() for part in parts for key, value in part.named_buffers()}
    return [out.detach() for out in full], gradients, buffers


def assert_same(found, expected):
    for mine, theirs in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            if value is None:
                assert mine[name] is None, name
            else:
                torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("level", [Recompute.NONE, Recompute.SEGMENT])
def test_outputs_gradients_and_statistics_are_those_of_the_original(case, level):
    name, model, images, _, expected = case
    inside = [Recompute.NORMS, Recompute.UNITS] if name == "densenet" and level is Recompute.SEGMENT else []
    for one in (level, *inside):
        model.set_recompute(one)
        assert_same(step(model, images), expected)


@pytest.mark.parametrize("count", [2, 3])
def test_stages_one_after_the_other_compute_the_same(case, count):
    _, model, images, _, expected = case
    fresh(model).set_recompute(Recompute.SEGMENT if count == 2 else Recompute.NONE)
    names = list(model.segments)
    borders = [round(len(names) * part / count) for part in range(count + 1)]
    stages = [model.stage(names[a:b]) for a, b in pairwise(borders)]
    torch.manual_seed(3)
    tensors = (images,)
    for stage in stages:
        tensors = stage.run(*tensors)
    assert_same(finish(list(tensors), images, stages), expected)


def test_in_evaluation_the_main_logits_are_the_original_s(case):
    name, model, images, original, _ = case
    if name == "sizes":
        # Dropout by function and by a module that does nothing in evaluation: both are off.
        assert {"training"} <= {str(node.target) for part in model.segments.values() for node in part.graph.nodes}
    model.eval(), original.eval()
    with torch.no_grad():
        expected = outputs_of(original(images))[0]
        if model.is_dense:
            expected = F.interpolate(expected, images.shape[2:], mode="bilinear")
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


def test_a_state_dict_of_the_original_fills_it(case):
    _, model, _, original, _ = case
    weights = {key: torch.full_like(value, 3) for key, value in original.state_dict().items()}
    assert load_original(model, weights | {"unused.weight": torch.zeros(1)}) == ["unused.weight"]
    assert {original_name(key) for key in model.state_dict()} == weights.keys()
    assert all((value == 3).all() for value in model.state_dict().values())
    first = next(iter(weights))
    with pytest.raises(ProblemsError, match=f"1 problem\n  nothing in it fills {first}"):
        load_original(model, {key: value for key, value in weights.items() if key != first})
    with pytest.raises(ProblemsError, match=rf"{first}: shape must be .* got \(1, 1, 1, 1, 1, 1\)"):
        load_original(model, weights | {first: torch.zeros(1, 1, 1, 1, 1, 1)})


def test_a_file_of_the_original_fills_it(tmp_path):
    original = load_address(MODELS["unet"][0])(CLASSES)
    model = build_model(MODELS["unet"][0], num_classes=CLASSES)
    torch.save(original.state_dict(), tmp_path / "unet.pth")
    assert load_original_file(model, tmp_path / "unet.pth") == []
    for name, value in model.state_dict().items():
        assert torch.equal(value, original.state_dict()[original_name(name)]), name
    with pytest.raises(InputError, match=r"absent\.pth: must be a state dict of .*unet saved by torch\.save"):
        load_original_file(model, tmp_path / "absent.pth")


@pytest.mark.parametrize("name", ["fcn", "densenet", "sizes", "exported"])
def test_nothing_is_allocated_on_the_meta_device_or_under_a_fake_mode(name):
    address, size, _ = MODELS[name]
    with torch.device("meta"):
        model, images = build_model(address, num_classes=CLASSES), torch.empty(2, 3, *size)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    assert {out.device.type for out in model.train()(images)} == {"meta"}
    with FakeTensorMode():
        fake = build_model(address, num_classes=CLASSES)
        assert all(isinstance(tensor, FakeTensor) for tensor in (*fake.parameters(), *fake.buffers()))
        fake.train()(torch.empty(2, 3, *size))
    assert fake.reads == model.reads


@pytest.mark.parametrize("name", ["lraspp", "unet"])
def test_a_plan_can_split_it(name):
    address, size, _ = MODELS[name]
    build = partial(build_model, address, num_classes=CLASSES)
    workload = Workload(lambda images, _: model_costs(build, image=size, batch=images), 2)
    plan = make_plan(workload, parse_cards("cpu:8GiB,cpu:8GiB"), Settings(strategy=Strategy.SPLIT))
    placed = [segment.name for card in plan.cards for segment in card.segments]
    with torch.device("meta"):
        assert placed == [*build().segments, LOSS]
    assert len(plan.cards) == 2


def test_segments_are_blocks_and_stages_by_name():
    with torch.device("meta"):
        fcn = build_model(MODELS["fcn"][0], num_classes=CLASSES)
        unet = build_model(MODELS["unet"][0], num_classes=CLASSES)
    assert {"backbone_layer3_0", "backbone_layer3_1", "classifier", "aux_classifier"} <= fcn.segments.keys()
    assert (fcn.outputs, fcn.output_stride, fcn.is_dense) == (("classifier", "aux_classifier"), 1, True)
    assert {name.split("_")[0] for name in fcn.encoder} == {"backbone"}
    # What halved three times is joined again, so sides are multiples of 8; each skip is read by its step up.
    assert unet.output_stride == 8
    joins = {name: reads for name, reads in unet.reads.items() if len(reads) == 2}
    assert len(joins) == 3
    assert all(name.startswith("up_") and reads[1].startswith("down_") for name, reads in joins.items())
    with pytest.raises(InputError, match=r"multiples of 8 .* got 60x64; nearest is 64x64"):
        unet.check_image((60, 64))


def test_a_norm_stays_with_its_convolution():
    for name in ("fcn", "unet", "sizes"):
        with torch.device("meta"):
            model = build_model(MODELS[name][0], num_classes=CLASSES)
        for part in model.segments.values():
            kinds = {type(module) for module in part.modules()}
            assert BatchNorm2d not in kinds or nn.Conv2d in kinds or nn.ConvTranspose2d in kinds


def test_sizes_are_told_by_what_a_segment_reads_where_they_can_be():
    with torch.device("meta"):
        told, crossing = (build_model(MODELS[name][0], num_classes=CLASSES) for name in ("sizes", "margin"))
    # Of sides that are multiples of 4, the images' are 4 times those of the deepest map.
    assert (told.output_stride, [name for name, reads in told.reads.items() if "images" in reads]) == (4, ["stem"])
    # Half a side and 3 more are told by nothing else: so late segments read the images, for their size.
    late = [name for name, reads in crossing.reads.items() if "images" in reads and name != "stem"]
    assert crossing.output_stride == 1
    assert late


def test_images_that_are_read_for_their_size_alone_get_a_gradient_of_zeros():
    # The card that sends them waits for one.
    model = build_model(MODELS["margin"][0], num_classes=CLASSES).train()
    names = list(model.segments)
    first, last = model.stage(names[:-2]), model.stage(names[-2:])
    assert "images" in last.inputs
    crossing = [tensor.detach().requires_grad_() for tensor in first.run(torch.randn(2, 3, 33, 40))]
    sum(out.mean() for out in last.run(*crossing)).backward()
    gradients = {name: tensor.grad for name, tensor in zip(last.inputs, crossing, strict=True)}
    assert torch.equal(gradients["images"], torch.zeros(2, 33, 40, 3))
    assert all(gradient is not None for gradient in gradients.values())


@pytest.mark.parametrize("name", ["unet", "densenet", "sizes", "lraspp"])
def test_every_segment_has_a_product(name):
    # An addition, a pooling or a joining alone is part of its neighbour.
    with torch.device("meta"):
        model = build_model(MODELS[name][0], num_classes=CLASSES)
    products = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    for segment, part in model.segments.items():
        assert any(isinstance(module, products) for module in part.modules()), segment


def test_dense_blocks_become_recomputing_segments():
    with torch.device("meta"):
        model = build_model("torchvision.models:densenet121", num_classes=CLASSES)
    block = model.segments["features_denseblock3"]
    assert any(isinstance(module, DenseBlock) for module in block.modules())
    assert set(block.levels) == set(Recompute)
    model.set_recompute(Recompute.NORMS)
    assert {module.recompute for module in block.modules() if isinstance(module, DenseBlock)} == {Recompute.NORMS}


@pytest.mark.parametrize("norm", NormMode)
def test_norms_have_the_mode_that_is_asked_for(norm):
    model = build_model(MODELS["unet"][0], num_classes=CLASSES, norm=norm)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(isinstance(module, BatchNorm2d) and module.norm is norm for module in norms)
    assert all(module.weight.requires_grad is (norm is not NormMode.FROZEN) for module in norms)


def test_dropout_is_off_in_evaluation():
    plain = build_model(MODELS["sequence"][0], num_classes=CLASSES).eval()
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(plain(images), plain(images))


def test_classification_trains_with_labels_of_images():
    torch.manual_seed(0)
    model = build_model("torchvision.models:resnet18", num_classes=CLASSES).train()
    assert not model.is_dense
    images, target = torch.randn(2, 3, 64, 64), model.make_target(2, (64, 64))
    assert (target.shape, target.dtype) == ((2,), torch.int64)
    objective = model.objective(0.3)
    assert isinstance(objective, ClassificationObjective)
    (logits,) = model(images)
    torch.testing.assert_close(objective(logits, target), F.cross_entropy(logits, target))
    assert model.eval()(images).shape == (2, CLASSES)


def test_segmentation_trains_with_labels_of_pixels():
    with torch.device("meta"):
        model = build_model(MODELS["unet"][0], num_classes=CLASSES)
    target = model.make_target(2, (64, 72))
    assert (target.shape, target.dtype) == ((2, 64, 72), torch.uint8)
    assert type(model.objective()) is Objective


def test_a_network_of_one_size_says_so():
    with torch.device("meta"):
        model = build_model("torchvision.models:vit_b_16", num_classes=CLASSES)
    model.check_image((224, 224), batch=1)
    with pytest.raises(InputError, match="vit_b_16 takes images of 224x224 alone, got 256x256"):
        model.check_image((256, 256))


def test_a_norm_of_pooled_maps_needs_two_images():
    with torch.device("meta"):
        model = build_model("torchvision.models.segmentation:deeplabv3_resnet50", num_classes=CLASSES)
    model.check_image((512, 512), batch=2)
    with pytest.raises(InputError, match="batch statistics need more than one value per channel"):
        model.check_image((512, 512), batch=1)


def test_a_module_that_cannot_be_entered_is_kept_whole():
    model = build_model(f"{NETWORKS}:each_channel", num_classes=CLASSES)
    assert "EachChannel" in {type(module).__name__ for module in model.modules()}


@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        (f"{NETWORKS}:InTheOpen", InputError, r"InTheOpen cannot be traced.*\n  torch\.fx: .*\n  torch\.export: "),
        (f"{NETWORKS}:gated", InputError, r"ended in _1 of 1 with RuntimeError: .*values of tensors may not decide"),
        (f"{NETWORKS}:TwoInputs", InputError, r"must read images alone, but TwoInputs also needs \['mask'\]"),
        (f"{NETWORKS}:seven_classes", InputError, "makes logits of 7 classes, but 5 are asked for"),
        (f"{NETWORKS}:fails", InputError, r"fails with RuntimeError: no such luck; it is called with \(\)"),
        (f"{NETWORKS}:no_module", InputError, r"must make a torch\.nn\.Module, got int"),
        (f"{NETWORKS}:unett", UnknownNameError, r"unknown function of .*networks\.py 'unett'; did you mean unet"),
        ("nowhere.py:build", InputError, r"nowhere\.py: no such file"),
        ("torchvision.models:resnet1", UnknownNameError, "did you mean resnet"),
        ("unet", UnknownNameError, r"unknown model 'unet'.*file\.py:FUNCTION"),
    ],
)
def test_what_cannot_be_cut_is_told_in_one_error(address, error, words):
    with pytest.raises(error, match=f"(?s){words}"):
        build_model(address, num_classes=CLASSES)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2)), r"must return logits .* returns \(2, 4, "),
        (nn.Sequential(nn.Conv2d(4, 4, 1)), "runs on images of no size that was tried"),
        (nn.Sequential(nn.AvgPool2d(2)), "has nothing to train"),
    ],
)
def test_what_makes_no_logits_is_refused(module, words):
    with pytest.raises(InputError, match=words):
        segment_module(module, name="odd")
