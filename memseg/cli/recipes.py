"""`memseg recipes`: the runs that came with memseg, to start from."""

import argparse

from memseg.cli.console import add_command, print_columns, print_json
from memseg.errors import InputError
from memseg.training.inheritance import read_recipe_file
from memseg.training.shipped import shipped_recipe, shipped_recipes


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Define the subcommand."""
    parser = add_command(
        subparsers,
        "recipes",
        run,
        summary="List the shipped recipes with the figures published of them, or print one to start your own from.",
        examples=[
            "memseg recipes",
            "memseg recipes show streets_demo",
            "memseg recipes show table4_ladder_densenet169_frozen --json",
            "memseg recipes show camvid_mini > mine.toml",
        ],
    )
    parser.add_argument("action", nargs="?", choices=["list", "show"], default="list", help="list (default) or show")
    parser.add_argument("name", nargs="?", metavar="NAME", help="the recipe to show")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object; of a recipe every value, those it inherits and the defaults too",
    )


def run(args: argparse.Namespace) -> int:
    """Print the list, or one recipe as its file has it or whole; 0.

    Raises:
        InputError: no name to show, or a name where none belongs.
        UnknownNameError: no such recipe.
    """
    if (args.action == "show") != (args.name is not None):
        raise InputError("a recipe's name goes with show, and only there; try memseg recipes show streets_demo")
    if args.action == "show":
        _show(args.name, whole=args.json)
        return 0
    recipes = [read_recipe_file(path)[0] for path in shipped_recipes().values()]
    if args.json:
        listed = ("name", "description", "reference")
        print_json({"recipes": [{key: recipe.get(key) for key in listed} for recipe in recipes]})
        return 0
    rows = [(recipe["name"], _published(recipe.get("reference")), recipe["description"]) for recipe in recipes]
    print_columns([("recipe", "published mIoU", "description"), *rows])
    return 0


def _show(name: str, *, whole: bool) -> None:
    if whole:
        from memseg.training.recipe import load_recipe

        shipped_recipe(name)
        print_json(load_recipe(name).model_dump(mode="json"))
    else:
        print(shipped_recipe(name).read_text(encoding="utf-8"), end="")


def _published(reference: dict[str, float | str] | None) -> str:
    return f"{reference['miou']:.2f} %" if reference else ""
