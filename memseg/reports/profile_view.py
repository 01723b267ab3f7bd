"""The profile of a training step on a terminal: the peak by category, what is alive then, and the layers as a tree."""

from collections.abc import Sequence

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memseg.planning.cards import Card
from memseg.profiling.timeline import Category
from memseg.reports.profile import ProfileReport, ProfileRow
from memseg.units import format_bytes, format_seconds

BAR_WIDTH = 20
"""Characters of the longest bar."""
ALIVE_ROWS = 10
"""Tensors at the peak that are shown."""


def profile_view(report: ProfileReport, rows: Sequence[ProfileRow], *, tree: bool = True) -> RenderableType:
    """Headline, the three figures, the peak by category, what is alive at it, and the table of layers.

    Args:
        report: To show.
        rows: Its layers, as `ProfileReport.rows` gives them.
        tree: Whether to indent layers below those that hold them; for rows in order.
    """
    memory, peak = report.memory, report.timeline.peak_allocated_bytes
    lines = [
        Text(report.headline()),
        Text(f"peak {format_bytes(memory.peak_allocated_bytes)} allocated, in {report.peak_moment}", style="bold"),
    ]
    if memory.peak_reserved_bytes is not None and memory.device_total_bytes is not None:
        lines.append(Text(_device_line(report)))
    first = report.profile.first_timeline.peak_allocated_bytes
    if not report.is_first_step and first != peak:
        lines.append(
            Text(
                f"tensors and workspaces of the first step, without optimizer state until its end: "
                f"{format_bytes(first)}, of later ones: {format_bytes(peak)}"
            )
        )
    if report.profile.uncounted:
        lines.append(
            Text(f"not known, so that the peak may be higher: {'; '.join(report.profile.uncounted)}", style="red")
        )
    if report.measured_bytes is not None:
        lines.append(Text(measured_line(peak, report.measured_bytes)))
    if report.judge_fit:
        lines.append(Text(verdict_line(report), style="" if report.fits else "bold red"))
    notes = Text(
        f"peak: the most that is allocated, by all, while the layer works; share: of all that is saved\n"
        f"times: estimates from the rates that memseg cards {report.card.name} shows; "
        f"about {format_seconds(report.step_s)} a step",
        style="dim",
    )
    parts: list[RenderableType] = [
        _categories(report),
        Text(),
        _alive(report),
        Text(),
        _layers(rows, tree=tree),
        Text(),
        notes,
    ]
    return Group(*lines, Text(), *parts)


def verdict_line(report: ProfileReport) -> str:
    """Whether the step fits the card, and why not."""
    refused = report.memory.out_of_memory
    if refused is None or report.memory.peak_allocated_bytes > report.card.available_bytes:
        line = fit_line(report.memory.peak_allocated_bytes, report.card)
        return f"{line}, if the peak is not higher" if report.profile.uncounted and report.fits else line
    return (
        f"does not fit {report.card.name}: the allocator is refused {format_bytes(refused.needed_bytes)} with "
        f"{format_bytes(refused.reserved_bytes)} reserved, {format_bytes(refused.allocated_bytes)} of it allocated"
    )


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


def _device_line(report: ProfileReport) -> str:
    memory = report.memory
    assert memory.peak_reserved_bytes is not None
    assert memory.device_total_bytes is not None
    outside = [f"{term.name} {format_bytes(term.size_bytes)}" for term in memory.terms if not term.in_allocator]
    return (
        f"{format_bytes(memory.peak_reserved_bytes)} reserved by the allocator, "
        f"{format_bytes(memory.device_total_bytes)} on the device with {', '.join(outside)}"
    )


def _categories(report: ProfileReport) -> Table:
    peak = report.timeline.peak_allocated_bytes
    table = _table("of the peak", "bytes", "share", "")
    parts: list[tuple[str, int]] = [(str(category), size) for category, size in report.timeline.by_category().items()]
    beyond = report.memory.peak_allocated_bytes - peak
    peak += beyond
    for category, size in sorted([*parts, ("rounding, cuBLAS", beyond)], key=lambda item: -item[1]):
        if size:
            table.add_row(category, format_bytes(size), _percent(size, peak), Bar(peak, 0, size, color="cyan"))
    return table


def _alive(report: ProfileReport) -> Table:
    """The largest tensors at the peak, and one line for all others."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("alive at the peak", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True, min_width=9)
    for heading in ("made by", "operation", "tensor", "waits for"):
        table.add_column(heading, overflow="ellipsis", no_wrap=True)
    table.add_column("rebuilt at", no_wrap=True)
    shown = [one for one in report.alive if one.category is not Category.PARAMETER][:ALIVE_ROWS]
    for one in shown:
        table.add_row(
            one.category,
            format_bytes(one.size_bytes),
            Text(one.made_by),
            one.operation.removeprefix("aten."),
            f"{one.dtype} {'x'.join(map(str, one.shape))}" if one.shape else "",
            Text(f"{one.waits_for[0]} of {one.waits_for[1] or 'the step'}" if one.waits_for else ""),
            one.removed_by or "",
        )
    others = [one for one in report.alive if one not in shown]
    table.add_row(f"{len(others)} others", format_bytes(sum(one.size_bytes for one in others)), *[""] * 5)
    return table


def _layers(rows: Sequence[ProfileRow], *, tree: bool) -> Table:
    table = _table("layer", "parameters", "saved", "peak", "forward", "backward", "share", "")
    table.show_footer = True
    total = _total("all", rows)
    lines = tree_lines(rows) if tree else [(row.name, row) for row in rows]
    most = max((row.saved_bytes for _, row in lines), default=0)
    for label, row in lines:
        table.add_row(
            Text(label),
            *_cells(row),
            _percent(row.saved_bytes, total.saved_bytes),
            Bar(max(1, most), 0, row.saved_bytes, color="cyan"),
        )
    for column, footer in zip(table.columns, (total.name, *_cells(total)), strict=False):
        column.footer = footer
    return table


def _cells(row: ProfileRow) -> tuple[str, ...]:
    return (
        format_bytes(row.parameter_bytes),
        format_bytes(row.saved_bytes),
        format_bytes(row.peak_bytes) if row.peak_bytes else "",
        format_seconds(row.forward_s),
        format_seconds(row.backward_s),
    )


def tree_lines(rows: Sequence[ProfileRow]) -> list[tuple[str, ProfileRow]]:
    """Rows with labels indented below what holds them; a layer with parts has their total, its own share apart.

    >>> stem, conv = ProfileRow("net", 1, 5, 0, 0.0, 0.0), ProfileRow("net.conv", 2, 9, 8, 1.0, 2.0)
    >>> [(label, row.saved_bytes, row.peak_bytes) for label, row in tree_lines([stem, conv])]
    [('net', 3, 9), ('  (itself)', 1, 5), ('  conv', 2, 9)]
    """
    names = [row.name for row in rows]
    holders = {name[:index] for name in names for index, letter in enumerate(name) if letter == "."}
    lines: list[tuple[str, ProfileRow]] = []
    headed: set[str] = set()
    for row in rows:
        parts = row.name.split(".")
        paths = [".".join(parts[: count + 1]) for count in range(len(parts))]
        for depth, path in enumerate(paths):
            if path in holders and path not in headed:
                headed.add(path)
                inside = [one for one in rows if one.name == path or one.name.startswith(f"{path}.")]
                lines.append(("  " * depth + parts[depth], _total(path, inside)))
        if row.name not in holders:
            lines.append(("  " * (len(parts) - 1) + parts[-1], row))
        elif row.saved_bytes or row.parameter_bytes or row.flops:
            lines.append(("  " * len(parts) + "(itself)", row))
    return lines


def _total(name: str, rows: Sequence[ProfileRow]) -> ProfileRow:
    return ProfileRow(
        name,
        sum(row.saved_bytes for row in rows),
        max((row.peak_bytes for row in rows), default=0),
        sum(row.parameter_bytes for row in rows),
        sum(row.forward_s for row in rows),
        sum(row.backward_s for row in rows),
        sum(row.flops for row in rows),
        sum(row.moved_bytes for row in rows),
    )


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
