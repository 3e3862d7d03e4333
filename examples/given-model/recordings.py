"""Recorded speech, whose pitch nobody knows: how often a network agrees with CREPE full where that is sure.

    python examples/given-model/recordings.py FOLDER

FOLDER holds .wav, .flac or .ogg files. The networks are those that run.py has trained.
"""

import json
import sys
from pathlib import Path

import crepe
import numpy as np
import run
import soundfile
import torch
from numpy.typing import NDArray
from teacher import outputs

from deepthin.lab.tasks.log_mel import resampled

SURE, CENTS = 0.8, 50  # the largest output of CREPE full; what counts as agreement


def voiced(folder: Path, files: int, each: int = 8) -> NDArray[np.float32]:
    """The loudest frames of recordings.

    Args:
        folder: Where recordings are, at any depth.
        files: Number of recordings, evenly spaced in the order of their names.
        each: Frames of each recording.

    Returns:
        Frames x WINDOW.
    """
    paths = sorted(path for suffix in ("wav", "flac", "ogg") for path in folder.rglob(f"*.{suffix}"))
    frames = []
    for path in paths[:: max(1, len(paths) // files)]:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        sound = resampled(samples.mean(1), rate)
        pieces = np.lib.stride_tricks.sliding_window_view(sound, crepe.WINDOW)[::800]
        frames.append(pieces[np.argsort(-pieces.std(1))[:each]])
    return np.concatenate(frames).astype(np.float32)


def main() -> None:
    """Print the agreement of each network of the table."""
    torch.set_num_threads(1)
    out = run.HERE / "build" / "full"
    sounds = voiced(Path(sys.argv[1]), 250)
    said = outputs(crepe.given("full"), sounds)
    sure = said.max(1) >= SURE
    truth = crepe.pitch_of(said[sure])
    print(f"CREPE full is sure of {sure.sum()} of {len(sure)} frames")
    names = {row["name"]: row["bytes"] for row in json.loads((out / "rows.json").read_text())}
    for name in names:
        shape, *rest = name.split()
        if name == "CREPE full":
            continue
        if name == "CREPE tiny":
            model = crepe.given("tiny")
        elif rest == ["dense"]:
            model = run.folded(run.dense(shape, run.FULL, out))
        else:
            model = run.thin(1000 * int(rest[0]), shape, run.FULL, out)
        near = abs(crepe.pitch_of(outputs(model, sounds[sure])) - truth) <= CENTS
        print(f"{name:16} {100 * near.mean():.1f} % within {CENTS} cents of it")


if __name__ == "__main__":
    main()
