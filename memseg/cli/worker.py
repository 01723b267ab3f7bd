"""One process of a run: what `memseg train` starts once per card. Not a command for people.

It reads the run folder, takes the card of its rank, and trains. What goes wrong is left in the folder as one line for
`memseg train` to print, for this process's own output drowns among the others'.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from memseg.data import SegmentationDataset
from memseg.errors import InputError, MemsegError
from memseg.files import replace_file
from memseg.inference.evaluate import evaluate
from memseg.inference.labelling import Framing
from memseg.models import build_model, load_encoder_file
from memseg.models.objective import Objective
from memseg.models.segmented import SegmentedModel
from memseg.nn.precision import parameter_dtype
from memseg.planning import LOSS, CardPlan, Plan, load_plan, parse_cards
from memseg.profiling.measure import AllocatorPeak, watch_allocator
from memseg.running import (
    PipelineRunner,
    Runner,
    SingleRunner,
    end_with_parent,
    is_out_of_memory,
    lift_memory_limit,
    limit_memory,
)
from memseg.training.checkpoint import PLAN_FILE, RESULT_FILE, load_run
from memseg.training.recipe import Recipe
from memseg.training.trainer import Hooks, Score, StepReport, Trainer, make_optimizer
from memseg.units import format_bytes, format_seconds

ERROR_FILE = "error.txt"
_MEASURED_STEPS = 2
"""Peaks are measured over building the model and these steps: the second is the steady state."""


def main() -> int:
    """Run this rank; 0, or 2 with the reason in the run folder."""
    end_with_parent()
    folder = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    card = None
    try:
        plan = load_plan(folder / PLAN_FILE)
        card = plan.cards[rank]
        _train(folder, plan, card, rank)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        message = _in_one_line(error, card)
        if message is None and not (folder / ERROR_FILE).exists():
            raise
        # Where another process has said why already, this one has only lost its peer.
        if message is not None:
            _leave_error(folder, message)
        return 2
    return 0


def _train(folder: Path, plan: Plan, card: CardPlan, rank: int) -> None:
    recipe, classes = load_run(folder)
    device = _device(card)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    limit_memory(device, card.capacity_bytes)
    progress = _StepBar()
    with ExitStack() as measuring, progress:
        peak = measuring.enter_context(watch_allocator(device))
        torch.manual_seed(recipe.train.seed)
        dtype = parameter_dtype(recipe.train.precision)
        model = build_model(recipe.model.name, num_classes=len(classes.names), norm=recipe.model.norm, dtype=dtype)
        if recipe.model.encoder_weights:
            load_encoder_file(model, recipe.model.encoder_weights)
        model.to(device)
        encoder = model.encoder
        runner = _runner(model, plan, recipe, device)
        del model
        optimizer = make_optimizer(recipe, runner.module, encoder)
        hooks = Hooks(
            stepped=progress.stepped,
            steps_done=lambda count: measuring.close() if count == _MEASURED_STEPS else None,
            evaluate=_evaluation(recipe, runner, device) if recipe.train.evaluate_every else None,
        )
        trainer = Trainer(
            recipe, runner, optimizer, recipe.data.open("train"), folder=folder, device=device, hooks=hooks
        )
        report = trainer.run()
    _write_result(folder, plan, trainer.total_steps, report, peak, rank)
    dist.destroy_process_group()


def _device(card: CardPlan) -> torch.device:
    (parsed,) = parse_cards(card.card)
    if parsed.kind == "cpu":
        return torch.device("cpu")
    local = int(os.environ["LOCAL_RANK"])
    if local >= torch.cuda.device_count():
        raise InputError(
            f"the plan needs a CUDA device for {card.card}, this machine has {torch.cuda.device_count()}; "
            "rehearse it with --cards cpu:8GiB"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _runner(model: SegmentedModel, plan: Plan, recipe: Recipe, device: torch.device) -> Runner:
    objective = Objective(recipe.loss.aux_weight)
    stages = [[segment.name for segment in card.segments if segment.name != LOSS] for card in plan.cards]
    model.set_recompute(
        {segment.name: segment.recompute for card in plan.cards for segment in card.segments if segment.name != LOSS}
    )
    if plan.strategy == "single":
        return SingleRunner(model, objective, recipe.train.precision)
    return PipelineRunner(
        model, stages, objective, batch_shape=(recipe.train.batch, 3, *recipe.data.image), device=device
    )


class _RunningModel:
    """A runner as the network that an evaluation asks: it moves nowhere, its mode is the trainer's business."""

    training = False

    def __init__(self, runner: Runner) -> None:
        self.output_stride, self.num_classes = runner.output_stride, runner.num_classes
        self._runner = runner

    def to(self, device: torch.device) -> Self:
        return self

    def eval(self) -> Self:
        return self

    def train(self, mode: bool = True) -> Self:
        return self

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        return self._runner.module.parameters()

    def coarse_outputs(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._runner.coarse_outputs(images)


def _evaluation(recipe: Recipe, runner: Runner, device: torch.device) -> Callable[[], Score]:
    dataset: SegmentationDataset = recipe.data.open("val")

    def score() -> Score:
        result = evaluate(_RunningModel(runner), dataset, device=device, framing=Framing.of(recipe.data))
        if runner.knows_loss:
            print(f"val mIoU {result.miou:.2%}, pixel accuracy {result.pixel_accuracy:.2%}", file=sys.stderr)
        return Score(result.miou, result.pixel_accuracy)

    return score


class _StepBar:
    """Progress of the steps on standard error: a bar for people, a line now and then for files."""

    _SECONDS_BETWEEN_LINES = 10.0

    def __init__(self) -> None:
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
        )
        self._watched = sys.stderr.isatty()
        self._bar = Progress(*columns, console=Console(stderr=True), disable=not self._watched)
        self._task = self._bar.add_task("training", total=None, loss=float("nan"), visible=False)
        self._last_line = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def stepped(self, report: StepReport) -> None:
        """Show a step; called on the process that knows the loss, so that only one of them draws."""
        self._bar.update(self._task, completed=report.step, total=report.total_steps, loss=report.loss, visible=True)
        now = time.monotonic()
        last = report.step == report.total_steps
        if not self._watched and (last or now - self._last_line >= self._SECONDS_BETWEEN_LINES):
            self._last_line = now
            text = f"step {report.step}/{report.total_steps}  loss {report.loss:.4f}  {format_seconds(report.seconds)}"
            print(text, file=sys.stderr, flush=True)


def _in_one_line(error: Exception, card: CardPlan | None) -> str | None:
    """What a user can mend, in one line; None for a defect of ours."""
    if isinstance(error, MemsegError):
        return str(error)
    if is_out_of_memory(error) and card is not None:
        return (
            f"{card.card}: the memory of this card ran out, {format_bytes(card.capacity_bytes)}; the plan predicted "
            f"{format_bytes(card.predicted_peak_bytes)}. Make a new plan, or give the card more"
        )
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return None


def _leave_error(folder: Path, message: str) -> None:
    """The first process to fail says why; those that fail after it only lost their peer."""
    lift_memory_limit()
    try:
        with (folder / ERROR_FILE).open("x", encoding="utf-8") as file:
            file.write(message)
    except FileExistsError:
        return


def _write_result(
    folder: Path, plan: Plan, total_steps: int, report: StepReport | None, peak: AllocatorPeak, rank: int
) -> None:
    """Gather what each process knows; the first one writes the run's result."""
    known: list[tuple[int, StepReport | None]] = [(0, None)] * dist.get_world_size()
    dist.all_gather_object(known, (peak.peak_bytes, report))
    if rank:
        return
    last = next((found for _, found in known if found), None)
    result = {
        "steps": total_steps,
        "loss": last.loss if last else None,
        "cards": [
            {
                "card": card.card,
                "predicted_peak_bytes": card.predicted_peak_bytes,
                "measured_peak_bytes": measured,
            }
            for card, (measured, _) in zip(plan.cards, known, strict=True)
        ],
    }
    replace_file(folder / RESULT_FILE, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
