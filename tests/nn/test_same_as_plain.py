"""Whatever is rebuilt, training sees what the plain network under autograd shows: in float64, to 1e-10."""

import pytest
import torch
from torchvision.models.densenet import _DenseBlock, _Transition
from torchvision.models.resnet import Bottleneck as TorchvisionBottleneck
from torchvision.models.resnet import ResNet
from twins import MODULES, assert_same, build, gradients, output_gradient, random_inputs, step, twins

from memseg.levels import NormMode, Recompute
from memseg.nn import DenseBlock, NormReluConv, ResidualLayer, layout, stem
from memseg.nn.join import join

REBUILDING = [level for level in Recompute if level is not Recompute.NONE]


@pytest.mark.parametrize("level", REBUILDING)
@pytest.mark.parametrize("norm", NormMode)
@pytest.mark.parametrize("name", MODULES)
def test_outputs_gradients_and_running_statistics(name, norm, level):
    plain, other = build(name, norm)
    other.recompute = level
    for batch in (2, 1):
        inputs = random_inputs([(batch, *shape[1:]) for shape in MODULES[name][1]])
        assert_same(step(other, inputs), step(plain, inputs))


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "channel-major": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "slice of channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODULES)
def test_any_memory_layout_of_inputs_and_gradient(name, layout):
    lay_out = LAYOUTS[layout]
    plain, other = build(name)
    other.recompute = Recompute.UNITS
    inputs = random_inputs(MODULES[name][1])
    expected = step(plain, inputs)
    grad = lay_out(output_gradient(expected["output"]))
    assert_same(step(other, [lay_out(x) for x in inputs], grad), expected)


@pytest.mark.parametrize("name", MODULES)
def test_a_gradient_that_is_one_number_spread_out(name):
    # What `.sum().backward()` hands over: strides of 0.
    plain, other = build(name)
    other.recompute = Recompute.UNITS
    inputs = random_inputs(MODULES[name][1])
    ones = torch.ones((), dtype=torch.float64).expand_as(other.eval()(*inputs))
    assert_same(step(other.train(), inputs, ones), step(plain, inputs, ones))


@pytest.mark.parametrize("norm", NormMode)
@pytest.mark.parametrize("name", MODULES)
def test_a_map_of_many_bands_the_last_one_ragged(name, norm, monkeypatch):
    monkeypatch.setattr(layout, "_BAND_BYTES", {"cpu": 1})
    plain, other = build(name, norm)
    other.recompute = Recompute.UNITS
    inputs = random_inputs([(2, shape[1], 5 * shape[2] + 3, 5 * shape[3]) for shape in MODULES[name][1]])
    fine = inputs[-1]
    if name == "stem":
        assert len(stem._window_bands(torch.empty(2, 4, 41, 60), (20, 30), 2)) > 4
    else:
        assert len([*layout.tiles(layout.pixels(fine))]) > 1
        assert len(layout.bands(2, tuple(fine.shape[2:]), 1, layout.band_limit(fine), halo=1)) > 4
    assert_same(step(other, inputs), step(plain, inputs))


@pytest.mark.parametrize("name", ["dilated dense block", "dilated residual layer"])
def test_a_map_that_is_too_large_for_a_band_and_too_low_to_be_cut_for_a_dilated_convolution(name, monkeypatch):
    # Its one band was taken for a part of the image, with rows of zeros, and padded as a whole image besides.
    monkeypatch.setattr(layout, "_BAND_BYTES", {"cpu": 1})
    plain, other = build(name)
    other.recompute = Recompute.UNITS
    inputs = random_inputs(MODULES[name][1])
    assert_same(step(other, inputs), step(plain, inputs))


@pytest.mark.parametrize("level", Recompute)
@pytest.mark.parametrize("name", MODULES)
def test_without_gradients_the_output_is_the_same(name, level):
    plain, other = build(name)
    other.recompute = level
    inputs = random_inputs(MODULES[name][1])
    for guard in (torch.no_grad, torch.inference_mode):
        for mode in (True, False):
            with guard():
                found = other.train(mode)(*inputs)
            torch.testing.assert_close(found, plain.train(mode)(*inputs).detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("level", REBUILDING)
@pytest.mark.parametrize("name", MODULES)
def test_gradients_in_eval_mode_are_the_same(name, level):
    plain, other = (module.eval() for module in build(name))
    other.recompute = level
    inputs = random_inputs(MODULES[name][1])
    assert_same(step(other, inputs), step(plain, inputs))


@pytest.mark.parametrize("level", Recompute)
@pytest.mark.parametrize("name", MODULES)
def test_backward_twice_through_one_graph_doubles_the_gradients_and_counts_the_batch_once(name, level):
    plain, other = build(name)
    other.recompute = level
    inputs = random_inputs(MODULES[name][1])
    expected = step(plain, inputs)
    leaves = [x.requires_grad_() for x in inputs]
    out = other(*leaves)
    out.backward(output_gradient(out), retain_graph=True)
    out.backward(output_gradient(out))
    doubled = {name: 2 * value for name, value in expected.items() if name.startswith("gradient")}
    assert_same(gradients(other, leaves), doubled)
    buffers = dict(other.named_buffers())
    assert_same(buffers, {name: expected[name] for name in buffers})


@pytest.mark.parametrize("level", REBUILDING)
@pytest.mark.parametrize("name", MODULES)
def test_gradients_of_two_batches_accumulate(name, level):
    plain, other = build(name)
    other.recompute = level
    batches = [random_inputs(MODULES[name][1]) for _ in range(2)]
    for module in (plain, other):
        # Both forwards come first: the second must not disturb what the first has kept.
        outputs = [module(*inputs) for inputs in batches]
        for out in outputs:
            out.backward(output_gradient(out))
    assert_same(gradients(other), gradients(plain))
    assert_same(dict(other.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("level", REBUILDING)
@pytest.mark.parametrize("name", MODULES)
def test_a_convolution_that_is_not_trained_takes_no_gradient(name, level):
    plain, other = build(name)
    other.recompute = level
    for module in (plain, other):
        for key, parameter in module.named_parameters():
            parameter.requires_grad_("norm" in key)
    inputs = random_inputs(MODULES[name][1])
    found = step(other, inputs)
    assert_same(found, step(plain, inputs))
    assert not any("conv" in key for key in found)


@pytest.mark.parametrize("level", REBUILDING)
@pytest.mark.parametrize("name", MODULES)
def test_an_input_that_needs_no_gradient_gets_none_and_the_parameters_get_theirs(name, level):
    plain, other = build(name)
    other.recompute = level
    inputs = random_inputs(MODULES[name][1])
    expected = step(plain, inputs)
    out = other(*inputs)
    out.backward(output_gradient(out))
    assert_same(
        gradients(other, inputs),
        {key: value for key, value in expected.items() if "gradient of " in key and "input" not in key},
    )


@pytest.mark.parametrize("level", [Recompute.NORMS, Recompute.UNITS])
@pytest.mark.parametrize("name", ["dense block", "1x1", "3x3", "blend"])
def test_differentiating_twice_is_refused(name, level):
    _, other = build(name)
    other.recompute = level
    (x, *others) = random_inputs(MODULES[name][1])
    out = other(x.requires_grad_(), *others)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("level", [Recompute.NORMS, Recompute.UNITS, Recompute.SEGMENT])
def test_what_backward_needs_cannot_be_overwritten_unnoticed(level):
    # The block's output is also what its backward reads.
    _, block = build("dense block")
    block.recompute = level
    (x,) = random_inputs(MODULES["dense block"][1])
    out = block(x.requires_grad_())
    kept = x if level is Recompute.SEGMENT else out
    with torch.no_grad():
        kept.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        out.sum().backward()


def test_the_plain_block_is_torchvisions():
    ours = DenseBlock(3, in_channels=8, growth_rate=4)
    theirs = _DenseBlock(3, 8, bn_size=4, growth_rate=4, drop_rate=0).double()
    _, ours = twins(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    inputs = random_inputs([(2, 8, 6, 5)])
    assert_same(step(ours, inputs), step(theirs, inputs))


def test_the_plain_transition_is_torchvisions():
    ours, _ = twins(NormReluConv(8, 4, kernel_size=1, pool=True))
    theirs = _Transition(8, 4).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    inputs = random_inputs([(2, 8, 6, 5)])
    assert_same(step(ours, inputs), step(theirs, inputs))


@pytest.mark.parametrize("dilate", [False, True])
def test_the_plain_residual_layer_is_torchvisions(dilate):
    # torchvision dilates a layer in place of its stride; the first bottleneck keeps the dilation of the layer before.
    theirs = ResNet(TorchvisionBottleneck, [1, 2, 1, 1], replace_stride_with_dilation=[dilate, False, False]).layer2
    settings = {"dilation": 2} if dilate else {"stride": 2}
    ours, _ = twins(ResidualLayer(2, in_channels=256, width=128, **settings))
    theirs.double().load_state_dict(ours.state_dict(), strict=True)
    inputs = random_inputs([(2, 256, 5, 4)])
    assert_same(step(ours, inputs), step(theirs, inputs))


def test_joining_is_bilinear_upsampling_and_concatenation():
    coarse, skip = torch.tensor([0.0, 4.0]).view(1, 1, 1, 2), torch.full((1, 1, 1, 4), 7.0)
    # Four samples of the line through 0 at 0.25 and 4 at 0.75, held at the ends.
    expected = torch.tensor([[0.0, 1.0, 3.0, 4.0], [7.0, 7.0, 7.0, 7.0]]).view(1, 2, 1, 4)
    assert torch.equal(join(coarse, skip), expected)
