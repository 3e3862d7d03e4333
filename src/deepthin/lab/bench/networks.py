"""The recurrent networks that `deepthin bench` times whole, as users have them."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

import deepthin.torch as dt
from deepthin.lab.tasks import acoustic, ctc

Work = Callable[[], object]
WHOLE = ("lstm", "gru", "deepspeech", "train-lstm", "train-acoustic")
UNITS, LAYERS, STEPS = 1024, 5, 100


class Whole(NamedTuple):
    """A recurrent network that is timed whole: how it is built, and what is timed.

    Attributes:
        build: Builds the dense network.
        work: Turns a network into a call to time: evaluation, or a training step.
        trains: Whether the call needs gradients.
        shape: (units, inputs).
    """

    build: Callable[[], nn.Module]
    work: Callable[[nn.Module], Work]
    trains: bool
    shape: tuple[int, int]  # units, inputs


class DeepSpeech(nn.Module):
    """Deep Speech 2 (Amodei et al., 2016, arXiv:1512.02595): spectrograms, batch x 1 x 161 x frames, to 29 characters.

    Two convolutions, five bidirectional LSTM layers whose directions are added up, and a linear one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(
            nn.Conv2d(1, 32, (41, 11), (2, 2), (20, 5)),
            nn.BatchNorm2d(32),
            nn.Hardtanh(0, 20),
            nn.Conv2d(32, 32, (21, 11), (2, 1), (10, 5)),
            nn.BatchNorm2d(32),
            nn.Hardtanh(0, 20),
        )
        sizes = [32 * 41, *[UNITS] * (LAYERS - 1)]
        self.norms = nn.ModuleList(nn.BatchNorm1d(size) for size in sizes)
        self.layers = nn.ModuleList(nn.LSTM(size, UNITS, bidirectional=True) for size in sizes)
        self.norm = nn.BatchNorm1d(UNITS)
        self.output = nn.Linear(UNITS, 29, bias=False)

    def forward(self, spectrogram: torch.Tensor) -> torch.Tensor:
        """Scores of characters.

        Args:
            spectrogram: Array, batch x 1 x 161 x frames.

        Returns:
            Array, batch x steps x 29.
        """
        x = self.front(spectrogram).flatten(1, 2)
        for number, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=True)):
            x = norm(x) if number else x
            y, _ = layer(x.permute(2, 0, 1))
            x = y.view(*y.shape[:2], 2, UNITS).sum(2).permute(1, 2, 0)
        return self.output(self.norm(x).transpose(1, 2))


def whole(case: str, shape: tuple[int, int], batch: int) -> Whole:
    """The network of a case, with random inputs.

    Args:
        case: One of ``WHOLE``.
        shape: (units, inputs) of ``lstm`` and ``gru``; other cases ignore it.
        batch: Number of items.

    Returns:
        How it is built, and what is timed.
    """
    if case == "train-lstm":
        return _training_of_ctc(batch)
    if case == "train-acoustic":
        return _training_of_acoustic(batch)
    units, inputs = (UNITS, 161) if case == "deepspeech" else shape
    if case == "deepspeech":
        build, x = DeepSpeech, torch.randn(batch, 1, inputs, STEPS)
    else:
        kind = nn.LSTM if case == "lstm" else nn.GRU
        build, x = lambda: kind(inputs, units, num_layers=LAYERS), torch.randn(STEPS, batch, inputs)

    def work(model: nn.Module) -> Work:
        model.eval()
        return lambda: model(x)

    return Whole(build, work, False, (units, inputs))


def _training_of_ctc(batch: int) -> Whole:
    """A step as the task takes it, of utterances of 2.4 seconds, without the optimiser."""
    features, lengths = torch.randn(batch, 240, ctc.INPUTS), torch.full((batch,), 240)
    targets = [torch.randint(1, len(ctc.SYMBOLS), (20,)) for _ in range(batch)]

    def work(model: nn.Module) -> Work:
        model.train()

        def step() -> None:
            model.zero_grad()
            with ctc.precision():
                scores, steps = model(features, lengths)
            ctc.loss(scores, steps, targets).backward()

        return step

    return Whole(lambda: ctc.build(None, ctc.WIDTH), work, True, (ctc.WIDTH, ctc.INPUTS))


def _training_of_acoustic(batch: int) -> Whole:
    """A step as users write it: the loss of a batch of frames, its gradients, and Adam."""
    inputs, states = 11 * 39, 102
    x, targets = torch.randn(batch, inputs), torch.randint(0, states, (batch,))

    def work(model: nn.Module) -> Work:
        model.train()
        optimizer = torch.optim.Adam(dt.parameter_groups(model, 1e-3))

        def step() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), targets).backward()
            optimizer.step()

        return step

    def build() -> nn.Module:
        sizes = (inputs, *[acoustic.WIDTH] * acoustic.DEPTH, states)
        return nn.Sequential(*[m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())][:-1])

    return Whole(build, work, True, (acoustic.WIDTH, inputs))
