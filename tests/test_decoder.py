"""The decoder against all paths of small problems, its readers, and AN4's own alignments."""

import math
import re
import sys
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest

from deepthin.errors import ConfigError, NonFiniteError
from deepthin.lab.tasks.decoder import (
    FLOOR,
    WordLoop,
    hybrid_scores,
    log_priors,
    read_dictionary,
    read_unigrams,
    word_error_rate,
)
from tolerance import assert_close

PHONES = ["SIL", "X", "Y"]
PRONUNCIATIONS = [("ex", ["X"]), ("why", ["Y"]), ("why", ["X", "Y"]), ("twice", ["Y", "Y"])]
UNIGRAMS = {"ex": math.log(0.5), "why": math.log(0.2), "twice": math.log(0.1)}

SYMBOLS = "_|ab"
SPELLINGS = ["a", "aa", "ab", "b"]
PRIORS = {"a": -1.0, "aa": -0.5, "b": -2.0}  # "ab" is missing: the floor

DICTIONARY = "A  AH\nA(2)  EY\n\n;;; a comment\nTEA  T IY\n"
ARPA = r"""A comment may show the section
\1-grams:
p_1     wd_1 bo_wt_1

\data\
ngram 1=5
ngram 2=1

\1-grams:
-2.0	<UNK>	0.0
-99.0	<s>	0.0
-2.0	</s>	-99.0
-0.5	A	0.0
-1.5	TEA

\2-grams:
0.0 <s> </s>
\end\
"""


def random_scores(seed, count, frames, columns):
    return np.random.default_rng(seed).normal(size=(count, frames, columns)) * 2


def best_by_phones(scores, word_penalty, silence_penalty):
    """The words of the best path, by every sequence of chains and every division of the frames among its states."""
    chains = [(word, phones, 0.7 * UNIGRAMS[word] - word_penalty) for word, phones in PRONUNCIATIONS]
    chains.append(("", ["SIL"], -silence_penalty))
    frames = len(scores)
    best, words = -math.inf, []
    for count in range(1, frames // 3 + 1):
        for path in product(chains, repeat=count):
            columns = [3 * PHONES.index(phone) + p for _, phones, _ in path for phone in phones for p in range(3)]
            for cuts in combinations(range(1, frames), len(columns) - 1):
                lasts = np.diff([0, *cuts, frames])
                if len(lasts) != len(columns):
                    continue
                emitted = scores[np.arange(frames), np.repeat(columns, lasts)].sum()
                if (total := emitted + sum(entry for _, _, entry in path)) > best:
                    best, words = total, [word for word, _, _ in path if word]
    return words


def best_by_characters(scores):
    """The words of the best alignment, of all strings of symbols as long as the utterance that spell words."""
    best, words = -math.inf, []
    for string in product(range(len(SYMBOLS)), repeat=len(scores)):
        collapsed = re.sub(r"(.)\1*", r"\1", "".join(SYMBOLS[i] for i in string)).replace("_", "")
        found = collapsed.removesuffix("|").split("|") if collapsed else []
        if not set(found) <= set(SPELLINGS):
            continue
        total = scores[np.arange(len(scores)), string].sum()
        total += sum(0.7 * PRIORS.get(word, FLOOR) - 0.3 for word in found)
        if total > best:
            best, words = total, found
    return words


def spelling_loop(**weights):
    return WordLoop.from_characters(SPELLINGS, SYMBOLS, PRIORS, blank="_", word_end="|", **weights)


@pytest.mark.parametrize("penalties", [(0.3, 0.0), (-6.0, 0.0), (-6.0, -6.0), (-6.0, 4.0)])
def test_phones_are_decoded_exactly(penalties):
    word_penalty, silence_penalty = penalties
    loop = WordLoop.from_phones(
        PRONUNCIATIONS, PHONES, UNIGRAMS, lm_weight=0.7, word_penalty=word_penalty, silence_penalty=silence_penalty
    )
    scores = random_scores(0, 60, 12, 9)
    lengths = np.arange(60) % 13
    expected = [best_by_phones(own[:n], *penalties) for own, n in zip(scores, lengths, strict=True)]
    assert loop.decode(scores, lengths) == expected
    if word_penalty < 0:  # words are rewarded, so that several are found
        assert max(map(len, expected)) >= 2
    else:
        assert {word for words in expected for word in words} == {"ex", "why", "twice"}


def test_characters_are_decoded_exactly():
    scores = random_scores(1, 60, 6, 4)
    lengths = np.arange(60) % 7
    expected = [best_by_characters(own[:n]) for own, n in zip(scores, lengths, strict=True)]
    assert spelling_loop(lm_weight=0.7, word_penalty=0.3).decode(scores, lengths) == expected
    assert {word for words in expected for word in words} >= {"a", "aa", "b"}
    assert max(map(len, expected)) >= 2


@pytest.mark.parametrize(
    ("string", "words"),
    [
        ("a|b|", ["a", "b"]),
        ("a|b", ["a", "b"]),  # the last end may be missing
        ("__a__|__b__", ["a", "b"]),
        ("aaa||b", ["a", "b"]),  # repetitions collapse
        ("a_a|_", ["aa"]),
        ("aab_", ["ab"]),
        ("____", []),
    ],
)
def test_alignments_of_ctc(string, words):
    scores = np.where(np.arange(4) == np.array([SYMBOLS.index(c) for c in string])[:, None], 0.0, -np.inf)
    assert spelling_loop().decode(scores[None], [len(string)]) == [words]


@pytest.mark.parametrize("string", ["|", "a||_|", "ba", "a_b_a"])
def test_what_spells_no_words_is_no_path(string):
    scores = np.where(np.arange(4) == np.array([SYMBOLS.index(c) for c in string])[:, None], 0.0, -np.inf)
    assert spelling_loop().decode(scores[None], [len(string)]) == [[]]


@pytest.mark.parametrize(
    ("sounds", "words"),
    [
        (["X", "Y"], ["why"]),  # one word of two phones costs less than two words
        (["X", "X"], ["ex", "ex"]),
        (["SIL", "X", "X"], ["ex", "ex"]),
        (["X", "SIL", "X"], ["ex", "ex"]),
        (["SIL", "SIL", "X", "SIL", "X", "SIL"], ["ex", "ex"]),
        (["SIL"], []),
    ],
)
def test_silence_is_optional(sounds, words):
    loop = WordLoop.from_phones(PRONUNCIATIONS, PHONES, UNIGRAMS)
    columns = [3 * PHONES.index(phone) + p for phone in sounds for p in range(3)]
    scores = np.where(np.arange(9) == np.array(columns)[:, None], 0.0, -np.inf)
    assert loop.decode(scores[None], [len(columns)]) == [words]


def test_an_utterance_that_fits_no_path_has_no_words():
    loop = WordLoop.from_phones(PRONUNCIATIONS, PHONES, UNIGRAMS)
    scores = random_scores(2, 4, 5, 9)
    scores[3] = -np.inf
    found = loop.decode(scores, [0, 2, 3, 5])
    assert found[:2] == [[], []]
    assert found[3] == []
    assert loop.decode(scores[:0], []) == []


def test_a_batch_is_decoded_as_one_by_one_and_padding_is_not_read():
    loop = WordLoop.from_phones(PRONUNCIATIONS, PHONES, UNIGRAMS)
    scores = random_scores(3, 12, 60, 9).astype(np.float32)
    lengths = np.random.default_rng(3).integers(0, 61, size=12)
    singly = [loop.decode(own[None, :n], [int(n)])[0] for own, n in zip(scores, lengths, strict=True)]
    for own, n in zip(scores, lengths, strict=True):
        own[n:] = np.nan
    given = scores.copy()
    assert loop.decode(scores, lengths) == singly
    assert np.array_equal(scores, given, equal_nan=True)
    assert len({tuple(words) for words in singly}) > 6


def test_a_word_penalty_makes_words_fewer():
    scores = random_scores(4, 10, 80, 9)
    counts = [
        sum(map(len, WordLoop.from_phones(PRONUNCIATIONS, PHONES, UNIGRAMS, word_penalty=p).decode(scores, [80] * 10)))
        for p in (-5.0, 0.0, 5.0, 500.0)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] == 0  # silence takes all


def test_hybrid_scores():
    priors = log_priors(np.array([0, 0, 1, 0]), 3)
    assert_close(np.exp(priors), [4 / 7, 2 / 7, 1 / 7], 8)  # the logarithm's rounding, at most 2, and four more
    posteriors = np.log([[0.2, 0.3, 0.5]])
    scores = hybrid_scores(posteriors, priors, prior_scale=0.5, acoustic_scale=0.1)
    assert_close(scores, 0.1 * (posteriors - 0.5 * priors), 4, 0.1 * (abs(posteriors) + 0.5 * abs(priors)))


def test_scores_that_cannot_be_decoded_are_refused():
    loop = spelling_loop()
    with pytest.raises(ValueError, match=re.escape("shape (1, 5, 3) cannot be decoded: these words need")):
        loop.decode(np.zeros((1, 5, 3)), [5])
    with pytest.raises(ValueError, match=re.escape("Lengths [6] do not fit scores of shape (1, 5, 4)")):
        loop.decode(np.zeros((1, 5, 4)), [6])
    with pytest.raises(ValueError, match="give one for each utterance"):
        loop.decode(np.zeros((2, 5, 4)), [5])
    for value in (np.nan, np.inf):
        scores = np.zeros((2, 5, 4))
        scores[1, 3, 2] = value
        with pytest.raises(NonFiniteError, match=f"utterance 1, frame 3, column 2 is {value}"):
            loop.decode(scores, [5, 5])
        assert len(loop.decode(scores, [5, 3])) == 2


def test_words_that_cannot_be_built_are_named():
    with pytest.raises(ConfigError, match="'zed' is pronounced 'X Z', but 'Z' is not among the 3 phones"):
        WordLoop.from_phones([("zed", ["X", "Z"])], PHONES, {})
    with pytest.raises(ConfigError, match="'silence' is pronounced 'HUSH'"):
        WordLoop.from_phones(PRONUNCIATIONS, PHONES, {}, silence="HUSH")
    with pytest.raises(ConfigError, match="'ax' cannot be spelled: 'x' is not among the letters"):
        WordLoop.from_characters(["ax"], SYMBOLS, {}, blank="_", word_end="|")
    with pytest.raises(ConfigError, match=r"'a\|' cannot be spelled"):
        WordLoop.from_characters(["a|"], SYMBOLS, {}, blank="_", word_end="|")
    with pytest.raises(ConfigError, match="lack ' '"):
        WordLoop.from_characters(["a"], SYMBOLS, {}, blank="_", word_end=" ")
    with pytest.raises(ConfigError, match="There is no word to decode"):
        WordLoop.from_phones([], PHONES, {})
    with pytest.raises(ConfigError, match="The word 'mute' is empty, or has no phones"):
        WordLoop.from_phones([("mute", [])], PHONES, {})
    with pytest.raises(ConfigError, match="The word '' is empty"):
        WordLoop.from_characters([""], SYMBOLS, {}, blank="_", word_end="|")


def test_a_dictionary_is_read(tmp_path):
    path = tmp_path / "words.dic"
    path.write_text(DICTIONARY)
    assert read_dictionary(path) == [("A", ("AH",)), ("A", ("EY",)), ("TEA", ("T", "IY"))]


def test_unigrams_are_read(tmp_path):
    path = tmp_path / "words.lm"
    path.write_text(ARPA)
    found = read_unigrams(path)
    assert list(found) == ["A", "TEA"]
    assert_close(list(found.values()), np.log([10**-0.5, 10**-1.5]), 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [("A AH\nTEA\n", "words.dic, line 2: 'TEA' has no phones"), ("\n;;; nothing\n", "words.dic holds no word")],
)
def test_a_damaged_dictionary_is_named(tmp_path, text, message):
    path = tmp_path / "words.dic"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_dictionary(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\\data\\", "", "words.lm is not a complete ARPA language model"),
        ("\\end\\", "", "words.lm is not a complete ARPA language model"),
        ("ngram 1=5", "", "words.lm is not a complete ARPA language model"),
        ("ngram 1=5", "ngram 1=6", "words.lm says that it has 6 1-grams, but has 5"),
        ("-0.5", "half", "words.lm, line 13: 'half A 0.0' is not a 1-gram"),
        ("-0.5", "nan", "words.lm, line 13: 'nan A 0.0' is not a 1-gram"),
        ("-0.5", "0.5", "words.lm, line 13: '0.5 A 0.0' is not a 1-gram"),
        ("-1.5	TEA", "-1.5", "words.lm, line 14: '-1.5' is not a 1-gram"),
    ],
)
def test_a_damaged_language_model_is_named(tmp_path, old, new, message):
    path = tmp_path / "words.lm"
    path.write_text(ARPA.replace(old, new))
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_unigrams(path)


@pytest.mark.parametrize("read", [read_dictionary, read_unigrams])
def test_a_file_that_cannot_be_read_is_named(tmp_path, read):
    with pytest.raises(ConfigError, match="absent cannot be read .*No such file"):
        read(tmp_path / "absent")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ConfigError, match="binary cannot be read"):
        read(tmp_path / "binary")


def test_word_error_rate(monkeypatch):
    assert word_error_rate(["A B  C", "D"], ["A C", "D"]) == 25
    assert word_error_rate(["A B", ""], ["", "C"]) == 150
    with pytest.raises(ValueError, match="1 references and 2 hypotheses"):
        word_error_rate(["A"], ["A", "B"])
    with pytest.raises(ValueError, match="at least one word"):
        word_error_rate([" "], ["A"])
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'deepthin[compare]'")):
        word_error_rate(["A"], ["A"])


def test_the_alignments_of_an4_give_back_its_words(data_folder):
    """All that is wrong sounds like what is right: 8 OH heard as O, 2 A T as EIGHTY; these 12 of 773 words, no more."""
    base = Path(data_folder) / "an4"
    etc = base / "an4" / "etc"
    pronunciations, unigrams = read_dictionary(etc / "an4.dic"), read_unigrams(etc / "an4.ug.lm")
    assert (len(pronunciations), len(unigrams)) == (130, 104)
    assert {word for word, _ in pronunciations} - set(unigrams) == {"NOVEMBER", "THIRTEEN"}
    loop = WordLoop.from_phones(pronunciations, (etc / "an4.phone").read_text().split(), unigrams)
    lines = (etc / "an4_test.transcription").read_text().splitlines()
    texts, names = zip(*(re.fullmatch(r"(.*) \((.*)\)", line).groups() for line in lines), strict=True)
    alignments = np.load(base / "states.npz")
    states = [alignments[name] for name in names]
    lengths = [len(own) for own in states]
    scores = np.full((len(states), max(lengths), 102), -10.0)
    for utterance, own in enumerate(states):
        scores[utterance, np.arange(len(own)), own] = 0
    found = [" ".join(words) for words in loop.decode(scores, lengths)]
    assert_close(word_error_rate(list(texts), found), 100 * 12 / 773, 2)

    def sound(text):
        return re.sub(r"\bA T\b", "EIGHTY", re.sub(r"\bOH\b", "O", text))

    assert list(map(sound, found)) == list(map(sound, texts))


def test_states_count_phones_in_the_order_of_an4(data_folder):
    base = Path(data_folder) / "an4"
    phones = (base / "an4" / "etc" / "an4.phone").read_text().split()
    alignments, checked = np.load(base / "states.npz"), 0
    states = {name: alignments[name] for name in alignments.files}
    for line in (base / "phones.ctm").read_text().splitlines():
        name, start, duration, phone, _ = line.split()
        first, frames = round(float(start) * 100), round(float(duration) * 100)
        own = states[name][first : first + frames].astype(int) - 3 * phones.index(phone)
        assert (own[0], own[-1]) == (0, 2)
        assert set(np.diff(own)) <= {0, 1}
        checked += frames
    assert checked == sum(map(len, states.values()))
