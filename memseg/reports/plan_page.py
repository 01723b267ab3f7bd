"""A plan as one HTML page, to look around in and to hand on.

The picture of `plan_picture`, in which every segment and every part of a card's memory can be asked for; the cards and
the runners-up as tables that can be sorted; and the plan itself, to be taken out of the page again. It is one file that
asks nothing of the network (`single_file`), and names in it are data, never markup.
"""

from typing import Any

import memseg
from memseg.planning import Alternative, CardPlan, Plan
from memseg.reports.colours import ink_on
from memseg.reports.plan import (
    cards_in_order,
    fill_words,
    flow_words,
    images,
    place_words,
    replica_words,
    settings_line,
    share_words,
    shared_cards,
    shortage_lines,
    strategy_line,
)
from memseg.reports.plan_parts import LEVEL_COLOURS, LEVEL_WORDS, memory_parts
from memseg.reports.single_file import single_file
from memseg.units import format_bytes, format_seconds

_SCRIPTS = ("units", "dom", "tables", "placement", "memory", "plan")
"""One script in this order."""


def plan_page(plan: Plan) -> str:
    """The page, as HTML that needs nothing beside it."""
    return single_file("plan", scripts=_SCRIPTS, title=f"{plan.model}, memseg plan", data=_page_object(plan))


def _page_object(plan: Plan) -> dict[str, Any]:
    """What the scripts read."""
    return {
        "json": plan.to_json(),
        "headline": strategy_line(plan),
        "settings": settings_line(plan),
        "verdict": {"fits": plan.feasible, "lines": shortage_lines(plan) or [_fits_line(plan)]},
        "figures": _figures(plan),
        "levels": [
            {"name": level, "words": LEVEL_WORDS[level], "colour": colour, "ink": ink_on(colour)}
            for level, colour in LEVEL_COLOURS.items()
        ],
        "segments": plan.segment_names,
        "splits": plan.strategy.splits,
        "cards": [_card_object(plan, card) for card in cards_in_order(plan)],
        "alternatives": [_alternative_object(other) for other in plan.alternatives],
        "notes": (
            f"Bytes and times are predictions, made for torch {plan.torch}; a step without the optimizer's arithmetic"
            f" and without reading data. memseg {memseg.__version__}"
        ),
    }


def _fits_line(plan: Plan) -> str:
    fullest = _fullest(plan)
    return f"fits; the fullest card is {fullest.card}, which needs {fill_words(fullest)}"


def _fullest(plan: Plan) -> CardPlan:
    return max(cards_in_order(plan), key=lambda card: card.needed_bytes / max(1, card.available_bytes))


def _figures(plan: Plan) -> list[dict[str, str]]:
    """What is told in large letters."""
    step = images(plan.batch * plan.accumulation)
    passes = f"{plan.accumulation} passes of {images(plan.batch)}" if plan.accumulation > 1 else "in one pass"
    found = [
        ("Speed", f"{plan.images_per_second:.2f} images/s", "predicted"),
        ("Step", format_seconds(plan.step_seconds), f"{step}, {passes}"),
    ]
    if plan.transfer_seconds:
        when = ", some while cards compute" if plan.schedule else ""
        found.append(("Between cards", format_seconds(plan.transfer_seconds), f"transfers of each step{when}"))
    if plan.schedule:
        found.append(("Micro-batches", str(plan.micro_batches), f"of each replica, by schedule {plan.schedule}"))
    fullest = _fullest(plan)
    found.append(("Fullest card", fullest.card, fill_words(fullest)))
    return [{"name": name, "value": value, "note": note} for name, value, note in found]


def _card_object(plan: Plan, card: CardPlan) -> dict[str, Any]:
    return {
        "name": card.card,
        "node": card.node,
        "replica": card.replica,
        "stage": card.stage,
        "replicaWords": "".join(replica_words(plan, card)),
        "placeWords": ", ".join(place_words(plan, card)),
        "shareWords": share_words(plan, card),
        "fillWords": fill_words(card),
        "images": card.batch_share,
        "seconds": card.compute_seconds,
        "capacity": card.capacity_bytes,
        "available": card.available_bytes,
        "needed": card.needed_bytes,
        "peak": card.predicted_peak_bytes,
        "outside": card.outside_bytes,
        "peakMoment": card.peak_moment,
        "parts": [
            {
                "kind": part.kind,
                "name": part.name,
                "size": part.size_bytes,
                "start": part.start_bytes,
                "colour": part.colour,
                "label": format_bytes(part.size_bytes),
            }
            for part in memory_parts(card)
        ],
        "segments": [{"name": segment.name, "level": segment.recompute} for segment in card.segments],
    }


def _alternative_object(other: Alternative) -> dict[str, Any]:
    return {
        "strategy": other.strategy,
        "cards": shared_cards(other),
        "starts": ", ".join(other.stage_starts),
        "flow": flow_words(other),
        "rate": other.images_per_second,
        "seconds": other.step_seconds,
        "fullest": other.fullest_share,
    }
