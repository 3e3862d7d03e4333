"""What a hostile tester found once, so that it stays mended: odd files, odd models, odd words."""

import json
import os
import stat
import sys
import time
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import deepthin
import deepthin.torch as dt
from deepthin import METHODS, BudgetError, ConfigError, FormatError
from deepthin.cli import main
from deepthin.coding.huffman import MOST_FREE
from deepthin.method import Integers
from deepthin.methods.factor import Factor
from deepthin.methods.kmeans import KMeans
from deepthin.methods.then import Then
from deepthin.storage.arrays import Raw, unpacked
from deepthin.storage.atomic import write_atomically
from deepthin.storage.contents import Contents, Part, Thin
from deepthin.storage.read import from_bytes
from deepthin.storage.write import to_bytes, write
from test_storage import header_of, resign, small_contents
from tolerance import absolute, assert_close, peak

R = {"model": {"ratio": 0.3}}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 10))


def thin(model=None):
    model = model or net()
    dt.compress(model, R, init="scratch")
    return model


def code(method, kind="f4"):
    return {k: Raw.of(np.ones(s, dtype=kind)) for k, s in method.code_shapes().items()}


# Files


def test_a_group_cannot_hide_a_huge_matrix(tmp_path):
    method = Factor((1, 10**7), 3163, 1)
    data = to_bytes(Contents({"a": Thin("deepthin", method, {"a": Part((1,)), "b": Part((1,))}, code(method))}), 1)
    with pytest.raises(FormatError, match="its plan stores a"):
        from_bytes(data)


def test_the_cap_counts_the_type_of_the_result(tmp_path):
    method = Factor((100, 100), 101, 1)
    write(Contents({"w": Thin("deepthin", method, {"w": Part((100, 100))}, code(method, "f8"))}), tmp_path / "m.thin")
    with pytest.raises(FormatError, match="decodes to 80000 bytes"):
        deepthin.load(tmp_path / "m.thin", max_bytes=50_000)
    assert deepthin.load(tmp_path / "m.thin", max_bytes=81_000)["w"].dtype == np.float64


def test_a_name_stored_twice_is_found_in_linear_time():
    dense = {f"n{i}": Raw.of(np.zeros(1, "f4")) for i in range(30_000)}
    method = Factor((2, 2), 3, 1)
    data = to_bytes(Contents({"w": Thin("deepthin", method, {"w": Part((2, 2))}, code(method))}, dense), 1)
    header = header_of(data)
    header["thin"]["w"]["parts"] = [["w", {"shape": [1, 2]}], ["n7", {"shape": [1, 2]}]]
    start = time.process_time()
    with pytest.raises(FormatError, match="n7 is stored twice"):
        from_bytes(resign(data, header))
    assert time.process_time() - start < 5  # counting each name took a minute


@pytest.mark.parametrize("sums", [None, 3, True, ["a.bias"]])
def test_checksums_of_another_kind_are_damage(sums):
    data = to_bytes(small_contents(), 1)
    header = header_of(data)
    header["crc32"] = sums
    signed = resign(data, header)
    with pytest.raises(FormatError):
        from_bytes(signed)
    with pytest.raises(FormatError, match="is damaged"):
        from_bytes(signed[:-1] + bytes([signed[-1] ^ 1]))


def test_a_code_of_mixed_types_is_refused():
    method = Factor((6, 8), 3, 1)
    mixed = {"xf": code(method, "f2")["xf"], "wf": code(method)["wf"]}
    with pytest.raises(FormatError, match="mixes the types F16, F32"):
        from_bytes(to_bytes(Contents({"w": Thin("deepthin", method, {"w": Part((6, 8))}, mixed)})))


def test_names_that_the_header_needs_are_refused():
    with pytest.raises(ValueError, match="No tensor may be called"):
        to_bytes(Contents({}, {"__metadata__": Raw.of(np.zeros(1, "f4"))}), 1)


def test_saving_follows_links_keeps_the_mode_and_takes_long_names(tmp_path):
    target, link = tmp_path / "real.thin", tmp_path / "link.thin"
    target.write_bytes(b"old")
    target.chmod(0o600)
    link.symlink_to(target)
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    write_atomically(tmp_path / ("n" * 250), b"x")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(tmp_path / "pipe", b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_reports_are_json_and_printable(tmp_path):
    write(Contents({}, {}), tmp_path / "empty.thin")
    assert json.loads(deepthin.inspect(tmp_path / "empty.thin").to_json())["ratio"] is None
    write(Contents({}, {"a\x1b[2J\nb": Raw.of(np.zeros((2, 2), "f4"))}), tmp_path / "odd.thin")
    assert "a\\x1b[2J\\nb" in str(deepthin.inspect(tmp_path / "odd.thin"))


def coded_file():
    """Positions and symbols by Huffman's code, and centres of which the last are repeats."""
    rng = np.random.default_rng(0)
    plan = Then.fit(
        lambda bits: METHODS["pruned"].fit((60, 80), bits), lambda own: KMeans(own, min(64, own[1])), 8 * 900 + 64 * 32
    )
    made = plan.encode(rng.laplace(size=(60, 80)).astype("f4"), np)
    made["values_centres"][20:] = made["values_centres"][20]
    made["values_symbols"] = np.minimum(made["values_symbols"], 20)
    entries = {k: Raw.of(v) for k, v in made.items()}
    return to_bytes(Contents({"w": Thin("pruned then kmeans", plan, {"w": Part((60, 80))}, entries)}), 1)


def test_what_is_coded_comes_back():
    data = coded_file()
    codings = header_of(data)["thin"]["w"]["codings"]
    ways = {entry: way for entry, (way, _) in codings.items()}
    assert ways == {"positions": "huffman", "values_symbols": "huffman", "values_centres": "repeats"}
    assert codings["values_centres"] == ["repeats", 21]
    assert to_bytes(from_bytes(data)) == data


@pytest.mark.parametrize(
    ("entry", "coding"),
    [
        ("positions", ["huffman", 0]),
        ("positions", ["huffman", 13]),
        ("positions", ["huffman", 2]),
        ("positions", ["huffman", 5.0]),
        ("positions", ["huffman", True]),
        ("positions", ["huffman"]),
        ("positions", ["repeats", 5]),
        ("values_symbols", ["huffman", 5]),
        ("values_symbols", ["huffman", 7]),
        ("values_symbols", ["huffman", None]),
        ("values_symbols", ["Huffman", 6]),
        ("values_symbols", [["huffman"], 6]),
        ("values_centres", ["repeats", 20]),
        ("values_centres", ["repeats", 22]),
        ("values_centres", ["repeats", 0]),
        ("values_centres", ["repeats", 64]),
        ("values_centres", ["repeats", -1]),
        ("values_centres", ["repeats", True]),
        ("values_centres", ["packed", 21]),
        ("values_centres", "repeats"),
        ("values_centres", None),
        ("values", ["repeats", 1]),
    ],
)
def test_codings_that_lie(entry, coding):
    data = coded_file()
    header = header_of(data)
    header["thin"]["w"]["codings"][entry] = coding
    with pytest.raises(FormatError):
        from_bytes(resign(data, header))


def test_repeats_must_be_told():
    data = coded_file()
    header = header_of(data)
    header["thin"]["w"]["codings"].pop("values_centres")
    with pytest.raises(FormatError, match="must be floating numbers of shape"):
        from_bytes(resign(data, header))


def test_flipped_bits_of_coded_integers_are_read_as_valid_ones_or_refused():
    data, rng = coded_file(), np.random.default_rng(0)
    header, start = header_of(data), int.from_bytes(data[:8], "little") + 8
    refused = 0
    for _ in range(400):
        changed = bytearray(data)
        for place in rng.integers(start, len(data) - 4, rng.integers(1, 4)):
            changed[place] ^= 1 << rng.integers(8)
        try:
            found = from_bytes(sealed(bytes(changed), header)).thin["w"]
        except FormatError:
            refused += 1
            continue
        for entry, kind in found.method.integers().items():
            values = found.code[entry].numpy()
            assert kind.least <= values.min() <= values.max() < kind.least + kind.count
            assert not kind.rising or (np.diff(values) > 0).all()
    assert 50 < refused < 400


def sealed(data, header):
    """With checksums of every tensor that are right."""
    length = int.from_bytes(data[:8], "little")
    index = json.loads(data[8 : 8 + length])
    for name in header["crc32"]:
        start, stop = index[name]["data_offsets"]
        header["crc32"][name] = f"{zlib.crc32(data[8 + length + start : 8 + length + stop]):08x}"
    return resign(data, header)


@pytest.mark.parametrize("coding", [["packed", 0], ["huffman", 1]])
@pytest.mark.parametrize("side", [1 << 13, 1 << 20, 1 << 40])
def test_numbers_that_take_no_bits_are_not_too_many(side, coding):
    """A few bytes must not become a huge array, whichever way they are said to be stored."""
    levels, shape = 1 << coding[1], (4, 5) if coding[1] else (1, 1)
    small = KMeans(shape, levels)
    entries = {"centres": Raw.of(np.ones(levels, "f4")), "symbols": Raw.of(np.zeros(shape, np.int16))}
    data = to_bytes(Contents({"w": Thin("kmeans", small, {"w": Part(shape)}, entries)}), 1)
    header = header_of(data)
    header["thin"]["w"]["fields"]["shape"] = [side, side]
    header["thin"]["w"]["codings"]["symbols"] = coding
    header["thin"]["w"]["parts"] = [["w", {"shape": [side, side]}]]
    tracemalloc.start()
    with pytest.raises(FormatError, match="cannot have|from no bits at all|above the limit"):
        from_bytes(resign(data, header))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_integers_without_bits_have_a_bound_of_their_own():
    """Where no bound on the whole file comes first."""
    kind = Integers(1)
    data = Raw("U8", (0,), b"")
    assert unpacked("a", data, ["packed", 0], kind, (3,)).numpy().tolist() == [0, 0, 0]
    with pytest.raises(FormatError, match=f"a declares {MOST_FREE + 1} numbers that take no bits; at most {MOST_FREE}"):
        unpacked("a", data, ["packed", 0], kind, (MOST_FREE + 1,))


# Models


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [nn.utils.weight_norm, nn.utils.spectral_norm, "prune", "lora"])
def test_a_layer_that_is_more_than_its_type_is_refused(change):
    model = net()
    if change == "prune":
        prune.l1_unstructured(model[0], "weight", 0.5)
    elif change == "lora":
        model[0].lora_A = nn.Parameter(torch.zeros(4, 40))
    else:
        change(model[0])
    with pytest.raises(
        ConfigError, match=r"the Linear has extra parameters \(|_norm of a Linear computes its weight; first call torch"
    ):
        dt.compress(model, R, init="scratch")
    assert type(model[0]) is type(model[2]) is nn.Linear
    model(torch.randn(2, 40))


def test_what_no_file_can_hold_is_said_before_anything_changes():
    class Extra(nn.Module):
        def get_extra_state(self):
            return torch.zeros(1)

        def set_extra_state(self, state):
            del state

    for odd in (nn.Sequential(net(), Extra()), net()):
        if len(odd) == 3:
            odd.register_buffer("odd", torch.zeros(3, dtype=torch.float8_e4m3fn))
        with pytest.raises(TypeError):
            dt.compress(odd, R, init="scratch")
        assert not [m for m in odd.modules() if isinstance(m, dt.ThinLayer)]


def test_complex_weights_are_refused():
    with pytest.raises(ConfigError, match=r"it holds torch\.complex64, and codes are real numbers"):
        dt.compress(nn.Sequential(nn.Linear(20, 20, dtype=torch.complex64)), R, init="scratch")


def test_loading_the_same_plan_keeps_parameters_and_what_is_frozen(tmp_path):
    model = thin()
    model[0].thin["weight"].wf.requires_grad_(False)
    kept = list(model.parameters())
    dt.save(thin(), tmp_path / "m.thin")
    with torch.no_grad():
        for parameter in kept:
            parameter.add_(1)
    dt.load(model, tmp_path / "m.thin")
    assert all(a is b for a, b in zip(model.parameters(), kept, strict=True))
    assert torch.equal(model[0].thin["weight"].xf, thin()[0].thin["weight"].xf)
    assert not model[0].thin["weight"].wf.requires_grad


class Two(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.a, self.b = nn.Linear(20, 20), nn.Linear(20, 20)
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_untied_file_does_not_fit_a_tied_model(compressed, device, tmp_path):
    model = Two(tied=False)
    if compressed:
        thin(model)
    dt.save(model, tmp_path / "m.thin")
    with torch.device(device):
        tied = Two(tied=True)
    with pytest.raises(
        ConfigError, match=r"shares one tensor as \w\.weight and \w\.weight, but .* stores two different"
    ):
        dt.load(tied, tmp_path / "m.thin")


def test_an_untied_file_does_not_fit_a_tied_thin_model(tmp_path):
    dt.save(thin(Two(tied=False)), tmp_path / "m.thin")
    with pytest.raises(ConfigError, match="shares one tensor as"):
        dt.load(thin(Two(tied=True)), tmp_path / "m.thin")


def test_complex_buffers_come_back(tmp_path):
    def build():
        model = net()
        model.register_buffer("phases", torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64))
        return model

    dt.save(thin(build()), tmp_path / "m.thin")
    empty = build()
    empty.phases.zero_()
    assert dt.load(empty, tmp_path / "m.thin").phases.tolist() == [1 + 2j, 3 - 4j]


def test_a_tied_file_in_an_untied_meta_model_shares_no_memory_by_accident(tmp_path):
    dt.save(Two(tied=True), tmp_path / "m.thin")
    with torch.device("meta"):
        model = Two(tied=False)
    dt.load(model, tmp_path / "m.thin")
    assert torch.equal(model.a.weight, model.b.weight)
    with torch.no_grad():
        model.a.weight.zero_()
    assert model.b.weight.abs().sum() > 0


@pytest.mark.parametrize(("stored", "now"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_file_of_another_type_takes_that_of_the_model(stored, now, tmp_path):
    dt.save(thin(net().to(stored)), tmp_path / "m.thin")
    model = dt.load(net().to(now), tmp_path / "m.thin")
    assert {p.dtype for p in model.parameters()} == {now}
    assert model(torch.randn(2, 40).to(now)).dtype == now


def test_a_whole_number_is_no_weight(tmp_path):
    dense = {"0.bias": Raw.of(np.zeros(40, "i8"))}
    arrays = {k: Raw.of(v.numpy()) for k, v in net().state_dict().items()}
    write(Contents({}, {**arrays, **dense}), tmp_path / "m.thin")
    with pytest.raises(ConfigError, match=r"stores 0\.bias as I64"):
        dt.load(net(), tmp_path / "m.thin")


def test_a_transposed_matrix_does_not_fit_a_linear_layer(tmp_path):
    method = Factor((40, 40), 7, 1)
    arrays = {k: Raw.of(v.numpy()) for k, v in net().state_dict().items() if k != "0.weight"}
    part = {"0.weight": Part((40, 40), transposed=True)}
    write(Contents({"0.weight": Thin("deepthin", method, part, code(method))}, arrays), tmp_path / "m.thin")
    with pytest.raises(ConfigError, match="in another order of inputs and outputs"):
        dt.load(net(), tmp_path / "m.thin")


def test_writing_to_the_kept_weight_is_refused():
    model = thin().eval()
    x = torch.randn(3, 40)
    with torch.no_grad():
        y = model(x)
        with pytest.raises(ConfigError, match="lost"):
            nn.init.zeros_(model[0].weight)
        assert torch.equal(model(x), y)


class Padded(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(60, 32, padding_idx=3)
        self.out = nn.Linear(32, 60, bias=False)
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(torch.tanh(self.embed(ids)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("init", ["scratch", "trained"])
@pytest.mark.parametrize("group", [None, "flat"])
def test_a_padding_row_stays_zero(tied, init, group, tmp_path):
    model = Padded(tied)
    rule = {"ratio": 0.3} | ({"group": group} if group else {})
    dt.compress(model, {"rules": {"*": rule}}, init=init)
    optimizer = torch.optim.Adam(dt.parameter_groups(model, 1e-3))
    for _ in range(3):
        loss = model(torch.arange(10)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    ids = torch.arange(60)
    assert not model.embed(torch.tensor([3])).any()
    assert model.embed.weight[4].all()
    y = model(ids)
    dt.save(model, tmp_path / "m.thin")
    assert torch.equal(dt.load(Padded(tied), tmp_path / "m.thin").eval()(ids), y)
    dense = Padded(tied)
    dense.load_state_dict({k: torch.from_numpy(v) for k, v in deepthin.load(tmp_path / "m.thin").items()})
    terms = 32 + 64  # the sum of a layer, and those of its decoded weights
    assert_close(dense(ids), y, terms, peak(dense, ids))
    assert_close(dt.materialize(model)(ids), y, terms, peak(dense, ids))


def test_padding_that_does_not_fit_is_named(tmp_path):
    model = Padded()
    with torch.no_grad():
        model.embed.weight[3] = 1
    with pytest.raises(ConfigError, match=r"Row 3 of embed\.weight is padding, .* set it to zero, or"):
        dt.compress(model, R)
    dt.save(thin(Padded()), tmp_path / "m.thin")
    other = Padded()
    other.embed.padding_idx = 5
    with pytest.raises(ConfigError, match="with padding row 3, but padding_idx in the model is 5"):
        dt.load(other, tmp_path / "m.thin")


def test_a_group_of_unlike_members_is_refused():
    model = net()
    model[2].weight.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"0\.weight, 2\.weight cannot share a code"):
        dt.compress(model, {"rules": {"*": {"ratio": 0.3, "group": "flat"}}}, init="scratch")


def test_materialize_keeps_the_order_of_parameters():
    for model in (net(), nn.Sequential(nn.LSTM(20, 30), nn.MultiheadAttention(20, 2))):
        before = [name for name, _ in model.named_parameters()]
        assert [name for name, _ in dt.materialize(thin(model)).named_parameters()] == before


def test_inputs_that_do_not_go_with_the_code_fail_as_in_a_linear_layer():
    model = nn.Sequential(nn.Linear(1024, 1024))
    dt.compress(model, {"model": {"ratio": 0.01}}, init="scratch")
    for x in (torch.ones(128, 1024, dtype=torch.int64), torch.ones(128, 1024).half(), torch.ones(128, 1000)):
        with pytest.raises((RuntimeError, TypeError)):  # the latter from the checks of shapes while testing
            model(x)


@pytest.mark.filterwarnings("ignore")
def test_function_transforms_and_tracing():
    model = nn.Sequential(nn.Linear(1024, 1024))
    dt.compress(model, {"model": {"ratio": 0.01}}, init="scratch")
    x = torch.randn(128, 1024)
    with torch.no_grad():
        y = model(x)
        terms, sums = 1024 + 8, absolute(model)(x.abs().double())
        assert_close(torch.func.vmap(model)(x), y, terms, sums)
        assert_close(torch.func.jvp(model, (x,), (x,))[0], y, terms, sums)
        assert_close(torch.jit.trace(model, (x,))(x), y, terms, sums)
        assert model.to("meta")(x.to("meta")).shape == y.shape


def test_sizes_are_those_of_the_models_type(tmp_path):
    for kind, item in ((torch.bfloat16, 2), (torch.float64, 8)):
        model = net().to(kind)
        report = dt.compress(model, R, init="scratch")
        assert report.dense_bytes == item * sum(p.numel() for p in net().parameters())
        assert all(row.ratio <= 0.3 for row in report.rows if row.name == "0.weight")


def test_layers_without_shape_or_entries():
    with pytest.raises(ConfigError, match=r"0\.weight has no shape yet: call the model once"):
        dt.compress(nn.Sequential(nn.LazyLinear(5)), R)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = nn.Sequential(nn.Linear(0, 5), nn.Linear(40, 40))
    report = dt.compress(empty, R, init="scratch")
    assert [row.method for row in report.rows] == ["dense", "deepthin"]


def test_any_integer_is_a_seed():
    for seed in (-1, 2**70):
        dt.compress(net(), R, init="scratch", seed=seed)


def test_importance_may_name_some_matrices_only():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dt.compress(net(), R, importance={"0.weight": torch.ones(40, 40)})


# Rules


def test_rank_max_written_out_keeps_the_budget():
    rules = {"model": {"ratio": 0.1}, "rules": {"*": {"method": "rank", "rank": "max"}}}
    report = dt.compress(net(), rules, init="scratch")
    assert sum(row.bytes for row in report.rows) <= 0.1 * sum(row.dense_bytes for row in report.rows)
    with pytest.raises(ConfigError, match="has no target"):
        dt.compress(net(), {"rules": {"*": {"method": "rank", "rank": "max"}}})


def test_the_models_ratio_binds_own_targets_too():
    with pytest.raises(BudgetError, match="what the rules' own targets fix, need"):
        dt.compress(net(), {"model": {"ratio": 0.01}, "rules": {"*": {"ratio": 0.5}}})
    with pytest.raises(BudgetError):
        dt.compress(nn.Sequential(nn.Linear(2, 2)), {"model": {"ratio": 0.01}})


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"rules": {"*": {"method": "shuffled", "ratio": 0.3, "seed": "x"}}}, "seed = 'x' is not a seed"),
        ({"model": {"ratio": 0.3, "ignore": 5}}, "ignore = 5 must be a list of patterns"),
        ({"rules": {"re:a{99999999999}": {"ratio": 0.1}}}, "is not a regular expression"),
        ({"rules": {"*": {"method": "dense", "ratio": 0.1}}}, "ratio has no meaning there: leave it out"),
    ],
)
def test_more_words_that_are_no_configuration(rules, message):
    with pytest.raises(ConfigError, match=message):
        dt.compress(net(), rules, init="scratch")


@pytest.mark.parametrize("rows", range(1, 40, 3))
def test_the_recommended_ratio_can_be_reached(rows):
    for cols in (2, 7, 30, 100):
        model = nn.Sequential(nn.Linear(cols, rows, bias=False))
        with pytest.raises(BudgetError) as caught:
            dt.compress(model, {"rules": {"*": {"ratio": 1e-9}}}, init="scratch")
        words = str(caught.value).split("Use ratio >= ")
        if len(words) == 1:
            assert "keep it dense" in words[0]
        else:
            dt.compress(model, {"rules": {"*": {"ratio": float(words[1].rstrip("."))}}}, init="scratch")


# The command line


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    (tmp_path / "odd_nets.py").write_text(
        "from torch import nn\ninst = nn.Linear(2, 2)\ntext = 'x'\ndef needs(a): return nn.Linear(a, a)\n"
        "def net(): return nn.Sequential(nn.Linear(40, 40))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["deepthin", *words])
        with pytest.raises(SystemExit) as stopped:
            main.main()
        shown = capsys.readouterr()
        return stopped.value.code, shown.err

    yield call
    sys.modules.pop("odd_nets", None)


def one_line(code, err, message):
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("odd_nets:inst", "is Linear: it must be a function that returns the network"),
        ("odd_nets:text", "is str: it must be a function"),
        (".odd_nets:net", "write package.module:function"),
        ("odd_nets:needs", "the function must be callable without arguments"),
    ],
)
def test_models_that_cannot_be_built(run, spec, message):
    one_line(*run("plan", "--model", spec, "--ratio", "0.3"), message)


@pytest.mark.parametrize("content", [b"hello", b".", b"", b"PK\x03\x04garbage"])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_weights_that_are_none(run, tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    words = ["compress", "--model", "odd_nets:net", "--weights", name, "--ratio", "0.3", "--out", "o"]
    one_line(*run(*words), f"--weights {name} cannot be read")


def test_data_and_results_that_are_damaged(run, tmp_path):
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"{name}-ubyte.gz").write_bytes(b"")
    one_line(*run("compare", "digits", "--data", "."), "is not an IDX file, or is damaged")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{")
    (tmp_path / "out" / "results.json").write_text("[]")
    one_line(*run("compare", "digits", "--steps", "1", "--out", "out"), "run.json is damaged")


@pytest.mark.parametrize("batch", ["1,x,8", "\u00b2", "0"])
def test_batches_that_are_none(run, batch):
    one_line(*run("bench", "linear", "--batch", batch), "must be integers >= 1")


def test_the_checksum_is_what_the_format_says():
    data = to_bytes(small_contents())
    assert int.from_bytes(data[-4:], "little") == zlib.crc32(data[:-4])
