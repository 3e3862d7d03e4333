"""`make figures`: it runs the benchmark, and its tables take the place of those in the page."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "benchmarks" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_a_place_for_every_table(figures):
    page = (ROOT / "docs" / "performance.md").read_text()
    for part in figures.PARTS.values():
        for title in part.tables:
            text = figures.replaced(page, title, "| new |")
            assert f"<!-- figures: {title} -->\n\n| new |\n\n<!-- end -->" in text
            assert figures.replaced(text, title, "| new |") == text
    with pytest.raises(ValueError, match="no <!-- figures: other --> that is followed by <!-- end -->"):
        figures.replaced(page, "other", "")


def test_a_part_is_measured_and_written(figures, tmp_path, monkeypatch, capsys):
    run = figures.Run("modules-1", "modules --rows 64 --cols 48 --ratios 0.4,0.0001 --batch 2", 5)
    chart = figures.Run("train", "train --rows 64 --cols 48 --ratios 0.4 --batch 2", 5, "train.png")
    part = figures.Part((run, chart), {"modules": lambda rows: f"{len(rows['modules-1'])} and {len(rows['train'])}"})
    monkeypatch.setitem(figures.PARTS, "small", part)
    page = tmp_path / "page.md"
    (tmp_path / "figures").mkdir()
    page.write_text("Before.\n<!-- figures: modules -->\nold\n<!-- end -->\nAfter.\n")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    words = ["--parts", "small", "--repeats", "1", "--out", str(tmp_path / "rows"), "--page", str(page)]
    figures.main(words)
    text = page.read_text()
    assert text.startswith("Before.\n<!-- figures: modules -->\n\n2 and 1\n\n*")
    assert text.endswith("*\n\n<!-- end -->\nAfter.\n")
    assert figures.machine() in text
    assert (tmp_path / "figures" / "train.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "rows" / "train.json").read_text())[0]["microseconds"] > 0
    assert "2 and 1" in capsys.readouterr().out


def test_tables_say_how_many_times_faster(figures):
    row = {"ratio": 0.04, "batch": 1, "rank": 1, "n": 7, "microseconds": 10.0, "thin_coded_microseconds": 12.5}
    row |= {"dense_microseconds": 1000.0, "best_dense_microseconds": 500.0, "int8_microseconds": 50.0}
    small = {"ratio": 0.0099, "batch": 1, "rank": 1, "microseconds": None}
    kinds = {name: [] for name in ("modules-4", "acoustic-1", "acoustic-4")}
    text = figures.of_modules({"modules-1": [small, row], **kinds})
    assert text.splitlines()[2:] == ["| a layer, 2048 x 2048 | 1 | .04 | 1 | 10 /  / 12 | 80 | 40 |  | 4.0 |  |"]
    row |= {"decoded_microseconds": 900.0, "layer_microseconds": 20.0}
    text = figures.of_ranks({f"{case}-{rank}": [row] for case in ("linear", "tfkaldi") for rank in (2, 4, 8)})
    assert text.splitlines()[2:4] == [
        "| 2 | .04 | 50 / 50 | too small / too small | too small / too small | too small / too small | 45 |",
        f"| 2 | .0195 | {' | '.join(['too small / too small'] * 4)} |  |",
    ]
    trained = {"train-acoustic": [row, small], "train-acoustic-4": [], "train-lstm-4": []}
    assert figures.of_training(trained).splitlines()[2:] == [
        "| `acoustic`, batch 128, with Adam | 1 | .04 | 1.0 | 100 | 80 |"
    ]
