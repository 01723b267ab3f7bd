"""Files read without guessing: unknown keys refused, types held to, every problem of a file told in one line each.

Pydantic checks all of this, but words it for the programmer who wrote the model. `problem_lines` words it for the
person who wrote the file: the key's path, what must hold, what was found, and the nearest known key.
"""

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from memseg.errors import suggest


class StrictModel(BaseModel):
    """A value read from a file: immutable, with no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def problem_lines(error: ValidationError, known: Iterable[str] = ()) -> list[str]:
    """One line for each problem in `error`: `cards.0.segments: missing`.

    Args:
        error: What pydantic raised.
        known: Keys that may be meant where an unknown one was found.
    """
    return [_problem_line(problem["loc"], problem["type"], problem["msg"], known) for problem in error.errors()]


def _problem_line(where: tuple[int | str, ...], kind: str, message: str, known: Iterable[str]) -> str:
    path = ".".join(str(part) for part in where) or "the whole file"
    if kind == "missing":
        return f"{path}: missing"
    if kind == "extra_forbidden" or kind == "unexpected_keyword_argument":
        near = suggest(str(where[-1]), known)
        return f"{path}: unknown key{f'; did you mean {near}?' if near else ''}"
    return f"{path}: {message.removeprefix('Value error, ')}"


def field_names(*models: Any) -> set[str]:
    """The keys that these models know."""
    return {name for model in models for name in model.model_fields}
