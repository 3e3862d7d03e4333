"""Log-mel features in C: the same as in Python, for a recording as a whole and in pieces."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from deepthin.lab.tasks import log_mel as python
from tolerance import UNIT

RUNTIME = Path(__file__).parents[1] / "runtime"
FLAGS = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-O2"]
EPS32 = UNIT["float32"]  # relative error of one rounding
BYTES = 16_384  # more than the struct has
RECORDINGS = 20


def compiler(name):
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"there is no {name}: apt-get install {name}")
    return path


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("log_mel") / "log_mel.so"
    subprocess.run(
        [compiler("gcc"), *FLAGS, "-shared", "-fPIC", str(RUNTIME / "log_mel.c"), "-lm", "-o", str(path)], check=True
    )
    return ctypes.CDLL(str(path))


class Features:
    """One stream of features, computed in C."""

    def __init__(self, library):
        self.library = library
        self.memory = ctypes.create_string_buffer(BYTES)
        library.dt_log_mel_init(self.memory)

    def push(self, samples):
        samples = np.ascontiguousarray(samples, np.float32)
        at, count = ctypes.c_void_p(samples.ctypes.data), ctypes.c_size_t(len(samples))
        frame, frames = np.empty(python.BANDS, np.float32), []
        while self.library.dt_log_mel_next(
            self.memory, ctypes.byref(at), ctypes.byref(count), frame.ctypes.data_as(ctypes.c_void_p)
        ):
            frames.append(frame.copy())
        assert count.value == 0
        assert (at.value or 0) == samples.ctypes.data + samples.nbytes
        return np.array(frames).reshape(-1, python.BANDS)


def reference(samples):
    """The features in float64, and how far a computation in float32 may be off.

    A sample reaches a bin of the spectrum through the window and at most 10 stages of a fast Fourier transform (of 512
    points: 9; of 256 complex ones: 8 and the separation), each with a rotation of 4 roundings and one of its table, and
    two sums. Powers are squared; a band sums at most 257 of them, times a weight of 3 roundings; the logarithm has one
    of its argument, and is itself right to 2.
    """
    frames = np.lib.stride_tricks.sliding_window_view(samples.astype(np.float64), python.WINDOW)[:: python.HOP]
    frames = frames * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(python.WINDOW) / python.WINDOW))
    spectrum = abs(np.fft.rfft(frames, python.FFT))
    error = 75 * EPS32 * abs(frames).sum(1)[:, None]
    power_error = 2 * spectrum * error + error**2 + 3 * EPS32 * spectrum**2
    triangles = python.triangles().astype(np.float64)
    power, power_error = spectrum**2 @ triangles.T, power_error @ triangles.T
    # The weight of a bin beside a peak or a corner is a difference: its rounding is relative to 1.
    power_error += (spectrum**2 + power_error.max()) @ (3 * EPS32 * (triangles > 0)).T + 257 * EPS32 * power
    argument = power + python.FLOOR
    power_error += EPS32 * argument
    relative = np.minimum(power_error / argument, 0.999)
    features = np.log(argument)
    return features, -np.log1p(-relative) + 2 * EPS32 * abs(features) + EPS32


def sounds():
    generator = np.random.default_rng(0)
    time = np.arange(8_000) / python.RATE
    return {
        "noise": generator.uniform(-1, 1, 16_000),
        "faint": 1e-4 * generator.standard_normal(5_000),
        "tone": 0.9 * np.sin(2 * np.pi * 997 * time),
        "sweep": 0.5 * np.sin(2 * np.pi * 8_000 * time**2),
        "constant": np.full(3_000, 0.7),
        "highest": np.tile([1.0, -1.0], 1_000),
        "silence": np.zeros(4_000),
        "click": np.eye(1, 2_000, 777)[0],
        "one frame": generator.uniform(-1, 1, 400),
    }


def assert_features_close(got, samples):
    expected, bound = reference(samples)
    assert got.shape == expected.shape
    assert (abs(got - expected) <= bound).all()
    assert (abs(got - python.log_mel(samples)) <= 2 * bound).all()  # which has as many roundings


@pytest.mark.parametrize("name", sounds())
def test_c_computes_the_features_of_python(library, name):
    samples = sounds()[name].astype(np.float32)
    assert_features_close(Features(library).push(samples), samples)


def test_the_bound_is_tight_where_it_matters(library):
    """For sounds that fill the spectrum, as noise does, the bound is far below what a network notices."""
    _, bound = reference(sounds()["noise"].astype(np.float32))
    assert bound.max() < 1e-3


@pytest.mark.parametrize("longest", [1, 3, 159, 161, 399, 401, 1_000, 100_000])
def test_pieces_give_exactly_the_frames_of_the_whole(library, longest):
    generator = np.random.default_rng(longest)
    samples = generator.uniform(-1, 1, 4_321).astype(np.float32)
    whole = Features(library).push(samples)
    stream, frames, at = Features(library), [], 0
    while at < len(samples):
        length = int(generator.integers(0, longest + 1))
        frames.append(stream.push(samples[at : at + length]))
        at += length
    np.testing.assert_array_equal(np.concatenate(frames), whole)


def test_reset_begins_a_recording(library):
    samples = sounds()["noise"].astype(np.float32)
    stream = Features(library)
    first = stream.push(samples[:3_333])
    library.dt_log_mel_reset(stream.memory)
    np.testing.assert_array_equal(stream.push(samples[:3_333]), first)


def test_less_than_a_frame_has_no_features(library):
    stream = Features(library)
    assert stream.push(np.ones(399)).shape == (0, 40)
    assert stream.push(np.ones(1)).shape == (1, 40)


def test_recordings(library):
    soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed: pip install 'deepthin[compare]'")
    folder = Path(os.environ.get("DEEPTHIN_DATA", "")) / "wakewords"
    if not folder.is_dir():
        pytest.skip("DEEPTHIN_DATA has no folder wakewords with recordings")
    paths = sorted(folder.glob("*/*.ogg"))
    for path in paths[:: len(paths) // RECORDINGS]:
        samples, rate = soundfile.read(path, dtype="float32")
        assert rate == python.RATE
        assert_features_close(Features(library).push(samples), samples)


@pytest.mark.parametrize("name", ["gcc", "clang"])
@pytest.mark.parametrize("level", ["-O0", "-O3"])
def test_compilers_have_nothing_to_say(name, level, tmp_path):
    source, program = tmp_path / "size.c", tmp_path / "size"
    source.write_text(
        '#include "log_mel.h"\n#include <stdio.h>\nint main(void) { printf("%zu", sizeof(dt_log_mel)); return 0; }\n'
    )
    subprocess.run(
        [
            compiler(name),
            *FLAGS,
            level,
            "-I",
            str(RUNTIME),
            str(source),
            str(RUNTIME / "log_mel.c"),
            "-lm",
            "-o",
            str(program),
        ],
        check=True,
    )
    bytes_here = int(subprocess.run([program], check=True, capture_output=True, text=True).stdout)
    pointers = ctypes.sizeof(ctypes.c_size_t)
    # The header tells the bytes for a size_t of 4; one of 8 takes 4 more, and pads the end to a multiple of 8.
    told = int((RUNTIME / "log_mel.h").read_text().split("working memory: ")[1].split(" bytes")[0].replace(",", ""))
    assert bytes_here == (told if pointers == 4 else -(-(told + 4) // 8) * 8)
