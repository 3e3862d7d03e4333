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
BATCH, UNROLLED = 20, 20  # parallel texts; words of each in a step, the length of back-propagation
WARM_UP = 100  # steps
CLIP = 0.25  # bound on the gradient's norm, for a mean over words; the paper's 5 is for a sum over 20


UNKNOWN = "<unk>"
MOST_WORDS = 10_000  # size of the vocabulary
LEAST_COUNT = 3  # rarer words of the novels are unknown
SUBSET = 200_000  # training words of the novels without --data
SPLITS = {"train": "ptb.train.txt", "dev": "ptb.valid.txt", "test": "ptb.test.txt"}

State = tuple[Tensor, Tensor]
"""State of an LSTM: h and c, layers x texts x width each."""


@dataclass(frozen=True)
class Data:
    """Texts by split, ``train``, ``dev`` and ``test``, as numbers of words; ``words`` has the word of each number."""

    texts: dict[str, Int[Tensor, "_"]]
    words: list[str]
    about: str


class LanguageModel(nn.Module):
    """An embedding, LSTM layers and a linear output: scores of each next word.

    Args:
        words: Size of the vocabulary.
        width: Units of the embedding and of each layer.
        depth: Number of layers.
    """

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
        """Scores of the next word at each step.

        Args:
            words: Indices of words.
            state: The state before the first step; None: zeros, as at the beginning of a text.

        Returns:
            The scores, and the state after the last step.
        """
        x, last = self.lstm(self.dropout(self.embedding(words)), state)
        return self.output(self.dropout(x)).float(), last


def dropout(width: int) -> float:
    """The dropout probability of a width (Zaremba, Sutskever and Vinyals, 2014, arXiv:1409.2329, section 4.1).

    Args:
        width: Units of each layer.

    Returns:
        0 up to 200 units, the paper's small network; 0.5 up to 650, its medium one; 0.65 above.
    """
    return 0.0 if width <= 200 else 0.5 if width <= 650 else 0.65


def spread(width: int) -> float:
    """The bound of the weights' uniform start (Zaremba, Sutskever and Vinyals, 2014, arXiv:1409.2329, section 4.1).

    Args:
        width: Units of each layer.

    Returns:
        0.1 up to 300 units, 0.05 above; weights are drawn between minus and plus this.
    """
    return 0.1 if width <= 300 else 0.05


def load(folder: Path | None, most: int | None = None) -> Data:
    """Load the Penn Treebank or Jane Austen's novels.

    Args:
        folder: A folder with either; None: the first 200,000 training words of the novels that Debian's package
            installs.
        most: Upper bound on the training words; the other splits are shortened in proportion. None: all.

    Returns:
        The text of all splits.

    Raises:
        ConfigError: There is neither text, or a file is damaged.
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
    """Words of the novels by split: the first eight tenths of each novel, the next tenth, and the last.

    Args:
        root: The package's folder, as ``austen.find`` returns it.

    Returns:
        ``train``, ``dev`` and ``test`` -> words.

    Raises:
        ConfigError: The novels cannot be read.
    """
    words_by_split: dict[str, list[str]] = {split: [] for split in SPLITS}
    for lines in austen.read(root).values():
        words = austen.words(lines)
        first, second = len(words) * 8 // 10, len(words) * 9 // 10
        for split, part in zip(SPLITS, (words[:first], words[first:second], words[second:]), strict=True):
            words_by_split[split] += part
    return words_by_split


def data_of(splits: dict[str, list[str]], name: str, least: int = 1, most: int | None = None) -> Data:
    """Turn words into indices. The vocabulary is the 10,000 most frequent words of the training split.

    Args:
        splits: ``train``, ``dev`` and ``test`` -> words.
        name: Name of the text, for people.
        least: A word that occurs less often in the training split is unknown.
        most: Upper bound on the training words; the other splits are shortened in proportion. None: all.

    Returns:
        Texts and vocabulary.

    Raises:
        ConfigError: A split is too short.
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
    """Build the language model.

    With data, the output's biases start as the logarithms of the words' frequencies: otherwise Adam drives the layers
    into saturation on the way there (docs/language.md).

    Args:
        data: What ``load`` returned; None: a vocabulary of 10,000 words.
        width: Units of the embedding and of each layer.
        depth: Number of LSTM layers.

    Returns:
        The dense network.
    """
    model = LanguageModel(len(data.words) if data else MOST_WORDS, width, depth)
    if data:
        counts = torch.bincount(data.texts["train"], minlength=len(data.words)).double() + 1
        with torch.no_grad():
            model.output.bias.copy_((counts / counts.sum()).log())
    return model


def rules(rule: dict[str, object]) -> dict[str, dict[str, object]]:
    """The table ``rules`` of a configuration that covers every matrix: embedding, recurrent layers, output.

    Args:
        rule: Method and options.

    Returns:
        The pattern ``*`` -> ``rule``.
    """
    return {"*": rule}


def fit(model: nn.Module, data: Data, training: Training) -> None:
    """Minimise the cross entropy by truncated back-propagation through 20 words; the last state stays.

    The recurrent state is carried through each pass over the text. Matrix products are in bfloat16 where the processor
    supports it; all else is in float32.

    Args:
        model: The network, dense or thin; changed in place.
        data: What ``load`` returned.
        training: Batches, optimiser and number of steps.

    Raises:
        NonFiniteError: The training diverges.
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
    """The mean cross entropy of steps of the training text, the state carried from one to the next.

    Args:
        model: The network.
        data: What ``load`` returned.
        places: Indices of steps, from 0 to ``epoch_steps(data) - 1``; at 0 the state is reset.
        carried: Holds the state between two steps, so that it can be saved with a checkpoint; None: a new one.

    Yields:
        Nats per word, differentiable within the step.
    """
    steps, carried = list(steps_of(data.texts["train"])), {} if carried is None else carried
    for place in places:
        inputs, targets = steps[place]
        with precision():
            scores, after = model(inputs, (carried["h"], carried["c"]) if place else None)
        carried |= {"h": after[0].detach().float(), "c": after[1].detach().float()}
        yield F.cross_entropy(scores.flatten(0, 1), targets.flatten())


def epoch_steps(data: Data) -> int:
    """Number of steps of one pass over the training text.

    Args:
        data: What ``load`` returned.

    Returns:
        Steps of 20 x 20 words.
    """
    return -(-((len(data.texts["train"]) - 1) // BATCH) // UNROLLED)


def loss(model: nn.Module, data: Data) -> float:
    """The mean cross entropy of the development text.

    Args:
        model: The network.
        data: What ``load`` returned.

    Returns:
        Nats per word.
    """
    return _entropy(model, data.texts["dev"])


def evaluate(model: nn.Module, data: Data, split: str) -> dict[str, float]:
    """Judge the network by its perplexity.

    Args:
        model: The network.
        data: What ``load`` returned.
        split: ``"dev"`` or ``"test"``.

    Returns:
        ``perplexity``: e to the mean cross entropy in nats per word; infinity from e^700 on.
    """
    entropy = _entropy(model, data.texts[split])
    return {"perplexity": math.exp(entropy) if entropy < 700 else math.inf}


def example(data: Data) -> tuple[Tensor, ...]:
    """The first 20 words of the test text.

    Args:
        data: What ``load`` returned.

    Returns:
        The network's only argument, 20 x 1.
    """
    return (data.texts["test"][:UNROLLED, None],)


def steps_of(text: Int[Tensor, "_"]) -> Iterator[tuple[Int[Tensor, "steps texts"], Int[Tensor, "steps texts"]]]:
    """Cut a text into steps: 20 successive words of each of 20 equal parts, and the word after each.

    Up to 19 words at the end of the text are left out.

    Args:
        text: Indices of words.

    Yields:
        Inputs and targets; the last pair may have fewer steps.
    """
    length = (len(text) - 1) // BATCH
    inputs, targets = (text[i : i + BATCH * length].view(BATCH, length).T.contiguous() for i in (0, 1))
    yield from zip(inputs.split(UNROLLED), targets.split(UNROLLED), strict=True)


def _entropy(model: nn.Module, text: Int[Tensor, "_"]) -> float:
    """Mean cross entropy, the state carried from step to step; each of the 20 parts begins with a zero state."""
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
    """Words by split, with one for the end of each line; None without Treebank, ConfigError if a part is missing."""
    root = next((place for place in (folder / "ptb", folder) if (place / SPLITS["train"]).exists()), None)
    if root is None:
        return None
    words_by_split: dict[str, list[str]] = {}
    for split, name in SPLITS.items():
        try:
            lines = (root / name).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{root / name} cannot be read ({error}): give all three of {', '.join(SPLITS.values())}."
            ) from None
        words_by_split[split] = [word for line in lines for word in (*line.split(), austen.END)]
    return words_by_split


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
    # Chosen on the development text of the shortened novels, for these methods (docs/language.md).
    learning_rate=2e-3,
    learning_rates={"dense": 5e-3, "same-size": 2e-2, "rank": 1e-3},
)
