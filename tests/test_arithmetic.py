"""The arithmetic coder: round trips, both implementations, ideal lengths, one stream a sequence, hostile bytes."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepthin.coding import arithmetic
from deepthin.coding.arithmetic import (
    MOST_LEVEL,
    MOST_NUMBER,
    decode_levels,
    decode_numbers,
    decode_tree,
    encode_levels,
    encode_numbers,
    encode_tree,
)
from deepthin.kernels import arithmetic as kernels
from deepthin.kernels import products

LOST = -math.log2(
    1 - 2.0**-8
)  # bits that a coded bit may lose because its bound is rounded: the range is 2^24 at least
TOPS = {"levels": MOST_LEVEL, "tree": 63, "numbers": MOST_NUMBER}
native = pytest.mark.skipif(not products.native_available, reason="no native code")
each = pytest.mark.parametrize(
    ("encode", "decode"),
    [(arithmetic.encode, arithmetic.decode), pytest.param(kernels.encode, kernels.decode, marks=native)],
    ids=["python", "native"],
)


class Ideal:
    """A coder that adds up the ideal code length of the bits, and counts them."""

    def __init__(self):
        self.length, self.bits = 0.0, 0

    def bit(self, context, bit):
        one = (context.p >> 16) / 65536
        self.length -= math.log2(one if bit else 1 - one)
        self.bits += 1
        context.update(bit)
        return bit

    def even(self, bit):
        self.length, self.bits = self.length + 1, self.bits + 1
        return bit


def ideal(kind, values, parameter):
    coder = Ideal()
    arithmetic._code(coder, kind, list(values), parameter, MOST_NUMBER)
    return coder


def drawn(kind, seed, count, scale):
    values = np.round(np.random.default_rng(seed).laplace(size=count) * scale).astype(np.int64)
    return np.clip(values if kind == "levels" else abs(values), -TOPS[kind], TOPS[kind])


def both_ways(kind, values, parameter):
    """The stream; encoded and decoded in both ways, by the functions for the kind."""
    arguments = () if kind == "numbers" else (parameter,)
    write = {"levels": encode_levels, "tree": encode_tree, "numbers": encode_numbers}[kind]
    data = write(values, *arguments)
    if products.native_available:
        assert write(values, *arguments, walk=kernels.encode).tobytes() == data.tobytes()
    most = int(abs(values).max()) if len(values) else 0
    for walk in (None, kernels.decode):
        if kind == "levels":
            found = decode_levels(data, len(values), parameter, most, walk)
        elif kind == "tree":
            found = decode_tree(data, len(values), parameter, walk=walk)
        else:
            found = decode_numbers(data, len(values), most, walk)
        assert found.dtype == (np.int64 if kind == "numbers" else np.int32)
        assert np.array_equal(found, values)
    return data


cases = st.tuples(
    st.sampled_from(["levels", "tree", "numbers"]),
    st.integers(0, 9999),
    st.integers(0, 100),
    st.sampled_from([0.0, 0.05, 0.3, 1.0, 8.0, 1e3, 1e8, 1e13]),
    st.sampled_from([0, 1, 2, 17, 500]),
)


def parameter_of(kind, stride):
    return {"levels": stride, "tree": 6, "numbers": 0}[kind]


# ---- Round trips ----------------------------------------------------------------------------------------------------


@given(cases)
def test_integers_come_back_and_both_implementations_write_the_same_bytes(case):
    kind, seed, count, scale, stride = case
    both_ways(kind, drawn(kind, seed, count, scale), parameter_of(kind, stride))


@given(st.lists(st.integers(-MOST_LEVEL, MOST_LEVEL), max_size=20), st.integers(0, 5))
def test_levels_of_any_size(values, stride):
    both_ways("levels", np.array(values, np.int64), stride)


@given(st.lists(st.integers(0, MOST_NUMBER), max_size=20))
def test_numbers_of_any_size(values):
    both_ways("numbers", np.array(values, np.int64), 0)


@given(st.integers(1, 12), st.integers(0, 99))
def test_trees_of_any_width(width, seed):
    both_ways("tree", np.random.default_rng(seed).integers(0, 1 << width, 50), width)


@pytest.mark.parametrize("value", [0, 1, -1, 2, 3, 14, 15, 16, -17, 18, 46, 47, MOST_LEVEL, -MOST_LEVEL])
def test_a_single_level(value):
    assert len(both_ways("levels", np.array([value]), 0)) <= 9  # 2 flags, 14 in unary, 30 for the length, 30 others


@pytest.mark.parametrize("value", [0, 1, 2, 3, 4, 5, MOST_NUMBER - 1, MOST_NUMBER])
def test_a_single_number(value):
    assert len(both_ways("numbers", np.array([value]), 0)) <= 8


def test_no_integers_and_zeros_take_no_bytes():
    for kind in TOPS:
        for count in (0, 1, 10):
            assert len(both_ways(kind, np.zeros(count, np.int64), parameter_of(kind, 3))) == 0


@native
@pytest.mark.parametrize("stride", [0, 1, 1000])
def test_a_million_zeros_take_no_bytes_and_one_among_them_takes_few(stride):
    values = np.zeros(1_000_000, np.int64)
    assert len(encode_levels(values, stride, kernels.encode)) == 0
    assert not decode_levels(np.zeros(0, np.uint8), len(values), stride, 9, kernels.decode).any()
    values[-1] = -3
    data = encode_levels(values, stride, kernels.encode)
    # All zeros share a context. The first 510 cost log2(512) / 2 + 1 bits at most. Then p falls from 1 / 1,024 by a
    # part in 512 each time, in all log2(e) / 2 bits, until a zero costs log2(e) / 2^16. The -3: 16 bits and four flags.
    assert 8 * len(data) <= 4.5 + 1 + math.log2(math.e) * (0.5 + 1e6 * 2.0**-16) + 16 + 4 + 8
    assert np.array_equal(decode_levels(data, len(values), stride, 3, kernels.decode), values)


def test_streams_of_bytes_255_carry():
    """Ones of the lowest probability drive low towards a carry that passes through many bytes."""
    seen = 0
    for seed in range(60):
        coder, rng = arithmetic._Encoder(), np.random.default_rng(seed)
        context, bits = arithmetic._Context(), []
        for _ in range(200):  # stays just below a carry as long as it can, then passes it
            bound = coder.range - (coder.range >> 16) * (context.p >> 16)
            bits.append(int(coder.low + bound <= 0xFFFFFFFF if rng.random() < 0.97 else rng.random() < 0.5))
            coder.bit(context, bits[-1])
        data = coder.finish()
        seen += b"\xff\xff" in data
        decoder, context = arithmetic._Decoder(data), arithmetic._Context()
        assert [decoder.bit(context, 0) for _ in bits] == bits
        assert decoder.canonical()
        if products.native_available:
            assert kernels.encode("tree", np.array(bits), 1).tobytes() == data
    assert seen


# ---- Lengths --------------------------------------------------------------------------------------------------------


@given(cases)
def test_streams_are_within_a_byte_of_the_ideal_length(case):
    kind, seed, count, scale, stride = case
    values, parameter = drawn(kind, seed, count, scale), parameter_of(kind, stride)
    coder = Ideal()
    arithmetic._code(coder, kind, values.tolist(), parameter, MOST_NUMBER)
    assert 8 * len(arithmetic.encode(kind, values, parameter)) < coder.length + LOST * coder.bits + 8


@given(st.integers(0, 9999), st.integers(1, 500), st.floats(0, 1))
def test_few_bits_cost_what_the_estimator_of_krichevsky_and_trofimov_says(seed, count, share):
    """It costs at most log2(count) / 2 + 1 bits more than the entropy; rates are rounded by one part in 128 at most."""
    bits = (np.random.default_rng(seed).random(count) < share).astype(np.int64)
    ones = int(bits.sum())
    estimate = (
        math.lgamma(count + 1) + 2 * math.lgamma(0.5) - math.lgamma(ones + 0.5) - math.lgamma(count - ones + 0.5)
    ) / math.log(2)
    coder = ideal("tree", bits.tolist(), 1)
    assert abs(coder.length - estimate) <= count / 128 * 2**0.5
    entropy = sum(-n * math.log2(n / count) for n in (ones, count - ones) if n)
    assert estimate <= entropy + math.log2(count) / 2 + 1 + 1e-9


@pytest.mark.parametrize("density", [0.1, 0.3])
def test_zeros_in_columns_and_rows_of_zeros_are_nearly_free(density):
    """Half of the columns and half of the rows hold zeros only: a quarter of the array costs nearly all bits."""
    rng = np.random.default_rng(1)
    values = (rng.random((200, 200)) < density) * rng.choice([-1, 1], (200, 200))
    values[:, rng.random(200) < 0.5] = 0
    values[rng.random(200) < 0.5] = 0
    by_place, by_stream, plain = (
        len(encode_levels(values.reshape(-1), s, kernels.encode if products.native_available else None))
        for s in (200, 1, 0)
    )
    assert by_place < 0.9 * plain
    assert by_stream < plain


def test_the_empty_levels_of_a_long_row_need_no_memory_for_it():
    assert np.array_equal(decode_levels(np.zeros(0, np.uint8), 3, 1 << 60, 1, kernels.decode), np.zeros(3))
    assert np.array_equal(decode_levels(np.zeros(0, np.uint8), 3, 1 << 60, 1), np.zeros(3))


# ---- One stream for each sequence -----------------------------------------------------------------------------------


@each
@pytest.mark.parametrize(("kind", "parameter", "alphabet"), [("tree", 2, range(4)), ("levels", 2, range(-2, 3))])
def test_a_decoder_accepts_what_the_encoder_writes_and_nothing_else(encode, decode, kind, parameter, alphabet):
    """All streams of up to two bytes, and all sequences of four integers."""
    written = {
        encode(kind, np.array(values, np.int64), parameter).tobytes(): values
        for values in itertools.product(alphabet, repeat=4)
    }
    assert len(written) == len(alphabet) ** 4
    accepted = {}
    for length in (0, 1, 2):
        for stream in itertools.product(range(256), repeat=length):
            data = np.array(stream, np.uint8)
            if length == 2 and not (stream[0] % 16 == 5 or data.tobytes() in written):
                continue  # a sample of the others
            values = decode(kind, data, 4, parameter, max(alphabet))
            if values is not None:
                accepted[data.tobytes()] = tuple(values.tolist())
    assert accepted == {data: values for data, values in written.items() if len(data) <= 2}


def assert_harmless(kind, data, count, parameter):
    """Refused; or other integers, whose stream these bytes are. Both implementations agree."""
    values = arithmetic.decode(kind, data, count, parameter, TOPS[kind])
    native = kernels.decode(kind, data, count, parameter, TOPS[kind])
    assert (values is None) == (native is None)
    if values is not None:
        assert np.array_equal(values, native)
        assert len(values) == count
        assert arithmetic.encode(kind, values, parameter).tobytes() == data.tobytes()


@given(cases, st.binary(max_size=8))
def test_bytes_after_a_stream_are_refused_or_change_what_it_says(case, more):
    kind, seed, count, scale, stride = case
    values, parameter = drawn(kind, seed, min(count, 40), scale), parameter_of(kind, stride)
    data = arithmetic.encode(kind, values, parameter).tobytes()
    assert_harmless(kind, np.frombuffer(data + more, np.uint8), len(values), parameter)
    # An integer has at most 59 bits of at most 16 bits each, and 38 even ones: no more than 123 bytes.
    too_long = data + b"\x01" * (123 * len(values) + 8)
    for decode in (arithmetic.decode, kernels.decode):
        assert decode(kind, np.frombuffer(data + more + b"\0", np.uint8), len(values), parameter, TOPS[kind]) is None
        assert decode(kind, np.frombuffer(too_long, np.uint8), len(values), parameter, TOPS[kind]) is None


@given(cases, st.binary(max_size=60))
def test_any_bytes_are_refused_or_are_the_stream_of_what_they_decode_to(case, data):
    kind, _, count, _, stride = case
    assert_harmless(kind, np.frombuffer(data, np.uint8), count, parameter_of(kind, stride))


@pytest.mark.parametrize("kind", list(TOPS))
def test_every_flipped_bit_and_every_truncation_is_harmless(kind):
    values, parameter = drawn(kind, 3, 40, 1.5), parameter_of(kind, 6)
    data = arithmetic.encode(kind, values, parameter)
    for bit in range(8 * len(data)):
        changed = data.copy()
        changed[bit // 8] ^= 1 << bit % 8
        assert_harmless(kind, changed, len(values), parameter)
    for length in range(len(data)):
        assert_harmless(kind, data[:length], len(values), parameter)
    for count in (0, 1, len(values) - 1, len(values) + 1, 2000):
        assert_harmless(kind, data, count, parameter)


@each
def test_what_is_out_of_range_is_refused(encode, decode):
    full = np.full(4, 255, np.uint8)
    for kind in TOPS:  # the fraction 1 - 2^-32 is above every interval
        assert decode(kind, full, 1, parameter_of(kind, 1), TOPS[kind]) is None
    with pytest.raises(ValueError, match=re.escape("1 bytes are not the arithmetic code of 1 levels of at most 2")):
        decode_levels(encode_levels(np.array([-3]), 0, encode), 1, 0, 2, decode)
    with pytest.raises(ValueError, match="tree of at most 4"):
        decode_tree(encode_tree(np.array([5, 1]), 3, encode), 2, 3, 4, decode)
    with pytest.raises(ValueError, match="numbers of at most 6"):
        decode_numbers(encode_numbers(np.array([1, 7]), encode), 2, 6, decode)
    with pytest.raises(ValueError, match="a tree of 13 bits"):
        encode_tree(np.array([1]), 13, encode)
    with pytest.raises(ValueError, match="a tree of 0 bits"):
        decode_tree(full, 1, 0, walk=decode)
    with pytest.raises(ValueError, match="a stride of -1"):
        encode_levels(np.array([1]), -1, encode)
    with pytest.raises(ValueError, match="a stride of -1"):
        decode_levels(full, 1, -1, 5, decode)
    with pytest.raises(ValueError, match="integers from 0 to 8"):
        encode_tree(np.array([8, 0]), 3, encode)
    with pytest.raises(ValueError, match="they may go from -2147483647"):
        encode_levels(np.array([-(1 << 31)]), 0, encode)
    with pytest.raises(ValueError, match="integers from -1"):
        encode_numbers(np.array([-1]), encode)
    with pytest.raises(ValueError, match="-1 integers"):
        decode_numbers(full, -1, 5, decode)


@native
def test_the_native_module_checks_what_it_is_given():
    with pytest.raises(ValueError, match="no possible number"):
        products.native().arithmetic_encode(1, 0, 0, 13, True)
    with pytest.raises(ValueError, match="no possible number"):
        products.native().arithmetic_decode(3, 0, 0, 0, 0, 0, 0)


# ---- The page -------------------------------------------------------------------------------------------------------


def test_the_example_of_the_page():
    page = (Path(__file__).parents[1] / "docs" / "arithmetic.md").read_text()
    examples = re.findall(r"^\| (levels|tree|numbers), (\d+) \| ([-\d ]+) \| `([0-9a-f ]*)` \|$", page, re.MULTILINE)
    assert {kind for kind, *_ in examples} == set(TOPS)
    for kind, parameter, values, data in examples:
        found = both_ways(kind, np.array([int(value) for value in values.split()]), int(parameter))
        assert found.tobytes().hex(" ") == data
    # Step by step: the interval after each bit of the first example.
    steps = re.findall(r"^\| `(\w+)` \| ([01]) \| (\w+) \| (\w+) \| (\w+) \| (\w+) \|$", page, re.MULTILINE)
    trace = []

    class Tracing(arithmetic._Encoder):
        def bit(self, context, bit):
            before = context.p
            super().bit(context, bit)
            trace.append((str(bit), f"{before:08x}", f"{self.low:08x}", f"{self.range:08x}", self.out.hex() or "none"))
            return bit

    kind, parameter, values, _ = examples[0]
    arithmetic._code(Tracing(), kind, [int(value) for value in values.split()], int(parameter), MOST_LEVEL)
    assert [tuple(step[1:]) for step in steps] == trace
