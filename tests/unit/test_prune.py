"""Pruning: importances against gates, and a cut model against the whole one with the same units at zero."""

import pytest
import torch
import transformers

from ftkit import architectures, model, prune, reload
from ftkit.data.batches import collate
from ftkit.data.features import encode
from ftkit.data.types import Limits, Row
from ftkit.errors import RecipeError
from ftkit.loop import Trainee
from ftkit.miniature import miniature
from ftkit.objectives.supervised import Supervised
from ftkit.recipe.spec import Model
from ftkit.tasks.text_classification import TextClassification

KEPT = {"--heads": 1, "--feed-forward": 40}
# What plain transformers can be told in a config; all others are refused.
FEWER_HEADS = {
    "cohere",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "phi",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "smollm3",
    "starcoder2",
}
FIXED_WIDTH = {"bloom", "falcon", "mixtral", "qwen2_moe", "reformer", "squeezebert"}


def tiny(name, tokenizers):
    """A random model of an architecture with two groups of heads and feed-forward layers of 64."""
    writes = {architectures.CAUSAL, architectures.REWRITER} & architectures.TABLE[name]
    tokenizer = tokenizers["bpe" if writes else "wordpiece"]
    config = miniature(model.load_config(Model(init="random", config={"model_type": name}), None, tokenizer), 2, tokenizer)
    if getattr(config, "num_key_value_heads", None) and name != "falcon":
        config.num_attention_heads, config.num_key_value_heads = 4, 2
    config.initializer_range = 0.1
    torch.manual_seed(0)
    autos = (transformers.AutoModelForSequenceClassification, transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM, transformers.AutoModel)
    auto = next(auto for auto in autos if type(config) in auto._model_mapping)
    return auto.from_config(config).eval(), tokenizer


def cut(whole, option):
    """The parts that the option cuts, the units that stay, and the config; raises RecipeError as the command does."""
    find, smaller = {"--heads": (prune.head_parts, prune.with_fewer_heads), "--feed-forward": (prune.feed_forward_parts, prune.with_narrower_layers)}[option]
    parts, kept = find(whole), KEPT[option]
    config = smaller(whole.config, kept)
    prune.check_config(whole, config, parts, kept, option)
    generator = torch.Generator().manual_seed(0)
    return parts, [prune.most_important(torch.rand(part.units, generator=generator), kept) for part in parts], config


def encoded(tokenizer):
    """Features of four rows of two classes, and their task."""
    task = TextClassification(labels=["a", "b"])
    texts = ["roses near the hedge", "soup", "two old boats of the harbour under fog", "bread and butter"]
    rows = [Row({"text": text, "label": "ab"[i % 2]}, "train", i) for i, text in enumerate(texts)]
    return task, encode(rows, task, tokenizer, Limits(32, "right"), split="train", on_bad_rows="error", note=lambda text: None).features


@pytest.mark.parametrize(("name", "option"), [("bert", "--feed-forward"), ("gpt2", "--feed-forward"), ("llama", "--heads"), ("modernbert", "--feed-forward")])
def test_importances_are_gradients_of_gates(name, option, tokenizers):
    """Against gates that are parameters, one row at a time."""
    whole, tokenizer = tiny(name, tokenizers)
    whole.config.pad_token_id = tokenizer.pad_token_id
    parts, _, _ = cut(whole, option)
    task, features = encoded(tokenizer)
    trainee = Trainee(whole, whole.base_model, task, Supervised())
    found = prune.importance(whole, parts, trainee, features, tokenizer.pad_token_id, lambda rows: None)
    gates = [torch.ones(part.units, requires_grad=True) for part in parts]
    for part, gate in zip(parts, gates, strict=True):
        layer = whole.get_submodule(part.output)
        layer.register_forward_pre_hook(lambda layer, args, gate=gate: (args[0] * gate.repeat_interleave(args[0].shape[-1] // len(gate)),))
    expected = [torch.zeros(part.units) for part in parts]
    for i in range(4):
        loss = trainee(collate(features, torch.tensor([i]).numpy(), tokenizer.pad_token_id))
        for total, gradient in zip(expected, torch.autograd.grad(loss, gates), strict=True):
            total += gradient.abs()
    for one, other in zip(found, expected, strict=True):
        assert one.max() > 0
        torch.testing.assert_close(one.float(), other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", list(architectures.TABLE))
@pytest.mark.parametrize("option", list(KEPT))
def test_a_cut_model_is_the_whole_one_with_units_at_zero_or_is_refused(name, option, tokenizers, tmp_path):
    whole, _ = tiny(name, tokenizers)
    if name not in (FEWER_HEADS if option == "--heads" else architectures.TABLE.keys() - FIXED_WIDTH):
        with pytest.raises(RecipeError, match=f"{option}: .*leave (it|{option}) out"):
            cut(whole, option)
        return
    parts, kept, config = cut(whole, option)
    end = whole.config.eos_token_id or 35  # which classifiers of BART's kind read
    rows = [{"input_ids": torch.tensor([*range(20, 35), end])}]
    before = reload.answers(whole, rows)
    with prune.zeroed(whole, parts, kept):
        expected = reload.answers(whole, rows)
    prune.cut(whole, parts, kept, config)
    whole.save_pretrained(tmp_path)
    found = reload.answers(type(whole).from_pretrained(tmp_path).eval(), rows)
    scale = max(value.abs().max().item() for value in expected.values())
    assert max((expected[answer] - before[answer]).abs().max().item() for answer in expected) > 1e-3 * scale
    for answer, value in expected.items():
        torch.testing.assert_close(found[answer], value, rtol=0, atol=1e-5 * scale)


def test_the_most_important_stay_in_order():
    assert prune.most_important(torch.tensor([1.0, 3.0, 0.0, 3.0, 1.0]), 3).tolist() == [0, 1, 3]


@pytest.mark.parametrize(("share", "kept"), [(0.5, 4), (0.25, 6), (0.9, 1)])
def test_shares(share, kept):
    assert prune.num_kept(8, share, "--heads") == kept


@pytest.mark.parametrize("share", [0.05, 0.95])
def test_shares_that_leave_none_or_all(share):
    with pytest.raises(RecipeError, match=r"--heads: 0\.[09]5 of 8 leaves [08]"):
        prune.num_kept(8, share, "--heads")
