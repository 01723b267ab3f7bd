"""What a short way past FakeTensorMode returns is what FakeTensorMode returns."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from memseg.profiling.kernels.shapes import run_by_shape
from memseg.profiling.kernels.shortcuts import short_ways, shortcut

aten = torch.ops.aten
SHAPE = 2, 6, 4, 8


def plain(shape=SHAPE, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype)


def last(shape=SHAPE, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def part(shape=SHAPE):
    """Not dense: half of the columns of a wider map."""
    return torch.empty((*shape[:-1], 2 * shape[-1]))[..., ::2]


OPERANDS = {
    "plain": lambda: (plain(), plain()),
    "channels last": lambda: (last(), last()),
    "half": lambda: (plain(dtype=torch.bfloat16), plain(dtype=torch.bfloat16)),
    "integers": lambda: (plain(dtype=torch.int64), plain(dtype=torch.int64)),
    "one pixel": lambda: (last((2, 6, 1, 1)), plain((2, 6, 1, 1))),
    "laid out otherwise": lambda: (plain(), last()),
    "of another type": lambda: (plain(), plain(dtype=torch.float64)),
    "broadcast": lambda: (plain(), plain((6, 1, 1))),
    "broadcast to the other": lambda: (plain((6, 1, 1)), plain()),
    "not dense": lambda: (part(), part()),
    "empty": lambda: (plain((0, 6)), plain((0, 6))),
    "of one column": lambda: tuple(torch.empty(77, 5).t()[:, :1] for _ in range(2)),
    "of no column": lambda: (plain((0, 3)).t(), plain((0, 3)).t()),
    "expanded of one": lambda: (plain((1, 1)).expand(1, 4), plain((1, 1)).expand(1, 4)),
    "a number": lambda: (plain(), 2.5),
    "a scalar": lambda: (plain(), torch.empty(())),
    "mismatched": lambda: (plain((2, 3)), plain((4, 5))),
    "written where it overlaps": lambda: (plain((1, 8)).expand(4, 8), plain((4, 8))),
}
BINARY = [getattr(aten, name + place).Tensor for name in ("add", "sub", "mul", "div") for place in ("", "_")]
UNARY = [aten.neg.default, aten.sqrt.default, aten.rsqrt.default, aten.relu_.default, aten.zero_.default]
OF_LISTS = {
    aten._foreach_add_.List: (2, {"alpha": 2}),
    aten._foreach_add_.Scalar: (1, {}, 0.5),
    aten._foreach_addcdiv_.ScalarList: (3, {}, [0.5, 0.5]),
    aten._foreach_addcmul_.Scalar: (3, {}, 0.5),
    aten._foreach_div_.ScalarList: (1, {}, [0.5, 0.5]),
    aten._foreach_lerp_.Scalar: (2, {}, 0.5),
    aten._foreach_mul_.Scalar: (1, {}, 0.5),
    aten._foreach_zero_.default: (1, {}),
}
"""How many lists each takes, and what else."""
ADAM = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8, "amsgrad": False, "maximize": False}
SGD = {"weight_decay": 0.0, "momentum": 0.9, "lr": 0.1, "dampening": 0.0, "nesterov": False, "maximize": False}
VIEWS = {
    aten.alias.default: (),
    aten.as_strided.default: ([2, 3], [1, 4], 5),
    aten.detach.default: (),
    aten.expand.default: ([3, *SHAPE],),
    aten.new_empty.default: ([3, 4],),
    aten.permute.default: ([3, 0, 2, 1],),
    aten.select.int: (1, -2),
    aten.slice.Tensor: (3, 1, 7, 2),
    aten.split.Tensor: (4, 1),
    aten.split_with_sizes.default: ([1, 2, 3], 1),
    aten.squeeze.dim: (0,),
    aten.transpose.int: (1, 3),
    aten.unbind.int: (1,),
    aten.unsqueeze.default: (2,),
    aten.view.default: ([2, -1],),
    aten.zeros_like.default: (),
}


def outcome(run, func, make, **kwargs):
    """All that can be told of what an operator returns, or that it fails."""
    with FakeTensorMode():
        args = make()
        tensors = [one for one in args if isinstance(one, Tensor)]
        try:
            out = run(func, args, kwargs)
        except (RuntimeError, ValueError):
            return "fails"
        if out is None:
            return None
        return [
            (
                type(one), one.shape, one.stride(), one.dtype, one.device, one.storage_offset(),
                one.untyped_storage().nbytes(),
                [one is tensor for tensor in tensors],
                [one.untyped_storage()._cdata == tensor.untyped_storage()._cdata for tensor in tensors],
            )
            for one in tree_leaves(out)
        ]  # fmt: skip


def assert_the_same(func, make, **kwargs):
    assert shortcut(func) is not None
    expected = outcome(lambda func, args, kwargs: func(*args, **kwargs), func, make, **kwargs)
    assert outcome(run_by_shape, func, make, **kwargs) == expected


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("func", BINARY, ids=str)
def test_of_two_operands(func, operands):
    assert_the_same(func, OPERANDS[operands])


@pytest.mark.parametrize("operands", [name for name in OPERANDS if name != "a number"])
def test_of_two_tensors(operands):
    assert_the_same(aten.copy_.default, OPERANDS[operands])
    assert_the_same(aten.threshold_backward.default, lambda: (*OPERANDS[operands](), 0))
    assert_the_same(aten.lerp_.Scalar, lambda: (*OPERANDS[operands](), 0.1))
    for func in (aten.addcmul_.default, aten.addcdiv_.default):
        assert_the_same(func, lambda: (*OPERANDS[operands](), OPERANDS[operands]()[1]), value=0.1)


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("func", UNARY, ids=str)
def test_of_one_operand(func, operands):
    assert_the_same(func, lambda: OPERANDS[operands]()[:1])


@pytest.mark.parametrize("operand", [plain, last, part])
@pytest.mark.parametrize("func", VIEWS, ids=str)
def test_views(func, operand):
    assert_the_same(func, lambda: (operand(), *VIEWS[func]))


@pytest.mark.parametrize("func", [aten.new_empty.default, aten.zeros_like.default], ids=str)
def test_what_is_made_like_another_may_differ_in_type_and_layout(func):
    args = [SHAPE] if func is aten.new_empty.default else []
    assert_the_same(func, lambda: (plain(), *args), dtype=torch.float16, pin_memory=False)
    assert_the_same(aten.zeros_like.default, lambda: (plain(),), memory_format=torch.channels_last)


def test_a_matrix_is_transposed():
    assert_the_same(aten.t.default, lambda: (plain((3, 4)),))


def few(shape):
    return [torch.empty(shape), torch.empty(shape)]


@pytest.mark.parametrize("shapes", [[(2, 3)] * 3, [(2, 3), (4, 5), (2, 3)], [()] * 3])
@pytest.mark.parametrize("func", OF_LISTS, ids=str)
def test_of_lists(func, shapes):
    lists, options, *further = OF_LISTS[func]
    assert_the_same(func, lambda: (*(few(shape) for shape in shapes[:lists]), *further), **options)


def test_fused_optimizers():
    for func in (aten._fused_adam_.default, aten._fused_adamw_.default):
        assert_the_same(func, lambda: (*(few((2, 3)) for _ in range(4)), [], few(())), **ADAM)
    assert_the_same(aten._fused_sgd_.default, lambda: [few((2, 3)) for _ in range(3)], **SGD, is_first_step=False)


def test_every_short_way_is_tested_here():
    further = [aten.copy_, aten.threshold_backward, aten.addcmul_, aten.addcdiv_, aten.t]
    further += [aten._fused_adam_, aten._fused_adamw_, aten._fused_sgd_]
    tested = {*BINARY, *UNARY, *VIEWS, *OF_LISTS, *(packet.default for packet in further), aten.lerp_.Scalar}
    assert set(short_ways()) == tested


def test_a_known_value_is_still_known_in_its_views_and_forgotten_when_it_is_written():
    with FakeTensorMode():
        known = torch.tensor(3.0)
        assert run_by_shape(aten.unsqueeze.default, (known, 0), {}).item() == 3.0
        assert run_by_shape(aten.add_.Tensor, (known, torch.empty(())), {}) is known
        with pytest.raises(DataDependentOutputException):
            known.item()


def test_tensors_of_the_meta_device_stay_there():
    x = torch.empty(SHAPE, device="meta")
    out = run_by_shape(aten.mul.Tensor, (x, 2.0), {})
    assert (type(out), out.device.type, out.stride()) == (Tensor, "meta", x.stride())
    assert not isinstance(run_by_shape(aten.select.int, (x, 0, 1), {}), FakeTensor)


def test_real_tensors_are_computed():
    assert run_by_shape(aten.mul.Tensor, (torch.ones(2), torch.full((2,), 3.0)), {}).tolist() == [3.0, 3.0]
    x = torch.ones(2)
    run_by_shape(aten.add_.Tensor, (x, torch.ones(2)), {})
    assert x.tolist() == [2.0, 2.0]
