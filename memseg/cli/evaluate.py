"""`memseg eval`: the score of a trained network."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from memseg.cli.console import add_command, print_columns, print_json, progress_bar
from memseg.units import format_seconds

if TYPE_CHECKING:
    from memseg.inference.evaluate import EvalResult


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Define the subcommand."""
    parser = add_command(
        subparsers,
        "eval",
        run,
        summary="Score a trained network on a split of its data set, at full size.",
        examples=[
            "memseg eval runs/streets_demo",
            "memseg eval runs/camvid_mini --split train --json",
            "memseg eval runs/ldn121_cityscapes --set data.root=/data/cityscapes --device cuda",
        ],
    )
    parser.add_argument("trained", metavar="RUN", type=Path, help="a run's folder, or one of its checkpoints")
    parser.add_argument("--split", default="val", help="split of the data set (default: val)")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="replace a value of the recipe's data table, such as data.root; may be given again",
    )
    parser.add_argument(
        "--device", help="where the network runs, such as cpu or cuda:1 (default: cuda where there is one)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the score of each class, or the object; 0.

    Raises:
        InputError: the data set has other classes than the run was trained on.
        CheckpointError: no run lies there.
    """
    from memseg.cli.device import choose_device
    from memseg.errors import InputError
    from memseg.inference.evaluate import evaluate
    from memseg.inference.labelling import Framing
    from memseg.training.checkpoint import load_trained
    from memseg.training.recipe import override_recipe

    if others := [text for text in args.overrides if not text.startswith("data.")]:
        raise InputError(f"--set may only replace values of the data set here (data.root, ...), got {others[0]}")
    device = choose_device(args.device)
    trained = load_trained(args.trained)
    recipe = override_recipe(trained.recipe, args.overrides)
    dataset = recipe.data.open(args.split)
    if dataset.classes.names != trained.classes.names:
        raise InputError(
            f"the data set must have the classes that the run was trained on ({', '.join(trained.classes.names)}), "
            f"{dataset.name} has {', '.join(dataset.classes.names)}"
        )
    with progress_bar(f"{dataset.name} {args.split}") as progress:
        result = evaluate(trained.model, dataset, device=device, framing=Framing.of(recipe.data), progress=progress)
    if args.json:
        print_json({"steps": trained.step, **asdict(result)})
    else:
        print_scores(result, trained.step)
    return 0


def print_scores(result: "EvalResult", steps: int) -> None:
    """IoU of each class, their mean, and pixel accuracy."""
    rows = [(name, "not there" if iou is None else f"{iou:7.2%}") for name, iou in result.iou.items()]
    print_columns([("class", "    IoU"), *rows, ("mean", f"{result.miou:7.2%}")])
    print(
        f"\npixel accuracy {result.pixel_accuracy:.2%} over {result.images} pictures "
        f"after {steps} steps of training, in {format_seconds(result.seconds)}"
    )
