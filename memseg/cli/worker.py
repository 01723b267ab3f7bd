"""One process of a run: what `memseg train` starts once per card. Not a command for people.

It reads the run folder, takes the card of its rank, and trains. What goes wrong is left in the folder as one line for
`memseg train` to print, for this process's own output drowns among the others'.

    python -m memseg.cli.worker FOLDER DIGEST     DIGEST of the recipe and plan that its machine was started with
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Self, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from memseg.data import SegmentationDataset
from memseg.errors import InputError, MemsegError, PlanError
from memseg.files import replace_file
from memseg.inference.evaluate import evaluate
from memseg.inference.labelling import Framing
from memseg.levels import NormMode
from memseg.models import build_model, load_encoder_file, load_original_file
from memseg.models.segmented import SegmentedModel
from memseg.nn import BatchNorm2d
from memseg.nn.precision import parameter_dtype
from memseg.planning import LOSS, CardPlan, Plan, load_plan, parse_card
from memseg.profiling.measure import AllocatorPeak, watch_allocator
from memseg.running import (
    Grid,
    MeanLoss,
    PipelineRunner,
    Runner,
    WholeRunner,
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
Prepared = TypeVar("Prepared")
_MEASURED_STEPS = 2
"""Peaks are measured over building the model and these steps: the second is the steady state."""
_PATIENCE = timedelta(hours=2)
"""How long processes wait for one that evaluates, or writes to a slow disk."""


def main() -> int:
    """Run this rank; 0, or 2 with the reason in the run folder."""
    end_with_parent()
    folder, digest, rank = Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])
    card = None
    try:
        store = _meet(digest)
        plan, recipe, device = _agree(store, lambda: _prepare(folder, rank))
        card = plan.cards[rank]
        _train(folder, plan, recipe, card, device, store)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        message = _in_one_line(error, card)
        if message is None and not (folder / ERROR_FILE).exists():
            raise
        # Where another process has said why already, this one has only lost its peer.
        if message is not None:
            _leave_error(folder, message, rank)
        return 2
    return 0


def _meet(digest: str) -> Store:
    """Wait for all processes of the run, and compare what their machines were started with; where they met.

    Raises:
        PlanError: not all with the same; then all processes raise it.
    """
    store: Store
    store, rank, world_size = next(rendezvous("env://", timeout=_PATIENCE))
    store.set(f"memseg/plan/{rank}", f"{os.environ['GROUP_RANK']} {digest}")
    told = [store.get(f"memseg/plan/{one}").decode().split() for one in range(world_size)]
    others = sorted({int(node) for node, other in told if other != told[0][1]})
    if others:
        raise PlanError(
            f"all machines must have the same recipe and plan, but machine {', '.join(map(str, others))} has others "
            "than machine 0; give the same command everywhere, with a plan made once: memseg plan ... -o plan.json"
        )
    return store


def _prepare(folder: Path, rank: int) -> tuple[Plan, Recipe, torch.device]:
    """What this process is to do, and where."""
    if not folder.is_dir():
        raise InputError(f"the run folder must be on a file system that all machines share; here there is no {folder}")
    plan = load_plan(folder / PLAN_FILE)
    recipe, _ = load_run(folder)
    return plan, recipe, _device(plan.cards[rank])


def _agree(store: Store, prepare: Callable[[], Prepared]) -> Prepared:
    """What `prepare` returns, once it has returned in every process; else none would wait for those that stopped.

    Raises:
        MemsegError: it failed in some process; then all raise the error of the first of them.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    prepared, problem = None, ""
    try:
        prepared = prepare()
    except (MemsegError, OSError) as error:
        problem = str(error) or type(error).__name__
    store.set(f"memseg/problem/{rank}", problem)
    problems = [store.get(f"memseg/problem/{one}").decode() for one in range(world_size)]
    if found := next(filter(None, problems), None):
        raise InputError(found)
    assert prepared is not None
    return prepared


def _train(folder: Path, plan: Plan, recipe: Recipe, card: CardPlan, device: torch.device, store: Store) -> None:
    # A process alone talks to nobody but itself, which NCCL would take memory for.
    cuda = device.type == "cuda" and len(plan.cards) > 1
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=int(os.environ["RANK"]),
        world_size=len(plan.cards),
        timeout=_PATIENCE,
        device_id=device if cuda else None,
    )
    limit_memory(device, card.capacity_bytes)
    grid = Grid.of(plan.ranks, device)
    reports = grid.replica == 0 and grid.is_last
    progress = _StepBar()
    with ExitStack() as measuring, progress:
        peak = measuring.enter_context(watch_allocator(device))
        torch.manual_seed(recipe.train.seed)
        model = _model(plan, recipe, grid)
        model.to(device)
        encoder = model.encoder
        runner = _runner(model, plan, card, recipe, grid, device)
        del model
        optimizer = make_optimizer(recipe, runner.module, encoder)
        # One replica scores; the others have the same weights.
        scores = recipe.train.evaluate_every and grid.replica == 0
        hooks = Hooks(
            stepped=progress.stepped,
            steps_done=lambda count: measuring.close() if count == _MEASURED_STEPS else None,
            evaluate=_evaluation(recipe, runner, device, reports=reports) if scores else None,
        )
        trainer = Trainer(
            recipe,
            runner,
            optimizer,
            recipe.data.open("train"),
            folder=folder,
            device=device,
            share=slice(sum(plan.shares[: grid.replica]), sum(plan.shares[: grid.replica + 1])),
            reports=reports,
            hooks=hooks,
        )
        report = trainer.run()
    _write_result(folder, plan, trainer.total_steps, report, peak)
    dist.destroy_process_group()


def _device(card: CardPlan) -> torch.device:
    if parse_card(card.card).kind == "cpu":
        return torch.device("cpu")
    if card.position >= torch.cuda.device_count():
        raise InputError(
            f"the plan needs CUDA device {card.position} for {card.card}, this machine has {torch.cuda.device_count()};"
            " rehearse it with --cards cpu:8GiB"
        )
    device = torch.device("cuda", card.position)
    torch.cuda.set_device(device)
    return device


def _model(plan: Plan, recipe: Recipe, grid: Grid) -> SegmentedModel:
    """The whole model with fresh or pretrained weights, the same in every process."""
    # With one replica there is nothing to sync, and the default group is that of the stages.
    synced = plan.trained_norm is NormMode.SYNCED and grid.across is not None
    norm = NormMode.BATCH if plan.trained_norm is NormMode.SYNCED and not synced else plan.trained_norm
    dtype = parameter_dtype(recipe.train.precision)
    model = build_model(plan.model, num_classes=plan.num_classes, norm=norm, dtype=dtype)
    if recipe.model.encoder_weights:
        load = load_original_file if ":" in plan.model else load_encoder_file
        load(model, recipe.model.encoder_weights)
    if synced:
        for module in model.modules():
            if isinstance(module, BatchNorm2d):
                module.process_group = grid.across
    return model


def _runner(
    model: SegmentedModel, plan: Plan, card: CardPlan, recipe: Recipe, grid: Grid, device: torch.device
) -> Runner:
    model.set_recompute({segment.name: segment.recompute for segment in card.segments if segment.name != LOSS})
    height, width = plan.image
    parts = plan.replicas * plan.micro_batches * plan.accumulation
    loss = MeanLoss(
        model.objective(recipe.loss.aux_weight),
        pixels=plan.batch * plan.accumulation * height * width if parts > 1 else None,
        replicas=plan.replicas,
        device=device,
    )
    if not plan.strategy.splits:
        return WholeRunner(model, loss, grid=grid, accumulation=plan.accumulation, precision=plan.precision)
    return PipelineRunner(
        model,
        [[name for name in stage if name != LOSS] for stage in plan.stages],
        loss,
        grid=grid,
        micro_batch_shape=(card.batch_share // plan.micro_batches, 3, height, width),
        micro_batches=plan.micro_batches,
        schedule=plan.schedule,
        accumulation=plan.accumulation,
        device=device,
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


def _evaluation(recipe: Recipe, runner: Runner, device: torch.device, *, reports: bool) -> Callable[[], Score]:
    dataset: SegmentationDataset = recipe.data.open("val")

    def score() -> Score:
        result = evaluate(_RunningModel(runner), dataset, device=device, framing=Framing.of(recipe.data))
        if reports:
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
        """Show a step; called in the process that reports, so that only one of them draws."""
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
            f"{format_bytes(card.needed_bytes)}. Make a new plan, or give the card more"
        )
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return None


def _leave_error(folder: Path, message: str, rank: int) -> None:
    """The first process to fail says why; those that fail after it only lost their peer."""
    lift_memory_limit()
    folder.mkdir(parents=True, exist_ok=True)
    mine = folder / f".{ERROR_FILE}.{rank}"
    mine.write_text(message, encoding="utf-8")
    try:
        # There at once and whole: another machine may be looking.
        os.link(mine, folder / ERROR_FILE)
    except FileExistsError:
        return
    finally:
        mine.unlink()


def _write_result(folder: Path, plan: Plan, total_steps: int, report: StepReport | None, peak: AllocatorPeak) -> None:
    """Gather what each process measured; the first one writes the run's result, for all machines to read."""
    measured = [0] * len(plan.cards)
    dist.all_gather_object(measured, peak.peak_bytes)
    if dist.get_rank() == 0:
        result = {
            "steps": total_steps,
            "loss": report.loss if report else None,
            "cards": [
                {
                    "card": card.card,
                    "predicted_peak_bytes": card.predicted_peak_bytes,
                    "outside_bytes": card.outside_bytes,
                    "measured_peak_bytes": measured_bytes,
                }
                for card, measured_bytes in zip(plan.cards, measured, strict=True)
            ],
        }
        replace_file(folder / RESULT_FILE, json.dumps(result, indent=2) + "\n")
    dist.barrier()


if __name__ == "__main__":
    sys.exit(main())
