"""`memseg predict`: label maps for pictures and videos of one's own."""

import argparse
from pathlib import Path
from typing import Any

from memseg.cli.console import add_command, progress_bar
from memseg.cli.network_options import add_network_options, use_network


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Define the subcommand."""
    parser = add_command(
        subparsers,
        "predict",
        run,
        summary="Label pictures and videos with a trained network, each at its own size.",
        examples=[
            "memseg predict runs/streets_demo street.png --out labelled",
            "memseg predict runs/camvid_mini pictures/ more.jpg --out labelled --device cpu",
            "memseg predict runs/camvid_mini drive.mp4 --every 5 --out labelled",
            "memseg predict runs/camvid_mini pictures/ --scales 0.75,1,1.25 --flip --out labelled",
        ],
    )
    add_network_options(parser)
    parser.add_argument(
        "images", metavar="FILES", nargs="+", type=Path, help="pictures, videos, or folders of them; videos need PyAV"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="where NAME_labels.png (class indices, 255 for none) and NAME_overlay.png go; of a video "
        "NAME/NUMBER_labels.png and NAME_overlay.mp4",
    )
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="of a video, label every N-th picture (default: 1)"
    )
    parser.add_argument("--no-overlay", dest="overlay", action="store_false", help="write the labels only")
    parser.add_argument("--no-labels", dest="labels", action="store_false", help="write the overlays only")


def run(args: argparse.Namespace) -> int:
    """Write the results of each picture and video and print where they are; 0.

    Raises:
        InputError: PyAV is missing for a video, or nothing would be written.
        DataError: a picture or video is missing or cannot be read.
        CheckpointError: no run lies there, or it has no such checkpoint.
    """
    from memseg.errors import InputError
    from memseg.inference.predict import check_inputs, find_inputs, predict_images, predict_video

    if not args.overlay and not args.labels:
        raise InputError("--no-overlay and --no-labels together leave nothing to write; give one of them")
    if args.every < 1:
        raise InputError(f"--every must be 1 or more pictures, got {args.every}")
    inputs = find_inputs(args.images, args.out)
    network = use_network(args)
    framing = network.framing(network.trained.recipe)
    check_inputs(inputs, framing)
    model, classes = network.trained.model, network.trained.classes
    how: dict[str, Any] = {
        "device": network.device,
        "framing": framing,
        "precision": network.precision,
        "labels": args.labels,
        "overlay": args.overlay,
    }
    pictures = 0
    if inputs.images:
        with progress_bar("labelling") as progress:
            pictures += len(predict_images(model, inputs.images, args.out, classes, progress=progress, **how))
    for path in inputs.videos:
        with progress_bar(path.name) as progress:
            done = predict_video(model, path, args.out, classes, every=args.every, progress=progress, **how)
        pictures += done.frames
    print(f"labelled {pictures} picture{'s' if pictures != 1 else ''} in {args.out}")
    return 0
