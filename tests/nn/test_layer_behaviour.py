"""The layers do what any layer of torch does; what they cannot do, they say."""

import copy
import pickle
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.densenet import _DenseBlock
from twins import MODULES, assert_same, build, gradients, output_gradient, random_inputs, step, twins

from memseg.levels import NormMode, Recompute
from memseg.models.context import DilatedContext
from memseg.models.stem import Stem
from memseg.nn import BatchNorm2d, DenseBlock, NormReluConv
from memseg.profiling.measure import watch_allocator

LEVELS = [(name, level) for name in MODULES for level in build(name)[1].levels]
"""Each module's own levels: the others do as one of these."""
REBUILDING = [(name, level) for name, level in LEVELS if level is not Recompute.NONE]
UNITS = ["dense block", "1x1", "3x3", "transition", "blend"]
"""Modules of `memseg.nn` itself."""


def at(name, level, norm=NormMode.BATCH):
    """(plain, other at a level), alike."""
    torch.manual_seed(0)
    plain, other = build(name, norm)
    other.recompute = level
    return plain, other


def inputs_of(name):
    return random_inputs(MODULES[name][1])


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


# Copies and state


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_a_copy_is_its_own_module_of_the_same_level(name, level, duplicate):
    _, module = at(name, level)
    inputs = inputs_of(name)
    out = module(*inputs)  # A graph that is waiting is no part of the module.
    twin = duplicate(module)
    assert twin.recompute == level
    out.sum().backward()
    expected = step(module, inputs)
    assert not any(parameter.grad is not None for parameter in twin.parameters())
    assert_same(step(twin, inputs), expected)
    for key, value in twin.state_dict().items():
        assert value.data_ptr() != module.state_dict()[key].data_ptr(), key


@pytest.mark.parametrize(("name", "level"), REBUILDING)
def test_a_state_dict_is_that_of_the_plain_module(name, level):
    plain, other = at(name, level)
    inputs = inputs_of(name)
    step(other, inputs)
    fresh = MODULES[name][0](NormMode.BATCH).double()
    assert list(fresh.state_dict()) == list(plain.state_dict())
    fresh.load_state_dict(other.state_dict(), strict=True)
    assert_same(step(fresh, inputs), step(other, inputs))


@pytest.mark.parametrize("level", Recompute)
def test_a_state_dict_goes_to_torchvisions_dense_block_and_comes_back(level):
    torch.manual_seed(0)
    _, ours = twins(DenseBlock(3, in_channels=8, growth_rate=4))
    ours.recompute = level
    theirs = _DenseBlock(3, 8, bn_size=4, growth_rate=4, drop_rate=0).double()
    inputs = random_inputs([(2, 8, 6, 5)])
    step(ours, inputs)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    expected = step(theirs, inputs)
    assert_same(step(ours, inputs), expected)
    back = DenseBlock(3, in_channels=8, growth_rate=4, recompute=level).double()
    back.load_state_dict(theirs.state_dict(), strict=True)
    assert_same(step(back, inputs), step(theirs, inputs))


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_a_module_in_channels_last_memory_computes_the_same(name, level):
    plain, other = at(name, level)
    inputs = inputs_of(name)
    other.to(memory_format=torch.channels_last)
    assert_same(step(other, [channels_last(x) for x in inputs]), step(plain, inputs))


# Parts of a backward


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_a_gradient_of_the_input_alone_leaves_the_parameters_without_one(name, level):
    plain, other = at(name, level)
    inputs = inputs_of(name)
    expected = step(plain, inputs)
    leaves = [x.requires_grad_() for x in inputs]
    out = other(*leaves)
    found = torch.autograd.grad(out, leaves, output_gradient(out))
    named = {f"gradient of input {index}": grad for index, grad in enumerate(found)}
    assert_same(named, {key: expected[key] for key in named})
    assert all(parameter.grad is None for parameter in other.parameters())


@pytest.mark.parametrize(("name", "level"), REBUILDING)
def test_each_parameter_may_be_the_only_one_that_is_trained(name, level):
    plain, other = at(name, level)
    inputs = inputs_of(name)
    for training in (False, True):
        expected = step(plain.train(training), inputs)
        other.train(training)
        for trained, _ in plain.named_parameters():
            for key, parameter in other.named_parameters():
                parameter.requires_grad_(key == trained)
            out = other(*(x.detach() for x in inputs))
            other.zero_grad()
            out.backward(output_gradient(out))
            key = f"gradient of {trained}"
            assert_same(gradients(other), {key: expected[key]})


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_with_nothing_to_train_the_output_needs_no_gradient(name, level):
    plain, other = at(name, level)
    inputs = inputs_of(name)
    out = other.requires_grad_(False)(*inputs)
    assert not out.requires_grad
    assert_same({"output": out}, {"output": plain(*inputs).detach()})


@pytest.mark.parametrize("level", Recompute)
@pytest.mark.parametrize(
    "in_eval_mode",
    [
        ["denselayer1.norm1"],
        ["denselayer2.norm1", "denselayer3.norm1"],
        ["denselayer1.norm1", "denselayer2.norm1", "denselayer3.norm1"],
        ["denselayer1.norm2", "denselayer3.norm1"],
        ["denselayer2"],
    ],
    ids=", ".join,
)
def test_norms_that_are_put_into_eval_mode_by_hand_use_their_running_statistics(in_eval_mode, level):
    torch.manual_seed(0)
    blocks = twins(DenseBlock(3, in_channels=5, growth_rate=4, bn_size=2, drop_rate=0.5))
    blocks[1].recompute = level
    x = channels_last(torch.randn(2, 5, 6, 7, dtype=torch.float64))
    results = []
    for block in blocks:
        for name in in_eval_mode:
            block.get_submodule(name).eval()
        torch.manual_seed(1)
        results.append(step(block, [x]))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("way", ["constant gradient", "other gradient"])
@pytest.mark.parametrize(("name", "level"), REBUILDING)
def test_differentiating_twice_is_refused(name, level, way):
    # The gradient of `sum` needs no gradient itself: torch's once_differentiable would let this one pass as a constant.
    _, other = at(name, level)
    x, *others = inputs_of(name)
    out = other(x.requires_grad_(), *others)
    loss = out.sum() if way == "constant gradient" else out.square().sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    penalty = grad.square().sum()
    with pytest.raises(RuntimeError, match="differentiate twice a function of memseg's"):
        penalty.backward()


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_weights_that_change_between_forward_and_backward_do_not_go_unnoticed(name, level):
    _, module = at(name, level)
    out = module(*(x.requires_grad_() for x in inputs_of(name)))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        out.sum().backward()


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_parameters_that_are_lent_for_one_call_get_their_gradients(name, level):
    plain, other = at(name, level)
    inputs = inputs_of(name)
    lent = {key: torch.randn_like(value).requires_grad_() for key, value in other.named_parameters()}
    results = []
    for module in (plain, other):
        out = functional_call(module, lent, tuple(inputs))
        found = torch.autograd.grad(out, list(lent.values()), output_gradient(out))
        results.append({"output": out.detach(), **dict(zip(lent, found, strict=True))})
    assert_same(results[1], results[0])
    assert all(parameter.grad is None for parameter in other.parameters())


@pytest.mark.parametrize(("name", "level"), REBUILDING)
def test_hooks_may_lay_out_what_is_kept_as_they_like(name, level):
    plain, other = at(name, level)
    inputs = inputs_of(name)
    expected = step(plain, inputs)
    leaves = [x.requires_grad_() for x in inputs]
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: x.detach().clone(memory_format=torch.contiguous_format), lambda x: x
    ):
        out = other(*leaves)
    out.backward(output_gradient(out))
    found = gradients(other, leaves)
    assert_same(found, {key: expected[key] for key in found})


# Inputs


@pytest.mark.parametrize(("name", "level"), REBUILDING)
@pytest.mark.parametrize("channels", [1, 7])
def test_another_number_of_channels_is_refused(name, level, channels):
    # One channel could be broadcast, and something would come out.
    _, other = at(name, level)
    *others, (batch, _, *size) = MODULES[name][1]
    with pytest.raises(RuntimeError, match=r"input must be \(N, C, H, W\) with \d+ channels, got|expected input"):
        other(*random_inputs([*others, (batch, channels, *size)]))


@pytest.mark.parametrize("name", ["dense block", "1x1", "3x3", "transition"])
def test_an_image_without_a_batch_is_refused(name):
    _, other = at(name, Recompute.UNITS)
    (x,) = inputs_of(name)
    with pytest.raises(RuntimeError, match=r"input must be \(N, C, H, W\)"):
        other(x[0])


def test_inputs_to_be_joined_that_are_of_different_batches_are_refused():
    _, other = at("blend", Recompute.UNITS)
    coarse, skip = inputs_of("blend")
    with pytest.raises(RuntimeError, match=r"got \(1, 3, 3, 4\) and \(2, 4, 6, 8\)"):
        other(coarse[:1], skip)


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_no_images_in_eval_mode_make_no_outputs(name, level):
    plain, other = at(name, level)
    inputs = [x[:0] for x in inputs_of(name)]
    found = step(other.eval(), inputs)
    expected = step(plain.eval(), inputs)
    assert found["output"].shape == expected["output"].shape
    assert found.keys() == expected.keys()
    assert not any(value.any() for key, value in found.items() if key.startswith("gradient"))


@pytest.mark.parametrize("name", ["1x1", "3x3", "transition", "blend"])
def test_a_slice_of_channels_of_a_channels_last_map_is_read_where_it_lies(name):
    torch.manual_seed(0)
    module = MODULES[name][0](NormMode.BATCH)
    module.recompute = Recompute.UNITS
    shapes = [(2, shape[1], 4 * shape[2], 4 * shape[3]) for shape in MODULES[name][1]]
    maps = [channels_last(torch.randn(shape)) for shape in shapes]
    wide = [channels_last(torch.cat([x, x, x], 1)) for x in maps]

    def peak_bytes(inputs):
        with watch_allocator() as peak:
            module(*inputs)
        return peak.peak_bytes

    slices = [x[:, : shape[1]] for x, shape in zip(wide, shapes, strict=True)]
    others = [x.contiguous() for x in maps]
    peak_bytes(maps)
    assert peak_bytes(slices) == peak_bytes(maps)
    # What lies otherwise is copied.
    assert peak_bytes(others) == peak_bytes(maps) + sum(x.nbytes for x in maps)


# Compilers, tracers and exporters


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize(
    "build_one",
    [
        *(MODULES[name][0] for name in UNITS),
        lambda norm: Stem(4, norm=norm),
        lambda norm: DilatedContext(4, 4, 4, norm=norm),
        lambda norm: BatchNorm2d(4, norm=norm),
        lambda norm: nn.Sequential(nn.Conv2d(3, 4, 1), BatchNorm2d(4, norm=norm)),
    ],
)
def test_scripting_is_refused(build_one):
    with pytest.raises(RuntimeError, match=r"cannot be compiled by torch\.jit\.script.*use torch\.export"):
        torch.jit.script(build_one(NormMode.BATCH))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_what_is_traced_in_eval_mode_computes_the_same(name, level):
    _, module = at(name, level)
    module.eval()
    traced = torch.jit.trace(module, tuple(inputs_of(name)))
    inputs = inputs_of(name)
    assert_same({"output": traced(*inputs).detach()}, {"output": module(*inputs).detach()})
    assert "memseg::" not in str(traced.inlined_graph)


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_what_is_exported_in_eval_mode_computes_the_same_with_torchs_operators_alone(name, level):
    _, module = at(name, level)
    module.eval()
    exported = torch.export.export(module, tuple(inputs_of(name)))
    inputs = inputs_of(name)
    assert_same({"output": exported.module()(*inputs).detach()}, {"output": module(*inputs).detach()})
    operators = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert operators
    assert all(operator.startswith("aten.") for operator in operators)


class Joins(nn.Module):
    """A network of two inputs."""

    def __init__(self, unit):
        super().__init__()
        self.unit = unit

    def forward(self, coarse, skip):
        return self.unit(coarse, skip).tanh()


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_what_fx_traces_computes_the_same_and_tracing_counts_no_batch(name, level):
    plain, other = at(name, level)
    inputs = inputs_of(name)
    traced = torch.fx.symbolic_trace(nn.Sequential(other, nn.Tanh()) if len(inputs) == 1 else Joins(other))
    counts = [value.item() for key, value in other.named_buffers() if key.endswith("num_batches_tracked")]
    assert set(counts) == {0}
    assert_same({"output": traced(*inputs).detach()}, {"output": plain(*inputs).tanh().detach()})


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own look
@pytest.mark.parametrize("levels", [("none", "none"), ("segment", "units")], ids=" ".join)
def test_a_compiled_network_trains_as_it_did(levels):
    torch.manual_seed(0)
    plain, other = twins(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            DenseBlock(2, in_channels=4, growth_rate=2, bn_size=2),
            NormReluConv(8, 4, kernel_size=1, pool=True),
            nn.Tanh(),
        )
    )
    other[1].recompute, other[2].recompute = map(Recompute, levels)
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="eager")
    for _ in range(2):
        inputs = random_inputs([(2, 3, 6, 8)])
        found = {key.replace("_orig_mod.", ""): value for key, value in step(compiled, inputs).items()}
        assert_same(found, step(plain, inputs))
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            found, expected = compiled.eval()(*inputs), plain.eval()(*inputs)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# Norms of torch


@pytest.mark.parametrize("level", Recompute)
@pytest.mark.parametrize("name", UNITS)
def test_torchs_synced_norm_is_refused_with_a_word_about_ours(name, level):
    _, module = at(name, level)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    match = r"norms must be memseg\.nn\.BatchNorm2d, got SyncBatchNorm; .*set each norm's `norm` to 'synced'"
    for guard in (torch.enable_grad, torch.no_grad):
        with guard(), pytest.raises(TypeError, match=match):
            converted(*inputs_of(name))


# Several processes

WORLD = 2


def network(level, memory_format=torch.contiguous_format):
    torch.manual_seed(0)
    model = nn.Sequential(
        NormReluConv(3, 4, kernel_size=3),
        DenseBlock(2, in_channels=4, growth_rate=2, bn_size=2),
        NormReluConv(8, 4, kernel_size=1, pool=True),
    )
    _, model = twins(model)
    for layer in model:
        layer.recompute = level
    return model.to(memory_format=memory_format)


def batch_of(rank):
    torch.manual_seed(rank)
    return torch.randn(2, 3, 6, 8, dtype=torch.float64)


def accumulate(model, rank):
    """Gradients of two batches, the first without averaging, where there are several processes."""
    with model.no_sync() if isinstance(model, DistributedDataParallel) else torch.enable_grad():
        first = model(batch_of(rank))
        first.backward(output_gradient(first))
    second = model(batch_of(rank + WORLD))
    second.backward(output_gradient(second))


def replica(rank, folder):
    """Gradients that one process ends with, by level and memory format, written to a file."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    meeting = (folder / "meeting").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD, timeout=timedelta(seconds=300))
    found = {}
    for level in Recompute:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            model = network(level, memory_format)
            accumulate(DistributedDataParallel(model), rank)
            found[level.value, str(memory_format)] = {
                key: value.numpy().copy() for key, value in gradients(model).items()
            }
    (folder / str(rank)).write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


def test_distributed_data_parallel_averages_the_gradients_of_all_processes(tmp_path):
    multiprocessing.set_forkserver_preload(["torch._dynamo", "memseg.models"])
    multiprocessing.start_processes(replica, (tmp_path,), nprocs=WORLD, start_method="forkserver")
    expected = {}
    for rank in range(WORLD):
        model = network(Recompute.NONE)
        accumulate(model, rank)
        for key, value in gradients(model).items():
            expected[key] = expected.get(key, 0) + value / WORLD
    for rank in range(WORLD):
        for found in pickle.loads((tmp_path / str(rank)).read_bytes()).values():
            assert_same({key: torch.from_numpy(value) for key, value in found.items()}, expected)
