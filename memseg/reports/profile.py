"""The profile of a training step as a table, an object or CSV: values in, something to show out; nothing is printed.

A trace holds thousands of allocations. Who is out of memory asks three things of it: what the bytes of the peak are
for, when the peak comes, and which layers to do something about. So there is one table of the peak by category and one
of the layers, and the same numbers for programs. Times are estimates from a card's rates, not measurements: good for
seeing where a step goes, not for comparing machines to the percent.
"""

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memseg.levels import NormMode, Recompute
from memseg.planning.cards import Card
from memseg.profiling.step import StepProfile
from memseg.profiling.timeline import Timeline
from memseg.units import format_bytes, format_seconds

BAR_WIDTH = 20
"""Characters of the longest bar."""


class SortKey(StrEnum):
    """By what the table of layers is sorted: as they run, or the largest first."""

    ORDER = "order"
    PEAK = "peak"
    SAVED = "saved"
    PARAMETERS = "parameters"
    TIME = "time"


@dataclass(frozen=True)
class ProfileRow:
    """What one layer costs: a line of the table, of the CSV, an object in the JSON."""

    name: str
    saved_bytes: int
    peak_bytes: int
    """The most that is allocated, by everybody, while this layer makes something; 0 where it makes nothing."""
    parameter_bytes: int
    forward_s: float
    backward_s: float
    """With what is rebuilt."""


_SORT_VALUES: Mapping[SortKey, Callable[[ProfileRow], float]] = {
    SortKey.ORDER: lambda row: 0,
    SortKey.PEAK: lambda row: -row.peak_bytes,
    SortKey.SAVED: lambda row: -row.saved_bytes,
    SortKey.PARAMETERS: lambda row: -row.parameter_bytes,
    SortKey.TIME: lambda row: -(row.forward_s + row.backward_s),
}


@dataclass(frozen=True)
class ProfileReport:
    """A profile with the settings that it was made for, and what was measured beside it."""

    profile: StepProfile
    card: Card
    """Whose rates the times come from."""
    norm: NormMode
    recompute: Recompute | Mapping[str, Recompute]
    """Of all segments, or of the named ones."""
    judge_fit: bool = False
    """Whether to say if the peak fits the card."""
    measured_bytes: int | None = None
    """The peak of real steps, where they were run."""

    @property
    def timeline(self) -> Timeline:
        """Every allocation of the step."""
        return self.profile.timeline

    @property
    def step_s(self) -> float:
        """Estimated seconds of the whole step, the optimizer's included."""
        return sum(self.card.seconds(work) for work in self.profile.work.values())

    @property
    def peak_moment(self) -> str:
        """Phase and layer of the peak, in words."""
        phase, layer = self.timeline.peak_moment
        return f"{phase} of {layer}" if layer else f"{phase} step"

    def headline(self) -> str:
        """What was profiled, in one line."""
        height, width = self.profile.image
        levels: str = (
            self.recompute
            if isinstance(self.recompute, Recompute)
            else ", ".join(f"{level} ({count})" for level, count in Counter(self.recompute.values()).most_common())
        )
        return (
            f"{self.profile.model}, {height}x{width}, batch {self.profile.batch}, {self.norm} norm, "
            f"{self.profile.precision}, recompute {levels}"
        )

    def rows(self, *, depth: int = 1, sort: SortKey = SortKey.ORDER) -> list[ProfileRow]:
        """The table of layers: segments and the loss at depth 1, the layers inside them at greater depths."""
        rows = [
            ProfileRow(
                name=layer.row.name,
                saved_bytes=layer.row.saved_bytes,
                peak_bytes=layer.row.peak_bytes,
                parameter_bytes=layer.row.parameter_bytes,
                forward_s=self.card.seconds(layer.forward),
                backward_s=self.card.seconds(layer.backward),
            )
            for layer in self.profile.layers(depth)
        ]
        return sorted(rows, key=_SORT_VALUES[sort])


def profile_view(report: ProfileReport, rows: Sequence[ProfileRow]) -> RenderableType:
    """Headline, peak by category, whether it fits, what was measured, and the table of layers."""
    peak = report.timeline.peak_allocated_bytes
    lines = [
        Text(report.headline()),
        Text(f"peak {format_bytes(peak)} allocated, in {report.peak_moment}", style="bold"),
    ]
    if report.measured_bytes is not None:
        lines.append(Text(measured_line(peak, report.measured_bytes)))
    if report.judge_fit:
        fits = peak <= report.card.available_bytes
        lines.append(Text(fit_line(peak, report.card), style="" if fits else "bold red"))
    notes = Text(
        f"peak: the most that is allocated, by all, while the layer works; share: of all that is saved\n"
        f"times: estimates from the rates that memseg cards {report.card.name} shows; "
        f"about {format_seconds(report.step_s)} a step",
        style="dim",
    )
    return Group(*lines, Text(), _categories(report), Text(), _layers(rows), Text(), notes)


def profile_object(report: ProfileReport, rows: Sequence[ProfileRow]) -> dict[str, Any]:
    """The profile for programs: bytes are integers, times seconds."""
    height, width = report.profile.image
    levels = report.recompute
    found = {
        "model": report.profile.model,
        "image": f"{height}x{width}",
        "batch": report.profile.batch,
        "norm": str(report.norm),
        "recompute": str(levels) if isinstance(levels, Recompute) else {name: str(levels[name]) for name in levels},
        "precision": report.profile.precision.value,
        "device": report.card.kind,
        "card": report.card.name,
        "peak_allocated_bytes": report.timeline.peak_allocated_bytes,
        "peak_moment": report.peak_moment,
        "by_category": {category.replace(" ", "_"): size for category, size in report.timeline.by_category().items()},
        "layers": [asdict(row) for row in rows],
    }
    if report.measured_bytes is not None:
        found["measured_peak_allocated_bytes"] = report.measured_bytes
    return found


def profile_csv(rows: Iterable[ProfileRow]) -> str:
    """The table of layers with a header row; bytes and seconds, unrounded.

    >>> print(profile_csv([ProfileRow("stem", 4096, 9000, 256, 0.5, 1.25)]), end="")
    name,saved_bytes,peak_bytes,parameter_bytes,forward_s,backward_s
    stem,4096,9000,256,0.5,1.25
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(ProfileRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def fit_line(peak_bytes: int, card: Card) -> str:
    """Whether a peak fits a card, with what is left or lacking."""
    left = card.available_bytes - peak_bytes
    verdict = f"fits {card.name} with {format_bytes(left)} to spare"
    if left < 0:
        verdict = f"does not fit {card.name}: {format_bytes(-left)} too much"
    return (
        f"{verdict}; it has {format_bytes(card.available_bytes)} to fill "
        f"({format_bytes(card.capacity_bytes)} - {format_bytes(card.reserve_bytes)} reserve)"
    )


def measured_line(predicted_bytes: int, measured_bytes: int) -> str:
    """The prediction beside what real steps took, with the error of the prediction.

    >>> measured_line(102 * 2**20, 100 * 2**20)
    'predicted 102.0 MiB, measured 100.0 MiB: the prediction is off by +2.0 %'
    """
    error = predicted_bytes / measured_bytes - 1
    return (
        f"predicted {format_bytes(predicted_bytes)}, measured {format_bytes(measured_bytes)}: "
        f"the prediction is off by {100 * error:+z.1f} %"
    )


def _categories(report: ProfileReport) -> Table:
    peak = report.timeline.peak_allocated_bytes
    table = _table("of the peak", "bytes", "share", "")
    by_size = sorted(report.timeline.by_category().items(), key=lambda item: -item[1])
    for category, size in by_size:
        if size:
            table.add_row(category, format_bytes(size), _percent(size, peak), Bar(peak, 0, size, color="cyan"))
    return table


def _layers(rows: Sequence[ProfileRow]) -> Table:
    table = _table("layer", "parameters", "saved", "peak", "forward", "backward", "share", "")
    table.show_footer = True
    saved = sum(row.saved_bytes for row in rows)
    most = max(row.saved_bytes for row in rows)
    for row in rows:
        table.add_row(
            row.name,
            format_bytes(row.parameter_bytes),
            format_bytes(row.saved_bytes),
            format_bytes(row.peak_bytes) if row.peak_bytes else "",
            format_seconds(row.forward_s),
            format_seconds(row.backward_s),
            _percent(row.saved_bytes, saved),
            Bar(max(1, most), 0, row.saved_bytes, color="cyan"),
        )
    totals = (
        "all",
        format_bytes(sum(row.parameter_bytes for row in rows)),
        format_bytes(saved),
        format_bytes(max(row.peak_bytes for row in rows)),
        format_seconds(sum(row.forward_s for row in rows)),
        format_seconds(sum(row.backward_s for row in rows)),
    )
    for column, total in zip(table.columns, totals, strict=False):
        column.footer = total
    return table


def _table(first: str, *others: str) -> Table:
    """A table of a name, numbers and a bar; only the bar gives way where the screen is narrow."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", footer_style="bold")
    table.add_column(first, no_wrap=True)
    for heading in others[:-1]:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(others[-1], max_width=BAR_WIDTH)
    return table


def _percent(part: int, whole: int) -> str:
    return f"{part / max(1, whole):.1%}"
