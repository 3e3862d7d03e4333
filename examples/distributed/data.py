"""Handwritten digits of scikit-learn, and a network for them."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and digits: 1,500 to train on, the rest to judge by."""
    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(digits)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[:1500]], y[order[:1500]], x[order[1500:]], y[order[1500:]]


def network() -> nn.Module:
    """64 inputs, two hidden layers of 256, ten digits."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


RULES = {
    "model": {"file_bytes": 4000},
    "rules": {"*": {"method": "deepthin", "floats": 0.1, "then": {"method": "coded"}}},
}
