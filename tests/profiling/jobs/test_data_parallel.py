"""Buckets are as torch's reducer fills them, and a step with them is what DistributedDataParallel really takes."""

import gc

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from memseg.errors import InputError
from memseg.profiling import Category, DataParallel, foreign_job, named_optimizer, trace_job, watch_allocator
from memseg.profiling.jobs.data_parallel import make_buckets

MIB = 2**20
SIZES = [
    [100, 2**18, 50, 7 * 2**20, 10, 2**20, 2**18 - 1, 3],
    [2**18],
    [1],
    [2**18 - 1, 1, 1],
    [8 * 2**20, 2**20, 2**20, 2**18],
    [2**18] * 60,
]
"""Numbers in each parameter of a model, in its order; 2**18 float32 are 1 MiB."""


def parameters(sizes, dtype=torch.float32):
    return [nn.Parameter(torch.empty(size, dtype=dtype, device="meta")) for size in sizes]


@pytest.mark.parametrize("sizes", SIZES)
def test_buckets_are_those_of_torchs_reducer(sizes):
    backwards = [torch.empty(size) for size in sizes[::-1]]
    indices, _ = dist._compute_bucket_assignment_by_size(backwards, [MIB, 25 * MIB])
    expected = [sum(backwards[index].numel() for index in bucket) for bucket in indices]
    assert [bucket.numel() for bucket in make_buckets(parameters(sizes), DataParallel())] == expected


def test_a_cap_of_ones_own_holds_for_the_first_bucket_too():
    # torch takes 1 MiB for the first only where no cap is given: _BucketConfig in torch/nn/parallel/distributed.py.
    buckets = make_buckets(parameters([2**18] * 8), DataParallel(bucket_cap_mb=4))
    assert [bucket.nbytes for bucket in buckets] == [4 * MIB, 4 * MIB]


def test_the_first_bucket_is_closed_at_1_mib_and_the_others_at_25():
    buckets = make_buckets(parameters([2**18] * 60), DataParallel())
    assert [bucket.nbytes for bucket in buckets] == [MIB, 25 * MIB, 25 * MIB, 9 * MIB]


def test_each_type_has_buckets_of_its_own_and_frozen_parameters_none():
    frozen = nn.Parameter(torch.empty(7), requires_grad=False)
    mixed = [*parameters([3, 5]), *parameters([4], torch.bfloat16), frozen]
    buckets = make_buckets(mixed, DataParallel())
    assert {(bucket.dtype, bucket.numel()) for bucket in buckets} == {(torch.float32, 8), (torch.bfloat16, 4)}


def test_with_bucket_views_every_gradient_lies_in_a_bucket():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    buckets = make_buckets(model.parameters(), DataParallel(gradient_as_bucket_view=True))
    storages = {bucket.untyped_storage().data_ptr() for bucket in buckets}
    for parameter in model.parameters():
        assert parameter.grad.shape == parameter.shape
        assert parameter.grad.untyped_storage().data_ptr() in storages
        parameter.grad.fill_(1)
    assert sum(bucket.sum().item() for bucket in buckets) == sum(one.numel() for one in model.parameters())


@pytest.mark.parametrize("settings", [{"replicas": 0}, {"bucket_cap_mb": 0}])
def test_numbers_that_cannot_be_are_refused(settings):
    with pytest.raises(InputError, match="must be at least 1"):
        DataParallel(**settings)


# A whole step.

WEIGHTS = 2 * 512 * 1024 * 4


def network():
    return nn.Sequential(nn.Linear(512, 1024, bias=False), nn.Tanh(), nn.Linear(1024, 512, bias=False))


def trace(data_parallel):
    def make():
        return foreign_job(network, torch.ones(64, 512), optimizer=named_optimizer("momentum"))

    return trace_job(make, data_parallel=data_parallel)


@pytest.fixture
def one_rank():
    """A process group of this process alone; and no garbage of others, whose end would be counted."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    dist.destroy_process_group()


def test_without_views_there_is_one_more_copy_of_all_gradients():
    alone, replica = trace(None), trace(DataParallel(2))
    found = replica.timeline.by_category(replica.timeline.instants - 1)
    assert found[Category.GRADIENT] == found[Category.COMMUNICATION] == WEIGHTS
    assert replica.timeline.peak_allocated_bytes == alone.timeline.peak_allocated_bytes + WEIGHTS


def test_with_views_gradients_are_held_once_and_from_the_start():
    timeline = trace(DataParallel(2, gradient_as_bucket_view=True)).timeline
    for instant in (timeline.backward_start - 1, timeline.instants - 1):
        found = timeline.by_category(instant)
        assert found[Category.GRADIENT] + found[Category.COMMUNICATION] == WEIGHTS


def measure(*, view):
    with watch_allocator() as peak:
        images = torch.ones(64, 512)
        model = DistributedDataParallel(network(), gradient_as_bucket_view=view)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            output = model(images)
            loss = output.mean()
            loss.backward()
            del output
            optimizer.step()
    return peak.peak_bytes


@pytest.mark.parametrize("view", [False, True])
def test_the_peak_is_that_of_real_steps_of_distributed_data_parallel(view, one_rank):
    predicted = trace(DataParallel(2, gradient_as_bucket_view=view)).peak_allocated_bytes
    # Gloo's thread is sometimes late to let go of a bucket.
    measured = min(measure(view=view) for _ in range(4))
    assert predicted == pytest.approx(measured, rel=0.001)
