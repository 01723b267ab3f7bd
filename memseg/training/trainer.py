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
from torch import Tensor, nn
from torch.utils.data import DataLoader

from memseg.data import SegmentationDataset, TrainingView
from memseg.errors import InputError, MemsegError, PlanError
from memseg.nn.precision import parameter_dtype
from memseg.profiling.step import create_optimizer_state
from memseg.running import Runner
from memseg.training.checkpoint import checkpoint_folders, load_checkpoint, save_checkpoint
from memseg.training.log import MetricsLog
from memseg.training.recipe import Recipe
from memseg.training.schedule import poly_lr


@dataclass(frozen=True)
class StepReport:
    """What is known after a step, on the process that knows the loss."""

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
    """After every step, where the loss is known."""
    steps_done: Callable[[int], None] = lambda count: None
    """After every step, on every process: how many this call of `run` has done."""
    evaluate: Callable[[], Score] | None = None
    """Scores the validation split; called by every process at once, the module in eval mode."""


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
    """Steps of an epoch, and of the whole run.

    Raises:
        InputError: the data set has fewer images than a batch.
    """
    steps_per_epoch = images // recipe.train.batch
    if steps_per_epoch == 0:
        raise InputError(
            f"a batch must not hold more images than the training split: train.batch is {recipe.train.batch}, "
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
        hooks: Hooks,
    ) -> None:
        self._recipe, self._runner, self._optimizer = recipe, runner, optimizer
        self._folder, self._device, self._hooks = folder, device, hooks
        self._dtype = parameter_dtype(recipe.train.precision)
        parts = {"image"} if runner.reads_images else set()
        parts |= {"target"} if runner.knows_loss else set()
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

    def run(self) -> StepReport | None:
        """Train from the last checkpoint, or from the beginning, to the end; the last step's report, where known.

        Raises:
            CheckpointError: the last checkpoint cannot be read.
            DataError: an image or target cannot be read.
            MemsegError: the loss is no longer finite.
        """
        step = 0
        if checkpoints := checkpoint_folders(self._folder):
            create_optimizer_state(self._optimizer)
            step = load_checkpoint(checkpoints[-1], self._runner.module, self._optimizer, self._runner.scaler)
        log = MetricsLog(self._folder, resume_step=step) if self._runner.knows_loss else None
        started_at, report = step, None
        try:
            while step < self.total_steps:
                epoch, position = divmod(step, self._steps_per_epoch)
                for batch in self._batches(epoch, position):
                    report = self._step(step, batch)
                    step += 1
                    self._hooks.steps_done(step - started_at)
                    if report:
                        self._hooks.stepped(report)
                    if log and report and (step % self._recipe.train.log_every == 0 or step == self.total_steps):
                        log.write(step, {"loss": report.loss, "lr": report.lr, "step_seconds": report.seconds})
                    # Before the checkpoint: a run that is killed meanwhile is evaluated when it goes on.
                    self._evaluate(step, log)
                    if step == self.total_steps or step % self._recipe.train.checkpoint_every == 0:
                        self._save(step)
                    if step == self.total_steps:
                        break
        finally:
            if log:
                log.close()
        return report

    def _step(self, step: int, batch: dict[str, Tensor]) -> StepReport | None:
        started = time.perf_counter()
        lr = poly_lr(self._recipe.optimizer.lr, step, self.total_steps, self._recipe.schedule.poly_power)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._optimizer.zero_grad(set_to_none=True)
        self._runner.module.train()
        # Popped, so that where these are copies the batch itself is free during the step.
        images = None
        if "image" in batch:
            images = batch.pop("image").to(self._device, self._dtype, memory_format=torch.channels_last)
        target = batch.pop("target").to(self._device) if "target" in batch else None
        loss = self._runner.step(images, target)
        if loss is not None and not math.isfinite(loss.item()):
            raise MemsegError(
                f"the loss must stay finite, it is {loss.item()} at step {step + 1}; "
                f"try a lower optimizer.lr than {self._recipe.optimizer.lr}"
            )
        self._runner.scaler.step(self._optimizer)
        self._runner.scaler.update()
        if loss is None:
            return None
        return StepReport(step + 1, self.total_steps, loss.item(), lr, time.perf_counter() - started)

    def _batches(self, epoch: int, position: int) -> Iterator[dict[str, Tensor]]:
        """The batches of an epoch from `position` on; empty ones where this process reads neither part."""
        batch = self._recipe.train.batch
        generator = torch.Generator().manual_seed(self._recipe.train.seed * 1_000_003 + epoch)
        order = torch.randperm(self._images, generator=generator).tolist()
        starts = range(position * batch, self._steps_per_epoch * batch, batch)
        wanted = [order[start : start + batch] for start in starts]
        if self._view is None:
            yield from ({} for _ in wanted)
            return
        self._view.set_epoch(epoch)
        loader = DataLoader(self._view, batch_sampler=wanted, num_workers=self._recipe.train.workers)
        batches = iter(loader)
        for indices in wanted:
            try:
                yield next(batches)
            except RuntimeError:
                # A loading process can hand over the text of an error only; here the error itself is raised again.
                for index in indices:
                    self._view[index]
                raise

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
        due = every and step % (every * self._steps_per_epoch) == 0
        if not self._hooks.evaluate or not (due or (every and step == self.total_steps)):
            return
        self._runner.module.eval()
        score = self._hooks.evaluate()
        if log:
            log.write(step, {"miou": score.miou, "pixel_accuracy": score.pixel_accuracy})
