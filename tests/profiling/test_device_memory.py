import pytest

from memseg.errors import InputError
from memseg.planning import known_cards
from memseg.profiling.device_memory import (
    Link,
    context_bytes,
    cublas_workspace_bytes,
    device_terms,
    kernel_bytes,
    nccl_bytes,
)

MIB = 2**20
CUDA_CARDS = [card for card in known_cards() if card.compute_capability is not None]


@pytest.mark.parametrize("card", CUDA_CARDS, ids=lambda card: card.name)
def test_every_cuda_card_has_terms_with_sources_that_say_who_measured(card):
    terms = device_terms(card.compute_capability, world_size=2)
    assert [term.name for term in terms] == ["CUDA context", "kernels", "cuBLAS workspaces", "NCCL buffers"]
    for term in terms:
        assert term.size_bytes > 0
        assert term.source.endswith("not measured by us")
        assert len(term.source) > 40
    beside = sum(term.size_bytes for term in terms[:2] if not term.in_allocator)
    assert 300 * MIB < beside < card.reserve_bytes


@pytest.mark.parametrize(
    ("capability", "nearest"),
    [("6.1", "7.0"), ("7.5", "7.0"), ("8.7", "8.6"), ("9.0", "8.9"), ("10.0", "8.9"), ("12.0", "8.9")],
)
def test_an_architecture_without_a_report_takes_the_nearest_and_says_so(capability, nearest):
    assert context_bytes(capability).size_bytes == context_bytes(nearest).size_bytes
    assert context_bytes(capability).source.startswith(f"no report for {capability}; nearest known is {nearest}")
    assert "no report" not in context_bytes(nearest).source


def test_cublas_has_one_workspace_for_forward_and_one_for_backward_inside_the_allocator():
    # 8519680 is what an unwary test saw after one product: pytorch/pytorch issue 95668.
    assert cublas_workspace_bytes("8.6", threads=1).size_bytes == 8519680
    assert cublas_workspace_bytes("8.6").size_bytes == 2 * 8519680
    assert cublas_workspace_bytes("9.0").size_bytes == 2 * 32 * MIB
    assert cublas_workspace_bytes("12.0", threads=1).size_bytes == 32 * MIB
    assert cublas_workspace_bytes("8.6").in_allocator
    assert not any(term.in_allocator for term in (context_bytes("8.6"), kernel_bytes(), nccl_bytes(2)))


def test_cublas_workspaces_follow_the_environment_variable():
    assert cublas_workspace_bytes("9.0", threads=1, config=":4096:8").size_bytes == 32 * MIB
    assert cublas_workspace_bytes("9.0", threads=1, config=":4096:2:16:8").size_bytes == 8519680
    with pytest.raises(InputError, match="try :4096:2:16:8 or :4096:8"):
        cublas_workspace_bytes("9.0", config="4096")


def test_nccl_takes_12_mib_for_each_channel_of_the_ring_and_none_for_one_rank():
    assert nccl_bytes(1).size_bytes == 0
    assert nccl_bytes(2, Link.NVLINK).size_bytes == nccl_bytes(8, Link.NVLINK).size_bytes == 24 * 12 * MIB
    assert nccl_bytes(2, Link.PCIE).size_bytes == 2 * 12 * MIB
    assert nccl_bytes(2, Link.HOST).size_bytes == 0
    with pytest.raises(InputError, match="at least 1, got 0"):
        nccl_bytes(0)


def test_the_terms_of_two_a100_add_up_to_the_report_that_the_context_was_derived_from():
    # 6753 MB used, 5964 reserved: meta-pytorch/torchrec pull request 3580.
    terms = device_terms("8.0", world_size=2)
    assert sum(term.size_bytes for term in terms if not term.in_allocator) == (6753 - 5964) * MIB


def test_a_compute_capability_is_two_numbers():
    with pytest.raises(InputError, match=r"MAJOR\.MINOR, got 'sm_86'; try 8\.6"):
        context_bytes("sm_86")
