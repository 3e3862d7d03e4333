"""Weights in files are compressed one matrix at a time: the same file as in memory, whatever interrupts it."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import deepthin.torch as dt
from deepthin.errors import BudgetError, ConfigError, NonFiniteError
from deepthin.torch import streamed
from deepthin.torch.streamed import compress_weights

RULES = {
    "uniform": {"model": {"ratio": 0.2}, "rules": {"*": {"method": "uniform", "bits": 4}}},
    "both": {
        "model": {"ratio": 0.1, "biases": 8},
        "rules": {
            "blocks.0.*": {"method": "kronecker"},
            "*": {"method": "deepthin", "then": {"method": "uniform", "bits": 8}},
        },
    },
    "group": {"model": {"ratio": 0.1}, "rules": {"blocks.*": {"method": "deepthin", "group": "flat"}}},
    "bytes": {"model": {"file_bytes": 6000}, "rules": {"*": {"method": "deepthin"}}},
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 48), nn.Linear(48, 16), nn.BatchNorm1d(16)


class Network(nn.Module):
    """Two blocks between a table and an output that share a matrix."""

    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(50, 16), nn.ModuleList(Block() for _ in range(2))
        self.output = nn.Linear(16, 50, bias=False)
        self.output.weight = self.embed.weight


def meta():
    with torch.device("meta"):
        return Network()


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return Network()


@pytest.fixture
def shards(trained, tmp_path):
    """Three files, in which the shared matrix lies once, by its second name."""
    folder = tmp_path / "shards"
    folder.mkdir()
    state = {name: tensor for name, tensor in trained.state_dict().items() if name != "embed.weight"}
    for number in range(3):
        save_file(dict(list(state.items())[number::3]), folder / f"model-{number}.safetensors")
    return folder


def in_memory(trained, rules, path):
    model = Network()
    model.load_state_dict(trained.state_dict())
    report = dt.compress(model, rules)
    dt.save(model, path)
    return report


@pytest.mark.filterwarnings("ignore:The relative error")
@pytest.mark.parametrize("rules", RULES)
def test_the_file_is_that_of_compress(rules, trained, shards, tmp_path):
    expected = in_memory(trained, RULES[rules], tmp_path / "memory.thin")
    told = []
    report = compress_weights(meta(), shards, RULES[rules], tmp_path / "m.thin", told=lambda *given: told.append(given))
    if rules == "bytes":  # in memory, plans may use what the codes of these weights take less
        assert (tmp_path / "m.thin").stat().st_size <= 6000
    else:
        assert (tmp_path / "m.thin").read_bytes() == (tmp_path / "memory.thin").read_bytes()
        assert {row.name: row.error for row in report.rows} == pytest.approx(
            {row.name: row.error for row in expected.rows}, nan_ok=True
        )
    assert [done for _, done, _ in told] == list(range(1, len(told) + 1))
    assert {all_ for *_, all_ in told} == {len(told)}
    assert report.total_bytes == (tmp_path / "m.thin").stat().st_size
    assert not (tmp_path / "m.thin.parts").exists()


@pytest.mark.filterwarnings("ignore:The relative error")
def test_an_interrupted_call_goes_on(trained, shards, tmp_path, monkeypatch):
    in_memory(trained, RULES["both"], tmp_path / "memory.thin")
    encoded, real = [], streamed._encode

    def dies(job):
        if len(encoded) == 4:
            raise KeyboardInterrupt
        encoded.append(job[1].tensors[0].name)
        return real(job)

    monkeypatch.setattr(streamed, "_encode", dies)
    with pytest.raises(KeyboardInterrupt):
        compress_weights(meta(), shards, RULES["both"], tmp_path / "m.thin")
    before, encoded[:] = list(encoded), []
    monkeypatch.setattr(streamed, "_encode", lambda job: encoded.append(job[1].tensors[0].name) or real(job))
    compress_weights(meta(), shards, RULES["both"], tmp_path / "m.thin")
    assert encoded
    assert not set(before) & set(encoded)  # none is encoded twice
    assert (tmp_path / "m.thin").read_bytes() == (tmp_path / "memory.thin").read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The relative error")
def test_processes_abreast_write_the_same_file(shards, tmp_path):
    compress_weights(meta(), shards, RULES["both"], tmp_path / "one.thin")
    compress_weights(meta(), shards, RULES["both"], tmp_path / "two.thin", jobs=2)
    assert (tmp_path / "one.thin").read_bytes() == (tmp_path / "two.thin").read_bytes()


def test_the_command(shards, tmp_path):
    (tmp_path / "nets.py").write_text("from test_streamed import Network as build\n")
    command = [sys.executable, "-m", "deepthin", "compress", "--model", "nets:build", "--ratio", "0.2", "--weights"]
    path = os.pathsep.join((str(tmp_path), os.path.dirname(__file__)))
    done = subprocess.run(
        [*command, str(shards), "--out", "m.thin"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "wrote m.thin" in done.stdout
    assert "blocks.1.up.weight" in done.stdout
    dt.load(Network(), tmp_path / "m.thin")


def lacking(folder):
    (folder / "model-1.safetensors").unlink()


def surplus(folder):
    save_file({"other": torch.zeros(2)}, folder / "more.safetensors")


def twice(folder):
    (folder / "copy.safetensors").write_bytes((folder / "model-0.safetensors").read_bytes())


def damaged(folder):
    (folder / "model-1.safetensors").write_bytes(b"no")


def empty(folder):
    for file in folder.iterdir():
        file.unlink()


def another_shape(folder):
    names = {"output.weight": torch.zeros(50, 17)}
    for file in sorted(folder.iterdir()):
        from safetensors.torch import load_file

        state = load_file(file)
        save_file({name: names.get(name, tensor) for name, tensor in state.items()}, file)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lacking, "lacks .* more"),
        (surplus, "has other"),
        (twice, "both have"),
        (damaged, "cannot be read"),
        (empty, "without .safetensors files"),
        (another_shape, r"\(50, 17\) there, and \(50, 16\)"),
    ],
)
def test_faults_of_the_weights_are_named_before_anything_is_encoded(fault, message, shards, tmp_path):
    fault(shards)
    with pytest.raises(ConfigError, match=message):
        compress_weights(meta(), shards, RULES["uniform"], tmp_path / "m.thin")
    assert not (tmp_path / "m.thin").exists()


def test_what_cannot_be_streamed_is_said(shards, tmp_path):
    coded = {"model": {"file_bytes": 5000}, "rules": {"*": {"method": "coded"}}}
    with pytest.raises(ConfigError, match="by training"):
        compress_weights(meta(), shards, coded, tmp_path / "m.thin")
    with pytest.raises(BudgetError, match="file_bytes >="):
        compress_weights(meta(), shards, {**RULES["bytes"], "model": {"file_bytes": 100}}, tmp_path / "m.thin")
    file = shards / "model-0.safetensors"
    from safetensors.torch import load_file

    state = load_file(file)
    name = next(name for name, tensor in state.items() if tensor.dim() > 1)
    state[name] = state[name].clone()
    state[name][0, 0] = float("nan")
    save_file(state, file)
    with pytest.raises(NonFiniteError, match=name):
        compress_weights(meta(), shards, RULES["uniform"], tmp_path / "m.thin")
