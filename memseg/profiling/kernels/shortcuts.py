"""Short ways past FakeTensorMode for the operators that a step runs most.

FakeTensorMode hashes all arguments for its cache, and where it has not seen them, runs many operators by torch's
references in Python: a tenth to a third of a millisecond each time, most of what a trace would take. What comes out
here is what it would return: tests compare the two.

    elementwise     on dense tensors that lie alike the result lies like them; in place, it is the tensor itself, and
                    on lists in place, there is none
    views           torch's kernels for the meta device know them, and are called at once
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import make_contiguous_strides_for
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

_aten = torch.ops.aten
_CPU = torch.device("cpu")
_NUMBERS = (int, float, bool)

_ELEMENTWISE = {
    _aten.add.Tensor,
    _aten.sub.Tensor,
    _aten.mul.Tensor,
    _aten.div.Tensor,
    _aten.neg.default,
    _aten.sqrt.default,
    _aten.rsqrt.default,
    _aten.threshold_backward.default,
}
_IN_PLACE = {
    _aten.add_.Tensor,
    _aten.sub_.Tensor,
    _aten.mul_.Tensor,
    _aten.div_.Tensor,
    _aten.addcmul_.default,
    _aten.addcdiv_.default,
    _aten.lerp_.Scalar,
    _aten.relu_.default,
    _aten.copy_.default,
    _aten.zero_.default,
}
_LISTS_IN_PLACE = {
    _aten._fused_adam_.default,
    _aten._fused_adamw_.default,
    _aten._fused_sgd_.default,
    _aten._foreach_add_.List,
    _aten._foreach_add_.Scalar,
    _aten._foreach_addcdiv_.ScalarList,
    _aten._foreach_addcmul_.Scalar,
    _aten._foreach_div_.ScalarList,
    _aten._foreach_lerp_.Scalar,
    _aten._foreach_mul_.Scalar,
    _aten._foreach_zero_.default,
}
_BY_META = {
    _aten.alias.default,
    _aten.as_strided.default,
    _aten.detach.default,
    _aten.expand.default,
    _aten.new_empty.default,
    _aten.permute.default,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.squeeze.dim,
    _aten.t.default,
    _aten.transpose.int,
    _aten.unbind.int,
    _aten.unsqueeze.default,
    _aten.view.default,
    _aten.zeros_like.default,
}


def short_ways() -> Collection[Any]:
    """All operators that have one."""
    return _SHORTCUTS.keys()


def shortcut(func: Any) -> Callable[..., Any] | None:
    """The short way of an operator; it returns NotImplemented for arguments that it is not for."""
    return _SHORTCUTS.get(func)


def _elementwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not _lie_alike(args, kwargs):
        return NotImplemented
    mode = _mode(args)
    if mode is NotImplemented:
        return NotImplemented
    x: Tensor = args[0]
    with in_kernel_invocation_manager(mode) if mode else torch._C._DisableTorchDispatch():
        out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return FakeTensor(mode, out, _CPU) if mode else out


def _in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    alike = _lie_alike(args, kwargs) and _mode(args) is not NotImplemented
    return args[0] if alike else NotImplemented


def _lists_in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    lists = [tuple(one for one in part if isinstance(one, Tensor)) for part in args if isinstance(part, list)]
    shapes = [[one.shape for one in tensors] for tensors in lists]
    # Counts of steps are single numbers; a list may be empty.
    alike = all(one == shapes[0] or not any(one) for one in shapes)
    further = any(isinstance(one, Tensor) for one in (*args, *kwargs.values()))
    return None if alike and not further and _mode(sum(lists, ())) is not NotImplemented else NotImplemented


def _by_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    mode = _mode(args)
    if not isinstance(mode, FakeTensorMode) or kwargs.get("device") is not None:
        return NotImplemented
    with in_kernel_invocation_manager(mode):
        out = func(*args, **kwargs)
    if isinstance(out, Tensor):
        return FakeTensor(mode, out, _CPU)
    return [FakeTensor(mode, one, _CPU) for one in out]


_SHORTCUTS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_IN_PLACE, _in_place),
    **dict.fromkeys(_LISTS_IN_PLACE, _lists_in_place),
    **dict.fromkeys(_BY_META, _by_meta),
}


def _lie_alike(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether operands are numbers and tensors of one floating-point type, one shape and one dense layout."""
    x: Tensor = args[0]
    return _is_dense(x) and x.dtype.is_floating_point and all(_lies_like(x, one) for one in (*args, *kwargs.values()))


def _is_dense(x: Tensor) -> bool:
    """Whether the result of an elementwise operator lies like its operand for certain."""
    if 0 in x.shape or 1 in x.shape:
        # Strides of such dimensions mean nothing, and torch sets them anew.
        return x.stride() == make_contiguous_strides_for(x.shape)
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def _lies_like(x: Tensor, operand: Any) -> bool:
    if isinstance(operand, Tensor):
        return operand.dtype == x.dtype and operand.shape == x.shape and operand.stride() == x.stride()
    return isinstance(operand, _NUMBERS)


def _mode(args: tuple[Any, ...]) -> Any:
    """The fake mode of all tensors, None if they are plain ones of the meta device; NotImplemented for all others."""
    modes = {_mode_of(one) for one in _tensors(args)}
    return modes.pop() if len(modes) == 1 else NotImplemented


def _mode_of(tensor: Tensor) -> Any:
    if isinstance(tensor, FakeTensor):
        # One that knows its value keeps it in views, and loses it when it is written.
        plain = tensor.constant is None and tensor.fake_device == _CPU
        return tensor.fake_mode if plain else NotImplemented
    return None if tensor.is_meta else NotImplemented


def _tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    return (one for one in args if isinstance(one, Tensor))
