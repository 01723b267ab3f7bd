"""`memseg eval`: the score of a trained network."""

import argparse
import csv
import io
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memseg.cli.console import add_command, print_columns, print_json, progress_bar
from memseg.cli.network_options import add_data_options, add_network_options, override_data, use_network
from memseg.units import format_seconds

if TYPE_CHECKING:
    from memseg.data import SegmentationDataset
    from memseg.inference.evaluate import EvalResult
    from memseg.inference.worst import WorstImages


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Define the subcommand."""
    parser = add_command(
        subparsers,
        "eval",
        run,
        summary="Score a trained network on a split of its data set, at full size.",
        examples=[
            "memseg eval runs/streets_demo",
            "memseg eval runs/streets_demo --out scores --worst 20",
            "memseg eval runs/camvid_mini --split train --json",
            "memseg eval runs/camvid_mini --checkpoint best --scales 0.75,1,1.25 --flip",
            "memseg eval runs/ldn121_cityscapes --set data.root=/data/cityscapes --device cuda",
        ],
    )
    add_network_options(parser)
    parser.add_argument("--split", help="split of the data set (default: data.val_split of the run)")
    add_data_options(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write results.json, images.csv, confusion.png, index.html, and the worst pictures to worst/",
    )
    parser.add_argument(
        "--worst",
        type=int,
        default=10,
        metavar="N",
        help="how many of the worst pictures --out shows, each as input, truth and prediction (default: 10)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the score of each class, or the object; 0.

    Raises:
        InputError: the data set has other classes than the run was trained on.
        CheckpointError: no run lies there, or it has no such checkpoint.
    """
    from memseg.errors import InputError
    from memseg.inference.evaluate import evaluate
    from memseg.inference.worst import WorstImages

    if args.worst < 0:
        raise InputError(f"--worst must be 0 or more pictures, got {args.worst}")
    network = use_network(args)
    recipe = override_data(network.trained.recipe, args.overrides)
    dataset = recipe.data.open(args.split or recipe.data.val_split)
    network.check_classes(dataset.classes, f"the data set {dataset.name}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    worst = WorstImages(args.worst if args.out else 0)
    with progress_bar(f"{dataset.name} {dataset.split}") as progress:
        result = evaluate(
            network.trained.model,
            dataset,
            device=network.device,
            framing=network.framing(recipe),
            precision=network.precision,
            progress=progress,
            labelled=worst.add,
        )
    told = {**network.settings(), "split": dataset.split, **result.to_json()}
    if args.out:
        _write_report(args.out, f"{recipe.name}, {dataset.name} {dataset.split}", dataset, result, told, worst)
    if args.json:
        print_json(told)
    else:
        print_scores(result, network.trained.step)
        if args.out:
            print(f"pictures, confusion matrix and the score of each picture: {args.out / 'index.html'}")
    return 0


def print_scores(result: "EvalResult", steps: int) -> None:
    """IoU of each class and category with their means, iIoU where there is one, and pixel accuracy."""
    of_classes = _rows(result.iou, result.miou, result.iiou, result.miiou)
    print_columns([_heads("class", result), *of_classes])
    if result.category_miou is not None:
        of_categories = _rows(result.category_iou, result.category_miou, result.category_iiou, result.category_miiou)
        print()
        print_columns([_heads("category", result), *of_categories])
    if result.iiou and result.instance_images < result.images:
        print(
            f"\niIoU is over the {result.instance_images} of {result.images} pictures that have a map of instances; "
            "the other scores are over all"
        )
    print(
        f"\npixel accuracy {result.pixel_accuracy:.2%} over {result.images} pictures "
        f"after {steps} steps of training, in {format_seconds(result.seconds)}"
    )


def _heads(what: str, result: "EvalResult") -> list[str]:
    return [what, "    IoU", *(["   iIoU"] if result.iiou else [])]


def _rows(
    iou: dict[str, float | None], mean: float, iiou: dict[str, float | None], instance_mean: float | None
) -> list[list[str]]:
    rows = []
    for name, score in iou.items():
        cells = [name, _percent(score)]
        if iiou:
            cells.append(_percent(iiou[name]) if name in iiou else "")
        rows.append(cells)
    return [*rows, ["mean", _percent(mean), *([_percent(instance_mean)] if iiou else [])]]


def _percent(score: float | None) -> str:
    return "not there" if score is None else f"{score:7.2%}"


def _write_report(
    folder: Path,
    title: str,
    dataset: "SegmentationDataset",
    result: "EvalResult",
    told: dict[str, Any],
    worst: "WorstImages",
) -> None:
    """All files of `--out`."""
    from memseg.files import replace_file
    from memseg.inference.evaluate import ImageScore
    from memseg.reports.confusion import save_confusion_picture

    names, counts = dataset.classes.names, result.confusion.counts
    whole = {**told, "classes": list(names), "confusion": counts.tolist()}
    replace_file(folder / "results.json", json.dumps(whole, indent=2, allow_nan=False) + "\n")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    columns = [field.name for field in fields(ImageScore)]
    writer.writerow(columns)
    writer.writerows([getattr(score, column) for column in columns] for score in result.image_scores)
    replace_file(folder / "images.csv", table.getvalue())
    save_confusion_picture(counts.numpy(), names, folder / "confusion.png", title=f"{title}: mIoU {result.miou:.2%}")
    _write_page(folder, title, dataset, result, worst)


def _write_page(
    folder: Path, title: str, dataset: "SegmentationDataset", result: "EvalResult", worst: "WorstImages"
) -> None:
    """index.html, and in worst/ its pictures at full quality."""
    from memseg.inference.images import jpeg_bytes, save_png
    from memseg.inference.worst import caption, captioned, strip
    from memseg.reports.evaluation_page import ClassRow, Picture, save_evaluation_page

    pictures = folder / "worst"
    pictures.mkdir(exist_ok=True)
    for old in pictures.iterdir():
        if re.fullmatch(r"\d{3,}_.*\.png", old.name):
            old.unlink()
    shown = []
    for rank, (score, labels) in enumerate(worst.ranked(), start=1):
        sheet = strip(dataset, score, labels)
        save_png(captioned(sheet, caption(score)), pictures / f"{rank:03d}_{score.key}.png")
        shown.append(Picture(f"{rank}. {caption(score)}", jpeg_bytes(sheet)))
    counts = result.confusion.counts
    shares = (counts.sum(1).double() / counts.sum()).tolist()
    rows = zip(dataset.classes.names, dataset.classes.colours, shares, strict=True)
    save_evaluation_page(
        folder / "index.html",
        title=title,
        figures=_figures(result),
        classes=[
            ClassRow(name, colour, share, result.iou[name], result.iiou.get(name)) for name, colour, share in rows
        ],
        confusion_png=(folder / "confusion.png").read_bytes(),
        worst=shown,
    )


def _figures(result: "EvalResult") -> list[tuple[str, str, str]]:
    """The scores at the top of the page."""
    figures = [
        ("mIoU", f"{result.miou:.2%}", f"mean over {_found(result.iou)} classes"),
        ("pixel accuracy", f"{result.pixel_accuracy:.2%}", f"{result.images} pictures"),
    ]
    if result.category_miou is not None:
        mean = f"mean over {_found(result.category_iou)} categories"
        figures.append(("IoU of categories", f"{result.category_miou:.2%}", mean))
    if result.miiou is not None:
        figures.append(("iIoU", f"{result.miiou:.2%}", f"{result.instance_images} pictures with maps of instances"))
    return figures


def _found(scores: dict[str, float | None]) -> str:
    return f"{sum(score is not None for score in scores.values())} of {len(scores)}"
