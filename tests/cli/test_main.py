"""The command line from outside: real processes, their output and their exit codes."""

import json
import os
import shlex
import subprocess
import sys

import pytest

from memseg.cli.main import COMMANDS, build_parser, main
from memseg.errors import InputError


def memseg(*arguments, **options):
    command = [sys.executable, "-m", "memseg.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)


def test_help_names_every_command_and_loads_no_torch():
    script = (
        "import sys; from memseg.cli.main import build_parser\n"
        "build_parser().print_help(); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"    {command} " in done.stdout for command in COMMANDS)


def test_examples_of_every_help_are_command_lines_that_parse(capsys):
    parser = build_parser()
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            parser.parse_args([command, "--help"])
        examples = capsys.readouterr().out.partition("examples:\n")[2].splitlines()
        assert examples, command
        for example in examples:
            program, *arguments = shlex.split(example.partition(">")[0])
            assert (program, arguments[0]) == ("memseg", command)
            assert parser.parse_args(arguments).command == command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evl"], "memseg: unknown command 'evl'; did you mean eval?\n"),
        (["recipes", "show", "stretes"], "memseg recipes: unknown recipe 'stretes'; did you mean streets?"),
        (["recipes", "show"], "memseg recipes: a recipe's name goes with show"),
        (["predict", "run", "picture.png"], "memseg predict: error: the following arguments are required: --out"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_bad_input_exits_with_2_and_one_message(arguments, message):
    done = memseg(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_what_predict_cannot_find_is_told_together(tmp_path):
    done = memseg("predict", "nowhere", "one.png", "two.png", "--out", "out", "--device", "cpu", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "memseg predict: pictures: 2 problems",
        "  one.png: no such file or folder",
        "  two.png: no such file or folder",
    ]
    assert not list(tmp_path.iterdir())


def test_json_is_all_that_stands_on_standard_output():
    done = memseg("models", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    models = {model["name"]: model for model in json.loads(done.stdout)["models"]}
    assert models["ladder-densenet121"]["parameters"] > models["ladder-densenet-mini"]["parameters"]
    assert models["ladder-densenet121"]["output_stride"] == 64


def test_a_shown_recipe_is_the_file_itself(tmp_path, capsys):
    assert main(["recipes", "show", "streets_demo"]) == 0
    mine = tmp_path / "mine.toml"
    mine.write_text(capsys.readouterr().out)
    from memseg.training.recipe import load_recipe

    assert load_recipe(mine) == load_recipe("streets_demo")


def test_recipes_are_listed_with_what_was_published_of_them_and_shown_whole(capsys):
    assert main(["recipes"]) == 0
    listed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "72.82 %" in listed["table1_ladder_densenet121"]
    assert "%" not in listed["streets_demo"]

    assert main(["recipes", "--json"]) == 0
    recipes = {recipe["name"]: recipe for recipe in json.loads(capsys.readouterr().out)["recipes"]}
    assert recipes.keys() == listed.keys() - {"recipe"}
    assert recipes["table5_ladder_densenet169"]["reference"]["split"] == "test"
    assert recipes["streets_demo"]["reference"] is None

    assert main(["recipes", "show", "table3_ladder_resnet50", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert (whole["model"]["name"], whole["model"]["encoder_weights"]) == ("ladder-resnet50", None)
    assert (whole["data"]["image"], whole["train"]["batch"], whole["train"]["log_every"]) == ("448x1024", 4, 1)


def test_a_reader_that_goes_away_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "memseg.cli.main", "recipes"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "memseg recipes: interrupted\n"),
        (InputError("lr must be more than 0"), 2, "memseg recipes: lr must be more than 0\n"),
        (PermissionError(13, "Permission denied", "/out"), 2, "memseg recipes: /out: Permission denied\n"),
    ],
)
def test_what_ends_a_command_becomes_one_line_and_a_code(monkeypatch, capsys, raised, code, message):
    def fail(_args):
        raise raised

    monkeypatch.setattr("memseg.cli.recipes.run", fail)
    assert main(["recipes"]) == code
    assert capsys.readouterr().err == message


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch):
    def fail(_args):
        raise ZeroDivisionError

    monkeypatch.setattr("memseg.cli.recipes.run", fail)
    with pytest.raises(ZeroDivisionError):
        main(["recipes"])
