"""The reader of flat files refuses changed files, or they run within their memory; the fuzzer finds wrong checks."""

import itertools
import re
import shutil

import pytest

import runtime_seeds
from deepthin.errors import ConfigError
from deepthin.torch.export.native.flat import OPERATORS
from deepthin.torch.export.native.functions import FUNCTIONS, PAIRS
from deepthin.torch.export.native.matrix import Kind, Use
from deepthin.torch.export.native.runtime import compiler
from runtime_fuzz import CORPUS, LANES, RUNTIME, compiled, fuzzed

FILES, MANY = 5_000, 1_000_000


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory):
    """Refuses machines whose compiler lacks the sanitizers."""
    place = tmp_path_factory.mktemp("sanitizers")
    (place / "fuzz.c").write_text("int main(void) { return 0; }\n")
    (place / "dt.c").write_text("typedef int no_empty_file;\n")
    try:
        compiler()
    except ConfigError as error:
        pytest.skip(str(error))
    if errors := compiled(place / "none", source=place):
        pytest.skip(f"the C compiler has no sanitizers: {errors[:200]}")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return runtime_seeds.write(tmp_path_factory.mktemp("seeds"))


@pytest.fixture(scope="module", params=LANES)
def program(request, tmp_path_factory, sanitizers):
    target = tmp_path_factory.mktemp("fuzz") / "fuzz"
    assert compiled(target, LANES[request.param]) == ""
    return target


def run(program, files, seed, findings, seeds):
    """The fuzzer without finds: how many files it accepted and ran."""
    made = fuzzed(program, files, seed, findings, seeds)
    assert made.returncode == 0, made.stderr[-5000:]
    accepted, ran = map(int, re.findall(r"(\d+) accepted, (\d+) run", made.stdout)[0])
    return accepted, ran


def test_the_seeds_have_everything():
    calls = [call for program in runtime_seeds.programs().values() for call in program.calls]
    assert {call.name for call in calls} == set(OPERATORS)
    functions = {call.arguments[0] for call in calls if call.name == "map"}
    assert functions == set(range(len(FUNCTIONS)))
    assert {call.arguments[0] for call in calls if call.name == "pair"} == set(range(len(PAIRS)))
    assert {call.arguments[0] for call in calls if call.name == "recurrent"} == set(range(4))
    assert {call.arguments[0] for call in calls if call.name == "reduce"} >= {1, 2, 3}
    assert {call.arguments[0][-1] > 1 for call in calls if call.name == "conv"} == {False, True}
    products = {(call.arguments[0].kind, call.arguments[3]) for call in calls if call.name == "linear"}
    assert products >= set(itertools.product(Kind, (Use.ONCE, Use.PACKED)))
    assert {call.arguments[0].kind for call in calls if call.name == "embedding"} == set(Kind)


def test_valid_files_run(program, seeds, tmp_path):
    assert run(program, 0, 0, tmp_path, seeds) == (len(seeds), len(seeds))


def test_changed_files(program, seeds, tmp_path):
    accepted, ran = run(program, FILES, 0, tmp_path, seeds)
    assert ran > FILES / 5  # many changes are harmless
    assert accepted < FILES  # and many are not


@pytest.mark.slow
def test_a_million_changed_files(program, seeds, tmp_path):
    run(program, MANY, 1, tmp_path, seeds)


def test_what_was_found_before(program, tmp_path):
    found = sorted(CORPUS.glob("*.dtm"))
    assert found
    run(program, 0, 0, tmp_path, found)


CHECKS = {  # of dt_file.c, and what each becomes
    "place": ("place[1] + floats <= size", "place[1] + floats <= size + 1"),
    "index": ("index >= many[space]", "index > many[space]"),
    "array": ("first + entries <= (arrays", "first + entries <= 1 + (arrays"),
    "windows": ("times(w[12], rank)", "times(w[12] - 1, rank)"),
    "scratch": ("2 * (uint64_t)width, 1", "(uint64_t)width, 1"),
    "product": ("high >= rows && wide >= cols", "1"),
}


@pytest.mark.parametrize(
    "check", [check if check in ("place", "index") else pytest.param(check, marks=pytest.mark.slow) for check in CHECKS]
)
def test_the_fuzzer_finds_a_wrong_check(check, sanitizers, seeds, tmp_path):
    right, wrong = CHECKS[check]
    for name in ("dt.h", "dt.c", "dt_file.c", "fuzz.c"):
        shutil.copyfile(RUNTIME / name, tmp_path / name)
    source = (tmp_path / "dt_file.c").read_text()
    assert source.count(right) == 1
    (tmp_path / "dt_file.c").write_text(source.replace(right, wrong))
    assert compiled(tmp_path / "fuzz", LANES["without vectors"], tmp_path) == ""
    made = fuzzed(tmp_path / "fuzz", 10 * FILES, 0, tmp_path, seeds, symbols=False)
    assert made.returncode == 1
    assert "AddressSanitizer" in made.stderr
