"""Shapes in signatures are checked by the laws' tests, and by all with ``--shapes``; users pay nothing for them."""

import functools
import os
import sys
import typing
import warnings

import jaxtyping
import pytest
from hypothesis import settings

SHAPED = (
    "coding.bits",
    "methods.binary",
    "methods.ecsq",
    "methods.factor",
    "methods.hashed",
    "methods.kmeans",
    "methods.kronecker",
    "methods.pruned",
    "methods.scalar",
    "methods.tensor_train",
    "lab.tasks.acoustic",
    "lab.tasks.an4",
    "lab.tasks.conv",
    "lab.tasks.ctc",
    "lab.tasks.decoder",
    "torch.importance",
    "torch.surgeon",
    "torch.product",
    "torch.operators",
    "torch.recurrent",
    "torch.operand",
    "torch.weight",
    "torch.layers",
    "torch.recurrent_layers",
)  # what has shapes in signatures, but for lloyd, whose small functions are called too often
OFTEN = ("coding.huffman",)  # as often by ecsq, whose laws would take twice as long: with --shapes alone
if sys.version_info < (
    3,
    12,
):  # which keeps a protocol's attributes; before, each check of a ``Namespace`` lists them anew
    typing._get_protocol_attrs = functools.lru_cache(None)(typing._get_protocol_attrs)
LONGEST = (
    "test_engines.py",
    "test_twist_resume.py",
    "test_distill.py",
    "test_kills.py",
    "test_wrapped.py",
    "test_ecosystem.py",
    "test_size_target.py",
)  # begin first, on one worker: none waits at the end; what a file shares, or a large package, is loaded once
LAWS = ("test_methods", "test_laws", "test_toy_method")  # how the names of their files begin

# Random examples, each time others; what fails is printed with what repeats it. `make slow` takes many.
settings.register_profile("ci", deadline=None, max_examples=30, print_blob=True)
settings.register_profile("slow", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("ci")


def pytest_addoption(parser):
    parser.addoption("--shapes", action="store_true", help="check shapes in every test, which doubles their time")


def pytest_configure(config):
    shaped = (*SHAPED, *OFTEN) if config.getoption("--shapes") else SHAPED
    jaxtyping.install_import_hook([f"deepthin.{module}" for module in shaped], "beartype.beartype")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """A thread, or as many as DEEPTHIN_TEST_THREADS says."""
    import torch

    torch.set_num_threads(int(os.environ.get("DEEPTHIN_TEST_THREADS", "1")))


@pytest.fixture(scope="module", autouse=True)
def shapes_are_checked(request):
    """For the laws and with ``--shapes``: the checks take half of the processor's time."""
    wanted = request.config.getoption("--shapes") or request.path.name.startswith(LAWS)
    jaxtyping.config.update("jaxtyping_disable", not wanted)
    return wanted


@pytest.fixture(scope="session")
def data_folder():
    folder = os.environ.get("DEEPTHIN_DATA")
    if not folder:
        pytest.skip("DEEPTHIN_DATA names no folder with the data sets")
    return folder


@pytest.fixture
def command_line(monkeypatch, capsys):
    """Calls ``deepthin`` with words, in this process: exit code, what it printed, what it said on stderr."""
    from deepthin.cli import main

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["deepthin", *words])
        with pytest.raises(SystemExit) as stopped:
            main.main()
        shown = capsys.readouterr()
        return stopped.value.code or 0, shown.out, shown.err

    return call


@pytest.fixture
def compiling(shapes_are_checked):
    """Inductor is slow and its warnings are its own; tracing the whole graph is what we promise."""
    import torch

    torch._dynamo.reset()
    jaxtyping.config.update("jaxtyping_disable", True)  # the checks of shapes are no part of what is traced
    with warnings.catch_warnings(), torch._dynamo.config.patch(allow_rnn=True):  # as for torch's own recurrent layers
        warnings.simplefilter("ignore")
        yield
    jaxtyping.config.update("jaxtyping_disable", not shapes_are_checked)
    torch._dynamo.reset()
