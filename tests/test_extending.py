"""The page on extending the library, run from its first line to its last."""

import json
import re
import sys
from pathlib import Path

import pytest

from deepthin import METHODS
from deepthin.lab.tasks import TASKS
from deepthin.torch.exchange import THIN

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
BLOCK = re.compile(r"^```(\w+)(?: title=\"(.+?)\")?\n(.*?)^```$", re.M | re.S)
BLOCKS = BLOCK.findall(PAGE.read_text())


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("DEEPTHIN_DATA", raising=False)
    for table in (METHODS, THIN, TASKS):
        for key in list(table):
            monkeypatch.setitem(table, key, table[key])
    yield tmp_path
    METHODS.pop("additive", None)
    for layer in [layer for layer in THIN if layer.__name__ == "Gate"]:
        del THIN[layer]
    TASKS.pop("rings", None)
    sys.modules.pop("rings", None)


def test_every_block_of_the_page_is_of_a_kind_that_is_run():
    assert [kind for kind, _, _ in BLOCKS] == ["python"] * 6 + ["console", "python", "console"]
    assert PAGE.read_text().count("```") == 2 * len(BLOCKS)


def test_every_step_of_the_page(here, command_line):
    names = {"__name__": "extending"}
    for place, (kind, title, text) in enumerate(BLOCKS):
        if title:
            (here / title).write_text(text)
        elif kind == "python":
            exec(compile(text, f"docs/extending.md, block {place + 1}", "exec"), names)
        else:
            code, printed, said = command_line(*text.split()[1:])
            assert code == 0, printed + said
    assert METHODS["additive"].cls is names["Additive"]
    assert THIN[names["Gate"]] is names["ThinGate"]
    assert (here / "additive.thin").stat().st_size < 1500
    for folder in ("rings", "named"):
        rows = json.loads((here / "runs" / folder / "results.json").read_text())
        assert {row["method"] for row in rows} >= {"dense", "deepthin"}
        assert all(0 <= row["value"] <= 100 for row in rows if row["metric"] == "error" and row["value"] is not None)
