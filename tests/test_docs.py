"""What the pages say is what the code does: every key, every command line, every link, and the example."""

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from memseg.cli.main import build_parser
from memseg.training.recipe import Recipe, parse_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def recipe_keys(table: dict, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Each key of a recipe with its default and its description, as docs/recipes.md shows them."""
    definitions = Recipe.model_json_schema()["$defs"]
    for name, field in table["properties"].items():
        references = [one["$ref"] for one in (field, *field.get("anyOf", [])) if "$ref" in one]
        inner = definitions[references[0].rpartition("/")[2]] if references else {}
        if "properties" in inner:
            yield from recipe_keys(inner, f"{prefix}{name}.")
            continue
        default = "none" if field.get("default") is None else f"`{json.dumps(field['default'])}`"
        if name in table.get("required", []):
            default = "required"
        yield f"{prefix}{name}", default, field["description"]


def test_every_key_of_a_recipe_is_in_the_table_with_its_default_and_meaning():
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| .+? \| (none|required|`.+?`) \| (.+) \|$", page, re.MULTILINE)
    assert rows == list(recipe_keys(Recipe.model_json_schema()))


def test_the_recipe_that_is_shown_is_one():
    (text,) = blocks(ROOT / "docs/recipes.md", "toml")
    assert parse_recipe(tomllib.loads(text), "docs/recipes.md").name == "mine"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_parses(page):
    text = "".join(blocks(page, "console", "sh"))
    for line in re.findall(r"^(?:\$ )?memseg (.+)$", text, re.MULTILINE):
        arguments = shlex.split(line.partition(">")[0], comments=True)
        # Output may begin with the program's name too: `memseg plan: no plan fits`.
        if not arguments[0].endswith(":"):
            assert build_parser().parse_args(arguments).command == arguments[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("number", [0, 1])
def test_the_readme_s_python_examples_print_what_they_say(number, capsys):
    examples, expected = blocks(ROOT / "README.md", "python"), blocks(ROOT / "README.md", "text")
    assert len(examples) == len(expected) == 2
    exec(compile(examples[number], "README.md", "exec"), {})
    assert capsys.readouterr().out == expected[number]
