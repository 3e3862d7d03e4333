"""What golden_v2.thin holds: every method, coding, form of floats and option of a part.

``python tests/golden_2.py`` writes it.
Values come from whole numbers alone, so that every machine makes the same.
"""

from pathlib import Path

import numpy as np

from deepthin import METHODS
from deepthin.coding import huffman
from deepthin.coding.bits import gaps_of, pack_gaps
from deepthin.method import as_matrix
from deepthin.methods.then import Then
from deepthin.storage.arrays import ITEM_BYTES, Raw
from deepthin.storage.codings import is_short
from deepthin.storage.contents import Contents, Part, Thin
from deepthin.storage.write import to_bytes

PATH = Path(__file__).with_name("golden_v2.thin")


def noise(count, seed):
    """Whole numbers from 0 to 65535 by a linear congruence."""
    state, found = seed * 7919 + 12345, []
    for _ in range(count):
        state = (1103515245 * state + 12345) % (1 << 31)
        found.append(state >> 15)
    return np.array(found)


def floats(shape, seed, kind="F32"):
    """Floats with long mantissas, or, of the kind ``short``, with short ones."""
    values = (noise(int(np.prod(shape)), seed) - 32768.0).reshape(shape)
    if kind == "BF16":
        return Raw("BF16", shape, ((values.astype("<f4").view("<u4") >> 16).astype("<u2")).tobytes())
    whole = {"F32": values.astype("<f4") / 7, "F64": values / 7, "F16": (values / 64).astype("<f2")}
    return Raw.of(whole[kind] if kind in whole else np.round(values / 4096).astype("<f4"))


def integers(shape, kind, seed, way):
    """Integers within their range: ``way`` says how they are spread."""
    count = int(np.prod(shape))
    if kind.rising:
        if way == "even":
            return np.arange(count) * (kind.count // count)
        gaps = 1 + noise(count, seed) % (3 if way == "near" else max(kind.count // count - 1, 1))
        return np.cumsum(gaps) - 1
    spread = noise(count, seed)
    if way == "even":
        values = spread % kind.count
    elif way == "peaked":
        values = (spread % 7 == 0) * (spread // 7 % kind.count) if kind.least >= 0 else -kind.least + spread % 5 // 4
    elif way == "columns":
        columns = np.arange(count) % shape[-1]
        values = -kind.least + (columns % 5 == 0) * (spread % 7 - 3)
    elif way == "stretches":
        values = -kind.least + (np.arange(count) // 100 % 4 == 0) * (spread % 7 - 3)
    else:
        values = np.where(spread % 64 == 0, spread // 64 % 4, 1)  # skewed
    return (values + kind.least).reshape(shape).astype(np.int64 if kind.count > 1 << 15 else np.int16)


def code_of(method, seed, kind="F32", way="even"):
    """A code of a method."""
    known = method.integers()
    return {
        entry: Raw.of(integers(shape, known[entry], seed + n, way)) if entry in known else floats(shape, seed + n, kind)
        for n, (entry, shape) in enumerate(method.code_shapes().items())
    }


def then(outer, name, **own):
    """A second method for all floats."""
    known = outer.integers()
    inner = {e: METHODS[name](shape=as_matrix(s), **own) for e, s in outer.code_shapes().items() if e not in known}
    return Then(outer, tuple(inner.items()))


def contents():
    """All of it."""
    shape, made = (24, 40), {}

    def add(name, method, parts=None, kind="F32", way="even", code=None, read=None):
        own = f"m{len(made):02}.weight"
        parts = parts or {own: Part(method.shape)}
        made[next(iter(parts))] = Thin(name, method, parts, code or code_of(method, len(made), kind, way), read=read)

    factor = METHODS["deepthin"](shape=shape, n=7, rank=1)
    add("deepthin", factor)
    add("deepthin", METHODS["deepthin"](shape=shape, n=7, rank=2, seed=-3), kind="short")
    add("shuffled", METHODS["shuffled"](shape=shape, n=300, rank=1, seed=0), kind="F64")
    add("shuffled", METHODS["shuffled"](shape=shape, n=9, rank=3, seed=1 << 40), kind="F16")
    add("rank", METHODS["rank"](shape=shape, n=40, rank=2), kind="BF16")
    add("rank", METHODS["rank"](shape=shape, n=41, rank=1))
    add("hashed", METHODS["hashed"](shape=shape, buckets=30, seed=-5))
    repeated = np.concatenate([np.arange(5), np.full(295, 9)]).astype("<f4")
    add("hashed", METHODS["hashed"](shape=shape, buckets=300), code={"values": Raw.of(repeated / 7)})
    add("hashed", METHODS["hashed"](shape=shape, buckets=300), code={"values": Raw.of(repeated)})
    for way in ("even", "near", "far"):
        add("pruned", METHODS["pruned"](shape=(60, 80), kept=700, balance=4), way=way)
    add("pruned", METHODS["pruned"](shape=(60, 80), kept=3, index="csr"), way="far")
    add("pruned", METHODS["pruned"](shape=shape, kept=900), code=dense_positions())
    for coding, coded in positions_in_other_ways().items():
        method = METHODS["pruned"](shape=(60, 80), kept=50)
        code = code_of(method, 1, way="far")
        stored = {"values": (code["values"], None), "positions": (Raw.of(coded(code["positions"].numpy())), coding)}
        add("pruned", method, code=code, read=(2, stored))
    add("kronecker", METHODS["kronecker"](shape=shape, left=(4, 5), terms=3))
    train = METHODS["tensor-train"](shape=shape, rows=(2, 3, 4), cols=(4, 2, 5), rank=3)
    add("tensor-train", train)
    add("uniform", METHODS["uniform"](shape=shape, width=3))
    add("uniform", METHODS["uniform"](shape=shape, width=4, per="row"), way="peaked")
    add("uniform", METHODS["uniform"](shape=(40, 60), width=4), way="columns")
    add("uniform", METHODS["uniform"](shape=(40, 61), width=4), way="stretches")
    add("uniform", METHODS["uniform"](shape=shape, width=8, affine=True), way="peaked")
    add("uniform", METHODS["uniform"](shape=shape, width=16, per="row", affine=True), way="skewed")
    add("kmeans", METHODS["kmeans"](shape=shape, levels=16), way="skewed")
    add("kmeans", METHODS["kmeans"](shape=shape, levels=5, start="density", seed=4))
    add("kmeans", METHODS["kmeans"](shape=(1, 1), levels=1, start="random"))
    add("ecsq", METHODS["ecsq"](shape=shape, levels=16, coded_bytes=600), way="peaked")
    add("binary", METHODS["binary"](shape=shape, planes=2))
    add("binary", METHODS["binary"](shape=shape, planes=1, rounds=0, per="matrix"), way="peaked")
    add("deepthin then uniform", then(factor, "uniform", width=8), kind="short", way="peaked")
    add("pruned then kmeans", then(METHODS["pruned"](shape=shape, kept=90), "kmeans", levels=4), way="near")
    uneven = Then(
        METHODS["kronecker"](shape=shape, left=(4, 5), terms=1),
        (("a", METHODS["kmeans"](shape=(1, 20), levels=3)), ("b", METHODS["kmeans"](shape=(1, 48), levels=4))),
    )
    add("kronecker then kmeans", uneven)
    add("rank then ecsq", then(METHODS["rank"](shape=shape, n=40, rank=2), "ecsq", levels=4, coded_bytes=200))
    add("tensor-train then binary", then(train, "binary", planes=3))
    add("coded", METHODS["coded"](shape=shape), kind="short", way="peaked")
    add("coded", METHODS["coded"](shape=shape, width=3))
    add("deepthin then coded", then(factor, "coded"), kind="short", way="peaked")
    add("deepthin then hashed", then(factor, "hashed", buckets=5))  # a pair without a number
    flat, rows = METHODS["deepthin"](shape=(15, 16), n=5, rank=1), METHODS["uniform"](shape=(12, 8), width=4)
    add("deepthin", flat, {"group.a": Part((6, 20), 2.0), "group.b": Part((8, 5, 3), 0.1, transposed=True)})
    add("uniform", rows, {"rows.x": Part((4, 8)), "rows.w": Part((8, 8), zero_row=2)})
    add("deepthin", METHODS["deepthin"](shape=shape, n=7, rank=1), {"conv.weight": Part((24, 2, 4, 5), 0.5, False, 3)})
    add("deepthin", METHODS["deepthin"](shape=(8, 3), n=7, rank=1), {"long": Part((8, *[1] * 8, 3))})
    add(
        "deepthin", METHODS["deepthin"](shape=(40, 24), n=7, rank=1), {"turned.weight": Part((24, 40), transposed=True)}
    )
    add("deepthin", METHODS["deepthin"](shape=(3, 3), n=2, rank=1), {"vector.bias": Part((9,))})
    mixed = {"xf": floats((138, 1), 1), "wf": floats((1, 7), 2, "short")}
    add("deepthin", factor, {"mixed": Part(shape)}, code=mixed)
    dense = {
        f"dense.{kind}": Raw(kind, (2, 3), bytes(n % 2 for n in range(6 * size))) for kind, size in ITEM_BYTES.items()
    }
    dense |= {"dense.short": floats((5,), 3, "short"), "dense.large": floats((300,), 4), "dense.0": floats((), 5)}
    dense |= {
        "dense.4": floats((1, 2, 1, 2), 6),
        "": floats((0, 3), 7),
        "layer-with-a-long-name.1.bias": floats((2,), 8),
    }
    dense |= {"layer-with-a-long-name.2.running_mean": floats((2,), 9), "\u00fc.weightbias": floats((1,), 10)}
    return Contents(made, dense, {"tied.weight": "m00.weight", "tied.bias": "dense.0"})


def dense_positions():
    """Nearly all places, which packed positions of ten bits would take more room for."""
    places = np.flatnonzero(noise(960, 3) % 16 > 0)[:900]
    places = np.concatenate([places, np.setdiff1d(np.arange(960), places)[: 900 - len(places)]])
    return {"values": floats((900,), 2), "positions": Raw.of(np.sort(places))}


def positions_in_other_ways():
    """Codings that a writer may choose and ours seldom does, each with what codes positions."""
    return {
        ("gaps", 5): lambda positions: pack_gaps(positions, 5),
        ("huffman", 6): lambda positions: huffman.encode(gaps_of(positions, 6), 6),
    }


def codings(made):
    """How entries are coded: (coding, whether it has a stride or width)."""
    found = set()
    for thin in made.thin.values():
        for entry, (_, coding) in thin.stored_as(2).items():
            if coding:
                way, number = coding
                columns = thin.code[entry].shape[-1]
                found.add(
                    f"{way} {'0' if not number else 'rows' if number == columns else '1'}" if way == "levels" else way
                )
    return found | {"dense short" for raw in made.dense.values() if is_short(raw)}


if __name__ == "__main__":
    PATH.write_bytes(to_bytes(contents()))
    print(len(PATH.read_bytes()), sorted(codings(contents())))
