"""What PYTORCH_CUDA_ALLOC_CONF says, as a value: the options that decide how much memory torch's allocator reserves.

torch reads the text when CUDA starts and passes over much that is wrong in it: `max_split_size_mb:128abc` is 128, and
a mistyped `=` joins two words into one key. Here the text is read strictly and without CUDA, so that a setting can be
tried before it is used. Options that only concern pinned host memory or locking are read and change nothing.

Source: c10/core/AllocatorConfig.cpp, c10/cuda/CUDAAllocatorConfig.cpp; ranges as libc10 of torch 2.14.1 checks them.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from memseg.errors import ProblemsError, suggest

MIN_BLOCK_BYTES = 512
"""Every block is a multiple of it, unless powers of two round further (kMinBlockSize)."""
SMALL_BYTES = 2**20
"""The largest request that the small pool serves (kSmallSize)."""
SMALL_SEGMENT_BYTES = 2 * 2**20
"""What the small pool asks of the driver at a time (kSmallBuffer)."""
MIN_LARGE_BYTES = 10 * 2**20
"""From here on a request gets a segment of its own size (kMinLargeAlloc)."""
ROUND_LARGE_BYTES = 2 * 2**20
"""Sizes of such segments are multiples of it (kRoundLarge)."""
_INTERVALS = 16
"""Of roundup_power2_divisions: from 1 MiB on, each twice the one before; the last is open."""


@dataclass(frozen=True)
class AllocatorSettings:
    """Options of the native CUDA allocator, by torch's names, with torch's defaults; an `_mb` counts MiB.

    Raises:
        ProblemsError: an InputError; a value is out of its range.

    >>> settings = AllocatorSettings.parse("expandable_segments:True, max_split_size_mb:128")
    >>> settings.max_split_size_mb, settings.text
    (128, 'expandable_segments:True,max_split_size_mb:128')
    """

    expandable_segments: bool = False
    """One growing segment for each pool and stream instead of many fixed ones."""
    max_split_size_mb: int | None = None
    """Blocks from this size on are never split; None: all may be."""
    max_non_split_rounding_mb: int | None = None
    """A block that must not be split serves requests smaller by less than this; None: `large_segment_size_mb`."""
    large_segment_size_mb: int = 20
    """Segment for requests from 1 to 10 MiB, and the page of expandable segments of the large pool."""
    roundup_power2_divisions: tuple[int, ...] = (0,) * _INTERVALS
    """Into how many steps each interval between powers of two is divided, from 1 MiB on; 0 and 1: not at all."""
    garbage_collection_threshold: float = 0.0
    """From this share of what is allowed on, cached segments are given back; not without a memory fraction."""
    per_process_memory_fraction: float = 1.0
    """Share of the card that the allocator may reserve."""

    def __post_init__(self) -> None:
        large = self.large_segment_size_mb
        rules = [
            ("large_segment_size_mb", large > MIN_LARGE_BYTES // 2**20, "more than 10"),
            ("max_split_size_mb", (self.max_split_size_mb or large) >= large, f"{large} (a large segment) or more"),
            (
                "max_non_split_rounding_mb",
                (self.max_non_split_rounding_mb or large) >= large,
                f"{large} (a large segment) or more",
            ),
            (
                "roundup_power2_divisions",
                len(self.roundup_power2_divisions) == _INTERVALS
                and all(count >= 0 and count & (count - 1) == 0 for count in self.roundup_power2_divisions),
                f"{_INTERVALS} powers of two or zeros",
            ),
            ("garbage_collection_threshold", 0 <= self.garbage_collection_threshold < 1, "more than 0 and less than 1"),
            ("per_process_memory_fraction", 0 <= self.per_process_memory_fraction <= 1, "from 0 to 1"),
        ]
        broken = [f"{name}: must be {rule}, got {getattr(self, name)}" for name, holds, rule in rules if not holds]
        if broken:
            raise ProblemsError("allocator settings", broken)

    @classmethod
    def parse(cls, text: str) -> "AllocatorSettings":
        """Settings from the text that PYTORCH_CUDA_ALLOC_CONF or PYTORCH_ALLOC_CONF has; "" gives the defaults.

        Raises:
            ProblemsError: an InputError that tells every unknown key and every value that is not what its key takes.
        """
        values: dict[str, Any] = {}
        problems: list[str] = []
        for pair in _pairs(text):
            key, colon, value = pair.partition(":")
            reader = _READERS.get(key)
            if not colon or not value:
                problems.append(f"{pair}: must be key:value; write for example expandable_segments:True")
            elif reader is None:
                near = suggest(key, _READERS)
                problems.append(f"{key}: unknown key; " + (f"did you mean {near}?" if near else "known: " + _KNOWN))
            else:
                try:
                    values[key] = reader(value)
                except ValueError as error:
                    problems.append(f"{key}: must be {error}, got {value}")
        if problems:
            raise ProblemsError("allocator settings", problems)
        return cls(**{key: value for key, value in values.items() if key in cls.__dataclass_fields__})

    @property
    def text(self) -> str:
        """What to put into PYTORCH_CUDA_ALLOC_CONF; `parse` gives these settings back."""
        parts = []
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value == type(self).__dataclass_fields__[name].default:
                continue
            if isinstance(value, tuple):
                value = "[" + ",".join(f"{2**index}:{count}" for index, count in enumerate(value)) + "]"
            parts.append(f"{name}:{value}")
        return ",".join(parts)

    def rounded(self, size_bytes: int) -> int:
        """Bytes of the block that a request gets.

        >>> AllocatorSettings().rounded(1), AllocatorSettings().rounded(513)
        (512, 1024)
        >>> AllocatorSettings.parse("roundup_power2_divisions:4").rounded(1200 * 2**20) // 2**20
        1280
        """
        floor = size_bytes.bit_length() - 1
        divisions = self.roundup_power2_divisions[min(max(floor - 20, 0), _INTERVALS - 1)]
        step = MIN_BLOCK_BYTES
        if divisions > 1 and size_bytes > MIN_BLOCK_BYTES * divisions:
            step = 2**floor // divisions
        return max(MIN_BLOCK_BYTES, -(-size_bytes // step) * step)

    def segment_bytes(self, block_bytes: int) -> int:
        """Bytes that are asked of the driver where no cached block serves, without expandable segments.

        >>> [AllocatorSettings().segment_bytes(mib * 2**20) // 2**20 for mib in (1, 2, 10, 11)]
        [2, 20, 10, 12]
        """
        if block_bytes <= SMALL_BYTES:
            return SMALL_SEGMENT_BYTES
        if block_bytes < MIN_LARGE_BYTES:
            return self.large_segment_size_mb * 2**20
        return -(-block_bytes // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES


def _pairs(text: str) -> list[str]:
    compact = "".join(text.split()).removesuffix(",")
    return re.split(r",(?![^\[]*\])", compact) if compact else []


def _flag(value: str) -> bool:
    if value not in ("True", "False"):
        raise ValueError("True or False")
    return value == "True"


def _whole(value: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,12}", value):
        raise ValueError("a whole number above 0")
    return int(value)


def _fraction(value: str) -> float:
    try:
        fraction = float(value)
    except ValueError:
        fraction = math.nan
    if not 0 <= fraction <= 1:
        raise ValueError("a number from 0 to 1")
    return fraction


def _threshold(value: str) -> float:
    threshold = _fraction(value)
    if not 0 < threshold < 1:
        raise ValueError("more than 0 and less than 1")
    return threshold


def _divisions(value: str) -> tuple[int, ...]:
    """Of each interval. The first boundary's value also holds below it, that of `>` above the one before it."""
    rule = "a power of two, or a list as in [256:1,512:2,>:4] of boundaries in MiB and divisions, all powers of two"
    if _is_power(value):
        return (int(value),) * _INTERVALS
    if not re.fullmatch(r"\[([^:,\[\]]+:[^:,\[\]]+(,|(?=\])))*\]", value):
        raise ValueError(rule)
    counts = [0] * _INTERVALS
    last: int | None = None
    for boundary, count in (pair.split(":") for pair in value[1:-1].split(",") if pair):
        if not (count == "0" or _is_power(count)) or not (boundary == ">" or _is_power(boundary)):
            raise ValueError(rule)
        if boundary == ">":
            above = (last or 0) + 1
            counts[above:] = [int(count)] * (_INTERVALS - above)
            continue
        index = min(int(boundary).bit_length() - 1, _INTERVALS - 1)
        if last is None:
            counts[:index] = [int(count)] * index
        counts[index] = int(count)
        last = index
    return tuple(counts)


def _is_power(text: str) -> bool:
    return bool(re.fullmatch(r"[1-9][0-9]{0,12}", text)) and int(text).bit_count() == 1


def _native(value: str) -> str:
    if value != "native":
        raise ValueError("native: what cudaMallocAsync reserves is the driver's affair and not modelled")
    return value


def _never(value: str) -> bool:
    if value != "False":
        raise ValueError("False: refusing before the driver does is not modelled")
    return False


_READERS: dict[str, Callable[[str], object]] = {
    "expandable_segments": _flag,
    "max_split_size_mb": _whole,
    "max_non_split_rounding_mb": _whole,
    "large_segment_size_mb": _whole,
    "roundup_power2_divisions": _divisions,
    "garbage_collection_threshold": _threshold,
    "per_process_memory_fraction": _fraction,
    "backend": _native,
    "throw_on_cudamalloc_oom": _never,
    # These change nothing on the device.
    "graph_capture_record_stream_reuse": _flag,
    "pinned_free_catch_all": _flag,
    "pinned_max_cached_size_mb": _whole,
    "pinned_max_round_threshold_mb": _whole,
    "pinned_num_register_threads": _whole,
    "pinned_reserve_segment_size_mb": _whole,
    "pinned_use_background_threads": _flag,
    "pinned_use_cuda_host_register": _flag,
    "pinned_use_hip_host_register": _flag,
    "release_lock_on_cudamalloc": _flag,
    "release_lock_on_hipmalloc": _flag,
}
_KNOWN = ", ".join(AllocatorSettings.__dataclass_fields__)
