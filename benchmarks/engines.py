"""How much sooner two nodes of Ray, of one core each, end a comparison of 16 trials than one.

`python benchmarks/engines.py`. The nodes are processes of this machine, which needs two free cores, and part of a third
for the driver. The time of the trials goes from the end of the second one to that of the last one.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from two_nodes import Nodes

METHODS, RATIOS, SEEDS = "rank,hashed,kronecker", "0.05,0.02", "2"  # with dense and int8: 16 trials


def timed(count: int, steps: int) -> tuple[float, float]:
    """Seconds of the command on so many nodes, and of its trials but for the first ones."""
    with tempfile.TemporaryDirectory() as folder, Nodes(Path(folder)) as nodes:
        nodes.head()
        for _ in range(count - 1):
            nodes.node()
        out = Path(folder) / "out"
        words = [sys.executable, "-m", "deepthin", "compare", "digits", "--methods", METHODS, "--ratios", RATIOS]
        words += ["--seeds", SEEDS, "--steps", str(steps), "--engine", "ray", "--jobs", str(count), "--out", str(out)]
        began = time.time()
        subprocess.run(words, env=nodes.environment, check=True, capture_output=True)
        whole = time.time() - began
        # rows are written again with the latency, models only once
        ends = sorted(path.stat().st_mtime for path in (out / "models").glob("*.thin"))
        return whole, ends[-1] - ends[1]


def main() -> None:
    """Run both in turn, and print the seconds and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    for _ in range(options.rounds):
        (one, one_trials), (two, two_trials) = timed(1, options.steps), timed(2, options.steps)
        print(f"command: {one:.0f} s on one node, {two:.0f} s on two, ratio {two / one:.2f}")
        print(
            f"trials:  {one_trials:.0f} s on one node, {two_trials:.0f} s on two, ratio {two_trials / one_trials:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
