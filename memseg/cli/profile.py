"""`memseg profile`: what one training step allocates, on any machine and in seconds."""

import argparse
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memseg.cli.console import add_command, print_json, wide_console
from memseg.cli.profile_job import Request, add_job_options, parse_job
from memseg.errors import InputError, MemsegError
from memseg.files import replace_file
from memseg.units import format_bytes

if TYPE_CHECKING:
    from memseg.planning import Card
    from memseg.profiling.allocator.settings import AllocatorSettings
    from memseg.reports.profile import ProfileReport, ProfileRow


_NOT_WITH_PLAN = {
    "image": "1024x2048",
    "batch": 2,
    "precision": "float32",
    "accumulate": 1,
    "replicas": 1,
    **dict.fromkeys(("optimizer", "norm", "recompute", "classes", "loss", "channels", "card", "allocator", "snapshot")),
    **dict.fromkeys(("measure", "real", "bucket_view"), False),
}
"""Options that a plan answers, or that ask for something else, with their defaults."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Define the subcommand."""
    parser = add_command(
        subparsers,
        "profile",
        run,
        summary="Show what one training step allocates, by category and by layer, without running it.",
        examples=[
            "memseg profile ladder-densenet121 --image 1024x2048 --batch 2",
            "memseg profile ladder-densenet121 --recompute units --card gtx1070 --html profile.html",
            "memseg profile ladder-densenet121 --recompute block1=units,block2=norms --depth 2 --sort saved",
            "memseg profile ladder-densenet-mini --image 128x256 --batch 1 --measure",
            "memseg profile torchvision.models:vit_b_16 --image 224x224 --batch 64 --loss cross-entropy --card v100",
            "memseg profile torchvision.models:resnet50 --image 224x224 --batch 32 --snapshot step.pickle --card a100",
            "memseg profile --plan plan.json --html cards.html",
            "memseg profile ladder-densenet121 --csv - > layers.csv",
        ],
    )
    add_job_options(parser)
    parser.add_argument(
        "--plan", metavar="FILE", type=Path, help="instead of MODEL: each card of a plan that memseg plan -o wrote"
    )
    card = parser.add_argument_group("the card")
    card.add_argument(
        "--card",
        help="such as gtx1070 or cpu:8GiB: whose kernels, allocator and rates to count, and whether the peak fits it "
        "(default: cpu)",
    )
    card.add_argument(
        "--allocator", metavar="SETTINGS", help="as in PYTORCH_CUDA_ALLOC_CONF, such as expandable_segments:True"
    )
    card.add_argument(
        "--replicas",
        metavar="N",
        type=int,
        default=1,
        help="processes of DistributedDataParallel, whose gradient buckets and NCCL buffers are counted (default: 1)",
    )
    card.add_argument(
        "--bucket-view", action="store_true", help="gradients are views of the buckets (gradient_as_bucket_view)"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--real", action="store_true", help="trace real tensors, for models that read values; takes memory and time"
    )
    how.add_argument(
        "--measure", action="store_true", help="also run real steps on this CPU; takes their memory and their time"
    )
    shown = parser.add_argument_group("what is shown and written")
    shown.add_argument(
        "--depth", metavar="N", type=int, default=1, help="1 for segments, 2 for the layers in them, ..."
    )
    shown.add_argument(
        "--sort",
        choices=["order", "peak", "saved", "parameters", "time"],
        default="order",
        help="order of the layers: as they run, or the largest first (default: order)",
    )
    shown.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    shown.add_argument("--csv", metavar="FILE", help="also write the table of layers; - prints it, and nothing else")
    shown.add_argument("--png", metavar="FILE", type=Path, help="also draw memory over the step")
    shown.add_argument("--html", metavar="FILE", type=Path, help="also write a page to explore in a browser")
    shown.add_argument(
        "--snapshot", metavar="FILE", type=Path, help="also write a recording for PyTorch's memory visualizer"
    )


def run(args: argparse.Namespace) -> int:
    """Print the profile and write the files; 0, whether or not it fits the card.

    Raises:
        UnknownNameError: no such model, segment, level or card.
        InputError: a number or an image size that does not hold, options that exclude each other, or a model that
            cannot be traced.
        MemsegError: the memory to measure is not there.
    """
    _check(args)
    if args.plan:
        from memseg.cli.profile_plan import profile_plan

        reports = profile_plan(args.plan)
        for number, report in enumerate(reports, start=1):
            _write_files(args, report, f"-{number}" if len(reports) > 1 else "")
        if args.json:
            print_json({"cards": [_object(args, report) for report in reports]})
            return 0
        for report in reports:
            _print(args, report)
        return 0
    card = _parse_card(args.card)
    _check_card(args, card)
    request = parse_job(args)
    report = _profile(args, request, card)
    if args.measure:
        report = _measure(report, request)
    _write_files(args, report, "")
    if args.csv == "-":
        sys.stdout.write(_csv(args, report))
        return 0
    if args.json:
        print_json(_object(args, report))
        return 0
    _print(args, report)
    return 0


def _rows(args: argparse.Namespace, report: "ProfileReport") -> "list[ProfileRow]":
    from memseg.reports.profile import SortKey

    return report.rows(depth=args.depth, sort=SortKey(args.sort))


def _csv(args: argparse.Namespace, report: "ProfileReport") -> str:
    from memseg.reports.profile import profile_csv

    return profile_csv(_rows(args, report))


def _object(args: argparse.Namespace, report: "ProfileReport") -> dict[str, Any]:
    from memseg.reports.profile import profile_object

    return profile_object(report, _rows(args, report))


def _print(args: argparse.Namespace, report: "ProfileReport") -> None:
    from memseg.reports.profile_view import profile_view

    wide_console().print(profile_view(report, _rows(args, report), tree=args.sort == "order"))


def _profile(args: argparse.Namespace, request: Request, card: "Card") -> "ProfileReport":
    from memseg.profiling import DataParallel, trace_job
    from memseg.profiling.card_memory import card_memory
    from memseg.reports.profile import ProfileReport

    data_parallel = None
    if args.replicas > 1:
        data_parallel = DataParallel(args.replicas, gradient_as_bucket_view=args.bucket_view)
    _tell(f"tracing a step of {args.model} on tensors without memory ...")
    profile = trace_job(
        partial(request.make, real=args.real), device=card.kind, data_parallel=data_parallel, real=args.real
    )
    memory = card_memory(profile, card, settings=_allocator(args), replicas=args.replicas)
    settings = dict(request.settings)
    if request.is_foreign:
        settings = {"inputs": list(profile.inputs), "loss": args.loss or profile.loss, **settings}
    for option in ("allocator", "replicas", "bucket_view"):
        if getattr(args, option) not in (None, 1, False):
            settings[option] = getattr(args, option)
    return ProfileReport(profile, card, memory, settings, judge_fit=args.card is not None)


def _allocator(args: argparse.Namespace) -> "AllocatorSettings | None":
    from memseg.profiling.allocator.settings import AllocatorSettings

    return AllocatorSettings.parse(args.allocator) if args.allocator else None


def _write_files(args: argparse.Namespace, report: "ProfileReport", suffix: str) -> None:
    """All files that were asked for; `suffix` tells those of one card from those of another."""

    def named(path: Path) -> Path:
        return path.with_stem(path.stem + suffix)

    if args.csv and args.csv != "-":
        replace_file(named(Path(args.csv)), _csv(args, report))
    if args.png:
        from memseg.reports.memory_curve import save_memory_curve

        save_memory_curve(report, named(args.png))
    if args.html:
        from memseg.reports.page import save_profile_page

        save_profile_page(report, named(args.html))
    if args.snapshot:
        from memseg.reports.recording import save_recording

        save_recording(report, named(args.snapshot), _allocator(args))


def _parse_card(text: str | None) -> "Card":
    from memseg.planning import parse_cards

    cards = parse_cards("cpu" if text is None else text)
    if len(cards) > 1:
        raise InputError(f"--card must name one card, got {text!r}; a step over several cards is for memseg plan")
    return cards[0]


def _check(args: argparse.Namespace) -> None:
    """Refuse numbers that are too small, and options that exclude each other."""
    for name in ("depth", "replicas"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if bool(args.model) == bool(args.plan):
        raise InputError(
            f"what to profile must be a MODEL or a --plan, got {'both' if args.model else 'neither'}; "
            "try memseg profile ladder-densenet121"
        )
    others = [name for name, default in _NOT_WITH_PLAN.items() if getattr(args, name) != default]
    if args.plan and (others or args.csv == "-"):
        option = f"--{others[0].replace('_', '-')}" if others else "--csv -"
        raise InputError(f"{option} does not go with --plan, which says what runs on which cards; leave it out")
    for name in ("csv", "png", "html", "snapshot"):
        if getattr(args, name) is not None and not Path(getattr(args, name)).name:
            raise InputError(f"--{name} must name a file, got {str(getattr(args, name))!r}; try layers.{name}")
    if args.measure and args.replicas > 1:
        raise InputError("--measure runs one process, so --replicas must be 1; leave one of them out")
    if args.csv == "-" and (args.json or args.measure):
        raise InputError(
            "--csv - leaves standard output to the table of layers, so neither --json nor --measure go with it; "
            "try --csv layers.csv"
        )
    if args.bucket_view and args.replicas == 1:
        raise InputError("--bucket-view is about replicas, of which there is one; try --replicas 2")


def _check_card(args: argparse.Namespace, card: "Card") -> None:
    """Refuse options that the card does not have."""
    if args.measure and card.kind != "cpu":
        raise InputError(f"--measure runs on this CPU, so --card must be a cpu card, got {card.name}; try cpu")
    if card.kind == "cpu" and (args.allocator or args.snapshot):
        option = "--allocator" if args.allocator else "--snapshot"
        raise InputError(
            f"{option} is about CUDA's allocator, so --card must be a CUDA card, got {card.name}; try v100"
        )


def _measure(report: "ProfileReport", request: Request) -> "ProfileReport":
    """The report with the peak of real steps.

    Raises:
        MemsegError: the memory is not there.
    """
    # torch's profiler, which counts the allocations, would log its progress; whoever wants that says so.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from memseg.profiling import measure_job

    predicted = report.timeline.peak_allocated_bytes
    _tell(f"measuring real steps, which take {format_bytes(predicted)} and more ...")
    try:
        measured = measure_job(partial(request.make, real=True))
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
