"""The conv task: networks as published, their thin and narrow versions, and data sets that look alike."""

import copy
import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import deepthin.torch as dt
from deepthin import ConfigError
from deepthin.lab.tasks import conv
from deepthin.lab.tasks.training import Training

DEPTHS = 5, 8
PIECES = {"train": 192, "t10k": 40}


def write(folder, seed):
    """Ten noisy patterns in MNIST's format."""
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 256, size=(10, 28, 28))
    for split, count in PIECES.items():
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = (0.8 * patterns[labels] + 0.2 * rng.integers(0, 256, size=(count, 28, 28))).astype(np.uint8)
        for array, name in ((images, "images-idx3"), (labels, "labels-idx1")):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return conv.load(write(tmp_path_factory.mktemp("data"), 0))


def on_meta(depth, width=conv.WIDTH):
    with torch.device("meta"):
        return conv.build(None, width, depth)


def count(model):
    return sum(p.numel() for p in model.parameters())


def weights(model):
    return sum(p.numel() for p in model.parameters() if p.dim() > 1)


def test_lenet_has_the_numbers_of_caffe():
    assert count(on_meta(5)) == 431_080  # lenet_train_test.prototxt: 520 + 25,050 + 400,500 + 5,010


@pytest.mark.parametrize(("depth", "layers"), [(20, 0.27e6), (32, 0.46e6), (44, 0.66e6), (56, 0.85e6), (110, 1.7e6)])
def test_residual_networks_are_those_of_the_paper(depth, layers):
    """He et al., 2016, table 6: layers and millions of numbers; its images have three colours, 288 weights more."""
    model = on_meta(depth)
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == depth
    digit = 10 ** (int(np.log10(layers)) - 1)
    assert abs(count(model) + 288 - layers) <= digit


@pytest.mark.parametrize("depth", [*DEPTHS, 14])
@pytest.mark.parametrize("width", [1, 90, 1000])
def test_ten_scores_for_each_image(depth, width):
    torch.manual_seed(0)
    model = conv.build(None, width, depth)
    assert model(torch.randn(3, 1, 28, 28)).shape == (3, 10)
    maps = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *call: maps.append(call[2].shape[-1]))
    model.eval()(torch.randn(1, 1, 28, 28))
    per_stage = (depth - 2) // 3
    assert maps == ([24, 8] if depth == 5 else [28] * (1 + per_stage) + [14] * per_stage + [7] * per_stage)


def test_a_block_passes_its_input_on():
    """With weights of zero: each second pixel of what is positive, and zeros in the new channels."""
    block = conv.Block(2, 5, stride=2).eval()
    for layer in (block.first, block.second):
        nn.init.zeros_(layer.weight)
    x = torch.randn(1, 2, 6, 6)
    with torch.no_grad():
        got = block(x)
    assert torch.equal(got[:, :2], x[:, :, ::2, ::2].relu())
    assert got.shape == (1, 5, 3, 3)
    assert not got[:, 2:].any()


@pytest.mark.parametrize("depth", [1, 2, 6, 9, 18, -4])
def test_other_depths_are_refused(depth):
    with pytest.raises(ConfigError) as caught:
        conv.build(None, 1000, depth)
    assert str(caught.value) == (
        f"No network of depth {depth}: use 5 for LeNet-5, or 8, 14, 20, ... (6 k + 2) for a ResNet."
    )


@pytest.mark.parametrize("depth", DEPTHS)
def test_numbers_grow_with_the_width(depth):
    counts = [count(on_meta(depth, width)) for width in range(1, 300, 7)]
    assert counts == sorted(counts)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("ratio", [0.05, 0.02])
def test_small_sizes_can_be_reached(depth, ratio):
    """Rank factorisation of the residual network excepted, whose smallest ratio is .0256."""
    dense = weights(on_meta(depth))
    width = dt.same_size(lambda width: conv.build(None, width, depth), int(4 * ratio * dense))
    assert 0.9 * ratio * dense < weights(on_meta(depth, width)) <= ratio * dense
    for method in ("deepthin", "rank", "hashed", "pruned"):
        if (depth, ratio, method) != (8, 0.02, "rank"):
            rules = {
                "model": {"ratio": ratio, "allocation": conv.TASK.allocation},
                "rules": conv.rules({"method": method}),
            }
            report = dt.plan(on_meta(depth), rules)
            thin = [row for row in report.rows if len(row.shape) > 1]
            assert sum(row.bytes for row in thin) <= 4 * ratio * dense, method


def test_data_are_told_apart(data, tmp_path):
    assert {split: tuple(x.shape) for split, x in data.inputs.items()} == {
        "train": (176, 1, 28, 28),
        "dev": (16, 1, 28, 28),
        "test": (40, 1, 28, 28),
    }
    assert data.about.startswith("images with the checksum ")
    assert "176 images to train, 16 for development, 40 to test" in data.about
    assert conv.load(write(tmp_path, 1)).about != data.about
    assert conv.load(write(tmp_path, 0)).about == data.about
    assert conv.example(data)[0].shape == (1, 1, 28, 28)


def test_mnist_is_known(data_folder):
    assert conv.load(Path(data_folder)).about.startswith("MNIST: 55,000 images to train")


def thin(depth, method, ratio=0.1, seed=0):
    torch.manual_seed(seed)
    model = conv.build(None, 200, depth)
    rules = {"model": {"ratio": ratio, "allocation": conv.TASK.allocation}, "rules": conv.rules({"method": method})}
    dt.compress(model, rules, init="scratch", seed=seed)
    return model


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("method", ["deepthin", "hashed"])
def test_thin_networks_learn_a_batch_by_heart(data, depth, method):
    model = thin(depth, method, ratio=0.25)
    inputs, targets = data.inputs["train"][:20], data.targets["train"][:20]
    optimizer = torch.optim.Adam(dt.parameter_groups(model, 1e-3))
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
    assert (model(inputs).argmax(1) == targets).all()


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_training_follows_from_its_seed(data, depth):
    states = []
    for seed in (3, 3, 4):
        model = thin(depth, "deepthin", ratio=0.25, seed=seed)
        conv.fit(model, data, Training(model=model, steps=4, lr=1e-3, seed=seed))
        states.append(copy.deepcopy(model.state_dict()))
    one, same, other = states
    assert all(torch.equal(x, same[name]) for name, x in one.items())
    assert not all(torch.equal(x, other[name]) for name, x in one.items())


def test_errors_are_percent_of_a_split(data):
    """A network that always says zero is right on each tenth image."""
    model = conv.build(data, 20)
    with torch.no_grad():
        model[-1].weight.zero_()
        model[-1].bias.copy_(torch.eye(10)[0])
    assert conv.evaluate(model, data, "test") == {"error": 90.0}
    wrong = sum(label != 0 for label in data.targets["dev"].tolist())
    assert conv.evaluate(model, data, "dev") == {"error": 100 * wrong / 16}  # sixteenths have no rounding
    assert conv.TASK.metrics == ("error",)
