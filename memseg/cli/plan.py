"""memseg plan: what to place where, and what to rebuild, before anything runs."""

import argparse
import sys
from collections import Counter
from pathlib import Path

from memseg.cli.console import add_command, wide_console
from memseg.cli.planning import PlanRequest, add_cards_options
from memseg.errors import InputError
from memseg.levels import NormMode, Precision
from memseg.units import parse_image


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `plan` to the command line."""
    parser = add_command(
        subparsers,
        "plan",
        run,
        summary="Predict each card's peak memory and find the fastest placement that fits.",
        examples=(
            "memseg plan ladder-densenet169 --image 1024x2048 --batch 2 --cards gtx1070,titanx",
            "memseg plan ladder-densenet121 --image 1024x2048 --batch 2 --cards cpu:8GiB,cpu:12GiB -o plan.json",
        ),
    )
    parser.add_argument("model", metavar="MODEL", help="name of a model; memseg models lists them")
    parser.add_argument("--image", metavar="HxW", required=True, help="image size, HEIGHTxWIDTH")
    parser.add_argument("--batch", type=positive_int, required=True, help="images per step")
    parser.add_argument("--classes", type=class_count, default=19, help="classes to tell apart (default: 19)")
    parser.add_argument("--norm", choices=[mode.value for mode in NormMode], default=NormMode.BATCH.value)
    parser.add_argument(
        "--precision",
        choices=[precision.value for precision in Precision],
        default=Precision.FLOAT32.value,
        help="what a step computes in; bfloat16 and float16 are autocast (default: float32)",
    )
    add_cards_options(parser, required=True)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the plan as JSON")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    """Carry out `memseg plan`."""
    from memseg.planning import NothingFitsError, infeasible_json, parse_cards, save_plan
    from memseg.reports.plan import infeasible_text, plan_table

    if args.output and (args.output.is_dir() or not args.output.resolve().parent.is_dir()):
        raise InputError(f"-o must name a file in a folder that exists, got {args.output}")
    request = PlanRequest(
        model=args.model,
        num_classes=args.classes,
        image=parse_image(args.image),
        batch=args.batch,
        norm=NormMode(args.norm),
        precision=Precision(args.precision),
        aux_weight=0.3,
        cards=parse_cards(args.cards),
    )
    try:
        plan = request.plan(args.strategy or "auto")
    except NothingFitsError as error:
        if args.json:
            print(infeasible_json(error))
        print(f"memseg plan: {infeasible_text(error)}", file=sys.stderr)
        return 2
    if args.output:
        save_plan(plan, args.output)
    if args.json:
        print(plan.to_json())
        return 0
    wide_console().print(plan_table(plan))
    idle = Counter(card.name for card in request.cards) - Counter(card.card for card in plan.cards)
    if idle:
        print(f"not used: {', '.join(idle.elements())}; --strategy split uses every card")
    if args.output:
        print(f"plan written to {args.output}")
    return 0


def class_count(text: str) -> int:
    """An argument that counts classes: labels are uint8, and 255 marks pixels that do not count."""
    value = positive_int(text)
    if value > 255:
        raise argparse.ArgumentTypeError(f"must be at most 255, for labels are uint8, got {text!r}")
    return value


def positive_int(text: str) -> int:
    """An argument that counts something."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value
