"""Pruning and quantisation of LeNet-5 on full MNIST, our results beside published ones (docs/recipe.md).

    python benchmarks/survey.py --data FOLDER

The rows are those of Table 1 of Baigalmaa's survey "Compressing Deep Neural Networks". One network is trained, thinned
and trained further, as in ``docs/deep.toml``; before the last fifth of the steps its weights are quantised in each way,
from the same state. Ratios are those of written files, biases and headers included; published figures are those of
Choi, El-Khamy and Lee, 2017 (arXiv:1612.01543), and of Han et al., 2016 (arXiv:1510.00149).
"""

import argparse
import contextlib
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import deepthin.torch as dt
from deepthin.lab.run import Setup, seeded
from deepthin.lab.tasks import lenet
from deepthin.lab.tasks.training import Training
from deepthin.lab.trial import prepared
from deepthin.plan.rules import Stages
from deepthin.storage.report import table

STAGES = Stages()
ROWS: dict[str, tuple[dict[str, Any] | None, bool, tuple[float, float]]] = {  # then, Hessian, published accuracy, ratio
    "pruned": (None, False, (99.27, 10.13)),
    "pruned, k-means": ({"method": "kmeans", "bits": 4}, False, (99.27, 44.58)),
    "pruned, Hessian-weighted k-means": ({"method": "kmeans", "bits": 4}, True, (99.27, 47.16)),
    "pruned, uniform": ({"method": "uniform", "bits": 4}, False, (99.28, 51.25)),
    "pruned, ECSQ": ({"method": "ecsq", "bits": 3.5}, True, (99.27, 49.01)),
    "Deep Compression": ({"method": "kmeans", "bits": 5}, False, (99.26, 39.00)),
}


class _Thin(Exception):
    """The training has reached the step at which weights are quantised."""


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST's four files")
    parser.add_argument("--steps", type=int, default=lenet.TASK.steps)
    parser.add_argument("--ratio", type=float, default=0.011, help="ratio of the pruned matrices with 4-bit values")
    parser.add_argument("--allocation", default="0.5", help="a number from 0 to 1, or sensitivity")
    parser.add_argument("--rate", type=float, default=1.0, help="learning rate of codes over that of the dense network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--depth", type=int, default=5, help="3: LeNet-300-100")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = prepared(Setup("lenet", options.data, options.steps, depth=options.depth))
    rows = [_row("dense", run, _trained(run, options.seed, None, options.steps)[0], (99.25, 1.0))]
    print(rows[-1], flush=True)
    allocation = options.allocation if options.allocation == "sensitivity" else float(options.allocation)
    rules = {
        "model": {"ratio": options.ratio, "allocation": allocation},
        "rules": {"*": {"method": "pruned", "then": {"method": "kmeans", "bits": 4}}},
        "stages": {
            "thin": list(STAGES.thin),
            "quantize": 1.0,
            "every": STAGES.every,
            "learning_rate_multiplier": options.rate,
        },
    }
    thin, begun = _trained(run, options.seed, rules, round(STAGES.quantize * options.steps))
    for name, (then, hessian, published) in ROWS.items():
        model = copy.deepcopy(thin)
        batch = lenet.calibration(run.data)
        importance = dt.hessian_diagonal(model, [batch], nn.functional.cross_entropy) if hessian else None
        if then is not None:
            dt.quantize_codes(model, then, importance)
        training = Training(model=model, steps=options.steps, lr=lenet.TASK.learning_rate, seed=options.seed)
        training.learning_rate_multiplier, training.step = options.rate, begun
        lenet.fit(model, run.data, training)
        rows.append(_row(name, run, model, published))
        print(rows[-1], flush=True)
    heads = ("", "bytes", "times smaller", "accuracy %", "published", "accuracy %")
    body = [
        (r["name"], f"{r['bytes']:,}", f"{r['times']:.1f}", f"{r['accuracy']:.2f}", f"{r['published'][1]:.1f}",
         f"{r['published'][0]:.2f}")
        for r in rows
    ]  # fmt: skip
    print(table(heads, body, right=(1, 2, 3, 4, 5), total=False))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def _trained(run: Any, seed: int, rules: dict[str, Any] | None, until: int) -> tuple[nn.Module, int]:
    """The network after ``until`` of all steps, thinned if there are rules."""
    seeded(seed)
    model = run.build(run.width)
    training = Training(model=model, steps=run.steps, lr=lenet.TASK.learning_rate, seed=seed)
    if rules is not None:
        training.learning_rate_multiplier = rules["stages"]["learning_rate_multiplier"]
        training.recipe = dt.Recipe(model, rules, run.steps, lambda model: lenet.loss(model, run.data))

    def stop(step: int) -> None:
        if step == until < run.steps:
            raise _Thin

    training.progress = stop
    with contextlib.suppress(_Thin):
        lenet.fit(model, run.data, training)
    return model, until


def _row(name: str, run: Any, model: nn.Module, published: tuple[float, float]) -> dict[str, Any]:
    """Of the written file, loaded into a new network."""
    with tempfile.TemporaryDirectory() as folder:
        written = dt.save(model, Path(folder) / "x.thin")
        loaded = dt.load(run.build(run.width), Path(folder) / "x.thin")
    error = lenet.evaluate(loaded, run.data, "test")["error"]
    times = run.dense_bytes() / written
    return {"name": name, "bytes": written, "times": times, "accuracy": 100 - error, "published": published}


if __name__ == "__main__":
    main()
