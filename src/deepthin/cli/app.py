"""The application that commands register with, and their output functions."""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from deepthin.errors import ConfigError
from deepthin.storage.atomic import write_atomically
from deepthin.storage.report import Report

app = typer.Typer(
    help="Compress neural networks to 2 % - 0.1 % of their size, and compare methods of compression.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
notes = Console(stderr=True, highlight=False)
_kept: list[tuple[Path, str]] = []


def resumes(folder: Path, *patterns: str) -> None:
    """Say from which files the command goes on after an interruption.

    Args:
        folder: Where they are.
        patterns: Globs of their names.
    """
    _kept.extend((folder, pattern) for pattern in patterns)


def interrupted() -> str:
    """What running the command again will do: it goes on if it has written something to go on from."""
    if found := next((folder for folder, pattern in _kept if any(folder.glob(pattern))), None):
        return f"interrupted; what is done is kept in {found}: the same command goes on"
    return "interrupted before anything was kept: the same command starts over"


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"deepthin {import_module('deepthin').__version__}")
        raise typer.Exit


def say(kind: str, message: str) -> None:
    """Print a message on stderr, literally: brackets in it are not markup."""
    notes.print(Text.assemble((f"{kind}: ", "bold red" if kind == "error" else "yellow"), message), soft_wrap=True)


def known(word: str, valid: Any, what: str) -> str:
    """Return the word if it is valid; else raise ConfigError with the closest valid one."""
    import difflib

    if word not in valid:
        closest = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.0)
        raise ConfigError(f"There is no {what} {word!r}. Did you mean {closest[0]!r}? Valid: {', '.join(valid)}.")
    return word


def show(report: Report, json_file: Path | None) -> None:
    """Print a report, and write it as JSON if a file was named."""
    print(report)
    write_json(json_file, report.to_json())


def write_json(path: Path | None, text: str) -> None:
    """Write JSON text to the file that ``--json`` names, if any."""
    if path is not None:
        write_atomically(path, text.encode())
