"""Each law catches its planted fault, in every method: a law that misses it would be too weak."""

import dataclasses

import numpy as np
import pytest

from deepthin import METHODS, BudgetError
from deepthin.methods import Named
from deepthin.testing import INNER, check_method
from deepthin.testing.claims import CLAIMS
from deepthin.testing.laws import LAWS
from deepthin.torch import ThinWeight

EXAMPLES = 30
SEED = 2026  # of some 300 faults, one in some thousand draws of 30 examples is missed


def floats(method):
    return [entry for entry in method.code_shapes() if entry not in method.integers()]


def is_torch(xp):
    return xp is not np


def changed(base, name, change):
    """A class whose method ``name`` returns what ``change(self, result, *arguments)`` makes of the right result."""

    def wrapped(self, *arguments, **keywords):
        return change(self, getattr(base, name)(self, *arguments, **keywords), *arguments, **keywords)

    return {name: wrapped}


def refitted(base, change):
    """A class with another ``fit``: ``change(fit, cls, shape, max_bits, **options)``."""
    fit = base.fit.__func__
    return {"fit": classmethod(lambda cls, shape, max_bits, **options: change(fit, cls, shape, max_bits, **options))}


def init_times(base, factor):
    def change(self, code, rng, std):
        first, tables = floats(self)[0], self.derived()
        wide = {**code, first: code[first] * factor}
        right = factor * self.decode(code | tables, np)
        if np.allclose(self.decode(wide | tables, np), right, rtol=1e-4, atol=1e-6 * abs(right).max()):
            return {**code, first: wide[first].astype(np.float32)}
        return {e: (a * factor).astype(np.float32) if e in floats(self) else a for e, a in code.items()}

    return changed(base, "init", change)


def detached(base, part):
    """In torch one of the floating entries, or half of it, is a constant."""

    def decode(self, code, xp):
        code = dict(code)
        if is_torch(xp):
            entry = floats(self)[-1]
            whole = xp.reshape(code[entry], (-1,))
            kept = int(whole.shape[0] * (1 - part))
            parts = [whole[:kept], whole[kept:].detach()]
            code[entry] = xp.reshape(xp.concatenate(parts), code[entry].shape)
        return base.decode(self, code, xp)

    return {"decode": decode}


def noise(self, code, weight, xp, importance=None):
    factor = 1 + 1e-6 * float(np.random.default_rng().random())
    return {e: a * factor if e in floats(self) else a for e, a in code.items()}


def named_size(base, more):
    def change(fit, cls, shape, max_bits, **options):
        try:
            return fit(cls, shape, max_bits, **options)
        except BudgetError as error:
            error.smallest_bits += more
            raise

    return refitted(base, change)


def other_error(base):
    def change(fit, cls, shape, max_bits, **options):
        try:
            return fit(cls, shape, max_bits, **options)
        except BudgetError as error:
            raise ValueError(str(error)) from error

    return refitted(base, change)


def writes(base, name, which):
    """``encode`` or ``decode`` adds 1 to the first number of an argument."""

    def call(self, first, xp, importance=None):
        result = base.encode(self, first, xp, importance) if name == "encode" else base.decode(self, first, xp)
        target = {"weight": first, "importance": importance}.get(which)
        if which == "code":
            target = first[floats(self)[0]]
        if target is not None and not getattr(target, "requires_grad", False):
            target[(0,) * target.ndim] += 1
        return result

    return {name: call}


def view_of_weight(self, code, weight, xp, importance=None):
    if is_torch(xp):
        return code
    entry = floats(self)[0]
    return {**code, entry: np.broadcast_to(weight.reshape(-1)[:1], code[entry].shape)}


def view_of_code(self, weight, code, xp):
    return weight if is_torch(xp) else np.broadcast_to(code[floats(self)[0]].reshape(-1)[:1], self.shape)


def worse_when_larger(base):
    """Plans above the smallest of their shape lose more, the larger they are."""

    def encode(self, weight, xp, importance=None):
        code = base.encode(self, weight, xp, importance)
        factor = 1 - min(1, self.bits() / (32 * weight.shape[0] * weight.shape[1])) ** 0.5
        return {e: a * factor if e in floats(self) else a for e, a in code.items()}

    return {"encode": encode}


def forgets_a_field(base):
    """A setting that is no field: what is read back from a file has another."""
    slot = "hidden"

    def change(fit, cls, shape, max_bits, **options):
        plan = fit(cls, shape, max_bits, **options)
        object.__setattr__(plan, slot, 2.0)
        return plan

    def decode(self, code, xp):
        return base.decode(self, code, xp) * getattr(self, slot, 1.0)

    return {**refitted(base, change), "decode": decode, "__slots__": (slot,)}


def numpy_field(base):
    def change(fit, cls, shape, max_bits, **options):
        plan = fit(cls, shape, max_bits, **options)
        field = next(f.name for f in dataclasses.fields(plan) if type(getattr(plan, f.name)) is int)
        object.__setattr__(plan, field, np.int64(getattr(plan, field)))
        return plan

    return refitted(base, change)


def other_when_torch(amount):
    return lambda self, weight, code, xp: weight * (1 + amount) if is_torch(xp) else weight


def floats_times(factor, only_torch=False):
    def change(self, code, weight, xp, importance=None):
        if only_torch and not is_torch(xp):
            return code
        return {e: a * factor if e in floats(self) else a for e, a in code.items()}

    return change


def shifted_tables(base):
    """What ``encode`` finds by the right tables is decoded by others."""

    def encode(self, weight, xp, importance=None):
        right = base(**{field.name: getattr(self, field.name) for field in dataclasses.fields(base)})
        return right.encode(weight, xp, importance)

    tables = changed(base, "derived", lambda self, tables: {e: np.roll(table, 1) for e, table in tables.items()})
    return {**tables, "encode": encode}


def random_table(self, tables):
    return {**tables, "more": np.random.default_rng().random(3)}


# The fault, the law that must catch it, and the class' members that plant it.
FAULTS = {
    "a spread times 3": ("spread", lambda base: init_times(base, 3)),
    "a spread times 1.5": ("spread", lambda base: init_times(base, 1.5)),
    "a spread of 0.6": ("spread", lambda base: init_times(base, 0.6)),
    "a dropped gradient": ("gradient", lambda base: detached(base, 1)),
    "half a gradient": ("gradient", lambda base: detached(base, 0.5)),
    "bits() a bit too low": ("stored", lambda base: changed(base, "bits", lambda self, bits: bits - 1)),
    "a budget that is exceeded by a bit": (
        "budget",
        lambda base: refitted(base, lambda fit, cls, shape, bits, **options: fit(cls, shape, bits + 1, **options)),
    ),
    "a smallest size a bit too low": ("budget", lambda base: named_size(base, -1)),
    "a smallest size a bit too high": ("budget", lambda base: named_size(base, 1)),
    "another error": ("budget", other_error),
    "a code that is a view of the weight": ("alias", lambda base: changed(base, "encode", view_of_weight)),
    "a weight that is a view of the code": ("alias", lambda base: changed(base, "decode", view_of_code)),
    "a random encode": ("deterministic", lambda base: changed(base, "encode", noise)),
    "a random decode": (
        "deterministic",
        lambda base: changed(
            base, "decode", lambda self, weight, code, xp: weight * (1 + 1e-3 * np.random.default_rng().random())
        ),
    ),
    "a changed weight": ("pure", lambda base: writes(base, "encode", "weight")),
    "a changed importance": ("pure", lambda base: writes(base, "encode", "importance")),
    "a changed code": ("pure", lambda base: writes(base, "decode", "code")),
    "an error that grows with the budget": ("error", worse_when_larger),
    "a random derived table": ("derived", lambda base: changed(base, "derived", random_table)),
    "a derived table that is shifted": ("nearest", shifted_tables),
    "a setting that is no field": ("header", forgets_a_field),
    "a field that JSON does not know": ("header", numpy_field),
    "wrong shapes": (
        "shapes",
        lambda base: changed(
            base, "code_shapes", lambda self, shapes: {e: (*s[:-1], s[-1] + 1) for e, s in shapes.items()}
        ),
    ),
    "integers above their range": (
        "shapes",
        lambda base: changed(
            base,
            "integers",
            lambda self, kinds: {e: dataclasses.replace(k, count=k.count - 1) for e, k in kinds.items()},
        ),
    ),
    "a float64 start": (
        "shapes",
        lambda base: changed(
            base,
            "init",
            lambda self, code, rng, std: {e: a.astype("f8") if e in floats(self) else a for e, a in code.items()},
        ),
    ),
    "another decode in torch": ("decode", lambda base: changed(base, "decode", other_when_torch(1e-4))),
    "another encode in torch": ("encode", lambda base: changed(base, "encode", floats_times(0.9, only_torch=True))),
    "an encode that misses": ("nearest", lambda base: changed(base, "encode", floats_times(0.5))),
}
LAYERS = {"a dropped gradient in a layer": "latents", "a product of another weight": "product"}
"""Faults of a layer, not of a method, and the law that must catch them."""
TABLES = {"shuffled", "hashed"}  # methods that derive tables
WHOLE = {"pruned", "uniform", "kmeans", "ecsq", "binary"}  # methods that store integers
ONLY = {"a derived table that is shifted": TABLES, "integers above their range": WHOLE}
CASES = [(fault, name) for fault in FAULTS for name in METHODS if name in ONLY.get(fault, METHODS)]


def planted(name, fault):
    """The method of that name with a fault, as a name of its own."""
    named = METHODS[name]
    members = {"__slots__": (), "__module__": __name__, **FAULTS[fault][1](named.cls)}
    cls = type(f"Faulty{named.cls.__name__}", (named.cls,), members)
    return Named(f"faulty {name}", cls, named.preset, named.sized_by)


@pytest.mark.parametrize(("fault", "name"), CASES)
def test_each_law_catches_its_fault_in_each_method(fault, name):
    law = FAULTS[fault][0]
    with pytest.raises(AssertionError) as caught:
        check_method(planted(name, fault), claims=CLAIMS[name], laws=[law], examples=EXAMPLES, seed=SEED)
    assert f"breaks the law '{law}'" in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("then", [(), INNER], ids=["alone", "then another"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("fault", LAYERS)
def test_faults_of_a_layer_are_caught_in_each_method(fault, name, then, monkeypatch):
    draw, product = ThinWeight.draw.__func__, ThinWeight.product

    def drawn(cls, *arguments):
        weight = draw(cls, *arguments)
        list(weight.parameters())[-1].register_hook(lambda gradient: 0 * gradient)
        return weight

    if fault == "a dropped gradient in a layer":
        monkeypatch.setattr(ThinWeight, "draw", classmethod(drawn))
    else:
        monkeypatch.setattr(ThinWeight, "product", lambda *arguments: 1.001 * product(*arguments))
    with pytest.raises(AssertionError, match=f"breaks the law '{LAYERS[fault]}'"):
        check_method(name, then=then, laws=[LAYERS[fault]], examples=EXAMPLES, seed=SEED)


def test_every_law_has_a_fault_that_it_catches_in_every_method():
    assert {law for law, _ in FAULTS.values()} | set(LAYERS.values()) == LAWS.keys()
    for law in LAWS.keys() - LAYERS.values():
        assert {name for fault, name in CASES if FAULTS[fault][0] == law} == METHODS.keys(), law


def test_a_subclass_without_a_fault_breaks_no_law():
    """So it is the fault that is caught, and not how it is planted."""
    for name, named in METHODS.items():
        cls = type(f"Sound{named.cls.__name__}", (named.cls,), {"__slots__": ()})
        check_method(Named(f"sound {name}", cls, named.preset, named.sized_by), claims=CLAIMS[name], examples=1)
