"""What is wrong with a recipe, in plain words.

pydantic finds every violation of a recipe, but tells of types and inputs. Here each becomes one line: where it stands,
what must hold, what was found, and for a misspelt key or word, which one was probably meant.
"""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from memseg.errors import suggest

_PLAIN = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text in quotes",
    "string_too_short": "must not be empty",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list",
    "model_type": "must be a table",
}


def describe_problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line for each violation that pydantic found, in the order of the file's fields.

    Args:
        error: What validation against `model` raised.
        model: The type of the whole file; its field names are what unknown keys are compared with.
    """
    return [_describe(details, model) for details in error.errors(include_url=False)]


def _describe(details: ErrorDetails, model: type[BaseModel]) -> str:
    where, kind, found = details["loc"], details["type"], details["input"]
    context = details.get("ctx", {})
    if kind == "missing":
        return f"{_dotted(where)}: must be given"
    if kind == "extra_forbidden":
        near = suggest(str(where[-1]), _fields_at(model, where[:-1]))
        mend = f"did you mean {near}?" if near else f"known: {', '.join(_fields_at(model, where[:-1]))}"
        return f"{_dotted(where)}: unknown key; {mend}"
    if kind == "value_error":
        return f"{_dotted(where)}: {context['error']}"
    if kind in ("enum", "literal_error"):
        words = str(context["expected"]).replace("'", "")
        near = suggest(str(found), words.replace(" or ", ", ").split(", "))
        return f"{_dotted(where)}: must be {words}, got {_shown(found)}{f'; did you mean {near}?' if near else ''}"
    must = _PLAIN.get(kind) or details["msg"].replace("Input should", "must").replace("a valid ", "a ")
    return f"{_dotted(where)}: {must}, got {_shown(found)}"


def _dotted(where: tuple[int | str, ...]) -> str:
    """The place of a value as its override is written: `optimizer.betas[1]`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)
    return text.removeprefix(".")


def _shown(found: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(found, bool):
        return str(found).lower()
    return "a table" if isinstance(found, dict) else repr(found)


def _fields_at(model: type[BaseModel], where: tuple[int | str, ...]) -> list[str]:
    """The keys that the table at `where` may have."""
    for part in where:
        model = next(_models_in(model.model_fields[str(part)].annotation))
    return list(model.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models among the alternatives of an annotation such as `StreetsConfig | None`."""
    for alternative in (annotation, *get_args(annotation)):
        if isinstance(alternative, type) and issubclass(alternative, BaseModel):
            yield alternative
