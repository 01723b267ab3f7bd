"""The training loop of one process; every process of a run goes through the same steps.

What is random is a function of (seed, epoch, index), so a run that was killed goes on from its last checkpoint as if
nothing had happened, on the same cards or on others.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from memseg.data import SegmentationDataset, TrainingView
from memseg.errors import InputError, MemsegError, PlanError
from memseg.nn.precision import parameter_dtype
from memseg.profiling.step import create_optimizer_state
from memseg.running import Batch, Runner
from memseg.training.checkpoint import checkpoint_folders, load_checkpoint, save_checkpoint
from memseg.training.log import MetricsLog
from memseg.training.recipe import Recipe
from memseg.training.schedule import poly_lr


@dataclass(frozen=True)
class StepReport:
    """What is known after a step, in every process."""

    step: int
    total_steps: int
    loss: float
    lr: float
    seconds: float


@dataclass(frozen=True)
class Score:
    """An evaluation during training; shares from 0 to 1."""

    miou: float
    pixel_accuracy: float


@dataclass(frozen=True)
class Hooks:
    """What a trainer tells others, and asks of them."""

    stepped: Callable[[StepReport], None] = lambda report: None
    """After every step, in the process that reports."""
    steps_done: Callable[[int], None] = lambda count: None
    """After every step, on every process: how many this call of `run` has done."""
    evaluate: Callable[[], Score] | None = None
    """Scores the validation split, the module in eval mode; called at once by all processes that have it, while others
    wait. What it returns counts in the process that reports."""


def make_optimizer(recipe: Recipe, module: nn.Module, encoder: tuple[str, ...]) -> torch.optim.Optimizer:
    """Adam over what `module` trains, the pretrained part at its lower rate.

    Args:
        recipe: Of the run.
        module: This process's part of the model.
        encoder: Names of the segments that pretrained weights filled.
    """
    options = recipe.optimizer
    factor = options.pretrained_lr_factor if recipe.model.encoder_weights else 1.0
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            scale = factor if name.split(".")[1] in encoder else 1.0
            groups.setdefault(scale, []).append(parameter)
    if not groups:
        raise PlanError("each card of a plan must have something to train, one has no parameters; make a new plan")
    return torch.optim.Adam(
        [{"params": parameters, "lr_scale": scale} for scale, parameters in groups.items()],
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        fused=True,
    )


def training_length(recipe: Recipe, images: int) -> tuple[int, int]:
    """Steps of an epoch, which leaves out what is no whole step, and of the whole run.

    Raises:
        InputError: the data set has fewer images than a step.
    """
    batch, accumulation = recipe.train.batch, recipe.train.accumulation
    steps_per_epoch = images // (batch * accumulation)
    if steps_per_epoch == 0:
        passes = f" and train.accumulation {accumulation}" if accumulation > 1 else ""
        raise InputError(
            f"a step must not take more images than the training split has: train.batch is {batch}{passes}, "
            f"there are {images} images"
        )
    if recipe.schedule.steps is not None:
        return steps_per_epoch, recipe.schedule.steps
    assert recipe.schedule.epochs is not None
    return steps_per_epoch, recipe.schedule.epochs * steps_per_epoch


class Trainer:
    """One process's part of a run.

    Args:
        recipe: Of the run.
        runner: This process's part of the model.
        optimizer: From `make_optimizer`.
        dataset: The training split.
        folder: The run folder.
        device: Of this process.
        share: Which images of each pass this process's replica takes.
        reports: Whether this process keeps the log, as exactly one does.
        hooks: Who is told.
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
        share: slice,
        reports: bool,
        hooks: Hooks,
    ) -> None:
        self._recipe, self._runner, self._optimizer = recipe, runner, optimizer
        self._folder, self._device, self._hooks = folder, device, hooks
        self._share, self._reports = share, reports
        self._dtype = parameter_dtype(recipe.train.precision)
        parts = {"image"} if runner.reads_images else set()
        parts |= {"target"} if runner.reads_target else set()
        self._images = len(dataset)
        self._view = (
            TrainingView(
                dataset,
                size=recipe.data.image,
                fit=recipe.data.fit,
                flip=recipe.data.flip,
                seed=recipe.train.seed,
                parts=frozenset(parts),
                region=recipe.data.region,
            )
            if parts
            else None
        )
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
        log = MetricsLog(self._folder, resume_step=step) if self._reports else None
        started_at, report = step, None
        try:
            while step < self.total_steps:
                epoch, position = divmod(step, self._steps_per_epoch)
                passes = self._passes(epoch, position)
                for _ in range(min(self._steps_per_epoch - position, self.total_steps - step)):
                    report = self._step(step, passes)
                    step += 1
                    self._hooks.steps_done(step - started_at)
                    if self._reports:
                        self._hooks.stepped(report)
                    if log and (step % self._recipe.train.log_every == 0 or step == self.total_steps):
                        log.write(step, {"loss": report.loss, "lr": report.lr, "step_seconds": report.seconds})
                    # Before the checkpoint: a run that is killed meanwhile is evaluated when it goes on.
                    self._evaluate(step, log)
                    if step == self.total_steps or step % self._recipe.train.checkpoint_every == 0:
                        self._save(step)
        finally:
            if log:
                log.close()
        return report

    def _step(self, step: int, passes: Iterator[Batch]) -> StepReport:
        started, self._reading_s = time.perf_counter(), 0.0
        lr = poly_lr(self._recipe.optimizer.lr, step, self.total_steps, self._recipe.schedule.poly_power)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._runner.module.train()
        loss = self._runner.step(passes)
        if not math.isfinite(loss):
            raise MemsegError(
                f"the loss must stay finite, it is {loss} at step {step + 1}; "
                f"try a lower optimizer.lr than {self._recipe.optimizer.lr}"
            )
        self._runner.scaler.step(self._optimizer)
        self._runner.scaler.update()
        return StepReport(step + 1, self.total_steps, loss, lr, time.perf_counter() - started - self._reading_s)

    def _passes(self, epoch: int, position: int) -> Iterator[Batch]:
        """What this process reads, pass by pass, from a step of an epoch on; each is read when it is asked for."""
        batch, accumulation = self._recipe.train.batch, self._recipe.train.accumulation
        generator = torch.Generator().manual_seed(self._recipe.train.seed * 1_000_003 + epoch)
        order = torch.randperm(self._images, generator=generator).tolist()
        starts = range(position * accumulation * batch, self._steps_per_epoch * accumulation * batch, batch)
        wanted = [order[start : start + batch][self._share] for start in starts]
        if self._view is None:
            yield from (Batch(None, None) for _ in wanted)
            return
        self._view.set_epoch(epoch)
        batches = iter(DataLoader(self._view, batch_sampler=wanted, num_workers=self._recipe.train.workers))
        for indices in wanted:
            started = time.perf_counter()
            try:
                loaded = next(batches)
            except RuntimeError:
                # A loading process can hand over the text of an error only; here the error itself is raised again.
                for index in indices:
                    self._view[index]
                raise
            self._reading_s += time.perf_counter() - started
            yield self._placed(loaded)

    def _placed(self, loaded: dict[str, Tensor]) -> Batch:
        """On this process's device; taken out of `loaded`, so that where these are copies nothing else stays."""
        images = target = None
        if "image" in loaded:
            images = loaded.pop("image").to(self._device, self._dtype, memory_format=torch.channels_last)
        if "target" in loaded:
            target = loaded.pop("target").to(self._device)
        return Batch(images, target)

    def _save(self, step: int) -> None:
        save_checkpoint(
            self._folder,
            step,
            self._runner.module,
            self._optimizer,
            scaler=self._runner.scaler,
            keep=self._recipe.train.keep_checkpoints,
        )

    def _evaluate(self, step: int, log: MetricsLog | None) -> None:
        every = self._recipe.train.evaluate_every
        if not every or not (step % (every * self._steps_per_epoch) == 0 or step == self.total_steps):
            return
        if self._hooks.evaluate:
            self._runner.module.eval()
            score = self._hooks.evaluate()
            if log:
                log.write(step, {"miou": score.miou, "pixel_accuracy": score.pixel_accuracy})
        # The patience of the whole group is the longest; those that have nothing to score wait here.
        dist.barrier()
