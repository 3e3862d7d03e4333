"""What the pages have in common: tables, facts about the machine, and templates that escape every value."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FunctionLoader, StrictUndefined, Template

from deepthin.lab.report.points import STYLES, UNKNOWN, base


@dataclass(frozen=True)
class Key:
    """A sample of a method's line, as in the legend of the chart."""

    line: str  # CSS: solid, dashed or dotted
    colour: str

    @classmethod
    def of(cls, method: str) -> "Key":
        """The line style of a method.

        Args:
            method: Name of the method, such as ``deepthin-8bit``.

        Returns:
            Solid for 32-bit floats, dotted for 4 bits, else dashed; in the method's colour.
        """
        name, bits = base(method)
        return cls({"": "solid", "4": "dotted"}.get(bits, "dashed"), STYLES.get(name, UNKNOWN)[0])


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str = ""
    value: str | None = None  # sort key
    look: str = ""  # its class in page.css
    small: str = ""  # small print after the text
    span: int = 0  # columns, if more than one
    key: Key | None = None  # of a method: the cell is the heading of a row


@dataclass(frozen=True)
class Table:
    """A table of the page: column headings, and rows of as many cells."""

    heads: Sequence[str]
    lines: Sequence[Sequence[Cell]]
    title: str = ""


def template(name: str) -> Template:
    """A page's template, within the frame and with the macros that the pages have in common.

    Args:
        name: Its file in this package.

    Returns:
        The template; every value that is filled in is escaped.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(asset)
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment.get_template(name)


def asset(name: str) -> str:
    """Read a file of this package.

    Args:
        name: Its name.

    Returns:
        Its text.
    """
    return files("deepthin.lab.report").joinpath(name).read_text(encoding="utf-8")


def plain(value: Any) -> str:
    """A plain value as text.

    Args:
        value: A number, text, list or mapping.

    Returns:
        The text.
    """
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {plain(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def number(value: float | None, form: str, look: str = "") -> Cell:
    """A number as a cell.

    Args:
        value: The number; None: an empty cell.
        form: Its format.
        look: Its class in page.css.

    Returns:
        The cell, sorted by its value.
    """
    return Cell() if value is None else Cell(f"{value:{form}}", repr(value), look)


def facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is needed to reproduce a run, besides the command and the network.

    Args:
        run: What the run noted about itself: name -> value.

    Returns:
        Name and text: versions, the processor, and the entries of ``run``.
    """
    versions = ", ".join(f"{name} {version(name)}" for name in ("deepthin", "torch", "numpy"))
    found = {
        "versions": f"{versions}, Python {platform.python_version()}",
        "processor": f"{_processor()}; threads: {torch.get_num_threads()}",
    }
    found |= {key: plain(run[key]) for key in run if key not in ("task", "network", "chosen", "command", *found)}
    return list(found.items())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
