"""A plan, or why there is none, in words: values in, something to show out. Nothing is printed here.

A plan's JSON has every number and no picture. Before training somebody wants to see three things at once: what sits
where, how full each card gets, and what it costs against the runners-up.
"""

from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memseg.planning import CardPlan, NothingFitsError, Plan
from memseg.units import format_bytes, format_seconds

BAR_WIDTH = 24
"""Characters that stand for a card's whole capacity."""


def plan_table(plan: Plan) -> RenderableType:
    """What sits where: for each card its segments with their recompute levels and how full it gets; the runners-up."""
    parts: list[RenderableType] = [_headline(plan), Text(), _cards(plan)]
    if plan.alternatives:
        parts += [Text(), _alternatives(plan)]
    return Group(*parts)


def infeasible_text(error: NothingFitsError) -> str:
    """By how much, where and when the closest placement fails, and each single change that would fit."""
    number, of = error.stage_number, len(error.closest.stages)
    where = "the whole model" if of == 1 else f"stage {number} of {of}"
    lines = [
        f"no plan fits; the closest is {format_bytes(error.shortfall_bytes)} short on {error.card.name}"
        f" at {error.moment}",
        f"  {where} ({error.segments[0]} .. {error.segments[-1]})"
        f" needs {format_bytes(error.needed_bytes)}, has {format_bytes(error.available_bytes)}"
        f" ({format_bytes(error.card.capacity_bytes)} - {format_bytes(error.card.reserve_bytes)} reserve)",
        f"    of these: {_by_size(error.by_category)}",
    ]
    if error.advice:
        lines += ["  each of these alone would fit:", *(f"    {change}" for change in error.advice)]
    else:
        lines.append("  no single change that memseg knows would fit")
    return "\n".join(lines)


def share_bar(card: CardPlan, width: int = BAR_WIDTH) -> str:
    """The capacity as a bar: predicted peak, still free, reserve.

    The peak is rounded up, so that a full card looks full.
    """
    reserve = round(width * card.reserve_bytes / card.capacity_bytes)
    peak = min(-(-width * card.predicted_peak_bytes // card.capacity_bytes), width - reserve)
    return "█" * peak + "░" * (width - reserve - peak) + "▒" * reserve


def _headline(plan: Plan) -> Text:
    height, width = plan.image
    names = ", ".join(card.card for card in plan.cards)
    text = Text()
    text.append(f"{plan.model}, {plan.num_classes} classes, {height}x{width}, batch {plan.batch}, ")
    text.append(f"{plan.norm} norm, {plan.precision}\n")
    text.append(f"{plan.strategy} on {names}", style="bold")
    text.append(f": {plan.images_per_second:.2f} images/s, {format_seconds(plan.step_seconds)} a step")
    if plan.transfer_seconds:
        text.append(f", {format_seconds(plan.transfer_seconds)} of it between cards")
    return text


def _cards(plan: Plan) -> Table:
    table = Table(show_lines=True)
    for heading in ("card", "segments, by recompute level", "predicted peak"):
        table.add_column(heading)
    for card in plan.cards:
        table.add_row(f"{card.card}\n{format_seconds(card.compute_seconds)}", _segments(card), _fill(card))
    table.caption = "█ predicted peak  ░ free  ▒ reserve"
    return table


def _segments(card: CardPlan) -> str:
    runs = groupby(card.segments, key=lambda segment: segment.recompute)
    return "\n".join(f"{level}: {', '.join(segment.name for segment in run)}" for level, run in runs)


def _fill(card: CardPlan) -> str:
    share = card.predicted_peak_bytes / card.available_bytes
    return "\n".join(
        [
            share_bar(card),
            f"{format_bytes(card.predicted_peak_bytes)} of {format_bytes(card.available_bytes)} ({share:.0%})",
            f"{format_bytes(card.capacity_bytes)} - {format_bytes(card.reserve_bytes)} reserve",
            f"at {card.peak_moment}:",
            *(f"  {line}" for line in _by_size(card.by_category).split(", ")),
        ]
    )


def _by_size(by_category: dict[str, int]) -> str:
    largest_first = sorted(by_category.items(), key=lambda item: -item[1])
    return ", ".join(f"{category.replace('_', ' ')} {format_bytes(size)}" for category, size in largest_first)


def _alternatives(plan: Plan) -> Table:
    table = Table(title="also fits", title_justify="left")
    for heading in ("strategy", "cards", "images/s", "step"):
        table.add_column(heading, justify="right" if heading in ("images/s", "step") else "left")
    for other in plan.alternatives:
        rate, step = f"{other.images_per_second:.2f}", format_seconds(other.step_seconds)
        table.add_row(other.strategy, ", ".join(other.cards), rate, step)
    return table
