"""`memseg bench infer`: images per second by the ways there are to run a network."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from memseg.cli.console import add_command, print_columns, print_json
from memseg.units import format_image, parse_image

if TYPE_CHECKING:
    from memseg.inference.infer_bench import InferRow

_SAMPLES = 12
"""Pictures besides those that are timed, on which 8-bit ranges are seen."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Define the subcommand."""
    parser = add_command(
        subparsers,
        "bench",
        run,
        summary="Time a network's forward: plain, norms folded, channels-last, in fewer bits, compiled.",
        examples=[
            "memseg bench infer ladder-densenet121 --image 448x1024",
            "memseg bench infer runs/camvid_mini --image 384x512 --configs folded,int8 --json",
            "memseg bench infer ladder-densenet169 --image 1024x2048 --device cuda --rounds 30",
        ],
    )
    parser.add_argument("what", choices=["infer"], help="infer: a forward from images to full-size logits")
    parser.add_argument("network", metavar="MODEL", help="a model's name, or a run's folder or checkpoint")
    parser.add_argument("--image", default="448x1024", metavar="HxW", help="size of the images (default: 448x1024)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images at a time (default: 1)")
    parser.add_argument("--classes", type=int, default=19, metavar="N", help="of a model that is no run (default: 19)")
    parser.add_argument(
        "--configs", metavar="LIST", help="ways to run it, with commas between (default: all; see docs/inference.md)"
    )
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="how often each is timed (default: 10)")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: torch's choice)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.02,
        metavar="SHARE",
        help="of pixels whose class may change in fewer bits than float32 (default: 0.02)",
    )
    parser.add_argument("--checkpoint", default="last", metavar="WHICH", help="of a run (default: last)")
    parser.add_argument(
        "--device", help="where the network runs, such as cpu or cuda:1 (default: cuda where there is one)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the table, or the object; 0.

    Raises:
        InputError: an option does not hold, or the network does not take such images.
        CheckpointError: the folder holds no run.
        UnknownNameError: there is no such model or configuration.
    """
    from memseg.errors import InputError

    for option in ("batch", "rounds", "classes", "threads"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise InputError(f"--{option} must be 1 or more, got {value}")
    if not 0 <= args.tolerance <= 1:
        raise InputError(f"--tolerance must be a share, from 0 to 1, got {args.tolerance}")
    size = parse_image(args.image)

    import torch

    from memseg.cli.device import choose_device
    from memseg.inference.infer_bench import CONFIGS, bench_inference, check_configs
    from memseg.inference.networks import load_network, sample_pictures
    from memseg.profiling.machine import machine, versions

    device = choose_device(args.device)
    names = check_configs(args.configs.split(",") if args.configs else list(CONFIGS))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    network = load_network(args.network, num_classes=args.classes, checkpoint=args.checkpoint)
    network.model.check_image(size)
    pictures, source = sample_pictures(network, size, args.batch * (1 + _SAMPLES))
    images, *samples = torch.split(pictures, args.batch)
    rows = bench_inference(
        network.model,
        images,
        samples,
        configs=names,
        device=device,
        rounds=args.rounds,
        reduced_tolerance=args.tolerance,
        progress=lambda text: print(f"memseg bench: {text}", file=sys.stderr),
    )
    if args.json:
        print_json(
            {
                "model": args.network,
                "weights": "random" if network.step is None else f"after {network.step} steps",
                "image": format_image(size),
                "batch": args.batch,
                "pictures": source,
                "output": "logits",
                "machine": machine(device),
                "versions": versions(),
                "rows": [_row(row, args.batch) for row in rows],
            }
        )
    else:
        _print_rows(rows, args, source, device, trained=network.step is not None)
    return 0


def _row(row: "InferRow", batch: int) -> dict[str, Any]:
    if row.error is not None:
        return {"name": row.name, "error": row.error}
    return {
        "name": row.name,
        "images_per_second": batch / row.median_s,
        "median_s": row.median_s,
        "min_s": min(row.seconds),
        "max_s": max(row.seconds),
        "speedup": row.speedup,
        "min_speedup": min(row.speedups),
        "max_speedup": max(row.speedups),
        "prepare_s": row.prepare_s,
        "max_difference": row.max_difference,
        "changed_share": row.changed_share,
        "within_tolerance": row.within_tolerance,
    }


def _print_rows(rows: "list[InferRow]", args: argparse.Namespace, source: str, device: Any, *, trained: bool) -> None:
    from memseg.profiling.machine import machine, versions

    measured_on = ", ".join(f"{key} {value}" for key, value in {**machine(device), **versions()}.items())
    weights = "its trained weights" if trained else "random weights"
    print(
        f"{args.network}, {weights}, {source}, images to full-size logits, {args.image}, batch {args.batch}\n"
        f"{measured_on}\n"
    )
    table = [("configuration", "images/s", "median", "range", "speed-up", "max difference", "changed", "answers")]
    for row in rows:
        if row.error is not None:
            table.append((row.name, "-", "-", "-", "-", "-", "-", f"cannot run here: {row.error}"))
            continue
        table.append(
            (
                row.name,
                f"{args.batch / row.median_s:.2f}",
                f"{row.median_s * 1000:.0f} ms",
                f"{min(row.seconds) * 1000:.0f}-{max(row.seconds) * 1000:.0f} ms",
                f"{row.speedup:.2f}",
                f"{row.max_difference:.1e}",
                f"{row.changed_share:.3%}",
                "within tolerance" if row.within_tolerance else "OUT OF TOLERANCE",
            )
        )
    print_columns(table)
    good = [row for row in rows if row.error is None and row.within_tolerance]
    best = max(good, key=lambda row: row.speedup)
    print(f"\nbest within tolerance: {best.name}, {best.speedup:.2f} times eager")
    if not trained and any(row.error is None and not row.within_tolerance for row in rows):
        print("random weights magnify rounding as trained ones do not: judge fewer bits on a run")
