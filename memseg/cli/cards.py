"""`memseg cards`: the cards that plans and profiles can be made for, and where their figures come from."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memseg.cli.console import add_command, print_columns, print_json, progress_bar
from memseg.errors import InputError
from memseg.files import replace_file
from memseg.units import format_bytes

if TYPE_CHECKING:
    import torch

    from memseg.planning import Card

THIS_MACHINE = "this-machine.toml"
"""Where `--calibrate` writes unless it is told."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Define the subcommand."""
    parser = add_command(
        subparsers,
        "cards",
        run,
        summary="List the known cards, show the figures of one with their sources, or measure those of this machine.",
        examples=[
            "memseg cards",
            "memseg cards gtx1070",
            "memseg cards here",
            "memseg cards here:0",
            "memseg cards cpu:8GiB --json",
            "memseg cards --json",
            "memseg cards --calibrate",
            "memseg cards --calibrate mine.toml --force",
        ],
    )
    parser.add_argument(
        "card",
        nargs="?",
        metavar="NAME",
        help="a known card, NAME:SIZE, a TOML file of your own, or here: the CUDA cards of this machine, with what "
        "other processes use of them (here:0 is the first)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument(
        "--calibrate",
        nargs="?",
        const=THIS_MACHINE,
        metavar="FILE",
        help="measure this machine, in a minute or so, and write it as a card for --card FILE and --cards FILE; each "
        f"CUDA device goes to a file of its own beside it (default: {THIS_MACHINE})",
    )
    parser.add_argument("--quick", action="store_true", help="with --calibrate: fewer runs of smaller kernels, rougher")
    parser.add_argument("--force", action="store_true", help="with --calibrate: overwrite files that are there")


def run(args: argparse.Namespace) -> int:
    """Print the table, one card, or the object, or measure and write; 0.

    Raises:
        UnknownNameError: no such card.
        InputError: more than one named, cards of this machine that cannot be described, or a file that cannot be
            written.
        RunFailedError: a process that was measured with failed.
    """
    from memseg.planning.cards import known_cards, local_cards, parse_cards
    from memseg.planning.local_cards import HERE

    if args.calibrate is not None:
        cards = _calibrate(args)
    elif args.quick or args.force:
        raise InputError(f"--{'quick' if args.quick else 'force'} goes with --calibrate; try memseg cards --calibrate")
    elif args.card is None:
        cards = known_cards()
    elif args.card == HERE:
        cards = local_cards()
    else:
        cards = parse_cards(args.card)
        if len(cards) > 1:
            raise InputError(f"one card can be shown at a time, got {args.card!r}; try memseg cards {cards[0].name}")
    if args.json:
        print_json({"cards": [_card_object(card) for card in cards]})
    elif args.calibrate is None and args.card in (None, HERE):
        _print_table(cards, with_use=args.card == HERE)
    else:
        for card in cards:
            _print_card(card)
    return 0


def _calibrate(args: argparse.Namespace) -> "tuple[Card, ...]":
    """Measure every device of this machine, and write a file for each."""
    file = Path(args.calibrate)
    if args.card is not None:
        raise InputError(f"--calibrate measures this machine, so no card goes with it, got {args.card!r}; leave it out")
    if file.suffix != ".toml":
        raise InputError(
            f"--calibrate FILE must end in .toml, as --card knows files by it, got {file}; try {file}.toml"
        )
    if not file.absolute().parent.is_dir():
        raise InputError(f"--calibrate FILE must lie in a folder that is there, got {file}; make {file.parent} first")
    # As the processes of a run have it: threads that wait by spinning would measure each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from memseg.planning import load_card
    from memseg.profiling.calibrate import QUICK, THOROUGH, calibrate, devices, profile_text

    files = {device: _file_of(device, file) for device in devices()}
    there = [str(path) for path in files.values() if path.exists()]
    if there and not args.force:
        raise InputError(f"{', '.join(there)} is there already; --force overwrites it, or name another FILE")
    command = ["memseg", "cards", "--calibrate", *(["--quick"] if args.quick else [])]
    for device, path in files.items():
        with progress_bar(f"measuring {device}") as progress:
            found = calibrate(device, effort=QUICK if args.quick else THOROUGH, progress=progress)
        if found.disturbed:
            print(
                f"runs differ by more than half, so other work ran beside them: {'; '.join(found.disturbed)}. Measure "
                "again when the machine is idle",
                file=sys.stderr,
            )
        replace_file(path, profile_text(found, command))
        print(f"wrote {path}; use it by --card {path} or --cards {path}", file=sys.stderr)
    return tuple(load_card(path) for path in files.values())


def _file_of(device: "torch.device", file: Path) -> Path:
    return file if device.type == "cpu" else file.with_name(f"{file.stem}-{device.type}{device.index}{file.suffix}")


def _print_table(cards: "tuple[Card, ...]", *, with_use: bool) -> None:
    """One row for each card; `with_use` tells what other processes hold, which the reserve counts too."""
    use = ("in use",) if with_use else ()
    header = ("card", "capacity", "reserve", *use, "available", "float32", "half", "bandwidth", "capability", "title")
    rows = [
        (
            card.name,
            f"{format_bytes(card.capacity_bytes):>9}",
            f"{format_bytes(card.reserve_bytes):>9}",
            *([f"{format_bytes(card.used_bytes):>9}"] if with_use else []),
            f"{format_bytes(card.available_bytes):>9}",
            f"{card.flops / 1e12:6.2f} TFLOP/s",
            f"{card.half_flops / 1e12:5.1f} TFLOP/s" if card.half_flops else "",
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
        "convolution_flops": f"{(card.convolution_flops or 0) / 1e12:g} TFLOP/s",
        "half_flops": f"{(card.half_flops or 0) / 1e12:g} TFLOP/s",
        "bandwidth": f"{card.bandwidth / 1e9:g} GB/s",
        "link": f"{card.link / 1e9:g} GB/s",
        "overhead": f"{card.overhead_s * 1e6:g} us",
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
        "used_bytes": card.used_bytes,
        "available_bytes": card.available_bytes,
        "flops_per_s": card.flops,
        "convolution_flops_per_s": card.convolution_flops,
        "half_flops_per_s": card.half_flops,
        "bandwidth_bytes_per_s": card.bandwidth,
        "link_bytes_per_s": card.link,
        "overhead_s": card.overhead_s,
        "efficiency": card.efficiency,
        "compute_capability": card.compute_capability,
        "sources": dict(card.sources),
    }
