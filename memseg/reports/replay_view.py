"""A recording under several settings, on a terminal: a table for each device, and what the recording does not say."""

from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from memseg.profiling.allocator.replay import Replay
from memseg.reports.replay import DeviceTrials, ReplayReport, Trial, settings_name, settings_text
from memseg.units import GIB


@dataclass(frozen=True)
class Unit:
    """One unit for all figures of a device, so that they can be compared down a column and fit beside each other."""

    size_bytes: int
    name: str
    digits: int

    @classmethod
    def suiting(cls, size: int) -> "Unit":
        """The unit in which a size is read best.

        >>> Unit.suiting(450 * 2**20).text(450 * 2**20), Unit.suiting(2**30).text(2**31)
        ('450.0 MiB', '2.000 GiB')
        """
        return cls(GIB, "GiB", 3) if size >= GIB else cls(2**20, "MiB", 1)

    def number(self, size: int) -> str:
        """A size in this unit."""
        return f"{size / self.size_bytes:.{self.digits}f}"

    def text(self, size: int) -> str:
        """The same with the unit's name."""
        return f"{self.number(size)} {self.name}"


def replay_view(report: ReplayReport, *, name: str) -> RenderableType:
    """Headline, then for each device a table of the settings, what was refused, and what is not known.

    Args:
        report: To show.
        name: Of the recording's file.
    """
    capacity = report.capacity_bytes
    lines: list[RenderableType] = [
        Text(f"{name}, recorded under {settings_name(report.recording.settings)}", style="bold")
    ]
    if capacity is not None:
        lines.append(Text(f"replayed on {Unit.suiting(capacity).text(capacity)} for each device"))
    for device in report.devices:
        lines += [Text(), *_device(device, has_limit=capacity is not None)]
    legend = "peaks; idle: reserved but not allocated when most is reserved; active: with what other streams still use"
    lines += [Text(), Text(legend, style="dim"), *(Text(note, style="yellow") for note in report.notes)]
    return Group(*lines)


def measured_line(device: DeviceTrials, unit: Unit, *, has_limit: bool = False) -> str:
    """What the recording says was reserved at most, beside the replay under its own settings without a limit."""
    measured, replayed = device.recording.peak_reserved_bytes, device.own.replay.peak_reserved_bytes
    line = f"recorded: at most {unit.text(measured)} reserved"
    if device.own.replay.out_of_memory is not None or not measured or has_limit:
        return line
    if measured == replayed:
        return f"{line}, and the replay says the same"
    return f"{line}; the replay says {unit.text(replayed)}, {100 * (replayed / measured - 1):+z.1f} %"


def best_line(device: DeviceTrials, unit: Unit) -> str:
    """The settings that do better than the recording's own, as they are given to torch; "" where none do."""
    if device.best is None:
        return ""
    best, own = device.best.replay, device.own.replay
    if own.out_of_memory is not None:
        gain = f"fits, with {unit.text(best.peak_reserved_bytes)} reserved"
    else:
        saved = own.peak_reserved_bytes - best.peak_reserved_bytes
        gain = f"would reserve least: {unit.text(saved)} less ({-100 * saved / own.peak_reserved_bytes:+.1f} %)"
    text = settings_text(device.best.settings)
    return f"{f'PYTORCH_CUDA_ALLOC_CONF={text}' if text else device.best.name} {gain}"


def _device(device: DeviceTrials, *, has_limit: bool) -> list[RenderableType]:
    recording = device.recording
    largest = max(trial.replay.peak_reserved_bytes for trial in device.trials)
    unit = Unit.suiting(max(largest, recording.peak_reserved_bytes))
    before = "nothing was alive before"
    if recording.num_alive_before:
        alive = unit.text(recording.alive_before_bytes)
        before = f"the first {recording.num_alive_before} for {alive} that were alive before"
    lines: list[RenderableType] = [
        Text(f"device {recording.device}: {len(recording.events)} events, {before}"),
        Text(measured_line(device, unit, has_limit=has_limit)),
        Text(),
        _peaks(device, unit, has_limit=has_limit),
    ]
    if any(trial.replay.out_of_memory is not None for trial in device.trials):
        lines += [Text(), _refusals(device, unit)]
    if best := best_line(device, unit):
        lines += [Text(), Text(best, style="bold green")]
    if recording.unknown:
        lines += [Text(), Text("not known, so figures may be off by it:", style="yellow")]
        lines += [Padding(Text(gap, style="yellow"), (0, 0, 0, 2)) for gap in recording.unknown]
    return lines


def _peaks(device: DeviceTrials, unit: Unit, *, has_limit: bool) -> Table:
    """One row for each set of settings; one that does not fit says what it had until then."""
    own = device.own.replay
    table = _table(f"settings, {unit.name}", "allocated", "active", "reserved", "vs own", "idle", "segments")
    for trial in device.trials:
        found = trial.replay
        cells = [
            trial.name + (" (own)" if trial.is_own else ""),
            unit.number(found.peak_allocated_bytes),
            unit.number(found.peak_active_bytes),
            unit.number(found.peak_reserved_bytes),
            _verdict(trial, own, has_limit=has_limit),
            unit.number(found.unallocated_bytes),
            str(found.num_segments),
        ]
        style = "red" if found.out_of_memory is not None else "bold green" if trial is device.best else ""
        table.add_row(*map(Text, cells), style=style)
    return table


def _refusals(device: DeviceTrials, unit: Unit) -> Table:
    """Which request each set of settings could not serve, and what there was, as in torch's own message."""
    table = _table("out of memory", "at event", "requested", "segment", "free", "idle", "largest")
    for trial in device.trials:
        refused, event = trial.replay.out_of_memory, trial.replay.out_of_memory_event
        if refused is None or event is None:
            continue
        table.add_row(
            Text(trial.name),
            f"{event + 1}",
            unit.number(refused.requested_bytes),
            unit.number(refused.needed_bytes),
            unit.number(refused.free_bytes),
            unit.number(refused.reserved_bytes - refused.allocated_bytes),
            unit.number(refused.largest_free_block_bytes),
            style="red",
        )
    return table


def _table(first: str, *others: str) -> Table:
    """A table of a name and numbers; only the name gives way where the screen is narrow."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first, overflow="fold")
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _verdict(trial: Trial, own: Replay, *, has_limit: bool) -> str:
    """Whether it fits, and what is reserved in percent against the own settings."""
    if trial.replay.out_of_memory is not None:
        return "no fit"
    if trial.is_own or own.out_of_memory is not None:
        return "fits" if has_limit else ""
    reserved = trial.replay.peak_reserved_bytes
    if not own.peak_reserved_bytes or reserved == own.peak_reserved_bytes:
        return "same"
    return f"{100 * (reserved / own.peak_reserved_bytes - 1):+.1f} %"
