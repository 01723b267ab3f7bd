"""A gradient is overwritten only where nobody will read it again."""

import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from twins import assert_same, gradients, output_gradient, twins

from memseg.levels import Recompute
from memseg.nn import DenseBlock
from memseg.nn.autograd import once_differentiable
from memseg.nn.ownership import _alone, take_over
from memseg.profiling.measure import watch_allocator

SHAPE = (2, 3, 4, 5)
LEVELS = [level for level in Recompute if level is not Recompute.NONE]


class Take(torch.autograd.Function):
    """Hands x on; its backward takes the gradient over, notes what it found, and overwrites what it took."""

    @staticmethod
    def forward(ctx, x, notes):
        ctx.notes, ctx.like = notes, x.detach()
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        place, found = grad.data_ptr(), grad.clone()
        mine = take_over(grad, like=ctx.like)
        assert mine.is_contiguous(memory_format=torch.channels_last)
        assert mine.dtype == ctx.like.dtype
        assert torch.equal(mine, found)
        ctx.notes.append((mine.data_ptr() == place, found))
        mine.fill_(7)
        return found, None


def as_maps(x):
    return x.contiguous(memory_format=torch.channels_last)


def leaf():
    return as_maps(torch.randn(SHAPE)).requires_grad_()


def taken(notes):
    return [took for took, _ in notes]


def weights():
    """A factor, so that the gradient of what is multiplied is a new tensor."""
    return as_maps(torch.randn(SHAPE))


def test_a_gradient_that_nobody_else_holds_is_taken():
    notes, factor = [], weights()
    (Take.apply(leaf(), notes) * factor).sum().backward()
    assert taken(notes) == [True]
    assert torch.equal(notes[0][1], factor)


def test_a_gradient_is_taken_in_another_thread_and_with_anomalies_watched_for():
    notes = []

    def run():
        (Take.apply(leaf(), notes) * weights()).sum().backward()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        run()
    assert taken(notes) == [True, True]


def test_a_gradient_is_taken_each_time_that_a_graph_is_walked():
    notes = []
    loss = (Take.apply(leaf(), notes) * weights()).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert taken(notes) == [True, True]


KEEPS = {
    "itself": lambda grad: grad,
    "a view": lambda grad: grad[1],
    "a detached view": lambda grad: grad.detach().flatten(2),
    "an array over it": lambda grad: torch.from_numpy(grad.numpy()),
    "its storage": lambda grad: torch.empty(0).set_(grad.untyped_storage(), 0, (grad.numel(),)),
}


@pytest.mark.parametrize("keeps", KEEPS)
def test_what_a_hook_keeps_is_left_alone(keeps):
    notes, kept, factor = [], [], weights()
    out = Take.apply(leaf(), notes)
    out.register_hook(lambda grad: kept.append(KEEPS[keeps](grad)))
    (out * factor).sum().backward()
    assert taken(notes) == [False]
    assert torch.equal(kept[0], KEEPS[keeps](factor))


def test_a_hook_that_keeps_nothing_does_not_stand_in_the_way():
    notes, seen = [], []
    out = Take.apply(leaf(), notes)
    out.register_hook(lambda grad: seen.append(grad.sum()))
    (out * weights()).sum().backward()
    assert taken(notes) == [True]


def test_a_gradient_that_a_hook_puts_in_its_place_is_left_alone_too():
    notes, instead = [], weights()
    out = Take.apply(leaf(), notes)
    out.register_hook(lambda grad: instead)
    before = instead.clone()
    (out * weights()).sum().backward()
    assert taken(notes) == [False]
    assert torch.equal(instead, before)


def test_a_retained_gradient_is_left_alone():
    notes, factor = [], weights()
    out = Take.apply(leaf(), notes)
    out.retain_grad()
    (out * factor).sum().backward()
    assert torch.equal(out.grad, factor)


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_hook_on_the_node_keeps_is_left_alone(when):
    notes, kept, factor = [], [], weights()
    out = Take.apply(leaf(), notes)
    if when == "before":
        out.grad_fn.register_prehook(lambda grads: kept.extend(grads))
    else:
        out.grad_fn.register_hook(lambda _, grads: kept.extend(grads))
    (out * factor).sum().backward()
    assert taken(notes) == [False]
    assert torch.equal(kept[0], factor)


def test_a_gradient_that_another_node_waits_for_is_left_alone():
    notes, factor = [], weights()
    first, second = (Take.apply(leaf(), notes) for _ in range(2))
    ((first + second) * factor).sum().backward()
    # The one that comes last may take it.
    assert taken(notes) == [False, True]
    assert all(torch.equal(found, factor) for _, found in notes)


def test_a_gradient_that_a_leaf_accumulates_is_left_alone():
    notes, factor, other = [], weights(), leaf()
    ((Take.apply(leaf(), notes) + other) * factor).sum().backward()
    ((other + Take.apply(leaf(), notes)) * factor).sum().backward()
    assert all(torch.equal(found, factor) for _, found in notes)
    assert torch.equal(other.grad, 2 * factor)


def test_a_gradient_that_autograd_grad_hands_out_is_left_alone():
    notes, factor, x = [], weights(), leaf()
    out = Take.apply(x, notes)
    of_out, of_x = torch.autograd.grad((out * factor).sum(), [out, x])
    assert taken(notes) == [False]
    assert torch.equal(of_out, factor)
    assert torch.equal(of_x, factor)


def test_a_gradient_that_the_caller_gave_is_left_alone():
    notes, given = [], weights()
    before = given.clone()
    Take.apply(leaf(), notes).backward(given)
    Take.apply(leaf(), notes).backward(as_maps(torch.ones(SHAPE)))
    assert taken(notes) == [False, False]
    assert torch.equal(given, before)


def test_a_part_of_a_larger_gradient_is_left_alone():
    notes, whole = [], []
    parts = [Take.apply(leaf(), notes) for _ in range(2)]
    joined = torch.cat(parts)
    joined.register_hook(whole.append)
    factor = as_maps(torch.randn(4, *SHAPE[1:]))
    (joined * factor).sum().backward()
    assert taken(notes) == [False, False]
    assert torch.equal(whole[0], factor)


class KeepsWhatItMade(torch.autograd.Function):
    """A node above that returns as a gradient what it goes on holding."""

    @staticmethod
    def forward(ctx, x, made):
        ctx.made = made
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        return ctx.made, None


def test_a_gradient_that_its_maker_goes_on_holding_is_left_alone():
    notes, made = [], weights()
    before = made.clone()
    KeepsWhatItMade.apply(Take.apply(leaf(), notes), made).backward()
    assert taken(notes) == [False]
    assert torch.equal(made, before)


def test_a_gradient_that_lies_otherwise_is_copied():
    notes, factor = [], torch.randn(SHAPE)
    (Take.apply(leaf(), notes) * factor).sum().backward()
    Take.apply(leaf(), notes).sum().backward()
    assert taken(notes) == [False, False]
    assert torch.equal(notes[0][1], factor)
    assert torch.equal(notes[1][1], torch.ones(SHAPE))


class KeepsAll(TorchDispatchMode):
    """Keeps all that is computed, as a tracer may."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.kept.append(out)
        return out


def test_a_first_look_under_a_mode_that_keeps_all_is_not_misled():
    # The mode would hold the gradient that is looked at: every later one would seem to have a holder fewer.
    _alone.cache_clear()
    with KeepsAll():
        (Take.apply(leaf(), []) * weights()).sum().backward()
    notes, kept, factor = [], [], weights()
    out = Take.apply(leaf(), notes)
    out.register_hook(kept.append)
    (out * factor).sum().backward()
    assert taken(notes) == [False]
    assert torch.equal(kept[0], factor)


def two_blocks():
    """Two dense blocks in float64 that read the same."""
    torch.manual_seed(0)
    return twins(DenseBlock(2, in_channels=3, growth_rate=2))


@pytest.mark.parametrize("level", LEVELS)
def test_gradients_of_blocks_that_are_added_and_kept_are_what_they_were(level):
    plain, other = (nn.ModuleList(two_blocks()) for _ in range(2))
    for block in other:
        block.recompute = level
    x = as_maps(torch.randn(2, 3, 4, 5, dtype=torch.float64))

    def run(blocks):
        kept, inputs = [], x.clone().requires_grad_()
        outputs = [block(inputs) for block in blocks]
        for out in outputs:
            out.register_hook(kept.append)
            out.retain_grad()
        total = outputs[0] + outputs[1]
        total.register_hook(kept.append)
        grad = as_maps(output_gradient(total))
        before = grad.clone()
        total.backward(grad)
        assert torch.equal(grad, before)
        named = {f"kept {index}": one for index, one in enumerate([*kept, *(out.grad for out in outputs)])}
        return gradients(blocks, [inputs]) | named

    assert_same(run(other), run(plain))


@pytest.mark.parametrize("level", LEVELS)
def test_hooks_on_a_block_see_the_gradient_of_its_output(level):
    seen, block = [], two_blocks()[0]
    block.recompute = level
    block.register_full_backward_hook(lambda module, of_inputs, of_outputs: seen.append(of_outputs[0]))
    out = block(torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True))
    factor = as_maps(torch.randn_like(out))
    (out * factor).sum().backward()
    assert torch.equal(seen[0], factor)


def test_a_kept_gradient_costs_a_block_one_more_map():
    block = DenseBlock(2, in_channels=8, growth_rate=4, recompute=Recompute.UNITS)
    out_bytes = 4 * 2 * 16 * 16 * 16

    def peak_bytes(hook):
        out = block(as_maps(torch.randn(2, 8, 16, 16)))
        out.register_hook(hook)
        factor = as_maps(torch.randn_like(out))
        with watch_allocator() as peak:
            (out * factor).sum().backward()
        return peak.peak_bytes

    kept = []
    peak_bytes(lambda grad: None)  # The gradients of the parameters stay allocated, the first time.
    alone = peak_bytes(lambda grad: None)
    assert peak_bytes(kept.append) - alone == out_bytes
