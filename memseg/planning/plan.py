"""A plan: which card runs which segments at which recompute level. A frozen value, and the file it is kept in.

The file outlives the run that made it, and is edited by hand. Carried out blindly, a plan for another model or with a
segment missing fails deep inside a process group. So it is read strictly: every key known and present, every segment
of the model placed once and in order in each replica; and `Plan.check_model` compares it with what it is to be used
for, down to the version of torch, on which the predicted bytes depend.

Cards are in the order in which the user named them, which is that of the processes (ranks). Who does what:

    rank     0        1        2        3
    replica  0        0        1        1
    stage    0        1        0        1
"""

import json
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError, model_validator

from memseg.errors import InputError, PlanError
from memseg.files import replace_file
from memseg.levels import NormMode, Precision, Recompute, Schedule, Strategy
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
    position: int = Field(ge=0)
    """Among the cards of its node that the user named, used or not: on CUDA the number of the device."""
    node: int = Field(ge=0)
    """The machine, as `memseg train --node-rank` numbers them."""
    replica: int = Field(ge=0)
    stage: int = Field(ge=0)
    capacity_bytes: Bytes
    reserve_bytes: Bytes
    predicted_peak_bytes: Bytes
    """What torch's allocator will have handed out at once."""
    outside_bytes: Bytes
    """What the process takes beside the allocator, predicted: on CPU cards scratch, threads and communication."""
    peak_moment: str
    """When the peak is reached: "backward of block1"."""
    batch_share: int = Field(ge=1)
    """Images of each pass that go through this card."""
    by_category: dict[str, Bytes]
    """The predicted peak by what it is for; adds up to it."""
    segments: tuple[PlacedSegment, ...] = Field(min_length=1)
    """In the order of the step."""
    compute_seconds: Seconds
    """Of each pass, all its micro-batches."""

    @property
    def available_bytes(self) -> int:
        """What the prediction may fill: the capacity less the reserve."""
        return self.capacity_bytes - self.reserve_bytes

    @property
    def needed_bytes(self) -> int:
        """What is predicted in all."""
        return self.predicted_peak_bytes + self.outside_bytes

    @property
    def fits(self) -> bool:
        """Is there room for it?"""
        return self.needed_bytes <= self.available_bytes


class Alternative(StrictModel):
    """Another plan that fits and was not chosen."""

    strategy: Strategy
    cards: tuple[str, ...]
    """In the order of the list that was planned for."""
    shares: tuple[int, ...]
    """Images of each pass that go through each of them."""
    stage_starts: tuple[str, ...]
    """The first segment of each stage."""
    micro_batches: int = Field(ge=1)
    schedule: Schedule | None
    images_per_second: Seconds
    step_seconds: Seconds
    fullest_share: float = Field(ge=0)
    """Of what it has available, that the fullest card needs."""


class Plan(StrictModel):
    """How one model is trained on the cards at hand."""

    version: Literal[2] = 2
    """Of the file's form."""
    feasible: bool = True
    """Does each card have room? A plan that does not fit is made and run only by force."""
    torch: str
    """The version whose step was profiled."""
    model: str
    parameter_bytes: Bytes
    """Of the whole model."""
    num_classes: int = Field(ge=1)
    image: Image
    batch: int = Field(ge=1)
    """Images of each pass, over all replicas."""
    accumulation: int = Field(ge=1)
    """Passes in each step."""
    norm: NormMode
    precision: Precision
    optimizer: str = "adam"
    """By what it keeps of each parameter: "adam", "adamw", "sgd" or, SGD with momentum, "momentum"."""
    strategy: Strategy
    micro_batches: int = Field(ge=1)
    """Into which a split cuts each replica's share."""
    schedule: Schedule | None
    """Of the micro-batches; None with a single one."""
    step_seconds: Seconds
    """Predicted; without the optimizer's arithmetic and without reading data."""
    images_per_second: Seconds
    cards: tuple[CardPlan, ...] = Field(min_length=1)
    """In the order of the processes."""
    transfer_seconds: Seconds
    """Of each step, between cards."""
    alternatives: tuple[Alternative, ...]
    """The best first."""

    @model_validator(mode="after")
    def _check_placement(self) -> "Plan":
        problems = _placement_problems(self)
        if self.strategy.splits and (reason := unsplittable(self.precision)):
            problems.append(reason)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """The process of each stage, for each replica."""
        by_place = {(card.replica, card.stage): rank for rank, card in enumerate(self.cards)}
        replicas, stages = (max(places) + 1 for places in zip(*by_place, strict=True))
        return tuple(tuple(by_place[replica, stage] for stage in range(stages)) for replica in range(replicas))

    @property
    def replicas(self) -> int:
        """Copies of the model."""
        return len(self.ranks)

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """Names of the segments of each stage; the last of all is "loss"."""
        return tuple(tuple(segment.name for segment in self.cards[rank].segments) for rank in self.ranks[0])

    @property
    def shares(self) -> tuple[int, ...]:
        """Images of each pass, for each replica."""
        return tuple(self.cards[ranks[0]].batch_share for ranks in self.ranks)

    @property
    def nodes(self) -> int:
        """Machines that take part."""
        return max(card.node for card in self.cards) + 1

    @property
    def trained_norm(self) -> NormMode:
        """What norms normalise with in the run: statistics of the whole batch are, over replicas, synced ones."""
        return NormMode.SYNCED if self.strategy.replicates and self.norm is not NormMode.FROZEN else self.norm

    @property
    def segment_names(self) -> tuple[str, ...]:
        """Of the whole model, in the order of the step; the last is "loss"."""
        return tuple(name for stage in self.stages for name in stage)

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
        parameter_bytes: int,
        num_classes: int,
        image: tuple[int, int],
        batch: int,
        accumulation: int,
        norm: NormMode,
        precision: Precision,
        optimizer: str,
    ) -> None:
        """Is this the plan for that run, with the torch that is installed?

        Args:
            model: Name of the model to train.
            segment_names: Of that model, in order, with "loss" at the end.
            parameter_bytes: Of that model.
            num_classes: That it tells apart.
            image: (height, width) in pixels.
            batch: Images per pass.
            accumulation: Passes per step.
            norm: What batch norm normalises with.
            precision: Of activations and parameters.
            optimizer: As the plan names it.

        Raises:
            PlanError: made for something else; every difference is told.
        """
        wanted: dict[str, object] = {
            "model": model, "num_classes": num_classes, "image": _write_image(image), "batch": batch,
            "accumulation": accumulation, "norm": norm.value, "precision": precision.value,
            "optimizer": optimizer,
        }  # fmt: skip
        found = self.model_dump(mode="json", include=set(wanted))
        differences = [
            f"{key} {found[key]}, the recipe trains {wanted[key]}" for key in wanted if found[key] != wanted[key]
        ]
        if not differences and self.segment_names != tuple(segment_names):
            places = zip((*self.segment_names, "nothing"), (*segment_names, "nothing"), strict=False)
            mine, theirs = next(pair for pair in places if pair[0] != pair[1])
            differences = [f"other segments: {mine} where the model has {theirs}"]
        if not differences and self.parameter_bytes != parameter_bytes:
            differences = [
                f"{self.parameter_bytes} bytes of parameters, the model of this version has {parameter_bytes}"
            ]
        if self.torch != installed_torch():
            differences.append(f"torch {self.torch}, installed is {installed_torch()}")
        if differences:
            cards = ",".join(card.card for card in self.cards)
            image_text, norm_text = _write_image(image), norm.value
            command = [
                "memseg", "plan", model, "--image", image_text, "--batch", str(batch), "--classes", str(num_classes),
                "--accumulate", str(accumulation), "--norm", norm_text, "--precision", precision,
                "--optimizer", optimizer, "--cards", cards, "-o", "plan.json",
            ]  # fmt: skip
            raise PlanError(
                f"the plan was made for {'; for '.join(differences)}; make a new one: {shlex.join(command)}, "
                f"or train with --cards {shlex.quote(cards)} and no --plan"
            )


def unsplittable(precision: Precision) -> str | None:
    """Why a model that trains so cannot be split over cards; None where it can."""
    return f"a split computes in float32 or float64, got {precision}" if precision.is_half else None


def installed_torch() -> str:
    """The version of torch that a step here runs with, without loading it."""
    return version("torch")


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
    if content.get("feasible") is False and "cards" not in content:
        raise PlanError(f"{where}: says that no plan fits; there is nothing to carry out")
    if content.get("version") == 1:
        raise _damaged(where, ["version: written by an older memseg, which knew no replicas"])
    missing = [f"{key}: missing" for key in ("version", "feasible") if key not in content]
    if missing:
        raise _damaged(where, missing)
    return text


def _damaged(where: str, problems: Sequence[str]) -> PlanError:
    return PlanError(
        "\n  ".join(
            [f"{where}: not a plan ({_counted(len(problems), 'problem')}); make a new one: memseg plan", *problems]
        )
    )


def _placement_problems(plan: Plan) -> list[str]:
    places = [(card.replica, card.stage) for card in plan.cards]
    replicas, stages = (max(numbers) + 1 for numbers in zip(*places, strict=True))
    if replicas * stages != len(places) or len(set(places)) < len(places):
        return [f"cards must be one for each of {replicas} x {stages} (replica, stage), got {sorted(places)}"]
    strategies = {
        (False, False): "single",
        (False, True): "split",
        (True, False): "replicate",
        (True, True): "replicate-split",
    }
    problems = []
    if plan.strategy != strategies[replicas > 1, stages > 1]:
        problems.append(
            f"strategy {plan.strategy} cannot have {_counted(replicas, 'replica')} of {_counted(stages, 'card')}"
        )
    names = list(plan.segment_names)
    problems += [
        f"segment {name} is placed twice" for name in sorted({name for name in names if names.count(name) > 1})
    ]
    if names[-1] != LOSS:
        problems.append(f'the last segment must be "{LOSS}", got "{names[-1]}"')
    if stages > 1 and plan.stages[-1] == (LOSS,):
        problems.append("the loss must share a card with the segment before it")
    grid = plan.ranks
    for card in plan.cards:
        if tuple(segment.name for segment in card.segments) != plan.stages[card.stage]:
            problems.append(
                f"{card.card}: replica {card.replica} must have the segments of stage {card.stage} of the first"
            )
        if plan.trained_norm is NormMode.SYNCED and card.segments != plan.cards[grid[0][card.stage]].segments:
            problems.append(f"{card.card}: replicas with synced norms must have the same recompute levels")
        if card.batch_share != plan.cards[grid[card.replica][0]].batch_share:
            problems.append(f"{card.card}: all cards of a replica must have the same share of the batch")
        if card.batch_share % plan.micro_batches:
            problems.append(
                f"{card.card}: {card.batch_share} images cannot be cut into {plan.micro_batches} equal parts"
            )
        if plan.feasible and not card.fits:
            problems.append(f"{card.card}: the predicted peak does not fit what the card has available")
        if sum(card.by_category.values()) != card.predicted_peak_bytes:
            problems.append(f"{card.card}: by_category does not add up to predicted_peak_bytes")
    if sum(plan.shares) != plan.batch:
        problems.append(f"the shares must add up to the batch of {plan.batch}, got {sum(plan.shares)}")
    node_order = [card.node for card in plan.cards]
    if node_order != sorted(node_order) or set(node_order) != set(range(plan.nodes)):
        problems.append(f"cards must be in the order of their nodes, none left out, got nodes {node_order}")
    used = [(card.node, card.position) for card in plan.cards]
    if len(set(used)) < len(used):
        problems.append("a card of a node is used twice")
    return problems + _micro_batch_problems(plan, stages)


def _micro_batch_problems(plan: Plan, stages: int) -> list[str]:
    problems = []
    if (plan.micro_batches > 1) != (plan.schedule is not None):
        problems.append("several micro-batches need a schedule, a single one has none")
    if plan.micro_batches > 1 and stages == 1:
        problems.append("only a split has micro-batches")
    if plan.micro_batches > 1 and plan.norm is not NormMode.FROZEN:
        problems.append(f"micro-batches need frozen norms, for {plan.norm} ones need the batch together")
    if plan.schedule is Schedule.ONE_F_ONE_B and plan.micro_batches < stages:
        problems.append(f"schedule 1f1b needs a micro-batch for each of {stages} stages, got {plan.micro_batches}")
    return problems


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"
