"""The memory and the passes over the model that planning, compressing and saving take, for 1 GB with one thin matrix.

    python benchmarks/planning.py

Each line is measured in a separate process. ``memory``: the peak of its resident memory (VmHWM) minus the resident
memory with the model loaded, after the same call with a small model as warm-up. ``passes``: bytes over which CRC-32 was
computed, over the bytes of the model; writing a file takes three, one for the checksums in its header and two while it
is written. The last lines plan a table of 2,560 million entries on the meta device, without allocation. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

RATIO = {"model": {"ratio": 0.02}, "rules": {"thin": {"method": "deepthin"}}}
MEASURED = {"thin": {"method": "deepthin", "rank": 4, "then": {"method": "kmeans", "bits": 5}}}
CASES = ("plan", "plan file_bytes", "compress", "compress file_bytes", "save", "load", "meta", "meta file_bytes")


def build(cells: int = 4096, layers: int = 8, rows: int = 500_000) -> Any:
    """A table of half a gigabyte, layers of half a gigabyte in total, and the matrix that becomes thin."""
    from torch import nn

    dense = [nn.Linear(cells, cells, bias=False) for _ in range(layers)]
    return nn.ModuleDict(
        {"table": nn.Embedding(rows, 256), "dense": nn.Sequential(*dense), "thin": nn.Linear(256, 256)}
    )


def dense_bytes(model: Any) -> int:
    """Bytes of all parameters."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())


def call(case: str, model: Any, path: Path) -> None:
    """The call that is measured."""
    import deepthin.torch as dt

    limited = {"model": {"file_bytes": dense_bytes(model) - 200_000}, "rules": RATIO["rules"]}
    match case:
        case "plan":
            dt.plan(model, RATIO)
        case "compress":
            dt.compress(model, RATIO)
        case "plan file_bytes" | "compress file_bytes":
            (dt.plan if case.startswith("plan") else dt.compress)(model, limited)
        case "save":
            dt.save(model, path)
        case "load":
            dt.load(model, path)
        case _:
            raise ValueError(case)


def measure(case: str) -> None:
    """One case, in this process; prints its figures."""
    import torch
    from torch import nn

    import deepthin.torch as dt

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if case.startswith("meta"):
        model = nn.Embedding(10_000_000, 256, device="meta")
        target = {"file_bytes": 100_000_000} if "file" in case else {"ratio": 0.01}
        dt.plan(nn.Embedding(100, 8, device="meta"), {"model": {"ratio": 0.5}})
        before, start = resident(), time.perf_counter()
        dt.plan(model, {"model": target, "rules": {"*": {"method": "deepthin"}}})
        seconds = time.perf_counter() - start
        print(json.dumps({"case": case, "memory": resident("VmHWM") - before, "passes": 0.0, "seconds": seconds}))
        return
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder, "m.thin")
        small, model = build(256, 1, 1000), build()
        if case in ("save", "load"):
            for one in (small, model):
                dt.compress(one, RATIO)
        for one in (small, model):
            if case == "load":
                dt.save(one, path)
            size, counted, crc32 = dense_bytes(one), 0, zlib.crc32

            def counting(data: Any, value: int = 0, crc32: Any = crc32) -> int:
                nonlocal counted
                counted += len(data)
                return crc32(data, value)

            zlib.crc32 = counting
            before, start = resident(), time.perf_counter()
            call(case, one, path)
            seconds, memory = time.perf_counter() - start, resident("VmHWM") - before
            zlib.crc32 = crc32
    print(json.dumps({"case": case, "memory": memory, "passes": counted / size, "seconds": seconds}))


def resident(field: str = "VmRSS") -> int:
    """Resident bytes: ``VmRSS`` gives those now and resets the peak, ``VmHWM`` gives the peak since then."""
    if field == "VmRSS":
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def main() -> None:
    """Run every case in a separate process and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="only this case, in this process, as JSON")
    if case := parser.parse_args().case:
        measure(case)
        return
    print(f"{'case':<22}{'memory MB':>10}{'passes':>8}{'seconds':>9}")
    for case in CASES:
        command = [sys.executable, __file__, "--case", case]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{case:<22}{row['memory'] / 1e6:>10.1f}{row['passes']:>8.1f}{row['seconds']:>9.2f}", flush=True)


if __name__ == "__main__":
    main()
