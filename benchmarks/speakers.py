"""An acoustic network adapted to single speakers: thin deltas against LoRA (peft), at equal bytes of the file.

python benchmarks/speakers.py --data DIR [--out runs/speakers] [--steps 80] [--seeds 3] [--bytes 1000,2000,5000]

The base is the dense network of the task ``acoustic``. Of each speaker, every other utterance adapts, the others judge.
The eight development speakers choose among the settings of each kind, by the mean of their frame errors with seed 0;
the first eight test speakers show what they give, for each seed. Both kinds have as many settings to choose from, and
the same steps, batches and optimiser. Features are normalised per speaker, as in the task.

What LoRA trains is stored as thin files are, in the most of 16, 8, 6 and 4 bits that fit; its errors are those of the
stored numbers. Results are kept in ``--out``: the command goes on where it was interrupted.
"""

import argparse
import copy
import importlib
import itertools
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import deepthin.torch as dt
from deepthin.errors import BudgetError
from deepthin.lab.tasks import acoustic, an4
from deepthin.lab.tasks.training import Training, error, predict

BATCH, SPEAKERS, BASE_STEPS = 128, 8, 1800
CODED: dict[str, Any] = {"method": "coded"}
DELTAS = [
    {"method": method, "floats": floats, "lr": lr}
    for method, floats, lr in (
        ("deepthin", 0.0075, 1e-4),
        ("deepthin", 0.0075, 4e-4),
        ("deepthin", 0.02, 2e-4),
        ("kronecker", 0.01, 1e-3),
        ("kronecker", 0.01, 3e-3),
        ("rank", 0.012, 1e-3),
    )
]
LORAS = [{"layers": layers, "lr": lr} for layers in (["8"], ["0"], ["0", "8"]) for lr in (1e-3, 5e-3)]
SETTINGS = {"delta": DELTAS, "lora": LORAS}


@dataclass(frozen=True)
class Speaker:
    """Frames and states of one speaker, to adapt on and to judge by."""

    name: str
    adapt: tuple[Tensor, Tensor]
    judge: tuple[Tensor, Tensor]


def speakers(folder: Path) -> dict[str, list[Speaker]]:
    """The development speakers, and the first test speakers."""
    root = an4.find(folder)
    assert root is not None, f"{folder} does not hold AN4"
    states = np.load(root.parent / "states.npz")
    recordings = an4.read(root)
    held_out = an4.held_out(r.speaker for r in recordings["train"])
    found: dict[str, list[Speaker]] = {}
    for split, names in (("train", sorted(held_out)), ("test", sorted({r.speaker for r in recordings["test"]}))):
        found["dev" if split == "train" else "test"] = []
        for name in names[:SPEAKERS]:
            own = sorted((r for r in recordings[split] if r.speaker == name), key=lambda r: r.name)
            said = [acoustic.Utterance(name, r.features, states[r.name].astype(np.int64)) for r in own]
            ends = np.cumsum([len(u.states) for u in said])[:-1].tolist()
            frames = torch.from_numpy(acoustic.spliced(said)).tensor_split(ends)
            targets = [torch.from_numpy(u.states) for u in said]
            halves = [(torch.cat(frames[first::2]), torch.cat(targets[first::2])) for first in (0, 1)]
            found["dev" if split == "train" else "test"].append(Speaker(name, halves[0], halves[1]))
    return found


def adapt(model: nn.Module, speaker: Speaker, lr: float, steps: int, seed: int) -> None:
    """Train what can be trained on one half of a speaker's utterances."""
    inputs, targets = speaker.adapt
    training = Training(model=model, steps=steps, lr=lr, seed=seed)
    for chosen in training.batches(len(inputs), BATCH, warm_up=10):
        training.minimise(cross_entropy(model(inputs[chosen]), targets[chosen]))


def wrong(model: nn.Module, speaker: Speaker) -> float:
    """Frame errors on the other half, in percent."""
    return error(predict(model.eval(), speaker.judge[0]), speaker.judge[1])


def by_delta(base: nn.Module, speaker: Speaker, setting: dict[str, Any], most: int, steps: int, seed: int) -> Any:
    """A thin delta that is trained to the size: frame errors and bytes of what its file gives."""
    model = copy.deepcopy(base)
    rule = {"method": setting["method"], "floats": setting["floats"], "then": CODED}
    dt.delta(model, {"model": {"file_bytes": most}, "rules": {"*": rule}}, seed=seed)
    adapt(model, speaker, setting["lr"], steps, seed)
    with tempfile.TemporaryDirectory() as folder:
        size = dt.save(model, Path(folder) / "speaker.thin", max_bytes=most, only="delta")
        model = dt.load(copy.deepcopy(base), Path(folder) / "speaker.thin", frozen=True)
    return wrong(dt.merge(model), speaker), size


def by_lora(base: nn.Module, speaker: Speaker, setting: dict[str, Any], most: int, steps: int, seed: int) -> Any:
    """LoRA of rank 1 in some linear layers: frame errors and bytes; None if no number of bits fits."""
    peft = importlib.import_module("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=1, lora_alpha=8, target_modules=setting["layers"])
    model = cast(nn.Module, peft.get_peft_model(copy.deepcopy(base), config))
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if _stored(factors, most) is None:
        return None
    adapt(model, speaker, setting["lr"], steps, seed)
    stored = _stored(factors, most)
    if stored is None:
        return None
    with torch.no_grad():
        for name, tensor in stored[0].items():
            factors[name].copy_(tensor)
    return wrong(model, speaker), stored[1]


def _stored(factors: Mapping[str, Tensor], most: int) -> tuple[dict[str, Tensor], int] | None:
    """The factors as the best file within a size gives them, and its bytes."""
    for bits in (16, 8, 6, 4):
        layers = [nn.Linear(f.shape[1], f.shape[0], bias=False) for f in factors.values()]
        for layer, factor in zip(layers, factors.values(), strict=True):
            layer.weight = nn.Parameter(factor.detach().clone())
        held = nn.Sequential(*layers)
        dt.compress(held, {"rules": {"*": {"method": "uniform", "bits": bits}}})
        with tempfile.TemporaryDirectory() as folder:
            try:
                size = dt.save(held, Path(folder) / "lora.thin", max_bytes=most)
            except BudgetError:
                continue
        values = [cast(Tensor, layer.weight).detach() for layer in layers]
        return dict(zip(factors, values, strict=True)), size
    return None


WAYS = {"delta": by_delta, "lora": by_lora}


def trained_base(data: acoustic.Data, path: Path) -> nn.Module:
    """The dense network; trained once."""
    torch.manual_seed(0)
    model = acoustic.build(data, acoustic.WIDTH)
    if path.exists():
        return dt.load(model, path)
    acoustic.fit(model, data, Training(model=model, steps=BASE_STEPS, lr=1e-3, decay=0.0, seed=0))
    dt.save(model, path)
    return model


def main() -> None:
    """Choose on development speakers, then print a table of the test speakers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/speakers"))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bytes", default="1000,2000,5000")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    data, people = acoustic.load(given.data), speakers(given.data)
    base = trained_base(data, given.out / "base.thin").eval()
    kept = given.out / f"results-{given.steps}.jsonl"
    done = (
        {tuple(row["key"]): row["value"] for row in map(json.loads, kept.read_text().splitlines())}
        if kept.exists()
        else {}
    )

    def mean(kind: str, place: int, most: int, split: str, seed: int) -> tuple[float, float] | None:
        values = []
        for speaker in people[split]:
            key = (kind, json.dumps(SETTINGS[kind][place]), most, split, speaker.name, seed)
            if key not in done:
                done[key] = WAYS[kind](base, speaker, SETTINGS[kind][place], most, given.steps, seed)
                with kept.open("a") as file:
                    file.write(json.dumps({"key": key, "value": done[key]}) + "\n")
            if done[key] is None:
                return None
            values.append(done[key])
        errors, sizes = zip(*values, strict=True)
        return sum(errors) / len(errors), sum(sizes) / len(sizes)

    before = {s: [wrong(base, speaker) for speaker in people[s]] for s in ("dev", "test")}
    print("before:", {split: round(sum(v) / len(v), 2) for split, v in before.items()}, flush=True)
    for most, kind in itertools.product(map(int, given.bytes.split(",")), WAYS):
        tried = {place: mean(kind, place, most, "dev", 0) for place in range(len(SETTINGS[kind]))}
        fitting = {place: value[0] for place, value in tried.items() if value is not None}
        print(most, kind, "development:", {place: round(value, 2) for place, value in fitting.items()}, flush=True)
        best = min(fitting, key=fitting.__getitem__)
        shown = [mean(kind, best, most, "test", seed) for seed in range(given.seeds)]
        errors = ", ".join(f"{value[0]:.2f}" for value in shown if value is not None)
        size = sum(value[1] for value in shown if value is not None) / len(shown)
        print(f"| {most} | {kind} | {SETTINGS[kind][best]} | {size:.0f} | {errors} |", flush=True)


if __name__ == "__main__":
    main()
