"""`memseg recipes`: the runs that came with memseg, to start from."""

import argparse
import tomllib

from memseg.cli.console import add_command, print_columns
from memseg.errors import InputError
from memseg.training.shipped import shipped_recipe, shipped_recipes


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Define the subcommand."""
    parser = add_command(
        subparsers,
        "recipes",
        run,
        summary="List the shipped recipes, or print one to start your own from.",
        examples=["memseg recipes", "memseg recipes show streets_demo", "memseg recipes show camvid_mini > mine.toml"],
    )
    parser.add_argument("action", nargs="?", choices=["list", "show"], default="list", help="list (default) or show")
    parser.add_argument("name", nargs="?", metavar="NAME", help="the recipe to show")


def run(args: argparse.Namespace) -> int:
    """Print the list, or the text of one recipe; 0.

    Raises:
        InputError: no name to show, or a name where none belongs.
        UnknownNameError: no such recipe.
    """
    if (args.action == "show") != (args.name is not None):
        raise InputError("a recipe's name goes with show, and only there; try memseg recipes show streets_demo")
    if args.action == "show":
        print(shipped_recipe(args.name).read_text(encoding="utf-8"), end="")
        return 0
    paths = shipped_recipes()
    print_columns(
        [(name, tomllib.loads(path.read_text(encoding="utf-8"))["description"]) for name, path in paths.items()]
    )
    return 0
