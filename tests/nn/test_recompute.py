"""Recomputation of named modules: training sees the same network, and each batch counts once."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import set_checkpoint_early_stop
from torchvision.models import DenseNet, resnet18
from twins import assert_same, gradients, random_inputs, step

from memseg.errors import InputError, ProblemsError, UnknownNameError
from memseg.levels import Recompute
from memseg.nn.batch_norm import BatchNorm2d
from memseg.nn.dense_block import DenseBlock
from memseg.nn.norm_relu_conv import NormReluConv
from memseg.nn.recompute import rebuild, recompute
from memseg.profiling.measure import watch_allocator

FLOAT_BYTES = 4
RANDOM_STATE_BYTES = torch.get_rng_state().nbytes
MARKER_BYTES = 2**28


class Attention(nn.Module):
    """A transformer's block, with dropout wherever there can be; takes a keyword and makes a dict."""

    def __init__(self, width=8, heads=2):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout=0.2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.3), nn.Linear(4 * width, width))

    def forward(self, tokens, *, scale=None, names=()):
        normalised = self.norm1(tokens)
        attended, weights = self.attention(normalised, normalised, normalised)
        tokens = tokens + scale["factor"] * attended
        return {"tokens": tokens + self.mlp(self.norm2(tokens)), "weights": [weights], "names": names}


class Transformer(nn.Module):
    """Patches, two blocks, a mean: (N, 3, 8, 8) to (N, 8)."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.ModuleList([Attention(), Attention()])

    def forward(self, images):
        tokens, total = self.patches(images).flatten(2).transpose(1, 2), 0.0
        for index, block in enumerate(self.blocks):
            out = block(tokens, scale={"factor": 0.5}, names=("block", index))
            assert out["names"] == ("block", index)
            tokens, total = out["tokens"], total + out["weights"][0].square().sum((1, 2))
        return tokens.mean(1) + total.unsqueeze(1)


def small_resnet():
    model = resnet18(num_classes=4)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight)
    return model


def pair(model):
    model = model.double()
    return model, copy.deepcopy(model)


RESNET_LEVELS = {
    "blocks": {"layer?.*": "segment"},
    "layers": {"layer?": "segment"},
    "nested": {"": "segment", "layer2": "segment", "layer2.0": "segment", "layer2.0.bn1": "segment"},
    "all but one": {"layer?.?": "segment", "layer3.1": "none"},
}


@pytest.mark.parametrize("levels", RESNET_LEVELS)
def test_a_resnet_trains_as_if_nothing_were_rebuilt(levels):
    plain, rebuilt = pair(small_resnet())
    recompute(rebuilt, RESNET_LEVELS[levels])
    for _ in range(2):
        inputs = random_inputs([(2, 3, 32, 32)])
        assert_same(step(rebuilt, inputs), step(plain, inputs))
    inputs = random_inputs([(2, 3, 32, 32)])
    assert_same(step(rebuilt.eval(), inputs), step(plain.eval(), inputs))


@pytest.mark.parametrize(
    "levels", [{"blocks.*": "segment"}, {"": "segment", "blocks.0": "segment", "*.?.mlp": "segment"}]
)
def test_dropout_keywords_and_structures_of_tensors_survive(levels):
    plain, rebuilt = pair(Transformer())
    recompute(rebuilt, levels)
    inputs = random_inputs([(2, 3, 8, 8)])
    found, expected = [], []
    for model, result in ((rebuilt, found), (plain, expected)):
        torch.manual_seed(1)
        result += [step(model, inputs), step(model, inputs), {"next number": torch.rand(1)}]
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_a_list_that_the_caller_changes_afterwards_is_rebuilt_as_it_was():
    # torchvision's dense layers all read one list, to which the block appends.
    plain, rebuilt = pair(DenseNet(4, (2, 3, 1, 1), 8, bn_size=2, num_classes=3))
    recompute(rebuilt, {"features.denseblock?.denselayer?": "segment"})
    inputs = random_inputs([(2, 3, 64, 64)])
    assert_same(step(rebuilt, inputs), step(plain, inputs))


class Sum(nn.Module):
    def forward(self, tensors):
        return torch.stack([tensor.square() for tensor in tensors]).sum(0)


def test_a_tensor_in_a_list_cannot_be_overwritten_unnoticed():
    model = nn.ModuleDict({"sum": Sum()})
    recompute(model, {"sum": "segment"})
    tensors = [torch.randn(3, requires_grad=True) * 1 for _ in range(2)]
    out = model["sum"](tensors)
    with torch.no_grad():
        tensors[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


NORMS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), (4, 3, 5)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), (4, 3, 5, 5)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(3), (4, 3, 2, 2, 2)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(3), (4, 3, 5)),
    "a cumulative average": (lambda: nn.BatchNorm2d(3, momentum=None), (4, 3, 5, 5)),
    "no affine": (lambda: nn.BatchNorm2d(3, affine=False), (4, 3, 5, 5)),
    "no running statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 5, 5)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, track_running_stats=True, affine=True), (4, 3, 5, 5)),
    "memseg's": (lambda: BatchNorm2d(3), (4, 3, 5, 5)),
}


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_every_norm_counts_a_batch_once(name, early_stop):
    build, shape = NORMS[name]
    # What follows the norm saves nothing, so that the second run stops in the midst of it unless told otherwise.
    plain, rebuilt = pair(nn.Sequential(nn.Sequential(build(), nn.Tanh(), build(), nn.Flatten()), nn.Tanh()))
    recompute(rebuilt, {"0": "segment"})
    buffers = dict(rebuilt.named_buffers())
    with set_checkpoint_early_stop(early_stop):
        for _ in range(3):
            inputs = [2 + 3 * x for x in random_inputs([shape])]
            assert_same(step(rebuilt, inputs), step(plain, inputs))
    assert all(rebuilt.get_buffer(name) is buffer for name, buffer in buffers.items())


def test_backward_twice_through_one_graph_doubles_the_gradients_and_counts_the_batch_once():
    plain, rebuilt = pair(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)))
    recompute(rebuilt, {"": "segment"})
    (x,) = random_inputs([(2, 3, 4, 4)])
    for model in (plain, rebuilt):
        out = model(x).square().sum()
        out.backward(retain_graph=True)
        out.backward()
    assert_same(gradients(rebuilt), gradients(plain))
    assert_same(dict(rebuilt.named_buffers()), dict(plain.named_buffers()))


class Fails(nn.Module):
    """Raises in its second run."""

    runs = 0

    def forward(self, x):
        self.runs += 1
        if self.runs == 2:
            raise KeyError("second run")
        return x.sin()


def test_a_second_run_that_fails_leaves_the_statistics_alone():
    model = nn.Sequential(nn.BatchNorm1d(3), Fails())
    recompute(model, {"": "segment"})
    buffers = dict(model.named_buffers())
    out = model(torch.randn(4, 3))
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    with pytest.raises(KeyError, match="second run"):
        out.sum().backward()
    assert all(model.get_buffer(name) is buffer for name, buffer in buffers.items())
    assert_same(dict(model.named_buffers()), before)
    model(torch.randn(4, 3))
    assert model[0].num_batches_tracked == 2


class Meets(nn.Module):
    """In its second run waits for the other thread, and lets the first thread leave before the second."""

    def __init__(self):
        super().__init__()
        self.both, self.first_left = threading.Barrier(2, timeout=300), threading.Event()
        self.forwards = 0

    def forward(self, x):
        self.forwards += 1
        if self.forwards > 2:
            self.both.wait()
            if threading.current_thread().name == "second":
                assert self.first_left.wait(30)
        return x.sin()


def test_second_runs_that_overlap_in_two_threads_leave_the_statistics_alone():
    # The one that ends first gives the norm its buffers back only when nobody writes to the copies any more.
    model = nn.Sequential(nn.BatchNorm1d(3), Meets())
    recompute(model, {"": "segment"})
    buffers = dict(model.named_buffers())
    outs = {name: model(torch.randn(4, 3)).sum() for name in ("first", "second")}
    before = {name: buffer.clone() for name, buffer in buffers.items()}

    def backward(name):
        outs[name].backward()
        if name == "first":
            model[1].first_left.set()

    threads = [threading.Thread(target=backward, args=(name,), name=name) for name in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model[1].forwards == 4
    assert all(model.get_buffer(name) is buffer for name, buffer in buffers.items())
    assert_same(dict(model.named_buffers()), before)


def test_a_module_that_overwrites_its_input_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    recompute(model, {"1": "segment"})
    with pytest.raises(InputError, match="must leave its inputs as they are, but ReLU overwrites one in place; use"):
        model(torch.randn(2, 3))
    recompute(model, {"1": "none", "": "segment"})
    model(torch.randn(2, 3)).sum().backward()


class Watches(nn.Module):
    """Notes the state that its forwards see."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_grad_enabled()))
        return x.sin()


def test_the_second_run_sees_the_autocast_of_the_first():
    model = Watches()
    recompute(model, {"": "segment"})
    with torch.autocast("cpu", torch.float16):
        out = model(torch.randn(2, requires_grad=True))
    out.sum().backward()
    assert model.seen == [(True, torch.float16, True)] * 2


def test_without_gradients_a_module_runs_once_and_plainly():
    model = nn.Sequential(Watches(), nn.BatchNorm1d(3))
    recompute(model, {"": "segment", "0": "segment"})
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            assert not model(torch.randn(4, 3)).requires_grad
    assert [grad for *_, grad in model[0].seen] == [False, False]
    assert model[1].num_batches_tracked == 2


def test_a_model_that_is_gone_before_backward_is_rebuilt_all_the_same():
    x = torch.randn(2, 3, requires_grad=True)

    def forward():
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        recompute(model, {"": "segment"})
        return model(x)

    forward().sum().backward()
    assert x.grad.abs().sum() > 0


def kept_bytes(model, x):
    """Bytes still allocated when forward is over, its output among them."""
    with watch_allocator() as peak:
        out = model(x)
        # Far larger than anything before it, so that the peak is here. It is never touched: no memory is taken.
        torch.empty(MARKER_BYTES, dtype=torch.uint8)
    assert out.requires_grad
    return peak.peak_bytes - MARKER_BYTES


def test_a_rebuilt_module_keeps_its_output_and_the_random_state():
    # Plainly, what the norm reads is kept too, and its mean and deviation of 4 channels.
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Tanh())
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    pixels = 2 * 8 * 8
    kept_bytes(model, x)
    assert kept_bytes(model, x) == FLOAT_BYTES * (2 * 4 * pixels + 2 * 4)
    recompute(model, {"": "segment"})
    assert kept_bytes(model, x) == FLOAT_BYTES * 4 * pixels + RANDOM_STATE_BYTES
    recompute(model, {"": "none"})
    assert kept_bytes(model, x) == FLOAT_BYTES * (2 * 4 * pixels + 2 * 4)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_rebuilt_by_its_own_forward(duplicate):
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), Watches()), nn.BatchNorm1d(3))
    recompute(model, {"0": "segment"})
    twin = duplicate(model)
    del model[0][1]  # The copy would miss it, did it run the original's forward.
    with torch.no_grad():
        model[0][0].weight.zero_()
    twin(torch.randn(4, 3)).square().sum().backward()
    assert len(twin[0][1].seen) == 2
    assert twin[0][0].weight.grad.abs().sum() > 0
    assert model[0][0].weight.grad is None
    recompute(twin, "none")
    assert "forward" not in twin[0].__dict__


def test_a_model_keeps_its_classes_names_and_hooks_and_is_itself_again_afterwards():
    model, fired = small_resnet(), []
    before, attributes = model.state_dict(), [set(module.__dict__) for module in model.modules()]
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    model.layer1.register_forward_hook(lambda *_: fired.append("forward"))
    model.layer1.register_full_backward_hook(lambda *_: fired.append("backward"))
    recompute(model, {"layer?": "segment"})
    recompute(model, {"layer?": "segment"})
    assert [(name, type(module)) for name, module in model.named_modules()] == kinds
    assert list(model.state_dict()) == list(before)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert fired == ["forward", "backward"]
    recompute(model, {"layer?": "none"})
    assert [set(module.__dict__) for module in model.modules()] == attributes


def test_a_forward_that_was_replaced_before_is_rebuilt_and_comes_back():
    model, calls = nn.Linear(3, 3), []
    plain = model.forward

    def replaced(x):
        calls.append(x)
        return plain(x).tanh()

    model.forward = replaced
    recompute(model, {"": "segment"})
    model(torch.randn(2, 3)).sum().backward()
    assert len(calls) == 2
    recompute(model, "none")
    assert model.forward is replaced


def test_a_rebuilt_model_dies_with_its_last_reference():
    model = nn.Sequential(nn.Linear(3, 3))
    recompute(model, {"": "segment", "0": "segment"})
    model(torch.randn(2, 3)).sum().backward()
    died = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert died() is None
    finally:
        gc.enable()


def test_modules_of_memseg_are_given_their_level():
    model = nn.ModuleDict(
        {
            "block": DenseBlock(2, in_channels=4, growth_rate=2),
            "unit": NormReluConv(4, 2, kernel_size=1),
            "head": nn.Conv2d(2, 2, 1),
        }
    )
    recompute(model, {"block": "norms", "unit": Recompute.UNITS})
    assert (model["block"].recompute, model["unit"].recompute) == (Recompute.NORMS, Recompute.UNITS)
    recompute(model, "segment")
    assert (model["block"].recompute, model["unit"].recompute) == (Recompute.SEGMENT, Recompute.SEGMENT)
    assert "forward" not in model["head"].__dict__
    recompute(model, {"head": "segment"})
    recompute(model, Recompute.NONE)
    assert (model["block"].recompute, model["unit"].recompute) == (Recompute.NONE, Recompute.NONE)
    assert "forward" not in model["head"].__dict__


def rebuilt_names(model):
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ({"*": "segment"}, ["0", "1"]),
        ({"1.*": "segment"}, ["1.0", "1.1"]),
        ({"*.1": "segment"}, ["1.1"]),
        ({"1.[!0]": "segment"}, ["1.1"]),
        ({"": "segment"}, [""]),
        # The last that matches holds.
        ({"1.*": "segment", "1.0": "none"}, ["1.1"]),
        ({"1.0": "none", "1.*": "segment"}, ["1.0", "1.1"]),
    ],
)
def test_a_pattern_matches_between_dots_and_the_last_one_holds(levels, expected):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
    recompute(model, levels)
    assert rebuilt_names(model) == expected


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # Of Python 3.14 on, or of old age
def test_what_cannot_be_is_refused_all_at_once_and_changes_nothing():
    model = nn.ModuleDict({"list": nn.ModuleList([nn.Linear(2, 2)]), "scripted": torch.jit.script(nn.Tanh())})
    with pytest.raises(ProblemsError) as caught:
        recompute(model, {"list.0": "segment", "list": "segment", "scripted": "segment", "": "norms"})
    assert str(caught.value).splitlines() == [
        "recompute: 3 problems",
        "  list: ModuleList has no forward to run again; name its members",
        "  scripted: RecursiveScriptModule is compiled by TorchScript, and its forward cannot be run from outside; "
        "script it later",
        "  the model itself: ModuleDict takes none or segment, got norms",
    ]
    assert rebuilt_names(model["list"]) == []


def test_names_and_levels_that_do_not_exist_are_refused():
    model = small_resnet()
    with pytest.raises(UnknownNameError, match=r"unknown module 'layer1\.7'; did you mean layer1\.1\?"):
        recompute(model, {"layer1.7": "segment"})
    with pytest.raises(UnknownNameError, match=r"unknown module 'zzz\.\*'; known: avgpool, bn1, conv1, fc, layer1"):
        recompute(model, {"zzz.*": "segment"})
    with pytest.raises(UnknownNameError, match=r"unknown recompute level 'segments'; did you mean segment\?"):
        recompute(model, {"layer1": "segments"})
    with pytest.raises(InputError, match="ResNet has none; name modules of its own"):
        recompute(model, "units")
    assert rebuilt_names(model) == []


def test_a_function_is_rebuilt_with_its_owners_statistics_left_alone():
    norm, x = nn.BatchNorm1d(3), torch.randn(4, 3, requires_grad=True)
    first, second = rebuild(lambda x: (norm(x).sin(), x.cos()), x, owner=norm)
    (first.sum() + second.sum()).backward()
    assert norm.num_batches_tracked == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own look
def test_a_compiled_model_leaves_what_is_rebuilt_to_eager_execution():
    plain, rebuilt = pair(nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.Tanh()))
    recompute(rebuilt, {"1": "segment"})
    inputs = random_inputs([(4, 3)])
    compiled = torch.compile(rebuilt, backend="eager")
    found = step(compiled, inputs)
    assert_same({name.replace("_orig_mod.", ""): value for name, value in found.items()}, step(plain, inputs))


def test_parameters_and_buffers_that_are_lent_for_one_call_are_there_when_it_is_rebuilt():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1)).double().eval()
    rebuilt = copy.deepcopy(model)
    recompute(rebuilt, {"": "segment"})
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    lent = {key: torch.rand_like(value).requires_grad_() for key, value in model.named_parameters()}
    buffers = {key: torch.rand_like(value) for key, value in model.named_buffers() if value.is_floating_point()}
    own = dict(rebuilt.state_dict(keep_vars=True))
    expected, found = (
        torch.autograd.grad(functional_call(one, lent | buffers, (x,)).square().sum(), list(lent.values()))
        for one in (model, rebuilt)
    )
    for name, one, other in zip(lent, found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0, msg=name)
    assert all(value is own[key] for key, value in rebuilt.state_dict(keep_vars=True).items())


def test_weights_that_change_before_backward_do_not_go_unnoticed():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    recompute(model, {"": "segment"})
    out = model(torch.ones(4, 2))
    with torch.no_grad():
        model[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        out.sum().backward()
