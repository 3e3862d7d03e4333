"""Draw docs/figures/symmetry.png: the same number of factors, with and without the symmetry that DeepThin breaks.

python docs/symmetry.py
"""

from pathlib import Path

import matplotlib as mpl
import numpy as np

from deepthin.methods.factor import Factor

mpl.use("Agg")
from matplotlib import pyplot

SIDE = 48
PLANS = (
    ("plain rank 1 (n = Q = 48)\nevery row is the same row, scaled", 48),
    ("n = 16, gcd(n, Q) = 16\nrows in the same phase, piece by piece scaled", 16),
    ("DeepThin, n = 17, gcd(n, Q) = 1\nno two neighbours in the same phase", 17),
)


def main() -> None:
    """Three weights above, their singular values below."""
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 7), dpi=110, height_ratios=(3, 1.6))
    for (title, n), upper, lower in zip(PLANS, axes[0], axes[1], strict=True):
        method = Factor((SIDE, SIDE), n, 1)
        code = method.init(np.random.default_rng(5), 1.0)
        weight = method.decode({entry: array.astype("f8") for entry, array in code.items()}, np)
        upper.imshow(weight, cmap="RdBu", vmin=-2, vmax=2, interpolation="nearest")
        upper.set_title(title, fontsize=10)
        upper.set_xlabel(f"inputs, Q = {SIDE}")
        upper.set_ylabel("outputs")
        upper.set_xticks([])
        upper.set_yticks([])
        values = np.linalg.svd(weight, compute_uv=False)
        lower.bar(np.arange(1, SIDE + 1), values / values.max(), color="#d62728", width=0.9)
        lower.set_title(
            f"singular values: rank {np.linalg.matrix_rank(weight)}, {code['xf'].size + n} floats", fontsize=10
        )
        lower.set_ylim(0, 1.05)
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "figures" / "symmetry.png")


if __name__ == "__main__":
    main()
