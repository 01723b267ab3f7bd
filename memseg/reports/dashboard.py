"""A run while it trains, for the terminal: how far it is, what it learns, and memory beside what was planned.

A value in, something to show out; whoever trains fills the value and decides when to draw.

    step 120 of 300  ━━━━━━━━━━━━╺━━━━━━━━━━━━━━━━━  0:04:10 left
    epoch 3 of 6     ━━━━━━━━━━━╺━━━━━━━━━━━━━━━━━━
    loss      0.8123             2.05 █▇▅▃▃▂
    val mIoU  41.20%             0.81 ██████▇▇▅▅▄▃▂▂▁
    cpu:8GiB  ██████████░│░░░░░░░░░░  2.31 GiB  2.40 GiB  8.00 GiB
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from memseg.reports.loss_curve import curve_lines
from memseg.units import format_bytes

_CURVE_WIDTH, _CURVE_HEIGHT = 28, 6
_BAR_WIDTH = 28


@dataclass(frozen=True)
class CardState:
    """A card's memory."""

    card: str
    predicted_bytes: int
    """The peak by the plan."""
    capacity_bytes: int
    measured_bytes: int | None = None
    """The peak so far; None before it is known."""


@dataclass(frozen=True)
class RunState:
    """A run at one moment."""

    title: str
    step: int
    """Steps done."""
    total_steps: int
    steps_per_epoch: int
    cards: tuple[CardState, ...]
    losses: tuple[float, ...] = ()
    """Means over equal parts of the steps so far."""
    loss: float | None = None
    """Of the last step."""
    lr: float | None = None
    grad_norm: float | None = None
    """Before clipping; None where gradients are not clipped."""
    images_per_second: float | None = None
    seconds_left: float | None = None
    miou: float | None = None
    """Of the last evaluation."""
    best_miou: float | None = None
    best_step: int | None = None
    patience_left: int | None = None
    """Evaluations that may come without a better one before the run ends; None where it does not."""
    evaluating: tuple[int, int] | None = None
    """Pictures done, and in all, while the validation split is scored."""


def dashboard(state: RunState) -> RenderableType:
    """The run as a panel of 80 columns, or more where cards have long names, and some 15 lines."""
    middle = Table.grid(padding=(0, 3))
    middle.add_row(_figures(state), _curve(state.losses))
    return Panel(
        Group(_progress(state), Text(), middle, Text(), _memory(state.cards)),
        title=f"memseg train: {state.title}",
        title_align="left",
        expand=False,
        padding=(0, 1),
    )


def _progress(state: RunState) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(min_width=20, no_wrap=True)
    epochs = -(-state.total_steps // state.steps_per_epoch)
    epoch, done = divmod(min(state.step, state.total_steps - 1), state.steps_per_epoch)
    left = "" if state.seconds_left is None else f"{timedelta(seconds=round(state.seconds_left))} left"
    table.add_row(
        f"step {state.step} of {state.total_steps}",
        ProgressBar(total=state.total_steps, completed=state.step, width=_BAR_WIDTH),
        left,
    )
    if state.evaluating:
        pictures, of = state.evaluating
        table.add_row("validation", ProgressBar(total=of, completed=pictures, width=_BAR_WIDTH), f"{pictures} of {of}")
    else:
        in_epoch = min(state.steps_per_epoch, state.total_steps - epoch * state.steps_per_epoch)
        done = in_epoch if state.step == state.total_steps else done
        table.add_row(
            f"epoch {epoch + 1} of {epochs}", ProgressBar(total=in_epoch, completed=done, width=_BAR_WIDTH), ""
        )
    return table


def _figures(state: RunState) -> Table:
    rows = [
        ("loss", _number(state.loss, ".4f"), ""),
        ("learning rate", _number(state.lr, ".2e"), ""),
        *([("gradient norm", _number(state.grad_norm, ".3g"), "")] if state.grad_norm is not None else []),
        ("images/s", _number(state.images_per_second, ".3g"), ""),
        ("val mIoU", _number(state.miou, ".2%"), ""),
        ("best", _number(state.best_miou, ".2%"), "" if state.best_step is None else f"at step {state.best_step}"),
        *([] if state.patience_left is None else [("patience", str(state.patience_left), "evaluations")]),
    ]
    table = Table.grid(padding=(0, 1))
    table.add_column(style="dim", no_wrap=True, min_width=13)
    table.add_column(justify="right", no_wrap=True, min_width=8)
    table.add_column(style="dim", no_wrap=True, min_width=14)
    for row in rows:
        table.add_row(*row)
    return table


def _curve(losses: Sequence[float]) -> RenderableType:
    if len(losses) < 2:
        return Text()
    lines = curve_lines(losses, width=_CURVE_WIDTH, height=_CURVE_HEIGHT)
    labels = [_number(max(losses), ".3g"), *[""] * (len(lines) - 2), _number(min(losses), ".3g")]
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column(style="cyan", no_wrap=True, min_width=_CURVE_WIDTH)
    for label, line in zip(labels, lines, strict=True):
        table.add_row(label, line)
    return table


def _memory(cards: Sequence[CardState]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    for _ in range(3):
        table.add_column(justify="right", no_wrap=True)
    table.add_row("", "", "peak", "planned", "card has", style="dim")
    for card in cards:
        measured = "measuring" if card.measured_bytes is None else format_bytes(card.measured_bytes)
        sizes = (measured, format_bytes(card.predicted_bytes), format_bytes(card.capacity_bytes))
        table.add_row(card.card, _memory_bar(card), *sizes)
    return table


def _memory_bar(card: CardState) -> Text:
    """The whole capacity: what has been taken at most is filled, and a line stands at what was planned."""
    whole = max(1, card.capacity_bytes)
    filled, planned = (
        min(_BAR_WIDTH, round(_BAR_WIDTH * size / whole)) for size in (card.measured_bytes or 0, card.predicted_bytes)
    )
    over = card.measured_bytes is not None and card.measured_bytes > card.predicted_bytes
    bar = Text("█" * filled, "red" if over else "green").append("░" * (_BAR_WIDTH - filled), "dim")
    place = min(planned, _BAR_WIDTH - 1)
    return bar[:place] + Text("│", "bold") + bar[place + 1 :]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
