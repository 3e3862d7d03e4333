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

ASSERTED = 0.9
"""The fraction of a law's examples that must reach an assertion, as a law that asserts rarely tests nothing."""


@dataclass
class Count:
    """How often a law was tested.

    Attributes:
        examples: Examples that the law ran on.
        asserted: Examples in which it asserted something.
    """

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

    It needs no test framework, and of the method only the protocol ``deepthin.method.Fitted``. A class that is not in
    ``METHODS`` is registered under the class's name while it is checked, since files name methods.

    Args:
        method: A class with ``fit``; the name of a method of ``METHODS``, or its ``Named``; or a function
            ``fit(shape, max_bits, **options)`` that makes methods of one class.
        claims: What the method guarantees beyond what all do. Default: its claims in ``CLAIMS``, or ``Claims()``.
        then: (name, options) of methods that store the floats of this one; each example takes one of them.
            ``deepthin.testing.INNER`` is a choice. Default: the method alone.
        laws: Names of laws. Default: all; with ``then`` without those that two methods together need not obey.
        examples: Examples of each law, 1 or more.
        seed: Seed of the first example; the others have the following integers. Default: random.

    Returns:
        For each law, how many examples there were and how many reached an assertion.

    Raises:
        AssertionError: A law does not hold, or was asserted in less than 90 % of its examples. The message names the
            law, the example, and the call that repeats it.
        ValueError: ``laws`` has an unknown name, ``examples`` is not positive, or ``METHODS`` has another method of
            the class's name.
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
    if count.asserted < ASSERTED * examples and examples > 1:
        raise AssertionError(
            f"The law '{law}' was asserted in {count.asserted} of {examples} examples of {subject.name} (seed {first}):"
            f" it says nothing about this method. Give ``claims`` or options under which it can be tested."
        )
    return count


@contextmanager
def _registered(method: Any) -> Iterator[Named]:
    """The method's entry in METHODS; a new method is registered within this context."""
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
