"""DeepTwist's experiments with language models on the task lstm-lm, our results beside the paper's (docs/language.md).

    python benchmarks/language.py --data FOLDER --out runs/language              # or: ... pruning rank bits deepthin

Lee, Kapoor and Kim, 2018, arXiv:1810.12823: Tables 3 and 4, Figures 2, 3 and 4. A dense network is trained once; every
case continues from it for as many epochs: occasionally distorted ("twist"), made thin in one step, then its codes
trained ("once"), or dense ("again"); "scratch" is thin from the start, for the epochs of both trainings. The written
file is evaluated. Finished cases are stored in --out; the same command resumes and draws the figures again.
"""

import argparse
import dataclasses
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from language_figures import BINS, FIRST, LIMIT, SECTIONS, SHARED, draw, shown
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

import deepthin.torch as dt
from deepthin.errors import BudgetError, ConfigError
from deepthin.lab.run import seeded
from deepthin.lab.tasks import lstm_lm
from deepthin.lab.tasks.training import Training
from deepthin.methods.pruned import Pruned
from deepthin.plan.parse import parse_rules
from deepthin.plan.shares import Planned
from deepthin.storage.atomic import write_atomically
from deepthin.torch.compress import plan_of
from deepthin.torch.tensors import tensors_of

RISING_EPOCHS = 3  # until pruning reaches its final rate, as for the paper's medium network


@dataclasses.dataclass(frozen=True)
class Case:
    """One network: ``rules`` as for ``compress``; in pruning, exactly the fraction ``left`` of the weights remains."""

    section: str
    setting: str
    way: str  # twist, once, scratch; or again: the dense network is trained further
    rules: dict[str, Any]
    left: float | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """The key of its row."""
        return self.section, self.setting, self.way

    def plans(self, model: nn.Module) -> list[Planned]:
        """The plan of each matrix."""
        found = plan_of(model, parse_rules(self.rules), tensors_of(model)[0])
        if self.left is None:
            return found
        exact: list[Planned] = []
        for planned in found:
            if planned.method is not None:
                shape = planned.method.shape
                kept = max(round(self.left * math.prod(shape)), 1)
                planned = dataclasses.replace(planned, method=Pruned(shape, kept))
            exact.append(planned)
        return exact


def cases(width: int, depth: int) -> list[Case]:
    """All cases, in the order of the paper; ranks are the paper's fractions of the units."""
    found = [Case("dense", "", "again", {})]
    for rate in (80, 85, 90):
        rules = {"rules": {"*": {"method": "pruned", "ratio": 0.5}}}
        found += [Case("pruning", f"{rate} %", way, rules, 1 - rate / 100) for way in ("twist", "once")]
    for share in (".39", ".20", ".15", ".10"):
        rules = {"rules": {"lstm.weight*": {"method": "rank", "rank": max(round(float(share) * width), 1)}}}
        found += [Case("rank", share, way, rules) for way in ("twist", "once")]
        if share == ".15":  # an input matrix with the projection of the recurrent one
            shared = {**rules["rules"]["lstm.weight*"], "group": "rows", "projection": "*weight_hh*"}
            rules = {"rules": {f"lstm.weight_*_l{layer}": shared for layer in range(depth)}}
            found += [Case("rank", share + SHARED, way, rules) for way in ("twist", "once")]
    for bits in (1, 2, 3):
        for rounds, name in ((0, "greedy"), (2, "alternating"))[: 1 if bits == 1 else 2]:  # with one bit they are equal
            rules = {"rules": {"*": {"method": "binary", "bits": bits, "rounds": rounds}}}
            found.append(Case("bits", f"{bits} {name}", "twist", rules))
    for ratio in ("0.1", "0.02"):
        model = {"ratio": float(ratio), "allocation": lstm_lm.TASK.allocation}
        rules = {"model": model, "rules": {"*": {"method": "deepthin"}}}
        found += [Case("deepthin", ratio, way, rules) for way in ("twist", "once", "scratch")]
    return found


@dataclasses.dataclass(frozen=True)
class Bench:
    """Data, options and networks for all cases."""

    data: lstm_lm.Data
    options: argparse.Namespace
    progress: Progress

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch."""
        return lstm_lm.epoch_steps(self.data)

    def build(self) -> nn.Module:
        """The dense network, untrained."""
        seeded(self.options.seed)
        return lstm_lm.build(self.data, self.options.width, self.options.depth)

    def train(
        self, name: str, model: nn.Module, epochs: int, each: Callable[[int], object] = lambda step: None
    ) -> None:
        """Train by plain SGD, the usual recipe for this network; ``each`` is called after every step.

        The learning rate is constant for 4/13 of the steps, then decays by a factor of 2^-9, as Zaremba's in 13 epochs.
        """
        steps, told = self._begin(name, epochs)
        optimizer = torch.optim.SGD(dt.parameter_groups(model, self.options.lr, 1.0))
        model.train()
        torch.manual_seed(self.options.seed)
        places = (step % self.epoch_steps for step in range(steps))
        for step, loss in enumerate(lstm_lm.losses(model, self.data, places)):
            for group in optimizer.param_groups:
                group["lr"] = self.options.lr * 2 ** -(13 * max(step / steps - 4 / 13, 0))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), lstm_lm.CLIP)
            optimizer.step()
            each(step + 1)
            told(step + 1)

    def train_codes(self, name: str, model: nn.Module, epochs: int) -> None:
        """Train a thin network as the task does."""
        steps, told = self._begin(name, epochs)
        lr = lstm_lm.TASK.learning_rate
        lstm_lm.fit(model, self.data, Training(model=model, steps=steps, lr=lr, seed=self.options.seed, progress=told))

    def _begin(self, name: str, epochs: int) -> tuple[int, Callable[[int], None]]:
        """The number of steps, and a function that reports each step to a progress bar; without a terminal, a line."""
        steps = epochs * self.epoch_steps
        bar = self.progress.add_task(name, total=steps)
        if self.progress.disable:
            print(f"{time.strftime('%H:%M:%S')} {name}: {steps} steps", flush=True)
        return steps, lambda step: self.progress.update(bar, completed=step)

    def dense(self) -> nn.Module:
        """The dense network that the cases continue from, trained at the first call."""
        path, model = self.options.out / "dense.pt", self.build()
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
            return model
        self.train("dense", model, self.options.epochs)
        part = path.with_suffix(".part")
        torch.save(model.state_dict(), part)
        part.replace(path)
        return model

    def judged(self, name: str, model: nn.Module) -> dict[str, Any]:
        """Bytes and perplexities of the written file."""
        path = self.options.out / f"{name}.thin"
        written = dt.save(model, path)
        loaded = dt.load(self.build(), path)
        values = {split: lstm_lm.evaluate(loaded, self.data, split)["perplexity"] for split in ("dev", "test")}
        return {"bytes": written, **values}

    def run(self, case: Case) -> dict[str, Any]:
        """The row of a case."""
        started = time.perf_counter()
        name = f"{case.section} {case.setting} {case.way}"
        model = self.build() if case.way == "scratch" else self.dense()
        row: dict[str, Any] = dict(zip(("section", "setting", "way"), case.key, strict=True))
        epochs = self.options.epochs
        if case.way == "twist":
            row |= self._twisted(name, case, model)
        elif case.way == "again":
            self.train(name, model, epochs)
        elif case.way == "once":
            dt.Twist(model, case.plans(model)).finish()
            row["before"] = lstm_lm.evaluate(model, self.data, "test")["perplexity"]
            (self.train_codes if case.section == "deepthin" else self.train)(name, model, epochs)
        else:
            dt.compress(model, case.rules, init="scratch", seed=self.options.seed)
            self.train_codes(name, model, 2 * epochs)
        row |= self.judged("-".join(name.split()).replace("%", "percent"), model)
        if case.section == "pruning":
            weights = torch.cat([getattr(model.get_submodule("lstm"), n.split(".")[1]).flatten() for n in FIRST])
            row["histogram"] = torch.histc(weights[weights != 0].detach(), BINS, -LIMIT, LIMIT).tolist()
        return row | {"seconds": round(time.perf_counter() - started, 1)}

    def _twisted(self, name: str, case: Case, model: nn.Module) -> dict[str, Any]:
        """Train with distortions, then make the network thin; for ``rank`` also return singular values by epoch."""
        steps = self.options.epochs * self.epoch_steps
        rising = case.section in ("pruning", "deepthin")
        end = min(RISING_EPOCHS * self.epoch_steps, (steps + 1) // 2)
        twist = dt.Twist(model, case.plans(model), self.options.every, dt.Rising(0, max(end, 1)) if rising else None)
        spectra: dict[str, dict[str, list[float]]] = {}

        def watch(epoch: int) -> None:
            if case.section == "rank":
                state = model.state_dict()
                spectra[str(epoch)] = {n: torch.linalg.svdvals(state[n]).tolist() for n in FIRST}

        def each(step: int) -> None:
            if step % self.epoch_steps == 0:
                watch(step // self.epoch_steps)
            twist.step()

        watch(0)
        self.train(name, model, self.options.epochs, each)
        twist.finish()
        return {"spectra": spectra} if spectra else {}


def main() -> None:
    """Run the unfinished cases; print the table, draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--data", type=Path, help="folder with the Penn Treebank, or with Jane Austen's novels")
    parser.add_argument("--out", type=Path, default=Path("runs/language"))
    parser.add_argument("--words", type=int, default=lstm_lm.SUBSET, help="words to train; all splits are cut alike")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of the dense training, and of every case")
    parser.add_argument("--every", type=int, default=100, help="steps from one distortion to the next, S_D")
    parser.add_argument("--width", type=int, default=lstm_lm.WIDTH)
    parser.add_argument("--depth", type=int, default=lstm_lm.DEPTH)
    parser.add_argument("--lr", type=float, default=20.0, help="learning rate of SGD, for the mean loss per word")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if unknown := [section for section in options.sections if section not in SECTIONS]:
        parser.error(f"there is no section {unknown[0]!r}. Valid: {', '.join(SECTIONS)}.")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The relative error of")  # large errors are expected here
    options.out.mkdir(parents=True, exist_ok=True)
    data = lstm_lm.load(options.data, options.words)
    about = {
        "data": data.about,
        **{k: getattr(options, k) for k in ("epochs", "every", "width", "depth", "lr", "seed")},
    }
    path = options.out / "language.json"
    rows = rows_of(path, about)
    wanted = [
        case
        for case in cases(options.width, options.depth)
        if case.section in ("dense", *(options.sections or SECTIONS))
    ]
    done = {(row["section"], row["setting"], row["way"]) for row in rows}
    console = Console(stderr=True)
    columns = TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bench = Bench(data, options, progress)
        whole = progress.add_task("cases", total=len(wanted))

        def keep(*found: dict[str, Any]) -> None:
            rows.extend(found)
            write_atomically(path, json.dumps({"about": about, "rows": rows}, indent=1).encode())

        keep()

        if ("dense", "", "") not in done:
            started, model = time.perf_counter(), bench.dense()
            found = {"section": "dense", "setting": "", "way": "", **bench.judged("dense", model)}
            keep({**found, "seconds": round(time.perf_counter() - started, 1)})
        for case in wanted:
            if case.key not in done:
                try:
                    keep(bench.run(case))
                except BudgetError as error:
                    print(f"{' '.join(case.key)}: {error}")
            progress.advance(whole)
    print(data.about)
    print(shown(rows))
    print("\n".join(f"Figure: {figure}" for figure in draw(rows, options.out)))


def rows_of(path: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of earlier runs; ConfigError if their data or options differ."""
    if not path.exists():
        return []
    earlier = json.loads(path.read_text())
    if earlier["about"] != about:
        raise ConfigError(f"{path} holds results of {earlier['about']}, not of {about}: choose another --out.")
    return earlier["rows"]


if __name__ == "__main__":
    main()
