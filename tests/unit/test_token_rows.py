"""Tokens whose embeddings learn beside LoRA's updates: only their rows, as PEFT computes and stores them."""

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from peft.tuners.trainable_tokens import TrainableTokensLayer

from ftkit import attention, model
from ftkit.data.batches import collate
from ftkit.data.features import FeatureSet
from ftkit.data.types import Limits, Row
from ftkit.errors import RecipeError
from ftkit.few_bits import steady_quantised
from ftkit.loop import Trainee
from ftkit.methods.lora import LoRA
from ftkit.methods.qlora import QLoRA
from ftkit.model import parameters_by_group
from ftkit.objectives.supervised import Supervised
from ftkit.recipe.spec import Model
from ftkit.sources import locate
from ftkit.tasks.causal_lm import CausalLM
from ftkit.tasks.text_classification import TextClassification
from ftkit.testing import check_method

CONTINUE = CausalLM()
CLASSIFY = TextClassification(labels=["garden", "harbour", "kitchen"])
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 96}
CONFIGS = {
    "tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "untied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "scaled": lambda: transformers.Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=16),
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=96, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
}
TOKENS = ["Ġin", "Ġthe", 308]  # of the byte-level tokenizer; 308 is Ġgarden
TEXTS = ["where are roses? in the garden", "boats near the quiet tide in the harbour", "bread"]


@pytest.fixture
def load(tokenizers, tmp_path):
    """load(config, method, task=...): a base from a directory, as a run loads it."""

    def make(config, method, task=CONTINUE, kind="bpe"):
        tokenizer = tokenizers[kind]
        config.vocab_size, config.initializer_range = len(tokenizer), 0.1
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(config, key, getattr(tokenizer, key))
        torch.manual_seed(0)
        auto = transformers.AutoModel if task.new_head else transformers.AutoModelForCausalLM
        auto.from_config(config).save_pretrained(tmp_path / "base")
        spec = Model(name=str(tmp_path / "base"))
        source = locate(spec)
        base = model.load(spec, source, model.load_config(spec, source), tokenizer, task, method, torch.float32, 0, torch.device("cpu"))
        steady_quantised(base.model)
        return base

    return make


def batch_of(base):
    rows = [{"text": text, "label": "garden"} if base.task.new_head else {"text": text} for text in TEXTS]
    encoded = [base.task.encode(Row(row, "rows", number), base.tokenizer, Limits(64, "right")) for number, row in enumerate(rows)]
    return collate(FeatureSet.of(encoded), np.arange(len(rows)), base.tokenizer.pad_token_id)


def gradients(learner, base, batch, flat=False):
    trainee = Trainee(learner, base.inner(), base.task, Supervised(), attention.Flat(base.model) if flat else None).train()
    loss = trainee(batch)
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in learner.named_parameters() if parameter.grad is not None}
    learner.zero_grad()
    if trainee.flat:
        trainee.flat.remove()
    return loss.item(), found


@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_are_computed_apart_as_pefts_own_module_computes_them(kind, load):
    """Reference: PEFT 0.21's forward pass with a copy of the whole matrix, of which the rows are replaced."""
    method = LoRA(r=4, dropout=0.0, trainable_token_indices=TOKENS)
    base = load(CONFIGS[kind](), method)
    learner = method.apply(base)
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    batch = batch_of(base)
    (loss, found), (flat_loss, flat) = gradients(learner, base, batch), gradients(learner, base, batch, flat=True)
    layers = [module for module in learner.modules() if isinstance(module, TrainableTokensLayer)]
    assert len(layers) == 2
    for layer in layers:
        del layer.forward
    expected_loss, expected = gradients(learner, base, batch)
    assert found.keys() == expected.keys() == {name for name, parameter in learner.named_parameters() if parameter.requires_grad}
    largest = max(gradient.abs().max() for gradient in expected.values())
    for other_loss, others in ((loss, found), (flat_loss, flat)):
        assert other_loss == pytest.approx(expected_loss, rel=1e-5)
        assert max((others[name] - gradient).abs().max() for name, gradient in expected.items()) <= 1e-5 * largest
    assert min(expected[name].abs().sum(1).min() for name in expected if "trainable_tokens" in name) > 0


@pytest.mark.parametrize(("kind", "matrices"), [("tied", 1), ("untied", 2), ("gpt2", 1)])
def test_only_these_rows_move_and_a_tied_head_follows(kind, matrices, load, tmp_path):
    method = LoRA(r=4, dropout=0.0, trainable_token_indices=TOKENS)
    base = load(CONFIGS[kind](), method)
    ids = sorted(base.tokenizer.convert_tokens_to_ids(["Ġin", "Ġthe", "Ġgarden"]))
    learner = method.apply(base)
    groups = parameters_by_group(learner, base.head)
    updates = sum(parameter.numel() for name, parameter in learner.named_parameters() if ".lora_" in name)
    assert groups["adapter"] == {"trainable": updates + matrices * 3 * 32, "total": updates + matrices * 3 * 32}
    assert (
        sum(groups[group]["total"] for group in ("embeddings", "layers", "head") if group in groups) == base.model.num_parameters() - groups["adapter"]["total"]
    )
    optimizer = torch.optim.SGD([parameter for parameter in learner.parameters() if parameter.requires_grad], lr=0.5)
    trainee, batch = Trainee(learner, base.inner(), base.task, Supervised()).train(), batch_of(base)
    for _ in range(2):
        trainee(batch).div(batch.weights.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    method.save(learner, base, tmp_path / "adapter")
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    row = torch.tensor(base.tokenizer(TEXTS[0])["input_ids"])[None]
    assert (plain(input_ids=row).logits - learner.eval()(input_ids=row).logits).abs().max() < 1e-5
    merged = plain.merge_and_unload()
    for layer, before in zip(
        (merged.get_input_embeddings(), merged.get_output_embeddings()), (original.get_input_embeddings(), original.get_output_embeddings()), strict=True
    ):
        changed = (layer.weight != before.weight).any(1).nonzero().flatten().tolist()
        assert changed == ids
    tied = torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)
    assert tied == (matrices == 1)
    assert (merged(input_ids=row).logits - learner(input_ids=row).logits).abs().max() < 1e-5


def examples(path: Path, count: int) -> list[Row]:
    return [Row(json.loads(line), str(path), number) for number, line in enumerate(path.read_text().splitlines()[:count], 1)]


@pytest.mark.parametrize(("kind", "method"), [("tied", LoRA), ("untied", LoRA), ("untied", QLoRA), ("tied", lambda **fields: LoRA(init="pissa", **fields))])
def test_they_keep_the_contract_in_language_modelling(kind, method, load, data, tmp_path, verify_here):
    """What learned is saved, loads with plain PEFT, and is merged."""
    chosen = method(r=4, dropout=0.0, trainable_token_indices=TOKENS)
    rows = examples(data.prompts / "train.jsonl", 4)
    (tmp_path / "run").mkdir()
    check_method(
        chosen,
        lambda method: load(CONFIGS[kind](), method),
        rows,
        tmp_path / "run",
        lambda name: "lora_" in name or "trainable_tokens_delta" in name,
    )


def test_they_keep_the_contract_in_classification(load, tmp_path, verify_here):
    config = transformers.BertConfig(**SIZES)
    rows = [Row({"text": text, "label": label}, "rows", number) for number, (text, label) in enumerate(zip(TEXTS * 2, CLASSIFY.labels * 2, strict=True))]
    (tmp_path / "run").mkdir()
    check_method(
        LoRA(r=4, trainable_token_indices=["the", "in", "garden"]),
        lambda method: load(config, method, CLASSIFY, "wordpiece"),
        rows,
        tmp_path / "run",
        lambda name: "lora_" in name or "trainable_tokens_delta" in name or "modules_to_save" in name,
    )


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([320], "320 is not in the vocabulary, whose ids end at 319"),
        (["Ġgardn"], "'Ġgardn' is not in the vocabulary; did you mean 'Ġgarden'?"),
        ([" garden"], "' garden' is not in the vocabulary; the token of this text is 'Ġgarden'"),
        (["Ġgarden", 308], "'Ġgarden' and 308 are the same token; name it once"),
        (["<|pad|>"], "is padding, about which nothing is learned"),
    ],
)
def test_tokens_that_cannot_learn_are_refused(tokens, message, load):
    method = LoRA(trainable_token_indices=tokens)
    with pytest.raises(RecipeError, match=message.replace("?", r"\?").replace("|", r"\|")):
        method.apply(load(CONFIGS["tied"](), method))


def test_a_head_with_a_bias_is_refused(load):
    """Up to 0.21, PEFT leaves it out."""
    method = LoRA(trainable_token_indices=TOKENS)
    base = load(transformers.PhiConfig(**SIZES), method)
    with pytest.raises(RecipeError, match="the head of PhiForCausalLM has a bias, which PEFT leaves out"):
        method.apply(base)
    torch.nn.init.ones_(base.model.lm_head.bias)
    row = torch.arange(5, 9)[None]
    expected = base.model.eval()(input_ids=row).logits
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5], "lm_head": [5]})
    assert (peft.get_peft_model(base.model, config)(input_ids=row).logits - (expected - 1)).abs().max() < 1e-5


def test_peft_leaves_out_the_bias_of_a_head_that_fills_masks():
    """So an adapter with added tokens on such a head would answer otherwise with PEFT alone; once this fails, it can be allowed."""
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, vocab_size=50)).eval()
    torch.nn.init.ones_(model.cls.predictions.decoder.bias)
    row = torch.arange(5, 9)[None]
    expected = model(input_ids=row).logits
    config = peft.LoraConfig(target_modules=["query"], trainable_token_indices=[5])
    assert (peft.get_peft_model(model, config)(input_ids=row).logits - (expected - 1)).abs().max() < 1e-5


def test_an_embedding_with_a_rule_of_its_own_is_refused(load, monkeypatch):
    class Normed(torch.nn.Embedding):
        def forward(self, input):
            return torch.nn.functional.normalize(super().forward(input), dim=-1)

    method = LoRA(trainable_token_indices=TOKENS)
    base = load(CONFIGS["tied"](), method)
    base.model.set_input_embeddings(Normed(320, 32))
    with pytest.raises(RecipeError, match="LlamaForCausalLM does more than look its tokens up"):
        method.apply(base)


def test_no_token_is_what_lora_always_was(load):
    method = LoRA()
    learner = method.apply(load(CONFIGS["tied"](), method))
    assert learner.peft_config["default"].trainable_token_indices is None
    assert not [module for module in learner.modules() if isinstance(module, TrainableTokensLayer)]
