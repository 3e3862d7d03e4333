"""Every layer type that can be thin: it learns, is saved and reloaded exactly, compiled, exported, copied."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import deepthin
import deepthin.torch as dt
from deepthin import ConfigError
from deepthin.kernels import products
from deepthin.torch.exchange import THIN, thin_tensors
from deepthin.torch.generated import ThinLayer
from tolerance import absolute, assert_close, bound, largest, peak, terms

CLASSES = 5


class Net(nn.Module):
    """A layer, whatever it takes and gives, between an input and class scores."""

    def __init__(self, layer, before, after, features):
        super().__init__()
        self.layer, self.before, self.after = layer, before, after
        self.out = nn.Linear(features, CLASSES)

    def forward(self, x):
        return self.out(self.after(self.layer(*self.before(x))).flatten(1))


def first(pair):
    return pair[0] if isinstance(pair, tuple) else pair


def last_step(pair):
    return pair[0][:, -1]


def norm(layer):
    for parameter in layer.parameters():
        nn.init.normal_(parameter)  # ones would be encoded exactly
    return Net(layer, lambda x: (x,), torch.tanh, 128)


CASES = {
    "Linear": lambda: (Net(nn.Linear(40, 30), lambda x: (x,), torch.relu, 30), (40,)),
    "Conv1d": lambda: (Net(nn.Conv1d(6, 12, 5, padding=2), lambda x: (x,), torch.relu, 12 * 10), (6, 10)),
    "Conv2d": lambda: (Net(nn.Conv2d(4, 16, 3, groups=2), lambda x: (x,), torch.relu, 16 * 16), (4, 6, 6)),
    "Conv3d": lambda: (
        Net(nn.Conv3d(2, 8, 3, padding_mode="circular", padding=1), lambda x: (x,), torch.relu, 8 * 64),
        (2, 4, 4, 4),
    ),
    "ConvTranspose1d": lambda: (Net(nn.ConvTranspose1d(8, 6, 4, stride=2), lambda x: (x,), torch.relu, 6 * 12), (8, 5)),
    "ConvTranspose2d": lambda: (Net(nn.ConvTranspose2d(8, 6, 3), lambda x: (x,), torch.relu, 6 * 25), (8, 3, 3)),
    "ConvTranspose3d": lambda: (Net(nn.ConvTranspose3d(8, 4, 2), lambda x: (x,), torch.relu, 4 * 27), (8, 2, 2, 2)),
    "Embedding": lambda: (Net(nn.Embedding(60, 20), lambda x: (x,), torch.tanh, 20 * 6), "ids"),
    "EmbeddingBag": lambda: (Net(nn.EmbeddingBag(60, 20), lambda x: (x,), torch.tanh, 20), "ids"),
    "RNN": lambda: (Net(nn.RNN(12, 24, batch_first=True), lambda x: (x,), last_step, 24), (5, 12)),
    "GRU": lambda: (
        Net(nn.GRU(12, 16, 2, batch_first=True, bidirectional=True), lambda x: (x,), last_step, 32),
        (5, 12),
    ),
    "LSTM": lambda: (Net(nn.LSTM(12, 24, batch_first=True, proj_size=16), lambda x: (x,), last_step, 16), (5, 12)),
    "MultiheadAttention": lambda: (
        Net(nn.MultiheadAttention(24, 4, batch_first=True), lambda x: (x, x, x), first, 24 * 4),
        (4, 24),
    ),
    "MultiheadAttention, kdim": lambda: (
        Net(
            nn.MultiheadAttention(24, 4, kdim=20, vdim=20, batch_first=True),
            lambda x: (x, x[..., :20], x[..., :20]),
            first,
            96,
        ),
        (4, 24),
    ),
    "TransformerEncoderLayer": lambda: (
        Net(nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True), lambda x: (x,), first, 96),
        (4, 24),
    ),
    "LayerNorm": lambda: (norm(nn.LayerNorm(128)), (128,)),
    "RMSNorm": lambda: (norm(nn.RMSNorm(128)), (128,)),
    "GroupNorm": lambda: (norm(nn.GroupNorm(4, 128)), (128, 1)),
    "BatchNorm1d": lambda: (norm(nn.BatchNorm1d(128)), (128,)),
    "BatchNorm2d": lambda: (norm(nn.BatchNorm2d(128)), (128, 1, 1)),
    "BatchNorm3d": lambda: (norm(nn.BatchNorm3d(128)), (128, 1, 1, 1)),
}  # fmt: skip

ALL = pytest.mark.parametrize("case", CASES)


def rules(case):
    layer = CASES[case]()[0].layer
    names = [f"layer.{name}" for name, _ in layer.named_parameters()] if "Norm" in case else ["layer"]
    return {"rules": {name: {"ratio": 0.2} for name in names}}


def build(case):
    torch.manual_seed(0)
    network, shape = CASES[case]()
    return network, shape


def thin(case):
    network, shape = build(case)
    dt.compress(network, rules(case), init="scratch")
    generator = torch.Generator().manual_seed(1)
    batch = 8
    x = (
        torch.randint(60, (batch, 6), generator=generator)
        if shape == "ids"
        else torch.randn(batch, *shape, generator=generator)
    )
    return network, x


def test_every_class_in_the_table_is_tried():
    tried = {type(build(case)[0].layer) for case in CASES}
    assert {kind for kind in THIN if kind.__module__.startswith("torch.")} - tried == {
        type(nn.MultiheadAttention(4, 1).out_proj)
    }  # inside nn.MultiheadAttention


@ALL
def test_it_overfits_and_reloads_exactly(case, tmp_path):
    network, x = thin(case)
    assert isinstance(network.layer, ThinLayer) or case == "TransformerEncoderLayer"
    target = torch.arange(len(x)) % CLASSES
    optimizer = torch.optim.Adam(dt.parameter_groups(network, 2e-3))
    for _ in range(300):
        loss = nn.functional.cross_entropy(network(x), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if loss.item() < 0.1:
            break
    assert loss.item() < 0.1
    network.eval()
    y = network(x)
    dt.save(network, tmp_path / "m.thin")
    with torch.device("meta"):
        empty, _ = build(case)
    for fresh in (build(case)[0], empty):
        assert torch.equal(dt.load(fresh, tmp_path / "m.thin").eval()(x), y)
    arrays = deepthin.load(tmp_path / "m.thin")
    plain, _ = build(case)
    assert set(arrays) == set(plain.state_dict())
    plain.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    assert_close(plain.eval()(x), y, terms(plain, x), peak(plain, x))


@ALL
def test_every_matrix_is_within_its_ratio(case):
    network, _ = build(case)
    report = dt.compress(network, rules(case), init="scratch")
    rows = [row for row in report.rows if row.name.startswith("layer")]
    assert rows
    assert all(row.method == "deepthin" and 0 < row.ratio <= 0.2 for row in rows)


@ALL
def test_a_fresh_start_has_the_spread_that_suits_the_layer(case):
    network, _ = thin(case)
    plain, _ = build(case)
    for name, (weight, _) in thin_tensors(network).items():
        ratio = weight().std().item() / plain.get_parameter(name).std().item()
        assert 0.15 < ratio < 2.5, name


@ALL
def test_trained_weights_are_encoded(case):
    network, _ = build(case)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    with pytest.warns(UserWarning, match="Train on before use"):
        report = dt.compress(network, rules(case))
    for row in report.rows:
        if row.method == "deepthin":
            weight, index = thin_tensors(network)[row.name]
            error = ((weight(index) - before[row.name]).norm() / before[row.name].norm()).item()
            assert row.error == pytest.approx(error, rel=bound(before[row.name].numel(), 1.0))  # sums of squares
            assert error < 1


@ALL
def test_it_survives_what_users_do_to_modules(case):
    network, x = thin(case)
    network.eval()
    y = network(x)
    stream = io.BytesIO()
    torch.save(network.layer, stream)
    stream.seek(0)
    for layer in (
        copy.deepcopy(network.layer),
        pickle.loads(pickle.dumps(network.layer)),
        torch.load(stream, weights_only=False),
    ):
        other = copy.copy(network)
        other._modules = {**network._modules, "layer": layer}
        assert torch.equal(other(x), y)
    other, _ = thin(case)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other.eval()(x), y)
    dense = dt.materialize(copy.deepcopy(network))
    assert not [module for module in dense.modules() if isinstance(module, ThinLayer)]
    assert set(dense.state_dict()) == set(build(case)[0].state_dict())
    assert_close(dense(x), y, terms(network, x), peak(network, x))
    double = copy.deepcopy(network).double()
    assert_close(y, double(x if x.dtype == torch.int64 else x.double()), terms(network, x), peak(network, x))


@ALL
def test_autocast_bfloat16(case):
    network, x = thin(case)
    exact = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = network(x)
        y.float().sum().backward()
    # Sums are in float32: what is rounded to bfloat16 is weights, inputs and outputs, of eight products at the most.
    assert (y - exact).abs().max() <= bound(8 * 3, largest(exact), "bfloat16")
    assert all(p.grad is not None for p in network.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        network.eval()(x)
    fresh = copy.deepcopy(network)
    with torch.no_grad():
        assert torch.equal(network(x), fresh(x))  # nothing of lower precision is kept


@ALL
def test_gradient_checkpointing(case):
    network, x = thin(case)
    network(x).sum().backward()
    expected = {name: p.grad.clone() for name, p in network.named_parameters()}
    network.zero_grad()
    checkpoint(network, x, use_reentrant=False).sum().backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in network.named_parameters())


# Layers whose training takes the same way as that of one of the others; GRU and LSTM are compiled by test_recurrent.py.
ALIKE = {
    *("Conv3d", "ConvTranspose2d", "ConvTranspose3d", "GRU", "LSTM", "MultiheadAttention, kdim"),
    *("RMSNorm", "GroupNorm", "BatchNorm2d", "BatchNorm3d"),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in ALIKE else c for c in CASES])
def test_training_compiles_to_one_graph(case, compiling):
    network, x = thin(case)
    if any(isinstance(module, nn.RNNBase) for module in network.modules()) and not products.native_available:
        pytest.skip("Dynamo traces no gradients of torch's own recurrent layers")
    network(x).sum().backward()
    expected = {name: p.grad.clone() for name, p in network.named_parameters()}
    network.zero_grad()
    torch.compile(network, fullgraph=True, backend="aot_eager")(x).sum().backward()
    # There and back; besides, over 8 items of 64 places at the most, and over what one factor serves.
    scale, count = largest(*expected.values()), 2 * terms(network, x) + 8 * 64 + 300
    for name, p in network.named_parameters():
        assert_close(p.grad, expected[name], count, scale)


COMPILED = [case for case in CASES if case not in ALIKE or case == "LSTM"]  # which takes torch's way: it projects


@pytest.mark.parametrize("case", [c if c in COMPILED else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_inference_compiles_to_one_graph(case, compiling):
    network, x = thin(case)
    network.eval()
    with torch.no_grad():
        y = network(x)
        compiled = torch.compile(network, fullgraph=True, backend="eager")  # training is traced by AOTAutograd too
        assert_close(compiled(x), y, terms(network, x), peak(network, x))
        assert_close(compiled(x[:3]), y[:3], terms(network, x), peak(network, x))


@ALL
def test_export_with_a_dynamic_batch(case, compiling):
    network, x = thin(case)
    network.eval()
    with torch.no_grad():
        y = network(x)
        program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
        assert_close(program.module()(x), y, terms(network, x), peak(network, x))
        assert_close(program.module()(x[:3]), y[:3], terms(network, x), peak(network, x))
    names = {name for name in program.state_dict if ".thin." in name}
    assert names  # the factors are exported, not the matrix
    dense = sum(t.numel() for t in build(case)[0].state_dict().values())
    assert sum(t.numel() for t in program.state_dict.values()) < dense


@pytest.mark.parametrize("case", [case for case in CASES if "BatchNorm" in case])
def test_running_statistics_stay_dense(case, tmp_path):
    network, x = thin(case)
    plain, _ = build(case)
    plain.load_state_dict(dt.materialize(copy.deepcopy(network)).state_dict())
    for _ in range(3):
        assert_close(network(x), plain(x), terms(network, x), 8 * peak(network, x))  # normalised: at most sqrt(8)
    assert network.layer.num_batches_tracked == 3
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(network.layer, name), getattr(plain.layer, name))
    dt.save(network, tmp_path / "m.thin")
    loaded = dt.load(build(case)[0], tmp_path / "m.thin")
    assert set(loaded.layer.thin) == {"weight", "bias"}
    for name, value in plain.layer.named_buffers():
        assert torch.equal(loaded.layer.get_buffer(name), value)


def test_packed_sequences():
    torch.manual_seed(0)
    for kind in (nn.RNN, nn.LSTM, nn.GRU):
        layer = kind(6, 20, 2, bidirectional=True)
        net = nn.Sequential(layer)
        dt.compress(net, {"model": {"ratio": 0.3}}, init="scratch")
        plain = kind(6, 20, 2, bidirectional=True)
        plain.load_state_dict({n: w(i).detach() for n, (w, i) in _own(layer).items()} | _biases(layer))
        packed = nn.utils.rnn.pack_sequence([torch.randn(5, 6), torch.randn(3, 6)])
        ours, theirs = layer(packed)[0].data, plain(packed)[0].data
        assert_close(ours, theirs, terms(plain, packed.data), peak(plain, packed.data))
        ours.sum().backward()
        assert all(p.grad is not None for p in layer.parameters())


def _own(layer):
    return thin_tensors(layer)


def _biases(layer):
    return {name: p for name, p in layer.state_dict().items() if ".thin." not in f".{name}"}


def test_the_dense_gates_are_let_go():
    layer = nn.LSTM(8, 16)
    net = nn.Sequential(layer)
    dense = layer.weight_hh_l0
    dt.compress(net, {"model": {"ratio": 0.3}}, init="scratch")
    assert not any(value is dense for value in layer.__dict__.get("_flat_weights", []))
    assert layer.weight_hh_l0.shape == (64, 16)
    assert [w.shape for w in layer._flat_weights] == [(64, 8), (64, 16), (64,), (64,)]
    dt.materialize(net)
    assert type(layer) is nn.LSTM
    assert isinstance(layer.weight_hh_l0, nn.Parameter)
    assert layer(torch.randn(3, 2, 8))[0].shape == (3, 2, 16)


def test_thin_recurrent_biases():
    net = nn.Sequential(nn.GRU(8, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dt.compress(net, {"model": {"ratio": 0.5}, "rules": {"*": {}, "0.bias_ih_l0": {}}})
    assert "bias_ih_l0" in net[0].thin
    assert net[0](torch.randn(3, 2, 8))[0].shape == (3, 2, 64)


def test_an_embedding_tied_to_the_output_layer(tmp_path):
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(2000, 256)
            self.lstm = nn.LSTM(256, 256, 2, batch_first=True)
            self.decoder = nn.Linear(256, 2000)
            self.decoder.weight = self.embed.weight

        def forward(self, ids):
            return self.decoder(self.lstm(self.embed(ids))[0])

    torch.manual_seed(0)
    model = Language()
    dense = sum(p.numel() for p in model.parameters())
    weights = 2000 * 256 + 4 * 1024 * 256
    report = dt.compress(model, {"model": {"ratio": 0.05}}, init="scratch")
    assert sum(row.bytes for row in report.rows) <= 0.05 * 4 * weights
    assert [row.name for row in report.rows] == [
        "decoder.weight", "lstm.weight_hh_l0", "lstm.weight_hh_l1", "lstm.weight_ih_l0", "lstm.weight_ih_l1",
    ]  # fmt: skip
    assert report.dense_bytes == 4 * dense
    assert dt.save(model, tmp_path / "m.thin") == report.total_bytes
    ids = torch.randint(2000, (4, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(dt.parameter_groups(model, 1e-3))
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    dt.save(model, tmp_path / "m.thin")
    loaded = dt.load(Language(), tmp_path / "m.thin").eval()
    assert loaded.embed.thin["weight"] is loaded.decoder.thin["weight"]
    assert torch.equal(loaded(ids), model.eval()(ids))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Embedding(50, 20, max_norm=1.0), "changed in place"),
        (nn.EmbeddingBag(50, 20, sparse=True), "changed in place"),
        (nn.LayerNorm((8, 8)), "drawn anew"),
        (nn.Bilinear(8, 8, 8), "Bilinear has no thin version"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(30, 30)), "weight_norm computes a weight from it"),
    ],
)
def test_what_cannot_be_thin_says_why(layer, reason):
    with pytest.raises(ConfigError, match=reason):
        dt.compress(nn.Sequential(layer), {"model": {"ratio": 0.3}})


def test_a_model_that_is_one_layer():
    layer = nn.LSTM(8, 32)
    dt.compress(layer, {"model": {"ratio": 0.3}}, init="scratch")
    assert list(thin_tensors(layer)) == ["weight_ih_l0", "weight_hh_l0"]
    assert layer(torch.randn(3, 2, 8))[0].shape == (3, 2, 32)


# Groups


def stack(widths=(40, 40, 40, 10)):
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in zip((40, *widths), widths, strict=False)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])


@pytest.mark.parametrize("group", ["flat", "rows"])
@pytest.mark.parametrize("method", ["deepthin", "shuffled", "rank"])
def test_a_group_shares_one_code(group, method, tmp_path):
    model = stack()
    report = dt.compress(model, {"rules": {"*": {"method": method, "ratio": 0.1, "group": group}}}, init="scratch")
    codes = {id(weight) for weight, _ in thin_tensors(model).values()}
    assert len(codes) == 1
    assert len(report.rows) == 4
    assert {row.group for row in report.rows} == {"0.weight"}
    weights = 3 * 1600 + 400
    assert 0.07 * 4 * weights < sum(row.bytes for row in report.rows) <= 0.1 * 4 * weights
    optimizer = torch.optim.Adam(dt.parameter_groups(model, 1e-3))
    x, target = torch.randn(8, 40, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    for _ in range(200):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 or method == "rank"
    y = model.eval()(x)
    assert dt.save(model, tmp_path / "m.thin") == report.total_bytes
    with torch.device("meta"):
        empty = stack()
    for fresh in (stack(), empty):
        loaded = dt.load(fresh, tmp_path / "m.thin").eval()
        assert torch.equal(loaded(x), y)
        assert len({id(weight) for weight, _ in thin_tensors(loaded).values()}) == 1
        dt.save(loaded, tmp_path / "again.thin")
        assert (tmp_path / "again.thin").read_bytes() == (tmp_path / "m.thin").read_bytes()
    dense = stack()
    dense.load_state_dict({name: torch.from_numpy(a) for name, a in deepthin.load(tmp_path / "m.thin").items()})
    sums = absolute(model)(x.abs().double())
    assert_close(dense(x), y, terms(dense, x), sums)
    assert torch.equal(copy.deepcopy(model)(x), y)
    assert_close(dt.materialize(model)(x), y, terms(dense, x), sums)


def test_members_of_a_flat_group_keep_their_own_spread():
    model = nn.Sequential(nn.Linear(400, 100), nn.Linear(100, 25))
    dt.compress(model, {"rules": {"*": {"ratio": 0.2, "group": "flat"}}}, init="scratch")
    assert model[0].weight.std().item() == pytest.approx(math.sqrt(0.2 / 400), rel=0.25)  # a draw of few factors
    assert model[1].weight.std().item() == pytest.approx(math.sqrt(0.2 / 100), rel=0.25)


def test_trained_members_are_encoded_each_at_its_scale():
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    before = [layer.weight.detach().clone() for layer in model]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = dt.compress(model, {"rules": {"*": {"ratio": 0.9, "rank": "max", "group": "flat"}}})
    for row, weight, layer in zip(report.rows, before, model, strict=True):
        assert row.error < 0.6
        error = ((layer.weight - weight).norm() / weight.norm()).item()
        assert row.error == pytest.approx(error, rel=bound(weight.numel(), 1.0))  # sums of squares


def test_the_structured_product_of_a_group_is_the_dense_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 900), nn.Linear(900, 1024))
    dt.compress(model, {"rules": {"*": {"ratio": 0.01, "group": "flat"}}}, init="scratch")
    for layer in model:
        x = torch.randn(128, layer.in_features)
        part = layer.thin["weight"]
        assert part.group.path(x, part.index) != "dense"
        reference = x.double() @ layer.weight.double().T
        sums = x.double().abs() @ layer.weight.double().abs().T
        assert_close(part.product(x), reference, layer.in_features + 8, sums)


def test_groups_that_cannot_be():
    unlike = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 9))
    with pytest.raises(
        ConfigError, match=r"'rows' stacks matrices of as many inputs, but 0.weight has 40 and 1.weight"
    ):
        dt.compress(unlike, {"rules": {"*": {"ratio": 0.2, "group": "rows"}}})
    with pytest.raises(ConfigError, match=r"0.bias has one dimension and cannot join a group"):
        dt.compress(stack(), {"rules": {"*bias": {"ratio": 0.2, "group": "flat"}}})
    with pytest.raises(ConfigError, match=r"group = 'row' is unknown. Did you mean 'rows'"):
        dt.compress(stack(), {"rules": {"*": {"ratio": 0.2, "group": "row"}}})


def recurrent():
    torch.manual_seed(0)
    model = nn.ModuleDict({"lstm": nn.LSTM(24, 24)})
    rule = {"method": "rank", "rank": 5, "group": "rows", "projection": "*weight_hh*"}
    return model, {"rules": {"lstm.weight*": rule}}


def is_projected(inputs, recurrent, before_inputs, before_recurrent):
    """DeepTwist's equation 5, in double precision."""
    u, sigma, vt = torch.linalg.svd(before_recurrent.double(), full_matrices=False)
    v = vt[:5].T
    # A decomposition in float32 of 96 x 24 errs by its terms times the norm, its subspace by that over the gap.
    lost = bound(96 + 24, sigma[0].item())
    assert (recurrent.double() - (u[:, :5] * sigma[:5]) @ v.T).norm() <= lost
    assert (inputs.double() - before_inputs.double() @ v @ v.T).norm() <= lost * inputs.norm() / (sigma[4] - sigma[5])


@pytest.mark.filterwarnings("ignore:The relative error")
def test_the_input_matrix_takes_the_projection_of_the_recurrent_one(tmp_path):
    model, rules = recurrent()
    before = [p.detach().clone() for p in (model.lstm.weight_ih_l0, model.lstm.weight_hh_l0)]
    report = dt.compress(model, rules)
    assert report.total_bytes < 4 * 5 * (2 * 96 + 24) + 2500
    is_projected(model.lstm.weight_ih_l0, model.lstm.weight_hh_l0, *before)
    dt.save(model, tmp_path / "m.thin")
    again = dt.load(recurrent()[0], tmp_path / "m.thin")
    assert torch.equal(again.lstm.weight_ih_l0, model.lstm.weight_ih_l0)


def test_occasional_projection():
    model, rules = recurrent()
    before = [p.detach().clone() for p in (model.lstm.weight_ih_l0, model.lstm.weight_hh_l0)]
    twist = dt.Twist(model, rules, every=1)
    assert twist.step()
    is_projected(model.lstm.weight_ih_l0, model.lstm.weight_hh_l0, *before)


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"projection": "*hh*", "group": "flat", "method": "rank"}, r"projection = '\*hh\*': give a pattern"),
        ({"projection": "*hh*", "group": "rows"}, r"beside method = 'rank' and group = 'rows'"),
        ({"projection": 3, "group": "rows", "method": "rank"}, r"projection = 3: give a pattern"),
        (
            {"projection": "*hh*", "group": "rows", "method": "rank", "then": {"method": "uniform", "bits": 8}},
            r"without then",
        ),
        ({"projection": "*bias*", "group": "rows", "method": "rank"}, r"matches none of lstm.weight_ih_l0, lstm."),
        ({"projection": "*", "group": "rows", "method": "rank"}, r"matches all of lstm.weight_ih_l0, lstm."),
    ],
)
def test_projections_that_cannot_be(rule, says):
    with pytest.raises(ConfigError, match=says):
        dt.compress(recurrent()[0], {"rules": {"lstm.weight*": {"ratio": 0.4, **rule}}})


def test_a_group_that_lost_a_layer_is_not_saved(tmp_path):
    model = stack()
    dt.compress(model, {"rules": {"*": {"ratio": 0.2, "group": "flat"}}}, init="scratch")
    with pytest.raises(ConfigError, match="share one code with layers that are not in this model"):
        dt.save(model[:3], tmp_path / "m.thin")


@pytest.mark.parametrize("group", [None, "flat", "rows"])
@pytest.mark.parametrize("rank", [1, 3])
def test_rows_of_a_table_without_the_table(rank, group):
    """Values, gradients, padding, groups; and nothing of the size of the table is kept."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Embedding(200, 24, padding_idx=pad) for pad in ((3,) if group is None else (None, None)))
    rule = {"method": "deepthin", "rank": rank, **({"group": group} if group else {})}
    dt.compress(model, {"model": {"ratio": 0.1}, "rules": {"*": rule}}, init="scratch")
    places = torch.tensor([[0, 199, 3], [7, 7, 100]])
    for table in model:
        for indices in (places, places.int(), places[:0], places[0, 0]):
            found = []
            for rows in (table(indices), nn.functional.embedding(indices, table.weight, table.padding_idx)):
                grads = torch.autograd.grad(rows.square().sum() + rows.sum(), list(model.parameters()))
                found.append([rows.detach(), *grads])
            for got, want in zip(*found, strict=True):  # sums over 6 rows of 24, of a rank of 4 at the most
                assert_close(got, want, 6 * 24 + 8, max(1.0, largest(*found[1])))
        table.eval()
        with torch.no_grad():
            assert table(places).shape == (2, 3, 24)
        weight = table.thin["weight"]
        held = getattr(weight, "group", weight)._evaluated
        assert held is None or not held.dense
        for wrong in (-1, 200):
            with pytest.raises(IndexError):
                table(torch.tensor([wrong]))


def test_many_rows_of_a_table_are_taken_from_the_whole(monkeypatch):
    model = nn.Embedding(200, 24)
    dt.compress(model, {"model": {"ratio": 0.1}, "rules": {"*": {"method": "deepthin"}}}, init="scratch")
    few, many = torch.arange(50), torch.arange(51)
    weight = model.thin["weight"]
    assert weight.rows_pay(few)
    assert not weight.rows_pay(many)
    assert_close(model(many)[:50], model(few), weight.method.rank + 1, absolute(model)(few))
