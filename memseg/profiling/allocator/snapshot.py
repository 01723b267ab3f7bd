"""A prediction as a memory snapshot of torch, so that torch's viewers show it.

`torch.cuda.memory._dump_snapshot` writes what a GPU's allocator did as a pickle, which pytorch.org/memory_viz and
`python -m torch.cuda._memory_viz` show: a curve by allocation, the segments at every moment, tables. A pickle in that
form, made by replaying a trace, is looked at with the same tools, before there is a GPU.

Source: torch/csrc/cuda/Module.cpp (memorySnapshot), torch/utils/viz/MemoryViz.js; of torch 2.14.1
torch/cuda/memory.py, torch/cuda/_memory_viz.py and the keys in libtorch_python.so.
"""

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from memseg.files import replace_file
from memseg.profiling.allocator.caching import CachingAllocator, Segment
from memseg.profiling.allocator.replay import EMPTY_CACHE, Event, perform
from memseg.profiling.allocator.settings import AllocatorSettings

_COMMON_POOL = (0, 0)
_PROTOCOL = 4
"""Of the pickle: the latest that the viewer on pytorch.org reads."""


def write_snapshot(
    events: Iterable[Event],
    path: Path,
    names: Mapping[int, Mapping[str, str]] | None = None,
    settings: AllocatorSettings | None = None,
    capacity_bytes: int | None = None,
) -> None:
    """Write what torch's allocator would record during `events`, as `_dump_snapshot` writes it.

    Args:
        events: As for `replay`; what follows a request that is refused is left out, and the refusal is recorded.
        path: Of the file; its folder exists.
        names: By key, what an allocation is: names by kind, the innermost first. The viewers show each as a frame
            `kind:0:name`, and colour by the kind "category" where it is given.
        settings: torch's defaults where none are given.
        capacity_bytes: What the driver can give; None: without limit.

    Raises:
        OSError: the folder cannot be written, or the disk is full; the old file is as it was.
    """
    writer = _Writer(names or {})
    allocator = CachingAllocator(settings, capacity_bytes, listener=writer.note)
    for index, event in enumerate(events):
        writer.begin(index, event)
        if perform(allocator, event) is not None:
            break
    replace_file(path, pickle.dumps(writer.snapshot(allocator), protocol=_PROTOCOL))


class _Writer:
    """Collects the trace. Equal frames are one object, which a pickle stores once."""

    def __init__(self, names: Mapping[int, Mapping[str, str]]) -> None:
        self._names = names
        self._trace: list[dict[str, Any]] = []
        self._stacks: dict[tuple[tuple[str, str], ...], list[dict[str, Any]]] = {}
        self._stack_at: dict[int, list[dict[str, Any]]] = {}
        self._segment_stack_at: dict[int, list[dict[str, Any]]] = {}
        self._time = 0
        self._current: Mapping[str, str] = {}

    def begin(self, index: int, event: Event) -> None:
        """What is noted from now on comes from this event."""
        self._time = index
        if event.size_bytes == EMPTY_CACHE:
            self._current = {"torch/cuda/memory.py": "empty_cache"}
        else:
            self._current = self._names.get(event.key, {})

    def note(self, action: str, address: int, size: int, stream: int) -> None:
        """Listen to the allocator."""
        stack = self._stack(self._current)
        if action in ("free_requested", "free_completed"):
            stack = self._stack_at[address]
        elif action == "alloc":
            self._stack_at[address] = stack
        elif action in ("segment_alloc", "segment_map"):
            self._segment_stack_at[address] = stack
        entry = {
            "action": action,
            "device_free" if action == "oom" else "addr": address,
            "size": size,
            "stream": stream,
            "frames": stack,
            "compile_context": "N/A",
            "user_metadata": "",
            "time_us": self._time,
            "pool_id": _COMMON_POOL,
        }
        if action == "alloc" and "category" in self._current:
            entry["category"] = self._current["category"]
        self._trace.append(entry)

    def snapshot(self, allocator: CachingAllocator) -> dict[str, Any]:
        """The whole file, of which the trace is a part."""
        segments = [self._segment(segment) for segment in allocator.segments()]
        self._current = {}
        self.note("snapshot", 0, allocator.active_bytes, 0)
        settings = allocator.settings
        return {
            "segments": segments,
            "device_traces": [self._trace],
            "allocator_settings": {
                "PYTORCH_CUDA_ALLOC_CONF": settings.text,
                "max_split_size": (settings.max_split_size_mb or 0) * 2**20 or -1,
                "garbage_collection_threshold": settings.garbage_collection_threshold,
                "expandable_segments": settings.expandable_segments,
                "pinned_num_register_threads": 1,
                "release_lock_on_cudamalloc": False,
                "pinned_use_cuda_host_register": False,
                "graph_capture_record_stream_reuse": False,
                "max_round_threshold": -1,
                "max_cached_size": -1,
                "roundup_power2_divisions": {
                    str(2**index): count for index, count in enumerate(settings.roundup_power2_divisions)
                },
            },
            "external_annotations": [],
            "host_segments": [],
            "host_traces": [],
        }

    def _segment(self, segment: Segment) -> dict[str, Any]:
        active = [block for block in segment.blocks if block.state != "inactive"]
        return {
            "device": 0,
            "address": segment.address,
            "total_size": segment.size_bytes,
            "allocated_size": sum(block.size_bytes for block in active if block.state == "active_allocated"),
            "active_size": sum(block.size_bytes for block in active),
            "requested_size": sum(block.requested_bytes for block in active),
            "stream": segment.stream,
            "segment_type": "small" if segment.is_small else "large",
            "segment_pool_id": _COMMON_POOL,
            "is_expandable": segment.is_expandable,
            "frames": self._segment_stack_at.get(segment.address, []),
            "blocks": [
                {
                    "address": block.address,
                    "size": block.size_bytes,
                    "requested_size": block.requested_bytes,
                    "state": block.state,
                    "frames": [] if block.state == "inactive" else self._stack_at[block.address],
                }
                for block in segment.blocks
            ],
        }

    def _stack(self, names: Mapping[str, str]) -> list[dict[str, Any]]:
        key = tuple(names.items())
        if key not in self._stacks:
            self._stacks[key] = [{"name": name, "filename": kind, "line": 0} for kind, name in key]
        return self._stacks[key]
