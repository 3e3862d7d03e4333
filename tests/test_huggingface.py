"""Hugging Face as people use it: tied tensors, Trainer, folders, generate, pipeline. All from small configurations."""

import copy
import json
import os
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import deepthin
import deepthin.torch as dt
from deepthin import ConfigError

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

import deepthin.huggingface as dh  # noqa: E402 -- only beside transformers

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=99, max_position_embeddings=40, **SMALL))


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=99, n_embd=32, n_layer=1, n_head=2, n_positions=40, bos_token_id=1, eos_token_id=None
        )
    )


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=99, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    )


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=4, **SMALL))


def wav2vec2():
    return transformers.Wav2Vec2ForCTC(
        transformers.Wav2Vec2Config(
            vocab_size=20,
            conv_dim=(16, 16),
            conv_kernel=(3, 3),
            conv_stride=(2, 2),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            **SMALL,
        )
    )


IDS = torch.arange(24).reshape(2, 12)
MODELS = {
    "bert": (bert, {"input_ids": IDS}, "AutoModelForMaskedLM"),
    "gpt2": (gpt2, {"input_ids": IDS}, "AutoModelForCausalLM"),
    "t5": (t5, {"input_ids": IDS, "decoder_input_ids": IDS}, "AutoModelForSeq2SeqLM"),
    "vit": (vit, {"pixel_values": torch.randn(2, 3, 16, 16)}, "AutoModelForImageClassification"),
    "wav2vec2": (wav2vec2, {"input_values": torch.linspace(-1, 1, 2 * 400).reshape(2, 400)}, "AutoModelForCTC"),
}  # fmt: skip
TIED = ("bert", "gpt2", "t5")
METHODS = {"deepthin": {}, "8bit": {"then": {"method": "uniform", "bits": 8}}}


def thin(kind, method="deepthin"):
    torch.manual_seed(0)
    model, rules = MODELS[kind][0](), {"model": {"ratio": 0.3}, "rules": {"*": METHODS[method]}}
    try:
        dt.compress(model, rules, init="scratch")
    except ConfigError as error:  # what to ignore is in the message
        ignore = re.findall(r"'([^']+)'", str(error).partition(" Add ")[2].partition(" to [model]")[0])
        rules["model"]["ignore"] = ignore
        dt.compress(model, rules, init="scratch")
    return model.eval()


def logits(model, kind):
    with torch.no_grad():
        return model(**MODELS[kind][1]).logits


@pytest.mark.parametrize("kind", TIED)
def test_tied_embeddings_stay_tied_and_thin(kind, tmp_path):
    model = thin(kind)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    before = logits(model, kind)
    for call in (model.tie_weights, model.post_init, model.init_weights):
        call()
        assert table.thin["weight"] is head.thin["weight"]
        assert not {"weight"} & {*table._parameters, *head._parameters}
        torch.testing.assert_close(logits(model, kind), before)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.tie_weights()
        twin.save_pretrained(tmp_path / "twin")
        assert twin.get_input_embeddings().thin["weight"] is twin.get_output_embeddings().thin["weight"]
        assert twin.get_input_embeddings().thin["weight"] is not table.thin["weight"]
    dense = dt.materialize(model)
    dense.tie_weights()
    assert dense.get_input_embeddings().weight is dense.get_output_embeddings().weight
    dense.resize_token_embeddings(105)
    dense.save_pretrained(tmp_path / "dense")
    again = type(dense).from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(logits(again, kind), logits(dense, kind))


@pytest.mark.parametrize("kind", TIED)
def test_resizing_is_refused_before_anything_changes(kind):
    model = thin(kind)
    config, state = model.config.to_dict(), {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ConfigError, match="Resize the dense model before compress"):
        model.resize_token_embeddings(105)
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_dense_table_can_be_resized():
    model = gpt2()
    dt.compress(model, {"model": {"ratio": 0.3, "ignore": ["transformer.wte"]}}, init="scratch")
    model.resize_token_embeddings(105)
    assert model.eval()(IDS).logits.shape == (2, 12, 105)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_goes_and_comes_back(kind, method, tmp_path):
    model = thin(kind, method)
    written = dh.save_pretrained(model, tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir() if p.name != "generation_config.json") == [
        "config.json",
        "model.thin",
    ]
    assert written == (tmp_path / "saved" / "model.thin").stat().st_size
    for auto in (getattr(transformers, MODELS[kind][2]), type(model)):
        again = dh.from_pretrained(auto, tmp_path / "saved")
        assert type(again) is type(model)
        assert not again.training
        assert torch.equal(logits(again, kind), logits(model, kind))
        if kind in TIED:
            assert again.get_input_embeddings().thin["weight"] is again.get_output_embeddings().thin["weight"]
    again.save_pretrained(tmp_path / "stock")  # as Trainer does
    torch.testing.assert_close(logits(dh.from_pretrained(type(model), tmp_path / "stock"), kind), logits(model, kind))
    for folder in ("saved", "stock"):
        with pytest.raises((ValueError, OSError), match=r"deepthin\.huggingface\.from_pretrained"):
            type(model).from_pretrained(tmp_path / folder)
        with pytest.raises((ValueError, OSError), match=r"deepthin\.huggingface\.from_pretrained"):
            getattr(transformers, MODELS[kind][2]).from_pretrained(tmp_path / folder)


def test_weight_norm_is_named_and_ignored_alone():
    with pytest.raises(ConfigError) as raised:
        dt.compress(wav2vec2(), 0.3)
    message = str(raised.value)
    assert "weight_norm computes a weight from it" in message
    assert "Add 'wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight' to [model] ignore" in message
    model = wav2vec2()
    ignore = ["wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight"]
    report = dt.compress(model, {"model": {"ratio": 0.3, "ignore": ignore}}, init="scratch")
    made = {row.name for row in report.rows if row.method != "dense"}
    matrices = {name for name, p in wav2vec2().named_parameters() if p.dim() > 1 and "pos_conv_embed" not in name}
    assert made == matrices


class Own(transformers.GPT2LMHeadModel):
    """Compressed in its own ``__init__``, before the end of which the head is not tied yet."""

    def __init__(self, config):
        transformers.GPT2PreTrainedModel.__init__(self, config)
        self.transformer = transformers.GPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        dt.compress(self, 0.3, init="scratch")
        self.post_init()


def test_a_model_that_compresses_itself(tmp_path):
    torch.manual_seed(0)
    model = Own(gpt2().config).eval()
    assert model.lm_head.thin["weight"] is model.transformer.wte.thin["weight"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    assert "transformers_weights" not in json.loads((tmp_path / "config.json").read_text())
    again = Own.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, "gpt2"), logits(model, "gpt2"))
    assert again.lm_head.thin["weight"] is again.transformer.wte.thin["weight"]


def rows(count=16):
    return [{"input_ids": ids, "labels": ids} for ids in torch.arange(count * 8).reshape(count, 8) % 99]


def arguments(folder, steps, **options):
    return transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no", **options,
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_trainer_saves_and_resumes_to_the_same_weights(method, tmp_path):
    model = thin("gpt2", method)
    dh.save_pretrained(model, tmp_path / "start")

    def train(folder, steps, resume=None):
        started = dh.from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "start")
        callbacks = [dh.rates_callback(started)]
        options = arguments(folder, steps, save_steps=2, lr_scheduler_type="constant")
        trainer = transformers.Trainer(started, options, train_dataset=rows(), callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        return started.eval()

    whole = train(tmp_path / "whole", 4)
    assert not torch.equal(logits(whole, "gpt2"), logits(model, "gpt2"))
    train(tmp_path / "parts", 2)
    resumed = train(tmp_path / "parts", 4, str(tmp_path / "parts" / "checkpoint-2"))
    torch.testing.assert_close(logits(resumed, "gpt2"), logits(whole, "gpt2"), rtol=1e-4, atol=1e-4)
    loaded = dh.from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "parts" / "checkpoint-4")
    torch.testing.assert_close(logits(loaded, "gpt2"), logits(resumed, "gpt2"), rtol=1e-5, atol=1e-5)


def test_the_rates_callback_is_what_groups_are(tmp_path):
    def train(callback):
        model = thin("gpt2").train()
        model.config.resid_pdrop = 0.0
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        groups = None if callback else torch.optim.AdamW(dt.parameter_groups(model, 1e-3), weight_decay=0.0)
        options = arguments(tmp_path, 3, save_strategy="no", lr_scheduler_type="constant", max_grad_norm=0.0)
        trainer = transformers.Trainer(
            model, options, train_dataset=rows(), callbacks=[dh.rates_callback(model)] if callback else None,
            optimizers=(groups, None),
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*codes of thin layers.*")
            trainer.train()
        return logits(model.eval(), "gpt2")

    torch.testing.assert_close(train(True), train(False), rtol=1e-4, atol=1e-4)


def test_a_recipe_in_trainer(tmp_path):
    torch.manual_seed(0)
    model = gpt2()
    rules = {
        "model": {"ratio": 0.3},
        "rules": {"*": {"method": "deepthin", "then": {"method": "uniform", "bits": 8}}},
        "stages": {"thin": [0.2, 0.5], "quantize": 0.8, "every": 1},
    }
    recipe = dt.Recipe(model, rules, steps=10)
    options = arguments(tmp_path, 10, save_strategy="no")
    transformers.Trainer(model, options, train_dataset=rows(), callbacks=[dh.recipe_callback(recipe)]).train()
    assert recipe.done
    assert {module.name for module in model.modules() if isinstance(module, dt.ThinWeight)} == {"deepthin then uniform"}
    assert dh.save_pretrained(model, tmp_path / "saved") < 40_000


def test_generate_and_pipeline(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(99)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0")
    model = thin("gpt2")
    dh.save_pretrained(model, tmp_path)
    again = dh.from_pretrained(transformers.AutoModelForCausalLM, tmp_path)
    given = torch.tensor([[1, 2, 3]])
    expected = model.generate(given, max_new_tokens=5, do_sample=False)
    assert torch.equal(again.generate(given, max_new_tokens=5, do_sample=False), expected)
    pipe = transformers.pipeline("text-generation", model=again, tokenizer=tokenizer, device="cpu")
    assert pipe("w1 w2 w3", max_new_tokens=5, do_sample=False)[0]["generated_text"].startswith("w1 w2 w3")


@pytest.mark.parametrize(("make", "match"), [
    (lambda folder: dh.from_pretrained(transformers.AutoModelForCausalLM, folder), "has no config.json"),
    (lambda folder: dh.save_pretrained(nn.Linear(3, 3), folder), "has no config of Hugging Face"),
])  # fmt: skip
def test_mistakes_are_told(make, match, tmp_path):
    with pytest.raises(ConfigError, match=match):
        make(tmp_path)


def test_a_limit_writes_nothing(tmp_path):
    with pytest.raises(deepthin.BudgetError):
        dh.save_pretrained(thin("gpt2"), tmp_path / "saved", max_bytes=100)
    assert not any((tmp_path / "saved").glob("*"))


def test_the_page_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "huggingface.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "huggingface.md", "exec"), {})
    assert (tmp_path / "small" / "model.thin").stat().st_size < 60_000
    assert (tmp_path / "run" / "checkpoint-20" / "model.thin").exists()
