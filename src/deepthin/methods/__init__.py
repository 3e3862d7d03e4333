"""All methods by the names that users write: the one table from names to classes.

A name is a class together with the options that the name fixes, so that one class can serve under several names.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deepthin.errors import ConfigError
from deepthin.method import Fitted, Method, as_matrix
from deepthin.methods.binary import Binary
from deepthin.methods.ecsq import Ecsq
from deepthin.methods.factor import Factor
from deepthin.methods.hashed import Hashed
from deepthin.methods.kmeans import KMeans
from deepthin.methods.kronecker import Kronecker
from deepthin.methods.plus import SHARE, Plus, Rest
from deepthin.methods.pruned import Pruned
from deepthin.methods.scalar import Coded, Uniform
from deepthin.methods.tensor_train import TensorTrain
from deepthin.methods.then import Then


@dataclass(frozen=True)
class Named:
    """A method under the name that users write.

    Attributes:
        name: The name, as in rules and files.
        cls: The class.
        preset: Options of ``cls.fit`` that the name fixes unless a rule gives them.
        sized_by: Options that fix the size, so that a rule with one of them needs no target.
        learning_rate_multiplier: Learning rate of the code / learning rate of the dense network, found by experiment
            (docs/training.md).
        about: One phrase for lists of methods.
    """

    name: str
    cls: type[Fitted]
    preset: Mapping[str, Any] = field(default_factory=dict[str, Any])
    sized_by: frozenset[str] = frozenset()
    learning_rate_multiplier: float = 1.0
    about: str = ""

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options that a rule may give: the keyword-only arguments of ``cls.fit``."""
        keywords = inspect.signature(self.cls.fit).parameters.values()
        return tuple(p.name for p in keywords if p.kind is p.KEYWORD_ONLY)

    @property
    def learns_step(self) -> bool:
        """Whether the method's step is learned, so that its size is known only after training."""
        return hasattr(self.cls, "quantize")

    def fit(self, shape: tuple[int, int], max_bits: int, **options: Any) -> Method:
        """Choose the method's fields for a budget.

        Args:
            shape: (rows, cols) of the dense matrix.
            max_bits: Upper bound on ``bits()``.
            **options: Options of ``cls.fit``; they take precedence over ``preset``.

        Returns:
            The method, with ``bits() <= max_bits``.

        Raises:
            BudgetError: No fields fit; it carries the smallest possible size.
            ConfigError: An option is invalid.
            TypeError: ``cls.fit`` has no such option.
        """
        for option, value in options.items():
            if isinstance(value, int) and value.bit_length() > 63:
                raise ConfigError(f"{option}: a whole number of {value.bit_length()} bits is too large.")
        return self.cls.fit(shape, max_bits, **{**self.preset, **options})

    def __call__(self, **fields: Any) -> Method:
        """Make the method from its fields, as a file stores them.

        Args:
            **fields: All fields of ``cls`` without a default, and any others.

        Returns:
            The method.

        Raises:
            TypeError: ``cls`` has no such field, or one is missing.
            ValueError: A field has an invalid value.
        """
        return self.cls(**fields)


METHODS: dict[str, Named] = {
    named.name: named
    for named in (
        Named(
            "deepthin",
            Factor,
            learning_rate_multiplier=20.0,
            about="two factors, re-laid out so that the symmetry breaks",
        ),
        Named(
            "shuffled",
            Factor,
            {"seed": 0},
            learning_rate_multiplier=20.0,
            about="the same factors, scattered at random",
        ),
        Named(
            "rank",
            Factor,
            {"n": "fan-in", "rank": "max"},
            sized_by=frozenset({"rank"}),
            learning_rate_multiplier=10.0,
            about="plain low-rank factorisation",
        ),
        Named("hashed", Hashed, {"seed": 0}, learning_rate_multiplier=3.0, about="few numbers, shared out by a hash"),
        Named("pruned", Pruned, learning_rate_multiplier=20.0, about="the largest weights at their places"),
        Named("kronecker", Kronecker, learning_rate_multiplier=10.0, about="a sum of Kronecker products"),
        Named("tensor-train", TensorTrain, learning_rate_multiplier=10.0, about="a chain of small cores"),
        Named("uniform", Uniform, sized_by=frozenset({"bits"}), about="a few bits for every weight"),
        Named(
            "kmeans",
            KMeans,
            sized_by=frozenset({"bits"}),
            learning_rate_multiplier=10.0,
            about="a few numbers that all weights share",
        ),
        Named(
            "ecsq",
            Ecsq,
            sized_by=frozenset({"bits"}),
            learning_rate_multiplier=10.0,
            about="the same, chosen for symbols of low entropy",
        ),
        Named(
            "binary",
            Binary,
            sized_by=frozenset({"bits"}),
            learning_rate_multiplier=3.0,
            about="a sum of a few signs, with scales of each row",
        ),
        Named("coded", Coded, about="symbols of low entropy times a learned step: rate-aware training"),
    )
}

HIGH_RANK = 8  # quantised factors of this rank and above diverge at 20 times the dense rate (docs/training.md)
THEN = " then "
"""Between the names of a method and of the one that stores its floats: ``deepthin then uniform``."""
PLUS = " plus "
"""Between the names of two methods whose codes are added: ``deepthin plus pruned``."""
REST = "coded"
"""Second name of a sum with all weights, whose floats are then coded: ``deepthin plus coded then coded``."""


@dataclass(frozen=True)
class NamedSum(Named):
    """Two methods whose codes are added, under their names joined by ``PLUS``.

    Attributes:
        first: The method of the first summand.
        second: That of the second; None: all weights, which a method that learns its step then codes.
    """

    first: Named | None = None
    second: Named | None = None

    @property
    def options(self) -> tuple[str, ...]:
        """Options of the first method; ``share``; and ``plus``, a mapping with those of the second."""
        return (*(self.first.options if self.first else ()), "share", "plus")

    def fit(self, shape: tuple[int, int], max_bits: int, **options: Any) -> Method:
        """Choose the fields of both methods for a budget.

        Args:
            shape: (rows, cols) of the dense matrix.
            max_bits: Upper bound on ``bits()``; of a sum with all weights, on those of the first code.
            **options: Options of the first method; ``share`` and ``plus`` as in ``options``.

        Returns:
            The sum.

        Raises:
            BudgetError: No fields fit; it carries the smallest possible size.
            ConfigError: An option is invalid.
        """
        own = dict(options)
        share, of_second = own.pop("share", SHARE), dict(own.pop("plus", {}))
        first, second = self.first or METHODS["deepthin"], self.second
        return Plus.fit(
            lambda bits: first.fit(shape, bits, **own),
            lambda bits: Rest(shape) if second is None else second.fit(shape, bits, **of_second),
            max_bits,
            share,
        )

    def __call__(self, **fields: Any) -> Method:
        """Make the sum from the fields of both methods, as a file stores them.

        Args:
            **fields: ``first`` and ``second``: mappings with the fields of each.

        Returns:
            The sum.

        Raises:
            TypeError: Another field, or one is missing.
            ValueError: A field has an invalid value.
        """
        if fields.keys() != {"first", "second"} or not all(isinstance(own, Mapping) for own in fields.values()):
            raise TypeError(f"{self.name} has the fields first and second, not {sorted(fields)}")
        first, second = self.first or METHODS["deepthin"], self.second or Rest
        return Plus(first(**_tuples(fields["first"])), second(**_tuples(fields["second"])))


def method_named(name: str) -> Named:
    """Look up a method, or two whose codes are added.

    Args:
        name: A key of ``METHODS``, or two joined by ``PLUS``; the second may be ``REST``, all weights.

    Returns:
        The method.

    Raises:
        KeyError: There is no such method, or two that cannot be added.
    """
    first, separator, second = name.partition(PLUS)
    if name in METHODS or not separator:
        return METHODS[name]
    if not addable(first) or not (second == REST or addable(second)):
        raise KeyError(name)
    one, other = METHODS[first], None if second == REST else METHODS[second]
    rate = one.learning_rate_multiplier
    about = f"{one.about}, and a second code that is added"
    # Any: mypy and pyright take ``Plus.fit`` for that of a ``Fitted``, which NamedSum does not call
    cls: Any = Plus
    return NamedSum(name, cls, learning_rate_multiplier=rate, about=about, first=one, second=other)


def is_known(name: str) -> bool:
    """Whether ``method_named`` knows a name.

    Args:
        name: Any text.

    Returns:
        True if it names a method, or two that can be added.
    """
    try:
        method_named(name)
    except KeyError:
        return False
    return True


def addable(name: str) -> bool:
    """Whether a method may be a summand: it must not quantise, which ``then`` is for.

    Args:
        name: Any text.

    Returns:
        True for the methods of ``METHODS`` without ``bits``.
    """
    return name in METHODS and "bits" not in METHODS[name].options


def named(name: str) -> tuple[Named, Named | None]:
    """Look up a method by name.

    Args:
        name: A key of ``METHODS``, or two joined by ``THEN``; the first may be two joined by ``PLUS``.

    Returns:
        The method, and the one that quantises its floats, or None.

    Raises:
        KeyError: There is no such method.
    """
    outer, separator, inner = name.partition(THEN)
    return method_named(outer), METHODS[inner] if separator else None


def learning_rate_multiplier(name: str, method: Method) -> float:
    """The factor by which the learning rate of a code exceeds that of the dense network (docs/training.md).

    Args:
        name: A key of ``METHODS``, or two joined by ``THEN``.
        method: The method of that name.

    Returns:
        The multiplier of the (outer) method, > 0; at most 10 for factors whose steps are learned, and for factors of
        rank 8 or more whose floats are quantised, which diverge at a larger one.

    Raises:
        KeyError: There is no such method.
    """
    rate = named(name)[0].learning_rate_multiplier
    if not isinstance(method, Then):
        return rate
    factors = method.outer.first if isinstance(method.outer, Plus) else method.outer
    if not isinstance(factors, Factor):
        return rate
    learned = any(isinstance(inner, Coded) for _, inner in method.inner)
    return min(rate, 10.0) if learned or factors.rank >= HIGH_RANK else rate


def fields(method: Method) -> dict[str, Any]:
    """The fields that a file stores; with the method's name, the argument of ``with_fields``.

    Args:
        method: Any method. For a ``Then``, fields with default values and the shapes of inner methods are left out.

    Returns:
        Field name -> plain value.
    """
    if isinstance(method, Then):
        inner = {entry: _unusual(stored) for entry, stored in method.inner}
        return {
            "outer": _unusual(method.outer),
            "inner": {e: _without(inner_fields, "shape") for e, inner_fields in inner.items()},
        }
    if isinstance(method, Plus):
        return {"first": _unusual(method.first), "second": _unusual(method.second)}
    return dataclasses.asdict(method)  # pyright: ignore[reportArgumentType]


def _unusual(method: Method) -> dict[str, Any]:
    usual = {field.name: field.default for field in dataclasses.fields(method)}  # pyright: ignore[reportArgumentType]
    return {name: value for name, value in fields(method).items() if value != usual[name]}


def _without(stored: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in stored.items() if key != name}


def with_fields(name: str, stored: Mapping[str, Any]) -> Method:
    """Make the method that a file describes.

    Args:
        name: A key of ``METHODS``, or two joined by ``THEN``.
        stored: The fields, as ``fields`` returns them; lists stand for tuples.

    Returns:
        The method.

    Raises:
        KeyError: There is no such method, or a field is missing.
        TypeError: A field is unknown, missing, or of a wrong type.
        ValueError: A field has an invalid value.
    """
    outer, inner = named(name)
    if inner is None:
        return outer(**_tuples(stored))
    plan = outer(**_tuples(stored["outer"]))
    floats = [entry for entry in plan.code_shapes() if entry not in plan.integers()]
    if set(stored) != {"outer", "inner"} or set(stored["inner"]) != set(floats):
        raise ValueError(f"{name} stores {', '.join(floats)}; the fields are {sorted(stored)}")
    shapes = plan.code_shapes()
    inner_fields = {entry: {"shape": as_matrix(shapes[entry]), **_tuples(stored["inner"][entry])} for entry in floats}
    made = Then(plan, tuple((entry, inner(**inner_fields[entry])) for entry in floats))
    if wrong := [entry for entry, method in made.inner if method.shape != as_matrix(shapes[entry])]:
        raise ValueError(f"{wrong[0]} has the shape {shapes[wrong[0]]}")
    return made


def _tuples(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
