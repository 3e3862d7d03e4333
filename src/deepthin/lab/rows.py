"""The rows of ``results.json``: what one trial gave for one metric on one split."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from deepthin.errors import ConfigError
from deepthin.storage.atomic import write_atomically


@dataclass(frozen=True, kw_only=True)
class Row:
    """One value of one trial; None: not measured, or not applicable."""

    task: str
    method: str
    ratio: float  # requested bytes of the weight matrices over dense
    bytes: int | None  # size of the written file
    weight_bytes: int | None = None  # stored bytes of the weight matrices
    dense_bytes: int  # of all parameters of the dense network
    seed: int
    split: str  # dev or test
    teacher: str | None = None  # description of the teacher, if there is one
    metric: str
    value: float | None  # None where the size cannot be reached, or the training failed
    lr: float | None = None
    allocation: float | str | None = None
    seconds: float | None = None  # training time
    model: str | None = None  # the file, relative to the folder of the comparison
    smallest_ratio: float | None = None  # where ``ratio`` cannot be reached
    failed: str | None = None  # why there is no value
    microseconds: float | None = None  # latency of one item
    dense_microseconds: float | None = None  # latency of the dense network in the same run

    @property
    def key(self) -> tuple[str, float, int]:
        """Method, ratio and seed: what identifies the trial."""
        return self.method, self.ratio, self.seed

    def to_json(self) -> dict[str, Any]:
        """The row as ``results.json`` stores it.

        Returns:
            A mapping without the optional fields that are None; ``bytes``, ``weight_bytes`` and ``value`` are always
            there.
        """
        return {name: value for name, value in asdict(self).items() if name in _ALWAYS or value is not None}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Row":
        """Read a row of ``results.json``, also one of an earlier version.

        Args:
            stored: The mapping; keys that this version does not know are left out.

        Returns:
            The row.

        Raises:
            ConfigError: A key is missing that every row has.
        """
        if not isinstance(stored, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] -- what a file holds
            raise ConfigError(f"A row is {type(stored).__name__}, not a mapping: remove the file to begin anew.")
        known = {field.name: getattr(field.type, "__name__", str(field.type)) for field in fields(cls)}
        if missing := sorted(_REQUIRED - set(stored)):
            raise ConfigError(f"A row of results.json lacks {', '.join(missing)}: remove the file to begin anew.")
        for name, kinds in known.items():
            if name in stored and type(stored[name]).__name__ not in _KINDS[kinds]:
                raise ConfigError(
                    f"A row of results.json has {name} = {str(stored[name])[:40]!r}, which must be {kinds}: remove the "
                    "file to begin anew."
                )
        return cls(**{name: value for name, value in stored.items() if name in known})


_KINDS = {
    "str": ("str",),
    "int": ("int",),
    "float": ("float", "int"),
    "str | None": ("str", "NoneType"),
    "int | None": ("int", "NoneType"),
    "float | None": ("float", "int", "NoneType"),
    "float | str | None": ("float", "int", "str", "NoneType"),
}
_REQUIRED = {"task", "method", "ratio", "bytes", "dense_bytes", "seed", "split", "metric", "value"}
_ALWAYS = _REQUIRED | {"weight_bytes"}


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as JSON, one a line.

    Args:
        rows: The rows.
        path: The file, ``results.json`` of a comparison; replaced at once.
    """
    lines = ",\n".join(json.dumps(row.to_json()) for row in rows)
    write_atomically(path, f"[\n{lines}\n]\n".encode())


def read_rows(path: Path) -> list[Row]:
    """Read what `write_rows` wrote.

    Args:
        path: The file.

    Returns:
        The rows, in the order of the file.

    Raises:
        ConfigError: The file is damaged.
    """
    try:
        return [Row.from_json(stored) for stored in read_json(path, list)]
    except ConfigError as error:
        raise error if str(path) in str(error) else ConfigError(f"{path} is damaged. {error}") from None


def read_json(path: Path, kind: type, keys: Mapping[str, type] | None = None) -> Any:
    """Read a file that an earlier run wrote.

    Args:
        path: The file.
        kind: What it holds: ``list`` or ``dict``.
        keys: Of a ``dict``, the types of values that are read.

    Returns:
        A value of that kind.

    Raises:
        ConfigError: The file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}): remove it to begin anew.") from None
    if not isinstance(content, kind):
        raise ConfigError(
            f"{path} is damaged (it holds a {type(content).__name__}, not a {kind.__name__}): remove it to begin anew."
        )
    for key, wanted in (keys or {}).items():
        if key in content and not isinstance(content[key], wanted):
            raise ConfigError(f"{path} is damaged ({key} is not a {wanted.__name__}): remove it to begin anew.")
    return content
