"""Any module can be profiled, whatever it is made of, and none is changed by it."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memseg.errors import InputError, UnknownNameError
from memseg.levels import Precision
from memseg.profiling import Category, UntraceableError, foreign_job, measure_job, named_optimizer, trace_job

SGD = named_optimizer("sgd")


class Net(nn.Module):
    """(N, 16) to (N, 4)."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.norm = nn.BatchNorm1d(32)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(32, 4)

    def forward(self, images):
        return self.last(self.drop(torch.tanh(self.norm(self.first(images)))))


def images(device="cpu"):
    return torch.ones(64, 16, device=device)


def profile(model, inputs=None, target=None, *, real=False, device="cpu", **job):
    inputs = images() if inputs is None else inputs
    make = partial(foreign_job, model, inputs, target, **({"optimizer": SGD, "real": real} | job))
    return trace_job(make, device=device, real=real)


def figures(found):
    """All that is told of a step but the names of what ran."""
    return (
        found.inputs,
        found.names,
        [(one.size_bytes, one.born, one.died, one.layer, one.category) for one in found.timeline.allocations],
        [(one.size_bytes, one.born, one.died, one.layer, one.category) for one in found.first_timeline.allocations],
    )


def parameter_bytes(found):
    return found.timeline.by_category()[Category.PARAMETER]


# What a model may be.


def made(kind):
    if kind == "factory":
        return Net
    with {"real": torch.device("cpu"), "meta": torch.device("meta"), "fake": FakeTensorMode()}[kind]:
        return Net()


@pytest.mark.parametrize("batch", ["cpu", "meta", "fake"])
@pytest.mark.parametrize("kind", ["real", "meta", "fake", "factory"])
def test_models_and_batches_with_and_without_values_give_the_same_figures(kind, batch):
    with FakeTensorMode() if batch == "fake" else torch.device(batch):
        inputs = torch.ones(64, 16)
    assert figures(profile(made(kind), inputs)) == figures(profile(Net()))


def test_real_tensors_are_traced_to_the_same_peak():
    fake, real = profile(Net), profile(Net, real=True)
    assert real.peak_allocated_bytes == fake.peak_allocated_bytes
    assert [one.layer for one in real.timeline.allocations] == [one.layer for one in fake.timeline.allocations]


@pytest.mark.parametrize("real", [False, True])
def test_the_model_stays_as_it_was(real):
    model = Net().eval()
    model.first.weight.grad = torch.ones(32, 16)
    seen = []
    model.first.register_forward_hook(lambda *_: seen.append("hook"))
    hooks = dict(model.first._forward_hooks)
    before = copy.deepcopy(model.state_dict())
    profile(model, real=real, optimizer=named_optimizer("adam"))
    assert not model.training
    assert all(not part.training for part in model.modules())
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, before[name]), name
        assert type(tensor) in (nn.Parameter, torch.Tensor), name
    assert torch.equal(model.first.weight.grad, torch.ones(32, 16))
    assert model.last.weight.grad is None
    assert model.first._forward_hooks == hooks
    # A model in evaluation is profiled as it trains: dropout keeps something.
    assert any(one.layer == "drop" for one in profile(model).timeline.allocations)


def test_hooks_of_the_model_run_on_its_twin():
    model = Net()
    model.first.register_forward_hook(lambda module, args, output: torch.cat([output, output]))
    plain, hooked = profile(Net), profile(model)
    assert hooked.peak_allocated_bytes > plain.peak_allocated_bytes


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(16, 16, bias=False)
        self.decode = nn.Linear(16, 16, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, images):
        return self.decode(torch.tanh(self.encode(images)))


@pytest.mark.parametrize("model", [Tied, Tied()])
@pytest.mark.parametrize("real", [False, True])
def test_tied_parameters_count_once(model, real):
    found = profile(model, real=real, optimizer=named_optimizer("momentum"))
    assert parameter_bytes(found) == 16 * 16 * 4
    at_end = found.timeline.by_category(found.timeline.instants - 1)
    assert at_end[Category.GRADIENT] == at_end[Category.OPTIMIZER_STATE] == 16 * 16 * 4


class Scaled(nn.Module):
    """With a tensor that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.scale = torch.ones(16)
        self.first = nn.Linear(16, 4)

    def forward(self, images):
        return self.first(images * self.scale)


@pytest.mark.parametrize("model", [Scaled, Scaled()])
def test_tensors_held_as_attributes_do_not_stand_in_the_way(model):
    assert parameter_bytes(profile(model)) == (16 * 4 + 4) * 4


class DropRates(nn.Module):
    """Reads values while it is made, as many networks with stochastic depth do."""

    def __init__(self):
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 0.5, 3)]
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Dropout(rate)) for rate in self.rates)

    def forward(self, images):
        for layer in self.layers:
            images = layer(images)
        return images


def test_a_factory_may_read_values():
    assert figures(profile(DropRates)) == figures(profile(DropRates()))


CONVERTED = {
    "channels-last": lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
    "double": lambda: nn.Conv2d(3, 4, 3).double(),
    "bfloat16": lambda: nn.Conv2d(3, 4, 3).to(torch.bfloat16),
    "to the cpu": lambda: nn.Conv2d(3, 4, 3).to("cpu"),
    "to meta": lambda: nn.Conv2d(3, 4, 3).to("meta"),
}


@pytest.mark.parametrize("kind", CONVERTED)
def test_a_factory_may_convert_what_it_made(kind):
    batch = torch.ones(2, 3, 8, 8, dtype={"double": torch.double, "bfloat16": torch.bfloat16}.get(kind, torch.float32))
    assert figures(profile(CONVERTED[kind], batch)) == figures(profile(CONVERTED[kind](), batch))


def encoder():
    """torch copies the layer that it is given."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def test_a_factory_may_copy_layers():
    batch = torch.ones(2, 8, 16)
    assert figures(profile(encoder, batch)) == figures(profile(encoder(), batch))


@pytest.mark.parametrize("model", [nn.LazyLinear(3), partial(nn.LazyLinear, 3)], ids=["module", "factory"])
@pytest.mark.parametrize("real", [False, True])
def test_a_lazy_module_is_refused(model, real):
    with pytest.raises(InputError, match=r"lazy|LazyModule"):
        profile(model, real=real)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.ReLU(), "ReLU has no parameter that requires a gradient"),
        (nn.Linear(16, 4).requires_grad_(False), "Linear has no parameter that requires a gradient"),
        (lambda: 3, "must be a torch.nn.Module or a function that makes one, got int"),
        (3, "must be a torch.nn.Module or a function that makes one, got int"),
    ],
    ids=["no parameters", "frozen", "makes a number", "number"],
)
def test_what_is_no_model_to_train_is_refused(model, message):
    with pytest.raises(InputError, match=message):
        profile(model)


def test_a_factory_that_fails_is_told_with_its_error():
    def build():
        raise FileNotFoundError("no weights at hand")

    with pytest.raises(InputError, match="no weights at hand"):
        profile(build)


# What it may be called with, and what it may return.


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(16, 4), nn.Linear(8, 4)

    def forward(self, left, right=None, *, scale=1.0):
        out = self.left(left) if right is None else self.left(left) + self.right(right)
        return out * scale


@pytest.mark.parametrize(
    ("inputs", "described"),
    [
        (torch.ones(5, 16), ("float32 5x16",)),
        ((torch.ones(5, 16), torch.ones(5, 8)), ("float32 5x16", "float32 5x8")),
        ({"left": torch.ones(5, 16), "right": torch.ones(5, 8), "scale": 2.0}, ("float32 5x16", "float32 5x8")),
    ],
    ids=["tensor", "tuple", "dict"],
)
def test_the_batch_is_a_tensor_a_tuple_or_a_dict(inputs, described):
    found = profile(Pair, inputs)
    assert found.inputs == described
    sizes = {"float32 5x16": 5 * 16 * 4, "float32 5x8": 5 * 8 * 4}
    assert found.timeline.by_category()[Category.INPUT] == sum(sizes[one] for one in described)


def test_a_target_may_be_several_tensors():
    target = torch.ones(64, 4), torch.ones(64, dtype=torch.bool)
    found = profile(Net, target=target, loss=lambda output, wanted, mask: ((output - wanted) * mask[:, None]).sum())
    assert found.inputs == ("float32 64x16", "float32 64x4", "bool 64")


class Many(nn.Module):
    """A structure of outputs, some of which nothing can be learnt from."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 4)

    def forward(self, images):
        logits = self.first(images)
        return {"out": logits, "aux": (logits * 2, None, 3), "counts": torch.ones(5)}


def test_the_mean_is_of_every_output_that_parameters_decide():
    job = foreign_job(Many(), images(), loss="mean", optimizer=None, real=True)
    out = job.compute()
    assert job.loss(out).item() == pytest.approx(3 * out["out"].mean().item())


def test_cross_entropy_is_of_every_output_and_makes_up_a_target_where_none_is_given():
    target = torch.zeros(64, dtype=torch.long)
    jobs = [
        foreign_job(Many(), images(), given, loss="cross-entropy", optimizer=None, real=True)
        for given in (None, target)
    ]
    out = jobs[0].compute()
    expected = F.cross_entropy(out["out"], target) + F.cross_entropy(out["aux"][0], target)
    for job in jobs:
        assert job.loss(out).item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss(weight=torch.ones(4)), F.cross_entropy, "cross-entropy"],
    ids=["module", "function", "name"],
)
@pytest.mark.parametrize("real", [False, True])
def test_a_loss_is_a_module_a_function_or_a_name(loss, real):
    found = profile(Net, target=torch.zeros(64, dtype=torch.long), loss=loss, real=real)
    # Log-probabilities.
    kept = found.timeline.alive(found.timeline.backward_start - 1)
    assert any((one.layer, one.shape, one.category) == ("loss", (64, 4), Category.SAVED) for one in kept)


def test_a_loss_may_hold_a_tensor_of_its_own():
    loss = partial(F.cross_entropy, weight=torch.ones(4))
    assert profile(Net, target=torch.zeros(64, dtype=torch.long), loss=loss).peak_allocated_bytes > 0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"loss": "crossentropy"}, UnknownNameError, "unknown loss 'crossentropy'; did you mean cross-entropy"),
        ({"loss": lambda output: output.detach().sum()}, InputError, "does not require grad"),
        ({"loss": lambda output: output}, InputError, "scalar"),
        ({"loss": lambda output: output.nothing}, InputError, "loss fails with AttributeError"),
        ({"model": nn.Sequential(nn.Linear(16, 1), nn.Flatten(0)), "loss": "cross-entropy"}, InputError, r"\(N, K"),
    ],
    ids=["unknown", "detached", "not a scalar", "fails", "no classes"],
)
def test_a_loss_that_nothing_can_be_learnt_from_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        profile(**{"model": Net} | settings)


def test_a_model_whose_outputs_are_cut_off_is_refused():
    class Detached(Net):
        def forward(self, images):
            return super().forward(images).detach()

    for loss in ("mean", "cross-entropy"):
        with pytest.raises(InputError, match="no tensor that depends on its parameters; give a loss"):
            profile(Detached, loss=loss)


def test_the_output_lives_through_backward_where_it_has_a_name():
    kept, dropped = (profile(Net, keep_output=keep).timeline for keep in (True, False))
    output = 64 * 4 * 4
    assert sum(one.size_bytes for one in kept.alive(kept.backward_start)) - output == sum(
        one.size_bytes for one in dropped.alive(dropped.backward_start)
    )


# Precisions.


@pytest.mark.parametrize("model", [Net, Net()], ids=["factory", "module"])
@pytest.mark.parametrize("real", [False, True])
def test_float64_doubles_parameters_and_the_batch(model, real):
    single, double = (
        profile(model, real=real, precision=precision) for precision in (Precision.FLOAT32, Precision.FLOAT64)
    )
    # num_batches_tracked, an int64, stays.
    assert parameter_bytes(double) - 8 == 2 * (parameter_bytes(single) - 8)
    assert double.inputs == ("float64 64x16",)


def test_under_autocast_parameters_stay_and_their_copies_are_told():
    found = profile(Net, precision=Precision.BFLOAT16)
    assert parameter_bytes(found) == parameter_bytes(profile(Net))
    copies = {one.size_bytes for one in found.timeline.allocations if one.category is Category.AUTOCAST}
    assert 16 * 32 * 2 in copies


# What cannot be traced.


class Pick(nn.Module):
    """Does something that depends on values."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, maps):
        if self.kind == "nonzero":
            return maps[torch.nonzero(maps[:, 0] * 0 + 1)[:, 0]]
        if self.kind == "boolean mask":
            return maps[maps == maps]
        if self.kind == "item":
            return maps * (maps.max().item() * 0 + 1)
        if self.kind == "if":
            return maps * 1 if maps.sum() < 1e9 else maps
        if self.kind == "unique":
            return maps * len(torch.unique(maps.detach()))
        assert self.kind == "numpy"
        return maps * float(maps.detach().numpy().sum())


class Picking(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.first, self.pick = nn.Linear(16, 8), Pick(kind)

    def forward(self, images):
        return self.pick(torch.tanh(self.first(images)))


KINDS = ["nonzero", "boolean mask", "item", "if", "unique", "numpy"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_needs_values_is_told_with_its_layer_and_a_way_round(kind):
    with pytest.raises(UntraceableError, match=r"Picking: layer pick .*real=True.*--real"):
        profile(partial(Picking, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_on_real_tensors_it_is_traced(kind):
    assert profile(partial(Picking, kind), real=True).inputs == ("float32 64x16",)


@pytest.mark.parametrize("kind", ["item", "if", "numpy"])
def test_what_real_tensors_tell_is_what_real_steps_take(kind):
    def make():
        return foreign_job(partial(Picking, kind), torch.ones(64, 16), optimizer=SGD, real=True)

    # Apart from single numbers, which kernels wrap into tensors.
    assert abs(trace_job(make, real=True).peak_allocated_bytes - measure_job(make)) <= 16


class RefusingError(Exception):
    """An error of a user's own."""


class Failing(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, maps):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("of the wrong kind"),
        KeyError("bias"),
        ZeroDivisionError("by zero"),
        RefusingError("no"),
        OSError("no file"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_the_model_is_told_with_the_layer_that_raised_it(error):
    model = nn.Sequential(nn.Linear(16, 8), Failing(error))
    with pytest.raises(
        InputError, match=f"Sequential does not run on float32 64x16: layer 1 fails with {type(error).__name__}"
    ):
        profile(model)


def test_shapes_that_do_not_match_are_told_with_their_layer_and_nothing_is_logged(caplog):
    model = nn.Sequential(nn.Linear(16, 8), nn.Sequential(nn.Tanh(), nn.Linear(9, 4)))
    with pytest.raises(InputError, match=r"on float32 64x16: layer 1\.1 fails with RuntimeError: .*8\b.*9\b"):
        profile(model)
    assert caplog.text == ""


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_convolutions_of_every_dimension_are_profiled(dims, device):
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    model = nn.Sequential(convolution(3, 4, 3), transposed(4, 2, 2, stride=2))
    found = profile(model, torch.ones(2, 3, *[6] * dims), device=device)
    shapes = {one.shape for one in found.timeline.allocations if one.phase == "forward"}
    assert {(2, 4, *[4] * dims), (2, 2, *[8] * dims)} <= shapes
