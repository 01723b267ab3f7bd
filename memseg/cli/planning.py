"""From what a user asks for to a Plan, for every command that needs one: profile the model, then plan."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Literal

from memseg.cli.console import progress_bar
from memseg.errors import InputError
from memseg.levels import NormMode, Precision
from memseg.planning import Card, Change, ModelCosts, Plan, make_plan, unsplittable

Strategy = Literal["auto", "single", "split"]


class PlanRequest:
    """What is to be trained, and on what.

    Args:
        model: Name in the zoo.
        num_classes: That it tells apart.
        image: (height, width).
        batch: Images per step.
        norm: What batch norm normalises with.
        precision: What a step computes in.
        aux_weight: Of the objective.
        cards: To train on, all of one kind.

    Raises:
        InputError: CUDA and CPU cards together.
    """

    def __init__(
        self,
        *,
        model: str,
        num_classes: int,
        image: tuple[int, int],
        batch: int,
        norm: NormMode,
        precision: Precision,
        aux_weight: float,
        cards: Sequence[Card],
    ) -> None:
        kinds = sorted({card.kind for card in cards})
        if len(kinds) > 1:
            raise InputError(
                f"cards must all be CUDA cards or all CPU cards, got {', '.join(card.name for card in cards)}"
            )
        self.model, self.num_classes, self.image, self.batch = model, num_classes, image, batch
        self.norm, self.precision, self.aux_weight = norm, precision, aux_weight
        self.cards, self._kind = cards, kinds[0]

    def plan(self, strategy: Strategy = "auto") -> Plan:
        """The best plan, with progress on standard error.

        Args:
            strategy: "auto", "single" or "split".

        Raises:
            InputError: a split is asked for of what cannot be split.
            NothingFitsError: none fits; with what would.
        """
        # Before any profiling.
        if strategy == "split" and (reason := unsplittable(self.norm, self.precision)):
            raise InputError(f"{reason}; take --strategy single")
        return make_plan(
            self._own_costs,
            self.cards,
            strategy=strategy,
            changes=self._changes(),
        )

    @cached_property
    def _own_costs(self) -> ModelCosts:
        return self._costs()

    def _costs(
        self, *, batch: int | None = None, norm: NormMode | None = None, image: tuple[int, int] | None = None
    ) -> ModelCosts:
        from memseg.models import build_model
        from memseg.nn.precision import parameter_dtype
        from memseg.profiling.costs import model_costs

        norm = norm or self.norm
        dtype = parameter_dtype(self.precision)
        with progress_bar("profiling segments") as progress:
            return model_costs(
                lambda: build_model(self.model, num_classes=self.num_classes, norm=norm, dtype=dtype),
                image=image or self.image,
                batch=batch or self.batch,
                norm=norm,
                aux_weight=self.aux_weight,
                precision=self.precision,
                device=self._kind,
                progress=progress,
            )

    def _changes(self) -> Iterator[Change]:
        """Single changes of the request, tried one after the other when nothing fits."""
        print("nothing fits; trying single changes", file=sys.stderr)
        for batch in sorted({self.batch - 1, self.batch // 2} - {0}, reverse=True):
            if self._is_possible(batch=batch):
                yield Change(f"batch {batch}", partial(self._costs, batch=batch))
        if self.norm is not NormMode.FROZEN:
            yield Change("norm frozen", partial(self._costs, norm=NormMode.FROZEN))
        height, width = self.image
        sizes = [(max(64, height * part // 4 // 64 * 64), max(64, width * part // 4 // 64 * 64)) for part in (3, 2)]
        for image in dict.fromkeys(sizes):
            if image != self.image and self._is_possible(image=image):
                yield Change(f"image {image[0]}x{image[1]}", partial(self._costs, image=image))

    def _is_possible(self, *, batch: int | None = None, image: tuple[int, int] | None = None) -> bool:
        import torch

        from memseg.models import build_model

        with torch.device("meta"):
            model = build_model(self.model, norm=self.norm)
        try:
            model.check_image(image or self.image, batch=batch or self.batch)
        except InputError:
            return False
        return True


def add_cards_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """--cards and --strategy."""
    parser.add_argument(
        "--cards",
        metavar="LIST",
        required=required,
        help='cards by name, with commas: "gtx1070,titanx", "cpu:8GiB,cpu:12GiB"; memseg cards lists them',
    )
    parser.add_argument(
        "--strategy", choices=("auto", "single", "split"), default=None, help="force a strategy (default: the fastest)"
    )
