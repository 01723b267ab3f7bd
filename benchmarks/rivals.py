"""memseg's networks beside those of other libraries: python -m benchmarks.rivals DATA [--json].

The same real pictures in the same order, the same flips, steps, optimizer and schedule, from scratch; each row in
processes of its own:

    ladder-densenet121-plain                the paper's network as torch alone would train it
    ladder-densenet121, ladder-resnet50     as memseg does: level `units`, and the loss by bands
    smp-unet-densenet121,                   segmentation_models_pytorch (pip install ".[rivals]"), as its users run it:
    smp-deeplabv3plus-resnet50              cross-entropy at full size
    torchvision-deeplabv3-resnet50          likewise; its auxiliary head is trained too, as its references do

    peak        the allocator's, over the first two steps, parameters and optimizer state included
    step        median seconds of a step; the rows take turns, `--rounds` times
    mIoU        on the validation split, labels at full size, after `--steps` steps

Args:
    DATA: CamVid's folder, which holds images/ and labels/.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.result import count, progress, tell
from memseg.data import IGNORE_INDEX
from memseg.inference.evaluate import evaluate
from memseg.inference.labelling import Framing
from memseg.levels import Recompute
from memseg.models import build_model
from memseg.models.segmented import SegmentedModel
from memseg.profiling.measure import watch_allocator
from memseg.training.recipe import Recipe, load_recipe
from memseg.training.schedule import poly_lr

CLASSES, AUX_WEIGHT = 11, 0.3
_MEASURED_STEPS = 2


class Rival(nn.Module):
    """A network of others, as an evaluation asks it.

    Args:
        network: Makes full-size logits (N, classes, H, W); or a dict of them, "out" and "aux", as torchvision's do.
    """

    output_stride, num_classes = 32, CLASSES

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def coarse_outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of images, the main ones first."""
        out = self.network(images)
        return tuple(out.values()) if isinstance(out, dict) else (out,)

    def loss(self, images: Tensor, target: Tensor) -> Tensor:
        """As the users of these libraries compute it."""
        labels = target.long()
        main, *auxiliary = (F.cross_entropy(x, labels, ignore_index=IGNORE_INDEX) for x in self.coarse_outputs(images))
        return main * (1 - AUX_WEIGHT) + auxiliary[0] * AUX_WEIGHT if auxiliary else main


class Ours(nn.Module):
    """A network of memseg's with its loss: of bands, or as torch alone computes it."""

    num_classes = CLASSES

    def __init__(self, model: SegmentedModel, level: Recompute) -> None:
        super().__init__()
        model.set_recompute(level)
        self.model, self.objective, self.is_plain = model, model.objective(AUX_WEIGHT), level is Recompute.NONE
        self.output_stride = model.output_stride

    def coarse_outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """Coarse logits, the main ones first."""
        return self.model.coarse_outputs(images)

    def loss(self, images: Tensor, target: Tensor) -> Tensor:
        """The objective of the recipe."""
        outputs = self.coarse_outputs(images)
        if not self.is_plain:
            return self.objective(*outputs, target)
        full = (F.interpolate(x, target.shape[1:], mode="bilinear", align_corners=False) for x in outputs)
        main, auxiliary = (F.cross_entropy(x, target.long(), ignore_index=IGNORE_INDEX) for x in full)
        return main * (1 - AUX_WEIGHT) + auxiliary * AUX_WEIGHT


def _smp(name: str, encoder: str) -> Rival:
    import segmentation_models_pytorch as smp

    return Rival(getattr(smp, name)(encoder, encoder_weights=None, classes=CLASSES))


def _deeplab() -> Rival:
    from torchvision.models.segmentation import deeplabv3_resnet50

    return Rival(deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True))


def _ours(name: str, level: Recompute) -> Ours:
    return Ours(build_model(name, num_classes=CLASSES), level)


NETWORKS: dict[str, Callable[[], Rival | Ours]] = {
    "ladder-densenet121": lambda: _ours("ladder-densenet121", Recompute.UNITS),
    "ladder-densenet121-plain": lambda: _ours("ladder-densenet121", Recompute.NONE),
    "ladder-resnet50": lambda: _ours("ladder-resnet50", Recompute.UNITS),
    "smp-unet-densenet121": lambda: _smp("Unet", "densenet121"),
    "smp-deeplabv3plus-resnet50": lambda: _smp("DeepLabV3Plus", "resnet50"),
    "torchvision-deeplabv3-resnet50": _deeplab,
}


@dataclass(frozen=True)
class Run:
    """What one process does."""

    name: str
    data: Path
    steps: int
    """That it takes."""
    length: int
    """Of the whole run, which the learning rate falls along."""
    scored: bool

    def found(self) -> dict[str, Any]:
        """By a fresh process."""
        options = [self.name, self.data, self.steps, self.length, *(["scored"] if self.scored else [])]
        line = [sys.executable, "-m", "benchmarks.rivals", "--process", *map(str, options)]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{self.name} ended with {done.returncode}")
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def carry_out(self) -> dict[str, Any]:
        """In this process."""
        recipe = load_recipe("camvid_ladder_densenet121", [f"data.root={self.data}"])
        options, seconds = recipe.optimizer, []
        torch.manual_seed(recipe.train.seed)
        with ExitStack() as measuring:
            # Everything from the first weight on, as far as the second step, the first with the optimizer's state.
            peak = measuring.enter_context(watch_allocator(torch.device("cpu")))
            network = NETWORKS[self.name]().train()
            optimizer = torch.optim.Adam(
                network.parameters(), options.lr, weight_decay=options.weight_decay, fused=True
            )
            for step, (images, target) in enumerate(_batches(recipe, self.steps)):
                for group in optimizer.param_groups:
                    group["lr"] = poly_lr(options.lr, step, self.length, recipe.schedule.poly_power)
                began = time.perf_counter()
                network.loss(images, target).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if step >= _MEASURED_STEPS:
                    seconds.append(time.perf_counter() - began)
                elif step == _MEASURED_STEPS - 1:
                    measuring.close()
        parameters = sum(parameter.numel() for parameter in network.parameters())
        found = {"peak_bytes": peak.peak_bytes, "seconds": seconds, "parameters": parameters}
        if self.scored:
            score = evaluate(network, recipe.data.open_val(), framing=Framing.of(recipe.data))
            found |= {"miou": score.miou, "pixel_accuracy": score.pixel_accuracy}
        return found


def _batches(recipe: Recipe, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and targets of each step, in the recipe's order."""
    view = recipe.data.training_view(recipe.data.open_train(), seed=recipe.train.seed)
    per_epoch = len(view) // recipe.train.batch
    for step in range(steps):
        epoch, position = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(recipe.train.seed * 1_000_003 + epoch)
        order = torch.randperm(len(view), generator=generator).tolist()
        samples = [view[epoch, index] for index in order[position * recipe.train.batch :][: recipe.train.batch]]
        images = torch.stack([sample["image"] for sample in samples]).contiguous(memory_format=torch.channels_last)
        yield images, torch.stack([sample["target"] for sample in samples])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and train all networks, or those named, and print them."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--process"]:
        name, data, steps, length, *scored = words[1:]
        print(json.dumps(Run(name, Path(data), int(steps), int(length), bool(scored)).carry_out()))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="CamVid's folder, which holds images/ and labels/")
    parser.add_argument("--only", metavar="NAMES", default=",".join(NETWORKS), help="rows, with commas")
    parser.add_argument("--steps", type=count, default=450, help="of each training (default: 450, 10 epochs)")
    parser.add_argument("--rounds", type=count, default=3, help="of timed steps (default: 3)")
    parser.add_argument("--results", type=Path, metavar="FILE", help="keep what is finished there, and go on from it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(words)
    names = args.only.split(",")
    if unknown := [name for name in names if name not in NETWORKS]:
        parser.error(f"--only: known are {', '.join(NETWORKS)}, got {unknown[0]}")
    timed = [Run(name, args.data, 4, args.steps, scored=False) for _ in range(args.rounds) for name in names]
    trained = [Run(name, args.data, args.steps, args.steps, scored=True) for name in names]
    runs = [*(f"{run.name} time {index}" for index, run in enumerate(timed)), *(f"{run.name} score" for run in trained)]
    kept = json.loads(args.results.read_text()) if args.results and args.results.exists() else {}
    with progress(len(runs)) as begin:
        for key, run in zip(runs, [*timed, *trained], strict=True):
            begin(key)
            if key not in kept:
                kept[key] = run.found()
                if args.results:
                    args.results.write_text(json.dumps(kept))
    tell(
        [_row(name, {key: kept[key] for key in runs if key.startswith(f"{name} ")}) for name in names],
        as_json=args.json,
    )


def _row(name: str, found: dict[str, dict[str, Any]]) -> dict[str, str | int | float]:
    score = found.pop(f"{name} score")
    return {
        "name": name,
        "parameters": score["parameters"],
        "peak_bytes": max(one["peak_bytes"] for one in found.values()),
        "median_step_s": statistics.median(second for one in found.values() for second in one["seconds"]),
        "miou": score["miou"],
        "pixel_accuracy": score["pixel_accuracy"],
    }


if __name__ == "__main__":
    main()
