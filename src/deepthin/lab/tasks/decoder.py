"""From frame scores to words: the best path through a loop over words, each a chain of states that emit one column.

Phone models of a hybrid recogniser and the characters of a CTC net are the same loop with other chains. The search is
exact (Viterbi, no beam). It keeps words only: a state carries the frame at which its word was entered, and a frame the
best state in which a word could end there (token passing: Young, Russell and Thornton, 1989, CUED/F-INFENG/TR38).
CTC's chains are those of Graves et al., 2006 (ICML, "Connectionist temporal classification").
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from deepthin.errors import ConfigError, NonFiniteError

POSITIONS = 3  # states of a phone, passed from left to right
FLOOR = math.log(1e-5)  # log-probability of a word that the language model does not know
NO_WORDS = ("<s>", "</s>", "<unk>")  # markers of a language model, in either case


class _Chain(NamedTuple):
    """A pronunciation or spelling: its columns from left to right, and what entering it costs.

    A filler (silence, blanks) is a chain without a name. The next word begins after the last state; an utterance may
    end in each of the last ``endings``. A state in ``skips`` may follow the one before its neighbour.
    """

    word: str
    columns: list[int]
    entry: float
    endings: int = 1
    skips: Sequence[int] = ()


@dataclass(frozen=True, slots=True, eq=False)
class WordLoop:
    """A loop over chains of states, chain after chain; a state may follow itself and the one before it in its chain.

    ``entry`` is added where a chain is entered: natural logarithms, as the scores are.
    """

    words: tuple[str, ...]  # by chain; empty for a filler
    starts: Int[np.ndarray, "chains"]  # first states
    entry: Float[np.ndarray, "chains"]
    chain: Int[np.ndarray, "states"]  # the chain of a state
    columns: Int[np.ndarray, "states"]  # what a state emits
    skips: Int[np.ndarray, "skips"]  # states that may also follow the one before their neighbour
    leaves: Int[np.ndarray, "leaves"]  # states after which a chain may be entered
    finals: Int[np.ndarray, "finals"]  # states in which an utterance may end

    @classmethod
    def from_phones(
        cls,
        pronunciations: Iterable[tuple[str, Sequence[str]]],
        phones: Sequence[str],
        unigrams: Mapping[str, float],
        *,
        lm_weight: float = 1.0,
        word_penalty: float = 0.0,
        silence: str = "SIL",
        silence_penalty: float = 0.0,
    ) -> "WordLoop":
        """Words as phones of three states: state p of the phone ``phones[i]`` emits column 3i + p.

        Silence may stand between words and at both ends, any number of times. All transitions weigh the same.

        Args:
            pronunciations: (word, phones) pairs; a word may have several, each of which gets the word's full
                probability.
            phones: All phones, in the order of the columns.
            unigrams: Word -> natural log of its probability; a missing word gets ``FLOOR``.
            lm_weight: Factor of the log-probability.
            word_penalty: Subtracted for each word.
            silence: The phone of silence.
            silence_penalty: Subtracted for each silence.

        Returns:
            The loop.

        Raises:
            ConfigError: A phone is not in the list, or there are no words or an empty one.
        """
        number = {phone: i for i, phone in enumerate(phones)}

        def columns(word: str, sounds: Sequence[str]) -> list[int]:
            if unknown := [phone for phone in sounds if phone not in number]:
                raise ConfigError(
                    f"{word!r} is pronounced {' '.join(sounds)!r}, but {unknown[0]!r} is not among the {len(number)} "
                    "phones. Use the dictionary and the list of phones of one model."
                )
            return [POSITIONS * number[phone] + position for phone in sounds for position in range(POSITIONS)]

        words = [
            _Chain(word, columns(word, sounds), lm_weight * unigrams.get(word, FLOOR) - word_penalty)
            for word, sounds in pronunciations
        ]
        return cls._joined(words, _Chain("", columns("silence", [silence]), -silence_penalty))

    @classmethod
    def from_characters(
        cls,
        words: Iterable[str],
        symbols: Sequence[str],
        unigrams: Mapping[str, float],
        *,
        blank: str,
        word_end: str,
        lm_weight: float = 1.0,
        word_penalty: float = 0.0,
    ) -> "WordLoop":
        """Words as characters for CTC (Graves et al., 2006): ``symbols[i]`` is column i.

        Blanks may stand anywhere and must stand between equal characters; ``word_end`` follows each word, and may be
        missing after the last.

        Args:
            words: The words.
            symbols: All symbols, in the order of the columns, ``blank`` and ``word_end`` among them.
            unigrams: Word -> natural log of its probability; a missing word gets ``FLOOR``.
            blank: CTC's blank symbol.
            word_end: The symbol that ends a word.
            lm_weight: Factor of the log-probability.
            word_penalty: Subtracted for each word.

        Returns:
            The loop.

        Raises:
            ConfigError: A character is not among the symbols, or there are no words or an empty one.
        """
        number = {symbol: i for i, symbol in enumerate(symbols)}
        if missing := [symbol for symbol in (blank, word_end) if symbol not in number]:
            raise ConfigError(
                f"The symbols {list(symbols)} lack {missing[0]!r}. Name the blank and the end of a word as they "
                "stand in the list."
            )
        letters = set(number) - {blank, word_end}

        def spelled(word: str) -> _Chain:
            if unknown := [letter for letter in word if letter not in letters]:
                raise ConfigError(
                    f"{word!r} cannot be spelled: {unknown[0]!r} is not among the letters {sorted(letters)}. Leave the "
                    "word out, or train with that letter."
                )
            columns = [number[blank]] * (2 * len(word) + 1)
            columns[::2] = [number[letter] for letter in (*word, word_end)]
            skips = [i for i in range(2, len(columns), 2) if columns[i] != columns[i - 2]]
            entry = lm_weight * unigrams.get(word, FLOOR) - word_penalty
            return _Chain(word, columns, entry, endings=3, skips=skips)

        return cls._joined([spelled(word) for word in words], _Chain("", [number[blank]], 0.0))

    @classmethod
    def _joined(cls, words: list[_Chain], filler: _Chain) -> "WordLoop":
        if not words:
            raise ConfigError("There is no word to decode. Give at least one, e.g. with read_dictionary.")
        if empty := [chain for chain in words if not chain.word or len(chain.columns) < chain.endings]:
            raise ConfigError(f"The word {empty[0].word!r} is empty, or has no phones. Leave it out.")
        chains = [*words, filler]
        lengths = np.array([len(chain.columns) for chain in chains])
        after = np.cumsum(lengths)
        starts = after - lengths
        return cls(
            words=tuple(chain.word for chain in chains),
            starts=starts,
            entry=np.array([chain.entry for chain in chains]),
            chain=np.repeat(np.arange(len(chains)), lengths),
            columns=np.concatenate([chain.columns for chain in chains]),
            skips=np.concatenate([start + np.array(c.skips, int) for start, c in zip(starts, chains, strict=True)]),
            leaves=after - 1,
            finals=np.concatenate([np.arange(end - c.endings, end) for end, c in zip(after, chains, strict=True)]),
        )

    def decode(
        self,
        scores: Float[np.ndarray, "utterances frames columns"],
        lengths: Sequence[int] | Int[np.ndarray, "utterances"],
    ) -> list[list[str]]:
        """The words of the best path through each utterance (Viterbi, without a beam).

        Of words that sound alike and have equal weights, the earlier wins. Time is frames times states; memory is a
        copy of the scores, and 8 bytes per frame.

        Args:
            scores: Natural logarithms, up to a constant per frame; minus infinity forbids a column.
            lengths: Frames of each utterance, 0 to the number of frames; later ones are ignored.

        Returns:
            The words of each utterance; none where no path fits: too short, or all paths forbidden.

        Raises:
            ValueError: Shapes or lengths do not fit.
            NonFiniteError: A score is NaN or plus infinity.
        """
        scores, lengths = np.asarray(scores), np.asarray(lengths, dtype=np.int64)
        self._check(scores, lengths)
        order = np.argsort(-lengths, kind="stable")  # longest first, so that unfinished utterances are a slice
        decoded: list[list[str]] = [[] for _ in order]
        for utterance, words in zip(order, self._search(scores[order], lengths[order]), strict=True):
            decoded[utterance] = words
        return decoded

    def _check(self, scores: np.ndarray, lengths: np.ndarray) -> None:
        needed = int(self.columns.max()) + 1
        if scores.ndim != 3 or scores.shape[2] < needed:
            raise ValueError(
                f"Scores of shape {scores.shape} cannot be decoded: these words need (utterances, frames, {needed} or "
                "more columns). Pad utterances to one length and stack them."
            )
        if lengths.shape != scores.shape[:1] or (lengths < 0).any() or (lengths > scores.shape[1]).any():
            raise ValueError(
                f"Lengths {lengths.tolist()} do not fit scores of shape {scores.shape}: give one for each utterance, "
                f"0 to {scores.shape[1]} frames."
            )
        for utterance, length in enumerate(lengths):
            wrong = ~(scores[utterance, :length] < np.inf)
            if wrong.any():
                frame, column = np.argwhere(wrong)[0]
                raise NonFiniteError(
                    f"The score of utterance {utterance}, frame {frame}, column {column} is "
                    f"{scores[utterance, frame, column]}. Scores are log-probabilities; look at the net's weights."
                )

    def _search(self, scores: np.ndarray, lengths: np.ndarray) -> Iterator[list[str]]:
        """Words of one utterance after another; lengths must not increase."""
        frames, shape = int(lengths.max(initial=0)), (len(lengths), len(self.columns))
        best = np.full(shape, -np.inf)
        before = np.full(shape, -np.inf)  # the best path through the previous state, or into the chain
        entered = np.zeros(shape, np.int32)
        entered_before = np.zeros(shape, np.int32)
        ended = np.zeros(len(lengths))  # the best path that ends a word with the frame before
        last_state = np.zeros((frames, len(lengths)), np.int32)  # that path's state, and when its word was entered
        last_entered = np.zeros((frames, len(lengths)), np.int32)
        for frame in range(frames):
            running = int(np.searchsorted(-lengths, -frame))
            rows = np.arange(running)
            now, past, since, past_since = best[:running], before[:running], entered[:running], entered_before[:running]
            past[:, 1:] = now[:, :-1]
            past[:, self.starts] = ended[:running, None] + self.entry
            past_since[:, 1:] = since[:, :-1]
            past_since[:, self.starts] = frame
            if len(self.skips):
                skipping = now[:, self.skips - 2]
                neighbour = past[:, self.skips]
                chosen = np.where(skipping > neighbour, since[:, self.skips - 2], past_since[:, self.skips])
                past_since[:, self.skips] = chosen
                past[:, self.skips] = np.maximum(skipping, neighbour)
            np.copyto(since, past_since, where=past > now)
            np.maximum(now, past, out=now)
            now += scores[:running, frame].take(self.columns, 1)
            state = self.leaves[now[:, self.leaves].argmax(1)]
            ended[:running] = now[rows, state]
            last_state[frame, :running] = state
            last_entered[frame, :running] = since[rows, state]
        final = self.finals[best[:, self.finals].argmax(1)]
        for utterance, state in enumerate(final):
            if best[utterance, state] == -np.inf:
                yield []
                continue
            chains, since = [self.chain[state]], entered[utterance, state]
            while since > 0:
                frame = since - 1
                chains.append(self.chain[last_state[frame, utterance]])
                since = last_entered[frame, utterance]
            yield [self.words[chain] for chain in reversed(chains) if self.words[chain]]


def log_priors(states: Int[np.ndarray, "frames"], count: int) -> Float[np.ndarray, "count"]:
    """Log prior of each state, from its frequency; one is added to every count, so that none is zero.

    Args:
        states: State of each training frame.
        count: Number of states.

    Returns:
        Natural logarithms.
    """
    counts = np.bincount(states, minlength=count) + 1.0
    return np.log(counts / counts.sum())


def hybrid_scores(
    log_posteriors: Float[np.ndarray, "... states"],
    priors: Float[np.ndarray, "states"],
    *,
    prior_scale: float = 1.0,
    acoustic_scale: float = 1.0,
) -> Float[np.ndarray, "... states"]:
    """Scores of a hybrid recogniser: posteriors over priors (Bourlard and Morgan, 1994, "Connectionist speech
    recognition").

    Args:
        log_posteriors: Natural logarithms of the network's outputs.
        priors: Natural logarithms of the priors.
        prior_scale: Factor of the priors.
        acoustic_scale: Factor of the result.

    Returns:
        ``acoustic_scale * (log_posteriors - prior_scale * priors)``.
    """
    return acoustic_scale * (np.asarray(log_posteriors) - prior_scale * priors)


def read_dictionary(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Read a CMU-style pronunciation dictionary.

    Args:
        path: A text file with a word and its phones in each line; ``;;;`` begins a comment.

    Returns:
        (word, phones) pairs in the order of the file; a variant ``WORD(2)`` is one more entry of ``WORD``.

    Raises:
        ConfigError: The file cannot be read, a word has no phones, or there are no words.
    """
    entries: list[tuple[str, tuple[str, ...]]] = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip() or line.startswith(";;;"):  # a comment
            continue
        name, *phones = line.split()
        if not phones:
            raise ConfigError(
                f"{path}, line {number}: {name!r} has no phones. A line is a word and its phones, apart by blanks."
            )
        entries.append((re.sub(r"(?<=.)\(\d+\)$", "", name), tuple(phones)))
    if not entries:
        raise ConfigError(
            f"{path} holds no word. A pronunciation dictionary has one line for each word: the word, its phones."
        )
    return entries


def read_unigrams(path: Path) -> dict[str, float]:
    """Read the 1-grams of an ARPA language model.

    Args:
        path: The file, whose probabilities are log10.

    Returns:
        Word -> natural log of its probability.

    Raises:
        ConfigError: The file cannot be read, is no ARPA file, or has another number of 1-grams than it says.
    """
    lines = list(enumerate(map(str.strip, _lines(path)), 1))
    texts = [text for _, text in lines]
    way_out = "Download the file again, or write it again with the tool that made it."
    try:
        data = texts.index("\\data\\")  # comments before it may look like sections
        first = texts.index("\\1-grams:", data) + 1
        texts.index("\\end\\", first)
        last = next(i for i in range(first, len(texts)) if texts[i].startswith("\\"))
        declared = next(
            int(text.split("=")[1]) for text in texts[data:first] if re.match(r"ngram\s+1\s*=\s*\d+$", text)
        )
    except (ValueError, StopIteration):
        raise ConfigError(
            f"{path} is not a complete ARPA language model: it needs \\data\\ with 'ngram 1=', \\1-grams: and \\end\\, "
            f"each on its line. {way_out}"
        ) from None
    log_probabilities: dict[str, float] = {}
    entries = [(number, text.split()) for number, text in lines[first:last] if text]
    for number, fields in entries:
        try:
            value = float(fields[0]) * math.log(10)
            if not -math.inf < value <= 0:
                raise ValueError
            log_probabilities[fields[1]] = value
        except (ValueError, IndexError):
            raise ConfigError(
                f"{path}, line {number}: {' '.join(fields)!r} is not a 1-gram, a log10 probability of at most 0 and a "
                f"word. {way_out}"
            ) from None
    if len(entries) != declared:
        raise ConfigError(f"{path} says that it has {declared} 1-grams, but has {len(entries)}. {way_out}")
    return {word: value for word, value in log_probabilities.items() if word.lower() not in NO_WORDS}


def word_error_rate(references: list[str], hypotheses: list[str]) -> float:
    """Word errors over the words of all references, counted by jiwer.

    Args:
        references: What was said: words of each utterance, separated by blanks.
        hypotheses: What was recognised, in the same order.

    Returns:
        Percent; above 100 where there are more errors than words.

    Raises:
        ConfigError: jiwer is not installed.
        ValueError: The lists differ in length, or no reference has a word.
    """
    try:
        import jiwer
    except ImportError:
        raise ConfigError(
            "The word error rate is counted by jiwer, which is not installed: pip install 'deepthin[compare]'."
        ) from None
    if len(references) != len(hypotheses) or not any(text.split() for text in references):
        raise ValueError(
            f"{len(references)} references and {len(hypotheses)} hypotheses: give one of each for every utterance, "
            "and at least one word among the references."
        )
    return 100 * float(jiwer.wer(references, hypotheses))


def _lines(path: Path) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(
            f"{path} cannot be read ({problem}). Name a text file; AN4's own lie in its folder etc."
        ) from None
