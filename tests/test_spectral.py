"""Convolutions by spectra, against torch's own in double precision."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import deepthin.torch as dt
from deepthin.torch import spectral
from tolerance import absolute, assert_close

EPS32 = torch.finfo(torch.float32).eps


def assert_as_torch(layer: nn.Conv2d, x: torch.Tensor, got: torch.Tensor) -> None:
    """The error of a Fourier transform grows with the logarithm of its length, and goes by norms."""
    twice = nn.Conv2d.forward(copy.deepcopy(layer).double(), x.double())
    assert got.shape == twice.shape
    weight = layer.weight.detach().double()
    cut = spectral.axes(layer, x.shape[2], x.shape[3])
    assert cut is not None
    rows, cols = cut
    points = rows.tile * cols.tile
    bound = EPS32 * (4 * torch.tensor(points).log2() + weight.shape[1]) * weight.norm() * x.double().norm() + EPS32
    assert ((got - twice).abs() <= bound).all()


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    image=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    batch=st.integers(1, 3),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_stride_padding_and_image(kernel, stride, padding, image, channels, batch, bias, seed):
    torch.manual_seed(seed)
    layer = nn.Conv2d(channels[0], channels[1], kernel, stride, padding, bias=bias)
    x = torch.randn(batch, channels[0], *image)
    if any(i + 2 * p < k for i, p, k in zip(image, padding, kernel, strict=True)):
        assert spectral.axes(layer, *image) is None
        return
    with torch.no_grad():
        got = spectral.convolve(layer, x, spectral.spectrum(layer, layer.weight), layer.bias)
    assert_as_torch(layer, x, got)


def test_an_impulse_gives_the_kernel():
    layer = nn.Conv2d(1, 1, (3, 2), bias=False)
    x = torch.zeros(1, 1, 5, 3)
    x[0, 0, 2, 1] = 1
    got = spectral.convolve(layer, x, spectral.spectrum(layer, layer.weight.detach()), None)
    assert_close(got[0, 0], layer.weight.detach()[0, 0].flip(0, 1), 8 * 3 * 6, layer.weight.norm())  # of 64 points


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 2, 5, groups=2),
        nn.Conv2d(2, 2, 5, dilation=2),
        nn.Conv2d(2, 2, 5, padding="same"),
        nn.Conv2d(2, 2, 5, padding=2, padding_mode="circular"),
    ],
)
def test_other_kinds_are_left_to_torch(layer):
    assert spectral.axes(layer, 200, 200) is None
    with pytest.raises(ValueError, match="cannot be computed by FFT"):
        spectral.convolve(layer, torch.zeros(1, 2, 200, 200), torch.zeros(2, 2, 1, dtype=torch.complex64), None)


def test_large_kernels_pay_and_small_ones_do_not():
    large = nn.Conv2d(32, 32, (21, 11), (2, 1), (10, 5))
    assert spectral.pays(large, torch.Size((1, 32, 81, 50)))
    assert not spectral.pays(large, torch.Size((0, 32, 81, 50)))
    assert not spectral.pays(large, torch.Size((1, 32, 21, 11)))  # a tile has hardly any outputs that are wanted
    assert not spectral.pays(nn.Conv2d(64, 64, 3, padding=1), torch.Size((1, 64, 56, 56)))


@pytest.fixture
def thin():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, (21, 11), (2, 1), (10, 5)), nn.ReLU())
    dt.compress(model, {"rules": {"*": {"method": "deepthin", "ratio": 0.02}}}, init="scratch")
    return model.eval()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(2, 16, 81, 50)


def test_a_layer_takes_it_in_evaluation_alone(thin, images, monkeypatch):
    calls = []
    transform = spectral.spectrum
    monkeypatch.setattr(spectral, "spectrum", lambda layer, weight: calls.append(1) or transform(layer, weight))
    with torch.no_grad():
        first = thin(images)
        assert torch.equal(first, thin(images))
        assert len(calls) == 1  # its spectrum is kept
        assert_as_torch(thin[0], images, thin[0](images))
        assert torch.equal(thin(images[0]), thin(images[:1])[0])
        next(thin[0].thin["weight"].parameters()).mul_(2)  # a new code, a new spectrum
        assert not torch.equal(first, thin(images))
        assert len(calls) == 2
        assert_as_torch(thin[0], images, thin[0](images))
        thin.train()
        thin(images)
    thin.eval()
    thin(images).sum().backward()  # gradients are torch's
    assert next(thin[0].thin["weight"].parameters()).grad is not None
    assert len(calls) == 2


def test_a_gradient_of_the_input_and_half_precision_are_torchs(thin, images):
    for parameter in thin.parameters():
        parameter.requires_grad_(False)
    x = images.requires_grad_()
    thin(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert thin(images).dtype == torch.bfloat16


def test_copies_and_exports(thin, images):
    with torch.no_grad():
        expected = thin(images)
        assert "_spectrum" in thin[0].__dict__
        for copied in (copy.deepcopy(thin), pickle.loads(pickle.dumps(thin))):
            assert "_spectrum" not in copied[0].__dict__
            assert torch.equal(copied(images), expected)
        exported = torch.export.export(thin, (images,)).module()
        assert_as_torch(thin[0], images, thin[0](images))
        terms = 16 * 21 * 11 + 8  # a transform loses less than such a sum
        assert_close(exported(images), expected, terms, absolute(thin)(images.abs().double()))


def test_a_weight_that_is_not_kept_has_no_spectrum(thin, images):
    with torch.no_grad():
        expected = thin(images)
    thin[0].thin["weight"].train()  # it decodes anew each time, in inference mode without counting changes
    with torch.inference_mode():
        got = thin(images)
    assert_close(got, expected, 16 * 21 * 11 + 8, absolute(thin)(images.abs().double()))


def test_wrong_channels_are_said_by_torch(thin):
    with torch.no_grad(), pytest.raises(RuntimeError, match="channels"):
        thin(torch.randn(1, 3, 81, 50))
