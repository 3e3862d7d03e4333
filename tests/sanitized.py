"""Run tests on native code that was compiled with sanitizers: ``python tests/sanitized.py FOLDER PYTEST_ARGUMENTS``.

FOLDER holds the module that CMake built there; it takes the place of the installed one. `make sanitize` calls this.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

path = next(Path(sys.argv[1]).glob("_native*.so"))
spec = importlib.util.spec_from_file_location("deepthin._native", path)
assert spec is not None
assert spec.loader is not None
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["deepthin._native"] = module

from deepthin.kernels import products  # noqa: E402

assert products.native() is module
sys.exit(pytest.main(["-W", "ignore::pytest.PytestAssertRewriteWarning", *sys.argv[2:]]))
