"""The command `memseg`: finds the subcommand, and turns what goes wrong into one line and an exit code.

Subcommands import torch only when they run, so that help and mistyped commands answer at once. An error that the user
can mend is printed as it stands and exits with 2; a traceback always means a defect of ours.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from memseg import __version__
from memseg.errors import MemsegError, UnknownNameError

COMMANDS = {
    "models": "models",
    "recipes": "recipes",
    "cards": "cards",
    "profile": "profile",
    "compare": "compare",
    "replay": "replay",
    "plan": "plan",
    "train": "train",
    "eval": "evaluate",
    "predict": "predict",
    "submit": "submit",
    "bench": "bench",
    "export": "export",
    "curves": "curves",
    "demo": "demo",
}
"""Module in this folder that defines each subcommand, in the order of the help."""

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 128 + 2
EXIT_BROKEN_PIPE = 128 + 13
"""As a shell reports a program that SIGINT or SIGPIPE ended."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; each subcommand adds its own part, with `run` as the default to call."""
    parser = argparse.ArgumentParser(
        prog="memseg", description="Train segmentation networks on whole large images, on the cards you own."
    )
    parser.add_argument("--version", action="version", version=f"memseg {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS.values():
        importlib.import_module(f"memseg.cli.{module}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code. Wrong arguments leave through SystemExit(2), as argparse does it.

    Args:
        argv: Arguments after the program's name; None for those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    try:
        if arguments and not arguments[0].startswith("-") and not command:
            raise UnknownNameError("command", arguments[0], COMMANDS)
        parsed = build_parser().parse_args(arguments)
        code: int = parsed.run(parsed)
        sys.stdout.flush()
    except MemsegError as error:
        return _fail(command, str(error), error.exit_code)
    except KeyboardInterrupt as error:
        return _fail(command, str(error) or "interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has gone; point it elsewhere, or the interpreter complains again while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _fail(command, f"{where}{error.strerror}", EXIT_USER_ERROR)
    return code


def _fail(command: str, message: str, code: int) -> int:
    print(f"{f'memseg {command}'.strip()}: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
