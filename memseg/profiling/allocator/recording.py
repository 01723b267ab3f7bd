"""Memory snapshots that torch recorded on a GPU, read safely, and what other settings would have reserved.

`torch.cuda.memory._dump_snapshot` writes a pickle, and a pickle can run code when it is loaded. Here one is loaded
that holds nothing but containers, numbers and text. Its trace names allocations by address; as events under keys it
can be replayed under any settings.

A recording usually begins in the middle. What was alive then is known only by its free or from the last state, and in
which order it was allocated is not known. Such gaps are told in `DeviceRecording.unknown`.

Source: torch/csrc/cuda/Module.cpp (memorySnapshot); of torch 2.14.1 torch/cuda/memory.py.
"""

import pickle
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from memseg.errors import InputError
from memseg.profiling.allocator.replay import EMPTY_CACHE, FREE, REQUEST_FREE, Event, Replay, replay
from memseg.profiling.allocator.settings import AllocatorSettings

_T = TypeVar("_T", int, str, dict[str, Any], list[Any])

_COMMON_POOL = (0, 0)
_MOST_BYTES = 2**60
"""torch refuses larger requests."""
_SEGMENT_SIGNS = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}
_SILENT = {"snapshot", "oom", "annotate", "user_defined"}
_NOT_A_PICKLE = (
    pickle.UnpicklingError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
)
"""What pickle raises on bytes that are no pickle, or half of one."""
_HOW_TO_RECORD = (
    "record with torch.cuda.memory._record_memory_history() before the step and "
    "torch.cuda.memory._dump_snapshot(path) after it"
)


@dataclass(frozen=True)
class DeviceRecording:
    """What happened on one device."""

    device: int
    events: tuple[Event, ...]
    """First what was alive before, by address, then what was recorded."""
    num_alive_before: int
    """How many of the events belong to what was alive before the recording began."""
    alive_before_bytes: int
    """Requested for it."""
    reserved_before_bytes: int
    """By the device, when the recording began."""
    peak_reserved_bytes: int
    """By the device, during the recording: measured, not replayed."""
    unknown: tuple[str, ...]
    """What the recording does not say, and what is done about it."""


@dataclass(frozen=True)
class Recording:
    """A snapshot that torch recorded: the devices on which something happened, and the allocator's settings."""

    devices: tuple[DeviceRecording, ...]
    settings: AllocatorSettings


def replay_recording(
    recording: Recording, settings: AllocatorSettings | None = None, capacity_bytes: int | None = None
) -> dict[int, Replay]:
    """What the allocator would have held on each device, by its index.

    Args:
        recording: Of `read_snapshot`.
        settings: Those to try; None: those of the recording.
        capacity_bytes: What the driver of each device can give; None: without limit.
    """
    chosen = settings or recording.settings
    return {device.device: replay(device.events, chosen, capacity_bytes) for device in recording.devices}


def read_snapshot(path: Path) -> Recording:
    """A snapshot that `torch.cuda.memory._dump_snapshot` wrote. Nothing in the file is executed.

    Raises:
        InputError: there is no such file, it is no such pickle, a part is not as torch writes it, or nothing was
            recorded in it.
    """
    try:
        with path.open("rb") as file:
            content = _PlainUnpickler(file).load()
    except OSError as error:
        raise InputError(f"{path}: must be a readable file, got: {error.strerror}; {_HOW_TO_RECORD}") from None
    except _NOT_A_PICKLE as error:
        raise InputError(f"{path}: must be a whole memory snapshot of torch, got: {error}; {_HOW_TO_RECORD}") from None
    if not isinstance(content, dict) or not {"segments", "device_traces"} <= content.keys():
        raise InputError(f"{path}: must be a snapshot with segments and device_traces; {_HOW_TO_RECORD}")
    segments = [
        _checked(segment, dict, f"{path}: segments[{index}]")
        for index, segment in enumerate(_field(content, "segments", list, f"{path}"))
    ]
    settings, gaps = _settings(_field(content, "allocator_settings", dict, f"{path}", {}), f"{path}")
    devices = []
    for device, trace in enumerate(_field(content, "device_traces", list, f"{path}")):
        where = f"{path}: device_traces[{device}]"
        if _checked(trace, list, where):
            own = [segment for segment in segments if segment.get("device") == device]
            devices.append(_DeviceReader(device, where).read(trace, own, f"{path}: segments", gaps))
    if not any(device.events for device in devices):
        raise InputError(f"{path}: must hold recorded allocations, got none; {_HOW_TO_RECORD}")
    return Recording(tuple(devices), settings)


def _settings(stated: dict[str, Any], where: str) -> tuple[AllocatorSettings, tuple[str, ...]]:
    text = _field(stated, "PYTORCH_CUDA_ALLOC_CONF", str, f"{where}: allocator_settings", "")
    try:
        return AllocatorSettings.parse(text), ()
    except InputError:
        return AllocatorSettings(), (f"settings ({text}) are not modelled; torch's defaults are taken for them",)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"an object of {module}.{name}, which no snapshot has and which is not loaded")


class _DeviceReader:
    """Turns one device's trace and last state into events under keys of our own: addresses come again."""

    def __init__(self, device: int, where: str) -> None:
        self._device = device
        self._where = where
        self._next_key = 0
        self._before: list[tuple[int, Event]] = []
        """(address, allocation) of what was alive before."""
        self._events: list[Event] = []
        self._alive: dict[int, int] = {}
        """Keys by address, of what is allocated or still in use by another stream."""
        self._gaps: Counter[str] = Counter()

    def read(
        self, trace: list[Any], segments: list[dict[str, Any]], where: str, gaps: tuple[str, ...]
    ) -> DeviceRecording:
        entries = [_checked(entry, dict, f"{self._where}[{index}]") for index, entry in enumerate(trace)]
        actions = [_field(entry, "action", str, f"{self._where}[{index}]") for index, entry in enumerate(entries)]
        completes = "free_completed" in actions
        change = most = 0
        for index, (action, entry) in enumerate(zip(actions, entries, strict=True)):
            place = f"{self._where}[{index}]"
            if action in ("alloc", "free_requested", "free_completed"):
                self._allocation(action, entry, place, completes=completes)
            elif action in _SEGMENT_SIGNS:
                change += _SEGMENT_SIGNS[action] * _size(entry, place)
                most = max(most, change)
                if _SEGMENT_SIGNS[action] < 0 and _ends_empty_cache(entries, actions, index):
                    self._events.append(Event(0, EMPTY_CACHE))
            elif action not in _SILENT:
                self._gaps[f"entries with the action {action!r}, which are passed over"] += 1
        reserved = self._last_state(segments, where)
        before = max(reserved - change, 0)
        if self._before:
            self._gaps["blocks that were alive before the recording began; they are replayed first, by address"] = len(
                self._before
            )
        allocations = [event for _, event in sorted(self._before)]
        return DeviceRecording(
            self._device,
            (*allocations, *self._events),
            len(allocations),
            sum(event.size_bytes for event in allocations),
            before,
            before + most,
            (*gaps, *(f"{count} {gap}" for gap, count in self._gaps.items())),
        )

    def _allocation(self, action: str, entry: dict[str, Any], where: str, *, completes: bool) -> None:
        address, size = _field(entry, "addr", int, where), _size(entry, where)
        stream = _field(entry, "stream", int, where, 0)
        if action == "alloc":
            if address in self._alive:
                self._gaps["frees that are missing; they are taken to be where the address is used again"] += 1
                self._events.append(Event(self._alive.pop(address), FREE))
            if entry.get("pool_id", _COMMON_POOL) != _COMMON_POOL:
                self._gaps["allocations from private pools; they are replayed in the common ones"] += 1
            self._alive[address] = self._new_key()
            self._events.append(Event(self._alive[address], size, stream))
            return
        if address not in self._alive:
            self._was_alive(address, size, stream)
        if action == "free_requested" and completes:
            self._events.append(Event(self._alive[address], REQUEST_FREE))
            return
        key = self._alive.pop(address)
        if self._events and self._events[-1] == (key, REQUEST_FREE, 0):
            self._events.pop()
        self._events.append(Event(key, FREE))

    def _last_state(self, segments: list[dict[str, Any]], where: str) -> int:
        """Find what was alive all the time; bytes reserved at the end."""
        found = set()
        total = 0
        for segment in segments:
            address = _field(segment, "address", int, where)
            total += _size(segment, where, "total_size")
            stream = _field(segment, "stream", int, where, 0)
            for block in _field(segment, "blocks", list, where):
                size = _size(_checked(block, dict, where), where)
                if _field(block, "state", str, where) != "inactive":
                    found.add(address)
                    if address not in self._alive:
                        self._was_alive(address, _size(block, where, "requested_size", size), stream)
                address += size
        lost = len(self._alive.keys() - found)
        if lost:
            self._gaps["blocks whose free is missing; they are taken to stay"] = lost
        return total

    def _was_alive(self, address: int, size: int, stream: int) -> None:
        self._alive[address] = self._new_key()
        self._before.append((address, Event(self._alive[address], size, stream)))

    def _new_key(self) -> int:
        self._next_key += 1
        return self._next_key


def _ends_empty_cache(entries: list[dict[str, Any]], actions: list[str], index: int) -> bool:
    """Whether a segment is the last that one call of empty_cache gave back.

    Segments are given back as well to make room for a request, before a new one is asked for. Frames tell; without
    them it is taken to be so where a new segment or a refusal follows.
    """
    following = index + 1
    while following < len(actions) and actions[following] == "free_completed":
        following += 1
    after = actions[following] if following < len(actions) else ""
    if after in ("segment_free", "segment_unmap"):
        return False
    frames = entries[index].get("frames")
    if isinstance(frames, list) and frames:
        return any(isinstance(frame, dict) and frame.get("name") == "empty_cache" for frame in frames)
    return after not in ("segment_alloc", "segment_map", "oom")


def _field(holder: dict[str, Any], name: str, kind: type[_T], where: str, default: _T | None = None) -> _T:
    return _checked(holder.get(name, default), kind, f"{where}.{name}" if "[" in where else f"{where}: {name}")


def _size(holder: dict[str, Any], where: str, name: str = "size", default: int | None = None) -> int:
    size = _field(holder, name, int, where, default)
    if not 0 <= size < _MOST_BYTES:
        raise InputError(f"{where}: {name} must be from 0 to 2**60 bytes, got {size}; {_HOW_TO_RECORD}")
    return size


def _checked(value: Any, kind: type[_T], where: str) -> _T:
    if not isinstance(value, kind):
        raise InputError(f"{where}: must be {kind.__name__}, got {type(value).__name__}; {_HOW_TO_RECORD}")
    return value
