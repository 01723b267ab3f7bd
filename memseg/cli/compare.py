"""`memseg compare`: what a change did to the memory and the time of a step."""

import argparse
from pathlib import Path

from memseg.cli.console import add_command, print_json, wide_console
from memseg.errors import InputError


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Define the subcommand."""
    parser = add_command(
        subparsers,
        "compare",
        run,
        summary="Show what a change did: two profiles side by side, the layers that changed most first.",
        examples=[
            "memseg compare before.json after.json",
            "memseg compare before.json after.json --sort time --top 20 --png difference.png",
            "memseg compare before.json after.json --json",
        ],
    )
    for name in ("before", "after"):
        parser.add_argument(
            name, metavar=name.upper(), type=Path, help=f"what memseg profile MODEL --json > {name}.json wrote"
        )
    parser.add_argument(
        "--sort",
        choices=["change", "order", "saved", "peak", "parameters", "time"],
        default="change",
        help="layers by what changed most in each table, as they run, or all by the change of one figure "
        "(default: change)",
    )
    parser.add_argument(
        "--top",
        metavar="N",
        type=int,
        help="layers to show (default: 10 of each table, 24 in the picture, all in the JSON)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--png", metavar="FILE", type=Path, help="also draw the differences by layer")


def run(args: argparse.Namespace) -> int:
    """Print the comparison and draw it; 0, whether or not anything differs.

    Raises:
        InputError: a file is not a profile of today's form, or --top is less than 1.
    """
    if args.top is not None and args.top < 1:
        raise InputError(f"--top must be at least 1, got {args.top}")

    from memseg.reports.comparison import Comparison, Order, comparison_object, load_profile

    comparison = Comparison(load_profile(args.before), load_profile(args.after))
    order, names = Order(args.sort), (str(args.before), str(args.after))
    layers = comparison.sorted_layers(order)
    if args.png:
        from memseg.reports.comparison_picture import TOP, save_comparison_picture

        save_comparison_picture(comparison, layers[: args.top or TOP], args.png, names=names)
    if args.json:
        print_json(comparison_object(comparison, layers[: args.top]))
        return 0

    from memseg.reports.comparison_view import TOP as TABLE_TOP
    from memseg.reports.comparison_view import comparison_view

    wide_console().print(comparison_view(comparison, names=names, order=order, top=args.top or TABLE_TOP))
    return 0
