"""The example of the page on training to a size."""

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "rate.md"


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert example
    exec(compile(example[1], str(PAGE.name), "exec"), {"__name__": "example"})
    size = (tmp_path / "small.thin").stat().st_size
    assert capsys.readouterr().out.strip() == str(size)
    assert 0.97 * 2500 <= size <= 2500
