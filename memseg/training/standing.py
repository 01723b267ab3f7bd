"""How a run's evaluations stand: which was the best one, and how many have come since.

That decides which checkpoint is kept for good, and when a run that learns nothing more may end. It is told by the
evaluations alone, which the metrics log holds all of, so it needs no place in a checkpoint: a resumed run reads it off.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Standing:
    """Of the evaluations so far.

    >>> standing = Standing().after(100, 0.5).after(200, 0.6).after(300, 0.6)
    >>> standing
    Standing(best_step=200, best_miou=0.6, since_best=1)
    """

    best_step: int | None = None
    """Steps done at the best evaluation, the first one of several that are equal; None before any."""
    best_miou: float = -math.inf
    since_best: int = 0
    """Evaluations after the best one."""

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]], until: int) -> Self:
        """What a run's metrics tell.

        Args:
            records: Lines of the log, oldest first; those of evaluations have a `miou`.
            until: Steps that the run has behind it: records of later ones do not count.
        """
        standing = cls()
        for record in records:
            if "miou" in record and record["step"] <= until:
                standing = standing.after(record["step"], record["miou"])
        return standing

    def after(self, step: int, miou: float | None) -> Self:
        """With one evaluation more, at that many steps; one without a score is not the best."""
        if miou is not None and miou > self.best_miou:
            return type(self)(step, miou, 0)
        return type(self)(self.best_step, self.best_miou, self.since_best + 1)

    def ends(self, patience: int) -> bool:
        """Whether so many evaluations have brought nothing better; 0 waits for ever."""
        return 0 < patience <= self.since_best
