"""Rate-aware training: the file ends within its size, by every training loop, and the penalty is what it says."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import deepthin
import deepthin.torch as dt
from deepthin import METHODS, BudgetError, ConfigError
from deepthin.lab.checkpoint import Checkpoint
from deepthin.lab.tasks.training import Training
from deepthin.plan import steering
from deepthin.plan.file_limit import of_zeros
from deepthin.storage.write import size_of
from deepthin.torch.code_length import code_length, quantized
from deepthin.torch.files import contents
from deepthin.torch.size_target import SizeTarget, coded_weights, fit_to

DEEPTHIN = {"method": "deepthin", "rank": 4, "then": {"method": "coded"}}
RULES = {
    "coded": {"method": "coded"},
    "deepthin": DEEPTHIN,
    "kronecker": {"method": "kronecker", "then": {"method": "coded"}},
    "tensor-train": {"method": "tensor-train", "then": {"method": "coded"}},
    "hashed": {"method": "hashed", "then": {"method": "coded"}},
    "pruned": {"method": "pruned", "then": {"method": "coded"}},
    "rank": {"method": "rank", "then": {"method": "coded"}},
}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def problem(seed=0):
    """Classes by the largest of ten noisy sums."""
    drawn = torch.Generator().manual_seed(seed)
    x = torch.randn(4000, 64, generator=drawn)
    return x, (x @ torch.randn(64, 10, generator=drawn) + torch.randn(4000, 10, generator=drawn)).argmax(1)


def thin(file_bytes, rule="deepthin", seed=0, **model):
    made = network(seed)
    dt.compress(
        made, {"model": {"file_bytes": file_bytes, **model}, "rules": {"*": RULES[rule]}}, init="scratch", seed=seed
    )
    return made


def trained(model, steps, seed=0):
    training = Training(model=model, steps=steps, lr=2e-3, seed=seed)
    x, y = problem()
    for chosen in training.batches(len(x), 64):
        training.minimise(cross_entropy(model(x[chosen]), y[chosen]))
    return training


@pytest.fixture(scope="module")
def after_200():
    """A model at the end of a training of 200 steps to 6,000 bytes: for copies."""
    model = thin(6000)
    trained(model, 200)
    return model


@pytest.mark.parametrize(
    ("file_bytes", "seed", "steps"),
    [
        (3500, 1, 320),
        pytest.param(6000, 0, 500, marks=pytest.mark.slow),
        pytest.param(2000, 2, 500, marks=pytest.mark.slow),
    ],
)
def test_the_file_ends_within_its_size(file_bytes, seed, steps, tmp_path):
    model = thin(file_bytes, seed=seed)
    trained(model, steps, seed)
    size = dt.save(model, tmp_path / "m.thin", max_bytes=file_bytes)
    assert 0.97 * file_bytes <= size <= file_bytes
    loaded = dt.load(network(), tmp_path / "m.thin").eval()
    x, y = problem()
    assert torch.equal(loaded(x[:50]), model.eval()(x[:50]))
    assert cross_entropy(loaded(x), y) < 0.8 * math.log(10)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_ten_sizes_of_every_method(rule, tmp_path):
    for seed, file_bytes in enumerate((12_000, 9000, 7000, 5500, 4500, 3500, 2800, 2200, 1700, 1300)):
        try:
            model = thin(file_bytes, rule, seed)
        except BudgetError as error:  # positions of pruned weights, or the smallest code
            assert error.smallest_bits > 8 * file_bytes
            continue
        trained(model, 600, seed)
        assert 0.97 * file_bytes <= dt.save(model, tmp_path / "m.thin") <= file_bytes, (file_bytes, seed)


@pytest.mark.parametrize("rule", RULES)
def test_every_method_trains_with_the_penalty(rule):
    """A gradient of the penalty reaches every latent with symbols, and every learned step."""
    model = thin(9000, rule)
    target = SizeTarget(model, steps=10)
    penalty = target.penalty()
    penalty.backward()
    assert penalty > 0
    for weight in coded_weights(model):
        for name in weight.unrounded():
            gradient = getattr(weight, name).grad
            assert gradient is not None
            assert getattr(weight, name).abs().max() == 0 or gradient.any()
        assert all(latent.grad is not None for latent in weight.log_steps())


def test_the_code_length_is_that_of_frequencies():
    """Against entropy computed symbol by symbol, and central differences of the interpolation at fixed frequencies."""
    method = METHODS["coded"](shape=(1, 400), width=4)
    log_step = torch.full((1, 1), math.log(0.5), dtype=torch.float64, requires_grad=True)
    latents = (1.5 * torch.randn(400, generator=torch.Generator().manual_seed(0))).double().requires_grad_()
    bits = code_length(latents, log_step, method)
    symbols = latents / 0.5
    rounded = symbols.detach().clamp(-7, 7).round().numpy().astype(int)
    lengths = steering.symbol_lengths(rounded, 7)
    assert bits.item() == pytest.approx(sum(lengths[value + 7] for value in rounded), rel=400 * 2**-52)
    bits.backward()
    of_step = 0.0
    for value, slope in zip(symbols.detach().tolist(), latents.grad.tolist(), strict=True):
        below = min(max(math.floor(value), -7), 6)
        expected = lengths[below + 8] - lengths[below + 7] if abs(value) <= 7 else 0.0
        assert slope == pytest.approx(expected / 0.5, abs=1e-12)
        of_step -= expected * value
    assert log_step.grad.item() == pytest.approx(of_step, rel=1e-12)


@pytest.mark.skipif(not deepthin.native_available, reason="there is no native code")
@pytest.mark.parametrize("width", [2, 4, 8])
def test_native_code_rounds_and_counts_as_torch_does(width, monkeypatch):
    """The multiples bit for bit; gradients up to the roundings of sums of 3,000 terms."""
    method = METHODS["coded"](shape=(1, 3000), width=width)
    top, drawn = method.top(), torch.Generator().manual_seed(width)
    latents = torch.randn(3000, generator=drawn) * top / 3
    latents[:8] = torch.tensor([0.0, -0.0, 0.15, -0.15, 0.45, -0.45, 1e6, -1e6])
    goal, found = torch.randn(3000, generator=drawn), []
    for native in (True, False):
        monkeypatch.setattr("deepthin.kernels.products.native_available", native)
        one, step = latents.clone().requires_grad_(), torch.full((1, 1), math.log(0.3), requires_grad=True)
        values = quantized(one, step, method)
        bits = code_length(one, step, method)
        ((values * goal).sum() + 1e-3 * bits).backward()
        found.append((values.detach(), bits.detach(), one.grad, step.grad))
    (values, bits, gradient, of_step), (values2, bits2, gradient2, of_step2) = found
    assert torch.equal(values, values2)
    assert bits == bits2
    assert torch.allclose(gradient, gradient2, rtol=8 * 2**-24, atol=8 * 2**-24 * float(goal.abs().max()))
    terms = (goal.abs().sum() + 1e-3 * bits).item() * top
    assert abs(of_step - of_step2).item() <= 3000 * 2**-24 * terms


def test_the_step_has_the_gradient_of_lsq():
    """Esser et al., 2020, equation 3: round(s) - s for the step, here times the step, as its logarithm is learned."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(30, 20, bias=False))
    dt.compress(layer, {"rules": {"*": {"method": "coded"}}}, init="scratch")
    weight = coded_weights(layer)[0]
    goal = torch.randn(20, 30)
    (weight() * goal).sum().backward()
    step = weight.method.step(weight.log_step.detach(), torch).item()
    symbols = weight.weight.detach() / step
    expected = (goal * (symbols.round() - symbols)).sum().item() * weight.log_step.detach().exp().item()
    assert weight.log_step.grad.item() == pytest.approx(expected, rel=1e-4)
    assert torch.equal(weight.weight.grad, goal)


def test_too_small_a_size_is_refused_before_training():
    with pytest.raises(BudgetError, match=r"every symbol zero it has (\d+)") as caught:
        thin(60)
    smallest = caught.value.smallest_bits // 8
    assert thin(smallest) is not None
    with pytest.raises(BudgetError):
        thin(smallest - 1)
    model = thin(smallest + 200)
    with pytest.raises(BudgetError, match="every symbol zero"):
        SizeTarget(model, 10, file_bytes=size_of(of_zeros(contents(model))) - 1)


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="no coded weights"):
        SizeTarget(network(), 10)
    model = network()
    dt.compress(model, {"rules": {"*": {"method": "coded"}}}, init="scratch")
    with pytest.raises(ConfigError, match="no target"):
        SizeTarget(model, 10)
    target = SizeTarget(model, 10, file_bytes=9000)
    with pytest.raises(ConfigError, match="penalty"):
        target.step()
    for rules in (
        {"*": {"method": "deepthin", "floats": 0.1}},
        {"*": {"method": "coded", "floats": 0.1}},
        {"*": {**DEEPTHIN, "floats": 0.1, "ratio": 0.1}},
    ):
        with pytest.raises(ConfigError, match="floats"):
            dt.plan(network(), {"model": {"file_bytes": 9000}, "rules": rules})
    with pytest.raises(ConfigError, match="known only after training"):
        dt.plan(network(), {"model": {"file_bytes": 9000}, "rules": {"0": {"method": "deepthin"}, "*": RULES["coded"]}})


def test_floats_say_how_many_numbers():
    report = dt.plan(network(), {"model": {"file_bytes": 9000}, "rules": {"*": {**DEEPTHIN, "floats": 0.3}}})
    row = next(row for row in report.rows if row.name == "2.weight")
    numbers = row.fields["rank"] * (row.fields["m"] + row.fields["n"])
    assert 0.27 * 128 * 128 <= numbers <= 0.3 * 128 * 128


def test_the_last_symbols_are_moved_to_fit(after_200, tmp_path):
    model = copy.deepcopy(after_200)
    x, y = problem()
    before, size = cross_entropy(model.eval()(x), y).item(), size_of(contents(model))
    limit = int(0.95 * size)
    assert limit - 20 <= fit_to(model, limit) <= limit
    assert dt.save(model, tmp_path / "m.thin") <= limit
    assert cross_entropy(model(x), y).item() < before + 0.3


def test_an_interrupted_training_ends_with_the_same_bytes(tmp_path):
    def run(model, checkpoint, until=None):
        training = Training(model=model, steps=60, lr=2e-3, checkpoint=checkpoint)
        x, y = problem()
        for chosen in training.batches(len(x), 64):
            training.minimise(cross_entropy(model(x[chosen]), y[chosen]))
            if training.step == until:
                return None
        dt.save(model, tmp_path / "m.thin")
        return (tmp_path / "m.thin").read_bytes()

    whole = run(thin(4000), None)
    assert run(thin(4000), Checkpoint(tmp_path / "c", 10, "a test"), until=37) is None
    assert run(thin(4000), Checkpoint(tmp_path / "c", 10, "a test")) == whole


def test_the_gradient_can_be_added_instead_of_the_penalty():
    one = thin(4000)
    other = copy.deepcopy(one)
    x, y = problem()
    targets = [SizeTarget(model, 10) for model in (one, other)]
    (cross_entropy(one(x), y) + targets[0].penalty()).backward()
    cross_entropy(other(x), y).backward()
    targets[1].add_gradient()
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6 * float(p.grad.abs().max())), name


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning", reason="install 'deepthin[ecosystem]' to test with Lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = thin(4000)

        def training_step(self, batch, _):
            return cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(dt.parameter_groups(self, 2e-3))
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module = Module()
    target = SizeTarget(module.net, steps=200)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*problem()), batch_size=100)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=5, accelerator="cpu", enable_checkpointing=False, callbacks=[target.lightning_callback()], **quiet
    )
    trainer.fit(module, loader)
    assert target.steps_done == 200
    assert 0.97 * 4000 <= dt.save(module.net, tmp_path / "m.thin") <= 4000
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    again = SizeTarget(Module().net, steps=200)
    states = torch.load(tmp_path / "m.ckpt", weights_only=True)["callbacks"]
    again.load_state_dict(next(iter(states.values())))
    assert again.state_dict() == target.state_dict()


@pytest.mark.filterwarnings("ignore")
def test_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers", reason="install 'deepthin[ecosystem]' to test with Hugging Face")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = thin(4000)

        def forward(self, x, labels):
            scores = self.net(x)
            return {"loss": cross_entropy(scores, labels), "logits": scores}

    items = [{"x": x, "labels": y} for x, y in zip(*problem(), strict=True)]

    def trainer(model, target):
        arguments = transformers.TrainingArguments(
            str(tmp_path / "out"), max_steps=200, per_device_train_batch_size=64, report_to=[], use_cpu=True,
            save_steps=150, disable_tqdm=True, logging_strategy="no", seed=1, max_grad_norm=0.0,
        )  # fmt: skip
        optimizer = torch.optim.Adam(dt.parameter_groups(model, 2e-3))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
        callbacks = [target.trainer_callback()]
        return transformers.Trainer(
            model, arguments, train_dataset=items, optimizers=(optimizer, schedule), callbacks=callbacks
        )

    model = Model()
    target = SizeTarget(model.net, steps=200)
    trainer(model, target).train()
    assert 0.97 * 4000 <= dt.save(model.net, tmp_path / "m.thin") <= 4000
    resumed = Model()
    again = SizeTarget(resumed.net, steps=200)
    trainer(resumed, again).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-150"))
    assert again.state_dict() == target.state_dict()


def test_inspect_shows_the_bits_of_each_tensor(after_200, tmp_path):
    dt.save(after_200, tmp_path / "m.thin")
    row = next(row for row in deepthin.inspect(tmp_path / "m.thin").rows if row.name == "0.weight")
    assert "xf_symbols levels" in row.fields["coding"]
    assert "bits" in row.fields["coding"]
    loaded = deepthin.load(tmp_path / "m.thin")
    assert all(np.isfinite(array).all() for array in loaded.values())


def test_learned_steps_do_not_decay():
    """Weight decay would draw the logarithm of a step to 0, which is a step of 1."""
    model = thin(4000)
    training = Training(model=model, steps=3, lr=2e-3, decay=0.3)
    x, y = problem()
    for chosen in training.batches(len(x), 64):
        training.minimise(cross_entropy(model(x[chosen]), y[chosen]))
    decays = {id(p): group["weight_decay"] for group in training._optimizer.param_groups for p in group["params"]}
    steps = [step for weight in coded_weights(model) for step in weight.log_steps()]
    others = {id(p) for weight in coded_weights(model) for p in weight.parameters()} - {id(step) for step in steps}
    assert {decays[id(step)] for step in steps} == {0.0}
    assert {decays[key] for key in others} == {0.3}
