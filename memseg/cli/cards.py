"""`memseg cards`: the cards that plans and profiles can be made for, and where their figures come from."""

import argparse
from typing import TYPE_CHECKING, Any

from memseg.cli.console import add_command, print_columns, print_json
from memseg.errors import InputError
from memseg.units import format_bytes

if TYPE_CHECKING:
    from memseg.planning import Card


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Define the subcommand."""
    parser = add_command(
        subparsers,
        "cards",
        run,
        summary="List the known cards, or show the figures of one with their sources.",
        examples=["memseg cards", "memseg cards gtx1070", "memseg cards cpu:8GiB --json", "memseg cards --json"],
    )
    parser.add_argument("card", nargs="?", metavar="NAME", help="a known card, NAME:SIZE, or a TOML file of your own")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the table, one card, or the object; 0.

    Raises:
        UnknownNameError: no such card.
        InputError: more than one named.
    """
    from memseg.planning import known_cards, parse_cards

    if args.card is None:
        cards = known_cards()
    else:
        cards = parse_cards(args.card)
        if len(cards) > 1:
            raise InputError(f"one card can be shown at a time, got {args.card!r}; try memseg cards {cards[0].name}")
    if args.json:
        print_json({"cards": [_card_object(card) for card in cards]})
    elif args.card is None:
        _print_table(cards)
    else:
        _print_card(cards[0])
    return 0


def _print_table(cards: "tuple[Card, ...]") -> None:
    header = ("card", "capacity", "reserve", "available", "float32", "bandwidth", "capability", "title")
    rows = [
        (
            card.name,
            f"{format_bytes(card.capacity_bytes):>9}",
            format_bytes(card.reserve_bytes),
            f"{format_bytes(card.available_bytes):>9}",
            f"{card.flops / 1e12:5.2f} TFLOP/s",
            f"{card.bandwidth / 1e9:6.1f} GB/s",
            card.compute_capability or "",
            card.title,
        )
        for card in cards
    ]
    print_columns([header, *rows])


def _print_card(card: "Card") -> None:
    figures = {
        "capacity": format_bytes(card.capacity_bytes),
        "reserve": format_bytes(card.reserve_bytes),
        "flops": f"{card.flops / 1e12:g} TFLOP/s",
        "bandwidth": f"{card.bandwidth / 1e9:g} GB/s",
        "link": f"{card.link / 1e9:g} GB/s",
        "efficiency": f"{card.efficiency:g}",
        "compute_capability": card.compute_capability or "",
    }
    print(f"{card.name}: {card.title}")
    print(f"available to a plan: {format_bytes(card.available_bytes)} (capacity less reserve)\n")
    print_columns([(name, value, card.sources[name]) for name, value in figures.items() if name in card.sources])


def _card_object(card: "Card") -> dict[str, Any]:
    return {
        "name": card.name,
        "title": card.title,
        "kind": card.kind,
        "capacity_bytes": card.capacity_bytes,
        "reserve_bytes": card.reserve_bytes,
        "available_bytes": card.available_bytes,
        "flops_per_s": card.flops,
        "bandwidth_bytes_per_s": card.bandwidth,
        "link_bytes_per_s": card.link,
        "efficiency": card.efficiency,
        "compute_capability": card.compute_capability,
        "sources": dict(card.sources),
    }
