"""Two profiles side by side on a terminal: what was changed, what it did to the step, and which layers it did it in."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from memseg.reports.comparison import Amount, Change, Comparison, LayerChange, Measure, Order
from memseg.units import format_bytes, format_seconds

TOP = 10
"""Layers of each table where nobody asks for more or fewer."""
_LEAST_BAR, _MOST_BAR = 9, 33
"""Characters of a bar to both sides."""
_LESS, _MORE = "green", "red"
_FIGURES = {
    "peak_allocated_bytes": "peak allocated",
    "peak_reserved_bytes": "peak reserved",
    "device_total_bytes": "device total",
    "reserved_but_not_allocated_bytes": "reserved, idle",
    "measured_peak_allocated_bytes": "measured peak",
    "first_step_peak_bytes": "first step",
    "steady_step_peak_bytes": "steady step",
    "step_seconds": "step time",
}
_HEADINGS = {
    Measure.SAVED: "saved by layer",
    Measure.PEAK: "peak by layer",
    Measure.PARAMETERS: "parameters by layer",
    Measure.TIME: "time by layer",
}


class TwoWayBar:
    """A bar from a middle line, to the left for less and to the right for more, in the width that there is."""

    def __init__(self, value: float, most: float) -> None:
        """`value` of at most `most` in size: the latter fills one side."""
        self._value, self._most = value, most

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One line."""
        half = (min(options.max_width, _MOST_BAR) - 1) // 2
        yield Segment(two_way_bar(self._value, self._most, half), Style.parse(style_of(self._value)))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """From the least to the most that is of use."""
        return Measurement(min(_LEAST_BAR, options.max_width), min(_MOST_BAR, options.max_width))


def two_way_bar(value: float, most: float, half: int) -> str:
    """A bar of 2 `half` + 1 characters; whatever is not 0 can be seen.

    >>> two_way_bar(-5, 10, 4), two_way_bar(2.5, 10, 4), two_way_bar(0, 10, 4)
    ('  ██│    ', '    │█   ', '    │    ')
    """
    steps = min(2 * half, max(1, round(2 * half * abs(value) / most))) if value and most else 0
    full, rest = divmod(steps, 2)
    if value < 0:
        return f"{('▐' if rest else '') + '█' * full:>{half}}│{'':{half}}"
    return f"{'':{half}}│{'█' * full + ('▌' if rest else ''):<{half}}"


def style_of(difference: Amount | None) -> str:
    """Less is green and more is red."""
    return "dim" if not difference else _LESS if difference < 0 else _MORE


def comparison_view(
    comparison: Comparison,
    *,
    names: tuple[str, str],
    order: Order = Order.CHANGE,
    top: int = TOP,
) -> RenderableType:
    """Headline, settings that differ, figures of the step, the peak by category, and tables of layers.

    Args:
        comparison: To show.
        names: Of the two files.
        order: Of the layers; CHANGE sorts each table by what it shows.
        top: Layers that are shown of each table.
    """
    parts: list[RenderableType] = [
        Text.assemble(("before  ", "bold"), names[0]),
        Text.assemble(("after   ", "bold"), names[1]),
        Text(f"both    {settings_line(comparison.same_settings)}", style="dim"),
        Text(),
    ]
    if not comparison.differs:
        moment = f"peak {format_bytes(comparison.after.peak_allocated_bytes)} allocated, "
        step = f"{format_duration(comparison.after.step_seconds)} a step"
        return Group(*parts, Text("nothing differs", style="bold"), Text(f"{moment}{step} in both"))
    parts += [_settings(comparison.settings), Text(), _figures(comparison), Text()]
    parts += [Text(line) for line in _moment_lines(comparison)]
    if comparison.categories:
        parts += [Text(), _changes("of the peak", comparison.categories, total=comparison.figures["peak_tensor_bytes"])]
    for measure in Measure:
        parts += [Text(), _layers(comparison, measure, order, top)]
    if comparison.notes:
        parts += [Text(), Text("\n".join(comparison.notes), style="dim")]
    return Group(*parts)


def settings_line(settings: Mapping[str, Any]) -> str:
    """Settings in one line.

    >>> settings_line({"model": "mini", "batch": 2, "recompute": {"block1": "units"}})
    'mini, batch 2, recompute block1=units'
    """
    return ", ".join(
        _setting(value) if name == "model" else f"{name.replace('_', ' ')} {_setting(value)}"
        for name, value in settings.items()
    )


def difference_line(comparison: Comparison) -> str:
    """What differs in the settings, in one line."""
    pairs = [
        f"{name.replace('_', ' ')} {_setting(old)} → {_setting(new)}"
        for name, (old, new) in comparison.settings.items()
    ]
    return ", ".join(pairs) if pairs else "same settings"


def format_duration(seconds: float) -> str:
    """Seconds as `format_seconds` has them, and microseconds.

    >>> format_duration(0.0000165), format_duration(-0.0123)
    ('16.5 us', '-12.3 ms')
    """
    if seconds < 0:
        return f"-{format_duration(-seconds)}"
    return f"{seconds * 1e6:.1f} us" if 0 < seconds < 0.001 else format_seconds(seconds)


def format_amount(amount: Amount | None, *, is_time: bool, sign: bool = False) -> str:
    """Bytes or seconds; "" where it is not known, and with a sign where that is asked for."""
    if amount is None:
        return ""
    text = format_duration(amount) if is_time else format_bytes(int(amount))
    return f"+{text}" if sign and amount > 0 else text


def label_of(layer: LayerChange) -> str:
    """A layer's name, whether its parts are told apart from it, and whether only one profile has it."""
    only_in = {"before": " (gone)", "after": " (new)", None: ""}[layer.only_in]
    return layer.name + (" (itself)" if layer.has_parts else "") + only_in


def _setting(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ",".join(f"{name}={one}" for name, one in value.items())
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _settings(settings: Mapping[str, tuple[Any, Any]]) -> RenderableType:
    if not settings:
        return Text("the settings are the same; the code or memseg has changed", style="bold")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("setting", no_wrap=True)
    for heading in ("before", "after"):
        table.add_column(heading, overflow="fold")
    for name, (old, new) in settings.items():
        table.add_row(name.replace("_", " "), _setting(old), Text(_setting(new), style="bold cyan"))
    return table


def _figures(comparison: Comparison) -> Table:
    figures = {_FIGURES[name]: one for name, one in comparison.figures.items() if name in _FIGURES}
    ordered = {heading: figures[heading] for heading in _FIGURES.values() if heading in figures}
    beyond = {f"  {name}": change for name, change in comparison.beyond.items() if change.differs}
    step = ordered.pop(_FIGURES["step_seconds"])
    first = _FIGURES["peak_allocated_bytes"]
    changes = {**ordered, **beyond, _FIGURES["step_seconds"]: step}
    # Bytes and seconds have no common measure but percent; what has doubled fills its side.
    most = min(100, max(abs(change.percent or 0) for change in changes.values()))
    table = _table("the step")
    for name, change in changes.items():
        is_time = change is step
        bold = "bold" if name == first or is_time else ""
        table.add_row(Text(name, style=bold), *_cells(change, change.percent, most, is_time=is_time), style=bold)
    return table


def _moment_lines(comparison: Comparison) -> list[str]:
    old, new = comparison.before.peak_moment, comparison.after.peak_moment
    if old == new:
        return [f"the peak is in {old}, as before"]
    return [f"the peak was in {old}, and is now in {new}"]


def _changes(heading: str, changes: Mapping[str, Change], *, total: Change) -> Table:
    table = _table(heading, footer=total)
    most = max(change.size for change in changes.values())
    for name, change in sorted(changes.items(), key=lambda item: -item[1].size):
        table.add_row(
            Text(name.replace("_", " ")),
            *_cells(change, change.difference, most, is_time=False),
            style="" if change.differs else "dim",
        )
    return table


def _layers(comparison: Comparison, measure: Measure, order: Order, top: int) -> RenderableType:
    """The layers in which a measure changed; one line where it changed in none."""
    is_time, total = measure is Measure.TIME, comparison.total(measure)
    by = Order(measure.value) if order is Order.CHANGE else order
    ordered = comparison.sorted_layers(by)
    changed = [layer for layer in ordered if layer.changes[measure].differs]
    if not changed:
        amount = format_amount(total.after, is_time=is_time)
        return Text.assemble((_HEADINGS[measure], "bold"), f": nothing differs ({amount})")
    table = _table(_HEADINGS[measure], footer=total, is_time=is_time)
    table.columns[0].footer = "the largest" if measure is Measure.PEAK else "all"
    most = max(layer.changes[measure].size for layer in changed)
    for layer in changed[:top]:
        change = layer.changes[measure]
        cells = _cells(change, change.difference, most, is_time=is_time)
        if layer.only_in:
            # The figure that is not there is no 0.
            cells[0 if layer.only_in == "after" else 1] = Text("-", style="dim")
        table.add_row(Text(label_of(layer)), *cells)
    notes = _rest_lines(changed[top:], len(ordered) - len(changed), measure)
    return Group(table, *(Text(note, style="dim") for note in notes))


def _rest_lines(others: Sequence[LayerChange], num_same: int, measure: Measure) -> Iterable[str]:
    is_time = measure is Measure.TIME
    if others:
        changes = [layer.changes[measure] for layer in others]
        what = f"{len(others)} more layer{'s' if len(others) > 1 else ''} changed"
        if measure is not Measure.PEAK:
            total = sum(change.difference or 0 for change in changes)
            what += f", together by {format_amount(total, is_time=is_time, sign=True)}"
        yield f"{what}; --top {len(others) + TOP} shows more"
    if num_same:
        yield f"{num_same} other{' is' if num_same == 1 else 's are'} the same"


def _cells(change: Change, shown: Amount | None, most: Amount, *, is_time: bool) -> list[RenderableType]:
    """Before, after, difference, percent and the bar of `shown`, whose fellows are at most `most`."""
    difference = format_amount(change.difference, is_time=is_time, sign=True) if change.differs else "same"
    style = style_of(change.difference)
    return [
        format_amount(change.before, is_time=is_time) or "-",
        format_amount(change.after, is_time=is_time) or "-",
        Text(difference or "-", style=style),
        Text(_percent(change), style=style),
        TwoWayBar(shown or 0, most),
    ]


def _percent(change: Change) -> str:
    """In percent, in a few letters; nothing where nothing was before."""
    if change.percent is None or not change.differs:
        return ""
    if change.percent >= 10000:
        return ">9999 %"
    return f"{change.percent:+.0f} %" if change.percent >= 1000 else f"{change.percent:+.1f} %"


def _table(first: str, *, footer: Change | None = None, is_time: bool = False) -> Table:
    """A table of a name, five figures and a bar; name and bar give way where the screen is narrow."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", footer_style="bold")
    table.add_column(first, overflow="fold")
    for heading in ("before", "after", "difference", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    if footer is not None:
        table.show_footer = True
        cells = _cells(footer, 0, 0, is_time=is_time)
        for column, cell in zip(table.columns, ("all", *cells[:-1]), strict=False):
            column.footer = cell
    return table
