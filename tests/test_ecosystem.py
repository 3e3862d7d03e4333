"""Thin models inside what people train with: DistributedDataParallel, Lightning, Hugging Face, Inductor."""

import copy
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import deepthin.torch as dt
from tolerance import absolute, assert_close, bound, largest, peak

DISTRIBUTED = """
    import sys
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    import deepthin.torch as dt

    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 5))
        rules = {"rules": {"4": {"ratio": 0.3}, "*": {"ratio": 0.2, "group": "flat"}}}
        dt.compress(model, rules, init="scratch")
        return model

    def train(model, groups_of, x, target):
        optimizer = torch.optim.SGD(dt.parameter_groups(groups_of, 0.01))
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()

    torch.set_num_threads(1)
    rank, store = int(sys.argv[1]), sys.argv[2]
    x = torch.randn(16, 40, generator=torch.Generator().manual_seed(1))
    target = torch.arange(16) % 5
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = build()
    train(DistributedDataParallel(model), model, x[rank::2], target[rank::2])
    alone = build()
    train(alone, alone, x, target)
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        # The mean gradient, summed in halves: sums of 16 items, 60 units and some 40 entries a factor, in five steps
        # through three layers, each no larger than the largest parameter.
        lost = 5 * 3 * (16 + 60 + 40) * 2.0**-24 * theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2 * lost)
    dist.destroy_process_group()
    print("same")
"""


@pytest.mark.slow  # test_wrapped.py trains in two processes always
def test_two_processes_train_as_one(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(DISTRIBUTED)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert out == "same\n", err


@pytest.mark.filterwarnings("ignore")  # what these libraries deprecate is theirs
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning", reason="install 'deepthin[ecosystem]' to test with Lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 4))
            dt.compress(self.net, {"model": {"ratio": 0.3}}, init="scratch")

        def training_step(self, batch, _):
            x, y = batch
            return nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return torch.optim.Adam(dt.parameter_groups(self, 2e-3))

    x, y = torch.randn(32, 20), torch.arange(32) % 4
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
    module = Module()
    before = nn.functional.cross_entropy(module.net(x), y).item()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=60, accelerator="cpu", enable_checkpointing=False, **quiet)
    trainer.fit(module, loader)
    assert nn.functional.cross_entropy(module.net(x), y).item() < 0.5 * before
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    again = Module()
    again.load_state_dict(torch.load(tmp_path / "m.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(again.net(x), module.net(x))


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="install 'deepthin[ecosystem]' to test with Hugging Face")


def tiny_gpt2(transformers):
    torch.manual_seed(0)
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 2, "vocab_size": 200, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_conv1d(transformers, tmp_path):
    model = tiny_gpt2(transformers)
    shape = model.transformer.h[0].attn.c_attn.weight.shape
    assert shape == (48, 144)  # (inputs, outputs)
    report = dt.compress(model, {"model": {"ratio": 0.2, "ignore": ["*wpe"]}}, init="scratch")
    assert next(row for row in report.rows if row.name.endswith("0.attn.c_attn.weight")).shape == (48, 144)
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "ThinConv1D"
    assert model.transformer.h[0].attn.c_attn.weight.shape == shape
    assert model.lm_head.thin["weight"] is model.transformer.wte.thin["weight"]
    ids = torch.randint(200, (2, 10), generator=torch.Generator().manual_seed(0))
    logits = model(ids).logits
    dt.save(model, tmp_path / "m.thin")
    loaded = dt.load(tiny_gpt2(transformers), tmp_path / "m.thin").eval()
    assert torch.equal(loaded(ids).logits, logits)
    assert torch.equal(copy.deepcopy(model)(ids).logits, logits)
    dense = dt.materialize(model)
    # Two blocks: norms of 48, 48 + 10 + 48 terms of the attention, 48 + 192 of the layers behind; then the table's.
    assert_close(dense(ids).logits, logits, 2 * (2 * 48 + 4 + 106 + 240) + 48 + 32, peak(dense, ids))


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_conv1d_is_encoded_as_outputs_by_inputs(transformers):
    from transformers.pytorch_utils import Conv1D

    layer = nn.Sequential(Conv1D(30, 20))
    with torch.no_grad():
        layer[0].weight.copy_(torch.randn(20, 3) @ torch.randn(3, 30))
    weight = layer[0].weight.detach().clone()
    report = dt.compress(layer, {"rules": {"*": {"method": "rank", "rank": 3}}})
    assert report.rows[0].error <= bound(30 + 20, 1.0)  # what a decomposition loses
    assert layer[0].thin["weight"].method.shape == (30, 20)
    assert_close(layer[0].weight, weight, 30 + 20, torch.linalg.matrix_norm(weight, 2))
    x = torch.randn(2, 5, 20)
    assert_close(layer(x), x @ layer[0].weight + layer[0].bias, 20 + 4, absolute(layer)(x.abs().double()))


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_trainer_and_from_pretrained(transformers, tmp_path):
    """Thin layers built in ``__init__``: what ``save_pretrained`` writes, ``from_pretrained`` finds."""

    class Thin(transformers.PreTrainedModel):
        config_class = transformers.BertConfig

        def __init__(self, config):
            super().__init__(config)
            self.net = nn.Sequential(nn.Linear(config.hidden_size, 64), nn.ReLU(), nn.Linear(64, 4))
            dt.compress(self.net, {"model": {"ratio": 0.3}}, init="scratch")
            self.post_init()

        def forward(self, x, labels=None):
            logits = self.net(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(0)
    model = Thin(transformers.BertConfig(hidden_size=20))
    x, y = torch.randn(32, 20), torch.arange(32) % 4
    before = model(x, y)["loss"].item()
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), num_train_epochs=60, per_device_train_batch_size=16, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    optimizer = torch.optim.Adam(dt.parameter_groups(model, 2e-3))
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train()
    model.eval()
    assert model(x, y)["loss"].item() < 0.5 * before
    model.save_pretrained(tmp_path / "saved")
    again = Thin.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(again(x, y)["logits"], model(x, y)["logits"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_inductor_trains_the_whole_graph(compiling):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(50, 20), nn.Flatten(), nn.Linear(80, 60), nn.ReLU(), nn.Linear(60, 10))
    dt.compress(network, {"model": {"ratio": 0.3}}, init="scratch")
    ids = torch.randint(50, (8, 4))
    network(ids).sum().backward()
    expected = {name: p.grad.clone() for name, p in network.named_parameters()}
    network.zero_grad()
    torch.compile(network, fullgraph=True)(ids).sum().backward()
    scale, terms = largest(*expected.values()), 8 * 4 + 80 + 60 + 10 + 300  # items, three layers, and uses of a factor
    for name, p in network.named_parameters():
        assert_close(p.grad, expected[name], terms, scale)
