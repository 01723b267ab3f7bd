"""What the commands share that use a trained network: which checkpoint, where it runs, and how it looks at pictures."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memseg.levels import Precision

if TYPE_CHECKING:
    import torch

    from memseg.data import ClassList
    from memseg.inference.labelling import Framing
    from memseg.training.checkpoint import TrainedModel
    from memseg.training.recipe import Recipe


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """RUN, and the options that `use_network` reads."""
    parser.add_argument("trained", metavar="RUN", type=Path, help="a run's folder, or one of its checkpoints")
    parser.add_argument(
        "--checkpoint",
        default="last",
        metavar="WHICH",
        help="of a run: last, best by its scores during training, or a name such as step-00000150 (default: last)",
    )
    parser.add_argument(
        "--device", help="where the network runs, such as cpu or cuda:1 (default: cuda where there is one)"
    )
    parser.add_argument(
        "--precision",
        choices=[str(precision) for precision in Precision],
        help="what the network computes in; half precisions by autocast (default: the type of its weights)",
    )
    parser.add_argument(
        "--scales",
        type=_scales,
        default=(1.0,),
        metavar="LIST",
        help="see each picture at these multiples of its size and average, such as 0.75,1,1.25 (default: 1)",
    )
    parser.add_argument("--flip", action="store_true", help="see each picture mirrored too, and average")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """The option that `override_data` reads."""
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="replace a value of the recipe's data table, such as data.root; may be given again",
    )


@dataclass(frozen=True)
class NetworkInUse:
    """A trained network as the command line asks for it."""

    trained: "TrainedModel"
    device: "torch.device"
    precision: Precision
    scales: tuple[float, ...]
    flip: bool

    def framing(self, recipe: "Recipe") -> "Framing":
        """What of a picture it sees, by the data table of a recipe."""
        from memseg.inference.labelling import Framing

        return Framing.of(recipe.data, scales=self.scales, flip=self.flip)

    def settings(self) -> dict[str, Any]:
        """What decides its answers, for results to tell."""
        return {
            "steps": self.trained.step,
            "scales": list(self.scales),
            "flip": self.flip,
            "precision": str(self.precision),
        }

    def check_classes(self, classes: "ClassList", where: str) -> None:
        """Do nothing where a data set has the classes that it was trained on.

        Raises:
            InputError: it has others.
        """
        from memseg.errors import InputError

        known = self.trained.classes.names
        if classes.names != known:
            raise InputError(
                f"{where} must have the classes that the run was trained on ({', '.join(known)}), "
                f"it has {', '.join(classes.names)}"
            )


def use_network(args: argparse.Namespace) -> NetworkInUse:
    """The network that the options of `add_network_options` name, on the CPU until it is used.

    Raises:
        InputError: this machine has no such device.
        CheckpointError: no run lies there, or it has no such checkpoint.
    """
    from memseg.cli.device import choose_device
    from memseg.nn.precision import parameter_dtype
    from memseg.training.checkpoint import load_trained

    device = choose_device(args.device)
    trained = load_trained(args.trained, args.checkpoint)
    stored = Precision(trained.recipe.train.precision.parameters)
    precision = Precision(args.precision) if args.precision else stored
    trained.model.to(parameter_dtype(precision))
    return NetworkInUse(trained, device, precision, args.scales, args.flip)


def override_data(recipe: "Recipe", overrides: list[str]) -> "Recipe":
    """A recipe with values of its data table replaced.

    Raises:
        InputError: an override is of another table.
        RecipeError: a value does not hold.
    """
    from memseg.errors import InputError
    from memseg.training.recipe import override_recipe

    if others := [text for text in overrides if not text.startswith("data.")]:
        raise InputError(f"--set may only replace values of the data set here (data.root, ...), got {others[0]}")
    return override_recipe(recipe, overrides)


def _scales(text: str) -> tuple[float, ...]:
    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be numbers with commas between, such as 0.75,1,1.25, got {text}"
        ) from None
    if not all(0.1 <= scale <= 10 for scale in scales):
        raise argparse.ArgumentTypeError(f"each scale must lie within 0.1 and 10, got {text}")
    return scales
