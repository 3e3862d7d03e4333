"""Files as an attacker makes them: taken apart, changed, and signed again, with every checksum right."""

import functools
import itertools
import json
import zlib

import numpy as np

from deepthin import METHODS
from deepthin.method import as_matrix
from deepthin.methods.then import Then
from deepthin.storage.arrays import Raw
from deepthin.storage.contents import Contents, Part, Thin
from deepthin.storage.head import MAGIC, begun, places_of, read_head
from deepthin.storage.varints import Reader, Writer
from deepthin.storage.write import CHECKSUM, to_bytes

ROWS, COLS = 12, 20  # of every matrix: small, so that thousands of files can be tried
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "BOOL": 1, "C64": 8}


def taken_apart(data):
    """The deepthin header of a file of version 1, and its tensors: name -> (type, shape, bytes)."""
    length = int.from_bytes(data[:8], "little")
    index, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    header = json.loads(index.pop("__metadata__")["deepthin"])
    index.pop(CHECKSUM)
    return header, {
        name: (own["dtype"], own["shape"], body[slice(*own["data_offsets"])]) for name, own in index.items()
    }


def signed(header, tensors):
    """A file of format version 1 with this header and these tensors; all its checksums are right."""
    if isinstance(header, dict) and "crc32" in header:
        header = {**header, "crc32": {name: f"{zlib.crc32(data):08x}" for name, (_, _, data) in tensors.items()}}
    index, end = {"__metadata__": {"deepthin": json.dumps(header)}}, 0
    order = sorted(tensors, key=lambda name: (-SIZES.get(tensors[name][0], 1), name))
    for name in order:
        kind, shape, data = tensors[name]
        index[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    index[CHECKSUM] = {"dtype": "U8", "shape": [4], "data_offsets": [end, end + 4]}
    text = json.dumps(index).encode()
    body = len(text).to_bytes(8, "little") + text + b"".join(tensors[name][2] for name in order)
    return body + zlib.crc32(body).to_bytes(4, "little")


def taken_apart_2(data):
    """The header of a file of version 2 as ``Head``, and its arrays, bytes in order."""
    source = Reader(data, len(MAGIC))
    length = source.number()
    head = read_head(data[source.at : source.at + length])
    places, _ = places_of(head, source.at + length)
    return head, [data[first : first + item.bytes] for _, _, item, first in places]


def signed_2(head, arrays, header=None):
    """A file of version 2 with this header, or these bytes in its place, and these arrays; its checksum is right."""
    start = begun(head)
    aligned = [item.aligned for _, _, item in head.items()]
    if header is not None:
        start = with_header(header)
    return closed(joined(start, arrays, aligned))


def with_header(header):
    """What a file begins with that has this header."""
    length = Writer(bytearray(MAGIC))
    length.number(len(header))
    return bytes(length.data) + header


def joined(start, arrays, aligned=()):
    """A file without its checksum: arrays one after the other, where they must be aligned after zeros."""
    for array, is_aligned in itertools.zip_longest(arrays, aligned, fillvalue=False):
        start += bytes(-len(start) % 8 if is_aligned else 0) + (array or b"")
    return start


def closed(body):
    """A file whose checksum is right."""
    return body + zlib.crc32(body).to_bytes(4, "little")


def sealed(header, **tensors):
    """A file of one compressed matrix ``w``, described by ``header``, whose tensors are arrays."""
    whole = {"version": 1, "thin": {"w": header}, "aliases": {}, "crc32": {}}
    return signed(whole, {f"w/{name}": (Raw.of(a).dtype, list(a.shape), a.tobytes()) for name, a in tensors.items()})


def plans(shape=(ROWS, COLS)):
    """Every method, and every pair of methods that a rule may name: (name, method)."""
    bits = 16 * shape[0] * shape[1]
    inner = {
        "uniform": lambda own: METHODS["uniform"](shape=own, width=4),
        "kmeans": lambda own: METHODS["kmeans"].fit(own, 1 << 30, bits=3),
        "ecsq": lambda own: METHODS["ecsq"].fit(own, 1 << 30, bits=2),
        "binary": lambda own: METHODS["binary"](shape=own, planes=2),
    }
    for name, named in METHODS.items():
        outer = named.fit(shape, bits)
        yield name, outer
        if outer.trains == "codes" and not hasattr(outer, "table_levels"):
            floats = {e: s for e, s in outer.code_shapes().items() if e not in outer.integers()}
            for second, make in inner.items():
                yield f"{name} then {second}", Then(outer, tuple((e, make(as_matrix(s))) for e, s in floats.items()))
    yield "uniform", METHODS["uniform"](shape=shape, width=6, per="row", affine=True)
    yield "binary", METHODS["binary"](shape=shape, planes=2, per="matrix")


def stored(method, kind, seed=0):
    """A random code of a method, its floats in a type of the file."""
    arrays = method.encode(np.random.default_rng(seed).normal(0, 0.1, method.shape).astype("f4"), np)
    return {entry: a if entry in method.integers() else in_kind(a, kind) for entry, a in arrays.items()}


def in_kind(array, kind):
    """A stored tensor of floats: ``f8``, ``f4``, ``f2`` or ``bf``, for bfloat16."""
    if kind != "bf":
        return Raw.of(array.astype(kind))
    upper = np.ascontiguousarray(array, dtype="<f4").view("<u4") >> np.uint32(16)  # the rest is cut off
    return Raw("BF16", array.shape, upper.astype("<u2").tobytes())


def raws(code):
    return {entry: a if isinstance(a, Raw) else Raw.of(a) for entry, a in code.items()}


@functools.cache
def files():
    """Small files by name, each in both versions."""
    return {f"version {v}, {name}": to_bytes(own, v) for name, own in models().items() for v in (1, 2)}


@functools.cache
def models():
    """What small files hold, by name: every method, group, type of floats, layout and coding.

    Each has the tensors of ``model`` in test_fuzz: weights ``0.weight`` (and ``1.weight`` in a group), and biases.
    """
    made = {}
    kinds = itertools.cycle(("f4", "f4", "f2", "bf", "f8"))
    biases = {"0.bias": Raw.of(np.ones(ROWS, "f4")), "1.bias": Raw.of(np.ones(COLS, "f4"))}
    second = {"1.weight": Raw.of(np.full((COLS, ROWS), 0.1, "f4"))}
    for number, (name, method) in enumerate(plans()):
        kind = next(kinds)
        part = Part((ROWS, COLS), scale=0.5 if number % 3 == 1 else 1.0)
        thin = Thin(name, method, {"0.weight": part}, raws(stored(method, kind)))
        made[f"{name}, {method}, {kind}"] = Contents({"0.weight": thin}, biases | second)
    flat = (22, 22)
    for name, method in plans(flat):
        parts = {"0.weight": Part((ROWS, COLS), 2.0), "1.weight": Part((COLS, ROWS))}
        thin = Thin(name, method, parts, raws(stored(method, "f4")))
        made[f"group, {name}, {method}"] = Contents({"0.weight": thin}, biases)
    constant = {"centres": Raw.of(np.linspace(-1, 1, 4, dtype="f4")), "symbols": Raw.of(np.zeros((ROWS, COLS), "i2"))}
    method = METHODS["kmeans"](shape=(ROWS, COLS), levels=4)
    thin = Thin("kmeans", method, {"0.weight": Part((ROWS, COLS))}, constant)
    made["one symbol, no bits"] = Contents({"0.weight": thin}, biases | second)
    hashed = METHODS["hashed"](shape=(ROWS, COLS), buckets=200)
    thin = Thin("hashed", hashed, {"0.weight": Part((ROWS, COLS))}, {"values": Raw.of(np.ones(200, "f4"))})
    made["repeats"] = Contents({"0.weight": thin}, biases | second)
    made["shared"] = Contents(
        {"0.weight": thin}, {"0.bias": biases["0.bias"], **second, "1.bias": biases["1.bias"]}, {"tied": "0.weight"}
    )
    dense = {"0.weight": Raw.of(np.ones((ROWS, COLS), "f4"))}
    made["dense"] = Contents({}, {**biases, **second, **dense})
    return made


def resealed(data, change):
    """A file whose index, the JSON of safetensors, is changed in place by ``change``; the checksum of all fits."""
    length = int.from_bytes(data[:8], "little")
    index = json.loads(data[8 : 8 + length])
    change(index)
    text = json.dumps(index).encode()
    body = len(text).to_bytes(8, "little") + text + data[8 + length : -4]
    return body + zlib.crc32(body).to_bytes(4, "little")
