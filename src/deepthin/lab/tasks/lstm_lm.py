"""The next word of a text by an LSTM: perplexity on the Penn Treebank, or on Jane Austen's novels.

Zaremba, Sutskever and Vinyals, 2014, arXiv:1409.2329: the small network is depth 2 and width 200, the medium one width
650; DeepTwist (arXiv:1810.12823) also has depth 1 and width 300. Training is ours (docs/language.md).
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from deepthin.errors import ConfigError
from deepthin.lab.tasks import austen
from deepthin.lab.tasks.ctc import precision
from deepthin.lab.tasks.task import ModuleTask
from deepthin.lab.tasks.training import Training

WIDTH, DEPTH = 200, 2
BATCH, UNROLLED = 20, 20  # texts side by side; words of each in a step, through which gradients go back
WARM_UP = 100  # steps
CLIP = 0.25  # of the gradient's norm, that of a mean over words; the paper's 5 is of a sum over 20


UNKNOWN = "<unk>"
MOST_WORDS = 10_000  # of the vocabulary
LEAST_COUNT = 3  # times that a word of the novels occurs in the training split, or it is unknown
SUBSET = 200_000  # training words of the novels without --data
SPLITS = {"train": "ptb.train.txt", "dev": "ptb.valid.txt", "test": "ptb.test.txt"}

State = tuple[Tensor, Tensor]
"""Of an LSTM: h and c, layers x texts x width each."""


@dataclass(frozen=True)
class Data:
    """Texts by split, ``train``, ``dev`` and ``test``, as numbers of words; ``words`` has the word of each number."""

    texts: dict[str, Int[Tensor, "_"]]
    words: list[str]
    about: str


class LanguageModel(nn.Module):
    """Scores of each next word, and the state after the last one, from words and the state before."""

    def __init__(self, words: int, width: int, depth: int) -> None:
        super().__init__()
        probability = dropout(width)
        self.embedding = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, width, depth, dropout=probability if depth > 1 else 0.0)
        self.dropout = nn.Dropout(probability)
        self.output = nn.Linear(width, words)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -spread(width), spread(width))

    def forward(
        self, words: Int[Tensor, "steps texts"], state: State | None = None
    ) -> tuple[Float[Tensor, "steps texts words"], State]:
        """Without a state, that of the beginning of a text."""
        x, last = self.lstm(self.dropout(self.embedding(words)), state)
        return self.output(self.dropout(x)).float(), last


def dropout(width: int) -> float:
    """Zaremba's: none up to his small network's 200 units, .5 up to his medium one's 650, .65 for wider ones."""
    return 0.0 if width <= 200 else 0.5 if width <= 650 else 0.65


def spread(width: int) -> float:
    """Of the weights' uniform start, to either side: .1 and .05 for Zaremba's small and medium network."""
    return 0.1 if width <= 300 else 0.05


def load(folder: Path | None, most: int | None = None) -> Data:
    """The Penn Treebank or the whole novels from ``folder``; without, the first part of the installed novels.

    ``most``: training words, a share of all splits. ConfigError where there is neither text.
    """
    if folder is not None and (treebank := _treebank(folder)) is not None:
        return data_of(treebank, "Penn Treebank", 1, most)
    root = austen.find(folder or austen.INSTALLED)
    if root is None:
        raise ConfigError(
            f"There is no text in {folder or austen.INSTALLED}. Either give --data a folder with the Penn Treebank "
            "(ptb.train.txt, ptb.valid.txt, ptb.test.txt), or install Debian's r-cran-janeaustenr, or unpack it "
            "(dpkg -x) and give --data the folder: see docs/language.md."
        )
    return data_of(novels(root), "Jane Austen's novels", LEAST_COUNT, most if folder else most or SUBSET)


def novels(root: Path) -> dict[str, list[str]]:
    """Words by split: the first eight tenths of each novel to train, the next for development, the last for tests."""
    found: dict[str, list[str]] = {split: [] for split in SPLITS}
    for lines in austen.read(root).values():
        words = austen.words(lines)
        first, second = len(words) * 8 // 10, len(words) * 9 // 10
        for split, part in zip(SPLITS, (words[:first], words[first:second], words[second:]), strict=True):
            found[split] += part
    return found


def data_of(splits: dict[str, list[str]], name: str, least: int = 1, most: int | None = None) -> Data:
    """Texts of words as texts of numbers; of each split the first share that leaves ``most`` words to train.

    The vocabulary are the 10,000 most frequent words of the training split that occur ``least`` times in it.
    """
    whole = len(splits["train"])
    splits = {split: words[: len(words) * min(most or whole, whole) // whole] for split, words in splits.items()}
    counts = Counter(splits["train"])
    del counts[UNKNOWN]
    known = [word for word, count in counts.most_common(MOST_WORDS - 1) if count >= least]
    numbers = {word: number for number, word in enumerate([UNKNOWN, *known])}
    texts = {split: torch.tensor([numbers.get(word, 0) for word in words]) for split, words in splits.items()}
    for split, text in texts.items():
        if len(text) < 2 * BATCH:
            raise ConfigError(f"{name}: {split} has {len(text)} words; {2 * BATCH} are needed.")
    amounts = "{:,} words to train, {:,} for development, {:,} to test".format(*map(len, texts.values()))
    unknown = 100 * (texts["dev"] == 0).double().mean().item()
    about = f"{name}: {amounts}; vocabulary {len(numbers):,}; {unknown:.1f} % unknown in development"
    return Data(texts, list(numbers), about)


def build(data: Data | None, width: int, depth: int = DEPTH) -> nn.Module:
    """``depth`` layers of ``width`` units after an embedding as wide; without data, for 10,000 words.

    With data the output's biases begin as logarithms of the words' frequencies: else Adam drives the layers into
    saturation on the way there (docs/language.md).
    """
    model = LanguageModel(len(data.words) if data else MOST_WORDS, width, depth)
    if data:
        counts = torch.bincount(data.texts["train"], minlength=len(data.words)).double() + 1
        with torch.no_grad():
            model.output.bias.copy_((counts / counts.sum()).log())
    return model


def rules(rule: dict[str, object]) -> dict[str, dict[str, object]]:
    """Every matrix: embedding, recurrent layers, output."""
    return {"*": rule}


def fit(model: nn.Module, data: Data, training: Training) -> None:
    """The cross entropy by gradients through 20 words, the state carried on through each pass; the last state counts.

    Products are in bfloat16 where the processor has them; everything else is in fp32.
    """
    count = epoch_steps(data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)  # dropout draws from torch's own generator
        places = training.batches(count, 1, WARM_UP, lambda: torch.arange(count))
        for step_loss in losses(model, data, map(int, places), training.carried):
            training.minimise(step_loss, CLIP)


def losses(
    model: nn.Module, data: Data, places: Iterable[int], carried: dict[str, Tensor] | None = None
) -> Iterator[Float[Tensor, ""]]:
    """The mean cross entropy of the training text's steps at these places, in nats a word; at 0 the state begins.

    ``carried`` has the state between two steps.
    """
    steps, carried = list(steps_of(data.texts["train"])), {} if carried is None else carried
    for place in places:
        inputs, targets = steps[place]
        with precision():
            scores, after = model(inputs, (carried["h"], carried["c"]) if place else None)
        carried |= {"h": after[0].detach().float(), "c": after[1].detach().float()}
        yield F.cross_entropy(scores.flatten(0, 1), targets.flatten())


def epoch_steps(data: Data) -> int:
    """Steps of a pass over the training text."""
    return -(-((len(data.texts["train"]) - 1) // BATCH) // UNROLLED)


def loss(model: nn.Module, data: Data) -> float:
    """The mean cross entropy of the development text, in nats a word."""
    return _entropy(model, data.texts["dev"])


def evaluate(model: nn.Module, data: Data, split: str) -> dict[str, float]:
    """The perplexity: e to the mean cross entropy in nats a word; infinity from e^700 on."""
    entropy = _entropy(model, data.texts[split])
    return {"perplexity": math.exp(entropy) if entropy < 700 else math.inf}


def example(data: Data) -> tuple[Tensor, ...]:
    """The first 20 words of a text."""
    return (data.texts["test"][:UNROLLED, None],)


def steps_of(text: Int[Tensor, "_"]) -> Iterator[tuple[Int[Tensor, "steps texts"], Int[Tensor, "steps texts"]]]:
    """Words and their successors, 20 of each of 20 equal parts of the text; what is over of either comes last or not.

    The last step may be shorter; up to 19 words at the end of the text are left out.
    """
    length = (len(text) - 1) // BATCH
    inputs, targets = (text[i : i + BATCH * length].view(BATCH, length).T.contiguous() for i in (0, 1))
    yield from zip(inputs.split(UNROLLED), targets.split(UNROLLED), strict=True)


def _entropy(model: nn.Module, text: Int[Tensor, "_"]) -> float:
    """The state is carried on; each of the 20 parts begins without one."""
    model.eval()
    total, count = 0.0, 0
    state: State | None = None
    with torch.no_grad():
        for inputs, targets in steps_of(text):
            scores, state = model(inputs, state)
            total += F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="sum").item()
            count += targets.numel()
    return total / count


def _treebank(folder: Path) -> dict[str, list[str]] | None:
    """Its words by split, the end of each line a word; None if it is not there, ConfigError if a part is missing."""
    root = next((place for place in (folder / "ptb", folder) if (place / SPLITS["train"]).exists()), None)
    if root is None:
        return None
    found: dict[str, list[str]] = {}
    for split, name in SPLITS.items():
        try:
            lines = (root / name).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{root / name} cannot be read ({error}): give all three of {', '.join(SPLITS.values())}."
            ) from None
        found[split] = [word for line in lines for word in (*line.split(), austen.END)]
    return found


TASK = ModuleTask(
    name="lstm-lm",
    about="words by an LSTM: the Penn Treebank from --data, or Jane Austen (Debian's r-cran-janeaustenr): perplexity",
    metrics=("perplexity",),
    width=WIDTH,
    depth=DEPTH,
    steps=2500,
    load=load,
    build=build,
    rules=rules,
    fit=fit,
    evaluate=evaluate,
    example=example,
    loss=loss,
    # Chosen on the development text of the cut novels, for these four (docs/language.md).
    learning_rate=2e-3,
    learning_rates={"dense": 5e-3, "same-size": 2e-2, "rank": 1e-3},
)
