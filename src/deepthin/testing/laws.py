"""The laws that every method obeys.

A law is a function of an ``Example`` that returns nothing and raises AssertionError if it does not hold. Its docstring
is part of the message, so it only states the law.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from deepthin.errors import BudgetError
from deepthin.method import Code
from deepthin.methods import METHODS, fields, with_fields
from deepthin.storage.arrays import Raw
from deepthin.storage.contents import Contents, Part, Thin
from deepthin.storage.read import from_bytes
from deepthin.storage.write import to_bytes
from deepthin.testing.claims import CLAIMS, Claims
from deepthin.testing.example import Example, bits_in_file, norm, widened

EPS32 = float(np.finfo(np.float32).eps)
STEP = 1e-4  # of central differences in float64: truncation 1e-8, rounding 1e-12 of what is differentiated
DRAWS = 16  # of init where its mean square varies
SIGMAS = 8  # tolerance of a mean over these draws; skewed ones miss by 6 sigma once in some 1e5 examples
_NUMPY: Any = np


def budget(e: Example) -> None:
    """``bits()`` keeps the budget; BudgetError names the smallest size that can be reached, and no less can be."""
    bits = e.method.bits()
    e.check(type(bits) is int, f"bits() is {bits!r}, which is not an int")
    e.check(bits <= e.budget, f"bits() is {bits}, over the budget of {e.budget}")
    e.check(e.fit(e.budget) == e.method, "fit gives another plan when it is called again")
    e.check(e.method.shape == e.shape, f"the plan's shape is {e.method.shape}")
    hash(e.method)
    e.check(e.fit(bits).bits() <= bits, f"a budget of {bits} bits, which a plan has, is exceeded")
    try:
        e.check(e.fit(bits - 1).bits() < bits, f"a budget of {bits - 1} bits is exceeded")
    except BudgetError as error:
        e.check(error.smallest_bits == e.least, f"BudgetError names {error.smallest_bits} bits, then {e.least}")
    e.check(e.fit(e.least).bits() == e.least, f"BudgetError names {e.least} bits, which is not the smallest plan's")
    if e.least == 0:
        return
    for less in (0, e.least - 1):
        try:
            reached = e.fit(less).bits()
        except BudgetError as error:
            e.check(error.smallest_bits == e.least, f"{less} bits: BudgetError names {error.smallest_bits} bits")
            ratio = e.least / (32 * math.prod(e.shape))
            e.check(math.isclose(error.smallest_ratio, ratio), f"BudgetError names the ratio {error.smallest_ratio}")
            e.check(str(e.least) in str(error), f"the message does not name {e.least} bits: {error}")
        else:
            e.check(False, f"{reached} bits in a budget of {less}, and BudgetError names {e.least} as the smallest")


def stored(e: Example) -> None:
    """A file takes ``bits()`` at most, for any code, and gives both back; written again, the same bytes."""
    most = bits_in_file(e.method)
    e.check(most <= e.method.bits(), f"bits() is {e.method.bits()}; codes of these shapes take up to {most} in a file")
    for arrays in (e.method.init(e.rng, 0.1), e.method.encode(e.weight(), _NUMPY)):
        code = {entry: Raw.of(array) for entry, array in arrays.items()}
        data = to_bytes(Contents({"w": Thin(e.name, e.method, {"w": Part(e.shape)}, code)}))
        thin = from_bytes(data).thin["w"]
        e.check(8 * thin.bytes <= e.method.bits(), f"stored in {8 * thin.bytes} bits; bits() is {e.method.bits()}")
        e.check(thin.method == e.method, f"the file gives back the method {thin.method}")
        for entry, array in arrays.items():
            e.check((thin.code[entry].numpy() == array).all(), f"the file changes {entry}")
        e.check(to_bytes(Contents({"w": thin})) == data, "what is read and written again has other bytes")


def header(e: Example) -> None:
    """A method is its fields: through JSON they give an equal method, which decodes alike."""
    again = with_fields(e.name, json.loads(json.dumps(fields(e.method))))
    e.check(again == e.method, f"its fields, through JSON, give {again}")
    e.check(again.bits() == e.method.bits(), "its fields give a method of other bits()")
    e.check(again.code_shapes() == e.method.code_shapes(), "its fields give a method of other code_shapes()")
    e.check(again.integers() == e.method.integers(), "its fields give a method of other integers()")
    e.check(_equal(again.derived(), e.method.derived()), "its fields give a method of other derived tables")
    code = e.code()
    e.check(
        (again.decode(code, _NUMPY) == e.method.decode(code, _NUMPY)).all(), "its fields give a method that decodes"
    )


def derived(e: Example) -> None:
    """Derived tables are NumPy arrays that follow from the fields, under names that no entry of the code has."""
    tables = e.method.derived()
    e.check(not tables.keys() & e.method.code_shapes().keys(), f"{sorted(tables)} are stored and derived")
    for entry, table in tables.items():
        e.check(isinstance(table, np.ndarray), f"the derived table {entry} is not a NumPy array")
    e.check(_equal(tables, e.method.derived()), "derived() gives other tables when it is called again")


def shapes(e: Example) -> None:
    """``code_shapes`` and ``integers`` say what codes hold: float32, and integers within their range."""
    expected, integers = e.method.code_shapes(), e.method.integers()
    e.check(integers.keys() <= expected.keys(), f"integers() names {sorted(integers)}, the code {sorted(expected)}")
    for code in (e.method.init(e.rng, 0.1), e.method.encode(e.weight(), _NUMPY)):
        stored_shapes = {entry: array.shape for entry, array in code.items()}
        e.check(stored_shapes == expected, f"a code has the shapes {stored_shapes}; code_shapes() are {expected}")
        for entry, array in code.items():
            if entry not in integers:
                e.check(array.dtype == np.float32, f"{entry} is {array.dtype}; of a float32 weight floats are float32")
                e.check(np.isfinite(array).all(), f"{entry} is not finite")
                continue
            kind = integers[entry]
            e.check(array.dtype.kind == "i", f"{entry} is {array.dtype}; integers() says that it holds integers")
            least, most = int(array.min()), int(array.max())
            e.check(kind.least <= least <= most < kind.least + kind.count, f"{entry} has {least}..{most}: not {kind}")
            e.check(not kind.rising or (np.diff(array) > 0).all(), f"{entry} does not rise, as integers() says")
        weight = e.method.decode(code | e.method.derived(), _NUMPY)
        e.check(weight.shape == e.shape, f"decode gives the shape {weight.shape}")
        e.check(weight.dtype == np.float32, f"decode gives {weight.dtype} for a float32 code")
        wide = e.method.decode(widened(code) | e.method.derived(), _NUMPY)
        e.check(wide.dtype == np.float64, f"decode gives {wide.dtype} for a float64 code")


def deterministic(e: Example) -> None:
    """``encode`` and ``decode`` give the same again, also after other calls."""
    weight, other = e.weight(), e.weight()
    first = e.method.encode(weight, _NUMPY)
    second = e.method.encode(other, _NUMPY)
    e.check(_equal(first, e.method.encode(weight, _NUMPY)), "encode gives another code for the same weight")
    e.check(_equal(second, e.method.encode(other, _NUMPY)), "encode gives another code for the same weight")
    for code in (first, second, e.method.init(e.rng, 0.1)):
        whole = code | e.method.derived()
        same = (e.method.decode(whole, _NUMPY) == e.method.decode(whole, _NUMPY)).all()
        e.check(same, "decode gives another weight for the same code")


def pure(e: Example) -> None:
    """``encode`` and ``decode`` leave their arguments as they are: weights, importance, codes, in NumPy and torch."""
    import torch

    weight, importance = e.weight(), e.rng.random(e.shape).astype(np.float32)
    namespaces: tuple[Any, ...] = (
        (_NUMPY, np.array, importance),
        (_NUMPY, np.array, None),
        (torch, torch.tensor, None),
    )
    for xp, make, given in namespaces:
        arguments = {"weight": make(weight)} | ({} if given is None else {"importance": make(given)})
        code = e.method.encode(xp=xp, **arguments)
        e.check((_array(arguments["weight"]) == weight).all(), "encode changes its weight")
        if given is not None:
            e.check((_array(arguments["importance"]) == given).all(), "encode changes its importance")
        whole = code | {entry: make(table) for entry, table in e.method.derived().items()}
        before = {entry: _array(array).copy() for entry, array in whole.items()}
        e.method.decode(whole, xp)
        e.check(whole.keys() == before.keys(), "decode changes the dictionary that holds the code")
        for entry, array in before.items():
            e.check((_array(whole[entry]) == array).all(), f"decode changes {entry}")


def alias(e: Example) -> None:
    """A code shares no memory with the weight, nor a decoded weight with the code."""
    weight = e.weight()
    code = e.method.encode(weight, _NUMPY)
    for entry, array in code.items():
        e.check(not np.shares_memory(array, weight), f"the code's {entry} is the memory of the weight that is encoded")
    whole = code | e.method.derived()
    decoded = e.method.decode(whole, _NUMPY)
    for entry, array in whole.items():
        e.check(not np.shares_memory(array, decoded), f"the decoded weight is the memory of {entry}")


def decode(e: Example) -> None:
    """NumPy's and torch's float32 results are the float64 one, up to as many roundings as an entry takes."""
    import torch

    code = e.code()
    exact = e.method.decode(widened(code), _NUMPY)
    size, roundings = _rounding(e, widened(code))
    in_torch = {entry: torch.from_numpy(np.array(array)) for entry, array in code.items()}
    wide = {entry: torch.from_numpy(np.array(array)) for entry, array in widened(code).items()}
    for what, weight, eps in (
        ("NumPy's float32", e.method.decode(code, _NUMPY), EPS32),
        ("torch's float32", e.method.decode(in_torch, torch).numpy(), EPS32),  # pyright: ignore[reportArgumentType]
        ("torch's float64", e.method.decode(wide, torch).numpy(), 2.0**-52),  # pyright: ignore[reportArgumentType]
    ):
        wrong = abs(np.asarray(weight, np.float64) - exact) - roundings * eps * size
        e.check((wrong <= 1e-30).all(), f"{what} result differs from the exact one by {wrong.max()} beyond rounding")


def encode(e: Example) -> None:
    """NumPy's and torch's codes are as near to the weight; bases may differ where singular values tie."""
    import torch

    weight, tables = e.rng.normal(size=e.shape), e.method.derived()
    in_numpy = e.method.decode(e.method.encode(weight, _NUMPY) | tables, _NUMPY)
    torch_tables = {entry: torch.from_numpy(table) for entry, table in tables.items()}
    code = e.method.encode(torch.from_numpy(weight), torch)  # pyright: ignore[reportArgumentType]
    in_torch = e.method.decode(code | torch_tables, torch).numpy()  # pyright: ignore[reportArgumentType]
    distances = norm(in_numpy - weight), norm(in_torch - weight)
    limit = e.subject.claims.agreement(e.method) * max(distances) + 1e-9
    e.check(abs(distances[0] - distances[1]) <= limit, f"NumPy's and torch's codes are {distances} from the weight")
    e.check(distances[0] <= norm(weight) * 1.5, f"the code is {distances[0] / norm(weight)} of the weight away from it")


def gradient(e: Example) -> None:
    """The gradient reaches every floating entry, and is that of central differences."""
    import torch

    code, goal = widened(e.code()), e.rng.normal(size=e.shape)
    leaves = {entry: torch.from_numpy(np.array(array)) for entry, array in code.items()}
    for entry in e.floats():
        leaves[entry].requires_grad_()
    weight = e.method.decode(leaves, torch)  # pyright: ignore[reportArgumentType]
    e.check(weight.requires_grad, "the decoded weight has no gradient")
    (weight * torch.from_numpy(goal)).sum().backward()
    reached = 0
    for entry in e.floats():
        grad, way = leaves[entry].grad, e.rng.normal(size=code[entry].shape)
        e.check(grad is not None, f"no gradient reaches {entry}")
        step = STEP * (norm(code[entry]) or 1.0) / norm(way)
        ends = [e.method.decode({**code, entry: code[entry] + s * step * way}, _NUMPY) for s in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        by_torch, limit = float((_array(grad) * way).sum()), 1e-6 * norm(goal) * (norm(slope) + norm(ends[0]))
        reached += bool((slope != 0).any())
        e.check(abs(by_torch - float((slope * goal).sum())) <= limit, f"the gradient of {entry} is not that of decode")
    e.check(reached, "the weight depends on none of its floats")


def latents(e: Example) -> None:
    """In a layer that trains, a gradient reaches every parameter, where methods that round do so straight through."""
    import torch

    weight = _layer(e)
    goal = torch.from_numpy(e.rng.normal(size=e.shape).astype(np.float32))
    (weight() * goal).sum().backward()
    for name, latent in weight.named_parameters():
        grad: Any = latent.grad
        e.check(grad is not None and (grad != 0).any(), f"in a layer no gradient reaches {name}")
        if name == "weight":  # it is rounded as a whole: the identity
            e.check(bool((grad == goal).all()), "the gradient does not go straight through the rounding")


def nearest(e: Example) -> None:
    """A decoded weight is encoded as near as the method claims: exactly, where ``encode`` projects."""
    code = widened(e.method.init(e.rng, 1.0))
    weight = e.method.decode(code | e.method.derived(), _NUMPY)
    again = e.method.decode(e.method.encode(weight, _NUMPY) | e.method.derived(), _NUMPY)
    limit = e.subject.claims.distance(e.method, weight) * max(norm(weight), 1)
    moved = norm(again - weight)
    e.check(moved <= limit, f"decode, encode, decode changes the weight by {moved}, which should be at most {limit}")


def spread(e: Example) -> None:
    """Weights that ``init`` draws have the asked root mean square."""
    std, (outer, inner) = float(e.rng.choice([0.01, 0.1, 2.0])), e.parts()
    variance = e.subject.claims.spread(outer)
    draws, tables = DRAWS // 2 if inner else DRAWS if variance else 1, e.method.derived()
    squares = [(e.method.decode(widened(e.method.init(e.rng, std)) | tables, _NUMPY) ** 2).mean() for _ in range(draws)]
    ratio = math.sqrt(float(np.mean(squares))) / std
    # The effect of rounding, whose errors are independent of the other entries: twice the largest of some draws.
    moved, starts = 1.0, [outer.init(e.rng, 1.0) for _ in range(DRAWS // 2 if inner else 0)]
    for entry, method in inner:
        floats = [start[entry].reshape(method.shape) for start in starts]
        rounded = [method.decode(method.encode(a, _NUMPY) | method.derived(), _NUMPY) for a in floats]
        moved *= 1 + 2 * max(norm(r - a) / norm(a) for r, a in zip(rounded, floats, strict=True))
    tolerance = SIGMAS * math.sqrt(variance / draws) + 64 * EPS32
    low, high = math.sqrt(max(0.0, 1 - tolerance)) * max(0.0, 2 - moved), math.sqrt(1 + tolerance) * moved
    e.check(low <= ratio <= high, f"init draws {ratio} times the spread that is asked for, not {low:.3f} to {high:.3f}")


def error(e: Example) -> None:
    """More bits, no larger error: always where codes are nested, else of four times the bits, averaged over weights."""
    fixes_size = METHODS[e.subject.name].sized_by if e.subject.name in METHODS else frozenset()
    dense, nested = 32 * math.prod(e.shape), e.subject.claims.nested
    ratio, factor = e.rng.uniform(0.04, 0.2), e.rng.uniform(1.2, 4) if nested else 4
    plans: list[Any] = []
    for place in e.rng.permutation(len(e.subject.claims.options)):  # with some options the budget has no effect
        e.options = {k: v for k, v in e.subject.claims.options[place].items() if k not in fixes_size}
        e.budget = max(e.smallest_bits(), int(dense * ratio))
        plans = [e.fit(e.budget), e.fit(int(e.budget * factor))]
        if plans[0] == plans[1]:
            plans[1] = e.fit(2 * int(e.budget * factor))
        if plans[0] != plans[1]:
            break
    else:
        return
    e.method = plans[0]
    weights = [e.rng.normal(size=e.shape) for _ in range(1 if nested else 4)]
    errors = [
        sum(norm(plan.decode(plan.encode(w, _NUMPY) | plan.derived(), _NUMPY) - w) for w in weights) for plan in plans
    ]
    e.check(errors[1] <= errors[0] + 1e-9, f"with {plans[1]} the error grows from {errors[0]} to {errors[1]}")


def product(e: Example) -> None:
    """A layer's product, by whatever way it takes, is ``x @ W.T``: in evaluation, again, and in training."""
    import torch

    weight = _layer(e).eval()
    x = torch.from_numpy(e.rng.normal(size=(int(e.rng.integers(1, 6)), e.shape[1])).astype(np.float32))
    rows, code = x.numpy().astype(np.float64), widened(_numpy(weight.code())) | e.method.derived()
    exact = e.method.decode(code, _NUMPY)
    # Upper bounds on the roundings of an entry of the result by any way, and on the size of its terms.
    size, roundings = _rounding(e, code)
    spread_out = norm(size) * np.sqrt((rows * rows).sum(1, keepdims=True))  # a transform mixes a row's terms
    limit = (roundings + 64 + x.shape[1]) * EPS32 * (abs(rows) @ size.T + spread_out)
    with torch.no_grad():
        for _ in range(2):
            wrong = abs(weight.product(x).numpy() - rows @ exact.T) - limit
            e.check((wrong <= 1e-30).all(), f"the product differs from x @ W.T by {wrong.max()} beyond rounding")
    x.requires_grad_()
    weight.train().product(x).sum().backward()
    sizes = (roundings + 64 + e.shape[0]) * EPS32 * (size.sum(0) + norm(size))
    wrong = abs(_array(x.grad) - exact.sum(0)) - sizes
    e.check((wrong <= 1e-30).all(), "the gradient of the product's input is not that of x @ W.T")


LAWS: dict[str, Callable[[Example], None]] = {
    law.__name__: law
    for law in (
        budget, stored, header, derived, shapes, deterministic, pure, alias, decode, encode, gradient, latents,
        nearest, spread, error, product,
    )
}  # fmt: skip
"""Every law by its name."""

SMALLEST = {"error": 8}
"""Lower bound on rows and columns of a law's examples, by default 1: small matrices have too few plans to compare."""

NOT_OF_TWO = frozenset({"nearest", "encode", "error"})
"""Laws that two methods together need not obey.

Rounding again, or from another basis, gives another code; and more floats, each rounded, may have a larger error.
"""


def _layer(e: Example) -> Any:
    import torch

    from deepthin.torch.weight import ThinWeight

    return ThinWeight.draw(e.name, e.method, [Part(e.shape)], torch.zeros(1), e.rng, 0.1)


def _array(values: Any) -> np.ndarray:
    return values if isinstance(values, np.ndarray) else values.detach().numpy()


def _numpy(code: Any) -> Code:
    return {entry: _array(tensor) for entry, tensor in code.items()}


def _equal(one: Code, other: Code) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[entry], other[entry]) for entry in one)


def _rounding(e: Example, code: Code) -> tuple[np.ndarray, int]:
    """For a float64 code: the sum of the terms' magnitudes, and the number of roundings, for each decoded weight."""
    (outer, inner), claims = e.parts(), e.subject.claims
    whole, roundings = dict(code), claims.roundings(outer)
    inner_claims = CLAIMS.get(e.inner[0], Claims()) if e.inner else claims
    for entry, method in inner:
        stored = {k.removeprefix(f"{entry}_"): whole.pop(k) for k in code if k.startswith(f"{entry}_")}
        whole[entry] = np.reshape(inner_claims.magnitudes(method, stored), outer.code_shapes()[entry])
        roundings += inner_claims.roundings(method)
    return claims.magnitudes(outer, whole), roundings
