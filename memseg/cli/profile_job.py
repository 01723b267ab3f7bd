"""From what a user asks `memseg profile` for to a training step: a network of ours by name, any other by its address.

An address is MODULE:FUNCTION, as in my_package.nets:build or nets.py:build. The function takes no arguments and returns
the model, or a tuple of the model and what it is called with, or of these and the loss.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from memseg.errors import InputError, UnknownNameError
from memseg.levels import NormMode, Precision, Recompute
from memseg.units import format_image, parse_image

if TYPE_CHECKING:
    from memseg.profiling import Job

MOST_CLASSES = 255
"""Labels are uint8, and 255 marks pixels that do not count."""
_OF_OURS = ("norm", "recompute", "classes")
_OF_OTHERS = ("loss", "channels")


@dataclass(frozen=True)
class Request:
    """A step to profile."""

    make: Callable[..., "Job"]
    """Makes it; with `real`, of real tensors."""
    settings: dict[str, Any]
    """What was asked for, as the JSON tells it."""
    is_foreign: bool = False
    """Whether batch and loss may be the model's own, and so are told as they were found."""


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Everything that says what step it is."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a network that memseg models lists, or MODULE:FUNCTION (file.py:FUNCTION) that makes any torch model",
    )
    parser.add_argument("--image", metavar="HEIGHTxWIDTH", default="1024x2048", help="in pixels (default: 1024x2048)")
    parser.add_argument("--batch", metavar="N", type=int, default=2, help="images in the batch (default: 2)")
    parser.add_argument(
        "--precision",
        choices=[str(precision) for precision in Precision],
        default=str(Precision.FLOAT32),
        help="what the step computes in; bfloat16 and float16 are autocast (default: float32)",
    )
    parser.add_argument(
        "--optimizer",
        metavar="NAME",
        help="sgd, momentum, adam or adamw, each also as -fused, -foreach or -loop; none (default: adam-fused for "
        "networks of memseg's, as memseg train has it, adam for others)",
    )
    parser.add_argument(
        "--accumulate", metavar="N", type=int, default=1, help="batches to each step of the optimizer (default: 1)"
    )
    ours = parser.add_argument_group("networks of memseg's")
    ours.add_argument(
        "--norm",
        choices=[str(mode) for mode in NormMode],
        help="batch norm counts with the batch, is frozen, or counts with all replicas (default: batch)",
    )
    ours.add_argument(
        "--recompute",
        metavar="LEVEL",
        help="how much is rebuilt in backward: none, norms, units or segment; or SEGMENT=LEVEL,... (default: none)",
    )
    ours.add_argument("--classes", metavar="N", type=int, help="classes of pixels (default: 19)")
    others = parser.add_argument_group("other models")
    others.add_argument(
        "--loss",
        metavar="LOSS",
        help="cross-entropy or mean of what the model returns, or MODULE:FUNCTION, called with it (default: mean)",
    )
    others.add_argument("--channels", metavar="N", type=int, help="of the images (default: 3)")


def parse_job(args: argparse.Namespace) -> Request:
    """The step that the options ask for; nothing is built yet.

    Raises:
        UnknownNameError: no such model, level, optimizer or loss.
        InputError: a number or an image size that does not hold, an option of other models, or an address that
            cannot be imported.
    """
    image, levels = parse_image(args.image), parse_recompute(args.recompute or str(Recompute.NONE))
    for name, most in (("batch", None), ("accumulate", None), ("classes", MOST_CLASSES), ("channels", None)):
        value = getattr(args, name)
        if value is not None and (value < 1 or (most and value > most)):
            raise InputError(f"--{name} must be {f'from 1 to {most}' if most else 'at least 1'}, got {value}")
    is_address = ":" in args.model
    for option in _OF_OURS if is_address else _OF_OTHERS:
        if getattr(args, option) is not None:
            whose = "networks of memseg's" if is_address else "models given as MODULE:FUNCTION"
            raise InputError(f"--{option} is for {whose}, got it with {args.model}; leave it out")
    return _foreign(args, image) if is_address else _own(args, image, levels)


def _own(args: argparse.Namespace, image: tuple[int, int], levels: Recompute | dict[str, Recompute]) -> Request:
    from memseg.models import build_model
    from memseg.nn.precision import parameter_dtype
    from memseg.profiling import named_optimizer, segmented_job

    precision, norm = Precision(args.precision), NormMode(args.norm or NormMode.BATCH)
    optimizer = args.optimizer or "adam-fused"
    build = partial(
        build_model, args.model, num_classes=args.classes or 19, norm=norm, dtype=parameter_dtype(precision)
    )
    step = partial(
        segmented_job,
        build,
        image=image,
        batch=args.batch,
        recompute=levels,
        optimizer=None if optimizer == "none" else named_optimizer(optimizer),
        precision=precision,
        accumulation=args.accumulate,
    )
    settings = {
        "image": format_image(image),
        "batch": args.batch,
        "norm": str(norm),
        "recompute": str(levels) if isinstance(levels, Recompute) else {name: str(levels[name]) for name in levels},
        **_common_settings(args, optimizer),
    }
    # A network of ours is made of real tensors wherever it is not made under a fake mode.
    return Request(lambda *, real=False: step(), settings)


def _foreign(args: argparse.Namespace, image: tuple[int, int]) -> Request:
    import torch

    from memseg.models import load_address
    from memseg.profiling import foreign_job, named_optimizer

    factory = load_address(args.model)
    loss = load_address(args.loss) if args.loss and ":" in args.loss else args.loss
    optimizer = args.optimizer or "adam"
    make_optimizer = None if optimizer == "none" else named_optimizer(optimizer)
    try:
        images = torch.empty(args.batch, args.channels or 3, *image, device="meta")
    except RuntimeError as error:
        raise InputError(f"--image {args.image} --batch {args.batch} is larger than any tensor: {error}") from None

    def make(*, real: bool = False) -> "Job":
        return foreign_job(
            factory,
            images,
            loss=loss,
            optimizer=make_optimizer,
            precision=Precision(args.precision),
            accumulation=args.accumulate,
            real=real,
            name=args.model,
        )

    return Request(make, _common_settings(args, optimizer), is_foreign=True)


def _common_settings(args: argparse.Namespace, optimizer: str) -> dict[str, Any]:
    accumulation = {"accumulate": args.accumulate} if args.accumulate > 1 else {}
    return {"optimizer": optimizer, **accumulation}


def parse_recompute(text: str) -> Recompute | dict[str, Recompute]:
    """The level of all segments, or those of the segments that are named.

    Raises:
        UnknownNameError: not a level.
        InputError: a segment without a level, or named twice.

    >>> parse_recompute("units"), parse_recompute("block1=units, block2=norms")
    (<Recompute.UNITS: 'units'>, {'block1': <Recompute.UNITS: 'units'>, 'block2': <Recompute.NORMS: 'norms'>})
    """
    if "=" not in text and "," not in text:
        return _parse_level(text)
    levels: dict[str, Recompute] = {}
    for part in text.split(","):
        name, _, level = (piece.strip() for piece in part.partition("="))
        if not name or not level or name in levels:
            raise InputError(
                f"--recompute must be one level, or a level for each of some segments, each named once, got {text!r}; "
                "try units, or block1=units,block2=norms"
            )
        levels[name] = _parse_level(level)
    return levels


def _parse_level(text: str) -> Recompute:
    if text not in list(Recompute):
        raise UnknownNameError("recompute level", text, Recompute)
    return Recompute(text)
