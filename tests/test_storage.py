"""Promises of the file format: 1 (every change is noticed), 3, 4, 5, 6, 7 and 15; docs/format.md is normative."""

import ast
import errno
import gc
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load as safetensors_load

import deepthin
from deepthin import METHODS, BudgetError, ConfigError, FormatError
from deepthin.coding import huffman
from deepthin.coding.bits import packed_bytes
from deepthin.method import Integers
from deepthin.storage import atomic
from deepthin.storage.arrays import Raw, packed, repeated, unpacked, without_repeats
from deepthin.storage.contents import Contents, Part, Thin
from deepthin.storage.read import from_bytes
from deepthin.storage.write import to_bytes, write


def small_contents(scale=1.0):
    rng = np.random.default_rng(0)
    thin = {}
    for name, method in (("a.weight", "deepthin"), ("b.weight", "shuffled"), ("c.weight", "rank")):
        plan = METHODS[method].fit((6, 8), 32 * 20)
        code = {k: Raw.of((scale * v).astype("f4")) for k, v in plan.init(rng, 0.1).items()}
        thin[name] = Thin(method, plan, {name: Part((6, 8))}, code)
    dense = {"a.bias": Raw.of(np.arange(6, dtype="f4")), "steps": Raw.of(np.array(7))}
    return Contents(thin, dense, {"d.weight": "a.weight"})


@pytest.fixture(params=[1, 2])
def data(request):
    return to_bytes(small_contents(), request.param)


@pytest.fixture
def first():
    """A file of version 1."""
    return to_bytes(small_contents(), 1)


def resign(data, header):
    """The file that an attacker writes: a changed header, and checksums that fit it."""
    length = int.from_bytes(data[:8], "little")
    index = json.loads(data[8 : 8 + length])
    index["__metadata__"]["deepthin"] = json.dumps(header)
    text = json.dumps(index).encode()
    body = len(text).to_bytes(8, "little") + text + data[8 + length : -4]
    return body + zlib.crc32(body).to_bytes(4, "little")


def parts_of(header):
    return header["thin"]["a.weight"].setdefault("parts", [["a.weight", {"shape": [6, 8]}]])


def header_of(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["deepthin"])


def test_every_changed_byte_is_noticed(data):
    """Promise 1: every byte, each bit flipped, and set to 00 and FF."""
    for at, byte in enumerate(data):
        for other in {byte ^ (1 << bit) for bit in range(8)} | {0, 255} - {byte}:
            if other != byte:
                with pytest.raises(FormatError):
                    from_bytes(data[:at] + bytes([other]) + data[at + 1 :])


def test_every_truncation_and_extension_is_noticed(data):
    for length in range(len(data)):
        with pytest.raises(FormatError):
            from_bytes(data[:length])
    with pytest.raises(FormatError):
        from_bytes(data + b"\0")


def test_the_damaged_tensor_is_named(first):
    data = first
    at = data.index(np.arange(6, dtype="f4").tobytes())
    with pytest.raises(FormatError, match=r"m\.thin is damaged: the checksum of a\.bias does not match"):
        from_bytes(data[:at] + b"\x01" + data[at + 1 :], "m.thin")


def test_round_trip_is_byte_identical(data):
    """Promise 15."""
    assert to_bytes(from_bytes(data)) == data


def test_bytes_do_not_depend_on_dictionary_order(data):
    c = small_contents()
    turned = Contents(*(dict(reversed(list(part.items()))) for part in (c.thin, c.dense, c.aliases)))
    assert to_bytes(turned, from_bytes(data).version) == data


def counting(shape):
    return Raw.of(np.arange(np.prod(shape), dtype="f4").reshape(shape))


def test_golden_file():
    """Promise 15: these bytes were written by version 0.1.0 and must load, and be written, for ever."""
    golden = Path(__file__).with_name("golden_v1.thin").read_bytes()
    counted = {
        name: Thin(t.name, t.method, t.parts, {entry: counting(raw.shape) for entry, raw in t.code.items()})
        for name, t in small_contents().thin.items()
    }
    exact = Contents(counted, small_contents().dense, small_contents().aliases)
    assert to_bytes(exact, 1) == golden
    assert to_bytes(from_bytes(golden)) == golden
    assert from_bytes(golden).thin["b.weight"].decode()["b.weight"][:2, :3].tolist() == GOLDEN_CORNER


GOLDEN_CORNER = [[0.0, 0.0, 0.0], [0.0, 10.0, 12.0]]


def stored(kind, values, shape=None):
    """How integers are written, and back."""
    values = np.asarray(values).reshape(shape or -1)
    raw, coding = packed(values, kind)
    back = unpacked("w", raw, list(coding), kind, values.shape).numpy()
    assert (back == values).all()
    return coding[0], len(raw.data)


def test_integers_take_the_shortest_way():
    """Each way is the best one somewhere: even symbols, peaked ones, positions far apart, near, and crowded."""
    rng = np.random.default_rng(0)
    even = rng.integers(0, 32, 1000)
    assert stored(Integers(32), even) == ("packed", 625)
    peaked = np.clip(np.round(rng.laplace(size=1000) * 2 + 16), 0, 31).astype(int)
    assert stored(Integers(32), peaked)[0] == "huffman"
    counts = np.bincount(peaked)
    entropy = float((counts[counts > 0] * np.log2(1000 / counts[counts > 0])).sum())
    assert entropy / 8 < stored(Integers(32), peaked)[1] < entropy / 8 * 1.03 + 16
    assert stored(Integers(200, -100), peaked - 16)[0] == "huffman"
    few = np.arange(9) * 1_000_003
    assert stored(Integers(10_000_000, rising=True), few) == ("gaps", 23)
    some = np.sort(rng.choice(100_000, 8000, replace=False))
    assert stored(Integers(100_000, rising=True), some)[0] == "huffman"
    assert stored(Integers(9, rising=True), [8]) == ("gaps", 1)
    assert stored(Integers(70_000), rng.integers(0, 70_000, 50)) == ("packed", 17 * 50 // 8 + 1)
    assert stored(Integers(1), np.zeros(12, int)) == ("packed", 0)
    assert stored(Integers(16), np.full((30, 40), 7), (30, 40)) == ("huffman", 1)
    assert stored(Integers(5000, rising=True), np.arange(5000)) == ("huffman", 1)


def test_a_longer_name_must_save_more():
    """["huffman",3] has a byte more than ["packed",3]; and what is promised is kept all the same."""
    values = np.array([0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2])  # 5 bytes packed
    packed, coded = packed_bytes(12, 3), huffman.coded_bytes(np.bincount(values), 3)
    assert packed - coded == 1
    assert stored(Integers(8), values) == ("packed", packed)
    assert stored(Integers(8, most_bytes=coded), values) == ("huffman", coded)


@pytest.mark.parametrize("kind", ["f4", "f2", "f8"])
def test_repeats_at_the_end_are_not_stored(kind):
    def centres(values):
        array = np.array(values, kind)
        raw, coding = without_repeats("centres", Raw.of(array))
        if coding:
            back = repeated("w", raw, list(coding), array.shape)
            assert back.numpy().tobytes() == array.tobytes()
        return coding and coding[1]

    assert centres([1, 2, 3] + [4] * 40) == 4
    assert centres([5] * 40) == 1
    assert centres([1] * 40 + [2]) is None
    assert centres([1, 2, 2]) is None  # saves less than it adds
    assert centres([1] + [np.nan] * 40) == 2
    assert centres([1] + [0.0] * 20 + [-0.0] * 40) == 22
    assert centres(np.zeros((1 << 16) + 1)) is None


def test_a_plan_takes_at_least_the_room_of_its_codes():
    """What a limit for the file is met by: no weights can make it larger."""
    rng = np.random.default_rng(1)
    for name in METHODS:
        plan = METHODS[name].fit((30, 40), 32 * 400)
        most = len(to_bytes(Contents({"w": Thin.plan(name, plan, {"w": Part((30, 40))}, Raw.of(np.zeros(1, "f4")))})))
        for weight in (rng.normal(size=(30, 40)), np.zeros((30, 40)), rng.integers(0, 2, (30, 40)) * 1.0):
            code = {k: Raw.of(v) for k, v in plan.encode(weight.astype("f4"), np).items()}
            assert len(to_bytes(Contents({"w": Thin(name, plan, {"w": Part((30, 40))}, code)}))) <= most


def test_inspect_tells_how_integers_are_coded(tmp_path):
    plan = METHODS["kmeans"].fit((60, 70), 1 << 20, bits=5)
    weight = np.random.default_rng(0).laplace(size=(60, 70)).astype("f4")
    code = {k: Raw.of(v) for k, v in plan.encode(weight, np).items()}
    contents = Contents({**small_contents().thin, "w": Thin("kmeans", plan, {"w": Part((60, 70))}, code)})
    for version, coding in ((1, "huffman 4.5 bits"), (2, "tree 4.4 bits")):
        write(contents, tmp_path / "m.thin", version=version)
        report = deepthin.inspect(tmp_path / "m.thin")
        assert report.rows[-1].coding == coding
        assert f"coding={coding}" in str(report)
        assert "coding" not in report.rows[0].fields
        assert json.loads(report.to_json())["rows"][-1]["coding"] == coding
        assert json.loads(report.to_json())["version"] == version
        assert f"version {version}" in str(report)


def test_a_million_coded_weights_are_read_at_once(tmp_path):
    """By Huffman's code: 9 ms here by native code, 0.4 s by NumPy."""
    plan = METHODS["kmeans"](shape=(1000, 1000), levels=32)
    symbols = np.clip(np.round(np.random.default_rng(0).laplace(size=(1000, 1000)) * 2 + 16), 0, 31).astype(np.int16)
    code = {"centres": Raw.of(np.arange(32, dtype="f4")), "symbols": Raw.of(symbols)}
    write(Contents({"w": Thin("kmeans", plan, {"w": Part((1000, 1000))}, code)}), tmp_path / "m.thin", version=1)
    assert deepthin.inspect(tmp_path / "m.thin").rows[0].coding.startswith("huffman")
    times = []
    for _ in range(5):
        start = time.process_time()
        assert (deepthin.load(tmp_path / "m.thin")["w"] == symbols).all()
        times.append(time.process_time() - start)
    assert min(times) < (0.2 if deepthin.native_available else 4)


def test_a_file_of_version_1_is_a_safetensors_file(first):
    tensors = safetensors_load(first)
    assert (tensors["a.bias"] == np.arange(6)).all()
    assert tensors["a.weight/xf"].shape == small_contents().thin["a.weight"].method.code_shapes()["xf"]


def test_stated_size_is_the_size_on_disk(tmp_path):
    """Promise 15: the report, the return value and the file agree, and the parts add up."""
    path = tmp_path / "m.thin"
    written = write(small_contents(), path)
    report = deepthin.inspect(path)
    assert written == path.stat().st_size == report.total_bytes
    assert sum(row.bytes for row in report.rows) + report.other_bytes + report.header_bytes == written
    assert report.dense_bytes == 3 * 4 * 48 + 4 * 6 + 8
    assert [row.name for row in report.rows] == ["a.weight", "b.weight", "c.weight"]
    assert report.rows[0].rank == 1
    assert json.loads(report.to_json())["rows"][2]["method"] == "rank"


def test_load_gives_the_dense_state_dict(tmp_path):
    contents = small_contents()
    write(contents, tmp_path / "m.thin")
    arrays = deepthin.load(tmp_path / "m.thin")
    assert list(arrays) == ["a.bias", "a.weight", "b.weight", "c.weight", "d.weight", "steps"]
    assert (arrays["d.weight"] == arrays["a.weight"]).all()
    assert (arrays["a.weight"] == contents.thin["a.weight"].decode()["a.weight"]).all()
    assert arrays["steps"] == 7


def test_bfloat16_is_widened_without_loss():
    halves = np.array([1.5, -2.0, 0.0, 3e38], dtype="f4").view("u4") >> 16
    raw = Raw("BF16", (4,), halves.astype("<u2").tobytes())
    assert (raw.numpy().view("u4") >> 16 == halves).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(version=2), "format version 2; this deepthin reads versions 1 and 2"),
        (lambda h: h.update(extra=1), "its header has the keys"),
        (lambda h: h["thin"]["a.weight"].update(method="pickle"), "stored by method 'pickle'; known are deepthin"),
        (lambda h: h["thin"]["a.weight"].update(run="x"), "the entry of a.weight has the keys"),
        (lambda h: h["thin"]["a.weight"]["fields"].update(n=0), "positive integers"),
        (lambda h: h["thin"]["a.weight"]["fields"].update(n=2**63), "must be floating numbers of shape"),
        (lambda h: h["thin"]["a.weight"]["fields"].update(rank=10**30), "must be floating numbers of shape"),
        (lambda h: h["thin"]["a.weight"]["fields"].update(shape=[6.0, 8]), "does not describe a model"),
        (lambda h: h["thin"]["a.weight"]["fields"].update(colour=1), "does not describe a model"),
        (lambda h: h["thin"]["a.weight"]["fields"].pop("n"), "does not describe a model"),
        (lambda h: parts_of(h)[0][1].update(shape=[48, 2]), r"holds tensors of shape \(48, 2\), but its plan stores"),
        (lambda h: parts_of(h)[0][1].update(shape=[8, 6]), r"holds tensors of shape \(8, 6\), but its plan stores"),
        (lambda h: parts_of(h)[0][1].update(shape=[[6], 8]), "the tensor a.weight is described as"),
        (lambda h: parts_of(h)[0][1].update(shape=[0, 8]), "the tensor a.weight is described as"),
        (lambda h: parts_of(h)[0][1].update(scale=0.0), "the tensor a.weight is described as"),
        (lambda h: parts_of(h)[0][1].update(transposed=1), "the tensor a.weight is described as"),
        (lambda h: parts_of(h)[0][1].update(colour=1), "the tensor a.weight is described by"),
        (lambda h: parts_of(h).append(parts_of(h)[0]), "the tensors of a.weight are"),
        (lambda h: parts_of(h).clear(), "the tensors of a.weight are"),
        (lambda h: parts_of(h)[0].__setitem__(0, "b.weight"), "the tensors of a.weight are"),
        (lambda h: h["thin"].update({"a.bias": h["thin"]["a.weight"]}), "a.bias/xf must be .* but is missing"),
        (lambda h: h["thin"].pop("a.weight"), "share 'a.weight', which cannot be"),
        (lambda h: h["aliases"].update({"a.bias": "a.weight"}), "which cannot be"),
        (lambda h: h["aliases"].update({"e": "nowhere"}), "which cannot be"),
        (lambda h: h["crc32"].pop("a.bias"), "the checksums in its header"),
        (lambda h: h.pop("thin"), "its header has the keys"),
        (lambda h: h.update(thin=[]), "does not describe a model"),
        (lambda h: h.update(aliases=[1]), "the shared names are"),
        (lambda h: h.update(version=True), "format version True"),
        (lambda h: parts_of(h)[0][1].update(shape=[6, 8] + [1] * 70), "the tensor a.weight is described as"),
    ],
)
def test_hostile_headers_with_good_checksums_are_named(first, change, message):
    header = header_of(first)
    change(header)
    with pytest.raises(FormatError, match=message):
        from_bytes(resign(first, header))


@pytest.mark.parametrize("header", [None, 3, "x", [], {"version": 1}])
def test_headers_of_another_kind_are_refused(first, header):
    with pytest.raises(FormatError):
        from_bytes(resign(first, header))


def test_other_files_are_told_apart(tmp_path):
    from safetensors.numpy import save_file

    save_file({"w": np.zeros(3, "f4")}, tmp_path / "plain.safetensors")
    with pytest.raises(FormatError, match="is a safetensors file, but no .thin file"):
        deepthin.load(tmp_path / "plain.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(FormatError, match="is damaged, or no .thin file"):
        deepthin.inspect(tmp_path / "text")
    (tmp_path / "deep").write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000)
    with pytest.raises(FormatError):
        deepthin.inspect(tmp_path / "deep")


def bomb(side):
    """A file of about a kilobyte whose factors declare a matrix of side x side."""
    method = METHODS["deepthin"](shape=(side, side), n=side, rank=1)
    dense = {"pad": Raw.of(np.zeros(4, "f4"))}
    whole = to_bytes(Contents({}, dense, {}), 1)
    header = header_of(whole)
    entry = {"method": "deepthin", "fields": {"shape": [side, side], "n": side, "rank": 1, "seed": None}}
    header["thin"] = {"w": {**entry, "parts": [["w", {"shape": [side, side]}]]}}
    return resign(whole, header), method


@pytest.mark.parametrize("side", [2**20, 2**31, 2**63, 2**200])
def test_a_small_file_cannot_declare_a_huge_matrix(side):
    """Promise 3: refused because the factors themselves are not there, before anything is allocated."""
    data, _ = bomb(side)
    tracemalloc.start()
    with pytest.raises(FormatError):
        from_bytes(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(data) + (1 << 20)


def test_the_decoded_size_is_capped(tmp_path):
    """Promise 3: honest factors of 800 kB that decode to 40 GB."""
    method = METHODS["deepthin"](shape=(100_000, 100_000), n=100_000, rank=1)
    code = {k: Raw("F32", s, bytes(4 * int(np.prod(s)))) for k, s in method.code_shapes().items()}
    path = tmp_path / "big.thin"
    write(Contents({"w": Thin("deepthin", method, {"w": Part(method.shape)}, code)}), path)
    with pytest.raises(FormatError, match="decodes to 40000000000 bytes, above the limit of 4294967296"):
        deepthin.load(path)
    assert deepthin.inspect(path).dense_bytes == 40_000_000_000
    with pytest.raises(FormatError, match="above the limit of 100"):
        write(small_contents(), path)
        deepthin.load(path, max_bytes=100)


def test_load_time_is_linear_in_names():
    """Promise 4. Ten times the file takes some eleven times as long here; a quadratic reader would take a hundred."""

    def seconds(count):
        data = to_bytes(Contents({}, {f"layer{i}.bias": Raw.of(np.zeros(1, "f4")) for i in range(count)}))
        times = []
        for _ in range(3):
            gc.collect()
            gc.disable()  # the collector's passes over so many small objects are no part of the reader
            start = time.process_time()
            assert len(from_bytes(data).dense) == count
            times.append(time.process_time() - start)
            gc.enable()
        return min(times)

    assert seconds(20_000) < 30 * seconds(2_000)


def test_loading_runs_no_code_from_the_file():
    """Promise 5: the modules that read files import nothing that executes or unpickles, and open one path only."""
    source = Path(deepthin.__file__).parent
    rooms = [source / "errors.py", source / "method.py"]
    for room in ("coding", "storage", "methods"):
        rooms += sorted((source / room).glob("*.py"))
    for path in rooms:
        if path.name == "atomic.py":  # which writes, and reads nothing
            continue
        tree = ast.parse(path.read_text())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        imports = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imports |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not names & {"eval", "exec", "compile", "__import__", "open"}
        assert not imports & {"pickle", "marshal", "shelve", "importlib", "subprocess", "runpy", "ctypes"}


def test_names_are_never_paths(tmp_path):
    """Promise 5: a tensor may be called anything; nothing is opened or written but the file itself."""
    names = ["../../evil", "/etc/passwd", "a\\..\\b", "nul\0byte", "ünï", ""]
    path = tmp_path / "m.thin"
    write(Contents({}, {name: Raw.of(np.zeros(2, "f4")) for name in names}), path)
    assert set(deepthin.load(path)) == set(names)
    assert list(tmp_path.iterdir()) == [path]


def test_two_tensors_of_one_name_are_refused():
    contents = small_contents()
    clash = Contents(contents.thin, {"a.weight/xf": Raw.of(np.zeros(1, "f4"))})
    with pytest.raises(ValueError, match="one name"):
        to_bytes(clash, 1)
    assert to_bytes(from_bytes(to_bytes(clash))) == to_bytes(clash)  # version 2 does not join names
    with pytest.raises(ValueError, match=r"would have the name 'a\.weight'"):
        to_bytes(Contents(contents.thin, {"a.weight": Raw.of(np.zeros(1, "f4"))}))


def test_save_above_the_limit_writes_nothing(tmp_path):
    with pytest.raises(BudgetError, match="above the limit of 10: nothing was written"):
        write(small_contents(), tmp_path / "m.thin", max_bytes=10)
    assert not list(tmp_path.iterdir())


# Promises 6 and 7: saving is atomic. Every call that reaches the operating system fails, or is the last, in turn.

CALLS = ("open", "write", "fsync", "replace", "close")


@pytest.mark.parametrize("failure", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_failing_disk_leaves_the_old_file_and_no_leftovers(tmp_path, monkeypatch, failure):
    path = tmp_path / "m.thin"
    write(small_contents(), path)
    old = path.read_bytes()
    for fails_at in range(100):
        counter = {"left": fails_at, "failed": ""}

        def failing(call, name, counter=counter):
            def wrapped(*args, **kwargs):
                if counter["left"] == 0 and not counter["failed"]:
                    counter["failed"] = name
                    raise OSError(failure, os.strerror(failure))
                counter["left"] -= 1
                return call(*args, **kwargs)

            return wrapped

        with monkeypatch.context() as patch:
            for name in ("open", "write", "fsync", "replace"):
                patch.setattr(atomic.os, name, failing(getattr(os, name), name))
            new = small_contents(scale=float(fails_at + 2))
            if counter["left"] >= 100:
                break
            try:
                write(new, path)
            except OSError as error:
                assert error.errno == failure
                assert str(path) in str(error)
            else:
                assert not counter["failed"]
                assert fails_at >= 6  # open, write, fsync, replace, and the directory's open and fsync
                return
        assert path.read_bytes() in (old, to_bytes(new))
        assert list(tmp_path.iterdir()) == [path]
        old = path.read_bytes()
    raise AssertionError("saving never succeeded")


def test_short_writes_are_completed(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(atomic.os, "write", lambda file, view: real(file, view[:7]))
    write(small_contents(), tmp_path / "m.thin")
    monkeypatch.undo()
    assert (tmp_path / "m.thin").read_bytes() == to_bytes(small_contents())


def test_the_file_is_forced_to_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    calls = []
    for name in ("open", "write", "fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(atomic.os, name, lambda *a, name=name, real=real, **k: calls.append(name) or real(*a, **k))
    write(small_contents(), tmp_path / "m.thin")
    assert calls == ["open", "write", "fsync", "replace", "open", "fsync"]


CHILD = """
import os, signal, sys
sys.path.insert(0, sys.argv[4])
from test_storage import small_contents
from deepthin.storage import atomic
from deepthin.storage.write import write
left = int(sys.argv[2])
def killing(call):
    def wrapped(*args, **kwargs):
        global left
        if left == 0:
            if call is real_write:
                call(args[0], args[1][:50])  # part of the data is on disk
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return call(*args, **kwargs)
    return wrapped
real_write = os.write
for name in ("open", "write", "fsync", "replace"):
    setattr(atomic.os, name, killing(getattr(os, name)))
write(small_contents(scale=float(sys.argv[3])), sys.argv[1])
"""


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    """Promise 6: SIGKILL at each call to the operating system; the file is the old or the new one, byte for byte."""
    path = tmp_path / "m.thin"
    write(small_contents(), path)
    outcomes = []
    for moment in range(7):
        old = path.read_bytes()
        command = [sys.executable, "-c", CHILD, str(path), str(moment), str(moment + 2), str(Path(__file__).parent)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        new = to_bytes(small_contents(scale=float(moment + 2)))
        assert path.read_bytes() in (old, new), done.stderr
        outcomes.append((done.returncode, path.read_bytes() == new))
    assert outcomes[:4] == [(-signal.SIGKILL, False)] * 4  # before the file takes the name
    assert outcomes[4:6] == [(-signal.SIGKILL, True)] * 2  # after
    assert outcomes[6] == (0, True)


def test_stale_temporary_files_are_cleaned(tmp_path):
    path = tmp_path / "m.thin"
    prefixes = [f".deepthin-{zlib.crc32(name):08x}-" for name in (b"m.thin", b"other.thin")]
    stale, fresh, other = (tmp_path / f"{p}{end}.tmp" for p, end in zip((prefixes[0], *prefixes), "abc", strict=True))
    for temporary in (stale, fresh, other):
        temporary.write_bytes(b"x")
    for temporary in (stale, other):
        os.utime(temporary, (time.time() - 7200,) * 2)
    write(small_contents(), path)
    assert sorted(tmp_path.iterdir()) == sorted([path, fresh, other])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("pruned", lambda code: {"positions": code["positions"][::-1].copy()}, r"w/positions must rise"),
        ("pruned", lambda code: {"positions": code["positions"] + 1200}, r"w/positions has integers from .* 0 to 1199"),
        ("pruned", lambda code: {"positions": code["positions"].astype("f4")}, r"w/positions is float32"),
        ("pruned", lambda code: {"positions": code["positions"][:-1]}, r"w/positions is int64 .* of shape"),
        ("kmeans", lambda code: {"symbols": code["symbols"] - 300}, r"w/symbols has integers from -300 .* 0 to 7"),
    ],
)
def test_integers_that_no_reader_accepts_are_not_written(name, change, message, tmp_path):
    options = {"bits": 3} if name == "kmeans" else {}
    plan = METHODS[name].fit((30, 40), 32 * 300, **options)
    code = plan.init(np.random.default_rng(0), 0.1)
    code = {entry: Raw.of(values) for entry, values in {**code, **change(code)}.items()}
    with pytest.raises(ConfigError, match=message):
        write(Contents({"w": Thin(name, plan, {"w": Part((30, 40))}, code)}), tmp_path / "m.thin")
    assert not list(tmp_path.iterdir())
