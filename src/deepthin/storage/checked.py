"""Contents from what a header of any version says: counted first, then checked against the arrays."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from deepthin.errors import FormatError
from deepthin.method import Method
from deepthin.storage.arrays import FLOATS, Coding, Raw, largest, repeated, unpacked
from deepthin.storage.budget import Budget, count_integers, decode_bytes, named
from deepthin.storage.codings import extended, uncoded
from deepthin.storage.contents import Contents, Part, Thin

MOST_HEADER_BYTES = 100_000_000  # as safetensors


@dataclass(frozen=True, slots=True)
class Plan:
    """What the header says of a compressed matrix, and its stored entries.

    Attributes:
        name: Name of the method.
        method: The method.
        parts: Name -> the tensors that are cut from the matrix.
        codings: Entry -> how its integers are encoded, or which rows repeat.
        entries: Entry -> its array in the file; missing until it is found.
    """

    name: str
    method: Method
    parts: dict[str, Part]
    codings: Mapping[str, Any]
    entries: dict[str, Raw]

    def item_bytes(self) -> int:
        """Size of a decoded number.

        Returns:
            Bytes.
        """
        return 8 if "F64" in {raw.dtype for raw in self.entries.values()} else 4

    def dense_bytes(self) -> int:
        """Size of the decoded tensors.

        Returns:
            Bytes.
        """
        return self.item_bytes() * sum(math.prod(part.shape) for part in self.parts.values())


def checked(
    plans: Mapping[str, Plan],
    tensors: dict[str, Raw],
    aliases: Any,
    version: Literal[1, 2],
    budget: Budget,
    finite: bool,
    decoded: bool,
    codes: bool,
) -> Contents:
    """Check what a header says against the arrays of the file, and decode its integers.

    Args:
        plans: Name -> what the header says of a compressed matrix, with its arrays.
        tensors: Name -> tensor that is stored as it is.
        aliases: Other name -> name of a tensor, as the header has them.
        version: Version of the format.
        budget: What reading may take; counted before anything is allocated.
        finite: Whether tensors that are stored as they are must be finite.
        decoded: Whether to count what decoding takes, too.
        codes: Whether to decode integers; else placeholders stand for them.

    Returns:
        The contents.

    Raises:
        FormatError: They cannot be, or take more than the budget.
    """
    dense = [plan.dense_bytes() for plan in plans.values() if decoded]
    if sum(dense) > budget.limit:
        raise FormatError(
            f"it decodes to {sum(dense)} bytes, above the limit of {budget.limit}. "
            "If you trust the file, pass a larger max_bytes."
        )
    for name, plan in plans.items():
        _count(name, plan, budget, decoded, codes)
    thin: dict[str, Thin] = {}
    for name, plan in plans.items():
        with named(name):
            thin[name] = _thin(name, plan, version, codes)
    for name, raw in tensors.items():
        if finite and not math.isfinite(largest(raw)):
            raise FormatError(f"{name} holds NaN or infinity. If that is as it should be, pass finite=False.")
    known = set(tensors)
    for own in (own for entry in thin.values() for own in entry.parts):
        if own in known:
            raise FormatError(f"{own} is stored twice.")
        known.add(own)
    if not isinstance(aliases, dict):
        raise FormatError(f"the shared names are {aliases!r}.")
    shared = cast(dict[str, str], aliases)
    for name, target in shared.items():
        if name in known or target not in known:
            raise FormatError(f"the name {name} is declared to share {target!r}, which cannot be.")
    return Contents(thin, tensors, shared, version)


def _count(name: str, plan: Plan, budget: Budget, decoded: bool, codes: bool) -> None:
    """Count what a matrix takes; FormatError if that is too much."""
    method, integers, item_bytes = plan.method, plan.method.integers(), plan.item_bytes()
    for key, shape in method.code_shapes().items():
        own, numbers, raw = f"{name}/{key}", math.prod(shape), plan.entries.get(key)
        stored_bytes = 0 if raw is None else raw.bytes
        if key in integers and codes:
            count_integers(budget, own, plan.codings[key], integers[key], numbers, stored_bytes)
            continue
        if key in plan.codings:
            budget.count(own, 2 * item_bytes * numbers)
    if decoded:
        copied = [math.prod(part.shape) for part in plan.parts.values() if part != Part(part.shape)]
        work = decode_bytes(method, item_bytes)
        # The result of decode is what is kept, unless a tensor is scaled or turned.
        work += item_bytes * (2 * max(copied) if copied else -math.prod(method.shape))
        budget.count(name, plan.dense_bytes(), work)


def _thin(name: str, plan: Plan, version: Literal[1, 2], codes: bool) -> Thin:
    """A compressed matrix, taken from its entries; FormatError if these are not what its plan demands.

    Without ``codes``, integers stay as the file has them, unread, and placeholders stand for them.
    """
    method, integers, codings = plan.method, plan.method.integers(), plan.codings
    whole, cut = (unpacked, repeated) if version == 1 else (uncoded, extended)
    code: dict[str, Raw] = {}
    stored: dict[str, tuple[Raw, Coding | None]] = {}
    for key, expected in method.code_shapes().items():
        raw = plan.entries.get(key)
        if key in integers and not codes and raw is not None:
            code[key] = Raw.zeros("I64", expected)
        elif key in integers:
            code[key] = whole(f"{name}/{key}", raw, codings[key], integers[key], expected)
        elif key in codings:
            code[key] = cut(f"{name}/{key}", raw, codings[key], expected)
        elif raw is None or raw.shape != expected or raw.dtype not in FLOATS:
            found = "is missing" if raw is None else f"is {raw.dtype} {raw.shape}"
            raise FormatError(f"{name}/{key} must be floating numbers of shape {expected}, but {found}.")
        else:
            code[key] = raw
        if raw is not None:
            stored[key] = raw, tuple(codings[key]) if key in codings else None
        if key not in integers and not math.isfinite(largest(code[key])):
            raise FormatError(f"{name}/{key} holds NaN or infinity: a code must be finite.")
    if len(kinds := {raw.dtype for key, raw in code.items() if key not in integers}) > 1:
        raise FormatError(f"the code of {name} mixes the types {', '.join(sorted(kinds))}.")
    return Thin(plan.name, method, plan.parts, code, read=(version, stored))
