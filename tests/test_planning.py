"""Sizes without writing, and files without copies: what planning, compressing and saving read and hold."""

import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import deepthin.torch as dt
from deepthin import METHODS
from deepthin.storage import arrays
from deepthin.storage.arrays import ITEM_BYTES, Raw
from deepthin.storage.contents import Contents, Part, Thin
from deepthin.storage.read import from_bytes
from deepthin.storage.write import size_of, to_bytes, write
from deepthin.torch.files import contents
from test_storage import small_contents

NAMES = st.text(st.characters(exclude_categories=("Cs",)), max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 12), max_size=3).map(tuple)


METHODS_TRIED = ("deepthin", "kmeans", "pruned", "shuffled")
PLANS = {(name, count): METHODS[name].fit((6 * count, 8), 960 * count) for name in METHODS_TRIED for count in (1, 2, 3)}
CODES = {
    key: plan.encode(np.random.default_rng(0).laplace(size=plan.shape).astype("f4"), np) for key, plan in PLANS.items()
}


PLACEHOLDERS = {key: Thin.plan(key[0], plan, {}, Raw.zeros("F16", (1,))).code for key, plan in PLANS.items()}


@st.composite
def any_contents(draw):
    """Tensors of every type, single matrices and groups, and names that share a tensor."""
    dense = {
        f"d{name}": Raw.zeros(draw(st.sampled_from(sorted(ITEM_BYTES))), draw(SHAPES)) for name in draw(st.sets(NAMES))
    }
    thin = {}
    for name in draw(st.sets(NAMES, max_size=3)):
        method, count = draw(st.sampled_from(sorted(PLANS)))
        plan, names = PLANS[method, count], [f"t{name}{member}" for member in range(count)]
        parts = {own: Part((6, 8), draw(st.sampled_from([1.0, 0.1]))) for own in names}
        if planned := draw(st.booleans()):
            code = PLACEHOLDERS[method, count]
        else:
            code = {entry: Raw.of(array) for entry, array in CODES[method, count].items()}
        thin[names[0]] = Thin(method, plan, parts, code, planned)
    targets = [*dense, *(own for matrix in thin.values() for own in matrix.parts)]
    aliases = {f"a{name}": draw(st.sampled_from(targets)) for name in draw(st.sets(NAMES))} if targets else {}
    return Contents(thin, dense, aliases)


@given(stored=any_contents())
def test_a_size_is_that_of_the_file(stored):
    for version in (1, 2):
        data, planned = to_bytes(stored, version), any(matrix.planned for matrix in stored.thin.values())
        if version == 1 or not planned:
            assert size_of(stored, version) == len(data)
        assert size_of(stored, version, bound=True) >= len(data)
        if not planned and all(0 not in r.shape for r in stored.dense.values()):
            again = to_bytes(from_bytes(data))  # in version 2, placeholders are then zeros like any, and shortened
            assert again == data or (version == 2 and len(again) < len(data))
            assert to_bytes(from_bytes(again)) == again


class Reads:
    """A tensor that counts how many of its two pieces are asked for."""

    def __init__(self):
        self.count = 0

    def __call__(self):
        for _ in range(2):
            self.count += 1
            yield np.full(100, 0.1, "f4").tobytes()


def test_values_are_read_for_the_checksum_and_for_the_file_only(tmp_path):
    """And, in version 2, until one shows that they cannot be shortened."""
    for version, looks in ((1, 0), (2, 1)):
        reads = Reads()
        stored = Contents({}, {"w": Raw("F32", (200,), reads)})
        assert size_of(stored, version) == size_of(Contents({}, {"w": Raw.zeros("F32", (200,))}), version)
        assert (stored.dense_bytes, reads.count) == (800, looks)
        write(stored, tmp_path / "m.thin", version=version)
        assert reads.count == 4 + 2 * looks
        whole = Contents({}, {"w": Raw.of(np.full(200, 0.1, "f4"))})
        assert (tmp_path / "m.thin").read_bytes() == to_bytes(whole, version)


def test_a_tensor_that_changes_while_it_is_written_leaves_the_old_file(tmp_path):
    values = [b"1234", b"1235", b"1235"]
    write(small_contents(), tmp_path / "m.thin")
    with pytest.raises(ValueError, match="w changed while it was written. Save while nothing trains the model"):
        write(Contents({}, {"w": Raw("F32", (1,), lambda: iter([values.pop()]))}), tmp_path / "m.thin")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [to_bytes(small_contents())]


@pytest.mark.parametrize("piece", [1, 30, 64, 1 << 22])
def test_pieces_are_the_bytes_of_the_tensor(monkeypatch, piece):
    """Tensors that do not lie in a row are copied piece by piece, whatever their shape."""
    monkeypatch.setattr(arrays, "PIECE_BYTES", piece)
    base = torch.randn(6, 5, 4)
    model = nn.Module()
    for number, tensor in enumerate(
        [
            base.permute(2, 1, 0),
            base[:, ::2],
            base[0, 0, 0],
            base[:0],
            torch.randn(3, 2, dtype=torch.complex64).conj().T,
            base[0].bfloat16().T,
        ]
    ):
        model.register_buffer(f"b{number}", tensor)
    for name, raw in contents(model).dense.items():
        tensor = getattr(model, name).resolve_conj().contiguous()
        assert bytes(raw.data) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), name
        assert raw.bytes == len(raw.data)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 60), nn.ReLU(), nn.Linear(60, 40))


@pytest.mark.parametrize("method", ["deepthin", "kmeans", "pruned"])
def test_a_limit_for_the_file_is_met_without_writing_any(monkeypatch, method):
    read = []
    real = zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda data, value=0: read.append(len(data)) or real(data, value))
    warnings.simplefilter("ignore")  # that the weights are lost
    rules = {"model": {"file_bytes": 18_000}, "rules": {"*": {"method": method}}}
    planned, done = dt.plan(network(), rules), dt.compress(network(), rules)
    assert read == []  # only a file that is written has checksums
    assert done.total_bytes <= 18_000
    assert planned.total_bytes <= 18_000


def test_each_matrix_is_encoded_once_by_each_plan(monkeypatch):
    """Whatever asks for it: the limit of the file, the report, or the model."""
    made = []
    real = dt.ThinWeight.encode.__func__
    monkeypatch.setattr(
        dt.ThinWeight, "encode", classmethod(lambda cls, *given: made.append((given[2], given[1])) or real(cls, *given))
    )
    rules = {
        "model": {"file_bytes": 18_000},
        "rules": {"4": {"method": "kmeans", "bits": 3}, "*": {"method": "pruned"}},
    }
    warnings.simplefilter("ignore")  # that the weights are lost
    dt.compress(network(), rules)
    keys = [(tuple(parts), method) for parts, method in made]
    assert len(keys) == len(set(keys)) > 2


MEMORY = """
import resource, sys, warnings
from pathlib import Path
import torch
from torch import nn
import deepthin.torch as dt
warnings.simplefilter("ignore")
torch.set_num_threads(1)
rules = {"model": {"ratio": 0.1}, "rules": {"thin": {"method": "deepthin"}}}
def run(model):
    dt.plan(model, rules)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    limited = {"model": {"file_bytes": size - 100_000}, "rules": rules["rules"]}
    dt.plan(model, limited)
    dt.compress(model, rules)
    dt.save(model, sys.argv[1])
def build(rows):
    turned, thin = nn.Linear(256, rows), nn.Linear(200, 200)
    return nn.ModuleDict({"table": nn.Embedding(rows, 256), "turned": turned, "thin": thin})
run(build(10))
model = build(100_000)
model["turned"].weight.data = model["turned"].weight.data.view(256, -1).T  # not contiguous
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(model)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts otherwise elsewhere")
def test_planning_compressing_and_saving_copy_nothing_dense(tmp_path):
    """Two tensors of 102 MB, one of which does not lie in a row: less than 64 MB more than the model, at any time."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "m.thin"], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) < 64_000  # kB
    assert (tmp_path / "m.thin").stat().st_size > 204_000_000


def test_a_huge_table_is_planned_without_memory():
    model = nn.Embedding(10_000_000, 256, device="meta")
    for target in ({"ratio": 0.01}, {"file_bytes": 100_000_000}):
        report = dt.plan(model, {"model": target, "rules": {"*": {"method": "deepthin"}}})
        assert report.dense_bytes == 10_240_000_000
        assert report.total_bytes < 110_000_000
