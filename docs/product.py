"""Draw docs/figures/product.png: the two stages of the product without the weight, and how their cost grows with n.

python docs/product.py
"""

from pathlib import Path

import matplotlib as mpl
import numpy as np

from deepthin.kernels.costs import fft_length
from deepthin.methods.factor import Factor

mpl.use("Agg")
from matplotlib import colors, pyplot

SIDE, N = 8, 3  # a weight of 8 x 8 cut from rows of 3
LARGE = 2048


def draw_weight(axes) -> None:
    """The weight: which entry of wf (colour) and which row of xf (frame) each entry is made of."""
    entry = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)
    axes.imshow(entry % N, cmap=colors.ListedColormap(["#fee5d9", "#fcae91", "#fb6a4a"]))
    for j in range(SIDE):
        for q in range(SIDE):
            axes.text(q, j, str(entry[j, q] // N), ha="center", va="center", fontsize=7)
            if entry[j, q] % N == 0:
                axes.plot([q - 0.5, q - 0.5], [j - 0.5, j + 0.5], color="black", linewidth=1.5)
    axes.set_title("the weight: number = row of xf,\ncolour = entry of wf (n = 3)", fontsize=9)
    axes.set_ylabel("outputs j; starts at phase j Q mod n", fontsize=8)
    axes.set_yticks(range(SIDE), [f"{j}: {j * SIDE % N}" for j in range(SIDE)], fontsize=7)
    axes.set_xlabel("inputs", fontsize=8)
    axes.set_xticks([])


def draw_stages(axes) -> None:
    """The correlation in rows of n, and which outputs read which column of it."""
    axes.set_axis_off()
    axes.set_xlim(-0.2, 8.6)
    axes.set_ylim(6.4, -1.2)
    positions = SIDE + N - 1
    shades = ["#c6dbef", "#6baed6", "#2171b5"]
    for v in range(positions):
        s, lane = divmod(v, N)
        axes.add_patch(pyplot.Rectangle((lane, s), 1, 1, facecolor=shades[lane], edgecolor="white"))
        axes.text(lane + 0.5, s + 0.5, f"P[{v}]", ha="center", va="center", fontsize=7)
    axes.text(0, -0.15, "1. P = x correlated with wf,\n    once for all outputs", fontsize=9, va="bottom")
    axes.text(4, -0.15, "2. one small product a phase:\n    y[j] = sum of xf[.] * column", fontsize=9, va="bottom")
    for phase in range(N):
        lane = N - 1 - phase * SIDE % N
        outputs = list(range(phase, SIDE, N))
        y = 0.35 + phase * 1.5
        rows = -(-(phase * SIDE % N + SIDE) // N)
        for k in range(len(outputs)):
            for s in range(rows):
                axes.add_patch(
                    pyplot.Rectangle((4 + s * 0.5, y + k * 0.35), 0.5, 0.35, facecolor="#eeeeee", edgecolor="white")
                )
        axes.add_patch(pyplot.Rectangle((6.45, y), 0.3, 0.35 * len(outputs), facecolor=shades[lane], edgecolor="white"))
        axes.text(6.3, y + 0.17 * len(outputs), "x", ha="right", va="center", fontsize=8)
        axes.text(6.9, y + 0.17 * len(outputs), f"-> y[{', '.join(map(str, outputs))}]", va="center", fontsize=8)


def draw_cost(axes) -> None:
    """Multiplications for one item and one rank at 2048 x 2048."""
    sizes = np.unique(np.geomspace(3, LARGE, 60).astype(int) | 1)
    window = sizes * (LARGE + sizes)
    points = np.array([fft_length(LARGE // 2 + int(n) - 1) for n in sizes])
    transforms = 4 * points * np.log2(points)  # two transforms of `points` complex numbers, about 2 log2 a point each
    taps = LARGE * -(-(LARGE + sizes - 1) // sizes)
    axes.loglog(sizes, np.full(len(sizes), LARGE**2), "--", color="#444444", label="dense")
    axes.loglog(sizes, window, color="#9ecae1", label="stage 1, direct: n (Q + n)")
    axes.loglog(sizes, transforms, color="#2171b5", label="stage 1, FFT: ~ (Q + 2n) log")
    axes.loglog(sizes, taps, color="#fb6a4a", label="stage 2: R (Q / n + 1)")
    axes.loglog(
        sizes, taps + np.minimum(window, transforms), color="#a50f15", linewidth=2.2, label="both, the better way"
    )
    for ratio in (0.0195, 0.0099, 0.0040, 0.0014):
        n = Factor.fit((LARGE, LARGE), int(32 * ratio * LARGE**2)).n
        axes.axvline(n, color="#cccccc", linewidth=0.8, zorder=0)
        axes.text(n, 1.3e4, f"{ratio:g}", rotation=90, fontsize=7, ha="right", va="bottom", color="#777777")
    axes.set_ylim(1e4, 3e8)
    axes.set_xlabel("n (the size falls as 1/n up to its minimum; grey: sizes)", fontsize=8)
    axes.set_title("multiplications an item and rank, Q = R = 2048", fontsize=9)
    axes.legend(fontsize=7, frameon=False, loc="upper center", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Three panels."""
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.2), dpi=110, width_ratios=(1, 1.5, 1.4))
    draw_weight(axes[0])
    draw_stages(axes[1])
    draw_cost(axes[2])
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "figures" / "product.png")


if __name__ == "__main__":
    main()
