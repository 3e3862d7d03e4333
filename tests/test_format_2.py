"""Version 2 of the file: its page, the golden file, what it costs, and headers that lie."""

import functools
import math
import random
import re
import tracemalloc
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import crafted
import deepthin
import fuzz
import golden_2
from deepthin import METHODS, ConfigError, FormatError
from deepthin.cli import main
from deepthin.coding import arithmetic
from deepthin.method import Integers
from deepthin.methods import Named
from deepthin.methods.then import Then
from deepthin.storage import read as reading
from deepthin.storage.arrays import Raw
from deepthin.storage.codings import WAYS, coded, extended, stored_floats, uncoded, way_bytes
from deepthin.storage.contents import Contents, Part, Thin
from deepthin.storage.head import Head, Tensor, begun, read_head
from deepthin.storage.read import from_bytes, read
from deepthin.storage.schemas import SCHEMAS, SECONDS
from deepthin.storage.varints import Reader, Writer
from deepthin.storage.write import size_of, to_bytes, write
from test_storage import small_contents

PAGE = Path(__file__).parent.parent / "docs" / "format.md"


def example():
    """What the annotated example holds."""
    uniform = METHODS["uniform"]
    outer = METHODS["deepthin"](shape=(3, 4), n=3, rank=1)
    method = Then(outer, (("xf", uniform(shape=(4, 1), width=8)), ("wf", uniform(shape=(1, 3), width=8))))
    code = {
        "xf_symbols": np.array([[0], [-1], [0], [2]], "i2"),
        "xf_step": np.array([[1.0]], "f4"),
        "wf_symbols": np.array([[1, 0, 0]], "i2"),
        "wf_step": np.array([[0.5]], "f4"),
    }
    thin = Thin("deepthin then uniform", method, {"fc.weight": Part((3, 4))}, crafted.raws(code))
    return Contents(
        {"fc.weight": thin}, {"fc.bias": Raw.of(np.array([0.5, 0, -0.1], "f4"))}, {"out.weight": "fc.weight"}
    )


def test_the_example_on_the_page_is_right():
    block = PAGE.read_text().split("## An example, annotated")[1].split("```")[1]
    lines = re.findall(r"^([0-9a-f]{4})  ((?:[0-9a-f]{2} ?)+)", block, re.MULTILINE)
    data = b""
    for place, shown in lines:
        assert int(place, 16) == len(data)
        data += bytes.fromhex(shown)
    assert data == to_bytes(example())
    decoded = from_bytes(data).thin["fc.weight"].decode()["fc.weight"]
    text = "0 0 0 -0.5 / 0 0 0 0 / 0 1 0 0"
    assert text in PAGE.read_text()
    assert decoded.tolist() == [[float(x) for x in row.split()] for row in text.split("/")]
    assert f"A file of {len(data)} bytes" in PAGE.read_text()


def test_the_page_has_the_numbers_of_all_methods():
    text = PAGE.read_text()
    for name, schema in SCHEMAS.items():
        assert re.search(rf"^\| {schema.number} \| `{name}` \| {schema.first} \|", text, re.MULTILINE), name
    assert ", ".join(f"{number} `{name}`" for name, number in SECONDS.items()) in text
    assert set(SCHEMAS) == set(METHODS)


def test_golden_file():
    """Promise 15: these bytes must load, and be written, for ever."""
    golden, made = golden_2.PATH.read_bytes(), golden_2.contents()
    assert to_bytes(made) == golden
    found = from_bytes(golden)
    assert to_bytes(found) == golden
    assert found.aliases == made.aliases
    assert found.thin.keys() == made.thin.keys()
    for name, thin in made.thin.items():
        own = found.thin[name]
        assert (own.name, own.method, dict(own.parts)) == (thin.name, thin.method, dict(thin.parts))
        assert own.code.keys() == thin.code.keys()
        for entry, raw in thin.code.items():
            assert (own.code[entry].dtype, own.code[entry].shape) == (raw.dtype, raw.shape)
            assert bytes(own.code[entry].data) == bytes(raw.data), (name, entry)
    assert found.dense.keys() == made.dense.keys()
    for name, raw in made.dense.items():
        own = found.dense[name]
        assert (own.dtype, own.shape, bytes(own.data)) == (raw.dtype, raw.shape, bytes(raw.data))


def test_the_golden_file_has_every_coding():
    floats = {"short", "repeats", "dense short"}
    levels = {"levels 0", "levels rows", "levels 1"}
    assert golden_2.codings(golden_2.contents()) == {*WAYS, *floats, *levels} - {"levels", "rows", "line"}
    names = {n for thin in golden_2.contents().thin.values() for n in thin.name.split(" then ")}
    assert names == set(METHODS)


def test_versions_are_converted_without_loss():
    """To version 1 and back, and the other way, of all that both can hold."""
    for name, data in crafted.files().items():
        found = from_bytes(data)
        other = to_bytes(found, 3 - found.version)
        assert from_bytes(other).version == 3 - found.version
        assert to_bytes(from_bytes(other), found.version) == data, name
    golden = golden_2.PATH.read_bytes()
    again = from_bytes(to_bytes(from_bytes(to_bytes(from_bytes(golden), 1)), 2))
    for name, thin in from_bytes(golden).thin.items():
        assert all(bytes(raw.data) == bytes(again.thin[name].code[e].data) for e, raw in thin.code.items())


def test_small_files_are_small():
    """At most 12 bytes a matrix beyond its name, and 64 for the file."""
    for name, own in crafted.models().items():
        data = to_bytes(own)
        payload = sum(len(array) for array in crafted.taken_apart_2(data)[1])
        groups = sum(8 * len(thin.parts) for thin in own.thin.values() if len(thin.parts) > 1)
        assert len(data) - payload <= 64 + 12 * len(own.thin) + 4 * len(own.dense) + groups, name


def test_sizes_are_exact_and_bounds_are_bounds():
    for name, data in crafted.files().items():
        own = from_bytes(data)
        assert size_of(own) == len(data), name
        assert size_of(own, bound=True) >= len(data), name
    golden = golden_2.contents()
    assert size_of(golden) == golden_2.PATH.stat().st_size < size_of(golden, bound=True)


def test_large_arrays_are_aligned():
    data = golden_2.PATH.read_bytes()
    found = from_bytes(data)
    assert data.index(bytes(found.dense["dense.large"].data)) % 8 == 0


# Codings


def back(values, kind):
    """How integers are coded, and that they come back."""
    raw, coding = coded(values, kind)
    assert (uncoded("w", raw, coding, kind, values.shape).numpy() == values).all()
    return coding, raw.bytes


def test_each_coding_is_the_shortest_somewhere():
    rng = np.random.default_rng(0)
    even = rng.integers(0, 32, (20, 50))
    assert back(even, Integers(32)) == (("packed", 5), 625)
    peaked = np.clip(np.round(rng.laplace(size=(20, 50)) * 2), -15, 15).astype(int)
    assert back(peaked, Integers(31, -15))[0] == ("levels", 0)
    assert back(peaked + 15, Integers(31))[0] == ("tree", 5)
    columns = peaked.repeat(4, 0) * (np.arange(50) % 5 == 0)
    assert back(columns, Integers(31, -15))[0] == ("levels", 50)
    some = np.sort(rng.choice(100_000, 8000, replace=False))
    assert back(some, Integers(100_000, rising=True))[0] == ("numbers", 0)
    assert back(np.zeros((30, 40), int), Integers(31, -15)) == (("levels", 0), 0)
    assert back(np.zeros((30, 40), int), Integers(1)) == (("packed", 0), 0)
    assert back(rng.integers(0, 70_000, (5, 10)), Integers(70_000))[0] == ("packed", 17)


def test_what_is_promised_is_kept():
    """``most_bytes`` bounds the array even where the header would be shorter with another coding."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        values = rng.integers(0, 2 + rng.integers(30), (1, 1 + rng.integers(40)))
        sizes = [back(values, Integers(32))[1]]
        promised = Integers(32, most_bytes=sizes[0])
        assert back(values, promised)[1] <= sizes[0]


def test_no_coding_takes_more_than_a_plan_says():
    rng = np.random.default_rng(1)
    for rising in (False, True):
        for _ in range(200):
            count = int(rng.integers(1, 60))
            kind = Integers(int(rng.integers(count, 4000)), rising=rising)
            values = (
                np.sort(rng.choice(kind.count, count, replace=False)) if rising else rng.integers(0, kind.count, count)
            )
            coding, size = back(values, kind)
            most = kind.bytes(count)
            assert size + way_bytes(coding[0], size, rising) <= most + way_bytes("planned", most, rising)


@pytest.mark.parametrize(
    ("values", "forms"),
    [
        ({"a": [0.1, 0.1, 0.2], "b": [0.3]}, {"a": None, "b": None}),
        ({"a": [0.5, 1.0, 0.5, 0.5], "b": [1.0]}, {"a": ("short", 4), "b": ("short", 1)}),
        ({"a": [0.1, 0.2, 0.3, 0.4], "b": [1.0]}, {"a": None, "b": None}),  # two bytes less, and two more
        ({"a": [0.1, 0.2, 0.3, 0.4], "b": [1.0, 2.0]}, {"a": None, "b": ("short", 2)}),
        ({"a": [0.1] * 40, "b": [0.3]}, {"a": ("repeats", 1), "b": None}),
        ({"a": [1.0, 2.0] + [0.5] * 40, "b": [0.3]}, {"a": ("short", 3), "b": None}),
        ({"a": [-0.0, math.inf], "b": [math.nan]}, {"a": ("short", 2), "b": ("short", 1)}),
    ],
)
def test_floats_take_the_shortest_form(values, forms):
    raws = {entry: Raw.of(np.array(own, "f4")) for entry, own in values.items()}
    stored = stored_floats(raws)
    assert {entry: coding for entry, (_, coding) in stored.items()} == forms
    for entry, (raw, coding) in stored.items():
        own = raw if coding is None else extended("w", raw, coding, raws[entry].shape)
        assert bytes(own.data) == bytes(raws[entry].data)


def test_a_tensor_that_changes_while_it_is_written_is_noticed():
    values = [np.ones(4, "f4"), np.ones(4, "f4"), np.full(4, 0.1, "f4")]
    changing = Raw("F32", (4,), lambda: iter([values.pop(0).tobytes()]))
    with pytest.raises(ValueError, match="changed while it was written"):
        to_bytes(Contents({}, {"w": changing}))


def test_values_that_are_not_there_yet_are_not_taken_for_short():
    """Of a model on the meta device, or of a plan: weights will have long mantissas."""
    dense = {"w": Raw.zeros("F32", (100,))}
    assert size_of(Contents({}, dense)) == size_of(Contents({}, {"w": Raw.of(np.full(100, 0.1, "f4"))}))
    zeros = {"w": Raw.of(np.zeros(100, "f4"))}
    assert (
        size_of(Contents({}, zeros)) + 200 == size_of(Contents({}, zeros), bound=True) == size_of(Contents({}, dense))
    )


# Methods without a number


@dataclass(frozen=True, slots=True)
class Constant:
    """Every weight is the one float."""

    shape: tuple[int, int]
    note: str = "ü"
    odd: tuple = (1, -2, 0.5, None, True, (False, "x"))
    trains = "codes"

    def code_shapes(self):
        return {"value": (1, 1)}

    def integers(self):
        return {}

    def derived(self):
        return {}

    def decode(self, code, xp):
        return code["value"] * xp.ones_like(code["value"].repeat(self.shape[0], 0).repeat(self.shape[1], 1))

    def bits(self):
        return 32


def test_a_method_of_someone_else_is_stored_by_name(monkeypatch):
    monkeypatch.setitem(METHODS, "constant", Named("constant", Constant))
    code = {"value": Raw.of(np.full((1, 1), 0.1, "f4"))}
    for name, method in (("constant", Constant((3, 4))), ("constant", Constant((3, 4), "", ({"b": 1, "a": []},)))):
        data = to_bytes(Contents({"w": Thin(name, method, {"w": Part((3, 4))}, code)}))
        found = from_bytes(data)
        assert to_bytes(found) == data
        assert found.thin["w"].decode()["w"].tolist() == np.full((3, 4), 0.1, "f4").tolist()
        assert found.thin["w"].method.note == method.note
    outer = METHODS["deepthin"](shape=(3, 4), n=3, rank=1)
    inner = (("xf", Constant((4, 1))), ("wf", Constant((1, 3))))
    then = Thin(
        "deepthin then constant",
        Then(outer, inner),
        {"w": Part((3, 4))},
        {"xf_value": code["value"], "wf_value": code["value"]},
    )
    data = to_bytes(Contents({"w": then}))
    assert to_bytes(from_bytes(data)) == data
    monkeypatch.delitem(METHODS, "constant")
    with pytest.raises(FormatError, match="the method is 'deepthin then constant'; known are deepthin, "):
        from_bytes(data)


@pytest.mark.parametrize("odd", [(1 << 64,), ({1: 2},), (b"x",), functools.reduce(lambda a, _: (a,), range(30), ())])
def test_fields_that_no_file_can_hold_are_refused(monkeypatch, odd):
    monkeypatch.setitem(METHODS, "constant", Named("constant", Constant))
    thin = Thin("constant", Constant((3, 4), odd=odd), {"w": Part((3, 4))}, {"value": Raw.of(np.ones((1, 1), "f4"))})
    with pytest.raises((ConfigError, TypeError), match="cannot hold the fields|not supported|bytes-like"):
        to_bytes(Contents({"w": thin}))


# Headers that lie


def test_numbers_have_one_form():
    for value in (0, 1, 127, 128, 300, 1 << 32, (1 << 64) - 1):
        to = Writer()
        to.number(value)
        assert Reader(bytes(to.data)).number() == value
        with pytest.raises(ValueError, match="shortest form"):
            Reader(bytes([*to.data[:-1], to.data[-1] | 128, 0])).number()
    for whole in (0, -1, 1, -(1 << 63), (1 << 63) - 1):
        to = Writer()
        to.whole(whole)
        assert Reader(bytes(to.data)).whole() == whole
    for data in (b"", b"\x80", b"\xff" * 10, b"\xff" * 9 + b"\x02", b"\x80" * 10 + b"\1"):
        with pytest.raises(ValueError, match="ends too early|64 bits"):
            Reader(data).number()
    with pytest.raises(ValueError, match="not a number"):
        Writer().number(1 << 64)


NAMES = [
    "",
    "a",
    "bias",
    "weight",
    "x.weightbias",
    "x" * 200,
    "x" * 200 + ".weight",
    "\xfc",
    "\xfd\xfe",
    "wei",
    "\U0001f600",
]


def test_names_of_every_kind_come_back():
    dense = {name: Raw.of(np.zeros(1, "f4")) for name in NAMES + [f"layers.{k}.weight" for k in range(300)]}
    data = to_bytes(Contents({}, dense))
    assert set(from_bytes(data).dense) == set(dense)
    assert len(data) < 11 * len(dense) + 200
    with pytest.raises(UnicodeEncodeError):
        to_bytes(Contents({}, {"\ud800": Raw.of(np.zeros(1, "f4"))}))


@pytest.mark.parametrize("end", [b"", b"\0" * 30])
def test_what_is_not_a_header_is_refused(end):
    for start in (
        b"thin",
        b"thin\2",
        b"thin\2\1",
        b"thin\2\xff\xff\xff\xff\x7f",
        b"thin\3\1\0",
        b"thin\2\0",
        b"thin\2\2\0\0",
    ):
        with pytest.raises(FormatError):
            from_bytes(crafted.closed(start + end))
    with pytest.raises(FormatError, match="format version 3; this deepthin reads versions 1 and 2"):
        from_bytes(crafted.closed(b"thin\3" + end))


def with_head(change, data=None):
    """A file of small contents whose header says something else."""
    head, arrays = crafted.taken_apart_2(data or to_bytes(small_contents()))
    return crafted.signed_2(change(head), arrays)


def matrix(head, **changes):
    return replace(head, thin={**head.thin, "a.weight": replace(head.thin["a.weight"], **changes)})


def item(head, **changes):
    items = head.thin["a.weight"].items
    return matrix(head, items={**items, "xf": replace(items["xf"], **changes)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: replace(h, aliases={"e": "d.weight", **h.aliases}), "declared to share 'd.weight', which shares"),
        (lambda h: replace(h, dense={**h.dense, "a.bias": Tensor("F32", (7,))}), "arrays end at byte"),
        (lambda h: replace(h, dense={**h.dense, "a.bias": Tensor("I64", (6,), True)}), "begins with the byte"),
        (lambda h: replace(h, dense={**h.dense, "a.bias": Tensor("F32", (1,) * 70)}), "must be less than 62"),
        (lambda h: replace(h, dense={**h.dense, "a.bias": Tensor("F32", (0, 1 << 62, 4))}), "arrays end at byte"),
        (lambda h: matrix(h, parts={"a.weight": Part((6, 8), scale=-1.0)}), "the scale -1.0"),
        (lambda h: matrix(h, parts={"a.weight": Part((6, 8), zero_row=6)}), "the row of zeros 6"),
        (lambda h: matrix(h, parts={"a.weight": Part((6, 8, 1, 1, 1, 1, 1, *[1] * 60))}), "must be less than 58"),
        (lambda h: item(h, coding=("repeats", 5)), "must be floating numbers|arrays end at byte"),
        (lambda h: item(h, kind="F64"), "mixes the types|arrays end at byte"),
    ],
)
def test_lies_with_good_checksums_are_named(change, message):
    with pytest.raises(FormatError, match=message):
        from_bytes(with_head(change))


def test_a_group_must_list_what_belongs_to_it():
    head = Head({}, {}, {"a": "b"})
    with pytest.raises(ValueError, match="groups are not those"):
        read_head(b"\1\1a\x0f")
    with pytest.raises(KeyError):
        begun(head)
    with pytest.raises(FormatError, match="which cannot be|shares"):
        from_bytes(crafted.closed(crafted.with_header(b"\1\1a\x0e\0")))


def test_what_precedes_an_aligned_array_is_zeros():
    dense = {"a": Raw.of(np.zeros(1, "u1")), "b": Raw.of(np.arange(300, dtype="f4") / 7)}
    data = to_bytes(Contents({}, dense))
    at = data.index(bytes(dense["b"].data))
    assert data[at - 1] == 0
    with pytest.raises(FormatError, match="is not zeros"):
        from_bytes(crafted.closed(data[: at - 1] + b"\1" + data[at:-4]))


def test_headers_in_a_longer_form_are_refused():
    """Insertions of every kind into every place: none gives a second form of the same contents."""
    data, rng = to_bytes(small_contents()), random.Random(0)
    source = Reader(data, 5)
    length = source.number()
    header, rest = data[source.at : source.at + length], data[source.at + length : -4]
    fine = 0
    for _ in range(3000):
        changed, _what = fuzz.other_header(rng, header)
        made = crafted.closed(crafted.with_header(changed) + rest)
        if made == data:
            continue
        try:
            found = from_bytes(made)
        except FormatError:
            continue
        fine += 1
        assert to_bytes(found) == made or not same(found, from_bytes(data))
    assert fine > 50  # other names, for example


def same(one, other):
    return (
        one.thin.keys() == other.thin.keys() and one.dense.keys() == other.dense.keys() and one.aliases == other.aliases
    )


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_short_headers_do_not_declare_long_names(count):
    """Names that share all but one byte with the one before: in a header of 3 bytes a name less than 70 bytes each."""
    names = sorted({f"{'n' * 63}{k:05d}" for k in range(count)})
    dense = {name: Raw("U8", (0,), b"") for name in names}
    data = to_bytes(Contents({}, dense))
    tracemalloc.start()
    found = from_bytes(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.dense) == count
    assert peak < 400 * len(data)


@pytest.mark.parametrize("way", ["levels", "tree", "numbers"])
def test_an_arithmetic_code_declares_no_more_than_it_can_hold(way):
    """2^31 numbers in 4 bytes are refused before memory is taken."""
    name, fields = {
        "levels": ("uniform", {"width": 4}),
        "tree": ("kmeans", {"levels": 4}),
        "numbers": ("pruned", {"kept": 9}),
    }[way]
    small = METHODS[name](shape=(8, 8), **fields)
    huge = METHODS[name](shape=(1 << 16, 1 << 16), **(fields if way != "numbers" else {"kept": 1 << 31}))
    entry = next(iter(small.integers()))
    data = to_bytes(Contents({"w": Thin(name, small, {"w": Part((8, 8))}, golden_2.code_of(small, 1))}))
    head, arrays = crafted.taken_apart_2(data)
    own, number = head.thin["w"], [key for _, key, _ in head.items()].index(entry)
    items = {**own.items, entry: replace(own.items[entry], coding=(way, 2 if way == "tree" else 0), bytes=4)}
    if way == "numbers":  # as many values, of which one is stored
        items["values"] = replace(items["values"], coding=None, bytes=4 << 31)
    arrays = [*arrays[:number], b"\1\2\3\4", *arrays[number + 1 :]]
    own = replace(own, method=huge, parts={"w": Part(huge.shape)}, items=items)
    data = crafted.signed_2(replace(head, thin={"w": own}), arrays)
    tracemalloc.start()
    with pytest.raises(FormatError, match="which cannot be|arrays end"):
        from_bytes(data, max_bytes=1 << 50)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_damaged_arithmetic_codes_are_refused():
    rng = np.random.default_rng(0)
    kind = Integers(31, -15)
    values = np.clip(np.round(rng.laplace(size=(20, 50)) * 2), -15, 15).astype(np.int16)
    raw, coding = coded(values, kind)
    data = np.frombuffer(raw.data, np.uint8)
    refused = 0
    for at in range(len(data)):
        changed = data.copy()
        changed[at] ^= 1 + at % 255
        try:
            found = uncoded("w", Raw.of(changed), coding, kind, values.shape).numpy()
        except (FormatError, ValueError):
            refused += 1
        else:
            assert abs(found).max() <= 15
    assert refused > 0
    with pytest.raises((FormatError, ValueError)):
        uncoded("w", Raw.of(np.append(data, 7).astype(np.uint8)), coding, kind, values.shape)
    for other in (("tree", 5), ("numbers", 0)):
        with pytest.raises(FormatError, match="are not coded as"):
            uncoded("w", raw, other, kind, values.shape)
    with pytest.raises(ValueError, match="are not the arithmetic code"):
        arithmetic.decode_levels(data, 1000, 0, 1)


def test_streamed_files_refuse_the_same(tmp_path, monkeypatch):
    """Changed headers and arrays, signed: both readers agree."""
    outcomes = []
    for number in range(150):
        name = random.Random(number).choice([n for n in crafted.files() if n.startswith("version 2")])
        data, _ = fuzz.changed_2(random.Random(number), crafted.files()[name], [name])
        (tmp_path / "m.thin").write_bytes(data)
        said = []
        for limit in (1 << 30, 0):
            monkeypatch.setattr(reading, "IN_MEMORY_BYTES", limit)
            try:
                said.append(to_bytes(read(tmp_path / "m.thin", fuzz.MAX_BYTES)))
            except FormatError:
                said.append(None)
        assert said[0] == said[1]
        outcomes.append(said[0] is None)
    assert 20 < sum(outcomes) < 140


# The command


def command(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["deepthin", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert not ended.value.code


def test_convert_rewrites_either_way(tmp_path, capsys, monkeypatch):
    old, new, again = (tmp_path / f"{n}.thin" for n in ("old", "new", "again"))
    write(small_contents(), old, version=1)
    command(monkeypatch, "convert", old, new)
    said = capsys.readouterr().out
    assert f"{old.stat().st_size:,} bytes, version 1" in said
    assert f"{new.stat().st_size:,} bytes, version 2" in said
    assert new.read_bytes() == to_bytes(small_contents())
    command(monkeypatch, "convert", new, again, "--format", "1")
    assert again.read_bytes() == old.read_bytes()
    assert all((a == b).all() for a, b in zip(deepthin.load(old).values(), deepthin.load(new).values(), strict=True))


def test_an_unknown_version_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="format = 3: a .thin file is of version 1 or 2"):
        write(small_contents(), tmp_path / "m.thin", version=3)
    assert not list(tmp_path.iterdir())


def test_the_checksum_is_that_of_all_bytes_before_it():
    data = to_bytes(small_contents())
    assert int.from_bytes(data[-4:], "little") == zlib.crc32(data[:-4])


def test_zeros_of_a_scale_that_no_float_holds_are_refused(tmp_path):
    """Found by fuzzing: zero times infinity."""
    method = METHODS["deepthin"](shape=(4, 4), n=3, rank=1)
    code = {entry: Raw.zeros("F32", shape) for entry, shape in method.code_shapes().items()}
    thin = Thin("deepthin", method, {"a": Part((2, 4), 1e300), "b": Part((2, 4))}, code)
    for version in (1, 2):
        (tmp_path / "a.thin").write_bytes(to_bytes(Contents({"a": thin}), version))
        with pytest.raises(FormatError, match="decodes to NaN or infinity"):
            deepthin.load(tmp_path / "a.thin")
