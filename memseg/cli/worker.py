"""One process of a run: what `memseg train` starts once per card. Not a command for people.

It reads the run folder, takes the card of its rank, and trains. What goes wrong is left in the folder as one line for
`memseg train` to print, for this process's own output drowns among the others'.

    python -m memseg.cli.worker FOLDER DIGEST     DIGEST of the recipe and plan that its machine was started with
"""

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from memseg.cli.dashboard import Dashboard
from memseg.cli.peaks import PeakWatch, known_peaks
from memseg.data import SegmentationDataset
from memseg.data.loader import is_lost_process
from memseg.errors import InputError, MemsegError, PlanError
from memseg.files import replace_file
from memseg.inference.evaluate import evaluate
from memseg.inference.labelling import Framing
from memseg.levels import NormMode
from memseg.models import build_model, load_pretrained
from memseg.models.segmented import SegmentedModel
from memseg.nn import BatchNorm2d
from memseg.nn.precision import parameter_dtype
from memseg.planning import LOSS, CardPlan, Plan, load_plan, parse_card
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
from memseg.training.checkpoint import PLAN_FILE, RESULT_FILE, checkpoint_folders, load_run, read_class_weights
from memseg.training.determinism import seed_everything, use_deterministic_algorithms
from memseg.training.initial import load_initial_weights
from memseg.training.optimizer import make_optimizer
from memseg.training.recipe import Recipe
from memseg.training.trainer import Hooks, Score, StepReport, Trainer, training_length
from memseg.units import format_bytes

ERROR_FILE = "error.txt"
Prepared = TypeVar("Prepared")
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
    if recipe.train.deterministic:
        use_deterministic_algorithms()
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
    dataset = recipe.data.open_train()
    seed_everything(recipe.train.seed)
    with ExitStack() as stack:
        watch = stack.enter_context(PeakWatch(device, store, dist.get_rank()))
        model = _model(plan, recipe, grid, fresh=not checkpoint_folders(folder))
        encoder = model.encoder
        runner = _runner(model, plan, card, recipe, read_class_weights(folder, recipe), grid, device)
        del model
        # Networks of others lie in cycles of references, and what other cards run of them would stay for a while.
        gc.collect()
        optimizer = make_optimizer(recipe, runner.module, encoder)
        # One replica scores; the others have the same weights.
        scores = recipe.train.evaluate_every and grid.replica == 0
        hooks = Hooks(steps_done=watch.steps_done, evaluate=_evaluation(recipe, runner, device) if scores else None)
        if reports:
            peaks = partial(known_peaks, store, len(plan.cards))
            view = stack.enter_context(Dashboard(recipe, plan, training_length(recipe, len(dataset)), peaks))
            hooks = replace(
                hooks,
                started=view.started,
                stepped=view.stepped,
                evaluate=_evaluation(recipe, runner, device, view.evaluating) if scores else None,
                evaluated=view.evaluated,
            )
        trainer = Trainer(
            recipe,
            runner,
            optimizer,
            dataset,
            folder=folder,
            device=device,
            stages=grid.along,
            share=slice(sum(plan.shares[: grid.replica]), sum(plan.shares[: grid.replica + 1])),
            reports=reports,
            hooks=hooks,
        )
        report = trainer.run()
    _write_result(folder, plan, trainer, report, watch.peak_bytes)
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


def _model(plan: Plan, recipe: Recipe, grid: Grid, *, fresh: bool) -> SegmentedModel:
    """The whole model with new or pretrained weights, the same in every process.

    Args:
        fresh: Whether the run begins; one that goes on gets the weights of its checkpoint.
    """
    # With one replica there is nothing to sync, and the default group is that of the stages.
    synced = plan.trained_norm is NormMode.SYNCED and grid.across is not None
    norm = NormMode.BATCH if plan.trained_norm is NormMode.SYNCED and not synced else plan.trained_norm
    dtype = parameter_dtype(recipe.train.precision)
    model = build_model(plan.model, num_classes=plan.num_classes, norm=norm, dtype=dtype)
    if recipe.model.encoder_weights and fresh:
        load_pretrained(model, recipe.model.encoder_weights)
    if recipe.model.initial_weights and fresh:
        load_initial_weights(recipe.model.initial_weights, model)
    if synced:
        for module in model.modules():
            if isinstance(module, BatchNorm2d):
                module.process_group = grid.across
    return model


def _runner(
    model: SegmentedModel,
    plan: Plan,
    card: CardPlan,
    recipe: Recipe,
    class_weights: Sequence[float] | None,
    grid: Grid,
    device: torch.device,
) -> Runner:
    model.set_recompute({segment.name: segment.recompute for segment in card.segments if segment.name != LOSS})
    height, width = plan.image
    parts = plan.replicas * plan.micro_batches * plan.accumulation
    objective = model.objective(
        recipe.loss.aux_weight, class_weights=class_weights, label_smoothing=recipe.loss.label_smoothing
    )
    loss = MeanLoss(
        objective.to(device),
        pixels=plan.batch * plan.accumulation * height * width if parts > 1 else None,
        replicas=plan.replicas,
        device=device,
    )
    if not plan.strategy.splits:
        return WholeRunner(model.to(device), loss, grid=grid, accumulation=plan.accumulation, precision=plan.precision)
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


def _evaluation(
    recipe: Recipe, runner: Runner, device: torch.device, progress: Callable[[int, int], None] | None = None
) -> Callable[[], Score]:
    dataset: SegmentationDataset = recipe.data.open_val()

    def score() -> Score:
        framing = Framing.of(recipe.data)
        result = evaluate(
            _RunningModel(runner), dataset, device=device, framing=framing, instances=False, progress=progress
        )
        return Score(result.miou, result.pixel_accuracy)

    return score


def _in_one_line(error: Exception, card: CardPlan | None) -> str | None:
    """What a user can mend, in one line; None for a defect of ours."""
    if isinstance(error, MemsegError):
        return str(error)
    if is_out_of_memory(error) and card is not None:
        return (
            f"{card.card}: the memory of this card ran out, {format_bytes(card.capacity_bytes)}; the plan predicted "
            f"{format_bytes(card.needed_bytes)}. Make a new plan, or give the card more"
        )
    if is_lost_process(error):
        return (
            f"a process that decodes images was lost, near a memory limit the likely cause: {str(error).strip()} "
            "Go on with --resume, and with fewer of them: --set train.workers=1"
        )
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return None


def _leave_error(folder: Path, message: str, rank: int) -> None:
    """The first process to fail says why; those that fail after it only lost their peer."""
    lift_memory_limit()
    folder.mkdir(parents=True, exist_ok=True)
    mine = folder / f".{ERROR_FILE}.{rank}"
    try:
        mine.write_text(message, encoding="utf-8")
        # There at once and whole: another machine may be looking.
        os.link(mine, folder / ERROR_FILE)
    except FileExistsError:
        return
    except OSError:
        # The disk may be what failed.
        print(message, file=sys.stderr)
    finally:
        mine.unlink(missing_ok=True)


def _write_result(folder: Path, plan: Plan, trainer: Trainer, report: StepReport | None, peak_bytes: int) -> None:
    """Gather what each process measured; the first one writes the run's result, for all machines to read."""
    measured = [0] * len(plan.cards)
    dist.all_gather_object(measured, peak_bytes)
    if dist.get_rank() == 0:
        standing = trainer.standing
        best = None if standing.best_step is None else {"step": standing.best_step, "miou": standing.best_miou}
        result = {
            "steps": report.step if report else trainer.total_steps,
            "stopped_early": trainer.stopped_early,
            "loss": report.loss if report else None,
            "best": best,
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
