"""Products by symbols of a byte, each instruction set in turn, against the definition in float64; no torch."""

import math
import os

import numpy as np
import pytest

from deepthin.kernels import products
from tolerance import assert_close

pytestmark = pytest.mark.skipif(not products.native_available, reason="no native kernels here")

EPS32 = float(np.finfo(np.float32).eps)
LENGTHS = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 100)  # around the lanes of every instruction set


@pytest.fixture(params=products.isas() or ("none",))
def isa(request):
    """Every instruction set that this machine runs."""
    products.native().select(request.param)
    yield request.param
    products.native().select(os.environ.get("DEEPTHIN_ISA", ""))


def weights(rng, rows, cols):
    """Symbols and what goes with them, of every kind that the instruction set in use multiplies by."""
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    signed = rng.integers(-128, 128, (rows, cols)).astype(np.int8)
    for steps in (1, rows):
        yield signed, {"step": draw(steps, 1)}
        yield signed.view(np.uint8), {"step": draw(steps, 1), "least": draw(steps, 1)}
    once, most = products.levels()
    for levels in {1, once - 1, once, once + 1, most} if most else ():
        yield rng.integers(0, levels, (rows, cols)).astype(np.uint8), {"centres": draw(levels)}


def bound(symbols, x, bias=None, step=None, least=None, centres=None):
    """The roundings of a sum of so many terms; with least values, of one that counts symbols from 128."""
    if centres is not None:
        sizes = abs(centres.astype(np.float64))[symbols]
    elif least is None:
        sizes = abs(step.astype(np.float64) * symbols)
    else:
        middle = least + 128 * step.astype(np.float64)
        sizes = abs(middle) + abs(step * (symbols.astype(np.float64) - 128))
    sums = abs(x.astype(np.float64)) @ sizes.T + (0 if bias is None else abs(bias))
    return (symbols.shape[1] + 4) * EPS32 * sums


def test_the_product_is_the_dense_one(isa):
    rng = np.random.default_rng(0)
    for count, cols in enumerate(LENGTHS * 4):
        rows, batch = int(rng.choice([1, 2, 3, 4, 5, 9, 130])), int(rng.choice([0, 1, 2, 3, 4, 5, 8, 9, 17]))
        for symbols, given in weights(rng, rows, cols):
            x = rng.standard_normal((batch, cols), np.float32)
            bias = rng.standard_normal(rows, np.float32) if count % 2 else None
            got = products.symbol_linear(symbols, x, bias, **given)
            want = products.symbol_reference(symbols, x, bias, **given)
            assert got.dtype == np.float32
            assert (abs(got - want) <= bound(symbols, x, bias, **given)).all(), (rows, cols, batch, list(given))


def test_threads_do_not_change_a_bit(isa):
    rng = np.random.default_rng(1)
    for symbols, given in weights(rng, 700, 45):
        x = rng.standard_normal((19, 45), np.float32)
        alone = products.symbol_linear(symbols, x, **given)
        for threads in (2, 4, 8):
            assert np.array_equal(alone, products.symbol_linear(symbols, x, **given, threads=threads))


def test_operands_of_any_layout(isa):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((3, 50), np.float32)
    for symbols, given in weights(rng, 20, 50):
        want = products.symbol_linear(symbols, x, **given)
        odd = np.zeros(symbols.size + 1, symbols.dtype)[1:].reshape(symbols.shape)  # from an odd address on
        odd[:] = symbols
        wide = np.zeros((3, 101), np.float32)
        wide[:, 1::2] = x
        for own in (odd, np.asfortranarray(symbols)):
            assert np.array_equal(want, products.symbol_linear(own, wide[:, 1::2], **given))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_comes_out_as_from_a_dense_product(isa, value):
    rng = np.random.default_rng(3)
    for symbols, given in weights(rng, 30, 40):
        for where in ("x", "bias", *given):
            x, bias = rng.standard_normal((5, 40), np.float32), rng.standard_normal(30, np.float32)
            own = {key: array.copy() for key, array in given.items()}
            array = {"x": x, "bias": bias, **own}[where]
            array.reshape(-1)[array.size // 2] = value
            got = products.symbol_linear(symbols, x, bias, **own)
            with np.errstate(invalid="ignore"):
                weight = own["centres"][symbols] if "centres" in own else own["step"] * symbols.astype(np.float32)
                weight = weight + own["least"] if "least" in own else weight
                want = (x[:, None] * weight[None]).sum(2) + bias
            finite = np.isfinite(want)
            assert np.array_equal(np.isnan(got), np.isnan(want)), (where, list(given))
            assert np.array_equal(got[np.isinf(want)], want[np.isinf(want)])
            array[~np.isfinite(array)] = 0  # which no finite output has seen
            clean, most = (f(symbols, x, bias, **own) for f in (products.symbol_reference, bound))
            # Sums in float32 of weights that are rounded, in no other order than the matrix's.
            assert (abs(got - clean)[finite] <= 2 * most[finite]).all()


def test_what_only_overflows_on_the_way_is_computed_anew(isa):
    """Sums are of symbols times inputs, which the step makes small again."""
    x, step = np.full((1, 200), 1e37, np.float32), np.full((1, 1), 1e-6, np.float32)
    y = products.symbol_linear(np.full((3, 200), 100, np.int8), x, step=step)
    assert_close(y, np.full((1, 3), 200 * 1e37 * 1e-4), 200 + 4)


def test_a_symbol_without_a_centre_is_no_number(isa):
    """Native code may be handed what the checks of ``symbol_linear`` would refuse."""
    if not products.levels()[1]:
        pytest.skip("no look-ups in this instruction set")
    symbols, centres = np.full((2, 40), 255, np.uint8), np.ones(3, np.float32)
    symbols[1] = 2
    x, y = np.ones((1, 40), np.float32), np.empty((1, 2), np.float32)
    at = [array.ctypes.data for array in (symbols, centres, x, y)]
    products.native().symbols(2, 40, at[0], 0, 0, False, at[1], 3, 0, at[2], at[3], 1, 1)
    assert np.isnan(y[0, 0])
    assert y[0, 1] == 40


def test_what_does_not_fit_is_refused():
    x, symbols, step = np.ones((2, 4), np.float32), np.zeros((3, 4), np.int8), np.ones((1, 1), np.float32)
    linear = products.symbol_linear
    with pytest.raises(ValueError, match="has a step, or centres, and least values with a step"):
        linear(symbols, x)
    with pytest.raises(TypeError, match="symbols are int8: these weights have uint8"):
        linear(symbols, x, step=step, least=step)
    with pytest.raises(TypeError, match="symbols are uint8: these weights have int8"):
        linear(symbols.view(np.uint8), x, step=step)
    with pytest.raises(ValueError, match=r"x is \(2, 3\): this plan needs \(2, 4\)"):
        linear(symbols, x[:, :3], step=step)
    with pytest.raises(ValueError, match=r"step is \(2, 1\): this plan needs \(3, 1\)"):
        linear(symbols, x, step=np.ones((2, 1), np.float32))
    most = products.levels()[1]
    with pytest.raises(ValueError, match=f"There are {most + 1} centres: {products.isa()} looks up 1 to {most}."):
        linear(symbols.view(np.uint8), x, centres=np.ones(most + 1, np.float32))
    if most:
        with pytest.raises(ValueError, match="Symbols go up to 5; there are 5 centres"):
            linear(np.full((3, 4), 5, np.uint8), x, centres=np.ones(5, np.float32))
    with pytest.raises(ValueError, match="too many shared values"):
        products.native().symbols(3, 4, 0, 0, 0, False, symbols.ctypes.data, most + 1, 0, 0, 0, 1, 1)
