"""Bounds on rounding errors: a count of roundings, times the unit roundoff, times the magnitude of what is summed."""

import copy

import numpy as np

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "int64": 0.0}


def bound(terms, magnitude, dtype="float32"):
    """The most that a sum of ``terms`` products, of magnitudes that sum to ``magnitude``, loses by rounding.

    gamma_n = n u / (1 - n u), whatever the order of the sum (Higham, Accuracy and Stability of Numerical Algorithms,
    2002, section 3.1). Chained sums add their terms. A Fourier transform of N points loses some log2 N terms times a
    product of norms (section 24.1), which is less than a sum of hundreds of terms loses.
    """
    lost = terms * UNIT[dtype]
    assert lost < 1
    return lost / (1 - lost) * magnitude


def assert_close(got, want, terms, magnitude=None):
    """Two computed results differ by no more than both lose: each the bound of its own type (a number's: float64).

    Without a magnitude nothing cancels (products, or sums of one sign), so that the magnitude is the result's.
    """
    lost = 0.0
    for value in (got, want):
        kind = getattr(value, "dtype", "float64")
        kind = getattr(kind, "name", str(kind)).removeprefix("torch.")
        lost = lost + bound(terms, 1.0, kind)
    got, want, size = (as_float64(value) for value in (got, want, want if magnitude is None else magnitude))
    assert got.shape == want.shape
    allowed = lost * abs(size)
    assert (abs(got - want) <= allowed).all(), f"{abs(got - want).max()} where {allowed.max()} is allowed"


def as_float64(value):
    value = value.detach().cpu().double() if hasattr(value, "detach") else value
    return np.asarray(value).astype(np.float64)


def absolute(network):
    """A chain of linear maps, in float64, with all numbers positive: what it gives of |x| are sums of magnitudes.

    Its factors are positive too, so that the sums of a generated weight count. Activations pass errors on unamplified
    and are left out. The same holds for gradients of a loss of its output.
    """
    from torch import nn

    network = copy.deepcopy(network).double().eval()
    for parameter in network.parameters():
        parameter.data.abs_()
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU | nn.Tanh | nn.Sigmoid):
                setattr(module, name, nn.Identity())
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.abs_().neg_()
    return network


def matrices(network):
    """Each module's own parameters with the sums first: as outputs by terms, whatever the layer's layout."""
    for module in network.modules():
        kind = type(module).__name__
        turned = "Transpose" in kind or (kind == "Conv1D" and not hasattr(module, "kernel_size"))  # inputs come first
        for parameter in module.parameters(recurse=False):
            weight = parameter.detach().abs()
            weight = weight.transpose(0, 1) if turned and weight.dim() > 1 else weight
            yield module, weight.flatten(1) if weight.dim() > 1 and "Embedding" not in kind else weight.reshape(-1, 1)


def terms(network, *inputs, decoding=32):
    """How many are summed behind one output, layer after layer: each one's terms and some 8 of its activation.

    Recurrent layers once a step, attention its scores and shares too; ``decoding``: of the sums behind the weights.
    """
    import torch
    from torch import nn

    import deepthin.torch as dt

    steps = max(max(value.shape[:2]) if value.dim() > 2 else len(value) for value in inputs if torch.is_tensor(value))
    found = decoding
    for module, weight in matrices(dt.materialize(copy.deepcopy(network))):
        times = steps if isinstance(module, nn.RNNBase) else 1
        found += times * (weight.shape[1] + 8) + steps * isinstance(module, nn.MultiheadAttention)
    return found


def peak(network, *inputs):
    """No sum of magnitudes in any layer exceeds this: the largest input of a layer times its largest sum of weights.

    For networks that pass errors on unamplified, as those drawn with a gain below one do.
    """
    import torch

    import deepthin.torch as dt

    network = dt.materialize(copy.deepcopy(network)).eval()
    sums, found = {}, [1.0]  # states and shares of attention are at most one
    for module, weight in matrices(network):
        sums[module] = max(sums.get(module, 0.0), weight.sum(1).max().item())

    def seen(module, given):
        sizes = [value.abs().max().item() for value in given if torch.is_tensor(value) and value.is_floating_point()]
        found.append(max([1.0, *sizes]) * sums[module])

    hooks = [module.register_forward_pre_hook(seen) for module in sums]
    with torch.no_grad():
        network(*inputs)
    for hook in hooks:
        hook.remove()
    return max(found)


def largest(*values):
    """The largest magnitude of all: that of gradients stands for the sums of magnitudes, of which it is the nearest."""
    return max(float(abs(as_float64(value)).max(initial=0.0)) for value in values)
