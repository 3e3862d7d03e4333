"""What CREPE says of the training frames, computed once and held in a file: 25 ms a frame."""

from pathlib import Path

import numpy as np
import torch
from crepe import given, normalised
from material import Frames, frames
from numpy.typing import NDArray
from torch import nn


def outputs(model: nn.Module, sound: NDArray[np.float32], dtype: torch.dtype = torch.float32) -> NDArray[np.float32]:
    """The outputs of a network after the sigmoid.

    Args:
        model: Items x 1 x WINDOW -> items x BINS.
        sound: Frames x WINDOW, of any level.
        dtype: In bfloat16 products take half the time, on processors that have it.

    Returns:
        Frames x BINS.
    """
    parts = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for start in range(0, len(sound), 64):
            batch = normalised(torch.from_numpy(sound[start : start + 64]).float())
            parts.append(torch.sigmoid(model(batch[:, None]).float()))
    return torch.cat(parts).numpy()


def taught(folder: Path, counts: dict[str, int]) -> tuple[Frames, NDArray[np.uint8]]:
    """Training frames without noise and the teacher's outputs for them.

    Args:
        folder: Where the file is, or is written.
        counts: Number of frames of each kind.

    Returns:
        The frames, and outputs in steps of 1 / 255.
    """
    path = folder / f"taught-{'-'.join(map(str, counts.values()))}.npz"
    if not path.is_file():
        clean = frames("train", counts)
        said = np.round(255 * outputs(given("full"), clean.sound, torch.bfloat16)).astype(np.uint8)
        np.savez(path, sound=clean.sound.astype(np.float16), hertz=clean.hertz, kind=clean.kind, said=said)
    with np.load(path) as file:
        return Frames(file["sound"].astype(np.float32), file["hertz"], file["kind"]), file["said"]
