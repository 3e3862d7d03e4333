"""What a model's file would hold, and which plans meet a limit for it: the same in every framework."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from deepthin.errors import BudgetError, ConfigError
from deepthin.methods.float_coding import LOG_STEP, FloatCoding
from deepthin.plan.rules import IN_16_BITS, Rules
from deepthin.plan.shares import Planned, plan_tensors, split_units
from deepthin.plan.tensor import Tensor
from deepthin.storage.arrays import Raw
from deepthin.storage.codings import coded
from deepthin.storage.contents import Contents, Part, Thin
from deepthin.storage.write import size_of

_MEASUREMENTS = 8  # upper bound on the plans that are encoded to measure entropy coding

Encoder = Callable[[Planned], Thin]
"""Encodes a plan from the present values of its tensors."""


def parts_of(planned: Planned) -> list[Part]:
    """The tensors of a plan as parts of its matrix; in a group each is scaled to its own standard deviation.

    Args:
        planned: Tensors that share one matrix.

    Returns:
        One part for each tensor, in order.
    """
    first = planned.tensors[0]
    return [Part(t.shape, t.std / first.std, t.transposed, t.zero_row) for t in planned.tensors]


def projecting(planned: Planned) -> list[np.ndarray] | None:
    """Importance that makes a group's projection fit only some of its members.

    Args:
        planned: Tensors that share one matrix.

    Returns:
        For each tensor an array of its shape: 1 where its projection is the one that the others share, else 0. None if
        the rule names no such tensor.
    """
    pairs = zip(planned.tensors, planned.projecting, strict=False)
    return [np.full(tensor.shape, projects, np.float32) for tensor, projects in pairs] or None


def within(
    limit: int, rules: Rules, tensors: Sequence[Tensor], base: Contents, encoded: Encoder | None = None
) -> list[Planned]:
    """The largest plans whose file stays within a limit.

    Sizes follow from the plans alone: no value is read, and no file written. With ``encoded`` they are those of the
    codes themselves, where a code has integers that training leaves unchanged and that entropy coding may shorten.

    Args:
        limit: Upper bound on the file in bytes.
        rules: What becomes of each tensor.
        tensors: All tensors of the model.
        base: What the model holds now.
        encoded: Encodes a plan, to measure what entropy coding saves; None: plan with upper bounds.

    Returns:
        The plans.

    Raises:
        BudgetError: Even the smallest plans need more than ``limit`` bytes; it carries the smallest possible size.
        ConfigError: The rules do not fit the tensors, or some matrices are trained to a size and others share it.
    """
    if any(rule.learns_step for rule in rules.rules):
        return _trained(limit, rules, tensors, base)
    try:
        return _within(limit, rules, tensors, base, encoded)
    except BudgetError:
        if rules.biases != "default":
            raise
    return _within(limit, replace(rules, biases=IN_16_BITS), tensors, base, encoded)


def _within(
    limit: int, rules: Rules, tensors: Sequence[Tensor], base: Contents, encoded: Encoder | None
) -> list[Planned]:
    """The plans of ``within``, of methods whose size is known."""
    try:
        low = 0
        best = plan_tensors(rules, tensors, low)
    except BudgetError as error:
        low = error.smallest_bits
        best = plan_tensors(rules, tensors, low)
    smallest = planned_contents(base, best)
    if (least := size_of(smallest, bound=True)) > limit:
        raise BudgetError(
            f"The file cannot be written in {limit} bytes: with the smallest plans it has {least}"
            f"{_beside(smallest, tensors, rules)}. Use [model] file_bytes >= {least}, or name more tensors.",
            smallest_bits=8 * least,
            smallest_ratio=least / max(base.dense_bytes, 1),
        )
    high = 8 * limit
    while high - low > 1:  # the file grows with the payload, headers and unnamed tensors being nearly constant
        middle = (low + high) // 2
        planned = plan_tensors(rules, tensors, middle)
        if size_of(planned_contents(base, planned), bound=True) <= limit:
            low, best = middle, planned
        else:
            high = middle
    if encoded is None or not any(map(_codable, best)):
        return best
    taken, high = coded_bytes(base, best, encoded), 64 * limit
    for _ in range(_MEASUREMENTS):
        wanted = low * limit // taken  # too small a guess, since headers do not grow
        wanted = (low + high) // 2 if wanted >= high else wanted
        if wanted <= low + (low >> 10):
            break
        planned = plan_tensors(rules, tensors, wanted)
        if (bytes_ := coded_bytes(base, planned, encoded)) <= limit:
            low, best, taken = wanted, planned, bytes_
        else:
            high = wanted
    return best


def _trained(limit: int, rules: Rules, tensors: Sequence[Tensor], base: Contents) -> list[Planned]:
    """Plans of a model that training brings to its size; BudgetError if the file is too large even of zeros."""
    _, _, shared = split_units(rules, tensors)
    if shared:
        raise ConfigError(
            f"{shared[0].name} shares [model] file_bytes with matrices whose size is known only after training: give "
            f"the rule {shared[0].rule.pattern!r} a ratio or bytes, or then = {{ method = 'coded' }}."
        )
    planned = plan_tensors(rules, tensors)
    smallest = of_zeros(planned_contents(base, planned))
    if (least := size_of(smallest)) > limit:
        raise BudgetError(
            f"The file cannot be trained to {limit} bytes: with every symbol zero it has {least}"
            f"{_beside(smallest, tensors, rules)}. Use [model] file_bytes >= {least}, or name more tensors.",
            smallest_bits=8 * least,
            smallest_ratio=least / max(base.dense_bytes, 1),
        )
    return planned


def _beside(contents: Contents, tensors: Sequence[Tensor], rules: Rules) -> str:
    """What the smallest file has besides matrices' codes, and what makes that smaller, for messages."""
    dense_bytes = sum(raw.bytes for raw in contents.dense.values())
    told = f", of which {dense_bytes} are tensors that no rule makes thin"
    vectors = {t.name: 32 * t.shape[0] for t in tensors if len(t.shape) == 1 and not t.uncovered}  # in bits
    taken = sum(raw.bytes for name, raw in contents.dense.items() if name in vectors)
    for name, thin in contents.thin.items():
        if name in vectors and 4 * thin.method.bits() > vectors[name]:  # of more than 8 bits
            taken += thin.method.bits() // 8
    if not taken or rules.biases not in ("default", None, IN_16_BITS):
        return told
    return f"{told}; {taken} are biases and scales of normalisation: [model] biases = 4 stores them in 4 bits"


def of_zeros(contents: Contents) -> Contents:
    """The contents with every symbol zero whose step is learned: no training can make the file smaller.

    Args:
        contents: Of a model, or planned.

    Returns:
        Other contents; matrices of other methods are unchanged.
    """
    return replace(contents, thin={name: _of_zeros(thin) for name, thin in contents.thin.items()})


def _of_zeros(thin: Thin) -> Thin:
    code, shapes, integers = dict(thin.code), thin.method.code_shapes(), thin.method.integers()
    for latent, _ in FloatCoding(thin.method).steps().values():
        entry = latent.removesuffix(LOG_STEP) + "symbols"
        zeros = np.zeros(shapes[entry], np.int16)
        code[entry] = coded(zeros, integers[entry])[0] if thin.planned else Raw.of(zeros)
    return replace(thin, code=code)


def coded_bytes(base: Contents, planned: Sequence[Planned], encoded: Encoder) -> int:
    """Size of the file, where codes whose integers training leaves unchanged count with their coded size.

    Args:
        base: What the model holds now.
        planned: The plans.
        encoded: Encodes a plan.

    Returns:
        Bytes.
    """
    return size_of(planned_contents(base, planned, encoded), bound=True)


def _codable(planned: Planned) -> bool:
    """Whether training leaves its integers unchanged, so that their coded size is final."""
    return planned.method is not None and planned.method.trains == "codes" and bool(planned.method.integers())


def planned_contents(base: Contents, planned: Sequence[Planned], encoded: Encoder | None = None) -> Contents:
    """What the file of a planned model would hold.

    Args:
        base: What the model holds now.
        planned: The plans.
        encoded: Encodes a plan; None: all codes are placeholders of the largest size that they can take.

    Returns:
        The contents. Without ``encoded`` their size is an upper bound, since entropy coding depends on the weights.
    """
    thin: dict[str, Thin] = {}
    for p in planned:
        if p.method is not None:
            first = p.tensors[0].name
            if encoded is not None and _codable(p):
                thin[first] = encoded(p)
            else:
                parts = dict(zip((tensor.name for tensor in p.tensors), parts_of(p), strict=True))
                thin[first] = Thin.plan(p.name, p.method, parts, base.dense[first])
    gone = {name for entry in thin.values() for name in entry.parts}
    dense = {name: raw for name, raw in base.dense.items() if name not in gone}
    return Contents({**base.thin, **thin}, dense, base.aliases)
