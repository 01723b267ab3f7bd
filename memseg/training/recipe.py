"""One complete run as a TOML file.

A run has many settings, and one that is misspelt or silently ignored costs a day of training. So a recipe is read by a
strict model: unknown keys are refused, nothing is converted in silence, and every problem of a file is told at once.
The same values travel on: the run folder keeps them as JSON, and `parse_recipe` reads that back.
"""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from memseg.errors import RecipeError
from memseg.training.inheritance import RIVALS, read_recipe_file
from memseg.training.problems import describe_problems
from memseg.training.tables import (
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    Reference,
    RunConfig,
    ScheduleConfig,
    StrictModel,
    Text,
    TrainConfig,
)


class Recipe(StrictModel):
    """One complete run."""

    name: Text
    """Short name; for a shipped recipe that of its file."""
    description: str = ""
    """One line for `memseg recipes`."""
    reference: Reference | None = None
    """What others have published of this run, in a table [reference]."""
    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    run: RunConfig = RunConfig()

    def to_json(self) -> str:
        """The recipe as JSON text, every default written out; `parse_recipe(json.loads(text), ...)` reads it back."""
        return self.model_dump_json(indent=2) + "\n"


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file, or a shipped one by its name.

    Args:
        source: A path that ends in .toml, or a name that `memseg recipes` lists.
        overrides: Each as "train.batch=4", the value written as in TOML; text needs no quotes. An override of
            `schedule.steps` takes the place of `schedule.epochs`, and the other way round.

    Raises:
        RecipeError: all problems of the file, of what it extends and of the overrides together.
        UnknownNameError: `source` is no path, and no recipe of that name was shipped.
    """
    values, path = read_recipe_file(source)
    return parse_recipe(values, str(path), overrides)


def override_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe with some values replaced, written as for `load_recipe`; the original stays.

    Raises:
        RecipeError: all problems of the overrides together.
    """
    return parse_recipe(recipe.model_dump(mode="json"), f"recipe {recipe.name}", overrides)


def parse_recipe(values: dict[str, Any], where: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from the plain values of its TOML or JSON form.

    Args:
        values: Tables and values, as tomllib or json give them; left as they are.
        where: What a problem is reported against, such as the path of the file.
        overrides: As for `load_recipe`.

    Raises:
        RecipeError: all problems together.
    """
    # By way of JSON: there strict pydantic takes a list for a tuple and text for an enum, as TOML cannot say more.
    values = json.loads(json.dumps(values, default=str))
    problems = [problem for override in overrides if (problem := _apply_override(values, override))]
    try:
        recipe = Recipe.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise RecipeError(where, problems + describe_problems(error, Recipe)) from None
    if problems:
        raise RecipeError(where, problems)
    return recipe


def _apply_override(values: dict[str, Any], override: str) -> str | None:
    """Put one override into the tables; a line when that cannot be done."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        return f"{override}: an override must be written key=value; try train.batch=4"
    table = values
    for depth, part in enumerate(path[:-1]):
        if table.get(part) is None:
            table[part] = {}
        if not isinstance(table[part], dict):
            return f"{override}: {'.'.join(path[: depth + 1])} is a value and holds no keys"
        table = table[part]
    table[path[-1]] = _override_value(text.strip())
    table.pop(RIVALS.get(path[-1], "") if path[:-1] == ["schedule"] else "", None)
    return None


def _override_value(text: str) -> Any:
    """A TOML value, or the text itself where it is none, so that no quotes are needed on a command line.

    >>> _override_value("4"), _override_value("[30, 900]"), _override_value("true"), _override_value("cpu:8GiB")
    (4, [30, 900], True, 'cpu:8GiB')
    """
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = parsed["value"]
    return value if len(parsed) == 1 and isinstance(value, (str, bool, int, float, list)) else text
