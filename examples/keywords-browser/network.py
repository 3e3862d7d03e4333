"""The keyword network: one frame of 40 log-mel features in, a score for each word and for anything else out.

A layer normalisation (so that the loudness of the microphone hardly matters), one GRU, a linear layer. Each output
depends on the frames so far only, so the network can run on one frame at a time and keep its state: the same answer as
for the whole recording.
"""

import torch
from torch import Tensor, nn

BANDS, UNITS = 40, 128

WORDS = ("alexa", "computer", "jarvis", "smart_mirror", "snowboy", "view_glass")
SMOOTHING = 0.1  # of each step, in the running mean of the probabilities


class Spotter(nn.Module):
    """Scores of words, at each frame.

    Args:
        units: Number of units of the GRU.
        classes: Number of classes: the words, and one for noise, silence and all other words.
    """

    def __init__(self, units: int = UNITS, classes: int = len(WORDS) + 1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(BANDS)
        self.gru = nn.GRU(BANDS, units, batch_first=True)
        self.output = nn.Linear(units, classes)

    def forward(self, frames: Tensor) -> Tensor:
        """Compute the scores.

        Args:
            frames: Features, items x frames x 40.

        Returns:
            Scores, items x frames x classes; their softmax is the probability of each class.
        """
        return self.output(self.gru(self.norm(frames))[0])

    def stream(self, frames: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute the scores of frames that go on from a state.

        Args:
            frames: Features, items x frames x 40.
            state: What the last call returned, 1 x items x units; None: at the beginning.

        Returns:
            Scores, items x frames x classes, and the state after the last frame.
        """
        hidden, state = self.gru(self.norm(frames), state)
        return self.output(hidden), state


def smoothed(scores: Tensor) -> Tensor:
    """What the bars of the page show: a running mean of the probabilities, with weight .1 for each new frame.

    Posterior smoothing, Chen et al., 2014, "Small-footprint keyword spotting using deep neural networks".

    Args:
        scores: Scores, items x frames x classes.

    Returns:
        Means, items x frames x classes; before the first frame they are 0.
    """
    mean, means = torch.zeros_like(scores[:, 0]), []
    for probabilities in scores.softmax(-1).unbind(1):
        mean = mean + SMOOTHING * (probabilities - mean)
        means.append(mean)
    return torch.stack(means, 1)
