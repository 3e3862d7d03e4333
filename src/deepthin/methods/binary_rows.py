"""The codes of ``Binary`` for all rows at once, in few operations of torch: for accelerators.

There a matrix takes as long as a small piece of it, so the number of operations counts, and no operation may make the
host wait for a value. The algorithms are those of ``deepthin.methods.binary``, which is the reference.
"""

from typing import Any

from jaxtyping import Float, Integer

from deepthin.method import Array

_RIDGE = 1e-9  # of the diagonal: where the Gram matrix is singular, scales are those of least norm to seven digits


def is_taken(weight: Array) -> bool:
    """Whether an array is encoded here.

    Args:
        weight: Array of any framework.

    Returns:
        True for torch's tensors in the memory of an accelerator that has double precision.
    """
    return getattr(getattr(weight, "device", None), "type", "cpu") not in ("cpu", "meta", "mps")


def rounded(
    rows: Float[Array, "rows cols"], planes: int, rounds: int, torch: Any
) -> tuple[Integer[Array, "rows cols"], Float[Array, "rows planes"]]:
    """Signs and scales of each row.

    Args:
        rows: Tensor, rows x cols, in float32 or float64, with squares that can be added up.
        planes: Number of signs for each weight, 1 to 8.
        rounds: 0: greedy codes; 1: least-squares scales; from 2 on: that many alternating rounds.
        torch: The module.

    Returns:
        Symbols, whose bits are the signs, in int16, and scales, rows x planes.
    """
    bits = torch.arange(planes, device=rows.device)
    sums_of = ((torch.arange(1 << planes, device=rows.device)[:, None] >> bits) & 1).to(rows.dtype) * 2 - 1
    signs, scales = _greedy(rows, planes, torch)
    if rounds and planes > 1:
        scales = _best_scales(rows, signs, torch)
    symbols = _symbols(signs, bits)
    if rounds < 2 or planes == 1:
        return symbols.to(torch.int16), scales
    others_signs, others = _refined(rows, planes, torch)
    other = symbols
    for step in range(rounds):
        others = others if step == 0 else _best_scales(rows, others_signs, torch)  # the first are there
        other = _nearest(rows, others, sums_of, torch)
        others_signs = sums_of[other]
    better = (_errors(rows, others_signs, others, torch) < _errors(rows, signs, scales, torch))[:, None]
    return torch.where(better, other, symbols).to(torch.int16), torch.where(better, others, scales)


def _sign(left: Array, torch: Any) -> Array:
    """1 or -1 in the type of ``left``; 1 for 0. As tensors on the device: numbers would have to be copied to it."""
    one = left.new_ones(())
    return torch.where(left >= 0, one, -one)


def _greedy(rows: Array, planes: int, torch: Any) -> tuple[Array, Array]:
    """Each plane has the signs of the remaining error, and its mean magnitude as scale. Signs: rows x cols x planes."""
    left = rows
    signs: list[Array] = []
    scales: list[Array] = []
    for k in range(planes):
        signs.append(_sign(left, torch))
        scales.append(left.abs().mean(1, keepdim=True))
        if k + 1 < planes:
            left = torch.addcmul(left, signs[-1], scales[-1], value=-1)
    return torch.stack(signs, 2), torch.cat(scales, 1)


def _refined(rows: Array, planes: int, torch: Any) -> tuple[Array, Array]:
    """The same, with least-squares scales after each plane."""
    signs = [_sign(rows, torch)]
    stacked, scales = signs[0][:, :, None], rows.abs().mean(1, keepdim=True)
    for _ in range(1, planes):
        signs.append(_sign(rows - torch.matmul(stacked, scales[:, :, None])[:, :, 0], torch))
        stacked = torch.stack(signs, 2)
        scales = _best_scales(rows, stacked, torch)
    return stacked, scales


def _best_scales(rows: Array, signs: Array, torch: Any) -> Array:
    """Least-squares scales, by a Cholesky decomposition of the Gram matrix in double precision."""
    turned = signs.transpose(1, 2)
    gram, right = torch.matmul(turned, signs).double(), torch.matmul(turned, rows[:, :, None]).double()
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    lower = torch.linalg.cholesky_ex(torch.add(gram, identity, alpha=_RIDGE * rows.shape[1]))[0]  # waits for no error
    half = torch.linalg.solve_triangular(lower, right, upper=False)
    return torch.linalg.solve_triangular(lower.transpose(1, 2), half, upper=True)[:, :, 0].to(rows.dtype)


def _nearest(rows: Array, scales: Array, sums_of: Array, torch: Any) -> Array:
    """The symbol whose sum is nearest; of two equally near ones the upper."""
    sums, order = torch.sort(torch.matmul(scales, sums_of.t()), dim=1, stable=True)
    bounds = sums[:, :-1] / 2 + sums[:, 1:] / 2
    return order.gather(1, torch.searchsorted(bounds, rows.contiguous(), right=True))


def _symbols(signs: Array, bits: Array) -> Array:
    return ((signs > 0).to(bits.dtype) << bits).sum(2)


def _errors(rows: Array, signs: Array, scales: Array, torch: Any) -> Array:
    return (rows - torch.matmul(signs, scales[:, :, None])[:, :, 0]).square().sum(1)
