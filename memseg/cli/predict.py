"""`memseg predict`: label maps for pictures of one's own."""

import argparse
from pathlib import Path

from memseg.cli.console import add_command, progress_bar


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Define the subcommand."""
    parser = add_command(
        subparsers,
        "predict",
        run,
        summary="Label pictures with a trained network, each at its own size.",
        examples=[
            "memseg predict runs/streets_demo street.png --out labelled",
            "memseg predict runs/camvid_mini pictures/ more.jpg --out labelled --device cpu",
        ],
    )
    parser.add_argument("trained", metavar="RUN", type=Path, help="a run's folder, or one of its checkpoints")
    parser.add_argument("images", metavar="IMAGES", nargs="+", type=Path, help="pictures, or folders of pictures")
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="where NAME_labels.png (class indices, 255 for none) and NAME_overlay.png go",
    )
    parser.add_argument(
        "--device", help="where the network runs, such as cpu or cuda:1 (default: cuda where there is one)"
    )


def run(args: argparse.Namespace) -> int:
    """Write two files for each picture and print where they are; 0.

    Raises:
        DataError: a picture is missing or cannot be read.
        CheckpointError: no run lies there.
    """
    from memseg.cli.device import choose_device
    from memseg.inference.labelling import Framing
    from memseg.inference.predict import find_images, predict_images
    from memseg.training.checkpoint import load_trained

    device = choose_device(args.device)
    images = find_images(args.images)
    trained = load_trained(args.trained)
    framing = Framing.of(trained.recipe.data)
    with progress_bar("labelling") as progress:
        predictions = predict_images(
            trained.model, images, args.out, trained.classes, device=device, framing=framing, progress=progress
        )
    print(f"labelled {len(predictions)} picture{'s' if len(predictions) != 1 else ''} in {args.out}")
    return 0
