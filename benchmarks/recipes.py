"""Every shipped recipe on real frames: python -m benchmarks.recipes DATA [--json].

Each recipe's data set is opened as it is shipped, and one batch read at its full size through the loader. Then
`memseg train` takes a few steps at a quarter of that size, scored on the validation split at the end:

    batch       images read at the recipe's own size, as the network would get them
    loss        of the last step
    peak        the allocator's over the steps at reduced size, predicted and measured

The frames are few, so scores mean nothing and are not shown. Weights are random, for none can be downloaded on the
machines this runs on; rows of table 4 and 5 begin with what the row of table 1 has learnt in its few steps.

Args:
    DATA: A folder with cityscapes/, camvid/ and voc2012/ in it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.result import count, progress, tell
from memseg.data.loader import make_loader
from memseg.data.streets import Streets
from memseg.models import build_model
from memseg.training.recipe import Recipe, load_recipe
from memseg.training.shipped import shipped_recipes

CARDS = "cpu:8GiB"
FIRST = "table1_ladder_densenet169"
"""What others begin with goes first."""
_REDUCTION = 4


def measure(name: str, roots: dict[str, Path], runs: Path, steps: int) -> dict[str, str | int | float]:
    """One row."""
    settings: dict[str, object] = {"model.encoder_weights": "none"}
    shipped = load_recipe(name)
    if shipped.data.dataset in roots:
        settings["data.root"] = roots[shipped.data.dataset]
    if shipped.model.initial_weights:
        settings["model.initial_weights"] = runs / shipped.model.initial_weights.name
    recipe = load_recipe(name, _words(settings))
    dataset = recipe.data.open_train()
    # VOC's sample has fewer pictures than a step of the recipe takes.
    batch = min(recipe.train.batch, len(dataset))
    images, target = _batch(recipe, batch)
    with torch.device("meta"):
        stride = build_model(recipe.model.name).output_stride
    height, width = (max(1, side // _REDUCTION // stride) * stride for side in recipe.data.image)
    settings |= {
        "data.image": f"{height}x{width}",
        "data.fit": "resize",
        "train.batch": batch,
        "train.evaluate_every": 1,
        "schedule.steps": steps,
        **({"data.streets.length": 8, "data.streets.val_length": 4} if recipe.data.dataset == "streets" else {}),
    }
    folder = runs / name
    options = [part for word in _words(settings) for part in ("--set", word)]
    done = _memseg("train", name, *options, "--cards", CARDS, "--out", folder, "--json")
    result: dict[str, Any] = json.loads(done)
    (card,) = result["cards"]
    return {
        "name": name,
        "batch": "x".join(map(str, images.shape)),
        "labelled": (target != 255).double().mean().item(),
        "trained_at": f"{batch}x{height}x{width}",
        "loss": result["loss"],
        "predicted_peak_bytes": card["predicted_peak_bytes"],
        "measured_peak_bytes": card["measured_peak_bytes"],
        "error": card["predicted_peak_bytes"] / card["measured_peak_bytes"] - 1,
    }


def _batch(recipe: Recipe, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch at the recipe's own size, by its own loader."""
    recipe.data.open_val()
    view = recipe.data.training_view(recipe.data.open_train(), seed=recipe.train.seed)
    wanted = [[(0, index) for index in range(batch)]]
    (loaded,) = make_loader(view, wanted, workers=1, device=torch.device("cpu"))
    assert tuple(loaded["image"].shape) == (batch, 3, *recipe.data.image), recipe.name
    assert loaded["target"].dtype == torch.uint8, recipe.name
    return loaded["image"], loaded["target"]


def _words(settings: dict[str, object]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


def _memseg(*arguments: object) -> str:
    line = [sys.executable, "-m", "memseg.cli.main", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))} ended with {done.returncode}: {done.stderr}")
    return done.stdout


def roots_in(data: Path, made: Path) -> dict[str, Path]:
    """Where each data set lies; `folder` is made of streets, and VOC gets an empty list of further labels."""
    for split in ("train", "val"):
        scenes = Streets(split, size=(512, 1024), length=4)
        for kind in ("images", "labels"):
            (made / "mine" / kind / split).mkdir(parents=True)
        for index in range(len(scenes)):
            Image.fromarray(scenes.image(index)).save(made / "mine/images" / split / f"{index}.png")
            Image.fromarray(scenes.target(index)).save(made / "mine/labels" / split / f"{index}.png")
    (made / "mine/classes.txt").write_text("\n".join(Streets.classes.names) + "\n")
    voc = made / "voc"
    (voc / "SegmentationClassAug").mkdir(parents=True)
    (voc / "VOCdevkit").symlink_to((data / "voc2012/VOCdevkit").resolve())
    return {
        "cityscapes": (data / "cityscapes").resolve(),
        "camvid": (data / "camvid").resolve(),
        "voc": voc,
        "folder": made / "mine",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all recipes, or those named, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder with cityscapes/, camvid/ and voc2012/ in it")
    parser.add_argument("--only", metavar="WORD", default="", help="recipes whose name has this in it")
    parser.add_argument("--steps", type=count, default=2, help="of each recipe (default: 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(arguments)
    names = sorted((name for name in shipped_recipes() if args.only in name), key=lambda name: (name != FIRST, name))
    rows = []
    with tempfile.TemporaryDirectory() as folder, progress(len(names)) as begin:
        roots = roots_in(args.data, Path(folder))
        for name in names:
            begin(name)
            rows.append(measure(name, roots, Path(folder) / "runs", args.steps))
    tell(rows, as_json=args.json)


if __name__ == "__main__":
    main()
