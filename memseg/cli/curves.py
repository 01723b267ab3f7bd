"""`memseg curves`: the course of a run as a picture."""

import argparse
from pathlib import Path

from memseg.cli.console import add_command
from memseg.errors import InputError


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Define the subcommand."""
    parser = add_command(
        subparsers,
        "curves",
        run,
        summary="Draw a run's loss and scores as a PNG.",
        examples=["memseg curves runs/streets_demo", "memseg curves runs/camvid_mini -o camvid.png"],
    )
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the picture (default: RUN/curves.png)")


def run(args: argparse.Namespace) -> int:
    """Write the picture; 0.

    Raises:
        CheckpointError: no run lies there.
        InputError: the run has logged nothing yet.
    """
    from memseg.reports.training_curves import save_training_curves
    from memseg.training.checkpoint import load_run
    from memseg.training.log import read_metrics

    recipe, _ = load_run(args.run_folder)
    records = read_metrics(args.run_folder)
    if not records:
        raise InputError(f"{args.run_folder}: has logged no step yet; train first: memseg train")
    output: Path = args.output or args.run_folder / "curves.png"
    height, width = recipe.data.image
    title = f"{recipe.model.name} on {recipe.data.dataset}, {height}x{width}, batch {recipe.train.batch}"
    save_training_curves(records, output, title=title)
    print(f"curves written to {output}")
    return 0
