"""The command line as a user meets it: exit codes, one clear line, files written."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import deepthin
from deepthin.cli import laboratory
from deepthin.kernels import products
from deepthin.lab import trial
from deepthin.lab.bench import competitors, networks, shown
from deepthin.lab.bench import modules as bench_modules
from deepthin.lab.bench import run as bench_run

FACTORY = """
import torch
from torch import nn
def net():
    return nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 10))
class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.odd = nn.Parameter(torch.zeros(9, 9))
def conv():
    return nn.Sequential(Odd(), nn.Linear(60, 10))
def number():
    return 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "factories.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DEEPTHIN_DATA", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("factories", None)


@pytest.fixture
def run(here, command_line):
    return command_line


def test_plan(run, here):
    code, out, _ = run("plan", "--model", "factories:net", "--ratio", "0.1", "--json", "plan.json")
    assert code == 0
    assert out.splitlines()[2].startswith("0.weight          deepthin     60x40")
    plan = json.loads((here / "plan.json").read_text())
    assert plan["total_bytes"] == sum(r["bytes"] for r in plan["rows"]) + plan["other_bytes"] + plan["header_bytes"]


@pytest.mark.filterwarnings("always:The relative error")
def test_compress_then_inspect(run, here):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 10))
    save_file(network.state_dict(), here / "dense.safetensors")
    torch.save(network.state_dict(), here / "dense.pt")
    (here / "thin.toml").write_text('[model]\nratio = 0.1\n[rules."*"]\nmethod = "rank"\n')
    for weights in ("dense.safetensors", "dense.pt"):
        code, out, err = run(
            *f"compress --model factories:net --weights {weights} --config thin.toml --out {weights}.thin".split()
        )
        assert code == 0
        assert f"wrote {weights}.thin: {(here / f'{weights}.thin').stat().st_size:,} bytes" in out
        assert "warning: The relative error of" in err
    assert (here / "dense.pt.thin").read_bytes() == (here / "dense.safetensors.thin").read_bytes()
    code, out, _ = run("inspect", "dense.pt.thin", "--json", "report.json")
    assert code == 0
    assert "n=40 rank=" in out
    assert json.loads((here / "report.json").read_text())["total_bytes"] == (here / "dense.pt.thin").stat().st_size
    assert set(deepthin.load(here / "dense.pt.thin")) == set(network.state_dict())
    code, out, _ = run("convert", "dense.pt.thin", "first.thin", "--format", "1")
    assert code == 0
    assert f"wrote first.thin: {(here / 'first.thin').stat().st_size:,} bytes, version 1" in out
    code, out, _ = run("convert", "first.thin", "second.thin")
    assert code == 0
    assert (here / "second.thin").read_bytes() == (here / "dense.pt.thin").read_bytes()


def test_convert_shows_an_example(run):
    code, out, _ = run("convert", "--help")
    assert code == 0
    assert "Example: deepthin convert old.thin new.thin" in out.replace("`", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "--model", "factories:nett", "--ratio", "0.1"], "'factories' has no 'nett'"),
        (["plan", "--model", "nowhere:net", "--ratio", "0.1"], "cannot import 'nowhere'"),
        (["plan", "--model", "factories", "--ratio", "0.1"], "write package.module:function"),
        (["plan", "--model", "factories:number", "--ratio", "0.1"], "returned int, not a torch.nn.Module"),
        (["plan", "--model", "factories:net"], "Give either --config FILE or --ratio NUMBER."),
        (["plan", "--model", "factories:net", "--ratio", "2"], "[model] ratio = 2.0 must be above 0 and at most 1."),
        (["plan", "--model", "factories:conv", "--ratio", "0.1"], "0.odd: Odd has no thin version"),
        (["plan", "--model", "factories:net", "--ratio", "1e-9"], "Use [model] ratio >= "),
        (["plan", "--model", "factories:net", "--config", "none.toml"], "There is no configuration file 'none.toml'"),
        (["inspect", "none.thin"], "No such file or directory: 'none.thin'"),
        (["inspect", "factories.py"], "factories.py is damaged, or no .thin file"),
        (["convert", "factories.py", "o"], "factories.py is damaged, or no .thin file"),
        (["convert", "none.thin", "o"], "No such file or directory: 'none.thin'"),
        (["compare", "digit"], "There is no task 'digit'. Did you mean 'digits'?"),
        (["compare", "digits", "--methods", "depthin"], "There is no method 'depthin'. Did you mean 'deepthin'?"),
        (["compare", "digits", "--ratios", "a"], "--ratios 'a' must be numbers separated by commas"),
        (["compare", "digits", "--ratios", "2"], "--ratios '2' must lie between 0 and 1"),
        (["compare", "digits", "--data", "."], "--data must hold MNIST's IDX files"),
        (["bench", "linaer"], "There is no case 'linaer'. Did you mean 'linear'?"),
        (["bench", "linear", "--batch", "x"], "--batch 'x' must be integers >= 1"),
        (["bench", "linear", "--rank", "2,0"], "--rank '2,0' must be integers >= 1"),
        ("compress --model factories:net --weights factories.py --out o --ratio .1".split(), "cannot be read"),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_line_and_exit_code_2(run, words, message):
    code, out, err = run(*words)
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("error: ")


def test_weights_that_do_not_fit_are_named(run, here):
    save_file({"0.weight": torch.zeros(3, 3)}, here / "odd.safetensors")
    code, _, err = run(
        "compress", "--model", "factories:net", "--weights", "odd.safetensors", "--ratio", ".1", "--out", "o"
    )
    assert code == 2
    assert "do not fit --model" in err
    assert "size mismatch for 0.weight" in err
    assert not (here / "o").exists()


@pytest.mark.parametrize("command", ["plan", "compress", "inspect", "compare", "bench"])
def test_help_teaches_with_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Example:" in out
    assert "--json" in out


def test_compare_prints_the_table_and_names_the_report_last(run, here):
    words = (
        "compare",
        "digits",
        "--methods",
        "dense,deepthin",
        "--ratios",
        "0.02",
        "--steps",
        "20",
        "--out",
        "o",
        "--json",
        "r.json",
    )
    code, out, err = run(*words)  # fmt: skip
    assert code == 0
    assert out.splitlines()[-1] == "Report: o/report.html"
    assert "Every file was loaded into a new model" in out
    assert "running deepthin-0.02-seed0, 20 steps" in err
    assert (here / "r.json").read_text() == (here / "o" / "results.json").read_text()
    code, _, err = run(*words)
    assert code == 0
    assert "running" not in err


def test_compare_without_matplotlib_says_so_first(run, monkeypatch):
    monkeypatch.setattr(laboratory, "find_spec", lambda _: None)
    code, _, err = run("compare", "digits")
    assert code == 2
    assert "pip install 'deepthin[compare]'" in err


def test_bench_writes_its_rows(run, here):
    _, out, _ = run(*"bench train --rows 256 --cols 200 --ratios 0.1,0.001 --batch 4 --repeats 2 --out b.json".split())
    rows = json.loads((here / "b.json").read_text())
    assert [row["microseconds"] is None for row in rows] == [False, True]
    named = "case rows cols batch ratio n rank microseconds dense_microseconds best_dense_microseconds threads isa"
    assert rows[0].keys() >= set(named.split())
    assert "smallest ratio" in out
    assert (here / "b.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("case", ["linear", "train", "modules", "gru"])
def test_bench_of_other_methods(case, run, here, monkeypatch):
    monkeypatch.setattr(networks, "STEPS", 5)
    options = "--rows 48 --cols 40 --ratios 0.2 --batch 2 --repeats 1 --methods kronecker,tensor-train --out b.json"
    _, out, _ = run("bench", case, *options.split())
    (row,) = json.loads((here / "b.json").read_text())
    assert all(row[f"{name}_microseconds"] > 0 for name in ("kronecker", "tensor_train"))
    assert "kronecker, us" in out
    assert "tensor-train, us" in out


def test_bench_of_a_layer_times_every_rival_warm_and_cold():
    (row,) = bench_run.run("linear", (64, 96), (0.2,), (2,), ranks=(1,), threads=1, repeats=2)
    for temperature in ("", "cold_"):
        times = {
            name: row.times[f"{temperature}{name}_microseconds"] for name in ("dense", "packed", "best_dense", "rank")
        }
        assert times["best_dense"] == min(times["dense"], times["packed"])
        assert all(time > 0 for time in times.values())
        assert all(row.times[f"{temperature}{name}_microseconds"] > 0 for name in ("uniform_8bit", "kmeans_4bit"))
        if products.native_available:
            assert row.times[f"{temperature}microseconds"] > 0
            assert row.times[f"{temperature}layer_microseconds"] > 0
            assert row.times[f"{temperature}csr_microseconds"] > 0
    assert "best dense, cold" in shown.summary([row])


def test_bench_of_the_papers_network_draws_its_table(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_run, "TFKALDI", ((40, 30), (50, 40), (20, 50)))
    rows = bench_run.run("tfkaldi", (1, 1), (0.2, 0.1), (1, 3), ranks=(1,), threads=1, repeats=1)
    assert [(row.batch, row.ratio) for row in rows] == [(1, 0.2), (1, 0.1), (3, 0.2), (3, 0.1)]
    assert all(row.microseconds > 0 and row.rows == 20 and row.cols == 30 for row in rows)
    assert shown.draw(rows, tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_bench_of_several_ranks_times_the_decoded_weight(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_run, "TFKALDI", ((40, 30), (50, 40), (20, 50)))
    rows = bench_run.run("tfkaldi", (1, 1), (0.001, 0.3, 0.2), (1, 2, 3), ranks=(1, 2), threads=1, repeats=1)
    assert len({(row.rank, row.batch, row.ratio) for row in rows}) == len(rows) == 18
    assert all(row.times["decoded_microseconds"] > 0 for row in rows if row.ratio > 0.1)
    assert "decoded" in shown.summary(rows)
    assert shown.draw(rows, tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_the_decoded_competitor_computes_what_the_thin_network_does():
    shapes = ((40, 30), (20, 40))
    model, _ = competitors.thin_network(competitors.network(shapes), 0.3, 2)
    x = torch.randn(3, 30)
    with torch.no_grad():
        torch.testing.assert_close(competitors.decoded_competitor(shapes, x, model).work(), model(x))


@pytest.mark.parametrize("case", ["lstm", "gru", "deepspeech", "train-lstm", "train-acoustic"])
def test_bench_of_recurrent_networks(case, monkeypatch, tmp_path):
    monkeypatch.setattr(networks, "UNITS", 32)
    monkeypatch.setattr(networks, "STEPS", 12)
    monkeypatch.setattr(networks.ctc, "WIDTH", 24)
    monkeypatch.setattr(networks.acoustic, "WIDTH", 24)
    rows = bench_run.run(case, (32, 24), (0.3, 0.0001), (2,), ranks=(1,), threads=1, repeats=2)
    assert [row.microseconds is None for row in rows] == [False, True]
    assert rows[0].times["dense_microseconds"] > 0
    assert rows[0].times["rank_microseconds"] > 0
    assert (rows[0].times["int8_microseconds"] is None) == case.startswith("train")
    assert (rows[0].times["thin_coded_microseconds"] is not None) == case.startswith("train")
    assert "smallest ratio" in shown.summary(rows)
    if not rows[0].times["int8_microseconds"]:
        return
    built, whole = [], networks.whole(case, (32, 24), 2)
    monkeypatch.setattr(bench_run, "quantised", lambda model: built.append(trial.quantised(model)) or built[-1])
    bench_run._measure_whole(case, whole, (0.3,), 2, 1, 1, 1, lambda *_: None)
    assert any("quantized" in type(module).__module__ for module in built[0].modules())
    assert shown.draw(rows, tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("case", ["modules", "acoustic"])
def test_bench_of_modules_times_every_kind_of_factors(case, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_run, "ACOUSTIC", ((64, 40), (40, 64)))
    monkeypatch.setattr(bench_modules, "_torchao", lambda dense, x: dense)
    rows = bench_run.run(case, (64, 96), (0.4, 0.0001), (2,), ranks=(2,), threads=1, repeats=2)
    assert [row.microseconds is None for row in rows] == [False, True]
    kinds = ("layer", "dense", "packed", "best_dense", "torchao_int8", "thin_8bit", "thin_coded")
    assert all(rows[0].times[f"{kind}_microseconds"] > 0 for kind in kinds)
    assert rows[0].microseconds == rows[0].times["layer_microseconds"]  # the module, not the bare kernel
    assert not any(name.startswith("cold_") for name in rows[0].times)
    told = shown.summary(rows)
    assert "8bit, us" in told
    assert "coded, us" in told
    assert "smallest ratio" in told
    assert shown.draw(rows, tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_bench_takes_torchao_as_it_is_where_nothing_compiles(monkeypatch):
    pytest.importorskip("torchao")
    dense, x = torch.nn.Sequential(torch.nn.Linear(64, 32)).eval(), torch.randn(2, 64)

    def compile_(model, **options):
        def fails(x):
            raise RuntimeError("no compiler")

        return fails

    monkeypatch.setattr(torch, "compile", compile_)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = bench_modules._torchao(dense, x)
    assert type(quantised[0].weight) is not torch.nn.Parameter
    assert (quantised(x) - dense(x)).norm() < 0.05 * dense(x).norm()


def test_bench_says_where_there_are_no_kernels(here):
    command = [
        sys.executable,
        "-m",
        "deepthin",
        *"bench linear --rows 64 --cols 64 --ratios 0.2 --batch 2 --repeats 1".split(),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "DEEPTHIN_ISA": "none"}, check=True
    )
    assert done.stderr.count("No native kernels") == 1
    assert "instruction set none" in done.stdout


def test_the_installed_command():
    done = subprocess.run([sys.executable, "-m", "deepthin", "--help"], capture_output=True, text=True, check=True)
    assert "compare" in done.stdout


def test_a_size_in_bytes_with_coded_rules(run, here):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 10))
    save_file(network.state_dict(), here / "dense.safetensors")
    (here / "coded.toml").write_text('[model]\nfile_bytes = 1500\n[rules."*"]\nmethod = "coded"\n')
    code, out, _ = run("plan", "--model", "factories:net", "--config", "coded.toml")
    assert code == 0
    assert "upper bounds: a training with SizeTarget decides" in out
    assert "1,500 bytes" in out
    arguments = ("--weights", "dense.safetensors", "--config", "coded.toml", "--out", "m.thin")
    code, out, _ = run("compress", "--model", "factories:net", *arguments)
    assert code == 0
    size = (here / "m.thin").stat().st_size
    assert 1300 < size <= 1500
    assert f"{size:,}" in out.splitlines()[-2]  # the report's total, of the file as it was written
