"""A recipe file that holds only its difference from another.

Seventeen experiments of one paper share all but a line or two, and copies drift apart. So a file may say which recipe
it extends: `extends = "table1_ladder_densenet121"`, a shipped one by name, or a path relative to the file. Tables are
merged key by key, the file's own values win. What names a run (`name`, `description`, `reference`) is never inherited.

Read without torch, so that listing recipes answers at once.
"""

import tomllib
from pathlib import Path
from typing import Any

from memseg.errors import RecipeError, UnknownNameError
from memseg.training.shipped import shipped_recipe

OWN_KEYS = ("name", "description", "reference")
"""What each file says of itself alone."""
RIVALS = {"epochs": "steps", "steps": "epochs"}
"""In the table `schedule`: the length of a run is given one way or the other, and giving one takes the other away."""


def read_recipe_file(source: str | Path) -> tuple[dict[str, Any], Path]:
    """The values of a recipe, with those that it inherits, and the file that they begin with.

    Args:
        source: A path that ends in .toml, or the name of a shipped recipe.

    Raises:
        RecipeError: a file cannot be read, is no TOML, or extends itself.
        UnknownNameError: `source` is no path, and no recipe of that name was shipped.
    """
    path = Path(source) if Path(source).suffix == ".toml" else shipped_recipe(str(source))
    return _read(path, ()), path


def merge(base: dict[str, Any], difference: dict[str, Any]) -> dict[str, Any]:
    """Both, tables merged key by key, the second's values where both have one.

    >>> merge({"train": {"batch": 4, "seed": 1}}, {"train": {"batch": 2}})
    {'train': {'batch': 2, 'seed': 1}}
    >>> merge({"schedule": {"epochs": 30}}, {"schedule": {"steps": 100}})
    {'schedule': {'steps': 100}}
    """
    merged = {key: value for key, value in base.items() if RIVALS.get(key) not in difference}
    for key, value in difference.items():
        inherited = merged.get(key)
        merged[key] = merge(inherited, value) if isinstance(inherited, dict) and isinstance(value, dict) else value
    return merged


def _read(path: Path, heirs: tuple[Path, ...]) -> dict[str, Any]:
    """The values of one file over those that it extends; `heirs` are the files that led to it."""
    values = _parse(path, heirs)
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise RecipeError(str(path), [f"extends: must be the name or the path of a recipe in quotes, got {parent!r}"])
    if Path(parent).suffix == ".toml":
        above = path.parent / parent
    else:
        try:
            above = shipped_recipe(parent)
        except UnknownNameError as error:
            raise RecipeError(str(path), [f"extends: {error}"]) from None
    chain = (*heirs, path)
    if above.resolve() in [one.resolve() for one in chain]:
        names = " -> ".join(one.name for one in (*chain, above))
        raise RecipeError(str(path), [f"extends: a recipe must not extend itself, found {names}"])
    inherited = {key: value for key, value in _read(above, chain).items() if key not in OWN_KEYS}
    return merge(inherited, values)


def _parse(path: Path, heirs: tuple[Path, ...]) -> dict[str, Any]:
    wanted_by = f" (extended by {heirs[-1]})" if heirs else ""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        problem = f"must be TOML: {error}"
    except UnicodeDecodeError as error:
        problem = f"must be UTF-8 text: {error}"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}; `memseg recipes` lists shipped ones"
    raise RecipeError(str(path), [f"{problem}{wanted_by}"])
