"""Portable copies: the same outputs from plain operations, on constants of about the size of the code."""

import pytest
import torch
from torch import nn

import deepthin.torch as dt
from deepthin.errors import ConfigError
from deepthin.torch.packed import PackedIntegers
from deepthin.torch.portable import PortableWeight, forms, portable

EIGHT = {"method": "uniform", "bits": 8}
CODED = {"method": "coded"}
RULES = {
    "deepthin": {"ratio": 0.2},
    "deepthin of rank 4": {"rank": 4, "ratio": 0.3},
    "deepthin of the largest rank": {"rank": "max", "ratio": 0.3},
    "shuffled": {"ratio": 0.2},
    "rank": {"ratio": 0.2},
    "hashed": {"ratio": 0.1},
    "pruned": {"ratio": 0.2},
    "kronecker": {"ratio": 0.2},
    "tensor-train": {"ratio": 0.2},
    "uniform": {"bits": 4},
    "kmeans": {"bits": 3},
    "ecsq": {"bits": 3},
    "binary": {"bits": 2, "rounds": 0},
    "coded": {},
    "deepthin then uniform": {"ratio": 0.06, "then": EIGHT},
    "deepthin then uniform by rows": {"ratio": 0.06, "then": {**EIGHT, "per": "row"}},
    "deepthin then kmeans": {"ratio": 0.06, "then": {"method": "kmeans", "bits": 5}},
    "deepthin then coded": {"rank": 2, "floats": 0.2, "then": CODED},
    "kronecker then coded": {"floats": 0.2, "then": CODED},
    "rank then binary": {"ratio": 0.04, "then": {"method": "binary", "bits": 3, "rounds": 0, "per": "matrix"}},
    "pruned then ecsq": {"ratio": 0.2, "then": {"method": "ecsq", "bits": 4}},
    "hashed then uniform": {"ratio": 0.1, "then": {**EIGHT, "affine": True}},
}
RULES = {name: {"method": name.split()[0], **options} for name, options in RULES.items()}


class Net(nn.Module):
    """A layer of every kind that has a form of its own."""

    def __init__(self, both=True):
        super().__init__()
        places = 2 if both else 1
        self.table = nn.Embedding(300, 48, padding_idx=2)
        self.front = nn.Conv1d(48, 64, 3, padding=1)
        self.sequence = nn.LSTM(64, 40, batch_first=True, bidirectional=both)
        self.one = nn.Linear(40 * places, 257)
        self.two = nn.Linear(257, 33)

    def forward(self, ids):
        y = torch.relu(self.front(self.table(ids).transpose(1, 2)).transpose(1, 2))
        return self.two(torch.relu(self.one(self.sequence(y)[0])))


def thin(rule, net=Net):
    torch.manual_seed(0)
    model = net()
    dt.compress(model, {"rules": {"*": RULES[rule]}}, init="scratch", seed=0)
    return model.eval()


def ids(batch, steps):
    return torch.randint(300, (batch, steps), generator=torch.Generator().manual_seed(batch))


def assert_same(here, there):
    assert here.shape == there.shape
    assert (here - there).abs().max() <= 1e-5 * here.abs().max()


@pytest.mark.parametrize(
    ("rule", "stage"),
    [
        pytest.param(rule, stage, marks=pytest.mark.slow if "ecsq" in rule and stage == "band" else ())  # as kmeans
        for rule in RULES
        for stage in ("convolution", "band")
    ],
)
def test_outputs_are_those_of_the_thin_model(rule, stage):
    model = thin(rule)
    copied = portable(model, stage, compact=stage == "band")
    with torch.no_grad():
        for shape in ((1, 1), (3, 11)):
            assert_same(model(ids(*shape)), copied(ids(*shape)))


FORMS = {
    "deepthin": {"table": "single rows", "one": "structured", "front": "decoded in the graph"},
    "deepthin then coded": {"table": "single rows", "one": "structured", "front": "decoded in the graph"},
    "kronecker": {"table": "decoded in the graph", "one": "factors in turn"},
    "pruned": {"table": "decoded in the graph", "one": "decoded in the graph"},
    "shuffled": {"table": "decoded at export", "one": "decoded at export"},
}


@pytest.mark.parametrize("rule", FORMS)
def test_forms(rule):
    found = forms(portable(thin(rule)))
    assert {name.removesuffix(".weight"): found[name] for name in found if name.split(".")[0] in FORMS[rule]} == FORMS[
        rule
    ]


@pytest.mark.parametrize("rule", ["deepthin", "kronecker", "deepthin then uniform", "deepthin then coded", "uniform"])
def test_constants_take_about_the_bytes_of_the_file(rule, tmp_path):
    model = thin(rule)
    size = dt.save(model, tmp_path / "m.thin")
    kept = sum(tensor.nbytes for tensor in portable(model, "band").state_dict().values())
    assert kept <= 1.25 * size + 8192 * 5


def test_the_model_stays_as_it_is():
    model = thin("deepthin")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    portable(model)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(part, PortableWeight) for part in model.modules())


def test_a_group_shares_its_constants():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 90), nn.ReLU(), nn.Linear(90, 70))
    rule = {"method": "deepthin", "ratio": 0.2, "group": "flat", "then": {**EIGHT, "per": "row"}}
    dt.compress(model, {"rules": {"*": rule}}, init="scratch")
    copied, x = portable(model), torch.randn(5, 80)
    assert copied[0].thin["weight"].code is copied[2].thin["weight"].code
    with torch.no_grad():
        assert_same(model.eval()(x), copied(x))


class Attending(nn.Module):
    """Attention to itself or to others, with masks."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, **options)

    def forward(self, q, k, **masks):
        return self.attention(q, k, k, **masks)


CAUSAL = torch.triu(torch.ones(7, 7, dtype=torch.bool), 1)
PADDED = torch.arange(7) >= torch.tensor([7, 5, 3])[:, None]
ATTENTION = {
    "itself": ({}, {"need_weights": False}),
    "weights": ({}, {}),
    "each head": ({}, {"average_attn_weights": False}),
    "steps first": ({"batch_first": False}, {}),
    "no bias": ({"bias": False}, {}),
    "other widths": ({"kdim": 64, "vdim": 64}, {}),
    "causal": ({}, {"attn_mask": CAUSAL}),
    "padded": ({}, {"key_padding_mask": PADDED}),
    "both": ({}, {"key_padding_mask": PADDED, "attn_mask": CAUSAL}),
    "a mask a head": ({}, {"attn_mask": CAUSAL.expand(12, 7, 7)}),
    "numbers added": ({}, {"attn_mask": CAUSAL.float() * -3}),
}


@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case):
    options, masks = ATTENTION[case]
    torch.manual_seed(0)
    model = Attending(**{"batch_first": True, **options})
    dt.compress(model, {"rules": {"*": {"method": "deepthin", "ratio": 0.2}}}, init="scratch")
    model.eval()
    copied = portable(model)
    shape = (3, 7, 64) if options.get("batch_first", True) else (7, 3, 64)
    q, k = torch.randn(shape), torch.randn(shape)
    with torch.no_grad():
        for key in (q, k):
            here, there = model(q, key, **masks), copied(q, key, **masks)
            assert_same(here[0], there[0])
            assert (here[1] is None) == (there[1] is None)
            if here[1] is not None:
                assert_same(here[1], there[1])


def test_attention_with_rows_added_to_the_keys_is_refused():
    model = Attending(batch_first=True, add_zero_attn=True)
    dt.compress(model, {"rules": {"*": {"method": "deepthin", "ratio": 0.2}}}, init="scratch")
    with pytest.raises(ConfigError, match="add_zero_attn"):
        portable(model)(torch.randn(1, 7, 64), torch.randn(1, 7, 64))


def test_a_layer_of_an_encoder_takes_the_products():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(64, 4, 200, dropout=0.0, batch_first=True)
    dt.compress(model, {"rules": {"*": {"method": "deepthin", "ratio": 0.2}}}, init="scratch")
    model.eval()
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        assert_same(model(x), portable(model)(x))


MANY = torch.randint(-1, 3, (1000,), generator=torch.Generator().manual_seed(0))
PACKED = {
    "four levels": (torch.tensor([0, 3, 1, 2, 2]), 4, 2),
    "three levels": (torch.tensor([-1, 1, 0, 0, 1, -1, 1]), 3, 2),
    "six levels": (torch.tensor([-2, 3, 0, 1, 2, -1, 1]), 6, 3),
    "sixteen levels": (torch.tensor([-7, 8, 0, 1, 2, 5]), 16, 3),
    "nine levels": (torch.tensor([-4, 4, 0, 3, -3] * 3), 9, 6),
    "forty levels": (torch.tensor([-20, 19, 0, 3, -3, 7] * 2), 40, 8),
    "8 bits": (torch.tensor([-127, 127, 5, 60, -60]), 256, 5),
    "16 bits": (torch.tensor([-300, 300, 5] * 9), 256, 2 * 27),
    "few": (torch.tensor([0] * 400 + [-3] + [0] * 700 + [200]), 0, 5 * 3),
    "zeros": (torch.zeros(1000, dtype=torch.long), 0, 0),
    "outliers": (torch.cat([MANY, torch.tensor([90, -90])]), 4, 251 + 5 * 2),
    "two dimensions": (torch.tensor([[1, 2], [3, 0]]), 4, 1),
    "none": (torch.zeros(0, dtype=torch.long), 0, 0),
    "every byte": (torch.arange(3**5)[:, None] // 3 ** torch.arange(5) % 3, 3, 3**5),
    "every word": (torch.arange(9**5)[:, None] // 9 ** torch.arange(5) % 9, 9, 2 * 9**5),
    "every word of forty": (torch.arange(40**3)[:, None] // 40 ** torch.arange(3) % 40, 40, 2 * 40**3),
}


@pytest.mark.parametrize("case", PACKED)
def test_integers_come_back(case):
    values, base, nbytes = PACKED[case]
    packed = PackedIntegers(values)
    assert torch.equal(packed().long(), values)
    assert packed.base == base
    assert sum(buffer.nbytes for buffer in packed.buffers()) == nbytes


def test_positions_come_back():
    positions = torch.tensor([0, 4, 5, 300, 70_000, 2**33])
    assert torch.equal(PackedIntegers(positions, rising=True)(), positions)


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = nn.Linear(80, 90)
    dt.compress(model, {"rules": {"*": {"method": "deepthin", "ratio": 0.2}}}, init="scratch")
    with pytest.raises(ConfigError, match="no values"):
        portable(model)
