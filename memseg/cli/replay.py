"""`memseg replay`: what a recording's step would reserve under other settings of the allocator."""

import argparse
import sys
from pathlib import Path

from memseg.cli.console import add_command, print_json, wide_console


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Define the subcommand."""
    parser = add_command(
        subparsers,
        "replay",
        run,
        summary="Replay a memory recording under other settings of PyTorch's allocator and on smaller cards.",
        examples=[
            "memseg replay step.pickle",
            "memseg replay step.pickle --capacity 8GiB --png replay.png",
            "memseg replay step.pickle --allocator expandable_segments:True "
            "--allocator max_split_size_mb:256,roundup_power2_divisions:8",
        ],
    )
    parser.add_argument(
        "recording",
        metavar="RECORDING",
        type=Path,
        help="what torch.cuda.memory._dump_snapshot wrote, or memseg profile --snapshot",
    )
    parser.add_argument(
        "--allocator",
        metavar="SETTINGS",
        action="append",
        help="as in PYTORCH_CUDA_ALLOC_CONF, such as expandable_segments:True; may be repeated (default: torch's "
        "defaults and a few that often help); those of the recording are always replayed",
    )
    parser.add_argument(
        "--capacity",
        metavar="SIZE",
        help="what the allocator can have of each device, as in 8GiB: less than the card has, by the CUDA context and "
        "other processes (default: without limit)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--png", metavar="FILE", type=Path, help="also draw what is reserved and allocated")


def run(args: argparse.Namespace) -> int:
    """Print what was replayed and draw it; 0, whether or not it fits.

    Raises:
        InputError: the file is not a recording, or settings or capacity do not hold.
    """
    from memseg.units import parse_bytes

    capacity = None if args.capacity is None else parse_bytes(args.capacity)

    from memseg.profiling.allocator.recording import read_snapshot
    from memseg.profiling.allocator.settings import AllocatorSettings
    from memseg.reports.replay import replay_object, try_settings
    from memseg.reports.replay_view import replay_view

    others = None if args.allocator is None else [AllocatorSettings.parse(text) for text in args.allocator]
    recording = read_snapshot(args.recording)
    if sys.stderr.isatty():
        print(f"replaying {sum(len(one.events) for one in recording.devices)} events ...", file=sys.stderr)
    report = try_settings(recording, others, capacity)
    if args.png:
        from memseg.reports.replay_curve import save_replay_curve

        save_replay_curve(report, args.png, name=str(args.recording))
    if args.json:
        print_json(replay_object(report))
        return 0
    wide_console().print(replay_view(report, name=str(args.recording)))
    return 0
