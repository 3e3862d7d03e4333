"""Who may import whom: lower layers know nothing of higher ones, and no framework comes in by the back door."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "deepthin"

# docs/architecture.md, "Who may import whom": a module imports from lower levels, or from its own where that is said.
LEVELS = {
    "bits": 0,
    "huffman": 0,
    "lloyd": 0,
    "method": 1,
    "methods.binary": 2,
    "methods.ecsq": 2,
    "methods.factor": 2,
    "methods.hashed": 2,
    "methods.kmeans": 2,
    "methods.kronecker": 2,
    "methods.pruned": 2,
    "methods.scalar": 2,
    "methods.tensor_train": 2,
    "methods": 2,
    "costs": 3,
    "kernels": 3,
    "recurrent": 3,
    "report": 3,
    "rules": 3,
    "coding": 3,
    "storage": 3,
    "start": 3,
    "plans": 3,
    "names": 3,
    "torch": 4,
    "torch.product": 4,
    "torch.operators": 4,
    "torch.recurrent": 4,
    "torch.weight": 4,
    "torch.spectral": 4,
    "torch.layers": 4,
    "torch.sequential": 4,
    "torch.files": 4,
    "torch.huggingface": 4,
    "torch.importance": 4,
    "torch.compress": 4,
    "torch.twist": 4,
    "torch.allocation": 4,
    "torch.recipe": 4,
    "torch.schemes": 4,
    "torch.units": 4,
    "torch.widths": 4,
    "torch.distill": 4,
    "tensorflow": 4,
    "tensorflow.files": 4,
    "tensorflow.product": 4,
    "tensorflow.variables": 4,
    "keras": 4,
    "keras.compress": 4,
    "keras.files": 4,
    "keras.layers": 4,
    "keras.layout": 4,
    "keras.namespace": 4,
    "keras.optimizers": 4,
    "keras.tree": 4,
    "keras.weight": 4,
    "tasks": 5,
    "tasks.training": 5,
    "tasks.digits": 5,
    "tasks.acoustic": 5,
    "tasks.an4": 5,
    "tasks.conv": 5,
    "tasks.ctc": 5,
    "tasks.decoder": 5,
    "tasks.austen": 5,
    "tasks.lstm_lm": 5,
    "tasks.own": 5,
    "tasks.lenet": 5,
    "train": 5,
    "compare": 5,
    "engines": 5,
    "search": 5,
    "trial": 5,
    "teacher": 5,
    "page": 5,
    "results": 5,
    "bench": 5,
    "bench_tensorflow": 5,
    "networks": 5,
    "cli": 5,
    "__main__": 5,
}
OUTSIDE = {  # what a level may import besides the standard library
    0: {"numpy", "jaxtyping"},
    1: {"numpy", "jaxtyping"},
    2: {"numpy", "jaxtyping"},
    3: {"numpy", "jaxtyping", "safetensors"},
    4: {"numpy", "jaxtyping", "torch", "transformers", "keras", "ml_dtypes", "tensorflow"},
    5: {
        "numpy",
        "jaxtyping",
        "torch",
        "tensorflow",
        "typer",
        "rich",
        "matplotlib",
        "mlxtend",
        "safetensors",
        "optuna",
        "ray",
        "jiwer",
    },
}


def modules():
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        yield path, name.removesuffix(".__init__") if name != "__init__" else ""


def imports(path):
    """(module, whether at the top) for every import; ``from deepthin import x`` counts as deepthin.x if x is one."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_a_level():
    assert {name for _, name in modules()} - {""} == set(LEVELS)


@pytest.mark.parametrize(("path", "name"), [pytest.param(*m, id=m[1]) for m in modules() if m[1]])
def test_imports_go_downwards(path, name):
    level = LEVELS[name]
    for imported in imports(path):
        top, _, rest = imported.partition(".")
        if top == "deepthin":
            assert LEVELS.get(rest, 0) <= level, f"{name} imports {imported}, which stands above it"
            if level == 2 and name != "methods":
                assert not rest.startswith("methods"), f"{name} imports {imported}: methods do not know each other"
            frameworks = [own for own in ("torch", "keras") if name.split(".")[0] == own]
            assert not frameworks or rest.split(".")[0] not in {"torch", "keras"} - set(frameworks), (
                f"{name}: {imported}"
            )
        else:
            assert name.split(".")[0] != "keras" or top not in ("torch", "transformers"), f"{name} imports {imported}"
            assert top in sys.stdlib_module_names or top in OUTSIDE[level], f"{name} imports {imported}"


@pytest.mark.parametrize("statement", ["import deepthin", "import deepthin.cli"])
def test_no_framework_is_loaded_before_it_is_needed(statement):
    code = f"import sys; {statement}; print([m for m in ('torch', 'keras', 'tensorflow') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
