"""What became of each matrix, in bytes of the written file: one row a matrix, and totals that add up to the file."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deepthin.method import Method
from deepthin.methods.float_coding import inner_of, outer_of
from deepthin.methods.plus import Plus
from deepthin.storage.codings import is_short
from deepthin.storage.contents import VERSION, Contents, Thin
from deepthin.storage.write import size_of


def _coding_of(thin: Thin, version: int) -> dict[str, str]:
    """How the integers of a matrix are coded, and their bits each; empty if it has none."""
    if thin.planned or not (integers := thin.method.integers()):
        return {}
    ways: list[str] = []
    for entry in integers:
        raw, coding = thin.stored_as(version)[entry]
        bits = 8 * raw.bytes / max(math.prod(thin.code[entry].shape), 1)
        ways.append(f"{entry + ' ' if len(integers) > 1 else ''}{coding[0] if coding else ''} {bits:.1f} bits")
    return {"coding": ", ".join(ways)}


@dataclass(frozen=True)
class Row:
    """The result for one matrix.

    A field of the method can be read as an attribute: ``row.rank`` is ``row.fields["rank"]``.

    Attributes:
        name: Name of the tensor, as in the state dict.
        method: Name of the method; ``"dense"`` for a matrix that is stored as it is.
        shape: Dense shape, outputs first.
        dense_bytes: Bytes of the dense tensor.
        bytes: Bytes of the stored code in the file. Members of a group divide its bytes in proportion to their sizes.
        error: ``||decoded - dense|| / ||dense||`` in the Frobenius norm; NaN if nothing was encoded in this call.
        fields: Settings of the method, such as its rank, and ``coding`` or ``group`` where they apply.
    """

    name: str
    method: str
    shape: tuple[int, ...]
    dense_bytes: int
    bytes: int
    error: float = math.nan  # NaN if drawn from scratch or read from a file
    fields: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def ratio(self) -> float:
        """``bytes / dense_bytes``; NaN for an empty tensor."""
        return self.bytes / self.dense_bytes if self.dense_bytes else math.nan

    def __getattr__(self, name: str) -> Any:
        """A field of the method, as an attribute.

        Args:
            name: A key of ``fields``.

        Returns:
            The value of that field.

        Raises:
            AttributeError: The method has no such field.
        """
        fields = self.__dict__.get("fields", {})
        if name in fields:
            return fields[name]
        raise AttributeError(f"The row of {self.__dict__.get('name')} has no {name!r}; it has {sorted(fields)}.")

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values for JSON.

        Returns:
            The columns, the method's fields and ``ratio``; NaN becomes None.
        """
        columns = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "fields"}
        error = _or_none(self.error)
        return {**columns, **self.fields, "ratio": _or_none(self.ratio), "error": error, "shape": list(self.shape)}


@dataclass(frozen=True)
class Report:
    """The result for a whole model: one row for each matrix, and totals that add up to the file.

    Attributes:
        rows: The matrices, sorted by name.
        total_bytes: Size of the written file in bytes.
        dense_bytes: Bytes of every parameter and buffer of the dense model.
        other_bytes: Bytes of stored tensors without a row: biases, normalisation, buffers.
        version: Version of the file's format.
    """

    rows: tuple[Row, ...]
    total_bytes: int
    dense_bytes: int
    other_bytes: int = 0
    version: int = VERSION

    @property
    def ratio(self) -> float:
        """``total_bytes / dense_bytes``, biases, headers and checksums included; NaN for an empty model."""
        return self.total_bytes / self.dense_bytes if self.dense_bytes else math.nan

    @property
    def header_bytes(self) -> int:
        """Bytes of the file beside its tensors: names, settings, checksums."""
        return self.total_bytes - self.other_bytes - sum(row.bytes for row in self.rows)

    def to_json(self) -> str:
        """The report as a JSON object.

        Returns:
            Text with the key ``rows``, the totals in bytes, ``ratio`` and ``version``; NaN becomes null.
        """
        totals = {name: getattr(self, name) for name in ("total_bytes", "dense_bytes", "other_bytes", "header_bytes")}
        rows = [row.to_dict() for row in self.rows]
        return json.dumps({"rows": rows, **totals, "ratio": _or_none(self.ratio), "version": self.version}, indent=1)

    def __str__(self) -> str:
        heads = ("matrix", "method", "shape", "dense bytes", "bytes", "ratio", "error", "plan")
        body = [
            (
                "".join(c if c.isprintable() else repr(c)[1:-1] for c in row.name),
                row.method,
                "x".join(map(str, row.shape)),
                f"{row.dense_bytes:,}",
                f"{row.bytes:,}",
                f"{row.ratio:.4f}",
                "" if math.isnan(row.error) else f"{row.error:.3f}",
                " ".join(f"{key}={value}" for key, value in row.fields.items() if value is not None),
            )
            for row in self.rows
        ]
        if self.other_bytes:
            body.append(("biases, buffers", "as they are", "", "", f"{self.other_bytes:,}", "", "", ""))
        body.append(("names, checksums", "", "", "", f"{self.header_bytes:,}", "", "", ""))
        total = (
            "file",
            f"version {self.version}",
            "",
            f"{self.dense_bytes:,}",
            f"{self.total_bytes:,}",
            f"{self.ratio:.4f}",
            "",
            "",
        )
        return table(heads, [*body, total], right=(3, 4, 5, 6))


def _or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def table(heads: Sequence[str], body: Sequence[Sequence[str]], right: Sequence[int] = (), total: bool = True) -> str:
    """Format a table as plain text.

    Args:
        heads: Column titles.
        body: Lines of as many cells as there are titles.
        right: Indices of right-aligned columns.
        total: Whether a rule separates the last line.

    Returns:
        The lines, joined by newlines.
    """
    widths = [max(len(line[i]) for line in (heads, *body)) for i in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "  ".join(padded).rstrip()

    rule = "-" * len(line(["-" * w for w in widths]))
    lines = [line(heads), rule, *map(line, body)]
    return "\n".join([*lines[:-1], rule, lines[-1]] if total else lines)


def describe(method: Method | None) -> dict[str, Any]:
    """A method's settings as a report shows them.

    Args:
        method: A method; None for a dense matrix.

    Returns:
        Fields and properties by name, without the shape, ``trains`` and fields with default values.
    """
    if method is None:
        return {}
    if inner := inner_of(method):
        return {**describe(inner[0]), **describe(outer_of(method))}
    if isinstance(method, Plus):
        return {**{f"plus_{name}": value for name, value in describe(method.second).items()}, **describe(method.first)}
    declared = dataclasses.fields(method)  # pyright: ignore[reportArgumentType]
    fields = {f.name: value for f in declared if (value := getattr(method, f.name)) != f.default}
    properties = {name: getattr(method, name) for name, value in vars(type(method)).items() if type(value) is property}
    return {name: value for name, value in {**properties, **fields}.items() if name not in ("shape", "trains")}


def report_of(contents: Contents, errors: Mapping[str, float] | None = None) -> Report:
    """Report the sizes of a model's contents as ``write`` stores them.

    Args:
        contents: Thin tensors, dense tensors and shared names.
        errors: Tensor name -> relative error in the Frobenius norm; missing ones become NaN.

    Returns:
        One row for each compressed tensor and each dense tensor of two or more dimensions, and the totals.
        ``total_bytes`` is the exact size of the file.

    Raises:
        ValueError: A tensor's name is reserved or ambiguous in the file.
    """
    rows: list[Row] = []
    for key, thin in contents.thin.items():
        left, dense_left = sum(raw.bytes for raw, _ in thin.stored_as(contents.version).values()), thin.dense_bytes
        plan = {**describe(thin.method), **_coding_of(thin, contents.version)}
        for name, part in thin.parts.items():
            dense = thin.item_bytes * math.prod(part.shape)
            part_bytes = left * dense // dense_left
            left, dense_left = left - part_bytes, dense_left - dense
            group = {"group": key} if len(thin.parts) > 1 else {}
            error = (errors or {}).get(name, math.nan)
            rows.append(Row(name, thin.name, part.shape, dense, part_bytes, error, {**plan, **group}))
    planned = any(thin.planned for thin in contents.thin.values())
    short = contents.version != 1 and not planned
    dense = {name: raw.bytes // 2 if short and is_short(raw) else raw.bytes for name, raw in contents.dense.items()}
    matrices = [name for name, raw in contents.dense.items() if len(raw.shape) > 1]
    rows += [Row(name, "dense", (raw := contents.dense[name]).shape, raw.bytes, dense[name]) for name in matrices]
    return Report(
        rows=tuple(sorted(rows, key=lambda row: row.name)),
        total_bytes=size_of(contents),
        dense_bytes=contents.dense_bytes,
        other_bytes=sum(bytes_ for name, bytes_ in dense.items() if name not in matrices),
        version=contents.version,
    )
