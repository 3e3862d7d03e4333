"""What people are told about a comparison: points out of rows, tables, pictures."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from deepthin.errors import ConfigError
from deepthin.lab.report import figures, points, tables
from deepthin.lab.report.page import render
from deepthin.lab.rows import Row, read_rows, write_rows
from tolerance import bound

# Of each method its error at the largest size, the growth of that from size to size, and its speed over dense: made up.
LIKELY = {
    "dense": (23.6, 1.0, 1.0),
    "int8": (23.9, 1.0, 2.1),
    "deepthin": (26.8, 1.06, 6.5),
    "shuffled": (26.9, 1.07, 2.0),
    "rank": (37.0, 1.28, 7.5),
    "same-size": (28.7, 1.07, 9.0),
    "hashed": (28.9, 1.07, 0.8),
    "pruned": (25.9, 1.07, 3.1),
    "pruned-csr": (27.9, 1.09, 4.4),
    "kronecker": (25.3, 1.02, 5.2),
    "tensor-train": (24.4, 1.03, 4.9),
    "uniform": (24.0, 1.0, 1.1),
    "deepthin-8bit": (25.0, 1.03, 6.0),
    "rank-8bit": (26.1, 1.16, 7.0),
    "hashed-8bit": (26.6, 1.04, 0.8),
    "pruned-8bit": (24.8, 1.03, 3.0),
    "pruned-csr-8bit": (26.0, 1.05, 4.3),
    "kronecker-8bit": (25.2, 1.01, 5.1),
    "tensor-train-8bit": (24.6, 1.01, 4.8),
    "deepthin-4bit": (24.4, 1.04, 5.9),
}
ROUNDINGS = bound(4, 1.0, "float64")  # of a mean of two or three quotients
RATIOS = 0.0195, 0.0099, 0.0057, 0.004
DENSE_BYTES, WEIGHT_BYTES = 14_775_868, 14_700_000


def made(methods=tuple(LIKELY), ratios=RATIOS, seeds=3, task="acoustic", metrics=("frame_error", "wer"), timed=True):
    """Rows as `deepthin compare` writes them. Only int8, uniform and dense have other sizes, or do not reach these."""
    rows = []
    for method in methods:
        value, growth, faster = LIKELY[method]
        for i, ratio in enumerate({"dense": (1.0,), "int8": (0.25,)}.get(method, ratios)):
            for seed in range(seeds):
                row = {"task": task, "method": method, "ratio": ratio, "bytes": None, "dense_bytes": DENSE_BYTES}
                row |= {"seed": seed, "split": "test", "metric": metrics[0], "value": None}
                if method == "uniform":
                    rows.append({**row, "smallest_ratio": 0.03126})
                    continue
                row |= {"bytes": int(DENSE_BYTES * ratio) + 17_000, "weight_bytes": int(WEIGHT_BYTES * ratio)}
                row |= {"lr": 0.003, "allocation": "uniform-bytes", "seconds": 100.0}
                if timed:
                    row |= {"microseconds": 1500 / faster / (1 + 0.1 * i), "dense_microseconds": 1500.0}
                if method != "int8":
                    row["model"] = f"models/{method}-{ratio:g}-seed{seed}.thin"
                for split in ("dev", "test"):
                    for n, metric in enumerate(metrics):
                        scale = {"loss": 0.01}.get(metric, 1 + 0.4 * n)
                        found = scale * (value * growth**i + 0.1 * seed * (1 + i) - 0.5 * (split == "dev"))
                        rows.append({**row, "split": split, "metric": metric, "value": found})
    return [Row.from_json(row) for row in rows]


def of(method, ratio, *values, split="test", metric="error", **more):
    row = {"task": "t", "method": method, "ratio": ratio, "bytes": 10, "dense_bytes": 1000, "split": split}
    rows = [{**row, "metric": metric, "seed": seed, "value": value, **more} for seed, value in enumerate(values)]
    return [Row.from_json(row) for row in rows]


def cells(text):
    return [re.split(" {2,}", line) for line in text.splitlines()]


def test_the_seeds_of_a_method_at_a_size_are_one_point():
    rows = made(("dense", "rank", "deepthin"), ratios=(0.004, 0.0099))
    found = points.points(rows)
    assert [(p.method, p.ratio) for p in found] == [
        ("dense", 1.0), ("rank", 0.0099), ("rank", 0.004), ("deepthin", 0.0099), ("deepthin", 0.004)
    ]  # fmt: skip
    assert points.metrics(rows) == ["frame_error", "wer"]
    values = [r.value for r in rows if (r.method, r.ratio, r.metric) == ("rank", 0.004, "wer")]
    test = values[1::2]
    spread = found[2].test["wer"]
    assert (spread.mean, spread.low, spread.high) == (pytest.approx(sum(test) / 3, rel=ROUNDINGS), min(test), max(test))
    assert spread.seeds == found[2].seeds == 3
    assert found[2].times_faster == pytest.approx(7.5, rel=ROUNDINGS)


def test_the_table_has_every_metric_and_the_speed():
    head, rule, *lines = cells(tables.summary(made(("dense", "deepthin", "uniform"), ratios=(0.0195,))))
    sizes = ["method", "weights ratio", "weight bytes", "file bytes", "of dense"]
    assert head == [*sizes, "test frame error, %", "test WER, %", "microseconds", "times faster", "note"]
    assert set(*rule) == {"-"}
    assert lines == [
        ["dense", "1", "14,700,000", "14,792,868", "1.0012", "23.70 +-0.10", "33.18 +-0.14", "1,500", "1.00"],
        ["deepthin", "0.0195", "286,650", "305,129", "0.0207", "26.90 +-0.10", "37.66 +-0.14", "231", "6.50"],
        ["uniform", "0.0195", "not reachable: smallest ratio 0.03126"],
    ]


def test_columns_that_would_be_empty_are_left_out():
    head, *_ = cells(tables.summary(of("dense", 1.0, 20.0)))
    assert head == ["method", "weights ratio", "file bytes", "of dense", "test error, %"]


def test_what_failed_is_told_and_the_other_seeds_count():
    (lost,) = of("rank", 0.1, None, failed="The loss is nan at step 3")
    lost = replace(lost, bytes=None)
    (point,) = points.points([lost, replace(lost, seed=1)])
    assert point.note == "failed: The loss is nan at step 3"
    (point,) = points.points([lost, *of("rank", 0.1, 1.0, 2.0, 3.0)[1:]])
    assert (point.note, point.file_bytes, point.seeds) == ("1 failed", 10, 2)
    assert "2.50 +-0.50" in tables.summary([lost, *of("rank", 0.1, 1.0, 2.0, 3.0)[1:]])


@pytest.mark.parametrize(
    ("metric", "values", "told"),
    [
        ("wer", (12.0, 13.0), "12.50 +-0.50"),
        ("wer", (12.0,), "12.00"),
        ("loss", (0.41, 0.43), "0.4200 +-0.0100"),
        ("loss", (1.41, 1.43), "1.420 +-0.010"),
        ("of_mine", (1234.5,), "1234"),
        ("of_mine", (0.0, 0.0), "0.000 +-0.000"),
    ],
)
def test_values_have_the_digits_of_their_unit(metric, values, told):
    (point,) = points.points(of("rank", 0.1, *values, metric=metric))
    assert point.test[metric].text(metric) == told


def test_the_best_file_is_of_the_best_configuration_not_of_the_luckiest_seed():
    rows = [
        *of("dense", 1.0, 1.0, 1.0, split="dev"),
        *of("int8", 0.25, 2.0, 2.0, split="dev"),
        *of("rank", 0.1, 3.0, 9.0, split="dev", model="lucky"),
        *of("deepthin", 0.1, 5.0, 4.0, split="dev", model="best"),
        *of("deepthin", 0.1, 0.0, 0.0, split="dev", metric="wer"),
        *of("rank", 0.1, 0.0, 0.0, split="test"),
    ]
    best = points.best_thin(rows)
    assert (best.model, best.seed, best.value) == ("best", 1, 4.0)
    assert points.best_thin(rows[:4]) is None
    assert points.best_thin([]) is None


def test_cuts_and_gaps_are_means_over_the_sizes_that_both_reach():
    rows = [
        *of("dense", 1.0, 10.0),
        *of("deepthin", 0.1, 14.0),
        *of("deepthin", 0.2, 12.0),
        *of("deepthin-8bit", 0.2, 11.0),
        *of("rank", 0.1, 20.0),
        *of("rank", 0.2, 16.0),
        *of("int8", 0.25, 11.0),
        *of("hashed", 0.1, 9.0),  # better than dense: there is no gap to close
    ]
    found = tables.compared(points.points(rows), "error")
    assert list(found) == ["rank", "hashed", "deepthin", "deepthin-8bit"]
    cut = found["rank"]["deepthin"]
    assert cut.cut == pytest.approx((6 / 20 + 4 / 16) / 2, rel=ROUNDINGS)
    assert cut.closed == pytest.approx((6 / 10 + 4 / 6) / 2, rel=ROUNDINGS)
    assert found["hashed"]["deepthin"].closed is None
    about, head, _, *lines = tables.cuts(rows).splitlines()
    assert about == (
        "Reduction of test error by DeepThin relative to each rival, %, "
        "and the part of the rival's gap to dense that this closes, %"
    )
    ours = ["deepthin", "gap", "deepthin-8bit", "gap"]
    assert cells(head) == [["rival", *ours, "sizes", "paper: TFKaldi WER", "paper: DeepSpeech loss"]]
    assert [line.split() for line in lines] == [
        ["rank", "27.5", "63.3", "31.2", "83.3", "2/1", "60.1", "28.1"],
        ["hashed", "-55.6", "1", "6.1", "12.2"],
        ["deepthin", "8.3", "50.0", "1"],
        ["deepthin-8bit", "-9.1", "-100.0", "1"],
    ]


def test_every_metric_has_its_table_of_cuts():
    told = tables.cuts(made(("dense", "rank", "deepthin"), task="ctc", metrics=("loss", "wer", "wer_greedy")))
    assert [line for line in told.splitlines() if line.startswith("Reduction")] == [
        f"Reduction of test {name} by DeepThin relative to each rival, %, "
        "and the part of the rival's gap to dense that this closes, %"
        for name in ("loss", "WER", "greedy WER")
    ]
    assert tables.cuts(made(("dense", "rank"))) == ""
    assert tables.cuts(made(("dense", "deepthin"))) == ""


def test_pictures_of_every_metric_and_of_the_latency(tmp_path):
    rows = made(seeds=2, task="a/b", metrics=("error", "my metric"))
    files = figures.draw(rows, tmp_path)
    assert [file.name for file in files] == ["a_b.png", "a_b-my_metric.png", "a_b-latency.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 20_000 for file in files)


def test_pictures_of_little(tmp_path):
    """One method, errors of nothing, no time: what a first short run gives."""
    assert len(figures.draw(of("rank", 0.1, 0.0, 0.0), tmp_path)) == 1
    assert len(figures.draw(made(("dense", "uniform"), timed=False, metrics=("error",)), tmp_path)) == 1
    assert len(figures.draw(made(("uniform",), metrics=("error",)), tmp_path)) == 1


@pytest.mark.parametrize("name", ["acoustic", "ctc", "lenet"])
def test_results_of_earlier_versions_are_read_drawn_and_written_as_they_were(name, tmp_path):
    path = Path(__file__).parent.parent / "docs" / "results" / name / "results.json"
    rows = read_rows(path)
    write_rows(rows, tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(path.read_text())
    assert [list(row.to_json()) for row in rows] == [list(row) for row in json.loads(path.read_text())]
    page = render(rows, {"task": name, "steps": 1, "data": ""}, {}, "")
    assert page.count("<h2>") == 6
    assert {row.method for row in rows} <= set(re.findall(r'data-value="([\w-]+)"', page))
    assert tables.cuts(rows)


def test_a_row_has_bytes_and_value_always_and_other_fields_where_they_apply():
    (row,) = of("rank", 0.1, None, smallest_ratio=0.2)
    assert row.to_json() == {
        "task": "t", "method": "rank", "ratio": 0.1, "bytes": 10, "weight_bytes": None, "dense_bytes": 1000, "seed": 0,
        "split": "test", "metric": "error", "value": None, "smallest_ratio": 0.2,
    }  # fmt: skip
    assert Row.from_json({**row.to_json(), "of_a_later_version": 1}) == row


def test_a_row_that_lacks_what_every_row_has_is_damage():
    with pytest.raises(
        ConfigError, match=r"^A row of results.json lacks split, value: remove the file to begin anew.$"
    ):
        Row.from_json({k: v for k, v in of("rank", 0.1, 1.0)[0].to_json().items() if k not in ("split", "value")})
