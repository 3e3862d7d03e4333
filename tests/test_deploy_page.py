"""Every command and example of the page on other runtimes."""

import importlib.util
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from deepthin.cli.main import main

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "deploy.md"


@pytest.mark.filterwarnings("ignore")  # of the exporters, about themselves
def test_commands_and_examples_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_network", raising=False)
    shutil.copy(DOCS / "own_network.py", tmp_path)
    blocks = re.findall(r"```(\w+)[^\n]*\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [kind for kind, _ in blocks] == ["toml", "bash", "python", "python", "bash"]
    (tmp_path / "digits.toml").write_text(blocks[0][1])
    commands = blocks[1][1]
    assert "--steps 600 " in commands
    for line in commands.replace("--steps 600 ", "--steps 60 ").strip().splitlines():
        monkeypatch.setattr("sys.argv", shlex.split(line))
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
    shown = capsys.readouterr().out
    assert re.search(r"onnx: [\d,]+ bytes", shown)
    assert "dense " in shown
    for _, example in blocks[2:4]:
        exec(compile(example, PAGE.name, "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.startswith("(5, 10)\n")
    assert (tmp_path / "again.onnx").stat().st_size < 1.05 * (tmp_path / "digits.onnx").stat().st_size
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return
    for line in blocks[4][1].strip().splitlines():
        if "wasm" in line and not (importlib.util.find_spec("ziglang") and shutil.which("node")):
            continue
        if line.startswith("make"):
            subprocess.run(shlex.split(line), check=True, capture_output=True)
            continue
        monkeypatch.setattr("sys.argv", shlex.split(line))
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
    assert re.search(r"arena [\d,]+ bytes of RAM", capsys.readouterr().out)
    assert (tmp_path / "digits_c" / "digits").is_file()
