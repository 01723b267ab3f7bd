"""`memseg profile`: what one training step allocates, on any machine and in seconds."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from memseg.cli.console import add_command, print_json, wide_console
from memseg.errors import InputError, MemsegError, UnknownNameError
from memseg.levels import NormMode, Precision, Recompute
from memseg.units import format_bytes, parse_image

if TYPE_CHECKING:
    from memseg.models import SegmentedModel
    from memseg.planning import Card
    from memseg.reports.profile import ProfileReport

MOST_CLASSES = 255
"""Labels are uint8, and 255 marks pixels that do not count."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Define the subcommand."""
    parser = add_command(
        subparsers,
        "profile",
        run,
        summary="Show what one training step allocates, by category and by layer, without running it.",
        examples=[
            "memseg profile ladder-densenet121 --image 1024x2048 --batch 2",
            "memseg profile ladder-densenet121 --recompute units --card gtx1070 --png curve.png",
            "memseg profile ladder-densenet121 --recompute block1=units,block2=norms --depth 2 --sort saved",
            "memseg profile ladder-densenet-mini --image 128x256 --batch 1 --measure",
            "memseg profile ladder-densenet169 --card cpu:8GiB --json",
            "memseg profile ladder-densenet121 --csv - > layers.csv",
        ],
    )
    parser.add_argument("model", metavar="MODEL", help="a network that memseg models lists")
    parser.add_argument("--image", metavar="HEIGHTxWIDTH", default="1024x2048", help="in pixels (default: 1024x2048)")
    parser.add_argument("--batch", metavar="N", type=int, default=2, help="images in the batch (default: 2)")
    parser.add_argument(
        "--norm",
        choices=[str(mode) for mode in NormMode],
        default=str(NormMode.BATCH),
        help="batch norm counts with the batch, is frozen, or counts with all replicas (default: batch)",
    )
    parser.add_argument(
        "--recompute",
        metavar="LEVEL",
        default=str(Recompute.NONE),
        help="how much is rebuilt in backward: none, norms, units or segment; or SEGMENT=LEVEL,... (default: none)",
    )
    parser.add_argument(
        "--precision",
        choices=[str(precision) for precision in Precision],
        default=str(Precision.FLOAT32),
        help="what the step computes in; bfloat16 and float16 are autocast (default: float32)",
    )
    parser.add_argument("--classes", metavar="N", type=int, default=19, help="classes of pixels (default: 19)")
    parser.add_argument(
        "--card",
        help="such as gtx1070 or cpu:8GiB: says whether the peak fits it; times are by its rates (default: cpu)",
    )
    parser.add_argument(
        "--depth", metavar="N", type=int, default=1, help="1 for segments, 2 for the layers in them, ..."
    )
    parser.add_argument(
        "--sort",
        choices=["order", "peak", "saved", "parameters", "time"],
        default="order",
        help="order of the layers: as they run, or the largest first (default: order)",
    )
    parser.add_argument(
        "--measure", action="store_true", help="also run real steps on this CPU; takes their memory and their time"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--csv", metavar="FILE", help="also write the table of layers; - prints it, and nothing else")
    parser.add_argument("--png", metavar="FILE", type=Path, help="also draw memory over the step")


def run(args: argparse.Namespace) -> int:
    """Print the profile and write the files; 0, whether or not it fits the card.

    Raises:
        UnknownNameError: no such model, segment, level or card.
        InputError: a number or an image size that does not hold, or options that exclude each other.
        MemsegError: the memory to measure is not there.
    """
    image, card, levels = parse_image(args.image), _parse_card(args.card), parse_recompute(args.recompute)
    _check(args, card)

    from memseg.models import build_model
    from memseg.nn.precision import parameter_dtype
    from memseg.profiling.step import profile_step
    from memseg.reports.profile import ProfileReport, SortKey, profile_csv, profile_object, profile_view

    norm, precision = NormMode(args.norm), Precision(args.precision)
    dtype = parameter_dtype(precision)
    build = partial(build_model, args.model, num_classes=args.classes, norm=norm, dtype=dtype)
    _tell(f"tracing a step of {args.model} on tensors without memory ...")
    profile = profile_step(
        build, image=image, batch=args.batch, recompute=levels, precision=precision, device=card.kind
    )
    report = ProfileReport(profile, card, norm, levels, judge_fit=args.card is not None)
    rows = report.rows(depth=args.depth, sort=SortKey(args.sort))
    if args.png:
        from memseg.reports.memory_curve import save_memory_curve

        save_memory_curve(report, args.png)
    if args.csv == "-":
        sys.stdout.write(profile_csv(rows))
        return 0
    if args.csv:
        Path(args.csv).write_text(profile_csv(rows), encoding="utf-8")
    if args.measure:
        report = _measure(report, build)
    if args.json:
        print_json(profile_object(report, rows))
        return 0
    wide_console().print(profile_view(report, rows))
    return 0


def parse_recompute(text: str) -> Recompute | dict[str, Recompute]:
    """The level of all segments, or those of the segments that are named.

    Raises:
        UnknownNameError: not a level.
        InputError: a segment without a level, or named twice.

    >>> parse_recompute("units"), parse_recompute("block1=units, block2=norms")
    (<Recompute.UNITS: 'units'>, {'block1': <Recompute.UNITS: 'units'>, 'block2': <Recompute.NORMS: 'norms'>})
    """
    if "=" not in text and "," not in text:
        return _parse_level(text)
    levels: dict[str, Recompute] = {}
    for part in text.split(","):
        name, _, level = (piece.strip() for piece in part.partition("="))
        if not name or not level or name in levels:
            raise InputError(
                f"--recompute must be one level, or a level for each of some segments, each named once, got {text!r}; "
                "try units, or block1=units,block2=norms"
            )
        levels[name] = _parse_level(level)
    return levels


def _parse_level(text: str) -> Recompute:
    if text not in list(Recompute):
        raise UnknownNameError("recompute level", text, Recompute)
    return Recompute(text)


def _parse_card(text: str | None) -> "Card":
    from memseg.planning import parse_cards

    cards = parse_cards("cpu" if text is None else text)
    if len(cards) > 1:
        raise InputError(f"--card must name one card, got {text!r}; a step over several cards is for memseg plan")
    return cards[0]


def _check(args: argparse.Namespace, card: "Card") -> None:
    """Refuse numbers that are too small or large, and options that exclude each other."""
    for name, most in (("batch", None), ("depth", None), ("classes", MOST_CLASSES)):
        value = getattr(args, name)
        if value < 1 or (most and value > most):
            raise InputError(f"--{name} must be {f'from 1 to {most}' if most else 'at least 1'}, got {value}")
    if args.csv == "-" and (args.json or args.measure):
        raise InputError(
            "--csv - leaves standard output to the table of layers, so neither --json nor --measure go with it; "
            "try --csv layers.csv"
        )
    if args.measure and card.kind != "cpu":
        raise InputError(f"--measure runs on this CPU, so --card must be a cpu card, got {card.name}; try cpu")


def _measure(report: "ProfileReport", build: "Callable[[], SegmentedModel]") -> "ProfileReport":
    """The report with the peak of real steps.

    Raises:
        MemsegError: the memory is not there.
    """
    # torch's profiler, which counts the allocations, would log its progress; whoever wants that says so.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from memseg.profiling.measure import measure_step

    profile = report.profile
    predicted = profile.timeline.peak_allocated_bytes
    _tell(f"measuring real steps, which take {format_bytes(predicted)} and more ...")
    try:
        measured = measure_step(
            build,
            image=profile.image,
            batch=profile.batch,
            recompute=report.recompute,
            precision=profile.precision,
        )
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        raise MemsegError(
            f"to measure, this process must get the {format_bytes(predicted)} that were predicted, and the operating "
            "system refused memory; leave out --measure, take a smaller --batch or --image, or another --recompute"
        ) from None
    return replace(report, measured_bytes=measured)


def _tell(what: str) -> None:
    """Say on standard error what takes a moment, where somebody looks."""
    if sys.stderr.isatty():
        print(what, file=sys.stderr)
