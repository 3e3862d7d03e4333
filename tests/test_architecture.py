"""Who may import whom: downward only, without circles, and no framework comes in by the back door."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "deepthin"

# docs/architecture.md, "Who may import whom": a room imports its own files and those of the rooms before it.
ROOMS = (
    "errors", "coding", "method", "methods", "kernels", "storage", "plan", "keras", "tensorflow", "torch",
    "huggingface", "testing", "lab", "tasks", "cli", "__main__",
)  # fmt: skip
# What a room may import from outside, besides the standard library; and rooms before it that it must not import.
CORE = {"numpy", "jaxtyping"}
OUTSIDE = {
    "storage": CORE | {"safetensors"},
    "keras": CORE | {"keras", "ml_dtypes", "tensorflow", "tf2onnx", "onnx", "onnxruntime"},
    "tensorflow": CORE | {"keras", "tensorflow"},
    "torch": CORE
    | {"torch", "transformers", "lightning", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "executorch"}
    | {"litert_torch", "ai_edge_litert", "safetensors"},
    "huggingface": CORE | {"torch", "transformers"},
    "testing": CORE | {"torch"},
    "lab": CORE
    | {"torch", "tensorflow", "matplotlib", "mlxtend", "optuna", "ray", "jiwer", "jinja2", "rdata", "torchao"}
    | {"soundfile"},
    "cli": CORE | {"torch", "typer", "rich", "safetensors"},
}  # fmt: skip
APART = {"torch": {"keras", "tensorflow"}, "testing": {"keras", "tensorflow"}}


def modules(source):
    """Dotted name -> path of every module under a folder, the package itself being the empty name."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        name = ".".join(path.relative_to(source).with_suffix("").parts)
        found["" if name == "__init__" else name.removesuffix(".__init__")] = path
    return found


def imports(path, known, package="deepthin"):
    """The modules of the package, and those outside, that a file imports anywhere, also within functions."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        for module, name in names:
            top, _, rest = module.partition(".")
            if top != package:
                outside.add(module)
            else:
                inside.add(longer if name and (longer := f"{rest}.{name}".lstrip(".")) in known else rest)
    return inside, outside


def graph(source):
    """Module -> the modules of the package that it imports."""
    known = modules(source)
    return {name: imports(path, known)[0] - {name} for name, path in known.items()}


def check_no_circles(source):
    """CycleError, naming the modules, where files import each other."""
    graphlib.TopologicalSorter(graph(source)).prepare()


def check_downwards(source):
    """AssertionError, naming both modules, where one imports a room that stands above its own."""
    for name, imported in graph(source).items():
        room = name.split(".")[0]
        for other in imported:
            there = other.split(".")[0]
            if name:  # the package itself gathers what users see
                assert other, f"{name} imports the package itself, which imports everything"
                assert ROOMS.index(there) <= ROOMS.index(room), f"{name} imports {other}, which stands above it"
            assert there not in APART.get(room, ()), f"{name} imports {other}: the frameworks do not know each other"


def test_no_circles():
    check_no_circles(SOURCE)


def test_imports_go_downwards():
    check_downwards(SOURCE)


def test_methods_do_not_know_each_other():
    for name, imported in graph(SOURCE).items():
        if name.startswith("methods."):
            assert not {other for other in imported if other.startswith("methods")} - {
                "methods.binary_rows",
                "methods.leading",
                "methods.lloyd",
                "methods.then",
            }, name


@pytest.mark.parametrize("room", ROOMS)
def test_only_what_a_room_is_meant_to_import_from_outside(room):
    known, allowed = modules(SOURCE), OUTSIDE.get(room, CORE)
    for name, path in known.items():
        if name.split(".")[0] == room:
            for module in imports(path, known)[1]:
                top = module.split(".")[0]
                assert top in sys.stdlib_module_names or top in allowed, f"{name} imports {module}"


def plant(tmp_path, files):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text)
    return tmp_path


def test_a_planted_circle_is_found(tmp_path):
    """Between files of one package, through a third, and where an import stands within a function."""
    source = plant(
        tmp_path,
        {
            "plan/one.py": "from deepthin.plan.two import x\n",
            "plan/two.py": "from deepthin.plan import three\n",
            "plan/three.py": "def late():\n    import deepthin.plan.one\n",
        },
    )
    with pytest.raises(graphlib.CycleError) as found:
        check_no_circles(source)
    assert {"plan.one", "plan.two", "plan.three"} == set(found.value.args[1])
    (source / "plan/three.py").write_text("x = 1\n")
    check_no_circles(source)


def test_a_planted_upward_import_is_found(tmp_path):
    source = plant(tmp_path, {"plan/one.py": "def late():\n    from deepthin.torch import x\n", "torch/two.py": ""})
    with pytest.raises(AssertionError, match=r"plan.one imports torch, which stands above it"):
        check_downwards(source)
    source = plant(tmp_path, {"plan/one.py": "", "torch/two.py": "import deepthin.keras.layers\n"})
    with pytest.raises(AssertionError, match="the frameworks do not know each other"):
        check_downwards(source)


@pytest.mark.parametrize("statement", ["import deepthin", "import deepthin.cli.main"])
def test_no_framework_is_loaded_before_it_is_needed(statement):
    code = f"import sys; {statement}; print([m for m in ('torch', 'keras', 'tensorflow') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
