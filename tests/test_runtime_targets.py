"""Exported C and WebAssembly on other machines: each gives torch's outputs; what the paper's network takes there.

The small network runs in the usual suite, the large one in ``make slow``. Debian's packages: gcc-aarch64-linux-gnu,
qemu-user, gcc-arm-none-eabi, libnewlib-arm-none-eabi, qemu-system-arm, clang, nodejs; PyPI's: ziglang.
"""

import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import deepthin.torch as dt
from deepthin.torch.export import wasm
from deepthin.torch.export.native import runtime
from deepthin.torch.export.native.footprint import CORTEX_M4, footprint

pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporter
TOLERANCE = 1e-5  # of the largest output
MCU = Path(__file__).parents[1] / "examples" / "keywords-mcu"
STRICT = ("-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror")
M4 = ("-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16", "--specs=rdimon.specs")
SECONDS = 600  # of an emulator, when the machine is busy


class Small(nn.Module):
    """A GRU of DeepThin factors over some frames, and a convolutional network whose weights are coded."""

    def __init__(self):
        super().__init__()
        self.gru, self.scores = nn.GRU(10, 24, batch_first=True), nn.Linear(24, 5)
        self.conv, self.deep, self.out = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=4), nn.Linear(8, 6)

    def forward(self, frames, image):
        x = nn.functional.max_pool2d(torch.relu(self.conv(image)), 2)
        x = nn.functional.hardswish(self.deep(x)).mean((2, 3))
        return self.scores(self.gru(frames)[0]).softmax(2), self.out(x)


def small():
    rules = {
        "gru*": {"method": "deepthin", "ratio": 0.3},
        "scores": {"method": "rank", "ratio": 0.5, "then": {"method": "uniform", "bits": 8}},
        "*": {"method": "coded"},
    }
    model = Small()
    dt.compress(model, {"rules": rules}, seed=0)
    return model.eval(), (torch.randn(1, 12, 10), torch.randn(1, 2, 10, 9))


def mlp():
    """The network of the DeepThin paper's Kaldi task, at about a hundredth of its size."""
    sizes = [440, *[2048] * 6]
    layers = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(2048, 1952))
    with torch.no_grad():
        dt.compress(model, {"model": {"ratio": 0.0099}, "rules": {"*": {"method": "deepthin"}}}, init="scratch")
    return model.eval(), (torch.randn(1, 440),)


class Case:
    """An exported network, its inputs in a file, and torch's outputs."""

    def __init__(self, folder, make):
        torch.manual_seed(0)
        self.folder, self.is_large = folder, make is mlp
        self.model, self.inputs = make()
        dt.export(self.model, folder / "model.c", self.inputs, to="c")
        (folder / "input").write_bytes(b"".join(one.numpy().tobytes() for one in self.inputs))
        with torch.no_grad():
            made = self.model(*self.inputs)
        self.expected = [one.numpy().ravel() for one in (made if isinstance(made, tuple) else (made,))]

    def compile(self, compiler, *flags):
        used = re.findall(r"^USED = (.*)$", (self.folder / "Makefile").read_text(), re.MULTILINE)[0].split()
        program = self.folder / "program"
        files = [self.folder / name for name in ("main.c", "model.c", "dt.c")]
        command = [compiler, *STRICT, "-O2", "-fno-math-errno", *used, *flags, *files, "-lm", "-o", program]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr
        return program

    def run(self, *command):
        output = self.folder / "output"
        output.unlink(missing_ok=True)
        made = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            timeout=SECONDS,
            stdin=subprocess.DEVNULL,
        )
        assert made.returncode == 0, made.stdout + made.stderr
        self.check(np.split(np.fromfile(output, np.float32), np.cumsum([one.size for one in self.expected])[:-1]))

    def check(self, outputs):
        for made, expected in zip(outputs, self.expected, strict=True):
            assert np.abs(made - expected).max() <= TOLERANCE * np.abs(expected).max()


LARGE = pytest.param(mlp, marks=pytest.mark.slow, id="mlp")


@pytest.fixture(scope="module", params=[pytest.param(small, id="small"), LARGE])
def case(request, tmp_path_factory):
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("there is no C compiler, with which the export checks what it writes")
    return Case(tmp_path_factory.mktemp("case"), request.param)


def needs(*tools):
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.mark.parametrize("lanes", [1, 4, 8, 16])
@pytest.mark.parametrize("compiler", [pytest.param(name, marks=needs(name)) for name in ("gcc", "clang")])
def test_this_machine(case, compiler, lanes):
    """Vectors that the processor lacks are made of those that it has, whose calls are not standard, as gcc remarks."""
    wider = {8: "-mavx", 16: "-mavx512f"}
    has = {8: ("AVX2", "AVX512"), 16: ("AVX512",)}
    processor = torch.backends.cpu.get_cpu_capability()
    flags = [] if lanes <= 4 else [wider[lanes] if processor in has[lanes] else "-Wno-psabi"]
    case.run(case.compile(compiler, f"-DDT_LANES={lanes}", *flags), "input", "output")


@needs("aarch64-linux-gnu-gcc", "qemu-aarch64")
def test_64_bit_arm(case):
    case.run("qemu-aarch64", case.compile("aarch64-linux-gnu-gcc", "-static"), "input", "output")


@needs("arm-none-eabi-gcc", "qemu-system-arm")
def test_cortex_m4(case):
    """The exported example as it is: QEMU gives it files and arguments."""
    linked = ("-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections", "-T", MCU / "mps2.ld", MCU / "start.c")
    program = case.compile("arm-none-eabi-gcc", *M4, *linked)
    files = "enable=on,target=native,arg=model,arg=input,arg=output"
    machine = ("-M", "mps2-an386", "-nographic", "-monitor", "none", "-serial", "none")
    case.run("qemu-system-arm", *machine, "-semihosting-config", files, "-kernel", program)


@needs("node")
def test_webassembly(case):
    if runtime.zig_compiler() is None:
        pytest.skip("not installed: ziglang")
    path = case.folder / "wasm" / "model.wasm"
    path.parent.mkdir()
    dt.export(case.model, path, case.inputs, to="wasm")
    case.check(wasm.runner(path)([one.numpy() for one in case.inputs]))
    if case.is_large:
        assert path.stat().st_size < 6_000


@needs("arm-none-eabi-gcc")
@pytest.mark.parametrize("case", [LARGE], indirect=True)
def test_what_the_papers_network_takes(case):
    arena = int(re.findall(r"ARENA_BYTES (\d+)", (case.folder / "model.h").read_text())[0])
    found = footprint(case.folder / "model.c", CORTEX_M4)
    assert found is not None
    assert found.stack is not None
    assert arena + found.stack < 40_000
    constants = 4 * sum(part.numel() for part in case.model.parameters())
    assert found.flash < constants + 8_000


@pytest.mark.parametrize("compiler", [None, CORTEX_M4], ids=["this machine", "Cortex-M4"])
def test_the_stack_is_known(case, compiler):
    found = footprint(case.folder / "model.c", compiler)
    if found is None:
        pytest.skip("the compiler is missing, or is no gcc")
    assert found.stack is not None
    assert 100 < found.stack < 4_000
