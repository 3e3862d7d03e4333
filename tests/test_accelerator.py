"""Accelerators, as far as they can be tested without one: on the CPU by the ways that an accelerator takes."""

import copy
import math

import pytest
import torch
from torch import nn

import deepthin.torch as dt
from deepthin import METHODS
from deepthin.kernels import costs
from deepthin.torch import accelerated, cudnn, multiply
from tolerance import assert_close


@pytest.fixture
def accelerator(monkeypatch):
    """The CPU is taken for an accelerator whose times are not known."""
    monkeypatch.setattr(accelerated, "on_accelerator", lambda tensor: not tensor.is_meta)
    monkeypatch.setattr(multiply, "timed_device", lambda x: "unknown")


def flat_layout(layer, weights):
    """As cuDNN has it: the matrices of all layers one after the other, then the biases."""
    offsets, end = [0] * len(weights), 0
    for kind in ("weight", "bias"):
        for place, name in enumerate(layer._flat_weights_names):
            if name.startswith(kind):
                offsets[place], end = end, end + weights[place].numel()
    return cudnn.Layout(end, tuple(offsets))


@pytest.fixture
def with_cudnn(accelerator, monkeypatch):
    monkeypatch.setattr(cudnn, "applies", lambda weights: True)
    monkeypatch.setattr(cudnn, "layout_of", flat_layout)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_lie_in_one_buffer_in_the_order_of_cudnn(kind, with_cudnn, monkeypatch):
    torch.manual_seed(0)
    dense = kind(10, 12, num_layers=2, bidirectional=True)
    layer = copy.deepcopy(dense)
    dt.compress(layer, {"model": {"ratio": 0.5}, "rules": {"*": {"method": "deepthin"}}}, init="scratch")
    dt.materialize(expected := copy.deepcopy(layer))
    monkeypatch.setattr("deepthin.torch.recurrent_layers.native_available", False)
    x = torch.randn(7, 3, 10, requires_grad=True)
    flat = layer._flat_weights
    first = flat[0]
    assert all(weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for weight in flat)
    assert all(weight.is_contiguous() for weight in flat) and first.storage_offset() == 0
    layout = flat_layout(layer, flat)
    assert [weight.storage_offset() for weight in flat] == list(layout.offsets)
    assert first.untyped_storage().nbytes() == 4 * layout.entries
    assert layout.entries == sum(parameter.numel() for parameter in dense.parameters())

    y, wanted = layer(x)[0], expected(x)[0]
    assert torch.equal(y, wanted)
    slopes = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, wanted)]
    assert torch.equal(*slopes)
    layer.zero_grad()
    layer(x)[0].square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())
