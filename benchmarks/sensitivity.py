"""Allocation by equal ratios, equal bytes or sensitivity, in trainings that start dense (docs/recipe.md).

python benchmarks/sensitivity.py --data FOLDER digits lenet acoustic
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from deepthin.lab.train import train
from deepthin.lab.trial import Setup
from deepthin.storage.report import table

STEPS = {"digits": 1500, "lenet": 1500, "acoustic": 900}
RULES = {
    "pruned": ({"method": "pruned"}, 0.02),
    "pruned then kmeans": ({"method": "pruned", "then": {"method": "kmeans", "bits": 4}}, 0.01),
    "rank": ({"method": "rank"}, 0.05),
}
ALLOCATIONS = ("flat", "uniform-bytes", "sensitivity")


def main() -> None:
    """Print a table: error on test data, the mean of the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=list(STEPS))
    parser.add_argument("--data", type=Path, help="folder with MNIST or AN4")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    body: list[list[str]] = []
    for task in options.tasks:
        for name, (rule, ratio) in RULES.items():
            line = [task, name, f"{ratio:g}"]
            for allocation in ALLOCATIONS:
                rules = {
                    "model": {"ratio": ratio, "allocation": allocation},
                    "rules": {"*": rule},
                    "stages": {"thin": [0.3, 0.6], "quantize": 0.8, "every": 10},
                }
                errors: list[float] = []
                for seed in range(options.seeds):
                    with tempfile.TemporaryDirectory() as folder:
                        path = Path(folder) / "x.thin"
                        done = train(Setup(task, options.data, STEPS[task]), rules, path, seed=seed)
                    errors.append(next(iter(done.values["test"].values())))
                line.append(f"{statistics.mean(errors):.2f}")
            body.append(line)
            print(*line, flush=True)
    print(table(("task", "method", "ratio", *ALLOCATIONS), body, right=(2, 3, 4, 5), total=False))


if __name__ == "__main__":
    main()
