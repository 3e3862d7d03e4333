"""The effect of a teacher on DeepThin: none, soft targets, logits and noisy logits (docs/distillation.md).

    python benchmarks/distill.py --data FOLDER digits acoustic

A dense network is trained for each task and seed, and is the teacher of that seed's students. Finished trainings are
stored in --out; the same command resumes an interrupted run.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from deepthin.errors import ConfigError
from deepthin.lab.compared import DENSE
from deepthin.lab.run import Setup, Trial
from deepthin.lab.teacher import Teacher
from deepthin.lab.trial import run_trial
from deepthin.storage.atomic import write_atomically
from deepthin.storage.report import table
from deepthin.torch import Noise

RATIOS = {"digits": (0.02, 0.01), "conv": (0.02, 0.01), "acoustic": (0.02, 0.005)}
WAYS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "soft": {"kind": "soft", "weight": 0.9, "temperature": 4.0},
    "logits": {"kind": "logits", "weight": 0.5},
    "noisy": {"kind": "logits", "weight": 0.5, "noise": Noise(0.3, 0.5)},
}


def main(words: list[str] | None = None) -> None:
    """Train what is missing; print the leading metric on test data, mean and half the range."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=list(RATIOS))
    parser.add_argument("--data", type=Path, help="folder with MNIST and AN4")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="steps of every training  [default: the task's]")
    parser.add_argument("--out", type=Path, default=Path("runs/distill"))
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    path = options.out / "results.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    if rows and (old := rows[0]["steps"]) != options.steps:
        raise ConfigError(f"{path} holds results of {old} steps, now {options.steps}: choose another --out.")
    done = {(row["task"], row["way"], row["ratio"], row["seed"]) for row in rows}
    with Progress(console=Console(stderr=True)) as bar:
        doing = bar.add_task("", total=options.seeds * sum(1 + len(WAYS) * len(RATIOS[t]) for t in options.tasks))
        for task in options.tasks:
            for seed in range(options.seeds):
                setup, folder = Setup(task, options.data, options.steps), options.out / task
                teacher = folder / "dense" / "models" / f"{DENSE}-seed{seed}.thin"
                for way, ratio in [("dense", 1.0), *((way, ratio) for way in WAYS for ratio in RATIOS[task])]:
                    bar.update(doing, description=f"{task} {way} {ratio:g} seed {seed}")
                    if (task, way, ratio, seed) not in done:
                        how = WAYS.get(way)
                        taught = replace(setup, teacher=None if how is None else Teacher(teacher, **how))
                        trial = Trial(DENSE if way == "dense" else "deepthin", ratio, seed)
                        (folder / way).mkdir(parents=True, exist_ok=True)
                        tested = next(r for r in run_trial(taught, trial, folder / way) if r.split == "test")
                        rows.append({**tested.to_json(), "way": way, "steps": options.steps})
                        write_atomically(path, json.dumps(rows, indent=1).encode())
                    bar.advance(doing)
    print(_table(rows, options.tasks))


def _table(rows: list[dict[str, Any]], tasks: list[str]) -> str:
    """A line for each task and size."""
    body: list[list[str]] = []
    for task in tasks:
        for ratio in RATIOS[task]:
            dense = _spread(rows, task, "dense", 1.0)
            body.append([task, f"{ratio:g}", dense, *(_spread(rows, task, way, ratio) for way in WAYS)])
    return table(("task", "ratio", "dense", *WAYS), body, right=range(1, 3 + len(WAYS)), total=False)


def _spread(rows: list[dict[str, Any]], task: str, way: str, ratio: float) -> str:
    """Mean and half the range of the seeds, in percent; how many failed."""
    own = [row for row in rows if (row["task"], row["way"], row["ratio"]) == (task, way, ratio)]
    values = [row["value"] for row in own if row["value"] is not None]
    lost = f" ({len(own) - len(values)} failed)" if len(values) < len(own) else ""
    return f"{statistics.mean(values):.2f} +- {(max(values) - min(values)) / 2:.2f}{lost}" if values else f"none{lost}"


if __name__ == "__main__":
    main()
