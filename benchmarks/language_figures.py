"""The table and the figures of benchmarks/language.py, from its stored rows.

DeepTwist (Lee, Kapoor and Kim, 2018, arXiv:1810.12823): Figures 2a, 3 and 4.
"""

from pathlib import Path
from typing import Any

from deepthin.storage.report import table

SHARED = " shared"  # in a setting: the input matrix uses the projection of the recurrent one
SECTIONS = ("pruning", "rank", "bits", "deepthin")
FIRST = ("lstm.weight_ih_l0", "lstm.weight_hh_l0")  # matrices whose singular values and histogram are drawn
BINS, LIMIT = 101, 0.5  # the histogram covers weights from -LIMIT to LIMIT

# The paper's medium network, 2 x 650 units on the Penn Treebank, 83.78 before it is compressed. Of its Tables 3 and 4
# we know only what its text says.
PAPER = {
    ("pruning", "80 %", "twist"): "< 83.78",
    ("pruning", "85 %", "twist"): "< 83.78",
    ("rank", ".39", "twist"): "81.75",
    ("rank", ".39", "once"): "(84.88)",
    ("rank", ".20", "twist"): "81.70",
    ("rank", ".15", "twist"): "82.02",
    ("rank", ".15 shared", "twist"): "82.65",
    ("rank", ".10", "once"): "(92.70)",
}


def shown(rows: list[dict[str, Any]]) -> str:
    """The table of perplexities; ``at once`` is that after compression in one step, before further training."""
    body = [
        (
            row["section"],
            row["setting"],
            row["way"],
            f"{row['bytes']:,}",
            f"{row['before']:.1f}" if "before" in row else "",
            f"{row['test']:.2f}",
            f"{row['dev']:.2f}",
            PAPER.get((row["section"], row["setting"], row["way"]), ""),
            f"{row['seconds']:.0f}",
        )
        for row in sorted(rows, key=lambda row: ("dense", *SECTIONS).index(row["section"]))
    ]
    heads = ("", "", "way", "file bytes", "at once", "test", "development", "paper (83.78 dense)", "seconds")
    return table(heads, body, right=range(3, 9), total=False)


def draw(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw the paper's Figures 2a, 3 and 4 for the finished cases: perplexity by rank, singular values, histograms."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    by = {(row["section"], row["setting"], row["way"]): row for row in rows}
    ways = {"twist": "DeepTwist", "once": "at once, then trained further"}
    found: list[Path] = []

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", dpi=120)
        plt.close(figure)
        found.append(folder / f"{name}.png")

    ranks = [row for row in rows if row["section"] == "rank"]
    shared = [row for row in ranks if row["setting"].endswith(SHARED)]
    ranks = [row for row in ranks if row not in shared]
    if ranks:
        figure, axes = plt.subplots(figsize=(5, 4))
        lines = {name: [(float(r["setting"]), r["test"]) for r in ranks if r["way"] == w] for w, name in ways.items()}
        lines["at once"] = [(float(r["setting"]), r["before"]) for r in ranks if "before" in r]
        for row in shared:
            label = f"{ways[row['way']]}, shared projection"
            axes.plot(float(row["setting"].removesuffix(SHARED)), row["test"], "x", label=label)
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=name) if points else None
        axes.axhline(by["dense", "", ""]["test"], color="0.6", label="dense")
        axes.set(xlabel="rank / units", ylabel="test perplexity")
        axes.legend()
        save(figure, "rank")
    spectra = next((row["spectra"] for row in reversed(ranks) if "spectra" in row), None)
    if spectra:
        epochs = list(dict.fromkeys([*list(spectra)[:2], list(spectra)[-1]]))
        figure, panels = plt.subplots(1, len(FIRST), figsize=(9, 4))
        for axes, matrix in zip(panels, FIRST, strict=True):
            for epoch in epochs:
                axes.semilogy(spectra[epoch][matrix], label=f"epoch {epoch}")
            axes.set(xlabel="number", ylabel="singular value", title=matrix)
            axes.legend()
        save(figure, "singular-values")
    pruned = [(name, by["pruning", "90 %", way]) for way, name in ways.items() if ("pruning", "90 %", way) in by]
    if pruned:
        figure, panels = plt.subplots(1, len(pruned), figsize=(4.5 * len(pruned), 4), squeeze=False, sharey=True)
        width = 2 * LIMIT / BINS
        for axes, (name, row) in zip(panels[0], pruned, strict=True):
            axes.bar([-LIMIT + width * (i + 0.5) for i in range(BINS)], row["histogram"], width)
            axes.set(xlabel="weight, LSTM layer 1, 90 % pruned", ylabel="count", title=name)
        save(figure, "histogram")
    return found
