"""All tables and charts of docs/performance.md, by `deepthin bench` on this machine (`make figures`).

    python benchmarks/figures.py [--parts linear,ranks,modules,training,recurrent,convolutions] [--repeats N]

Each part runs its cases one after the other, one thread each (`convolutions`: `benchmarks/convolutions.py`), and then
replaces its tables in the page, which stand between `<!-- figures: NAME -->` and `<!-- end -->`, and its charts in
docs/figures. Every table says machine and date. `--repeats` takes the place of each part's own number: a small one
shows that all runs. Rows stay in `--out`, `runs/figures` unless said.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deepthin.kernels import products
from deepthin.lab.bench.shown import PAPER, PAPER_RATIOS

DOCS = Path(__file__).resolve().parent.parent / "docs"
Rows = list[dict[str, Any]]


class Run(NamedTuple):
    """One call of `deepthin bench`: its name, the words, how often it repeats, and the chart that it draws."""

    name: str
    words: str
    repeats: int
    chart: str | None = None


class Part(NamedTuple):
    """Calls, and the tables that follow from their rows; or a script of the same folder that prints a table itself."""

    runs: tuple[Run, ...]
    tables: dict[str, Callable[[dict[str, Rows]], str]]
    script: str = ""
    repeats: int = 0  # of the script


def times(rival: float | None, own: float | None) -> str:
    """How many times faster, in two or three digits."""
    if not rival or not own:
        return ""
    faster = rival / own
    return f"{faster:.1f}" if faster < 9.95 else f"{faster:.0f}"


def table(heads: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines))


def select(rows: Rows, **wanted: Any) -> dict[str, Any]:
    """The row with these values; empty if there is none, or none with times."""
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return found[0] if found and found[0].get("microseconds") else {}


def against(row: dict[str, Any], rival: str, own: str = "microseconds") -> str:
    """How many times faster a row's own time is than a rival's."""
    return times(row.get(f"{rival}_microseconds"), row.get(own))


def of_linear(measured: dict[str, Rows]) -> str:
    """One layer against the best dense product, int8, and in training."""
    lines = []
    for ratio in PAPER_RATIOS:
        rows = [select(measured["linear"], ratio=ratio, batch=batch) for batch in (1, 8, 32)]
        step = select(measured["train"], ratio=ratio)
        best, int8 = ([against(row, rival) for row in rows] for rival in ("best_dense", "int8"))
        lines.append([f"{ratio:.4f}"[1:], str(rows[0].get("n", "")), *best, " / ".join(int8), against(step, "dense")])
    heads = ["ratio", "n", "batch 1", "batch 8", "batch 32", "int8: batch 1 / 8 / 32", "training step, batch 128"]
    return table(heads, lines)


def of_network(measured: dict[str, Rows]) -> str:
    """The paper's network against the dense one, with warm and with flushed caches."""
    lines = []
    for place, ratio in enumerate(PAPER_RATIOS):
        rows = [select(measured["tfkaldi"], ratio=ratio, batch=batch) for batch in (1, 8, 32)]
        cold = times(rows[0].get("cold_best_dense_microseconds"), rows[0].get("cold_microseconds"))
        papers = max(figures[place] for figures in PAPER["tfkaldi"].values())
        lines.append([f"{ratio:.4f}"[1:], *(against(row, "dense") for row in rows), cold, f"{papers:.2f}"])
    return table(["ratio", "batch 1", "batch 8", "batch 32", "batch 1, flushed caches", "the paper's best"], lines)


def of_ranks(measured: dict[str, Rows]) -> str:
    """Higher ranks, layer / network, against the best dense product; the worst case against the decoded weight."""
    lines = []
    for rank in (2, 4, 8):
        for ratio in (0.04, 0.0195, 0.0099):
            cells, decoded = [], []
            for batch in (1, 8, 32, 128):
                rows = [select(measured[f"{case}-{rank}"], ratio=ratio, batch=batch) for case in ("linear", "tfkaldi")]
                found = [against(row, "best_dense") or "too small" for row in rows]
                cells.append(" / ".join(found))
                decoded += [row["decoded_microseconds"] / row["layer_microseconds"] for row in rows if row]
            lines.append([str(rank), f"{ratio:g}"[1:], *cells, times(min(decoded, default=None), 1)])
    heads = ["rank", "ratio", "batch 1", "batch 8", "batch 32", "batch 128"]
    return table([*heads, "decoded weight, worst case, as modules"], lines)


def of_modules(measured: dict[str, Rows]) -> str:
    """Modules: times of all kinds of factors, and how many times faster coded ones are than each dense rival."""
    lines = []
    for case, title in (("modules", "a layer, 2048 x 2048"), ("acoustic", "429-4x1024-102")):
        for rank in (1, 4):
            for row in sorted(measured[f"{case}-{rank}"], key=lambda row: (row["batch"], -row["ratio"])):
                if not row.get("microseconds"):
                    continue
                own = [row.get(f"{name}microseconds") for name in ("", "thin_8bit_", "thin_coded_")]
                shown = [f"{one:,.0f}" if one else "" for one in own]
                rivals = ("dense", "best_dense", "bf16", "int8", "torchao_int8")
                faster = [against(row, rival, "thin_coded_microseconds") for rival in rivals]
                lines.append([title, str(rank), f"{row['ratio']:g}"[1:], str(row["batch"]), " / ".join(shown), *faster])
    heads = ["module", "rank", "ratio", "batch", "fp32 / 8 bits / coded, µs", "dense", "best dense", "bf16", "int8"]
    return table([*heads, "torchao int8"], lines)


def of_recurrent(measured: dict[str, Rows]) -> str:
    """Recurrent networks against torch's layers."""
    lines = []
    for place, ratio in enumerate(PAPER_RATIOS):
        cells = []
        for case in ("lstm", "gru"):
            cells.append(" / ".join(against(select(measured[case], ratio=ratio, batch=b), "dense") for b in (1, 8)))
        int8 = [against(select(measured[case], ratio=ratio, batch=1), "int8") for case in ("lstm", "gru")]
        speech = " / ".join(against(select(measured["deepspeech"], ratio=ratio, batch=b), "dense") for b in (1, 8))
        papers = max(figures[place] for figures in PAPER["deepspeech"].values())
        step = against(select(measured["train-lstm"], ratio=ratio), "dense") or "too small"
        lines.append([f"{ratio:.4f}"[1:], *cells, ", ".join(int8), speech, f"{papers:.2f}", step])
    heads = [
        "ratio",
        "LSTM 1 / 8",
        "GRU 1 / 8",
        "over int8, batch 1: LSTM, GRU",
        "deepspeech 1 / 8",
        "the paper's best",
    ]
    return table([*heads, "training step of `ctc`"], lines)


def of_training(measured: dict[str, Rows]) -> str:
    """Training steps with factors in fp32 and with learned steps, against dense."""
    lines = []
    for name, title in (
        ("train-acoustic", "`acoustic`, batch 128, with Adam"),
        ("train-acoustic-4", "`acoustic`, batch 128, with Adam"),
        ("train-lstm-4", "`ctc`, batch 16"),
    ):
        for row in measured[name]:
            if row.get("microseconds"):
                coded = against(row, "dense", "thin_coded_microseconds")
                dense = f"{row['dense_microseconds'] / 1000:,.1f}"
                lines.append([title, str(row["rank"]), f"{row['ratio']:g}"[1:], dense, against(row, "dense"), coded])
    return table(["step", "rank", "ratio", "dense, ms", "fp32", "coded"], lines)


MODULES = "--ratios 0.04,0.0195,0.0099 --batch 1,8,32"
RANKS = "--ratios 0.04,0.0195,0.0099 --batch 1,8,32,128"
PARTS = {
    "linear": Part(
        (
            Run("linear", "linear", 31, "linear.png"),
            Run("tfkaldi", "tfkaldi", 31, "tfkaldi.png"),
            Run("train", "train", 31),
        ),
        {"linear": of_linear, "network": of_network},
    ),
    "ranks": Part(
        tuple(
            Run(f"{case}-{rank}", f"{case} --rank {rank} {RANKS}", 11)
            for case in ("linear", "tfkaldi")
            for rank in (2, 4, 8)
        ),
        {"ranks": of_ranks},
    ),
    "modules": Part(
        tuple(
            Run(f"{case}-{rank}", f"{case} --rank {rank} {MODULES}", 41)
            for case in ("modules", "acoustic")
            for rank in (1, 4)
        ),
        {"modules": of_modules},
    ),
    "recurrent": Part(
        (
            Run("lstm", "lstm", 5, "lstm.png"),
            Run("gru", "gru", 5),
            Run("deepspeech", "deepspeech", 5, "deepspeech.png"),
            Run("train-lstm", "train-lstm", 9),
        ),
        {"recurrent": of_recurrent},
    ),
    "training": Part(
        (
            Run("train-acoustic", "train-acoustic --ratios 0.04,0.0195,0.0099", 31),
            Run("train-acoustic-4", "train-acoustic --rank 4 --ratios 0.04", 31),
            Run("train-lstm-4", "train-lstm --rank 4 --ratios 0.08,0.04", 15),
        ),
        {"training": of_training},
    ),
    "convolutions": Part((), {"convolutions": lambda measured: ""}, "convolutions.py --networks", 11),
}


def machine() -> str:
    """Processor, cores, versions and the day."""
    told = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", told)
    family = re.search(r"cpu family\s*: (.*)\nmodel\s*: (.*)", told)
    processor = (name[1].strip() if name else platform.processor()) + (f" ({family[1]}/{family[2]})" if family else "")
    threads = f"one thread of {os.cpu_count()} cores"
    kernels = f"kernels {products.isa()}, torch {torch.__version__} with {torch.backends.cpu.get_cpu_capability()}"
    return f"{processor}, {threads}, {kernels}, {datetime.date.today().isoformat()}"


def measure(run: Run, repeats: int, out: Path) -> Rows:
    """The rows of one call."""
    path = out / f"{run.name}.json"
    words = ["bench", *run.words.split(), "--threads", "1", "--repeats", str(repeats), "--out", str(path)]
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "deepthin", *words], env=environment, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise RuntimeError(f"deepthin {' '.join(words)} ended with {done.returncode}:\n{done.stderr}")
    print(f"{run.name}: {time.perf_counter() - start:.0f} s", flush=True)
    return json.loads(path.read_text())


def printed(script: str, repeats: int) -> str:
    """The table that a script prints."""
    name, *words = script.split()
    command = [sys.executable, str(Path(__file__).parent / name), *words, "--repeats", str(repeats)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def replaced(page: str, name: str, text: str) -> str:
    """A page with another table under a name.

    Args:
        page: The page, in Markdown.
        name: What `<!-- figures: NAME -->` says.
        text: The table, and what stands with it.

    Returns:
        The page.

    Raises:
        ValueError: The page has no such place.
    """
    begin, end = f"<!-- figures: {name} -->\n", "<!-- end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"The page has no {begin.strip()} that is followed by {end}.")
    return before + begin + "\n" + text + "\n\n" + end + after


def main(words: list[str] | None = None) -> None:
    """Run the parts and rewrite the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--repeats", type=int, help="instead of each part's own number")
    parser.add_argument("--out", type=Path, default=Path("runs") / "figures", help="folder for rows and charts")
    parser.add_argument("--page", type=Path, default=DOCS / "performance.md")
    given = parser.parse_args(words)
    given.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    for name in given.parts.split(","):
        part = PARTS[name]
        measured = {run.name: measure(run, given.repeats or run.repeats, given.out) for run in part.runs}
        for title, made in part.tables.items():
            measured_table = printed(part.script, given.repeats or part.repeats) if part.script else made(measured)
            text = f"{measured_table}\n\n*{machine()}.*"
            print(text, flush=True)
            given.page.write_text(replaced(given.page.read_text(), title, text))
        for run in part.runs:
            if run.chart and (chart := given.out / f"{run.name}.png").exists():
                shutil.copy(chart, given.page.parent / "figures" / run.chart)
    print(f"All in {(time.perf_counter() - start) / 60:.0f} minutes.")


if __name__ == "__main__":
    main()
