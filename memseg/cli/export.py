"""`memseg export`: a network as a file that runs without memseg."""

import argparse
import sys
from pathlib import Path

from memseg.cli.console import add_command
from memseg.units import format_bytes, parse_image

_PICTURES = 2
"""Batches of pictures that the file's answers are compared on."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Define the subcommand."""
    parser = add_command(
        subparsers,
        "export",
        run,
        summary="Write a network as ONNX or as a torch.export program, checked against the network itself.",
        examples=[
            "memseg export runs/camvid_mini --image 384x512 --out camvid.onnx",
            "memseg export runs/streets_demo --format torch --labels --out streets.pt2",
            "memseg export ladder-densenet121 --classes 11 --image 448x1024 --dynamic --out ladder.onnx",
        ],
    )
    parser.add_argument("network", metavar="MODEL", help="a run's folder or checkpoint, or a model's name")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--format", choices=["onnx", "torch"], default="onnx", help="torch is a .pt2 of torch.export (default: onnx)"
    )
    parser.add_argument(
        "--image", metavar="HxW", help="size of the images (default: that of the run's recipe, where it has one)"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images at a time (default: 1)")
    parser.add_argument(
        "--dynamic", action="store_true", help="leave batch, height and width free, in multiples of the output stride"
    )
    parser.add_argument("--labels", action="store_true", help="make class maps, (N, H, W), instead of logits")
    parser.add_argument("--classes", type=int, default=19, metavar="N", help="of a model that is no run (default: 19)")
    parser.add_argument("--checkpoint", default="last", metavar="WHICH", help="of a run: last, best, or a name")


def run(args: argparse.Namespace) -> int:
    """Write the file and say what it is; 0.

    Raises:
        InputError: an option does not hold, packages are missing, or the file would answer otherwise than the network.
        CheckpointError: the folder holds no run.
        UnknownNameError: there is no such model.
        OSError: the disk is full or cannot be written.
    """
    from memseg.errors import InputError

    for option in ("batch", "classes"):
        if getattr(args, option) < 1:
            raise InputError(f"--{option} must be 1 or more, got {getattr(args, option)}")
    asked = parse_image(args.image) if args.image else None

    import torch

    from memseg.inference.export import Format, check_packages, export_network
    from memseg.inference.networks import load_network, sample_pictures

    wanted = Format(args.format)
    check_packages(wanted)
    network = load_network(args.network, num_classes=args.classes, checkpoint=args.checkpoint)
    size = asked or (network.data.image if network.data is not None else None) or network.model.image
    if size is None:
        raise InputError(f"--image must say how large the images are, as {args.network} does not; try 448x1024")
    network.model.check_image(size)
    pictures, source = sample_pictures(network, size, args.batch * _PICTURES)
    worst = export_network(
        network.model,
        args.out,
        wanted=wanted,
        size=size,
        batch=args.batch,
        labels=args.labels,
        dynamic=args.dynamic,
        classes=network.classes,
        pictures=torch.split(pictures, args.batch),
        progress=lambda text: print(f"memseg export: {text}", file=sys.stderr),
    )
    what = "share of other labels" if args.labels else "largest difference of a logit, over the largest logit,"
    print(
        f"wrote {args.out}, {format_bytes(args.out.stat().st_size)}; {what} on random images and {source}: {worst:.1e}"
    )
    return 0
