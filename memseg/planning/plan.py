"""A plan: which card runs which segments at which recompute level. A frozen value, and the file it is kept in.

The file outlives the run that made it, and is edited by hand. Carried out blindly, a plan for another model or with a
segment missing fails deep inside a process group. So it is read strictly: every key known and present, every segment
of the model placed once and in order; and `Plan.check_model` compares it with what it is to be used for.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError, model_validator

from memseg.errors import InputError, PlanError
from memseg.files import replace_file
from memseg.levels import NormMode, Precision, Recompute
from memseg.planning.costs import LOSS
from memseg.planning.strict import StrictModel, field_names, problem_lines
from memseg.units import parse_image


def _read_image(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_image(value)
    except InputError as error:
        raise ValueError(str(error)) from None


def _write_image(image: tuple[int, int]) -> str:
    return f"{image[0]}x{image[1]}"


Image = Annotated[tuple[int, int], BeforeValidator(_read_image), PlainSerializer(_write_image, return_type=str)]
"""(height, width) in pixels; "1024x2048" in the file."""
Bytes = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class PlacedSegment(StrictModel):
    """A segment and how much of it is rebuilt in backward."""

    name: str
    recompute: Recompute


class CardPlan(StrictModel):
    """What one card does."""

    card: str
    """As the user named it; `parse_cards` reads it."""
    capacity_bytes: Bytes
    reserve_bytes: Bytes
    predicted_peak_bytes: Bytes
    peak_moment: str
    """When it is reached: "backward of block1"."""
    batch_share: int = Field(ge=1)
    """Images of each step that pass through this card."""
    by_category: dict[str, Bytes]
    """The predicted peak by what it is for; adds up to it."""
    segments: tuple[PlacedSegment, ...] = Field(min_length=1)
    """In the order of the step."""
    compute_seconds: Seconds
    """Of each step."""

    @property
    def available_bytes(self) -> int:
        """What the prediction may fill: the capacity less the reserve."""
        return self.capacity_bytes - self.reserve_bytes


class Alternative(StrictModel):
    """Another plan that fits and was not chosen."""

    strategy: Literal["single", "split"]
    cards: tuple[str, ...]
    """In the order of the step."""
    images_per_second: Seconds
    step_seconds: Seconds


class Plan(StrictModel):
    """How one model is trained on the cards at hand."""

    version: Literal[1] = 1
    """Of the file's form."""
    feasible: Literal[True] = True
    model: str
    num_classes: int = Field(ge=1)
    image: Image
    batch: int = Field(ge=1)
    norm: NormMode
    precision: Precision
    strategy: Literal["single", "split"]
    step_seconds: Seconds
    """Predicted; without the optimizer's arithmetic and without reading data."""
    images_per_second: Seconds
    cards: tuple[CardPlan, ...] = Field(min_length=1)
    """In the order of the step."""
    transfer_seconds: Seconds
    """Of each step, between cards."""
    alternatives: tuple[Alternative, ...]
    """The fastest first."""

    @model_validator(mode="after")
    def _check_placement(self) -> "Plan":
        problems = _placement_problems(self.strategy, self.cards)
        if self.strategy == "split" and (reason := unsplittable(self.norm, self.precision)):
            problems.append(reason)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def segment_names(self) -> tuple[str, ...]:
        """Of all cards, in the order of the step; the last is "loss"."""
        return tuple(segment.name for card in self.cards for segment in card.segments)

    def to_json(self) -> str:
        """One JSON object; `from_json` reads it back to an equal value."""
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str, where: str) -> "Plan":
        """The plan that `to_json` wrote.

        Args:
            text: The JSON object.
            where: What to call it in an error, its path.

        Raises:
            PlanError: not a plan that can be carried out; every problem is told.
        """
        try:
            return cls.model_validate_json(_all_keys_written(text, where))
        except ValidationError as error:
            raise _damaged(
                where, problem_lines(error, field_names(cls, CardPlan, PlacedSegment, Alternative))
            ) from None

    def check_model(
        self,
        model: str,
        segment_names: Sequence[str],
        *,
        num_classes: int,
        image: tuple[int, int],
        batch: int,
        norm: NormMode,
        precision: Precision,
    ) -> None:
        """Is this the plan for that run?

        Args:
            model: Name of the model to train.
            segment_names: Of that model, in order, with "loss" at the end.
            num_classes: That it tells apart.
            image: (height, width) in pixels.
            batch: Images per step.
            norm: What batch norm normalises with.
            precision: Of activations and parameters.

        Raises:
            PlanError: made for something else; every difference is told.
        """
        wanted: dict[str, object] = {
            "model": model, "num_classes": num_classes, "image": _write_image(image), "batch": batch,
            "norm": norm.value, "precision": precision.value,
        }  # fmt: skip
        found = self.model_dump(mode="json", include=set(wanted))
        differences = [
            f"{key} {found[key]}, the recipe trains {wanted[key]}" for key in wanted if found[key] != wanted[key]
        ]
        if not differences and self.segment_names != tuple(segment_names):
            places = zip((*self.segment_names, "nothing"), (*segment_names, "nothing"), strict=False)
            mine, theirs = next(pair for pair in places if pair[0] != pair[1])
            differences = [f"other segments: {mine} where the model has {theirs}"]
        if differences:
            cards = ",".join(card.card for card in self.cards)
            image_text, norm_text = _write_image(image), norm.value
            command = [
                "memseg", "plan", model, "--image", image_text, "--batch", str(batch), "--classes", str(num_classes),
                "--norm", norm_text, "--precision", precision, "--cards", cards, "-o", "plan.json",
            ]  # fmt: skip
            raise PlanError(
                f"the plan was made for {'; for '.join(differences)}; make a new one: {shlex.join(command)}, "
                f"or train with --cards {shlex.quote(cards)} and no --plan"
            )


def unsplittable(norm: NormMode, precision: Precision) -> str | None:
    """Why a model that trains so cannot be split over cards; None where it can."""
    if norm is NormMode.SYNCED:
        return "synced norms share statistics between replicas, of which a split has none"
    if precision.is_half:
        return f"a split computes in float32 or float64, got {precision}"
    return None


def load_plan(path: Path) -> Plan:
    """The plan in a file.

    Raises:
        PlanError: no such file, or not a plan that can be carried out.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot be read as a plan: {error}; make a new one: memseg plan") from None
    return Plan.from_json(text, str(path))


def save_plan(plan: Plan, path: Path) -> None:
    """Write `plan` to `path`, whole or not at all, even if the machine stops meanwhile."""
    replace_file(path, plan.to_json() + "\n")


def _all_keys_written(text: str, where: str) -> str:
    """`text`, once it is known to be one object that says what it is: the keys with defaults are not optional here."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise _damaged(where, [f"not JSON: {error}"]) from None
    if not isinstance(content, dict):
        raise _damaged(where, ["must be one object"])
    if content.get("feasible") is False:
        raise PlanError(f"{where}: says that no plan fits; there is nothing to carry out")
    missing = [f"{key}: missing" for key in ("version", "feasible") if key not in content]
    if missing:
        raise _damaged(where, missing)
    return text


def _damaged(where: str, problems: Sequence[str]) -> PlanError:
    count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
    return PlanError("\n  ".join([f"{where}: not a plan ({count}); make a new one: memseg plan", *problems]))


def _placement_problems(strategy: str, cards: Sequence[CardPlan]) -> list[str]:
    problems = []
    names = [segment.name for card in cards for segment in card.segments]
    problems += [
        f"segment {name} is placed twice" for name in sorted({name for name in names if names.count(name) > 1})
    ]
    if names[-1] != LOSS:
        problems.append(f'the last segment must be "{LOSS}", got "{names[-1]}"')
    if len(cards) > 1 and [segment.name for segment in cards[-1].segments] == [LOSS]:
        problems.append(f"{cards[-1].card}: the loss must share a card with the segment before it")
    if (strategy == "single") != (len(cards) == 1):
        problems.append(f"strategy {strategy} cannot have {len(cards)} card{'s' if len(cards) != 1 else ''}")
    for card in cards:
        if card.predicted_peak_bytes > card.available_bytes:
            problems.append(f"{card.card}: the predicted peak does not fit what the card has available")
        if sum(card.by_category.values()) != card.predicted_peak_bytes:
            problems.append(f"{card.card}: by_category does not add up to predicted_peak_bytes")
    return problems
