"""What `memseg train` shows while it runs: a panel for people, a line now and then for files.

The panel is drawn by the worker that reports, on the standard error that it has from `memseg train`, and only when
something has happened: no thread runs beside the training.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live

from memseg.planning import Plan
from memseg.reports.dashboard import CardState, RunState, dashboard
from memseg.reports.loss_curve import Curve
from memseg.training.recipe import Recipe
from memseg.training.standing import Standing
from memseg.training.trainer import Score, StepReport
from memseg.units import format_seconds

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_FRAMES = 0.25
_SECONDS_BETWEEN_LOOKS = 2.0
"""At the peaks of other processes."""


class Dashboard:
    """Fed by the process that reports; open while it trains.

    Args:
        recipe: Of the run.
        plan: That it carries out.
        length: Steps of an epoch, and of the whole run.
        peaks: Finds the measured peak of each process, None where it is not known yet.
        console: Where to show it; None for standard error.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        length: tuple[int, int],
        peaks: Callable[[], Sequence[int | None]],
        console: Console | None = None,
    ) -> None:
        self._console = console or Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._curve, self._peaks, self._patience = Curve(), peaks, recipe.train.early_stop
        self._state = RunState(
            title=recipe.name,
            step=0,
            total_steps=length[1],
            steps_per_epoch=length[0],
            cards=tuple(CardState(card.card, card.predicted_peak_bytes, card.capacity_bytes) for card in plan.cards),
        )
        self._shown_at = self._looked_at = 0.0
        self._first: tuple[int, float] | None = None
        """The first step of this call, and when it was over."""

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def started(self, step: int, standing: Standing) -> None:
        """How far the run is before the first step."""
        self._show(step=step, **self._scores(standing))

    def stepped(self, report: StepReport) -> None:
        """After a step."""
        now = time.monotonic()
        if self._first is None:
            self._first = report.step, now
        self._curve.add(report.loss)
        last = report.step == report.total_steps
        self._show(
            rarely=not last,
            step=report.step,
            loss=report.loss,
            lr=report.lr,
            grad_norm=report.grad_norm,
            images_per_second=report.images_per_second,
            losses=self._curve.means,
            seconds_left=None if last else self._seconds_left(report, now),
        )
        if not self._live and (last or now - self._shown_at >= _SECONDS_BETWEEN_LINES):
            self._shown_at = now
            text = f"step {report.step}/{report.total_steps}  loss {report.loss:.4f}  {format_seconds(report.seconds)}"
            print(text, file=sys.stderr, flush=True)

    def evaluating(self, done: int, total: int) -> None:
        """While the validation split is scored, after each picture."""
        self._show(rarely=True, evaluating=(done, total))

    def evaluated(self, step: int, score: Score, standing: Standing) -> None:
        """After an evaluation."""
        self._show(evaluating=None, miou=score.miou, **self._scores(standing))
        if not self._live:
            print(
                f"val mIoU {score.miou:.2%}, pixel accuracy {score.pixel_accuracy:.2%}"
                f"{', the best so far' if standing.best_step == step else ''}",
                file=sys.stderr,
                flush=True,
            )

    def _scores(self, standing: Standing) -> dict[str, Any]:
        return {
            "best_step": standing.best_step,
            "best_miou": None if standing.best_step is None else standing.best_miou,
            "patience_left": max(0, self._patience - standing.since_best) if self._patience else None,
        }

    def _seconds_left(self, report: StepReport, now: float) -> float | None:
        """By the mean time of the steps of this call, with the evaluations between them."""
        assert self._first is not None
        step, over_at = self._first
        if report.step == step:
            return None
        return (now - over_at) / (report.step - step) * (report.total_steps - report.step)

    def _show(self, *, rarely: bool = False, **changed: Any) -> None:
        """Draw with some values changed, but `rarely` only if the last time is a moment ago."""
        self._state = replace(self._state, **changed)
        now = time.monotonic()
        if not self._live or (rarely and now - self._shown_at < _SECONDS_BETWEEN_FRAMES):
            return
        self._shown_at = now
        if not rarely or now - self._looked_at >= _SECONDS_BETWEEN_LOOKS:
            self._looked_at = now
            cards = zip(self._state.cards, self._peaks(), strict=True)
            self._state = replace(
                self._state, cards=tuple(replace(card, measured_bytes=peak) for card, peak in cards)
            )  # fmt: skip
        self._live.update(dashboard(self._state), refresh=True)
