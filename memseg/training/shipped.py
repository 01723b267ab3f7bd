"""Which recipes came with this memseg. Kept apart from `recipe`, so that listing them imports no torch."""

from pathlib import Path

from memseg.errors import UnknownNameError
from memseg.resources import shipped_folder


def shipped_recipes() -> dict[str, Path]:
    """The file of each shipped recipe by its name, in alphabetical order."""
    return {path.stem: path for path in sorted(shipped_folder("recipes").rglob("*.toml"))}


def shipped_recipe(name: str) -> Path:
    """The file of one shipped recipe.

    Raises:
        UnknownNameError: no recipe of that name was shipped.
    """
    known = shipped_recipes()
    if name not in known:
        raise UnknownNameError(
            "recipe", name, known, hint="(a recipe of your own is given as a path that ends in .toml)"
        )
    return known[name]
