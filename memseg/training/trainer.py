"""The training loop of one process; every process of a run goes through the same steps.

What is random is a function of (seed, epoch, index), so a run that was killed goes on from its last checkpoint as if
nothing had happened, on the same cards or on others.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from memseg.data import SegmentationDataset
from memseg.data.loader import make_loader
from memseg.errors import InputError, MemsegError
from memseg.nn.precision import parameter_dtype
from memseg.profiling.step import create_optimizer_state
from memseg.running import Batch, Runner
from memseg.training.checkpoint import checkpoint_folders, load_checkpoint, save_checkpoint, write_best
from memseg.training.log import MetricsLog, read_metrics
from memseg.training.optimizer import clip_gradients
from memseg.training.recipe import Recipe
from memseg.training.schedule import poly_lr, warm_up
from memseg.training.standing import Standing


@dataclass(frozen=True)
class StepReport:
    """What is known after a step, in every process."""

    step: int
    total_steps: int
    loss: float
    lr: float
    seconds: float
    """Without what it waited for its images and targets."""
    images_per_second: float
    """With that."""
    grad_norm: float | None
    """Of all gradients before they were clipped; None where they are not."""


@dataclass(frozen=True)
class Score:
    """An evaluation during training; shares from 0 to 1."""

    miou: float
    pixel_accuracy: float


@dataclass(frozen=True)
class Hooks:
    """What a trainer tells others, and asks of them."""

    started: Callable[[int, Standing], None] = lambda step, standing: None
    """Before the first step, in the process that reports: the steps done in earlier calls, and how the run stands."""
    stepped: Callable[[StepReport], None] = lambda report: None
    """After every step, in the process that reports."""
    steps_done: Callable[[int], None] = lambda count: None
    """After every step, on every process: how many this call of `run` has done."""
    evaluate: Callable[[], Score] | None = None
    """Scores the validation split, the module in eval mode; called at once by all processes that have it, while others
    wait. What it returns counts in the process that reports."""
    evaluated: Callable[[int, Score, Standing], None] = lambda step, score, standing: None
    """After an evaluation, in the process that reports: its step, and how the run stands with it."""


def training_length(recipe: Recipe, images: int) -> tuple[int, int]:
    """Steps of an epoch, which leaves out what is no whole step, and of the whole run.

    Raises:
        InputError: the data set has fewer images than a step, or the warm-up takes the whole run.
    """
    batch, accumulation = recipe.train.batch, recipe.train.accumulation
    steps_per_epoch = images // (batch * accumulation)
    if steps_per_epoch == 0:
        passes = f" and train.accumulation {accumulation}" if accumulation > 1 else ""
        raise InputError(
            f"a step must not take more images than the training split has: train.batch is {batch}{passes}, "
            f"there are {images} images"
        )
    total_steps = recipe.schedule.steps or (recipe.schedule.epochs or 0) * steps_per_epoch
    if recipe.schedule.warmup_steps >= total_steps:
        raise InputError(
            f"the warm-up must be shorter than the run: schedule.warmup_steps is {recipe.schedule.warmup_steps}, "
            f"the run has {total_steps} steps"
        )
    return steps_per_epoch, total_steps


class Trainer:
    """One process's part of a run.

    Args:
        recipe: Of the run.
        runner: This process's part of the model.
        optimizer: From `make_optimizer`.
        dataset: The training split.
        folder: The run folder.
        device: Of this process.
        stages: The processes that the model is split over, this one among them; None for this one alone.
        share: Which images of each pass this process's replica takes.
        reports: Whether this process keeps the log, as exactly one does.
        hooks: Who is told.

    Attributes:
        total_steps: Of the whole run, unless it stops early.
        standing: Of the evaluations so far, the same in all processes.
        stopped_early: Whether `run` ended because evaluations found nothing better.
    """

    def __init__(
        self,
        recipe: Recipe,
        runner: Runner,
        optimizer: torch.optim.Optimizer,
        dataset: SegmentationDataset,
        *,
        folder: Path,
        device: torch.device,
        stages: dist.ProcessGroup | None,
        share: slice,
        reports: bool,
        hooks: Hooks,
    ) -> None:
        self._recipe, self._runner, self._optimizer = recipe, runner, optimizer
        self._folder, self._device, self._hooks = folder, device, hooks
        self._stages, self._share, self._reports = stages, share, reports
        self.standing, self.stopped_early = Standing(), False
        self._dtype = parameter_dtype(recipe.train.precision)
        parts = {"image"} if runner.reads_images else set()
        parts |= {"target"} if runner.reads_target else set()
        self._images = len(dataset)
        self._view = recipe.data.training_view(dataset, seed=recipe.train.seed, parts=parts) if parts else None
        """What this process reads of each image; None between the first card of a split and the last."""
        self._steps_per_epoch, self.total_steps = training_length(recipe, len(dataset))
        self._reading_s = 0.0
        """Of the current step: what it waited for its images and targets."""

    def run(self) -> StepReport | None:
        """Train from the last checkpoint, or from the beginning, to the end; the last step's report, if any was done.

        Raises:
            CheckpointError: the last checkpoint cannot be read.
            DataError: an image or target cannot be read.
            MemsegError: the loss is no longer finite.
        """
        step = 0
        if checkpoints := checkpoint_folders(self._folder):
            create_optimizer_state(self._optimizer)
            step = load_checkpoint(checkpoints[-1], self._runner.module, self._optimizer, self._runner.scaler)
        self._find_standing(step)
        log = MetricsLog(self._folder, resume_step=step) if self._reports else None
        if self._reports:
            self._hooks.started(step, self.standing)
        started_at, report, goes_on = step, None, step < self.total_steps
        try:
            passes = self._passes(step)
            while goes_on:
                report = self._step(step, passes)
                step += 1
                self._hooks.steps_done(step - started_at)
                if self._reports:
                    self._hooks.stepped(report)
                if log and (step % self._recipe.train.log_every == 0 or step == self.total_steps):
                    log.write(step, _logged(report))
                goes_on = self._finish_step(step, log)
        finally:
            if log:
                log.close()
        return report

    def _find_standing(self, step: int) -> None:
        """Of the evaluations of earlier calls; also puts right what the best checkpoint is said to be."""
        found = Standing.of(read_metrics(self._folder), step) if self._reports else Standing(0, 0.0)
        best_step, miou, since_best = self._told([found.best_step or 0, found.best_miou, found.since_best])
        self.standing = Standing(int(best_step) or None, miou, int(since_best))
        if dist.get_rank() == 0:
            write_best(self._folder, self.standing)

    def _told(self, values: Sequence[float]) -> list[float]:
        """Numbers of the process that reports, in every process; of the others all must be 0."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
        if dist.get_world_size() > 1:
            dist.all_reduce(tensor)
        told: list[float] = tensor.tolist()
        return told

    def _step(self, step: int, passes: Iterator[Batch]) -> StepReport:
        started, self._reading_s = time.perf_counter(), 0.0
        train, schedule = self._recipe.train, self._recipe.schedule
        lr = poly_lr(self._recipe.optimizer.lr, step, self.total_steps, schedule.poly_power)
        lr *= warm_up(step, schedule.warmup_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._runner.module.train()
        loss = self._runner.step(passes)
        if not math.isfinite(loss):
            raise MemsegError(
                f"the loss must stay finite, it is {loss} at step {step + 1}; "
                f"try a lower optimizer.lr than {self._recipe.optimizer.lr}"
            )
        norm = None
        if train.clip_norm is not None:
            self._runner.scaler.unscale_(self._optimizer)
            norm = clip_gradients(self._runner.module.parameters(), train.clip_norm, self._stages, self._device)
        self._runner.scaler.step(self._optimizer)
        self._runner.scaler.update()
        seconds = time.perf_counter() - started
        return StepReport(
            step=step + 1,
            total_steps=self.total_steps,
            loss=loss,
            lr=lr,
            seconds=seconds - self._reading_s,
            images_per_second=train.batch * train.accumulation / seconds,
            grad_norm=norm,
        )

    def _finish_step(self, step: int, log: MetricsLog | None) -> bool:
        """Evaluate and save, where this step is one to do so after; whether another follows."""
        # Before the checkpoint: a run that is killed meanwhile is evaluated when it goes on.
        self._evaluate(step, log)
        self.stopped_early = step < self.total_steps and self.standing.ends(self._recipe.train.early_stop)
        goes_on = step < self.total_steps and not self.stopped_early
        # What is found to be the best must be there to be kept.
        best = self.standing.best_step == step
        if not goes_on or best or step % self._recipe.train.checkpoint_every == 0:
            self._save(step)
        return goes_on

    def _passes(self, step: int) -> Iterator[Batch]:
        """What this process reads, pass by pass, from a step of the run on; each is read when it is asked for."""
        places = self._places(step)
        if self._view is None:
            yield from (Batch(None, None) for _ in places)
            return
        batches = make_loader(self._view, places, workers=self._recipe.train.workers, device=self._device)
        while True:
            started = time.perf_counter()
            loaded = next(batches, None)
            self._reading_s += time.perf_counter() - started
            if loaded is None:
                return
            yield self._placed(loaded)

    def _places(self, step: int) -> Iterator[list[tuple[int, int]]]:
        """(epoch, index) of this process's images in each pass, from a step on to the end of the run."""
        batch, accumulation = self._recipe.train.batch, self._recipe.train.accumulation
        while step < self.total_steps:
            epoch, position = divmod(step, self._steps_per_epoch)
            steps = min(self._steps_per_epoch - position, self.total_steps - step)
            generator = torch.Generator().manual_seed(self._recipe.train.seed * 1_000_003 + epoch)
            order = torch.randperm(self._images, generator=generator).tolist()
            begin = position * accumulation * batch
            for start in range(begin, begin + steps * accumulation * batch, batch):
                yield [(epoch, index) for index in order[start : start + batch][self._share]]
            step += steps

    def _placed(self, loaded: dict[str, Tensor]) -> Batch:
        """On this process's device; taken out of `loaded`, so that where these are copies nothing else stays."""
        images = target = None
        if "image" in loaded:
            images = loaded.pop("image").to(
                self._device, self._dtype, non_blocking=True, memory_format=torch.channels_last
            )
        if "target" in loaded:
            target = loaded.pop("target").to(self._device, non_blocking=True)
        return Batch(images, target)

    def _save(self, step: int) -> None:
        save_checkpoint(
            self._folder,
            step,
            self._runner.module,
            self._optimizer,
            scaler=self._runner.scaler,
            keep=self._recipe.train.keep_checkpoints,
            standing=self.standing,
        )

    def _evaluate(self, step: int, log: MetricsLog | None) -> None:
        every = self._recipe.train.evaluate_every
        if not every or not (step % (every * self._steps_per_epoch) == 0 or step == self.total_steps):
            return
        score, problem = Score(0.0, 0.0), None
        if self._hooks.evaluate:
            self._runner.module.eval()
            try:
                score = self._hooks.evaluate()
            except MemsegError as error:
                problem = str(error)
        # The patience of the whole group is the longest; those that have nothing to score wait here.
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        if found := next(filter(None, problems), None):
            # A picture that cannot be scored must not cost the steps that were learnt.
            self._save(step)
            raise MemsegError(found)
        (miou,) = self._told([score.miou if self._reports else 0.0])
        self.standing = self.standing.after(step, miou)
        if log:
            log.write(step, {"miou": score.miou, "pixel_accuracy": score.pixel_accuracy})
            log.sync()
        if self._reports:
            self._hooks.evaluated(step, score, self.standing)


def _logged(report: StepReport) -> dict[str, float]:
    """What the log says of a step."""
    values = {
        "loss": report.loss,
        "lr": report.lr,
        "step_seconds": report.seconds,
        "images_per_second": report.images_per_second,
    }
    return values if report.grad_norm is None else values | {"grad_norm": report.grad_norm}
