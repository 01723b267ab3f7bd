"""`memseg models`: the networks that recipes may name."""

import argparse
from dataclasses import asdict

from memseg.cli.console import add_command, print_columns, print_json


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Define the subcommand."""
    parser = add_command(
        subparsers,
        "models",
        run,
        summary="List the networks: parameters, output stride, what each is.",
        examples=["memseg models", "memseg models --json"],
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the table, or the object; 0."""
    from memseg.models import describe, model_names

    cards = [describe(name) for name in model_names()]
    if args.json:
        print_json({"models": [asdict(card) for card in cards]})
        return 0
    header = ("model", "parameters", "stride", "description")
    rows = [(card.name, f"{card.parameters / 1e6:.2f} M", str(card.output_stride), card.description) for card in cards]
    print_columns([header, *rows])
    return 0
