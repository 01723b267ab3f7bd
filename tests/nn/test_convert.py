"""Other people's networks after conversion: the same to train, load, save and hook into, and what is left is told."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.models import DenseNet, densenet121, densenet169, resnet18
from torchvision.models.densenet import _DenseBlock, _DenseLayer, _Transition
from twins import assert_same, random_inputs, step

from memseg.errors import UnknownNameError
from memseg.levels import NormMode, Recompute
from memseg.nn.batch_norm import BatchNorm2d
from memseg.nn.convert import Change, convert
from memseg.nn.dense_block import DenseBlock
from memseg.nn.fused_sequential import FusedSequential
from memseg.nn.norm_relu_conv import NormReluConv
from memseg.nn.recompute import recompute
from memseg.profiling.measure import watch_allocator


def densenet(**changes):
    return DenseNet(4, (2, 3, 2, 2), 8, bn_size=2, num_classes=3, **changes)


def unit(channels, out=None, kernel=3, **conv):
    """BN, ReLU and a convolution that keeps the size, as the members of a Sequential."""
    padding = conv.pop("padding", kernel // 2)
    layer = nn.Conv2d(channels, out or channels, kernel, padding=padding, bias=False, **conv)
    return [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), layer]


class PreActivation(nn.Module):
    """A residual block as in He et al., arXiv:1603.05027."""

    def __init__(self, channels):
        super().__init__()
        self.residual = nn.Sequential(*unit(channels, 2 * channels), *unit(2 * channels, channels))

    def forward(self, x):
        return x + self.residual(x)


def pre_activation_resnet():
    stem = [nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*stem, PreActivation(8), PreActivation(8), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())


def pair(model):
    """(plain, other) in float64, alike; norms have statistics of their own and weights of both signs."""
    model = model.double()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.affine and norm.running_mean is not None:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
    return model, copy.deepcopy(model)


IMAGES = (2, 3, 64, 64)


@pytest.mark.parametrize("level", Recompute)
@pytest.mark.parametrize("build", [densenet, pre_activation_resnet])
def test_a_converted_network_trains_as_it_did(build, level):
    plain, other = pair(build())
    convert(other, recompute=level)
    for _ in range(2):
        inputs = random_inputs([IMAGES])
        assert_same(step(other, inputs), step(plain, inputs))
    assert_same(step(other.eval(), inputs), step(plain.eval(), inputs))
    with torch.no_grad():
        torch.testing.assert_close(other(*inputs), plain(*inputs), rtol=1e-10, atol=1e-10)


def test_a_densenet_121_trains_as_it_did():
    plain, other = pair(densenet121(num_classes=3))
    changed = convert(other).changed
    assert [change.what for change in changed if "_DenseBlock" in change.what] == [
        f"_DenseBlock of {num_layers} layers" for num_layers in (6, 12, 24, 16)
    ]
    inputs = random_inputs([IMAGES])
    assert_same(step(other, inputs), step(plain, inputs))


@pytest.mark.parametrize("build", [densenet121, densenet169])
def test_a_state_dict_is_the_same_and_loads_both_ways(build):
    plain, other = build(), build()
    before = other.state_dict()
    convert(other)
    assert list(other.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    other.load_state_dict(plain.state_dict())
    plain.load_state_dict(other.state_dict())


def test_memory_efficient_is_switched_off_and_the_batch_counts_once_again():
    # torchvision's own checkpointing counts it twice: pytorch/pytorch#96136.
    plain, other = pair(densenet())
    efficient = densenet(memory_efficient=True).double()
    efficient.load_state_dict(other.state_dict())
    conversion = convert(efficient)
    assert "features.denseblock2: _DenseBlock of 3 layers -> DenseBlock, memory_efficient switched off" in str(
        conversion
    )
    assert not any(hasattr(layer, "memory_efficient") for layer in efficient.features.denseblock2.layers)
    inputs = random_inputs([IMAGES])
    assert_same(step(efficient, inputs), step(plain, inputs))


def test_an_optimizer_made_before_trains_the_converted_network():
    plain, other = pair(densenet())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (plain, other)]
    parameters, buffers = dict(other.named_parameters()), dict(other.named_buffers())
    convert(other)
    assert all(parameter is parameters[name] for name, parameter in other.named_parameters())
    assert all(buffer is buffers[name] for name, buffer in other.named_buffers())
    for _ in range(2):
        inputs = random_inputs([IMAGES])
        for model, optimizer in zip((plain, other), optimizers, strict=True):
            step(model, inputs)
            optimizer.step()
    assert_same(other.state_dict(), plain.state_dict())


def test_hooks_on_the_outside_still_fire_and_can_still_be_removed():
    model, fired = densenet(), []
    for name in ("features.denseblock1", "features.transition1"):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, name=name: fired.append(f"{name} before"))
        module.register_forward_hook(lambda *_, name=name: fired.append(f"{name} after"))
        module.register_full_backward_hook(lambda *_, name=name: fired.append(f"{name} backward"))
        module.register_state_dict_post_hook(lambda *_, name=name: fired.append(f"{name} saved"))
        module.register_load_state_dict_pre_hook(lambda *_, name=name: fired.append(f"{name} loaded"))
    late = model.features.denseblock2.register_forward_hook(lambda *_: fired.append("removed"))
    convert(model)
    late.remove()
    model(torch.randn(IMAGES, requires_grad=True)).sum().backward()
    model.load_state_dict(model.state_dict())
    assert sorted(fired) == sorted(
        f"{name} {what}"
        for name in ("features.denseblock1", "features.transition1")
        for what in ("before", "after", "backward", "saved", "loaded")
    )


def test_modes_and_frozen_parameters_stay_as_they_were():
    model = densenet()
    model.features.eval()
    model.features.denseblock1.requires_grad_(False)
    convert(model)
    assert model.training
    assert not any(module.training for module in model.features.modules())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "denseblock1" not in name}
    assert all(module.training for module in model.train().modules())


@pytest.mark.parametrize("level", Recompute)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_converted_network_is_converted_and_its_own(duplicate, level):
    plain, other = pair(densenet())
    convert(other, recompute=level)
    twin = duplicate(other)
    assert [type(module) for module in twin.modules()] == [type(module) for module in other.modules()]
    assert twin.features.transition1.recompute is level
    inputs = random_inputs([IMAGES])
    assert_same(step(twin, inputs), step(plain, inputs))
    assert all(parameter.grad is None for parameter in other.parameters())


def test_converting_twice_changes_nothing_more():
    model = densenet()
    first = convert(model)
    classes, attributes = (
        [type(module) for module in model.modules()],
        [dict(vars(module)) for module in model.modules()],
    )
    assert first.changed
    assert convert(model, recompute="norms", norm="frozen").changed == ()
    assert [type(module) for module in model.modules()] == classes
    assert [dict(vars(module)) for module in model.modules()] == attributes


@pytest.mark.parametrize(
    ("root", "inputs", "kind"),
    [
        (_DenseBlock(2, 4, bn_size=2, growth_rate=4, drop_rate=0), (2, 4, 8, 8), DenseBlock),
        (_Transition(4, 2), (2, 4, 8, 8), FusedSequential),
    ],
)
def test_the_model_itself_can_be_what_is_converted(root, inputs, kind):
    plain, other = pair(root)
    conversion = convert(other)
    assert conversion.model is other
    assert isinstance(other, kind)
    assert "  the model itself: " in str(conversion)
    inputs = random_inputs([inputs])
    assert_same(step(other, inputs), step(plain, inputs))


@pytest.mark.parametrize(
    "build", [nn.Sequential, lambda: nn.Sequential(nn.Linear(2, 2)), lambda: NormReluConv(4, 2, kernel_size=1)]
)
def test_a_network_with_nothing_to_convert_says_so(build):
    model = build()
    before = [dict(vars(module)) for module in model.modules()]
    conversion = convert(model)
    assert str(conversion) == f"{type(model).__name__}: nothing to convert"
    assert [dict(vars(module)) for module in model.modules()] == before


def test_a_network_with_forwards_of_its_own_is_left_and_says_so():
    model = resnet18()
    before = [dict(vars(module)) for module in model.modules()]
    conversion = convert(model)
    assert conversion.changed == ()
    assert [dict(vars(module)) for module in model.modules()] == before
    assert str(conversion) == (
        "ResNet: nothing to convert, 9 left as they were\n"
        "  left the model itself: ResNet runs its layers in a forward of its own; `recompute` may rebuild it\n"
        "  left layer1.0, layer1.1, layer2.0 and 5 more: BasicBlock runs its layers in a forward of its own; "
        "`recompute` may rebuild it"
    )


@pytest.mark.parametrize("level", Recompute)
@pytest.mark.parametrize(
    ("members", "runs"),
    [
        pytest.param([*unit(4, 6, 1), nn.AvgPool2d(2)], ["0-1-2-3"], id="transition"),
        pytest.param([*unit(4, 6, 1), nn.AvgPool2d(3)], ["0-1-2"], id="other pooling"),
        pytest.param([*unit(4, 6, 3), nn.AvgPool2d(2)], ["0-1-2"], id="pooling behind 3x3"),
        pytest.param(unit(4, 6, 5), ["0-1-2"], id="5x5"),
        pytest.param(unit(4, 6, 3, padding=2, dilation=2), ["0-1-2"], id="dilated"),
        pytest.param(unit(4, 6, 3, padding="same", dilation=3), ["0-1-2"], id="same"),
        pytest.param([nn.Conv2d(4, 5, 1), *unit(5), nn.BatchNorm2d(5), nn.Tanh()], ["1-2-3"], id="in the midst"),
        pytest.param(
            [nn.Conv2d(4, 5, 3, 1, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(3, 2, 1), *unit(5)],
            ["0-1-2-3", "4-5-6"],
            id="stem",
        ),
    ],
)
def test_a_run_is_recognised_and_computes_the_same(members, runs, level):
    plain, other = pair(nn.Sequential(*copy.deepcopy(members)))
    conversion = convert(other, recompute=level)
    assert [change.what for change in conversion.changed] == runs
    assert conversion.left == ()
    inputs = random_inputs([(2, 4, 9, 10)])
    assert_same(step(other, inputs), step(plain, inputs))


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


def replaced(module):
    module.forward = module.forward
    return module


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def unit_with(norm=None, relu=None, conv=None):
    return [norm or nn.BatchNorm2d(4), relu or nn.ReLU(), conv or nn.Conv2d(4, 4, 3, padding=1)]


def stem_with(conv=None, norm=None, pool=None):
    return [conv or nn.Conv2d(3, 4, 3), norm or nn.BatchNorm2d(4), nn.ReLU(), pool or nn.MaxPool2d(2)]


@pytest.mark.parametrize(
    ("members", "name", "why"),
    [
        (unit_with(conv=nn.Conv2d(4, 4, 3, padding=1, stride=2)), "0", "stride 1, one group, an odd square kernel"),
        (unit_with(conv=nn.Conv2d(4, 4, 3)), "0", "must keep the map's size"),
        (unit_with(conv=nn.Conv2d(4, 4, (1, 3), padding=(0, 1))), "0", "must keep the map's size"),
        (unit_with(conv=nn.Conv2d(4, 4, 3, padding=1, groups=2)), "0", "must keep the map's size"),
        (unit_with(conv=nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")), "0", "padding by zeros"),
        (unit_with(conv=OwnConv(4, 4, 3, padding=1)), "0", "2 is of OwnConv, which may compute something else"),
        (unit_with(conv=hooked(nn.Conv2d(4, 4, 3, padding=1))), "0", "2 carries hooks"),
        (unit_with(conv=replaced(nn.Conv2d(4, 4, 3, padding=1))), "0", "the forward of 2 has been replaced"),
        (unit_with(conv=parametrizations.spectral_norm(nn.Conv2d(4, 4, 3))), "0", "2 is of ParametrizedConv2d"),
        (unit_with(conv=nn.LazyConv2d(4, 3, padding=1)), "0", "2 is of LazyConv2d"),
        (unit_with(relu=hooked(nn.ReLU())), "0", "1 carries hooks, which one node would not fire"),
        (unit_with(norm=nn.BatchNorm2d(4, momentum=None)), "0", "0 has no running statistics that follow with a mom"),
        (unit_with(norm=nn.BatchNorm2d(4, track_running_stats=False)), "0", "0 has no running statistics"),
        (unit_with(norm=nn.BatchNorm2d(4, affine=False)), "0", "0 has no weight or no bias"),
        (unit_with(norm=nn.SyncBatchNorm(4)), "0", "0 is of SyncBatchNorm"),
        (stem_with(conv=nn.Conv2d(8, 4, 3)), "0", "one node only for up to 4 channels"),
        (stem_with(conv=nn.Conv2d(3, 4, 3, padding="same")), "0", "must pad by zeros, as told in numbers"),
        (stem_with(conv=nn.Conv2d(3, 4, 3, padding_mode="reflect")), "0", "must pad by zeros, as told in numbers"),
        (stem_with(pool=nn.MaxPool2d(2, ceil_mode=True)), "0", "must have a plain square window of up to 11"),
        (stem_with(pool=nn.MaxPool2d(2, return_indices=True)), "0", "must have a plain square window"),
        (stem_with(pool=nn.MaxPool2d(13)), "0", "must have a plain square window"),
        (stem_with(pool=nn.MaxPool2d((2, 3))), "0", "must have a plain square window"),
        (stem_with(norm=hooked(nn.BatchNorm2d(4))), "0", "1 carries hooks"),
        (stem_with(pool=nn.Tanh()), "0", "in this order are one node only where max-pooling follows"),
    ],
)
def test_a_run_that_is_not_quite_one_is_left_with_the_reason(members, name, why):
    model = nn.Sequential(*members)
    before = [dict(vars(module)) for module in model.modules()]
    conversion = convert(nn.ModuleDict({"body": model}))
    assert conversion.changed == ()
    assert [left.name for left in conversion.left] == [f"body.{name}"]
    assert why in conversion.left[0].why
    assert [dict(vars(module)) for module in model.modules()] == before


def block(**changes):
    return _DenseBlock(2, 4, **({"bn_size": 2, "growth_rate": 4, "drop_rate": 0.0} | changes))


def altered(change):
    """A dense block after `change(block, second layer)`."""
    found = block()
    change(found, found.denselayer2)
    return found


class OwnBlock(_DenseBlock):
    def forward(self, x):
        return super().forward(x.sin())


class OwnLayer(_DenseLayer):
    def bn_function(self, inputs):
        return super().bn_function(inputs).sin()


class LookAlike(nn.ModuleDict):
    """As in a network whose author copied torchvision's file."""

    def forward(self, x):
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


@pytest.mark.parametrize(
    ("dense_block", "why"),
    [
        (LookAlike(dict(block().named_children())), "it looks like a dense block, but LookAlike is not torchvision's"),
        (OwnBlock(2, 4, 2, 4, 0.0), "OwnBlock has no layers, or a forward of its own"),
        (_DenseBlock(0, 4, 2, 4, 0.0), "_DenseBlock has no layers"),
        (replaced(block()), "_DenseBlock has no layers, or a forward of its own"),
        (altered(lambda b, _: b.add_module("denselayer2", OwnLayer(8, 4, 2, 0.0))), "denselayer2, of OwnLayer, has a"),
        (altered(lambda _, layer: hooked(layer)), "denselayer2 carries hooks"),
        (altered(lambda _, layer: hooked(layer.relu2)), "denselayer2.relu2 carries hooks"),
        (altered(lambda _, layer: setattr(layer, "drop_rate", 0.5)), "must have one drop rate below 1, got 0.0, 0.5"),
        (block(drop_rate=1.0), "must have one drop rate below 1, got 1.0"),
        (altered(lambda _, layer: layer.add_module("se", nn.Identity())), "must be named as torchvision names them"),
        (altered(lambda b, _: b.add_module("last", _DenseLayer(12, 4, 2, 0.0))), "must be named as torchvision"),
        (
            altered(lambda _, layer: setattr(layer, "conv2", nn.Conv2d(8, 4, 3, padding=2, dilation=2, bias=False))),
            "denselayer2.conv2 must be Conv2d(8, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)",
        ),
        (
            altered(lambda _, layer: setattr(layer, "conv2", nn.Conv2d(8, 4, 3, padding=1))),
            "bias=False), got Conv2d(8, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))",
        ),
        (altered(lambda b, _: b.add_module("denselayer2", _DenseLayer(4, 4, 2, 0.0))), "denselayer2.norm1 must be"),
        (altered(lambda b, _: b.denselayer1.add_module("conv2", nn.ReLU())), "must be"),
        (altered(lambda _, layer: layer.add_module("norm1", nn.BatchNorm2d(8, momentum=None))), "norm1 has no running"),
        (altered(lambda _, layer: layer.add_module("norm1", nn.SyncBatchNorm(8))), "norm1 is of SyncBatchNorm"),
        (altered(lambda _, layer: layer.norm2.eval()), "in training or in eval mode all together"),
    ],
)
def test_a_dense_block_that_is_not_torchvisions_is_left_with_the_reason(dense_block, why):
    before = [dict(vars(module)) for module in dense_block.modules()]
    conversion = convert(nn.ModuleDict({"body": dense_block}))
    assert conversion.changed == ()
    assert [left.name for left in conversion.left] == ["body"]
    assert why in conversion.left[0].why
    assert [dict(vars(module)) for module in dense_block.modules()] == before


def test_norms_of_a_dense_block_keep_their_eps_and_momentum():
    model = block()
    model.denselayer1.norm1.momentum, model.denselayer2.norm2.eps = 0.5, 1e-2
    plain, other = pair(model)
    assert convert(other).changed
    inputs = random_inputs([(2, 4, 6, 6)])
    assert_same(step(other, inputs), step(plain, inputs))


def test_the_drop_rate_stays():
    plain, other = pair(densenet(drop_rate=0.5))
    convert(other, recompute="none")
    inputs, found = random_inputs([IMAGES]), []
    for model in (plain, other):
        torch.manual_seed(1)
        found.append(step(model, inputs))
    assert_same(*found)
    assert {layer.drop_rate for layer in other.features.denseblock2.layers} == {0.5}


@pytest.mark.parametrize("mode", NormMode)
def test_all_converted_norms_take_the_mode_that_is_given(mode):
    model = densenet()
    conversion = convert(model, norm=mode.value)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, BatchNorm2d)}
    assert len(norms) == 1 + 2 * 9 + 3
    assert {norm.norm for norm in norms.values()} == {mode}
    assert {norm.weight.requires_grad for norm in norms.values()} == {mode is not NormMode.FROZEN}
    # The last norm stands alone: it stays torch's.
    expected = [] if mode is NormMode.BATCH else ["features.norm5"]
    assert [left.name for left in conversion.left] == expected


def test_names_that_do_not_exist_are_refused():
    with pytest.raises(UnknownNameError, match=r"unknown recompute level 'unit'; did you mean units\?"):
        convert(nn.Sequential(), recompute="unit")
    with pytest.raises(UnknownNameError, match=r"unknown norm mode 'freeze'; did you mean frozen\?"):
        convert(nn.Sequential(), norm="freeze")


class Named(nn.Sequential):
    """A Sequential with methods, as many networks have."""

    def width(self):
        return self[-1].out_channels


def test_a_sequential_of_another_class_is_still_of_it():
    model = Named(*unit(4))
    convert(model)
    for found in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(found, Named)
        assert isinstance(found, FusedSequential)
        assert type(found).__name__ == "FusedNamed"
        assert found.width() == 4
    assert isinstance(model[:2], FusedSequential)


def test_members_of_a_fused_run_that_are_changed_later_run_by_themselves():
    model, fired = nn.Sequential(*unit(4), *unit(4)), []
    convert(model)
    handle = model[1].register_forward_hook(lambda *_: fired.append("hook"))
    plain, x = nn.Sequential(*model), torch.randn(2, 4, 6, 6)
    assert torch.equal(model[:3](x), plain[:3](x))
    assert fired == ["hook", "hook"]
    handle.remove()
    model[3] = nn.BatchNorm2d(4)
    assert torch.allclose(model(x), nn.Sequential(*model)(x), atol=1e-6)
    assert convert(model).changed == (Change("", "3-4-5", "one node that keeps what it reads"),)


def test_a_module_that_occurs_in_several_places_is_converted_for_all_of_them():
    relu, norm, dense = nn.ReLU(), nn.BatchNorm2d(4), block()
    twice = nn.Sequential(norm, relu, nn.Conv2d(4, 4, 1))
    model = nn.Sequential(twice, norm, relu, nn.Conv2d(4, 4, 3, padding=1), twice, dense, nn.Conv2d(12, 4, 1), dense)
    plain, other = pair(model)
    convert(other)
    assert other[0] is other[4]
    assert other[5] is other[7]
    inputs = random_inputs([(2, 4, 6, 6)])
    assert_same(step(other, inputs), step(plain, inputs))


def test_levels_of_a_converted_network_can_be_set_by_name():
    plain, other = pair(densenet())
    convert(other)
    recompute(other, {"features": "norms", "features.denseblock?": "segment", "features.transition1": "none"})
    levels = [other.features.recompute, other.features.denseblock3.recompute, other.features.transition1.recompute]
    assert levels == [Recompute.NORMS, Recompute.SEGMENT, Recompute.NONE]
    recompute(other, "norms")
    assert other.features.transition1.recompute is Recompute.NORMS
    inputs = random_inputs([IMAGES])
    assert_same(step(other, inputs), step(plain, inputs))


def test_a_sequential_rebuilds_nothing_around_what_rebuilds_itself():
    model, runs = densenet(), []
    convert(model, recompute="segment")
    model.features.denseblock2.register_forward_hook(lambda *_: runs.append("block"))
    model.features.norm5.register_forward_hook(lambda *_: runs.append("norm"))
    model(torch.randn(IMAGES)).sum().backward()
    assert runs == ["block", "norm"]


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_network_is_of_plain_operations(strict):
    model = nn.Sequential(nn.Sequential(*unit(4)), block(), nn.Sequential(nn.Conv2d(12, 2, 1), nn.Tanh())).eval()
    x = torch.randn(2, 4, 6, 6)
    expected = model(x)
    convert(model)
    recompute(model, {"2": "segment"})
    exported = torch.export.export(model, (x,), strict=strict)
    assert not any("memseg" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), expected)


def peak_bytes(model, x):
    with watch_allocator() as peak:
        model(x).sum().backward()
    return peak.peak_bytes


def test_a_converted_densenet_needs_less_than_half():
    model, x = DenseNet(8, (6, 6), 16).train(), torch.randn(2, 3, 128, 128)
    plain = peak_bytes(model, x)
    convert(model)
    model.zero_grad()
    assert peak_bytes(model, x) < plain / 2


def kept_bytes(model, x):
    with watch_allocator() as peak:
        out = model(x)
        torch.empty(2**28, dtype=torch.uint8)
    assert out.requires_grad
    return peak.peak_bytes - 2**28


def test_each_level_of_a_sequential_keeps_what_it_says():
    # Two runs over 4 channels: a map is 4 * M numbers, mean and variance of a norm 2 * 4.
    model = nn.Sequential(*unit(4), *unit(4))
    convert(model, recompute="none")
    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    one_map, statistics, random_state = 4 * 4 * 2 * 16 * 16, 4 * 2 * 4, torch.get_rng_state().nbytes
    kept_bytes(model, x)
    # Plainly: what each ReLU and convolution makes. As nodes: what each convolution makes. Whole: the output.
    assert kept_bytes(model, x) == 4 * one_map + 2 * statistics
    recompute(model, "units")
    assert kept_bytes(model, x) == 2 * one_map + 2 * statistics
    recompute(model, "segment")
    assert kept_bytes(model, x) == one_map + random_state


def test_a_stem_at_norms_also_keeps_what_its_convolution_makes():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    convert(model, recompute="units")
    images, one_map, statistics = torch.randn(2, 3, 16, 16), 4 * 4 * 2 * 16 * 16, 4 * 2 * 4
    kept_bytes(model, images)
    # The output is a quarter of a map, and each of its numbers has an offset of one byte.
    kept = one_map // 4 + one_map // 16 + statistics
    assert kept_bytes(model, images) == kept
    recompute(model, "norms")
    assert kept_bytes(model, images) == kept + one_map


def test_a_rebuilt_stretch_counts_a_batch_once_with_torchs_norms_too():
    plain, other = pair(nn.Sequential(*unit(4), nn.BatchNorm2d(4), nn.Tanh(), *unit(4)))
    convert(other, recompute="segment")
    assert type(other[3]) is nn.BatchNorm2d
    inputs = random_inputs([(2, 4, 6, 6)])
    assert_same(step(other, inputs), step(plain, inputs))
