"""`synced` norms: replicas that share statistics are one network on the batches of all, however unequal these are."""

import copy
import pickle
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel
from twins import MODULES, assert_same, build, gradients, output_gradient, random_inputs, step

from memseg.levels import NormMode, Recompute
from memseg.nn import BatchNorm2d

WORLD = 3
SPLITS = {"equal": (2, 2, 2), "unequal": (3, 1, 2), "one value each": (1, 1, 1)}
"""Images of each replica. With one value per channel a lone replica has no variance, and all together have."""
PAIR, PAIR_SPLIT = (0, 2), (2, 0, 3)
"""Replicas of a smaller group, and their images; replica 1 is left to itself."""
ALONE = 2
"""Images of the replica that is left to itself."""


def has_pooling(name):
    return "transition" in name or name == "stem"


LEVELS = [(name, level) for name in MODULES for level in build(name)[1].levels]
"""Each module's own levels: the others do as one of these."""

CASES = [
    (name, split, level)
    for name, level in LEVELS
    for split in SPLITS
    if not (split == "one value each" and has_pooling(name))  # Of a map of 1x1 pooling leaves nothing.
]
DISTRIBUTED = [Recompute.NONE, Recompute.UNITS, Recompute.SEGMENT]


def made(name, norm, level, images, side=None):
    """A module, its inputs of so many images (maps of `side` squared, where given), and its output's gradient."""
    torch.manual_seed(len(name))
    _, module = build(name, norm)
    module.recompute = level
    inputs = random_inputs([(images, shape[1], *((side, side) if side else shape[2:])) for shape in MODULES[name][1]])
    with torch.no_grad():
        out = copy.deepcopy(module).eval()(*inputs)
    return module, inputs, output_gradient(out)


def side_of(split):
    return 1 if split == "one value each" else None


def share(split, rank):
    """This replica's images among those of all."""
    return slice(sum(split[:rank]), sum(split[: rank + 1]))


def copied(found):
    """As arrays, which are pickled faster than tensors."""
    return {name: value.numpy().copy() for name, value in found.items()}


def replica(rank, folder):
    """What one process finds in every case, written to a file."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    meeting = (folder / "meeting").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD, timeout=timedelta(seconds=300))
    found = {}
    for name, split, level in CASES:
        own = share(SPLITS[split], rank)
        module, inputs, grad = made(name, NormMode.SYNCED, level, sum(SPLITS[split]), side_of(split))
        found[f"{name}, {split}, {level}"] = copied(step(module, [x[own] for x in inputs], grad[own]))
        if split == "equal" and rank == 0:
            # Were anybody waited for, nobody would come.
            found[f"{name} in eval mode, {level}"] = copied(step(module.eval(), inputs, grad))
    pair = dist.new_group(PAIR)
    for name in ("dense block", "blend"):
        for level in build(name)[1].levels:
            found[f"{name} in a pair, {level}"] = in_a_pair(name, level, rank, pair)
    for level in DISTRIBUTED:
        found[f"distributed, {level}"] = data_parallel(level, rank)
        found[f"mixed modes, {level}"] = mixed_modes(level, rank)
    (folder / str(rank)).write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


def in_a_pair(name, level, rank, pair):
    module, inputs, grad = made(name, NormMode.SYNCED, level, ALONE if rank not in PAIR else sum(PAIR_SPLIT))
    for norm in norms_of(module):
        norm.process_group = pair
    own = share(PAIR_SPLIT, rank) if rank in PAIR else slice(None)
    return copied(step(module, [x[own] for x in inputs], grad[own]))


def data_parallel(level, rank):
    module, inputs, grad = made("dense block", NormMode.SYNCED, level, sum(SPLITS["equal"]))
    wrapped, own = DistributedDataParallel(module), share(SPLITS["equal"], rank)
    leaf = inputs[0][own].requires_grad_()
    wrapped(leaf).backward(grad[own])
    return copied(gradients(module, [leaf]))


def mixed_modes(level, rank):
    """A block of which only one norm in the middle is synced."""
    module, inputs, grad = made("dense block", NormMode.BATCH, level, sum(SPLITS["unequal"]))
    module.layers[1].norm1.norm = NormMode.SYNCED
    own = share(SPLITS["unequal"], rank)
    return copied(step(module, [x[own] for x in inputs], grad[own]))


def norms_of(module):
    return [one for one in module.modules() if isinstance(one, BatchNorm2d)]


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    """What each of three processes found."""
    folder = tmp_path_factory.mktemp("replicas")
    # One process loads torch, and the replicas are forks of it.
    multiprocessing.set_forkserver_preload(["torch._dynamo", "memseg.models"])
    multiprocessing.start_processes(replica, (folder,), nprocs=WORLD, start_method="forkserver")
    parts = [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(WORLD)]
    return [{case: as_tensors(found) for case, found in part.items()} for part in parts]


def as_tensors(found):
    return {name: torch.from_numpy(value) for name, value in found.items()}


def assert_one_network(parts, expected):
    """Replicas' outputs and gradients together are the expected ones, and each has the expected running statistics."""
    joined = {}
    for name, value in expected.items():
        each = [part[name] for part in parts if name in part]
        if name == "output" or name.startswith("gradient of input"):
            joined[name] = torch.cat(each)
        elif name.startswith("gradient"):
            joined[name] = torch.stack(each).sum(0)
        else:
            assert_same(dict(enumerate(each)), dict.fromkeys(range(len(parts)), value))
            joined[name] = value
    assert_same(joined, expected)


@pytest.mark.parametrize(("name", "split", "level"), CASES)
def test_replicas_are_one_network_on_all_images(replicas, name, split, level):
    parts = [found[f"{name}, {split}, {level}"] for found in replicas]
    plain, inputs, grad = made(name, NormMode.BATCH, Recompute.NONE, sum(SPLITS[split]), side_of(split))
    assert_one_network(parts, step(plain, inputs, grad))


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_a_replica_in_eval_mode_waits_for_nobody(replicas, name, level):
    plain, inputs, grad = made(name, NormMode.BATCH, Recompute.NONE, sum(SPLITS["equal"]))
    step(plain, inputs, grad)
    assert_same(replicas[0][f"{name} in eval mode, {level}"], step(plain.eval(), inputs, grad))


@pytest.mark.parametrize(("name", "level"), [case for case in LEVELS if case[0] in ("dense block", "blend")])
def test_replicas_of_a_smaller_group_are_one_network_and_the_others_are_by_themselves(replicas, name, level):
    found = [part[f"{name} in a pair, {level}"] for part in replicas]
    plain, inputs, grad = made(name, NormMode.BATCH, Recompute.NONE, sum(PAIR_SPLIT))
    assert_one_network([found[rank] for rank in PAIR], step(plain, inputs, grad))
    plain, inputs, grad = made(name, NormMode.BATCH, Recompute.NONE, ALONE)
    assert_same(found[1], step(plain, inputs, grad))


@pytest.mark.parametrize("level", DISTRIBUTED)
def test_distributed_data_parallel_averages_gradients_of_synced_replicas(replicas, level):
    parts = [found[f"distributed, {level}"] for found in replicas]
    plain, inputs, grad = made("dense block", NormMode.BATCH, Recompute.NONE, sum(SPLITS["equal"]))
    expected = {name: value for name, value in step(plain, inputs, grad).items() if name.startswith("gradient")}
    # The sum of what each holds, a third of the whole network's gradient, is that gradient.
    assert_one_network(parts, expected)
    for name in expected:
        if "input" not in name:
            assert_same({name: parts[1][name]}, {name: parts[0][name]})


@pytest.mark.parametrize("level", [level for level in DISTRIBUTED if level is not Recompute.NONE])
def test_norms_of_one_block_may_sync_over_different_replicas(replicas, level):
    for found in replicas:
        assert_same(found[f"mixed modes, {level}"], found["mixed modes, none"])


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=(tmp_path / "meeting").as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_without_a_group_synced_is_batch_to_the_bit(name, level):
    assert_bitwise_same(name, level)


@pytest.mark.parametrize(("name", "level"), [case for case in LEVELS if case[0] in ("dense block", "blend", "stem")])
@pytest.mark.usefixtures("one_process")
def test_in_a_group_of_one_process_synced_is_batch_to_the_bit(name, level):
    assert_bitwise_same(name, level)


def assert_bitwise_same(name, level):
    found, expected = (step(*made(name, norm, level, 2)) for norm in (NormMode.SYNCED, NormMode.BATCH))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.usefixtures("one_process")
def test_a_copy_of_a_norm_syncs_over_the_same_group():
    norm = BatchNorm2d(2, norm=NormMode.SYNCED)
    norm.process_group = dist.new_group([0])
    norm(torch.randn(2, 2, 3, 3))
    twin = copy.deepcopy(torch.nn.Sequential(norm))[0]
    assert twin.process_group is norm.process_group
    assert twin.weight is not norm.weight
    for name, value in norm.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value), name
        assert twin.state_dict()[name].data_ptr() != value.data_ptr(), name
