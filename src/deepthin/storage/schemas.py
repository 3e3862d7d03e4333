"""How version 2 of the format stores the fields of a method: by number, without what is usual (docs/format.md)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from deepthin.errors import ConfigError
from deepthin.method import Method, as_matrix
from deepthin.methods import METHODS, PLUS, REST, THEN, addable, fields, is_known, method_named, with_fields
from deepthin.methods.plus import Plus
from deepthin.methods.then import Then
from deepthin.storage.varints import Reader, Writer

Kind = Literal["number", "pair", "list", "whole", "seed", "words"]
_MOST_NESTED = 16  # levels of the generic form


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a method: its name, how it is written, and what it is if it is left out."""

    name: str
    kind: Kind = "number"
    usual: Any = None
    words: tuple[Any, ...] = ()

    def default(self, shape: tuple[int, int]) -> Any:
        """The value of a field that is left out; ``"cols"`` stands for the matrix's columns."""
        return shape[1] if self.usual == "cols" else self.usual

    @property
    def is_switch(self) -> bool:
        """Whether it has two values: that it is not the usual one says which."""
        return len(self.words) == 2

    def write(self, to: Writer, value: Any) -> None:
        """Append a value."""
        if self.kind == "words":
            to.number(self.words.index(value))
        elif self.kind == "whole":
            to.whole(value)
        elif self.kind == "seed":
            to.seed(value)
        else:
            if self.kind == "list":
                to.number(len(value))
            for number in (value,) if self.kind == "number" else value:
                to.number(number)

    def read(self, source: Reader) -> Any:
        """Take a value; ValueError if there is none."""
        if self.kind == "words":
            return self.words[source.below(len(self.words))]
        if self.kind == "whole":
            return source.whole()
        if self.kind == "seed":
            return source.seed()
        if self.kind == "number":
            return source.number()
        return tuple(source.number() for _ in range(2 if self.kind == "pair" else source.below(len(source))))


@dataclass(frozen=True, slots=True)
class Schema:
    """The fields of a method besides its shape: one that is written with a bit for each option, more, and options."""

    number: int
    first: str
    more: tuple[Field, ...] = ()
    options: tuple[Field, ...] = ()

    def write(self, to: Writer, method: Any) -> None:
        """Append the fields of a method."""
        unusual = [getattr(method, o.name) != o.default(method.shape) for o in self.options]
        flags = sum(1 << k for k, given in enumerate(unusual) if given)
        to.number(getattr(method, self.first) << len(unusual) | flags)
        for field in self.more:
            field.write(to, getattr(method, field.name))
        for option, given in zip(self.options, unusual, strict=True):
            if given and not option.is_switch:
                option.write(to, getattr(method, option.name))

    def read(self, source: Reader, shape: tuple[int, int], head: int) -> dict[str, Any]:
        """Take the fields, after the number that begins them; ValueError if they are not there."""
        found: dict[str, Any] = {"shape": shape, self.first: head >> len(self.options)}
        found |= {field.name: field.read(source) for field in self.more}
        for k, option in enumerate(self.options):
            value = option.default(shape)
            if head >> k & 1:
                value = option.words[option.words[0] == value] if option.is_switch else option.read(source)
            found[option.name] = value
        return found


_PER = ("matrix", "row")
SCHEMAS: dict[str, Schema] = {
    "deepthin": Schema(1, "n", options=(Field("rank", usual=1), Field("seed", "seed"))),
    "shuffled": Schema(2, "n", options=(Field("rank", usual=1), Field("seed", "seed", usual=0))),
    "rank": Schema(3, "rank", options=(Field("n", usual="cols"), Field("seed", "seed"))),
    "hashed": Schema(4, "buckets", options=(Field("seed", "whole", usual=0),)),
    "pruned": Schema(5, "kept", options=(Field("index", "words", "gaps", ("gaps", "csr")), Field("balance", usual=1))),
    "kronecker": Schema(6, "terms", more=(Field("left", "pair"),)),
    "tensor-train": Schema(7, "rank", more=(Field("rows", "list"), Field("cols", "list"))),
    "uniform": Schema(
        8,
        "width",
        options=(Field("per", "words", "matrix", _PER), Field("affine", "words", False, (False, True))),
    ),
    "kmeans": Schema(
        9,
        "levels",
        options=(
            Field("start", "words", "linear", ("linear", "density", "random")),
            Field("seed", "whole", usual=0),
        ),
    ),
    "ecsq": Schema(10, "levels", more=(Field("coded_bytes"),)),
    "binary": Schema(11, "planes", options=(Field("rounds", usual=2), Field("per", "words", "row", _PER))),
    "coded": Schema(12, "width"),
}
"""The methods that have a number, 1 to 12."""
SUM = 13  # two methods whose codes are added: the number of each (the second: 0 for all weights) before its fields
SECONDS = {"uniform": 1, "kmeans": 2, "ecsq": 3, "binary": 4, "coded": 5}
"""Numbers of the methods that may store the floats of another, 1 to 7; 0: none does."""
_NAMES = {schema.number: name for name, schema in SCHEMAS.items()}
_SECOND_NAMES = {number: name for name, number in SECONDS.items()}


def numbers_of(name: str) -> tuple[int, int]:
    """The numbers of a method and of the one that stores its floats; (0, 0) if a name has none.

    Args:
        name: The method as users write it, such as ``"deepthin then uniform"``.

    Returns:
        The two numbers.
    """
    outer, then, inner = name.partition(THEN)
    first, plus, second = outer.partition(PLUS)
    if first not in SCHEMAS or (then and inner not in SECONDS) or (plus and second != REST and second not in SCHEMAS):
        return 0, 0
    return SUM if plus else SCHEMAS[outer].number, SECONDS[inner] if then else 0


def write_method(to: Writer, name: str, method: Method) -> bool:
    """Append a method's fields, or, of a method without a number, its name and all fields.

    Args:
        to: What is written to.
        name: The method as users write it.
        method: The method.

    Returns:
        Whether the second method has the same fields for all entries, which are then written once.

    Raises:
        ConfigError: A field is of a kind that a file cannot hold.
    """
    outer, _, inner = name.partition(THEN)
    try:
        if numbers_of(name) == (0, 0):
            to.text(name)
            _write_value(to, fields(method))
        elif isinstance(method, Then):
            _write_outer(to, outer, method.outer)
            written: list[bytes] = []
            for _, stored in method.inner:
                own = Writer()
                SCHEMAS[inner].write(own, stored)
                written.append(bytes(own.data))
            alike = len(written) > 1 and len(set(written)) == 1
            to.data += b"".join(written[:1] if alike else written)
            return alike
        else:
            _write_outer(to, outer, method)
    except (ValueError, OverflowError, AttributeError) as error:
        raise ConfigError(f"A file cannot hold the fields of {name}, {fields(method)}: {error}.") from None
    return False


def _write_outer(to: Writer, name: str, method: Method) -> None:
    """Append the fields of one method, or of two whose codes are added."""
    if not isinstance(method, Plus):
        SCHEMAS[name].write(to, method)
        return
    first, _, second = name.partition(PLUS)
    to.number(SCHEMAS[first].number)
    SCHEMAS[first].write(to, method.first)
    to.number(0 if second == REST else SCHEMAS[second].number)
    if second != REST:
        SCHEMAS[second].write(to, method.second)


def _read_outer(source: Reader, number: int, shape: tuple[int, int]) -> tuple[str, dict[str, Any]]:
    """Take what ``_write_outer`` wrote: the name, and the fields."""
    if number != SUM:
        name = _NAMES[number]
        return name, SCHEMAS[name].read(source, shape, source.number())
    first = _addable(source.number())
    one = SCHEMAS[first].read(source, shape, source.number())
    number = source.number()
    second = _addable(number) if number else REST
    other = SCHEMAS[second].read(source, shape, source.number()) if number else {"shape": shape}
    return first + PLUS + second, {"first": one, "second": other}


def _addable(number: int) -> str:
    """The name of a method whose code may be a summand; ValueError for any other number."""
    name = _NAMES.get(number, "")
    if not addable(name):
        raise ValueError(f"there is no method of number {number} whose code could be added")
    return name


def read_method(source: Reader, numbers: tuple[int, int], shape: tuple[int, int], alike: bool) -> tuple[str, Method]:
    """Take what ``write_method`` wrote.

    Args:
        source: The bytes.
        numbers: The method's numbers.
        shape: (rows, cols) of the matrix.
        alike: Whether the fields of a second method are written once for all entries.

    Returns:
        The name and the method.

    Raises:
        KeyError, TypeError, ValueError, OverflowError, AttributeError: There is no such method, or it cannot have such
            fields.
    """
    if numbers == (0, 0):
        name, stored = source.text(), _read_value(source)
        if not isinstance(stored, dict):
            raise ValueError(f"the fields of {name} are {stored!r}")
        outer_name, _, inner_name = name.partition(THEN)
        if not is_known(outer_name) or (inner_name and inner_name not in METHODS):
            raise ValueError(f"the method is {name!r}; known are {', '.join(METHODS)}")
        return name, with_fields(name, cast(dict[str, Any], stored))
    if numbers[0] not in (*_NAMES, SUM) or (numbers[1] and numbers[1] not in _SECOND_NAMES):
        raise ValueError(f"there is no method of number {numbers}")
    name, outer = _read_outer(source, numbers[0], shape)
    if not numbers[1]:
        return name, with_fields(name, outer)
    inner = _SECOND_NAMES[numbers[1]]
    plan = method_named(name)(**outer)
    shapes, integers = plan.code_shapes(), plan.integers()
    found: dict[str, dict[str, Any]] = {}
    at = source.at
    for entry in shapes:
        if entry not in integers:
            source.at = at if alike else source.at
            found[entry] = SCHEMAS[inner].read(source, as_matrix(shapes[entry]), source.number())
    name = name + THEN + inner
    return name, with_fields(name, {"outer": outer, "inner": found})


# The generic form: a byte for the kind, and the value.

_NONE, _FALSE, _TRUE, _WHOLE, _FLOAT, _TEXT, _LIST, _MAP = range(8)


def _write_value(to: Writer, value: Any, depth: int = 0) -> None:
    if depth > _MOST_NESTED:
        raise ValueError("they are nested too deeply")
    if value is None or isinstance(value, bool):
        to.byte(_NONE if value is None else _TRUE if value else _FALSE)
    elif isinstance(value, int):
        to.byte(_WHOLE)
        to.whole(value)
    elif isinstance(value, float):
        to.byte(_FLOAT)
        to.float(value)
    elif isinstance(value, str):
        to.byte(_TEXT)
        to.text(value)
    elif isinstance(value, list | tuple):
        to.byte(_LIST)
        to.number(len(cast(list[Any], value)))
        for item in cast(list[Any], value):
            _write_value(to, item, depth + 1)
    elif isinstance(value, Mapping):
        whole = cast(Mapping[str, Any], value)
        to.byte(_MAP)
        to.number(len(whole))
        for key in sorted(whole):
            to.text(key)
            _write_value(to, whole[key], depth + 1)
    else:
        raise ValueError(f"{type(value).__name__} is neither a number, a text, a list nor a mapping of names")


def _read_value(source: Reader, depth: int = 0) -> Any:
    if depth > _MOST_NESTED:
        raise ValueError("fields are nested too deeply")
    kind = source.below(_MAP + 1)
    if kind == _WHOLE:
        return source.whole()
    if kind == _FLOAT:
        return source.float()
    if kind == _TEXT:
        return source.text()
    if kind == _LIST:
        return [_read_value(source, depth + 1) for _ in range(source.below(len(source) + 1))]
    if kind == _MAP:
        count = source.below(len(source) + 1)
        found: dict[str, Any] = {}
        for _ in range(count):
            key = source.text()
            if found and key <= next(reversed(found)):
                raise ValueError(f"the field {key!r} is out of order")
            found[key] = _read_value(source, depth + 1)
        return found
    return {_NONE: None, _FALSE: False, _TRUE: True}[kind]
