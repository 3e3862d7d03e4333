"""Checkpoints of a training: a file that is whole or not there, and from which it goes on to the same result."""

import hashlib
import io
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepthin.errors import ConfigError
from deepthin.storage.atomic import write_atomically

_BEGINNING = b"deepthin checkpoint 1\n"
_DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Checkpoint:
    """Where the state of a training is kept, and how often.

    Attributes:
        path: The file.
        every: Steps between two states, 1 or more.
        about: All that the training depends on, as text: a state of another training is refused.
    """

    path: Path
    every: int
    about: str

    def save(self, state: dict[str, Any]) -> None:
        """Write a state, and that of all random numbers; an interrupted call leaves the one before.

        Args:
            state: Tensors, numbers, texts, and containers of these.

        Raises:
            OSError: The file cannot be written.
        """
        buffer = io.BytesIO()
        torch.save({"about": self.about, "random": _random(), **state}, buffer)
        body = buffer.getvalue()
        write_atomically(self.path, _BEGINNING + hashlib.sha256(body).digest() + body)

    def load(self) -> dict[str, Any] | None:
        """Read the state that was written last; ``restore_random`` is to be called where the training goes on.

        Returns:
            The state; None if there is none.

        Raises:
            ConfigError: The file is damaged, or the state of another training.
            OSError: The file cannot be read.
        """
        if not self.path.exists():
            return None
        data = self.path.read_bytes()
        digest, body = data[len(_BEGINNING) :][:_DIGEST_BYTES], data[len(_BEGINNING) + _DIGEST_BYTES :]
        if not data.startswith(_BEGINNING) or hashlib.sha256(body).digest() != digest:
            raise ConfigError(f"{self.path} is damaged, or no checkpoint: remove it to train from the beginning.")
        state = torch.load(io.BytesIO(body), weights_only=True)
        if state["about"] != self.about:
            raise ConfigError(
                f"{self.path} is the checkpoint of another training ({_difference(state['about'], self.about)}): "
                "choose another --out, or remove it to train from the beginning."
            )
        return state

    def remove(self) -> None:
        """The training is done."""
        self.path.unlink(missing_ok=True)


def restore_random(state: dict[str, Any]) -> None:
    """Let torch, NumPy and Python draw on as they did when a state was written.

    Args:
        state: What ``Checkpoint.load`` returned.
    """
    saved = state["random"]
    torch.set_rng_state(saved["torch"])
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, np.asarray(keys, np.uint32), *rest))  # noqa: NPY002 -- it is what a user's training may draw from
    version, numbers, gauss = saved["python"]
    random.setstate((version, tuple(numbers), gauss))


def _random() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    version, numbers, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "python": [version, list(numbers), gauss],
    }


def _difference(one: str, other: str) -> str:
    """The first line in which two texts differ."""
    pairs = zip(one.splitlines(), other.splitlines(), strict=False)
    return next((f"{a}, now {b}" for a, b in pairs if a != b), "its description has another length")
