"""Training: a student hears the frame in noise and learns what the teacher says of the frame without it."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from crepe import BINS, LOWEST, WINDOW, cents, normalised, pitch_of
from material import Frames
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import deepthin.torch as dt

BATCH, QUIETEST, LOUDEST = 64, -3.0, 30.0  # frames a step; signal-to-noise ratios in dB


def targets(clean: Frames, said: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What a student learns: the teacher's outputs, but the known pitch where the teacher is wrong.

    Args:
        clean: The frames.
        said: The teacher's outputs in steps of 1 / 255.

    Returns:
        Frames x BINS, 0 to 1. A known pitch is a bell curve with a standard deviation of 25 cents, as in CREPE's own
        training.
    """
    out = said.astype(np.float32) / 255
    known = clean.hertz > 0
    truth = cents(clean.hertz[known])
    wrong = abs(pitch_of(out[known]) - truth) > 50
    out[np.flatnonzero(known)[wrong]] = np.exp(
        -((LOWEST + 20 * np.arange(BINS) - truth[wrong, None]) ** 2) / (2 * 25**2)
    )
    return out


def batches(
    clean: Frames, wanted: NDArray[np.float32], noises: dict[str, NDArray[np.float32]], steps: int, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Frames in noise, of which a fifth have none, and their targets.

    Args:
        clean: The frames.
        wanted: Frames x BINS.
        noises: Samples of each noise.
        steps: Number of batches.
        seed: Of all choices.

    Yields:
        BATCH x 1 x WINDOW, and BATCH x BINS.
    """
    rng, pool = np.random.default_rng(seed), np.stack(list(noises.values()))
    for _ in range(steps):
        chosen = rng.integers(len(clean), size=BATCH)
        starts = rng.integers(pool.shape[1] - WINDOW, size=(BATCH, 1)) + np.arange(WINDOW)
        pieces = pool[rng.integers(len(pool), size=(BATCH, 1)), starts]
        level = 10 ** (-rng.uniform(QUIETEST, LOUDEST, (BATCH, 1)) / 20) * (rng.random((BATCH, 1)) > 0.2)
        sound = clean.sound[chosen] * rng.choice([-1, 1], (BATCH, 1))  # of either polarity
        sound = sound + level / np.maximum(pieces.std(1, keepdims=True), 0.1) * pieces
        yield normalised(torch.from_numpy(sound.astype(np.float32)))[:, None], torch.from_numpy(wanted[chosen])


def train(model: nn.Module, data: Iterator[tuple[Tensor, Tensor]], steps: int, rate: float = 1e-3) -> None:
    """Train a dense or a thin network; a thin one ends at the size of file that it was compressed for.

    Args:
        model: The network, without a sigmoid.
        data: Batches, at least ``steps``.
        steps: Number of optimiser steps.
        rate: The highest learning rate of dense weights.
    """
    thin = any(isinstance(module, dt.ThinWeight) for module in model.modules())
    target = dt.SizeTarget(model, steps) if thin else None
    groups: list[dict[str, Any]] = dt.parameter_groups(model, rate)
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], steps, pct_start=0.1, cycle_momentum=False
    )
    began, total = time.monotonic(), 0.0
    for step, (sound, wanted) in zip(range(steps), data, strict=False):
        loss = binary_cross_entropy_with_logits(model(sound), wanted)
        optimizer.zero_grad()
        (loss + target.penalty() if target else loss).backward()
        optimizer.step()
        schedule.step()
        if target:
            target.step()
        total += float(loss.detach())
        if (step + 1) % 500 == 0 or step + 1 == steps:
            count = step % 500 + 1
            print(f"  step {step + 1:5}  loss {total / count:.4f}  {time.monotonic() - began:.0f} s", flush=True)
            total = 0.0
