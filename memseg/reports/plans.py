"""Several plans side by side: other cards, or the same run with single things changed. Nothing is printed here."""

from collections.abc import Sequence

from rich.table import Table

from memseg.planning import Plan
from memseg.units import format_bytes, format_seconds


def plans_table(title: str, plans: Sequence[tuple[str, Plan]]) -> Table:
    """A row for each plan.

    Args:
        title: Of the table.
        plans: Each with what tells it from the others; no column for that where it is empty in all.
    """
    named = any(name for name, _ in plans)
    table = Table(title=title, title_justify="left")
    for heading in (*(("change",) if named else ()), "cards", "strategy"):
        table.add_column(heading)
    for heading in ("images/s", "step", "fullest card"):
        table.add_column(heading, justify="right")
    for name, plan in plans:
        shared = len(plan.shares) > 1
        cards = ", ".join(f"{card.card} ({card.batch_share})" if shared else card.card for card in plan.cards)
        fullest = max(plan.cards, key=lambda card: card.needed_bytes / card.available_bytes)
        share = fullest.needed_bytes / fullest.available_bytes
        table.add_row(
            *((name,) if named else ()),
            cards,
            plan.strategy if plan.micro_batches == 1 else f"{plan.strategy}, {plan.micro_batches} micro-batches",
            f"{plan.images_per_second:.2f}",
            format_seconds(plan.step_seconds),
            f"{format_bytes(fullest.needed_bytes)} of {format_bytes(fullest.available_bytes)} ({share:.0%})"
            + ("" if plan.feasible else ", does not fit"),
        )
    return table
