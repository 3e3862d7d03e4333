"""The comparison: rows, files, resuming, and what people look at."""

import gzip
import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

import deepthin
from deepthin import ConfigError, NonFiniteError
from deepthin.lab.compare import Settings, compare
from deepthin.lab.compared import COMPARED
from deepthin.lab.report import points, tables
from deepthin.lab.report.page import write_page
from deepthin.lab.run import Run, Setup, Trial
from deepthin.lab.tasks import TASKS, digits
from deepthin.lab.tasks.training import Training
from deepthin.storage.read import from_bytes
from tolerance import bound

ALONE = ("dense-coded", "same-size-coded")
PIECES = {"train": 480, "t10k": 120}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten noisy patterns in MNIST's format: small, and learned in a hundred steps."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, size=(10, 28, 28))
    for split, count in PIECES.items():
        labels = rng.integers(0, 10, size=count).astype(np.uint8)
        images = (0.7 * patterns[labels] + 0.3 * rng.integers(0, 256, size=(count, 28, 28))).astype(np.uint8)
        for array, name in ((images, "images-idx3"), (labels, "labels-idx1")):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    return folder


def settings(folder, methods=("deepthin", "rank", "same-size"), ratios=(0.02,), seeds=1, steps=60, **more):
    return Settings(Setup("digits", folder, steps), methods, ratios, seeds, **more)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, compare(settings(folder, ratios=(0.02, 0.001)), out)


def test_rows_say_what_was_measured(finished):
    out, rows = finished
    assert json.loads((out / "results.json").read_text()) == [row.to_json() for row in rows]
    by = {(row.method, row.ratio, row.split): row for row in rows}
    assert {key[:2] for key in by} == {("dense", 1.0), ("int8", 0.25)} | {
        (m, r) for m in ("deepthin", "rank", "same-size") for r in (0.02, 0.001)
    }
    row = by["deepthin", 0.02, "test"]
    assert (row.task, row.metric, row.seed) == ("digits", "error", 0)
    assert row.dense_bytes == 4 * (784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10)
    assert row.bytes == (out / row.model).stat().st_size == deepthin.inspect(out / row.model).total_bytes
    assert by["dense", 1.0, "test"].value < 10
    assert 0 <= row.value <= 100


def test_a_size_that_cannot_be_reached_is_a_row(finished):
    _, rows = finished
    row = next(row for row in rows if row.method == "deepthin" and row.ratio == 0.001)
    assert row.value is None
    assert row.bytes is None
    assert row.smallest_ratio == pytest.approx(5524 / 4 / 266200, rel=bound(4, 1.0, "float64"))


def test_sizes_keep_to_the_ratio(folder):
    run = Run.prepare(Setup("digits", folder))
    for method in ("deepthin", "shuffled", "rank", "same-size"):
        model, _ = run.model(Trial(method, 0.02, 0))
        weights = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("bias"))
        assert 0.85 * 0.02 * 266_200 < weights <= 0.02 * 266_200, method


def test_the_stored_model_predicts_what_the_row_says(finished, folder):
    out, rows = finished
    row = next(r for r in rows if (r.method, r.split) == ("deepthin", "test") and r.value is not None)
    model = digits.build(None, digits.WIDTH)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in deepthin.load(out / row.model).items()})
    data = digits.load(folder)
    assert digits.evaluate(model, data, "test")["error"] == pytest.approx(row.value, abs=1)  # an image at a margin


def untimed(rows):
    return [replace(row, seconds=None, microseconds=None, dense_microseconds=None) for row in rows]


def test_an_interrupted_comparison_goes_on_where_it_stopped(folder, tmp_path):
    class Stopped(Exception):
        pass

    def stop_in_second(name, step, _):
        if name.startswith("deepthin") and step == 20:
            raise Stopped

    wanted = settings(folder, ("deepthin", "rank"))
    with pytest.raises(Stopped):
        compare(wanted, tmp_path / "a", stop_in_second)
    assert {row["method"] for row in json.loads((tmp_path / "a" / "results.json").read_text())} == {"dense"}
    trained = []
    rows = compare(wanted, tmp_path / "a", lambda name, *_: trained.append(name))
    assert set(trained) - {"timing"} == {"deepthin-0.02-seed0", "rank-0.02-seed0"}
    straight = compare(wanted, tmp_path / "b")
    assert untimed(rows) == untimed(straight)
    for name in ("deepthin-0.02-seed0", "rank-0.02-seed0"):
        files = [(tmp_path / run / "models" / f"{name}.thin").read_bytes() for run in "ab"]
        assert files[0] == files[1]
    more = []
    compare(settings(folder, ("deepthin", "rank"), (0.02, 0.05)), tmp_path / "a", lambda n, *_: more.append(n))
    assert set(more) - {"timing"} == {"deepthin-0.05-seed0", "rank-0.05-seed0"}


def test_results_of_different_runs_do_not_mix(folder, tmp_path):
    compare(settings(folder, (), steps=5), tmp_path)
    with pytest.raises(ConfigError, match=r"holds results of another run \(steps = 5, now 6\): choose another --out"):
        compare(settings(folder, (), steps=6), tmp_path)


def test_summary_and_page(finished):
    out, rows = finished
    text = tables.summary(rows)
    assert "not reachable: smallest ratio 0.00519" in text
    assert text.splitlines()[2].split()[0] == "dense"
    page = write_page(rows, out, "deepthin compare digits --out <here>").read_text()
    assert (out / "digits.png").stat().st_size > 10_000
    assert (out / "digits-latency.png").exists()
    assert "--out &lt;here&gt;" in page
    assert "<h3>deepthin at 0.02</h3>" in page
    assert "://" not in page  # it needs no other file
    best = points.best_thin(rows)
    assert best.value == min(r.value for r in rows if r.split == "dev" and r.method not in points.UNCOMPRESSED)


USUAL = tuple(name for name in COMPARED if not name.endswith("4bit"))
CODED = ("deepthin-coded", "pruned-coded", *ALONE)  # test_keywords.py trains a small network by all that are coded


@pytest.mark.parametrize(
    "methods",
    [
        pytest.param(tuple(name for name in USUAL if not name.endswith("-coded") or name in CODED), id="usual"),
        pytest.param(USUAL, id="all", marks=pytest.mark.slow),
    ],
)
def test_every_method_runs(methods, folder, tmp_path):
    """Each in few steps; pruning starts dense; what cannot be reached is a row; cuts stand beside the paper's."""
    rows = compare(settings(folder, methods, (0.05,), steps=15), tmp_path)
    reached = {row.method: row for row in rows if row.value is not None}
    assert set(methods) - set(reached) == {"uniform"}
    assert all(row.microseconds > 0 for row in reached.values())
    for name in set(reached) - {"dense", "int8", "same-size"}:
        stored = from_bytes((tmp_path / reached[name].model).read_bytes()).thin.values()
        held = sum(thin.bytes for thin in stored)
        assert held == reached[name].weight_bytes
        assert 0.6 * 0.05 < held / reached["dense"].weight_bytes <= 0.05, name
        own = {"pruned-csr": "pruned", "same-size-8bit": "uniform", **dict.fromkeys(ALONE, "coded")}.get(
            name, name.replace("-8bit", " then uniform").replace("-coded", " then coded")
        )
        for thin in stored:
            vector = all(len(part.shape) == 1 for part in thin.parts.values())
            assert thin.name == ("coded" if vector else own)
            assert not vector or name.endswith("-coded")
        if name.endswith("-coded"):
            assert reached[name].bytes <= 0.05 * reached["dense"].bytes
    told = tables.cuts([replace(row, value=1 + methods.index(row.method)) for row in rows])
    head, _, *lines = told.splitlines()[1:]
    ours = ["deepthin", "deepthin-8bit"]
    assert head.split() == [
        *"rival deepthin gap deepthin-8bit gap sizes paper: TFKaldi WER paper: DeepSpeech loss".split()
    ]
    by = {line.split()[0]: line.split()[1:] for line in lines}
    rank, *values = (1 + methods.index(name) for name in ("rank", *ours))
    cut = [f"{100 * part:.1f}" for own in values for part in (1 - own / rank, (rank - own) / (rank - 1))]
    assert by["rank"] == [*cut, "1", "60.1", "28.1"]
    assert by["pruned-csr"][-2:] == ["57.0", "27.2"]


def test_spread_over_seeds_is_shown(finished):
    _, rows = finished
    doubled = [replace(row, seed=seed, value=row.value and row.value + seed) for row in rows for seed in (0, 1)]
    assert "+-0.50" in tables.summary(doubled)


def test_missing_data_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"There is no train-images-idx3-ubyte\.gz in"):
        TASKS["digits"].load(tmp_path)


def test_the_digits_that_a_package_ships():
    data = digits.load(None)
    assert {split: len(x) for split, x in data.inputs.items()} == {"train": 3500, "dev": 500, "test": 1000}
    for split, targets in data.targets.items():
        assert len(targets.unique()) == 10, split
    assert data.inputs["train"].mean().abs() < 0.05
    assert data.inputs["train"].std() == pytest.approx(1, abs=0.05)  # of the pixels of all five splits' images


def test_full_mnist(data_folder):
    from pathlib import Path

    data = digits.load(Path(data_folder))
    assert {split: len(x) for split, x in data.inputs.items()} == {"train": 55_000, "dev": 5_000, "test": 10_000}


def test_a_loss_that_is_no_number_is_named():
    """Promise 12."""
    model = digits.build(None, 6)
    inputs = torch.full((20, 784), float("nan"))
    training = Training(model=model, steps=3, lr=0.1)
    with pytest.raises(NonFiniteError, match="The loss is nan at step 0"):
        for chosen in training.batches(20, 10):
            training.minimise(torch.nn.functional.cross_entropy(model(inputs[chosen]), chosen % 10))
