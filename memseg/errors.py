"""What can go wrong that a user can mend.

Every such error is a MemsegError: the command line prints it as it stands, without a traceback, and exits with 2.
Its text says what must hold, what was found and what would mend it. Anything else that is raised is a defect of ours.
"""

import difflib
from collections.abc import Iterable, Sequence


class MemsegError(Exception):
    """An error that the user can mend."""

    exit_code = 2
    """Of a command that ends with it."""


class RunFailedError(MemsegError):
    """A process of a run ended without saying why: a defect of ours, or the system ended it."""

    exit_code = 1


class InputError(MemsegError):
    """A value given by the user does not hold."""


class UnknownNameError(InputError):
    """A name that is not in a known list; carries the list and the nearest of it."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        self.suggestion = suggest(name, self.known)
        mend = f"did you mean {self.suggestion}?" if self.suggestion else f"known: {', '.join(self.known)}"
        super().__init__(f"unknown {kind} {name!r}; {mend}{' ' + hint if hint else ''}")


class ProblemsError(InputError):
    """A file or folder with several problems, all told at once, one line each."""

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.where, self.problems = where, list(problems)
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        super().__init__("\n  ".join([f"{where}: {count}", *problems]))


class RecipeError(ProblemsError):
    """A recipe that cannot be run."""


class DataError(ProblemsError):
    """A data set that is not what its layout promises."""


class PlanError(InputError):
    """A plan file that is damaged, or was made for something else."""


class CheckpointError(InputError):
    """A checkpoint that is damaged, or was made by something else."""


class InfeasiblePlanError(MemsegError):
    """No plan fits the cards. `reports` puts the numbers into words."""

    def __init__(self, message: str, *, shortfall_bytes: int, advice: Sequence[str]) -> None:
        self.shortfall_bytes, self.advice = shortfall_bytes, list(advice)
        super().__init__(message)


def suggest(name: str, known: Iterable[str]) -> str | None:
    """The known name nearest to `name`, or None when none is near.

    >>> suggest("batchsize", ["batch_size", "crop_size"])
    'batch_size'
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return near[0] if near else None
