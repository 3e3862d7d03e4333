"""``check_method``: the laws that every method obeys, for a method that someone else writes."""

import secrets
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from deepthin.method import Fitted
from deepthin.methods import METHODS, Named
from deepthin.testing.claims import CLAIMS, INNER, Claims
from deepthin.testing.example import Example, Fit, Subject
from deepthin.testing.laws import LAWS, NOT_OF_TWO, SMALLEST

__all__ = ["INNER", "Claims", "Count", "check_method"]

SHARE = 0.9
"""Of a law's examples, how many must reach an assertion: a law that is hardly ever tested holds nothing."""


@dataclass
class Count:
    """How many examples a law saw, and in how many of them it asserted something."""

    examples: int = 0
    asserted: int = 0


def check_method(
    method: str | Named | type[Fitted] | Fit,
    *,
    claims: Claims | None = None,
    then: Sequence[tuple[str, Mapping[str, Any]]] = (),
    laws: Collection[str] | None = None,
    examples: int = 30,
    seed: int | None = None,
) -> dict[str, Count]:
    """Check the laws of ``deepthin.testing.laws`` on random shapes, budgets, options and weights.

    Needs no test framework and nothing but the protocol ``deepthin.method.Fitted``. A class that is not in ``METHODS``
    is registered while it is checked, under its own name, since files name methods.

    Args:
        method: A class with ``fit``; the name of a method of ``METHODS``, or its ``Named``; or a function
            ``fit(shape, max_bits, **options)`` that makes methods of one class.
        claims: What the method guarantees beyond what all do. Default: that of ``METHODS``' own; else ``Claims()``.
        then: (name, options) of methods that store the floats of this one; each example takes one of them.
            ``deepthin.testing.INNER`` is a choice. Default: the method alone.
        laws: Names of laws. Default: all, but those that one method after another need not obey.
        examples: Of each law, 1 or more.
        seed: Of the first example; the others count on from it. Default: random.

    Returns:
        For each law, how many examples there were and how many reached an assertion.

    Raises:
        AssertionError: A law does not hold, or was asserted in less than 90 % of its examples. The message names the
            law, the example, and the call that repeats it.
        ValueError: ``laws`` has an unknown name, or ``examples`` is not positive.
    """
    names = [law for law in LAWS if not (then and law in NOT_OF_TWO)] if laws is None else list(laws)
    if unknown := set(names) - LAWS.keys():
        raise ValueError(f"There is no law {sorted(unknown)[0]!r}. Laws: {', '.join(LAWS)}.")
    if examples < 1:
        raise ValueError(f"examples = {examples}: a law needs one at least.")
    first = secrets.randbits(32) if seed is None else seed
    with _registered(method) as known:
        subject = Subject(known.name, known.fit, claims or CLAIMS.get(known.name, Claims()), tuple(then))
        if not isinstance(method, str | Named | type):
            subject = replace(subject, fit=method)
        return {law: _checked(subject, law, examples, first) for law in names}


def _checked(subject: Subject, law: str, examples: int, first: int) -> Count:
    count = Count()
    for seed in range(first, first + examples):
        rng, example = np.random.default_rng([seed, zlib.crc32(law.encode())]), None
        try:
            example = Example(subject, rng, SMALLEST.get(law, 1))
            LAWS[law](example)
        except Exception as failed:
            what = str(failed) if isinstance(failed, AssertionError) else f"{type(failed).__name__}: {failed}"
            raise AssertionError(
                f"{subject.name} breaks the law '{law}': {what}\n"
                f"  the law: {LAWS[law].__doc__}\n  example: {example or 'a plan could not be made'}\n"
                f"  again: check_method(..., laws=[{law!r}], seed={seed}, examples=1)"
            ) from failed
        count.examples += 1
        count.asserted += example.checks > 0
    if count.asserted < SHARE * examples and examples > 1:
        raise AssertionError(
            f"The law '{law}' was asserted in {count.asserted} of {examples} examples of {subject.name} (seed {first}):"
            f" it says nothing about this method. Give ``claims`` or options under which it can be tested."
        )
    return count


@contextmanager
def _registered(method: Any) -> Iterator[Named]:
    """The name under which METHODS knows a method; one that it does not know is there for that long."""
    if isinstance(method, str):
        yield METHODS[method]
        return
    if isinstance(method, Named):
        named = method
    else:
        cls: Any = method if isinstance(method, type) else type(method((8, 8), 1 << 20))
        known = (named for named in METHODS.values() if named.cls is cls and not named.preset)
        named = next(known, Named(cls.__name__, cls))
    if METHODS.get(named.name) is named:
        yield named
        return
    if named.name in METHODS:
        raise ValueError(f"METHODS has another method {named.name!r}: give the class another name, or a Named.")
    METHODS[named.name] = named
    try:
        yield named
    finally:
        del METHODS[named.name]
