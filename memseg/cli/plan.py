"""memseg plan: what to place where, and what to rebuild, before anything runs; and how much would fit."""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memseg.cli.console import add_command, wide_console
from memseg.cli.planning import AUTO, OPTIMIZERS, PlanRequest, add_cards_options
from memseg.errors import InputError
from memseg.levels import NormMode, Precision, Recompute, Schedule, Strategy
from memseg.planning.plan import unsplittable
from memseg.units import format_image, parse_bytes, parse_image

if TYPE_CHECKING:
    from memseg.planning import Plan, Settings

ANY = "any"
"""In place of cards: which are needed?"""
OFFERS = ("precision", "batch", "accumulation")
MOST_IMAGES = 4096
"""The largest batch that --max-batch looks for."""
MOST_SIDE = 2**16
"""The longest side that --max-image looks for, in pixels."""


@dataclass(frozen=True)
class Offer:
    """A single change of what was asked for, and the best plan with it."""

    change: str
    plan: "Plan"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `plan` to the command line."""
    parser = add_command(
        subparsers,
        "plan",
        run,
        summary="Predict each card's peak memory and find the best placement that fits.",
        examples=(
            "memseg plan ladder-densenet169 --image 1024x2048 --batch 2 --cards gtx1070,titanx",
            "memseg plan ladder-densenet121 --image 1024x2048 --batch 2 --cards cpu:8GiB,cpu:12GiB -o plan.json",
            "memseg plan ladder-densenet169 --image 1024x2048 --batch 2 --cards gtx1070,titanx --html plan.html",
            "memseg plan ladder-densenet121 --image 1024x2048 --max-batch --cards rtx3060",
            "memseg plan ladder-densenet121 --image 1024x2048 --batch 2 --cards any",
            "memseg plan torchvision.models.segmentation:fcn_resnet50 --image 512x1024 --batch 4 --cards 2*t4",
        ),
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="name of a model (memseg models lists them), or what makes one: package.module:function, file.py:function",
    )
    parser.add_argument("--image", metavar="HxW", required=True, help="image size, HEIGHTxWIDTH")
    parser.add_argument("--batch", type=positive_int, help="images of each pass, over all replicas")
    parser.add_argument("--accumulate", type=positive_int, default=1, help="passes in each step (default: 1)")
    parser.add_argument("--classes", type=class_count, default=19, help="classes to tell apart (default: 19)")
    parser.add_argument("--norm", choices=[mode.value for mode in NormMode], default=NormMode.BATCH.value)
    parser.add_argument(
        "--precision",
        choices=[precision.value for precision in Precision],
        default=Precision.FLOAT32.value,
        help="what a step computes in; bfloat16 and float16 are autocast (default: float32)",
    )
    parser.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default=OPTIMIZERS[0],
        help="what keeps how much of each parameter; momentum is SGD with it (default: adam)",
    )
    add_cards_options(parser, required=True)
    _add_decisions(parser)
    questions = parser.add_argument_group("how much fits")
    questions.add_argument(
        "--max-batch", action="store_true", help="find the largest batch that fits, in place of --batch"
    )
    questions.add_argument(
        "--max-image", action="store_true", help="find the largest image that fits, of the proportions of --image"
    )
    questions.add_argument(
        "--offer",
        metavar="KINDS",
        help=f"also plan with single changes, and compare: any of {','.join(OFFERS)}",
    )
    output = parser.add_argument_group("output")
    output.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the plan as JSON")
    output.add_argument("--png", type=Path, metavar="FILE", help="draw segments and memory of each card")
    output.add_argument("--html", type=Path, metavar="FILE", help="the same as a page that needs no network")
    output.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def _add_decisions(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("decide for the planner")
    group.add_argument(
        "--objective",
        choices=("speed", "memory"),
        default="speed",
        help="most images per second, or the fullest card least full (default: speed)",
    )
    group.add_argument(
        "--recompute",
        metavar="LEVELS",
        help=f"levels that may be chosen, of {','.join(level.value for level in Recompute)} (default: all)",
    )
    group.add_argument(
        "--cut", metavar="NAMES", help="first segment of each stage of a split but the first: transition2"
    )
    group.add_argument("--micro-batches", type=positive_int, metavar="N", help="of a split with frozen norms")
    group.add_argument(
        "--schedule", choices=[one.value for one in Schedule], help="of several micro-batches (default: the best)"
    )
    group.add_argument(
        "--nnodes",
        type=positive_int,
        default=1,
        metavar="N",
        help="machines; each has an equal part of the cards, in order",
    )
    group.add_argument(
        "--network", metavar="RATE", help="between machines (default: 1.25 GB/s, which is 10 Gbit/s Ethernet)"
    )
    group.add_argument("--force", action="store_true", help="give the closest plan where none fits, marked as such")


def run(args: argparse.Namespace) -> int:
    """Carry out `memseg plan`."""
    from memseg.planning import NothingFitsError, infeasible_json, parse_cards
    from memseg.reports.plan import infeasible_text

    _check(args)
    request = PlanRequest(
        model=args.model,
        num_classes=args.classes,
        image=parse_image(args.image),
        batch=args.batch or 1,
        norm=NormMode(args.norm),
        precision=Precision(args.precision),
        aux_weight=0.3,
        cards=() if args.cards == ANY else parse_cards(args.cards),
        accumulation=args.accumulate,
        nodes=args.nnodes,
        levels=tuple(Recompute) if args.recompute is None else _levels(args.recompute),
        optimizer=args.optimizer,
    )
    settings = request.settings(args.strategy or AUTO, _settings(args))
    try:
        if args.cards == ANY:
            return _which_cards(args, request, settings)
        plan = _plan(args, request, settings)
    except NothingFitsError as error:
        if args.json:
            print(infeasible_json(error))
        print(f"memseg plan: {infeasible_text(error)}", file=sys.stderr)
        return 2
    offers = list(_offers(args, request, settings))
    _write(args, plan)
    _print(args, request, plan, offers, _published(request, settings, plan))
    return 0


def _check(args: argparse.Namespace) -> None:
    for option in ("output", "png", "html"):
        path = getattr(args, option)
        if path and (path.is_dir() or not path.resolve().parent.is_dir()):
            name = "-o" if option == "output" else f"--{option}"
            raise InputError(f"{name} must name a file in a folder that exists, got {path}")
    if args.max_batch and args.max_image:
        raise InputError("one question at a time: --max-batch with an --image, or --max-image with a --batch")
    if args.max_batch and args.batch:
        raise InputError("--max-batch finds the batch; leave out --batch")
    if args.batch is None and not args.max_batch:
        raise InputError("how many images? give --batch 2, or --max-batch for as many as fit")
    if args.cards == ANY and (args.max_batch or args.max_image or args.force):
        raise InputError(
            "--cards any asks which cards a job needs; for how much fits, or by force, name the cards: --cards gtx1070"
        )
    if args.cards == ANY and (args.nnodes > 1 or args.offer or args.output or args.png or args.html):
        raise InputError("--cards any gives several answers; for a plan of one of them name the cards: --cards gtx1070")
    if args.force and (args.max_batch or args.max_image):
        raise InputError("--force makes a plan that does not fit; --max-batch and --max-image look for one that does")
    if args.offer is not None:
        _named(args.offer, OFFERS, "--offer")
    if args.network and args.nnodes == 1:
        raise InputError("--network is the link between machines; give --nnodes too")


def _settings(args: argparse.Namespace) -> "Settings":
    from memseg.planning import Aim, Settings
    from memseg.planning.strategies import NETWORK_BYTES_PER_SECOND

    return Settings(
        aim=Aim(args.objective),
        network=_rate(args.network) if args.network else NETWORK_BYTES_PER_SECOND,
        cut=_names(args.cut, "--cut") if args.cut is not None else (),
        micro_batches=args.micro_batches,
        schedule=Schedule(args.schedule) if args.schedule else None,
    )


def _rate(text: str) -> float:
    size, slash, unit = text.partition("/")
    if not slash or unit.strip() != "s":
        raise InputError(f"--network must be a size per second, got {text!r}; try 1.25GB/s")
    return float(parse_bytes(size))


def _names(text: str, option: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise InputError(f"{option} must be names joined by commas, got {text!r}")
    return tuple(dict.fromkeys(names))


def _named(text: str, known: Sequence[str], option: str) -> tuple[str, ...]:
    names = _names(text, option)
    for name in names:
        if name not in known:
            raise InputError(f"{option} takes {','.join(known)}, got {name!r}")
    return names


def _levels(text: str) -> tuple[Recompute, ...]:
    return tuple(Recompute(name) for name in _named(text, tuple(Recompute), "--recompute"))


def _plan(args: argparse.Namespace, request: PlanRequest, settings: "Settings") -> "Plan":
    from memseg.planning import largest_plan

    if args.max_batch:
        return _largest_batch(request, settings)
    if args.max_image:
        step, most = _image_steps(request)
        found = largest_plan(
            lambda number: request.workload(image=(number * step[0], number * step[1])),
            request.cards,
            settings,
            most=most,
            known=request.image[0] // step[0],
        )
        if found is None:
            smallest = format_image(step)
            raise InputError(
                f"not even an image of {smallest} fits {args.cards}; memseg plan with --image {smallest} says why"
            )
        return found.plan
    return request.plan(args.strategy or AUTO, settings, force=args.force)


def _largest_batch(request: PlanRequest, settings: "Settings") -> "Plan":
    """The largest of all batches that some number of micro-batches divides: only those can be split into it."""
    from memseg.planning import largest_plan, make_plan

    frozen_split = request.norm is NormMode.FROZEN and len(request.cards) > 1 and settings.micro_batches is None
    steps = (1, 2, 4, 8) if frozen_split else (settings.micro_batches or 1,)
    replicates = settings.strategy is not None and settings.strategy.replicates
    plans = []
    for step in steps:
        least = -(-2 // step) if replicates else 1
        found = largest_plan(
            lambda number, step=step: request.workload(batch=number * step),  # type: ignore[misc]
            request.cards,
            settings,
            most=MOST_IMAGES // step,
            least=least,
        )
        plans += [found.plan] if found else []
    if plans:
        return max(plans, key=lambda plan: plan.batch)
    smallest = request.workload(batch=steps[0] * (-(-2 // steps[0]) if replicates else 1))
    return make_plan(smallest, request.cards, settings)


def _image_steps(request: PlanRequest) -> tuple[tuple[int, int], int]:
    """The smallest image of the same proportions that the model takes, and how many times that is tried at most."""
    model = request.build()
    model.check_image(request.image)
    parts = math.gcd(*(side // model.output_stride for side in request.image))
    height, width = (side // parts for side in request.image)
    return (height, width), max(1, MOST_SIDE // max(height, width))


def _which_cards(args: argparse.Namespace, request: PlanRequest, settings: "Settings") -> int:
    from memseg.planning import smallest_cards
    from memseg.reports.plans import plans_table

    plans = list(smallest_cards(request.workload(), settings))
    if not plans:
        raise InputError(
            "no known card holds the job, nor 8 of them; a smaller batch or image needs less, and memseg plan with "
            "--cards h100 says by how much"
        )
    if args.json:
        print(json.dumps({"feasible": True, "answers": [json.loads(plan.to_json()) for plan in plans]}, indent=2))
    else:
        wide_console().print(plans_table("smallest cards that do", [("", plan) for plan in plans]))
    return 0


def _offers(args: argparse.Namespace, request: PlanRequest, settings: "Settings") -> Sequence[Offer]:
    from memseg.planning import NothingFitsError, make_plan

    kinds = () if args.offer is None else _named(args.offer, OFFERS, "--offer")
    offers = []
    for change in request.offers(kinds):
        try:
            offers.append(Offer(change.description, make_plan(change.workload(), request.cards, settings)))
        except (NothingFitsError, InputError):
            continue
    return sorted(offers, key=lambda offer: -offer.plan.images_per_second)


def _published(request: PlanRequest, settings: "Settings", plan: "Plan") -> Sequence[Offer]:
    """The plan with the cut of the model's authors, with levels chosen and with nothing rebuilt, fit or not."""
    from memseg.planning import make_plan

    cut = request.build().published_cut
    free = settings.strategy in (None, Strategy.SPLIT) and not settings.cut and request.nodes == 1
    if not cut or not free or len(request.cards) <= len(cut) or unsplittable(request.precision):
        return []
    workload = request.workload(batch=plan.batch, image=plan.image)
    theirs = replace(settings, strategy=Strategy.SPLIT, cut=cut)
    name = f"cut at {', '.join(cut)}"
    plain = request.workload(batch=plan.batch, image=plan.image, levels=(Recompute.NONE,))
    return [
        Offer(name, make_plan(workload, request.cards, theirs, force=True)),
        Offer(f"{name}, nothing rebuilt", make_plan(plain, request.cards, theirs, force=True)),
    ]


def _write(args: argparse.Namespace, plan: "Plan") -> None:
    from memseg.files import replace_file
    from memseg.planning import save_plan

    if args.output:
        save_plan(plan, args.output)
    if args.png:
        from memseg.reports.plan_picture import draw_plan

        draw_plan(plan, args.png)
    if args.html:
        from memseg.reports.plan_page import plan_page

        replace_file(args.html, plan_page(plan))


def _print(
    args: argparse.Namespace, request: PlanRequest, plan: "Plan", offers: Sequence[Offer], published: Sequence[Offer]
) -> None:
    from memseg.reports.plan import plan_table
    from memseg.reports.plans import plans_table

    if args.json:
        content = json.loads(plan.to_json())
        if args.offer:
            content["offers"] = _objects(offers)
        if published:
            content["published"] = _objects(published)
        print(json.dumps(content, indent=2))
        return
    console = wide_console()
    console.print(plan_table(plan))
    for title, others in (("with one change", offers), ("as its authors split it", published)):
        if others:
            console.print()
            console.print(plans_table(title, [(other.change, other.plan) for other in others]))
    unused = Counter(card.name for card in request.cards) - Counter(card.card for card in plan.cards)
    if unused:
        free = args.strategy in (None, AUTO) and args.objective == "speed"
        print(f"not used: {', '.join(unused.elements())}{'; no plan was found that is faster with it' if free else ''}")
    for path in (args.output, args.png, args.html):
        if path:
            print(f"written: {path}")


def _objects(offers: Sequence[Offer]) -> list[dict[str, Any]]:
    return [{"change": one.change, "plan": json.loads(one.plan.to_json())} for one in offers]


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
