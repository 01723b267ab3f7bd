"""One training step on fake tensors: what would be allocated, by which layer, and how much work it would be.

Fake tensors have shapes and storages but no memory, so a step of any size runs on any machine. A dispatch mode sees
every operation below autograd: each storage that an operation returns for the first time is an allocation, and its
end is seen through a weak reference. What a kernel allocates and frees inside itself is not seen: for convolutions
`memseg.profiling.workspace` knows it, for operators of ours `memseg.profiling.scratch`.

Layers are known in forward by module hooks. In backward the running autograd node tells: its sequence number lies
between those that were current when its module was entered and left.
"""

import weakref
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from memseg.planning.costs import Work
from memseg.profiling.scratch import operator_scratch
from memseg.profiling.timeline import Allocation, Category, Phase, Timeline
from memseg.profiling.workspace import Transient, convolution_workspace

_aten = torch.ops.aten
_COMPOSITE = {_aten.conv2d.default, _aten.conv2d.padding, _aten.linear.default}
_FREE_OF_TRAFFIC = {_aten.empty, _aten.new_empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty_strided}


@dataclass
class _Live:
    """A storage while it is, and after it was, alive."""

    size_bytes: int
    born: int
    phase: Phase
    layer: str
    died: int | None = None
    freed_in: Phase | None = None
    category: Category | None = None


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
        self.work: defaultdict[tuple[Phase, str], Work] = defaultdict(lambda: Work(0, 0))
        self._names = {module: name for name, module in modules}
        self._lives: list[_Live] = []
        self._by_storage: dict[int, _Live] = {}
        self._instant = 0
        self._backward_start = 0
        self.allocated_bytes = 0
        self.peak_bytes = 0
        self._stack: list[str] = []
        self._spans = _LayerSpans()

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

    def begin(self, phase: Phase) -> None:
        """All that follows belongs to `phase`."""
        self.phase = phase
        if phase is Phase.BACKWARD:
            self._backward_start = self._instant

    def know(self, tensors: Iterable[Tensor], category: Category, layer: str = "") -> None:
        """Count tensors that exist already, or name the category of ones that were seen."""
        for tensor in tensors:
            live = self._see(tensor, layer)
            live.category = category

    def is_alive(self, storage_key: int) -> bool:
        """Whether the storage of that `key` still exists."""
        return storage_key in self._by_storage

    @staticmethod
    def key(tensor: Tensor) -> int:
        """What identifies a tensor's storage while it is alive."""
        return int(tensor.untyped_storage()._cdata)

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak_bytes = self.allocated_bytes

    def timeline(self) -> Timeline:
        """All that was seen, until now."""
        end = self._instant
        return Timeline(
            tuple(
                Allocation(
                    live.size_bytes,
                    live.born,
                    end if live.died is None else live.died,
                    live.phase,
                    live.category or self._category_of(live),
                    live.layer,
                )
                for live in self._lives
            ),
            end,
            self._backward_start,
        )

    @staticmethod
    def _category_of(live: _Live) -> Category:
        crosses = live.phase is Phase.FORWARD and live.freed_in is not Phase.FORWARD
        return Category.SAVED if crosses else Category.TEMPORARY

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _COMPOSITE:
            # Below autograd's own dispatch, as in the body of a banded operator, these arrive whole.
            with self:
                return func.decompose(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        layer = self._layer()
        made = _tensors(out)
        if func.overloadpacket is _aten.native_batch_norm_backward:
            # Fake ones are made of all three gradients, real ones of those that are wanted.
            made = [tensor for tensor, wanted in zip(out, args[9], strict=True) if wanted]
        transients = convolution_workspace(func, args, self._device)
        scratch = operator_scratch(func, args, self._device, self._peak_of)
        if scratch is not None:
            transients.append(Transient(len(made), scratch))
        for index, tensor in enumerate(made):
            self._allocate_briefly(transients, index, layer)
            self._see(tensor, layer)
        self._allocate_briefly(transients, len(made), layer)
        self._count_work(func, args, kwargs or {}, out, layer)
        return out

    def _peak_of(self, run: Callable[[], Any], inputs: list[Tensor]) -> int:
        tracer = StepTracer(device=self._device)
        tracer.know(inputs, Category.INPUT)
        before = tracer.allocated_bytes
        with tracer:
            run()
        return tracer.peak_bytes - before

    def _see(self, tensor: Tensor, layer: str) -> _Live:
        storage = tensor.untyped_storage()
        key = storage._cdata
        live = self._by_storage.get(key)
        if live is None:
            live = _Live(storage.nbytes(), self._instant, self.phase, layer)
            self._lives.append(live)
            self._by_storage[key] = live
            self._instant += 1
            self.allocated_bytes += live.size_bytes
            self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)
            weakref.finalize(storage, self._free, key).atexit = False
        return live

    def _free(self, key: int) -> None:
        live = self._by_storage.pop(key)
        live.died, live.freed_in = self._instant, self.phase
        self._instant += 1
        self.allocated_bytes -= live.size_bytes

    def _allocate_briefly(self, transients: list[Transient], outputs_made: int, layer: str) -> None:
        for transient in transients:
            if transient.outputs_made == outputs_made and transient.size_bytes:
                born = self._instant
                self._lives.append(
                    _Live(transient.size_bytes, born, self.phase, layer, born + 1, self.phase, Category.WORKSPACE)
                )
                self._instant += 2
                self.peak_bytes = max(self.peak_bytes, self.allocated_bytes + transient.size_bytes)

    def _count_work(self, func: Any, args: Any, kwargs: Any, out: Any, layer: str) -> None:
        packet = func.overloadpacket
        flops = moved = 0
        if packet in flop_registry:
            flops = int(flop_registry[packet](*args, **kwargs, out_val=out))
        if packet not in _FREE_OF_TRAFFIC and not func.is_view and (not flops or func.namespace != "aten"):
            moved = sum(_size_bytes(tensor) for tensor in _tensors((args, kwargs, out)))
        self.work[self.phase, layer] += Work(flops, moved)

    def _layer(self) -> str:
        if self._stack:
            return self._stack[-1]
        node = torch._C._current_autograd_node()
        return self._spans.find(node._sequence_nr()) if node is not None else ""

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        name = self._names.get(module, self._stack[-1] if self._stack else "")
        self._stack.append(name)
        self._spans.enter(_sequence_number(), name)

    def _leave_module(self, module: nn.Module, _: Any, __: Any) -> None:
        self._stack.pop()
        self._spans.enter(_sequence_number(), self._stack[-1] if self._stack else "")


def _sequence_number() -> int:
    number: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
    return number


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _size_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
