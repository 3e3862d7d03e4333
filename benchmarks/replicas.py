"""Data-parallel training on two processes of this machine: bytes that a step sends, and its time, for each method.

python benchmarks/replicas.py [--ratio 0.01] [--steps 20] [--width 1024]

The acoustic network (429 inputs, four hidden layers, 102 outputs), batches of 64 a process, Adam, gloo, one thread
each. Bytes are those of the gradients that DistributedDataParallel averages, in one process; times are medians of
interleaved steps, beside those of the dense network in the same run. Over a network, time follows the bytes.
"""

import argparse
import datetime
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import deepthin.torch as dt

CODED = {"method": "deepthin", "floats": 0.04, "rank": 4, "then": {"method": "coded"}}
METHODS: dict[str, Any] = {name: {"method": name} for name in ("deepthin", "kronecker", "hashed", "pruned")}
METHODS |= {"uniform": {"method": "uniform", "bits": 8}, "deepthin then coded": CODED}


def network(width: int) -> nn.Module:
    """The dense network, the same in all processes."""
    torch.manual_seed(0)
    sizes = [429, *[width] * 4]
    hidden = [part for pair in itertools.pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 102))


class Replica:
    """A network in DistributedDataParallel, with its optimiser; it counts the bytes that are averaged."""

    def __init__(self, rule: dict[str, Any] | None, ratio: float, width: int) -> None:
        model = network(width)
        if rule is not None:
            aim = {"file_bytes": 52_000} if "floats" in rule else {} if "bits" in rule else {"ratio": ratio}
            dt.compress(model, {"model": aim, "rules": {"*": rule}}, init="scratch")
        self.ddp, self.bytes, self.seconds = DistributedDataParallel(model), 0, list[float]()
        self.ddp.register_comm_hook(None, self._average)
        self.optimizer = torch.optim.Adam(dt.parameter_groups(model, 1e-3))

    def _average(
        self,
        _: object,
        bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
    ) -> torch.futures.Future[torch.Tensor]:
        self.bytes += bucket.buffer().nbytes
        work = dist.all_reduce(bucket.buffer() / dist.get_world_size(), async_op=True)
        assert work is not None
        return work.get_future().then(lambda future: future.value()[0])

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """One step, timed."""
        self.bytes, start = 0, time.perf_counter()
        self.optimizer.zero_grad()
        cross_entropy(self.ddp(x), y).backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)


def run(rank: int, given: argparse.Namespace, folder: str) -> None:
    """One of two processes; the first prints the table."""
    torch.set_num_threads(1)
    store = f"file://{Path(folder) / 'store'}"
    dist.init_process_group("gloo", store, datetime.timedelta(seconds=300), world_size=2, rank=rank)
    replicas = {name: Replica(rule, given.ratio, given.width) for name, rule in {"dense": None, **METHODS}.items()}
    generator = torch.Generator().manual_seed(rank)
    for _ in range(given.steps + 1):
        x, y = torch.randn(64, 429, generator=generator), torch.randint(102, (64,), generator=generator)
        for replica in replicas.values():
            replica.step(x, y)
    if rank == 0:
        medians = {name: statistics.median(replica.seconds[1:]) for name, replica in replicas.items()}
        print("| method | bytes a step | dense over it | ms a step | dense over it |\n|---|---|---|---|---|")
        for name, replica in replicas.items():
            less, faster = replicas["dense"].bytes / replica.bytes, medians["dense"] / medians[name]
            print(f"| {name} | {replica.bytes:,} | {less:.0f} | {1e3 * medians[name]:.1f} | {faster:.1f} |")
    dist.destroy_process_group()


def main() -> None:
    """Start both processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=1024)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spawn(run, (given, folder), nprocs=2)


if __name__ == "__main__":
    main()
