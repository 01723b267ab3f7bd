"""One training step on fake tensors: what would be allocated, by which layer, and how much work it would be.

Fake tensors have shapes and storages but no memory, so a step of any size runs on any machine. A dispatch mode sees
every operation below autograd: each storage that an operation returns for the first time is an allocation, and its
end is seen through a weak reference. What a kernel allocates and frees inside itself is not seen: for convolutions
`memseg.profiling.kernels.workspace` knows it, for operators of ours `memseg.profiling.kernels.inside`.

Layers are known in forward by module hooks. In backward the running autograd node tells: its sequence number lies
between those that were current when its module was entered and left.
"""

import sys
import weakref
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, ValuesView
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from memseg.planning.costs import Work
from memseg.profiling.kernels.inside import look_inside
from memseg.profiling.kernels.shapes import run_by_shape
from memseg.profiling.kernels.transient import Transient
from memseg.profiling.kernels.work import operation_work
from memseg.profiling.kernels.workspace import kernel_workspace
from memseg.profiling.timeline import Allocation, Category, Phase, Timeline

_aten = torch.ops.aten
_OF_ACCUMULATION = 2**64 - 1
"""Sequence number of the nodes that add up a parameter's gradient; they were made by no layer's forward."""
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_DEVICE_OF = torch.ops.prim.device.default


@dataclass(slots=True)
class Live:
    """A storage while it is, and after it was, alive."""

    size_bytes: int
    born: int
    phase: Phase
    layer: str
    operation: str = ""
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    category: Category | None = None
    died: int | None = None
    freed_in: Phase | None = None
    reader: tuple[Phase, str] | None = None
    output_of: tuple[str, ...] = ()
    card: int = 0

    def allocation(self, end: int) -> Allocation:
        """The value, where what is still alive dies at `end`."""
        return Allocation(
            self.size_bytes,
            self.born,
            end if self.died is None else self.died,
            self.phase,
            self.category or self._category(),
            self.layer,
            self.operation.removesuffix(".default"),
            self.shape,
            str(self.dtype).removeprefix("torch.") if self.dtype else "",
            self.reader,
            self.output_of,
            self.card,
        )

    def _category(self) -> Category:
        crosses = self.phase is Phase.FORWARD and self.freed_in is not Phase.FORWARD
        return Category.SAVED if crosses else Category.TEMPORARY


@dataclass
class _LayerSpans:
    """Sequence numbers of autograd nodes, by the layer that was running when they were made."""

    starts: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def enter(self, sequence: int, name: str) -> None:
        self.starts.append(sequence)
        self.names.append(name)

    def find(self, sequence: int) -> str:
        index = bisect_right(self.starts, sequence) - 1
        return self.names[index] if index >= 0 else ""


class StepTracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records allocations and work while it is entered. Made for fake tensors; real ones work as well.

    Args:
        modules: Modules whose names are told, with their names.
        device: "cpu" or "cuda": whose workspaces to count.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]] = (), *, device: str = "cpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self.phase = Phase.SETUP
        self._work: defaultdict[tuple[Phase, str], list[Work]] = defaultdict(list)
        self._names = {module: name for name, module in modules}
        self.lives: list[Live] = []
        self._by_storage: dict[int, Live] = {}
        self.instant = 0
        self._backward_start = 0
        self.allocated_bytes = 0
        self.peak_bytes = 0
        self._stack: list[str] = []
        self._ended = ""
        self._owners: dict[int, str] = {}
        self._spans = _LayerSpans()
        self._node, self._node_since = -1, 0
        """Sequence number of the autograd node that runs, and the instant at which it was first seen to."""
        self.card_of: Callable[[str], int] = lambda layer: 0
        """The card of what a layer makes of nothing; what is made of tensors lies where the first of them does."""
        self._card = 0
        self._last = ""

    def __enter__(self) -> Self:
        # Found before anything is traced, as it takes a backward of its own.
        self._holders_of_nobodys = _holders_of_nobodys()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    @contextmanager
    def tracing(self) -> Iterator["StepTracer"]:
        """Enter the mode together with its module hooks."""
        before = register_module_forward_pre_hook(self._enter_module)
        after = register_module_forward_hook(self._leave_module, always_call=True)
        try:
            with self:
                yield self
        finally:
            before.remove()
            after.remove()

    @contextmanager
    def layer(self, name: str) -> Iterator[None]:
        """What runs inside belongs to a layer of that name, as if it were a module."""
        self._enter(name)
        try:
            yield
        finally:
            self._leave()

    def begin(self, phase: Phase) -> int:
        """All that follows belongs to `phase`; the instant of now."""
        self.phase = phase
        if phase is Phase.BACKWARD:
            self._backward_start = self.instant
        return self.instant

    def know(self, tensors: Iterable[Tensor], category: Category, layer: str = "") -> None:
        """Count tensors that exist already, or name the category of ones that were seen."""
        self._card = self.card_of(layer)
        for tensor in tensors:
            live = self._see(tensor, layer, "")
            live.category = category
            if category is Category.PARAMETER:
                self._owners[id(tensor)] = layer

    def card(self, tensor: Tensor) -> int:
        """Index of the card that a tensor lies on; 0 for one that was never seen."""
        live = self._live(tensor)
        return live.card if live else 0

    def copy_to(self, tensor: Tensor, card: int) -> Tensor:
        """A copy of a tensor on another card."""
        copy = tensor.clone()
        live = self._by_storage[self.key(copy)]
        live.card, live.category = card, Category.COMMUNICATION
        return copy

    def where(self) -> str:
        """The layer that is running, or that ran last, in words."""
        layer = self._last
        return f"layer {layer}" if layer else "the model itself"

    def take_work(self) -> dict[tuple[Phase, str], Work]:
        """What was computed since this was last asked, by phase and layer."""
        taken = {key: Work.total(parts) for key, parts in self._work.items()}
        self._work.clear()
        return taken

    def is_alive(self, storage_key: int) -> bool:
        """Whether the storage of that `key` still exists."""
        return storage_key in self._by_storage

    def born(self, storage_key: int) -> int:
        """The instant at which the living storage of that `key` was made."""
        return self._by_storage[storage_key].born

    @staticmethod
    def key(tensor: Tensor) -> int:
        """What identifies a tensor's storage while it is alive."""
        return int(tensor.untyped_storage()._cdata)

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak_bytes = self.allocated_bytes

    def timeline(self) -> Timeline:
        """All that was seen, until now."""
        end = self.instant
        return Timeline(tuple(live.allocation(end) for live in self.lives), end, self._backward_start)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE_OF:
            # Asked more often than anything is computed, whenever torch looks where a fake tensor lies.
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        kwargs = kwargs or {}
        if _is_composite(func):
            # Below autograd's own dispatch, as in the body of a banded operator, these arrive whole. They are taken
            # apart as a real run does it, not as torch's decompositions in Python do.
            with self:
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        node: Any = torch._C._current_autograd_node()
        layer = self._layer(node)
        if node is not None:
            self._enter_node(node)
            if func is _aten.add.Tensor and self._is_let_go(args[0], node):
                func = _aten.add_.Tensor
        name = str(func)
        self._last = layer
        out = run_by_shape(func, args, kwargs)
        read, made = list(_tensors(args)), list(_tensors(out))
        read.extend(_tensors(kwargs.values()))
        inputs = [live for tensor in read if (live := self._live(tensor))]
        for live in inputs:
            live.reader = self.phase, layer
        self._card = inputs[0].card if inputs else self.card_of(layer)
        inside = look_inside(func, args, self._device, self._trace_inside)
        if inside is None:
            transients = kernel_workspace(func, args, kwargs, self._device)
        else:
            transients = [Transient(len(made), inside.scratch_bytes)]
        for index, tensor in enumerate(made):
            self._allocate_briefly(transients, index, layer, name)
            live = self._see(tensor, layer, name)
            if func is _aten._to_copy.default and self._is_parameter(args[0]):
                live.category = live.category or Category.AUTOCAST
        self._allocate_briefly(transients, len(made), layer, name)
        work = inside.work if inside else operation_work(func, args, kwargs, out)
        if work.operations:
            self._work[self.phase, layer].append(work)
        return out

    def _enter_node(self, node: Any) -> None:
        number = node._sequence_nr()
        if number != self._node:
            self._node, self._node_since = number, self.instant

    def _is_let_go(self, tensor: Tensor, node: Any) -> bool:
        """Whether autograd adds a gradient, that `node` returned, to this one in place, as nobody else holds it.

        It does not where a dispatch mode is on, as here, so what it asks is asked here: who holds the tensor. A node
        may add as well while it runs. What it does in Python is held by the frame that does it; in C++ it adds what it
        has made itself, while autograd adds to what was there before, or to what the node sent to the same place.

        Source: `can_accumulate_inplace` in torch/csrc/autograd/input_buffer.cpp.
        """
        if torch.is_grad_enabled() or _holders(tensor) != self._holders_of_nobodys.get(type(tensor)):
            return False
        live = self._live(tensor)
        if live is None or not is_non_overlapping_and_dense_or_false(tensor):
            return False
        edges = [edge for edge in node.next_functions if edge[0] is not None]
        return live.born < self._node_since or len(set(edges)) < len(edges)

    def _is_parameter(self, tensor: Tensor) -> bool:
        live = self._live(tensor)
        return live is not None and live.category is Category.PARAMETER

    def _live(self, tensor: Tensor) -> Live | None:
        return self._by_storage.get(tensor.untyped_storage()._cdata)

    def _trace_inside(self, run: Callable[[], Any], inputs: list[Tensor]) -> tuple[int, Work]:
        tracer = StepTracer(device=self._device)
        tracer.know(inputs, Category.INPUT)
        before = tracer.allocated_bytes
        with tracer:
            run()
        return tracer.peak_bytes - before, Work.total(tracer.take_work().values())

    def _see(self, tensor: Tensor, layer: str, operation: str) -> Live:
        storage = tensor.untyped_storage()
        key = storage._cdata
        live = self._by_storage.get(key)
        if live is None:
            live = Live(
                storage.nbytes(),
                self.instant,
                self.phase,
                layer,
                operation,
                tuple(tensor.shape),
                tensor.dtype,
                card=self._card,
            )
            self.lives.append(live)
            self._by_storage[key] = live
            self.instant += 1
            self.allocated_bytes += live.size_bytes
            self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)
            weakref.finalize(storage, self._free, key).atexit = False
        return live

    def _free(self, key: int) -> None:
        live = self._by_storage.pop(key)
        live.died, live.freed_in = self.instant, self.phase
        self.instant += 1
        self.allocated_bytes -= live.size_bytes

    def _allocate_briefly(self, transients: list[Transient], outputs_made: int, layer: str, operation: str) -> None:
        for transient in transients:
            if transient.outputs_made == outputs_made and transient.size_bytes:
                live = Live(
                    transient.size_bytes,
                    self.instant,
                    self.phase,
                    layer,
                    operation,
                    category=Category.WORKSPACE,
                    died=self.instant + 1,
                    freed_in=self.phase,
                    card=self._card,
                )
                self.lives.append(live)
                self.instant += 2
                self.peak_bytes = max(self.peak_bytes, self.allocated_bytes + transient.size_bytes)

    def _layer(self, node: Any) -> str:
        if self._stack:
            return self._stack[-1]
        if node is not None:
            number = node._sequence_nr()
            if number == _OF_ACCUMULATION:
                return self._owners.get(id(node.variable), "")
            return self._spans.find(number)
        # Before its first node, backward makes the gradient of what forward ended with.
        return self._ended if self.phase is Phase.BACKWARD else ""

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        self._enter(self._names.get(module, self._stack[-1] if self._stack else ""))

    def _leave_module(self, module: nn.Module, _: Any, output: Any) -> None:
        name = self._stack[-1]
        for tensor in _tensors(output):
            live = self._live(tensor)
            if live is not None and name not in live.output_of:
                live.output_of += (name,)
        self._leave()

    def _enter(self, name: str) -> None:
        self._last = name
        self._stack.append(name)
        self._spans.enter(_sequence_number(), name)

    def _leave(self) -> None:
        self._ended = self._stack.pop()
        self._spans.enter(_sequence_number(), self._stack[-1] if self._stack else "")


@cache
def _is_composite(func: Any) -> bool:
    """Whether the CPU runs an operator as the operators that it is made of."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(func.name(), _COMPOSITE.name) and not has(func.name(), "CPU")


def _holders(tensor: Tensor) -> tuple[int, int, int]:
    """How many hold a tensor in Python and in C++, and how many its storage, those who ask included."""
    storage = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return sys.getrefcount(tensor), tensor._use_count(), storage  # type: ignore[attr-defined]  # The stub lacks it.


class _Probe(StepTracer):  # type: ignore[no-untyped-call]
    """Sees who holds a gradient, in the place where a trace would see it."""

    __enter__ = TorchDispatchMode.__enter__
    holders = 0, 0, 0

    def _is_let_go(self, tensor: Tensor, node: Any) -> bool:
        self.holders = _holders(tensor)
        return False


@cache
def _holders_of_nobodys() -> Mapping[type, tuple[int, int, int]]:
    """What `_holders` says of a gradient that nobody but autograd holds, fake or real: of ones made for the purpose."""
    found: dict[type, tuple[int, int, int]] = {}
    for kind, mode in ((FakeTensor, FakeTensorMode()), (Tensor, nullcontext())):
        probe = _Probe()
        with unset_fake_temporarily(), mode, torch.enable_grad(), probe:
            x = torch.ones(1, requires_grad=True) * 1
            torch.autograd.backward(x * 2 + x * 3)
        found[kind] = probe.holders
    return found


def _sequence_number() -> int:
    number: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
    return number


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in what an operator takes or returns, or a module returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | ValuesView):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, Mapping):
        yield from _tensors(value.values())
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _tensors(vars(value).values())
