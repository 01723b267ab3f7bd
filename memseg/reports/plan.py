"""A plan, or why there is none, in words: values in, something to show out. Nothing is printed here.

A plan's JSON has every number and no picture. Before training somebody wants to see three things at once: what sits
where, how full each card gets, and what it costs against the runners-up. The words are those of the picture
(`plan_picture`) and the page (`plan_page`) as well.
"""

from collections.abc import Iterable
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memseg.levels import NormMode
from memseg.planning import Alternative, CardPlan, NothingFitsError, Plan
from memseg.units import format_bytes, format_image, format_seconds

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
    number, of = error.stage_number, len(error.closest.columns)
    where = "the whole model" if of == 1 else f"stage {number} of {of}"
    lines = [
        f"no plan fits; the closest is {format_bytes(error.shortfall_bytes)} short on {error.card.name}"
        f" at {error.moment}",
        f"  {where} ({error.segments[0]} .. {error.segments[-1]})"
        f" needs {format_bytes(error.needed_bytes)}, has {format_bytes(error.available_bytes)}"
        f" ({format_bytes(error.card.capacity_bytes)} - {format_bytes(error.card.reserve_bytes)} reserve)",
        f"    of these: {', '.join(_by_size(error.by_category))}",
    ]
    if error.advice:
        lines += ["  each of these alone would fit:", *(f"    {change}" for change in error.advice)]
    else:
        lines.append("  no single change that memseg knows would fit")
    return "\n".join(lines)


def share_bar(card: CardPlan, width: int = BAR_WIDTH) -> str:
    """The capacity as a bar: predicted peak, outside the allocator, still free, reserve.

    What is needed is rounded up, so that a full card looks full. It never covers the reserve: that a card has too
    little is told in words.
    """
    whole = max(1, card.capacity_bytes)
    reserve = min(width, round(width * card.reserve_bytes / whole))
    peak, needed = (
        min(-(-width * size // whole), width - reserve) for size in (card.predicted_peak_bytes, card.needed_bytes)
    )
    return "█" * peak + "▓" * (needed - peak) + "░" * (width - reserve - needed) + "▒" * reserve


def cards_in_order(plan: Plan) -> list[CardPlan]:
    """Replica by replica, the stages of each in order."""
    return [plan.cards[rank] for ranks in plan.ranks for rank in ranks]


def settings_line(plan: Plan) -> str:
    """What is trained, and how."""
    batch = f"batch {plan.batch}"
    if plan.accumulation > 1:
        batch += f" x {plan.accumulation} passes a step"
    norm = f"{plan.norm} norm"
    if plan.trained_norm is not plan.norm:
        norm += f", {plan.trained_norm} over replicas" if plan.norm is NormMode.BATCH else f" as {plan.trained_norm}"
    return f"{plan.model}, {plan.num_classes} classes, {format_image(plan.image)}, {batch}, {norm}, {plan.precision}"


def strategy_line(plan: Plan) -> str:
    """The strategy and on what.

    Nodes are told where there are several.
    """
    line = f"{plan.strategy} on {counted_cards(card.card for card in cards_in_order(plan))}"
    return f"{line}, {plan.nodes} nodes" if plan.nodes > 1 else line


def speed_line(plan: Plan) -> str:
    """How fast it is, how long its transfers take, and how a split takes its micro-batches."""
    line = f"{plan.images_per_second:.2f} images/s, {format_seconds(plan.step_seconds)} a step"
    if plan.transfer_seconds:
        # With micro-batches something is computed meanwhile, so it need not be a part of the step.
        line += f", {format_seconds(plan.transfer_seconds)} of transfers between cards"
    if plan.schedule:
        line += f"; {plan.micro_batches} micro-batches, {plan.schedule}"
    return line


def shortage_lines(plan: Plan) -> list[str]:
    """Why a plan does not fit, a line for each card that has too little; empty for a plan that fits."""
    if plan.feasible:
        return []
    short = [card for card in cards_in_order(plan) if not card.fits]
    return [
        f"does not fit: {card.card}{_where_among_several(plan, card)} is"
        f" {format_bytes(card.needed_bytes - card.available_bytes)} short at {card.peak_moment}; it needs"
        f" {format_bytes(card.needed_bytes)} and has {format_bytes(card.available_bytes)}"
        for card in short
    ] or ["marked as a plan that does not fit, though every card has room"]


def place_words(plan: Plan, card: CardPlan) -> list[str]:
    """What tells a card from the others of its replica: its node and its stage, each only where there are several."""
    words = []
    if plan.nodes > 1:
        words.append(f"node {card.node}")
    if plan.strategy.splits:
        words.append(f"stage {card.stage + 1} of {len(plan.stages)}")
    return words


def replica_words(plan: Plan, card: CardPlan) -> list[str]:
    """The replica that a card belongs to, where there are several."""
    return [f"replica {card.replica + 1} of {plan.replicas}"] if plan.strategy.replicates else []


def share_words(plan: Plan, card: CardPlan) -> str:
    """The images of each pass that go through a card."""
    return f"{card.batch_share} of {plan.batch} images" if card.batch_share < plan.batch else images(card.batch_share)


def images(number: int) -> str:
    """A number of images, in words."""
    return f"{number} image{'s' if number != 1 else ''}"


def fill_words(card: CardPlan) -> str:
    """What a card needs of what it has."""
    share = f" ({card.needed_bytes / card.available_bytes:.0%})" if card.available_bytes > 0 else ""
    return f"{format_bytes(card.needed_bytes)} of {format_bytes(card.available_bytes)}{share}"


def counted_cards(names: Iterable[str]) -> str:
    """Names of cards, those that follow each other and are alike told once.

    >>> counted_cards(["v100", "v100", "t4"])
    '2 x v100, t4'
    """
    runs = [(name, len(list(run))) for name, run in groupby(names)]
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in runs)


def shared_cards(other: Alternative) -> str:
    """The cards of a runner-up, each with the images of a pass that go through it."""
    return counted_cards(f"{name} ({share})" for name, share in zip(other.cards, other.shares, strict=True))


def flow_words(other: Alternative) -> str:
    """How a runner-up takes its images: all at once, or in micro-batches by a schedule."""
    return f"{other.micro_batches}, {other.schedule}" if other.schedule else str(other.micro_batches)


def _where_among_several(plan: Plan, card: CardPlan) -> str:
    words = [*replica_words(plan, card), *place_words(plan, card)]
    return f" ({', '.join(words)})" if words else ""


def _headline(plan: Plan) -> Text:
    text = Text(f"{settings_line(plan)}\n")
    text.append(strategy_line(plan), style="bold")
    text.append(f": {speed_line(plan)}")
    for line in shortage_lines(plan):
        text.append(f"\n{line}", style="bold red")
    return text


def _cards(plan: Plan) -> Table:
    table = Table(show_lines=True)
    for heading in ("card", "segments, by recompute level", "predicted peak"):
        table.add_column(heading)
    for card in cards_in_order(plan):
        place = [*replica_words(plan, card), *place_words(plan, card)]
        about = "\n".join([card.card, *place, share_words(plan, card), format_seconds(card.compute_seconds)])
        table.add_row(Text(about), Text(_segments(card)), _fill(card))
    table.caption = "█ predicted peak  ▓ outside the allocator  ░ free  ▒ reserve; times are of a pass"
    return table


def _segments(card: CardPlan) -> str:
    runs = groupby(card.segments, key=lambda segment: segment.recompute)
    return "\n".join(f"{level}: {', '.join(segment.name for segment in run)}" for level, run in runs)


def _fill(card: CardPlan) -> Text:
    text = Text(f"{share_bar(card)}\n{fill_words(card)}", style="" if card.fits else "red")
    if not card.fits:
        text.append(f"\n{format_bytes(card.needed_bytes - card.available_bytes)} short", style="bold")
    lines = [
        f"{format_bytes(card.capacity_bytes)} - {format_bytes(card.reserve_bytes)} reserve",
        *([f"{format_bytes(card.outside_bytes)} outside the allocator"] if card.outside_bytes else []),
        f"{format_bytes(card.predicted_peak_bytes)} at {card.peak_moment}:",
        *(f"  {line}" for line in _by_size(card.by_category)),
    ]
    text.append("".join(f"\n{line}" for line in lines), style="default")
    return text


def _by_size(by_category: dict[str, int]) -> list[str]:
    largest_first = sorted(by_category.items(), key=lambda item: -item[1])
    return [f"{category.replace('_', ' ')} {format_bytes(size)}" for category, size in largest_first if size]


def _alternatives(plan: Plan) -> Table:
    table = Table(title="also fits", title_justify="left")
    headings = ("strategy", "cards (images)", "stages begin at", "micro-batches", "images/s", "step", "fullest card")
    for heading in headings:
        wraps = heading in ("cards (images)", "stages begin at")
        table.add_column(heading, justify="right" if heading in headings[4:] else "left", no_wrap=not wraps)
    for other in plan.alternatives:
        table.add_row(
            other.strategy,
            Text(shared_cards(other)),
            Text(", ".join(other.stage_starts)),
            flow_words(other),
            f"{other.images_per_second:.2f}",
            format_seconds(other.step_seconds),
            f"{other.fullest_share:.0%}",
        )
    return table
