"""Files that are not read as a whole: the same contents and the same refusals as of small ones, in little memory."""

import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

import deepthin
import deepthin.torch as dt
from crafted import resealed
from deepthin import FormatError
from deepthin.storage import read as reading
from deepthin.storage.arrays import Raw
from deepthin.storage.contents import Contents
from deepthin.storage.read import from_bytes, read
from deepthin.storage.write import to_bytes, write
from test_storage import small_contents


@pytest.fixture
def streamed(monkeypatch):
    monkeypatch.setattr(reading, "IN_MEMORY_BYTES", 0)


def same(one, other):
    assert one.aliases == other.aliases
    assert one.thin.keys() == other.thin.keys()
    for name, thin in one.thin.items():
        twin = other.thin[name]
        assert (thin.name, thin.method, dict(thin.parts)) == (twin.name, twin.method, dict(twin.parts))
        assert all(np.array_equal(raw.numpy(), twin.code[entry].numpy()) for entry, raw in thin.code.items())
    assert one.dense.keys() == other.dense.keys()
    for name, raw in one.dense.items():
        twin = other.dense[name]
        assert (raw.dtype, raw.shape, bytes(raw.data)) == (twin.dtype, twin.shape, bytes(twin.data))


@pytest.mark.parametrize("version", [1, 2])
def test_a_streamed_file_is_the_same_as_one_in_memory(tmp_path, streamed, version):
    data = to_bytes(small_contents(), version)
    (tmp_path / "m.thin").write_bytes(data)
    same(read(tmp_path / "m.thin"), from_bytes(data))
    assert to_bytes(read(tmp_path / "m.thin")) == data
    assert str(deepthin.inspect(tmp_path / "m.thin")) == str(reading.report_of(from_bytes(data)))


def test_models_load_from_streamed_files(tmp_path, streamed):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 10))
    rule = {"method": "pruned", "ratio": 0.3, "then": {"method": "kmeans", "bits": 4}}
    dt.compress(model, {"rules": {"0": rule}})
    dt.save(model.eval(), tmp_path / "m.thin")
    other = dt.load(nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 10)), tmp_path / "m.thin").eval()
    x = torch.ones(2, 40)
    assert torch.equal(model(x), other(x))
    state = deepthin.load(tmp_path / "m.thin")
    assert np.array_equal(state["2.weight"], model[2].weight.detach().numpy())


@pytest.mark.parametrize("version", [1, 2])
def test_every_changed_byte_of_a_streamed_file_is_noticed(tmp_path, streamed, version):
    data = to_bytes(small_contents(), version)
    path = tmp_path / "m.thin"
    for at in range(0, len(data), 3):
        path.write_bytes(data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :])
        with pytest.raises(FormatError):
            read(path)
    for length in (*range(0, len(data), 7), len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(FormatError):
            read(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(FormatError):
        read(path)


LIES = {
    "a gap": lambda index: shifted(index, 8),
    "an overlap": lambda index: shifted(index, -8),
    "another shape": lambda index: index["a.bias"].update(shape=[5]),
    "a negative length": lambda index: index["a.bias"].update(shape=[-6]),
    "a length that is a boolean": lambda index: index["steps"].update(shape=[True]),
    "an unknown type": lambda index: index["a.bias"].update(dtype="F8"),
    "a type that is a list": lambda index: index["a.bias"].update(dtype=["F32"]),
    "places that are no pair": lambda index: index["a.bias"].update(data_offsets=[0]),
    "places that are no numbers": lambda index: index["a.bias"].update(data_offsets=["0", "24"]),
    "an entry that is a list": lambda index: index.update({"a.bias": []}),
    "metadata that are a list": lambda index: index.update(__metadata__=[1]),
    "no header of ours": lambda index: index.update(__metadata__={}),
}


def shifted(index, by):
    for name in ("a.bias", "steps"):
        index[name]["data_offsets"] = [n + by for n in index[name]["data_offsets"]]


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_lies_about_places_are_refused(tmp_path, streamed, lie):
    """With a checksum that fits: the same files are refused in memory, by safetensors."""
    (tmp_path / "m.thin").write_bytes(data := resealed(to_bytes(small_contents(), 1), lie))
    for reader in (lambda: read(tmp_path / "m.thin"), lambda: from_bytes(data)):
        with pytest.raises(FormatError):
            reader()


def test_a_header_longer_than_the_file_is_refused_before_it_is_read(tmp_path, streamed):
    (tmp_path / "m.thin").write_bytes((1 << 62).to_bytes(8, "little") + b"{}" * 20)
    with pytest.raises(FormatError, match="its header would take 4611686018427387904 bytes"):
        read(tmp_path / "m.thin")


@pytest.mark.parametrize("version", [1, 2])
def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path, streamed, version):
    path = tmp_path / "m.thin"
    path.write_bytes(to_bytes(small_contents(), version))
    contents = read(path)
    with path.open("r+b") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little") if version == 1 else 60)
        file.write(b"\xff" * (path.stat().st_size - file.tell()))
    with pytest.raises(FormatError, match="changed while it was read"):
        [raw.data for raw in contents.dense.values()]
    path.write_bytes(b"short")
    with pytest.raises(FormatError, match="changed while it was read"):
        [raw.data for raw in contents.dense.values()]


@pytest.mark.parametrize("version", [1, 2])
def test_large_tensors_are_checked_and_inspected_in_little_memory(tmp_path, version):
    """96 MB in a file: what is allocated is a piece of some MB."""
    tenths = np.full(1 << 20, 0.1, "f4").tobytes()
    big = Raw("F32", (24, 1 << 20), lambda: iter([tenths] * 24))
    write(Contents(small_contents().thin, {"big": big}), tmp_path / "m.thin", version=version)
    tracemalloc.start()
    contents = read(tmp_path / "m.thin")
    report = deepthin.inspect(tmp_path / "m.thin")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert contents.dense["big"].bytes == 96 << 20
    assert report.total_bytes > 96 << 20
    assert peak < 24 << 20


def test_inspecting_does_not_decode_what_a_large_file_stores(tmp_path, streamed):
    """Of 4 million symbols of no bits in 500 bytes, nothing is allocated."""
    model = nn.Linear(2000, 2000, bias=False)
    nn.init.zeros_(model.weight)
    dt.compress(model, {"rules": {"*": {"method": "kmeans", "bits": 8}}})
    dt.save(model, tmp_path / "m.thin")
    tracemalloc.start()
    report = deepthin.inspect(tmp_path / "m.thin")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.rows[0].dense_bytes == 16_000_000
    assert peak < 4_000_000


@pytest.mark.slow
def test_a_file_of_five_gibibytes(tmp_path):
    """Written, read and inspected in a process that may not allocate more than a gibibyte."""
    done = subprocess.run(
        [sys.executable, "benchmarks/large_file.py", "--folder", tmp_path, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    figures = json.loads(done.stdout)
    assert figures["bytes"] > 5 << 30
    assert max(figures["peak_bytes"].values()) < 1 << 30
