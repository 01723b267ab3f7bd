"""A recording under several settings of the allocator, as values: which of them would have reserved less, or fitted.

Somebody out of memory reads of a dozen settings that are said to help. Each can be tried on the card, one run after
the other; or on a recording of one step, all at once, under any capacity. `replay_view` and `replay_curve` show it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from memseg.profiling.allocator.recording import DeviceRecording, Recording
from memseg.profiling.allocator.replay import Replay
from memseg.profiling.allocator.replay import replay as replay_events
from memseg.profiling.allocator.settings import AllocatorSettings

_WORTH_KNOWING = ("expandable_segments:True", "max_split_size_mb:128", "roundup_power2_divisions:4")
_COLLECTING = "garbage_collection_threshold:0.8"
DEFAULTS = "torch's defaults"
"""What settings without a text are called."""


@dataclass(frozen=True)
class Trial:
    """What one device would have held under one set of settings."""

    settings: AllocatorSettings
    is_own: bool
    """Whether the recording was made under them."""
    replay: Replay

    @property
    def name(self) -> str:
        """The settings in words."""
        return settings_name(self.settings)


@dataclass(frozen=True)
class DeviceTrials:
    """A device, and what it would have held under each set of settings."""

    recording: DeviceRecording
    trials: tuple[Trial, ...]
    """The first is that under its own settings."""

    @property
    def own(self) -> Trial:
        """Under the recording's own settings."""
        return self.trials[0]

    @property
    def best(self) -> Trial | None:
        """The one that reserves least of those that fit; None where none of them does better than its own."""
        fitting = [one for one in self.trials if one.replay.out_of_memory is None]
        least = min(fitting, key=lambda one: one.replay.peak_reserved_bytes, default=None)
        if least is None or least.is_own:
            return None
        own = self.own.replay
        is_better = own.out_of_memory is not None or least.replay.peak_reserved_bytes < own.peak_reserved_bytes
        return least if is_better else None


@dataclass(frozen=True)
class ReplayReport:
    """A recording, and what was tried on it."""

    recording: Recording
    settings: tuple[AllocatorSettings, ...]
    """Those of the recording, then the others."""
    capacity_bytes: int | None
    devices: tuple[DeviceTrials, ...]

    @property
    def notes(self) -> list[str]:
        """Which settings do nothing here, and why."""
        notes = []
        for one in self.settings:
            name, is_limited = settings_text(one), one.per_process_memory_fraction < 1
            if one.garbage_collection_threshold and not (is_limited and self.capacity_bytes is not None):
                notes.append(
                    f"{name}: torch collects garbage only below a memory fraction, so it does nothing here without "
                    "per_process_memory_fraction and --capacity"
                )
            elif is_limited and self.capacity_bytes is None:
                notes.append(f"{name}: a fraction is of what the device has; say that with --capacity")
        return notes


def try_settings(
    recording: Recording, others: Sequence[AllocatorSettings] | None = None, capacity_bytes: int | None = None
) -> ReplayReport:
    """Replay a recording under its own settings and under others.

    Args:
        recording: Of `read_snapshot`.
        others: To try; None: a few worth knowing. What is there twice is tried once.
        capacity_bytes: What the driver of each device can give; None: without limit.
    """
    chosen = worth_knowing(recording.settings, capacity_bytes) if others is None else others
    settings = tuple(dict.fromkeys((recording.settings, *chosen)))
    devices = [
        DeviceTrials(
            device,
            tuple(
                Trial(one, one == recording.settings, replay_events(device.events, one, capacity_bytes))
                for one in settings
            ),
        )
        for device in recording.devices
    ]
    return ReplayReport(recording, settings, capacity_bytes, tuple(devices))


def worth_knowing(own: AllocatorSettings, capacity_bytes: int | None) -> list[AllocatorSettings]:
    """torch's defaults and the settings that most often help, each alone; a memory fraction is kept in all of them.

    >>> [settings_name(one) for one in worth_knowing(AllocatorSettings(), None)]
    ["torch's defaults", 'expandable_segments:True', 'max_split_size_mb:128', 'roundup_power2_divisions:4']
    >>> worth_knowing(AllocatorSettings.parse("per_process_memory_fraction:0.9"), 2**33)[-1].text
    'garbage_collection_threshold:0.8,per_process_memory_fraction:0.9'
    """
    texts = ["", *_WORTH_KNOWING]
    if capacity_bytes is not None and own.per_process_memory_fraction < 1:
        texts.append(_COLLECTING)
    fraction = own.per_process_memory_fraction
    return [replace(AllocatorSettings.parse(text), per_process_memory_fraction=fraction) for text in texts]


def settings_text(settings: AllocatorSettings) -> str:
    """What to put into PYTORCH_CUDA_ALLOC_CONF, with one number where powers of two are divided alike everywhere.

    >>> settings_text(AllocatorSettings.parse("roundup_power2_divisions:4,max_split_size_mb:128"))
    'max_split_size_mb:128,roundup_power2_divisions:4'
    """
    divisions = settings.roundup_power2_divisions
    if len(set(divisions)) > 1 or not divisions[0]:
        return settings.text
    return re.sub(r"(roundup_power2_divisions:)\[[^]]*\]", rf"\g<1>{divisions[0]}", settings.text)


def settings_name(settings: AllocatorSettings) -> str:
    """The same for people.

    >>> settings_name(AllocatorSettings())
    "torch's defaults"
    """
    return settings_text(settings) or DEFAULTS


def replay_object(report: ReplayReport) -> dict[str, Any]:
    """What was tried, for programs: bytes are integers, events are indices into all that were replayed."""
    return {
        "settings": settings_text(report.recording.settings),
        "capacity_bytes": report.capacity_bytes,
        "devices": [_device_object(device) for device in report.devices],
        "notes": report.notes,
    }


def _device_object(device: DeviceTrials) -> dict[str, Any]:
    recording = device.recording
    return {
        "device": recording.device,
        "events": len(recording.events),
        "alive_before": recording.num_alive_before,
        "alive_before_bytes": recording.alive_before_bytes,
        "reserved_before_bytes": recording.reserved_before_bytes,
        "measured_peak_reserved_bytes": recording.peak_reserved_bytes,
        "unknown": list(recording.unknown),
        "best_settings": settings_text(device.best.settings) if device.best else None,
        "replays": [_trial_object(trial) for trial in device.trials],
    }


def _trial_object(trial: Trial) -> dict[str, Any]:
    found = trial.replay
    refused = None
    if found.out_of_memory is not None:
        refused = {
            "event": found.out_of_memory_event,
            "requested_bytes": found.out_of_memory.requested_bytes,
            "needed_bytes": found.out_of_memory.needed_bytes,
            "free_bytes": found.out_of_memory.free_bytes,
            "allocated_bytes": found.out_of_memory.allocated_bytes,
            "reserved_bytes": found.out_of_memory.reserved_bytes,
            "largest_free_block_bytes": found.out_of_memory.largest_free_block_bytes,
        }
    return {
        "settings": settings_text(trial.settings),
        "own": trial.is_own,
        "peak_allocated_bytes": found.peak_allocated_bytes,
        "peak_allocated_event": found.peak_allocated_event,
        "peak_requested_bytes": found.peak_requested_bytes,
        "peak_active_bytes": found.peak_active_bytes,
        "peak_reserved_bytes": found.peak_reserved_bytes,
        "peak_reserved_event": found.peak_reserved_event,
        "reserved_but_not_allocated_bytes": found.unallocated_bytes,
        "largest_free_block_bytes": found.largest_free_block_bytes,
        "segments": found.num_segments,
        "out_of_memory": refused,
    }
