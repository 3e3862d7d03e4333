"""Promise 3: however small a file and whatever it declares, reading stays within what was allowed, for every method."""

import itertools
import json
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

import crafted
import deepthin
from deepthin import METHODS, FormatError, NonFiniteError
from deepthin.coding import huffman
from deepthin.method import Bounded
from deepthin.methods import fields
from deepthin.methods.then import Then
from deepthin.storage import read
from deepthin.storage.arrays import Raw
from deepthin.storage.budget import BYTES_A_NUMBER, WALK_BYTES, Budget, decode_bytes, largest_weight
from deepthin.storage.contents import Contents, Part, Thin
from deepthin.storage.read import from_bytes
from deepthin.storage.write import to_bytes

MAX_BYTES = 1_000_000
EXTRA_BYTES = 160 << 20  # of address space: allocators ask for more than they need
MANY = 1 << 24  # symbols that take no bits
SYMBOLS = ("uniform", "coded", "kmeans", "ecsq", "binary")
ONE_SYMBOL = huffman.encode(np.zeros(3, np.int64), 2)


def huge(name, side):
    """What the method's writer makes of a huge matrix, without a number of it: fields, and floats that are few."""
    floats = np.ones
    if name in ("deepthin", "shuffled", "rank"):
        method = METHODS[name](shape=(side, side), n=side, rank=1, **({"seed": 3} if name == "shuffled" else {}))
        return fields(method), {"xf": floats((side, 1), "f4"), "wf": floats((1, side), "f4")}, {}
    if name == "hashed":
        return {"shape": [side, side], "buckets": 9}, {"values": floats(9, "f4")}, {}
    if name == "pruned":
        place = {"positions": np.full(1, 0, "u1")}
        return {"shape": [side, side], "kept": 1}, {"values": floats(1, "f4"), **place}, {"positions": ["gaps", 8]}
    if name == "kronecker":
        root = int(side**0.5)
        a = {entry: floats((1, root, root), "f4") for entry in "ab"}
        return {"shape": [root**2, root**2], "left": [root, root], "terms": 1}, a, {}
    if name == "tensor-train":
        root = int(side**0.5)
        cores = {f"core{k}": floats((1, root, root, 1), "f4") for k in range(2)}
        return {"shape": [root**2, root**2], "rows": [root] * 2, "cols": [root] * 2, "rank": 1}, cores, {}
    symbols, coding = {"symbols": ONE_SYMBOL}, {"symbols": ["huffman", 2]}
    shape = {"shape": [side, side]}
    if name in ("uniform", "coded"):
        return {**shape, "width": 2}, {"step": floats((1, 1), "f4"), **symbols}, coding
    if name == "binary":
        return {**shape, "planes": 2, "per": "matrix"}, {"scales": floats((1, 2), "f4"), **symbols}, coding
    more = {"coded_bytes": side * side} if name == "ecsq" else {}
    return {**shape, "levels": 4, **more}, {"centres": floats(4, "f4"), **symbols}, coding


def bombs():
    """Files of some kilobytes by name, each with the tensor that its error must name."""
    made = {}
    for name in METHODS:
        side = 1 << 12 if name in SYMBOLS else 1 << 16
        own, arrays, codings = huge(name, side)
        header = {"method": name, "fields": own, **({"codings": codings} if codings else {})}
        made[f"{name} of a huge matrix"] = crafted.sealed(header, **arrays)
    side = 3000
    for name in ("deepthin", "shuffled", "rank"):
        outer = METHODS[name](shape=(side, side), n=side, rank=1, **({"seed": 3} if name == "shuffled" else {}))
        inner = {entry: {"levels": 2} for entry in ("xf", "wf")}
        header = {
            "method": f"{name} then kmeans",
            "fields": {"outer": fields(outer), "inner": inner},
            "codings": {f"{entry}_symbols": ["huffman", 1] for entry in ("xf", "wf")},
        }
        floats = {f"{entry}_centres": np.ones(2, "f4") for entry in ("xf", "wf")}
        symbols = {f"{entry}_symbols": huffman.encode(np.zeros(3, np.int64), 1) for entry in ("xf", "wf")}
        made[f"{name} then kmeans, no bits"] = crafted.sealed(header, **floats, **symbols)
    many = {
        f"w{k}": {
            "method": "kmeans",
            "fields": {"shape": [1 << 12, 1 << 12], "levels": 4},
            "codings": {"symbols": ["huffman", 2]},
        }
        for k in range(200)
    }
    tensors = {f"{own}/centres": ("F32", [4], bytes(16)) for own in many}
    tensors |= {f"{own}/symbols": ("U8", [len(ONE_SYMBOL)], ONE_SYMBOL.tobytes()) for own in many}
    made["200 times as many symbols as may take no bits"] = crafted.signed(
        {"version": 1, "thin": many, "aliases": {}, "crc32": {}}, tensors
    )
    many = {
        f"w{k}": {
            "method": "hashed",
            "fields": {"shape": [256, 256], "buckets": 65536},
            "codings": {"values": ["repeats", 1]},
        }
        for k in range(1000)
    }
    tensors = {f"{own}/values": ("F32", [1], bytes(4)) for own in many}
    made["1,000 times 65,536 repeats"] = crafted.signed(
        {"version": 1, "thin": many, "aliases": {}, "crc32": {}}, tensors
    )
    return made


def refused():
    """Files whose fields no ``fit`` makes."""
    ones = np.ones
    kronecker = {"a": ones((1, 60000, 1), "f4"), "b": ones((1, 1, 60000), "f4")}
    yield "left over the shape", "kronecker", {"shape": [1, 1], "left": [60000, 1], "terms": 1}, kronecker
    few = {"a": ones((7, 2, 2), "f4"), "b": ones((7, 2, 2), "f4")}
    yield "more terms than there can be", "kronecker", {"shape": [4, 4], "left": [2, 2], "terms": 7}, few
    cores = {"core0": ones((1, 60000, 1, 1), "f4"), "core1": ones((1, 1, 60000, 1), "f4")}
    train = {"shape": [1, 1], "rows": [60000, 1], "cols": [1, 60000], "rank": 1}
    yield "cores over the shape", "tensor-train", train, cores
    train = {"shape": [4, 4], "rows": [2, 2], "cols": [2, 2], "rank": 5}
    yield "rank over what is useful", "tensor-train", train, {"core0": ones((1, 2, 2, 4)), "core1": ones((4, 2, 2, 1))}
    yield "more values than weights", "hashed", {"shape": [2, 2], "buckets": 5}, {"values": ones(5, "f4")}
    yield "one centre", "kmeans", {"shape": [2, 2], "levels": 1}, {"centres": ones(1, "f4")}
    yield "one level", "ecsq", {"shape": [2, 2], "levels": 1, "coded_bytes": 9}, {"centres": ones(1, "f4")}


def outcomes(reader, files, folder, most=MAX_BYTES):
    """What a process of limited memory says of each file; a good one, without limits, comes first."""
    good = folder / "good.thin"
    good.write_bytes(crafted.files()["version 1, dense"])
    paths = {}
    for number, (name, data) in enumerate(files.items()):
        paths[name] = folder / f"{number}.thin"
        paths[name].write_bytes(data)
    words = [
        sys.executable,
        str(Path(__file__).with_name("limited.py")),
        reader,
        str(EXTRA_BYTES),
        str(most),
        str(good),
    ]
    done = subprocess.run([*words, *map(str, paths.values())], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: found[str(path)] for name, path in paths.items()}


@pytest.mark.parametrize("reader", ["load", "torch", "meta"])
def test_bombs_are_refused_before_they_go_off(reader, tmp_path):
    made = bombs()
    assert max(map(len, made.values())) < 600_000
    for name, (kind, said) in outcomes(reader, made, tmp_path).items():
        assert kind == "FormatError", (name, kind, said)
        assert "above the limit of" in said, (name, said)


@pytest.mark.parametrize("reader", ["inspect", "command"])
def test_what_is_not_decoded_is_reported_or_refused(reader, tmp_path):
    error = {"inspect": "FormatError", "command": "DeepThinError"}[reader]
    found = outcomes(reader, bombs(), tmp_path)
    assert {kind for kind, _ in found.values()} == {error, "read"}, found
    for name, (kind, said) in found.items():
        decoded = "symbols" in name or "repeats" in name or name.split()[0] in SYMBOLS
        assert kind == (error if decoded else "read"), (name, said)


@pytest.mark.parametrize("reader", ["load", "inspect", "torch"])
def test_with_a_large_cap_no_error_is_without_a_name(reader, tmp_path):
    """Memory then does end, and the error says at which tensor."""
    for name, (kind, said) in outcomes(reader, bombs(), tmp_path, most=1 << 60).items():
        assert kind in ("FormatError", "ConfigError", "read"), (name, kind, said)


@pytest.mark.parametrize(
    ("what", "name", "own", "arrays"), list(refused()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_fields_that_no_fit_makes_are_refused(what, name, own, arrays, tmp_path):
    codings = {"codings": {"symbols": ["packed", 0]}} if "centres" in arrays else {}
    data = crafted.sealed({"method": name, "fields": own, **codings}, **arrays)
    with pytest.raises(FormatError, match=f"w has fields that {name} cannot have"):
        from_bytes(data)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_decoding_takes(name):
    """Measured: for matrices in which anything that was forgotten shows, of several shapes, in 4 and 8 bytes."""
    for shape in ((300, 500), (1, 100_000), (1000, 101)):
        least = 33 if name == "rank" else 2  # a row by itself is not factorised
        for kind, share in itertools.product(("f4", "f8"), (0.02, 0.6)):
            bits = max(int(32 * share * shape[0] * shape[1]), least * shape[0] * shape[1] + 9000)
            check_decode_bytes(METHODS[name].fit(shape, bits), kind)


def test_pairs_of_methods_say_what_decoding_takes():
    for _, method in crafted.plans((200, 300)):
        if isinstance(method, Then):
            check_decode_bytes(method, "f4")


def check_decode_bytes(method, kind):
    rng, integers = np.random.default_rng(0), method.integers()
    code = {}
    for entry, shape in method.code_shapes().items():
        if entry not in integers:
            code[entry] = rng.normal(size=shape).astype(kind)
        elif integers[entry].rising:
            code[entry] = np.sort(rng.choice(integers[entry].count, shape, replace=False))
        else:
            code[entry] = rng.integers(0, integers[entry].count, shape).astype(np.int16) + np.int16(
                integers[entry].least
            )
    most = {entry: float(abs(a).max()) for entry, a in code.items() if entry not in integers}
    tracemalloc.start()
    weight = method.decode(code | method.derived(), np)
    weight = np.ascontiguousarray(weight.reshape(-1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(method, Bounded)
    assert peak <= decode_bytes(method, np.dtype(kind).itemsize) + 20_000, (method, kind, peak)
    assert abs(weight).max() <= largest_weight(method, most) * (1 + 1e-4), method


def measured(call):
    """Its result, and the most bytes that it had allocated at once."""
    tracemalloc.start()
    try:
        result = call()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("name", "method"), list(crafted.plans((250, 400))), ids=lambda value: str(value)[:70])
def test_loading_takes_no_more_than_the_smallest_cap_that_it_has(name, method, tmp_path, monkeypatch):
    """One byte less is refused; with that cap, memory stays below it and a few times the file."""
    budgets = []

    class Recorded(Budget):
        def __init__(self, limit):
            super().__init__(limit)
            budgets.append(self)

    monkeypatch.setattr(read, "Budget", Recorded)
    code = method.init(np.random.default_rng(0), 0.1)
    turned = name.startswith("k")
    part = Part(method.shape[::-1] if turned else method.shape, 0.5, turned)
    path = tmp_path / "m.thin"
    path.write_bytes(to_bytes(Contents({"w": Thin(name, method, {"w": part}, crafted.raws(code))})))
    deepthin.load(path)
    cap = budgets[-1].kept + budgets[-1].passing
    with pytest.raises(FormatError, match="above the limit"):
        deepthin.load(path, max_bytes=cap - 1)
    arrays, peak = measured(lambda: deepthin.load(path, max_bytes=cap))
    assert arrays["w"].nbytes <= cap
    tables = (4 << 20) if method.integers() else 0
    assert peak <= cap + 4 * path.stat().st_size + 100_000 + tables, (cap, peak)
    assert cap <= BYTES_A_NUMBER * method.shape[0] * method.shape[1]  # what loading into a model may take


def test_without_native_code_huffman_takes_what_was_counted():
    symbols = np.random.default_rng(0).geometric(0.4, 100_000).clip(1, 16) - 1
    data = huffman.encode(symbols, 4)
    found, peak = measured(lambda: huffman.decode(data, 4, len(symbols)))
    assert (found == symbols).all()
    assert peak <= WALK_BYTES * len(data) + (4 << 20)


# What is not finite


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["f8", "f4", "f2", "bf"])
@pytest.mark.parametrize("name", METHODS)
def test_codes_must_be_finite(name, kind, value, tmp_path):
    method = METHODS[name].fit((12, 20), 16 * 240)
    code = crafted.stored(method, kind)
    entry = next(e for e in code if e not in method.integers())
    array = code[entry].numpy().astype("f4" if kind == "bf" else kind).copy()
    array.reshape(-1)[-1] = value
    code[entry] = crafted.in_kind(array, kind)
    thin = Thin(name, method, {"w": Part((12, 20))}, crafted.raws(code))
    path = tmp_path / "m.thin"
    path.write_bytes(to_bytes(Contents({"w": thin})))
    for reader in (deepthin.load, deepthin.inspect):
        with pytest.raises(FormatError, match=f"w/{entry} holds NaN or infinity: a code must be finite"):
            reader(path)


@pytest.mark.parametrize("name", METHODS)
def test_finite_codes_that_decode_to_infinity_are_refused(name, tmp_path):
    """By a scale of 1e308, or by floats that are too large for their products."""
    method = METHODS[name].fit((12, 20), 16 * 240)
    code = crafted.raws(crafted.stored(method, "f4"))
    path = tmp_path / "m.thin"
    path.write_bytes(to_bytes(Contents({"w": Thin(name, method, {"w": Part((12, 20), 1e308)}, code)})))
    with pytest.raises(FormatError, match="the code of w decodes to NaN or infinity"):
        deepthin.load(path)
    large = {e: raw if e in method.integers() else Raw.of(np.full(raw.shape, 3e38, "f4")) for e, raw in code.items()}
    path.write_bytes(to_bytes(Contents({"w": Thin(name, method, {"w": Part((12, 20))}, large)})))
    try:
        weight = deepthin.load(path)["w"]
    except FormatError as error:
        assert "the code of w decodes to NaN or infinity" in str(error)
    else:
        assert np.isfinite(weight).all()
        assert abs(weight).max() >= 2e38


def test_dense_tensors_must_be_finite_unless_allowed(tmp_path):
    path = tmp_path / "m.thin"
    for kind in ("f8", "f4", "f2", "bf", "c8"):
        mask = np.zeros(5, "f4")
        mask[3] = -np.inf
        raw = Raw.of(mask.astype("c8")) if kind == "c8" else crafted.in_kind(mask, kind)
        path.write_bytes(to_bytes(Contents({}, {"mask": raw})))
        with pytest.raises(FormatError, match="mask holds NaN or infinity.*pass finite=False"):
            deepthin.load(path)
        assert deepthin.load(path, finite=False)["mask"][3] == -np.inf
        assert deepthin.inspect(path).total_bytes == len(path.read_bytes())


def test_symbols_out_of_range_are_refused_by_every_coding(tmp_path):
    """Five centres, symbols of three bits: 5 to 7 are no centres."""
    from deepthin.coding.bits import pack

    symbols = np.arange(20) % 5
    symbols[7] = 6
    for coding, data in ((["packed", 3], pack(symbols, 3)), (["huffman", 3], huffman.encode(symbols, 3))):
        header = {"method": "kmeans", "fields": {"shape": [4, 5], "levels": 5}, "codings": {"symbols": coding}}
        with pytest.raises(FormatError, match="w/symbols holds 6, but there are 5 values"):
            from_bytes(crafted.sealed(header, centres=np.ones(5, "f4"), symbols=data))


def test_a_key_that_stands_twice_is_refused():
    data = crafted.signed(*crafted.taken_apart(crafted.files()["version 1, dense"]))
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].replace(b'\\"version\\": 1', b'\\"version\\": 1, \\"version\\": 1')
    assert len(text) > length
    body = len(text).to_bytes(8, "little") + text + data[8 + length : -4]
    with pytest.raises(FormatError, match="'version' stands twice in its header"):
        from_bytes(body + zlib.crc32(body).to_bytes(4, "little"))


@pytest.mark.parametrize("name", ["kmeans", "ecsq", "uniform", "binary", "pruned"])
def test_integers_out_of_range_do_not_come_by_a_state_dict(name, tmp_path):
    """One way to multiply would read another weight from them, another would raise IndexError."""
    import torch
    from torch import nn

    import deepthin.torch as dt

    options = {"ratio": 0.2} if name == "pruned" else {"levels": 5} if name == "ecsq" else {"bits": 3}
    options = {**options, "ratio": 0.9} if name == "ecsq" else options
    model = nn.Sequential(nn.Linear(20, 12))
    dt.compress(model, {"rules": {"*": {"method": name, **options}}}, init="scratch")
    dt.save(model, tmp_path / "m.thin")
    frozen = dt.load(nn.Sequential(nn.Linear(20, 12)), tmp_path / "m.thin", frozen=True)
    entry = "positions" if name == "pruned" else "symbols"
    key, state = f"0.thin.weight.{entry}", frozen.state_dict()
    frozen.load_state_dict(state)
    wrong = {**state, key: state[key].clone()}
    wrong[key].view(-1)[3] = 240 if name == "pruned" else 100
    with pytest.raises(RuntimeError, match=f"{entry} holds integers from"):
        frozen.load_state_dict(wrong)
    assert torch.equal(frozen.state_dict()[key], state[key])
    if name == "pruned":
        wrong[key] = state[key].flip(0)
        with pytest.raises(RuntimeError, match="positions must rise"):
            frozen.load_state_dict(wrong)


def test_what_load_refuses_is_not_saved(tmp_path):
    import torch
    from torch import nn

    import deepthin.torch as dt

    model, path = nn.Sequential(nn.Linear(20, 12)), tmp_path / "m.thin"
    with torch.no_grad():
        model[0].bias[3] = float("inf")
    with pytest.raises(NonFiniteError, match=r"0\.bias holds NaN or infinity: nothing was written"):
        dt.save(model, path)
    assert not list(tmp_path.iterdir())
    dt.save(model, path, finite=False)
    with pytest.raises(FormatError, match=r"0\.bias holds NaN or infinity"):
        dt.load(nn.Sequential(nn.Linear(20, 12)), path)
    assert torch.equal(dt.load(nn.Sequential(nn.Linear(20, 12)), path, finite=False)[0].bias, model[0].bias)
