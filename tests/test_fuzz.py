"""What the fuzzer found once, so that it stays mended; and that the fuzzer notices what it must."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import crafted
import fuzz
from deepthin import FormatError
from deepthin.storage import contents, read

CORPUS = sorted(Path(__file__).with_name("corpus").glob("*.thin"))


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_what_was_found_stays_mended(path):
    fuzz.examine(path, fuzz.readers())


@pytest.mark.parametrize("name", list(crafted.files()))
def test_unchanged_files_are_read(name, tmp_path):
    """By the NumPy readers; that frameworks compute the same is tested where each of them is."""
    data, path = crafted.files()[name], tmp_path / "m.thin"
    if name.startswith("version 1"):
        header, tensors = crafted.taken_apart(data)
        path.write_bytes(crafted.signed(header, tensors))
        matrices = set(header["thin"])
    else:
        head, arrays = crafted.taken_apart_2(data)
        path.write_bytes(crafted.signed_2(head, arrays))
        assert path.read_bytes() == data
        matrices = set(head.thin)
    arrays, contents = fuzz.numpy_readers(path)
    assert arrays["0.weight"].shape == (crafted.ROWS, crafted.COLS)
    assert set(contents.thin) == matrices


def test_the_same_seed_gives_the_same_files():
    one, other = ([fuzz.changed(random.Random(f"7-{k}")) for k in range(40)] for _ in range(2))
    assert one == other
    assert len({data for data, _ in one}) > 30


def test_all_that_is_made_is_signed():
    """Of the changed files, those that are still read are many; no error is about a checksum."""
    fine = 0
    for number in range(300):
        data, _ = fuzz.changed(random.Random(number))
        try:
            read.from_bytes(data, max_bytes=fuzz.MAX_BYTES)
        except FormatError as error:
            assert "checksum" not in str(error).replace("no checksum", "")
        else:
            fine += 1
    assert 60 < fine < 290


@pytest.mark.parametrize("fault", ["unnamed", "values", "nan"])
def test_planted_faults_are_found(fault, tmp_path, monkeypatch):
    """A reader that raises IndexError, one that decodes other weights, and one that lets NaN through."""
    path, decode = tmp_path / "m.thin", contents.Thin.decode
    path.write_bytes(crafted.files()["version 2, repeats"])
    fuzz.examine(path, fuzz.readers())

    def wrong(thin):
        arrays = decode(thin)
        if fault == "unnamed":
            raise IndexError("planted")
        return {name: a * (np.nan if fault == "nan" else 1.01) for name, a in arrays.items()}

    monkeypatch.setattr(contents.Thin, "decode", wrong)
    with pytest.raises(IndexError if fault == "unnamed" else fuzz.Finding):
        fuzz.examine(path, fuzz.readers())


def test_it_runs_and_reports(tmp_path):
    script = str(Path(fuzz.__file__))
    words = [sys.executable, script, "--seconds", "1", "--seed", "5", "--findings", str(tmp_path / "findings")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "seed 5" in done.stdout
    assert not list(tmp_path.iterdir())
