"""Huffman's code against its definition, brute force and its limit; and streams that are none."""

import heapq
import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepthin.coding import huffman
from deepthin.coding.huffman import LONGEST, MOST_FREE, MOST_USED, coded_bytes, decode, encode, lengths_of
from deepthin.kernels import products
from deepthin.methods.kmeans import KMeans

WALKS = [huffman.walk] + ([products.huffman_walk] if products.native_available else [])
each_walk = pytest.mark.parametrize("walk", WALKS, ids=["python", "native"][: len(WALKS)])


def drawn(seed, count, width, kind):
    """Symbols of a peaked, an even, a geometric, a sparse or a constant distribution."""
    rng, top = np.random.default_rng(seed), (1 << width) - 1
    if kind == "peaked":
        return np.clip(np.round(rng.laplace(size=count) * top / 12 + top / 2), 0, top).astype(np.int64)
    if kind == "geometric":
        return np.minimum(rng.geometric(0.2, count) - 1, top)
    if kind == "sparse":
        return rng.choice(rng.integers(0, top + 1, 5), count).astype(np.int64)
    return np.full(count, seed % (top + 1)) if kind == "constant" else rng.integers(0, top + 1, count)


symbols = st.tuples(
    st.integers(0, 9999),
    st.integers(1, 400),
    st.integers(1, 12),
    st.sampled_from(["peaked", "even", "geometric", "sparse", "constant"]),
)


def huffman_bits(counts):
    """What an unlimited code takes: each join of the two rarest adds their count."""
    heap, total = sorted(counts), 0
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        total += both
        heapq.heappush(heap, both)
    return total


def kraft(lengths):
    return sum(2.0**-n for n in lengths if n)


# ---- Lengths --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60).filter(any))
def test_lengths_are_a_complete_code_and_none_is_shorter(counts):
    lengths = lengths_of(np.array(counts))
    assert int((lengths * counts).sum()) == huffman_bits([c for c in counts if c])
    assert ((lengths > 0) == (np.array(counts) > 0)).all() or np.count_nonzero(counts) == 1
    assert kraft(lengths) == (1.0 if np.count_nonzero(counts) > 1 else 0.0)


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=6), st.integers(3, 5))
def test_limited_lengths_are_the_best_of_all(counts, longest):
    """Of all lengths within the limit that are a code at all."""
    every = itertools.combinations_with_replacement(range(1, longest + 1), len(counts))
    rising = sorted(counts, reverse=True)
    best = min(sum(n * c for n, c in zip(own, rising, strict=True)) for own in every if kraft(own) <= 1)
    lengths = lengths_of(np.array(counts), longest)
    assert lengths.max() <= longest
    assert int((lengths * counts).sum()) == best


def test_fibonacci_counts_reach_the_limit():
    """They need a code as long as there are symbols, less one: 15 bits are enough for all, at a price."""
    counts = [1, 1]
    while len(counts) < 30:
        counts.append(counts[-1] + counts[-2])
    lengths = lengths_of(np.array(counts))
    assert lengths.max() == LONGEST
    assert kraft(lengths) == 1
    unlimited = huffman_bits(counts)
    assert unlimited < int((lengths * counts).sum()) < 1.001 * unlimited
    values = np.repeat(np.arange(20), np.array(counts[:20]))
    for walk in WALKS:
        assert (decode(encode(values, 5), 5, len(values), walk=walk) == values).all()


def test_an_alphabet_of_4096_is_coded_and_no_larger_one():
    values = np.arange(MOST_USED)
    assert lengths_of(np.bincount(values)).tolist() == [12] * MOST_USED
    for walk in WALKS:
        assert (decode(encode(values, 16), 16, len(values), walk=walk) == values).all()
    assert coded_bytes(np.ones(MOST_USED + 1, np.int64), 16) is None
    with pytest.raises(ValueError, match="4097 symbols, 4097 of them different, up to 4096, cannot be coded"):
        encode(np.arange(MOST_USED + 1), 16)
    for values, width in ((np.array([4]), 2), (np.array([0]), 0), (np.array([], np.int64), 3), (np.array([0]), 17)):
        with pytest.raises(ValueError, match="cannot be coded"):
            encode(values, width)


# ---- Streams --------------------------------------------------------------------------------------------------------


@given(symbols)
def test_what_is_coded_comes_back(drawing):
    values, width = drawn(*drawing), drawing[2]
    data = encode(values, width)
    assert len(data) == coded_bytes(np.bincount(values), width)
    for walk in WALKS:
        found = decode(data, width, len(values), walk=walk)
        assert found.dtype == np.uint16
        assert (found == values).all()


@given(symbols, st.integers(0, 20))
def test_symbols_that_do_not_count(drawing, skip):
    values, width = np.append(drawn(*drawing), [0 if skip else 1]), drawing[2]
    count = int((values != skip).sum())
    data = encode(values, width)
    for walk in WALKS:
        assert (decode(data, width, count, skip, len(values), walk) == values).all()
        if count < len(values):
            with pytest.raises(ValueError, match="too few|before there are"):
                decode(data, width, count, skip, len(values) - 1, walk)


@each_walk
def test_no_symbols_take_no_bits(walk):
    found, end = walk(np.zeros(3, np.uint8), 5, huffman._lookup([0, 1], [1, 1]), 9, 0, -1)
    assert (len(found), end) == (0, 5)


@each_walk
def test_the_example_of_the_format(walk):
    """docs/format-1.md works it out bit by bit."""
    data = encode(np.array([0, 1, 1, 2, 1]), 2)
    assert data.tolist() == [0x28, 0x69, 0xEC]
    assert decode(data, 2, 5, walk=walk).tolist() == [0, 1, 1, 2, 1]


def test_a_symbol_that_is_alone_takes_no_bits():
    data = encode(np.full(1000, 5), 4)
    assert data.tolist() == [0x55]
    assert decode(data, 4, 1000).tolist() == [5] * 1000
    many = np.zeros(6, np.int64)
    for place in (0, 5):
        many[:] = 0
        many[place] = MOST_FREE + 1
        table = coded_bytes(np.minimum(many, 1), 3)
        assert MOST_FREE // 8 < coded_bytes(many, 3) <= MOST_FREE // 8 + table + 2


def test_tables_are_short():
    """Neighbours have like lengths: about two bits a symbol, where the plain table has four."""
    weight = np.random.default_rng(0).laplace(size=(40, 100))
    for levels in (32, 256):
        counts = np.bincount(KMeans((40, 100), levels).encode(weight, np)["symbols"].ravel())
        table = 8 * coded_bytes(counts, levels.bit_length() - 1) - int((counts * lengths_of(counts)).sum())
        assert table < 0.75 * 4 * levels
        assert table <= huffman.usual_table_bits(levels, levels.bit_length() - 1)


@given(symbols, st.integers(0, 2**32 - 1))
def test_native_code_is_the_definition_on_any_bytes(drawing, seed):
    """Flipped bits, other bytes, cut ends: the same symbols or the same refusal, and never a symbol out of range."""
    values, width = drawn(*drawing), drawing[2]
    rng, data = np.random.default_rng(seed), encode(values, width)
    for change in range(6):
        changed = data.copy()
        if change < 3:
            changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
        elif change < 5:
            changed[rng.integers(len(data), size=4)] = rng.integers(0, 256, 4)
        else:
            changed = changed[: rng.integers(len(data))]
        found, count, skip = [], int(rng.choice([len(values), rng.integers(len(values))])), int(rng.integers(-1, 3))
        for walk in WALKS:
            try:
                found.append(decode(changed, width, count, skip, len(values) + 5, walk))
            except ValueError as error:
                found.append(str(error))
        assert len({repr(f) if isinstance(f, str) else f.tobytes() for f in found}) == 1
        if not isinstance(found[0], str):
            assert int((found[0] != skip).sum()) == count
            assert found[0].max(initial=0) < 1 << width


def bits_of(*items):
    """Bytes of numbers in their widths, then ones; written without the library."""
    text = "".join(format(value, f"0{width}b")[::-1] if width else "" for value, width in items)
    text += "1" * (-len(text) % 8)
    return np.array([int(text[i : i + 8][::-1], 2) for i in range(0, len(text), 8)], np.uint8)


SAME, UP, DOWN, RUN, OTHER = (0b0, 1), (0b101, 3), (0b001, 3), (0b011, 3), (0b111, 3)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([(2, 3), (1, 3)], "the last symbol 1 is below the first one, 2"),
        ([(0, 3), (2, 3), (1, 4), SAME, SAME], "the table has too many codes"),
        ([(0, 3), (2, 3), (2, 4), SAME, SAME], "the table has too few codes"),
        ([(0, 3), (1, 3), (2, 4), SAME], "the table has too few codes"),
        ([(0, 3), (1, 3), (0, 4), SAME], "symbol 1 of at most 1 has a code of 0 bits"),
        ([(0, 3), (1, 3), (0, 4), UP], "the table has too many codes"),
        ([(0, 3), (1, 3), (1, 4), DOWN], "symbol 1 of at most 1 has a code of 0 bits"),
        ([(0, 3), (1, 3), (15, 4), UP], "symbol 1 of at most 1 has a code of 16 bits"),
        ([(0, 3), (1, 3), (1, 4), OTHER, (0, 4)], "in a longer way"),
        ([(0, 3), (1, 3), (1, 4), OTHER, (2, 4)], "in a longer way"),
        ([(0, 3), (3, 3), (1, 4), RUN, (1, 1), RUN, (1, 1), SAME], "in a longer way"),
        ([(0, 3), (2, 3), (1, 4), RUN, (0b10, 2), (0, 1), SAME], "symbol 3 of at most 2"),
        ([(0, 3), (2, 3), (1, 4), RUN, (0, 24)], "a run of unused symbols is too long"),
        ([(0, 3)], "end within|below the first"),
        ([], "end within"),
    ],
)
def test_tables_that_are_none(items, message):
    for more in ([], [(0, 64)]) if items[1:] else ([],):
        with pytest.raises(ValueError, match=message if not more else None):
            decode(bits_of(*items, *more), 3, 4)


PAIR = [(0, 1), (1, 1), (1, 4), SAME]  # two symbols, 0 and 1, of one bit


@each_walk
@pytest.mark.parametrize(
    ("items", "count", "message"),
    [
        ([*PAIR, (0b01, 2)], 10, "too few|before there are"),
        ([*PAIR, (0, 9), (0, 8)], 9, "are left over"),
        ([*PAIR, (0, 3)], 1, "are left over, or are not ones"),
        ([*PAIR, (0, 2), (0, 7)], 2, "are left over"),
        ([(1, 1), (1, 1), (0, 1)], 5, "are not ones"),
        ([(1, 1), (1, 1)], MOST_FREE + 1, "from no bits at all"),
    ],
)
def test_streams_that_are_none(walk, items, count, message):
    with pytest.raises(ValueError, match=message):
        decode(bits_of(*items), 1, count, walk=walk)


def test_the_same_streams_are_read_where_they_are_right():
    assert decode(bits_of(*PAIR, (0b0110, 4)), 1, 4).tolist() == [0, 1, 1, 0]
    assert decode(bits_of((0, 3), (3, 3), (1, 4), RUN, (0b10, 2), (0, 1), SAME, (0b10, 2)), 3, 2).tolist() == [0, 3]
    with pytest.raises(ValueError, match="0 from|symbol 1, from no bits"):
        decode(bits_of((1, 1), (1, 1)), 1, 3, skip=1, most=9)
    for width in (0, 17):
        with pytest.raises(ValueError, match="symbols of"):
            decode(bits_of((1, 1)), width, 1)


@each_walk
def test_every_truncation_and_extension_is_noticed(walk):
    values = drawn(3, 300, 5, "peaked")
    data = encode(values, 5)
    for length in range(len(data)):
        with pytest.raises(ValueError, match="."):
            decode(data[:length], 5, len(values), walk=walk)
    for more in (0, 255):
        with pytest.raises(ValueError, match="left over"):
            decode(np.append(data, np.uint8(more)), 5, len(values), walk=walk)


@each_walk
def test_a_short_stream_takes_little_memory(walk):
    data = encode(drawn(3, 300, 5, "peaked"), 5)
    tracemalloc.start()
    for count, most in ((10**15, 10**15), (299, 10**15), (10**40, 0)):
        with pytest.raises(ValueError, match="too few|left over|before there are"):
            decode(data, 5, count, 99, most, walk)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.skipif(not products.native_available, reason="there is no native code")
@pytest.mark.parametrize(
    "change", [{"bytes": -1}, {"start": -1}, {"start": 17}, {"entries": 3}, {"entries": 1}, {"most": -1}, {"count": -1}]
)
def test_native_code_checks_what_it_is_given(change):
    lookup, data, out = np.array([1, 17], np.uint32), np.zeros(2, np.uint8), np.zeros(16, np.uint16)
    given = {"data": data.ctypes.data, "bytes": 2, "start": 0, "lookup": lookup.ctypes.data, "entries": 2}
    given |= {"out": out.ctypes.data, "most": 16, "count": 16, "skip": -1}
    native = products.native().huffman_walk
    assert native(*given.values()) == [16, 16]
    with pytest.raises(ValueError, match="of no possible size"):
        native(*(given | change).values())
    for entry in (0, 2, 1 << 20 | 1):
        lookup[1] = entry
        with pytest.raises(ValueError, match="a code of no bits or of too many"):
            native(*given.values())


@pytest.mark.skipif(not products.native_available, reason="there is no native code")
def test_native_code_reads_no_further_than_the_bytes():
    """Streams that end at the end of an array, at every distance to the next eight bytes; `make sanitize` looks on."""
    for count in range(1, 90):
        values = drawn(count, count, 3, "even")
        data = encode(values, 3)
        assert (decode(data.copy(), 3, count, walk=products.huffman_walk) == values).all()
        assert len(data) >= math.ceil(count * huffman_bits(np.bincount(values)) / count / 8)
