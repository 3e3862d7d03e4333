"""Every header of the native code includes what it uses: it compiles alone, at each width of the kernels."""

import os
import re
import shutil
import subprocess
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
WIDTHS = {"as it stands": [], "4": ["-DDEEPTHIN_WIDTH=4", "-DDEEPTHIN_TILE=12"]}
WIDTHS["16"] = ["-DDEEPTHIN_WIDTH=16", "-DDEEPTHIN_TILE=24"]

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(not CSRC.is_dir(), reason="the sources of the native code are not here"),
]


def _includes_nanobind(header: str) -> bool:
    """Whether a header includes nanobind's, itself or by another header of the sources."""
    includes = re.findall(r'#include ["<]([^">]+)[">]', (CSRC / header).read_text())
    return any(
        name.startswith("nanobind/") or ((CSRC / name).is_file() and _includes_nanobind(name)) for name in includes
    )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("header", sorted(path.name for path in CSRC.glob("*.h")))
def test_a_header_compiles_alone(header, width, tmp_path):
    command = [COMPILER, "-std=c++20", "-fsyntax-only", f"-I{CSRC}", *WIDTHS[width]]
    if _includes_nanobind(header):
        spec = find_spec("nanobind")
        if spec is None or not spec.submodule_search_locations:
            pytest.skip("nanobind is not installed")
        include = Path(spec.submodule_search_locations[0]) / "include"
        command += [f"-isystem{include}", f"-isystem{sysconfig.get_path('include')}"]
    alone = tmp_path / "alone.cpp"
    alone.write_text(f'#include "{header}"\n')
    done = subprocess.run([*command, str(alone)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_header_that_lacks_an_include_is_found(tmp_path):
    """The check itself: what symbols.h was like."""
    (tmp_path / "lacking.h").write_text("#pragma once\ninline std::vector<int> none() { return {}; }\n")
    (tmp_path / "alone.cpp").write_text('#include "lacking.h"\n')
    done = subprocess.run(
        [COMPILER, "-std=c++20", "-fsyntax-only", str(tmp_path / "alone.cpp")], capture_output=True, text=True
    )
    assert done.returncode != 0
