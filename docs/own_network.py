"""Compare ways to compress a network of your own: three functions; here on scikit-learn's digits of 8 x 8.

deepthin compare --model own_network:build --train own_network:fit --evaluate own_network:evaluate --ratios 0.05,0.02
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
images = images.float() / 16
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
PARTS = {"train": order[:1200], "dev": order[1200:1500], "test": order[1500:]}


def build(width: int = 512) -> nn.Module:
    """The dense network; the same-size network has a smaller width."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def fit(model: nn.Module, training) -> None:
    """Your training. The model may be thin already, or become thin on the way; the loop does not change."""
    inputs, targets = images[PARTS["train"]], labels[PARTS["train"]]
    for chosen in training.batches(len(inputs), 64):
        training.minimise(nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen]))


def evaluate(model: nn.Module, split: str) -> dict[str, float]:
    """Metrics for "dev" and "test"; lower is better, and the first one is the leading metric."""
    right = model(images[PARTS[split]]).argmax(1) == labels[PARTS[split]]
    return {"error": 100 * (1 - right.float().mean().item())}
