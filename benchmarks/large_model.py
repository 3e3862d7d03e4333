"""A decoder as large as models of 7 billion parameters, compressed from files, loaded and run: seconds, peak memory.

python benchmarks/large_model.py [--blocks 1,2,4,8,32] [--width 4096] [--ratio 0.01] [--folder FOLDER]

Each block has four matrices width x width and three width x 11/4 width; the vocabulary is 32,000. The trained weights
are random numbers in bfloat16, in one file a block, as Hugging Face shards them. Steps: the plan, and a start from
scratch, on the meta device; the trained weights compressed one matrix at a time (``deepthin compress --weights
FOLDER``); loaded into a model on the meta device; and one block of it run for one item. Each number of blocks has a
process of its own. The files take 2 bytes a parameter of disk space, and are removed.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import deepthin.torch as dt
from deepthin.torch.streamed import compress_weights

VOCABULARY = 32_000


class Block(nn.Module):
    """The matrices of a decoder block, in the order in which they are used; attention of one item is its value."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = width * 11 // 4
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, wide, bias=False) for _ in range(2))
        self.down = nn.Linear(wide, width, bias=False)
        self.attended, self.mixed = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to single items.

        Args:
            x: Items x width.

        Returns:
            Items x width.
        """
        y = self.attended(x)
        x = x + self.o(self.v(y) + 0 * (self.q(y) * self.k(y)).sum(-1, keepdim=True))
        y = self.mixed(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def build(blocks: int, width: int) -> nn.Module:
    """The decoder on the meta device, in bfloat16."""
    with torch.device("meta"):
        parts = {"embed": nn.Embedding(VOCABULARY, width), "output": nn.Linear(width, VOCABULARY, bias=False)}
        return nn.ModuleDict({**parts, "blocks": nn.ModuleList(Block(width) for _ in range(blocks))}).bfloat16()


def write_weights(model: nn.Module, folder: Path) -> None:
    """Random weights, one file a block; all blocks have the same values, which costs no accuracy here."""
    generator, values = torch.Generator().manual_seed(0), dict[tuple[int, ...], Tensor]()
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if shape not in values:
            std = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
            values[shape] = (torch.randn(shape, generator=generator) * std).bfloat16()
        files.setdefault(".".join(name.split(".")[:2]), {})[name] = values[shape]
    for number, held in enumerate(files.values()):
        save_file({name: tensor.clone() for name, tensor in held.items()}, folder / f"model-{number:05d}.safetensors")


def measured(blocks: int, width: int, ratio: float, folder: Path) -> dict[str, Any]:
    """Seconds of each step and the peak memory, in this process."""
    torch.set_num_threads(1)
    rules = {"model": {"ratio": ratio}, "rules": {"*": {"method": "deepthin"}}}
    took: dict[str, Any] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        took[name] = round(time.perf_counter() - start, 2)
        return result

    model = build(blocks, width)
    took["parameters"] = sum(p.numel() for p in model.parameters())
    timed("plan", lambda: dt.plan(model, rules))
    fresh = build(blocks, width)
    timed("scratch", lambda: dt.initialise(fresh, 0) if dt.compress(fresh, rules, init="scratch") else None)
    timed("save", lambda: dt.save(fresh, folder / "scratch.thin"))
    timed("compress", lambda: compress_weights(model, folder / "weights", rules, folder / "trained.thin"))
    took["bytes"] = (folder / "trained.thin").stat().st_size
    loaded = timed("load", lambda: dt.load(build(blocks, width), folder / "trained.thin", frozen=True).eval())
    block, x = loaded["blocks"][0].float(), torch.randn(1, width)
    with torch.no_grad():
        block(x)
        timed("block", lambda: block(x))
    took["peak MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return took


def main() -> None:
    """A row for each number of blocks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", default="1,2,4,8,32")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--ratio", type=float, default=0.01)
    parser.add_argument("--folder", type=Path, help="where the weights are written  [default: a temporary folder]")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measured(int(given.blocks), given.width, given.ratio, given.folder)))
        return
    for blocks in map(int, given.blocks.split(",")):
        with tempfile.TemporaryDirectory(dir=given.folder) as name:
            weights = Path(name) / "weights"
            weights.mkdir()
            write_weights(build(blocks, given.width), weights)
            size = f"--blocks {blocks} --width {given.width} --ratio {given.ratio} --one --folder {name}"
            done = subprocess.run([sys.executable, __file__, *size.split()], capture_output=True, text=True, check=True)
            print(f"{blocks} blocks: {done.stdout.strip()}", flush=True)
            shutil.rmtree(weights)


if __name__ == "__main__":
    main()
