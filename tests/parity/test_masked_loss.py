"""Losses of masked tokens beside those that transformers computes of `labels`, of every encoder of the support matrix, padded and without padding."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from ftkit import architectures, attention, chunks, model
from ftkit.data.batches import collate
from ftkit.data.features import FeatureSet
from ftkit.data.types import Limits, Row
from ftkit.miniature import miniature
from ftkit.objectives.supervised import Supervised
from ftkit.recipe.spec import Model
from ftkit.tasks.masked_lm import MaskedLM

# The own code of Reformer gives no gradients in eval mode, nor of rows like these in training: tests/unit/test_reformer.py
ENCODERS = [name for name, has in architectures.TABLE.items() if architectures.MASKED in has and name != "reformer"]
TEXTS = ["roses and tulips in the old garden", "boats near the quiet tide", "bread, butter and soup", "ropes under the small lamps of the harbour"]
IGNORED = -100


def masked(tokenizer):
    """A batch of rows of different lengths, in which a third of the tokens is hidden."""
    task = MaskedLM(probability=0.3)
    features = FeatureSet.of([task.encode(Row({"text": text}, "rows", 1), tokenizer, Limits(64, "error")) for text in TEXTS])
    features = replace(features, corruption=task.corruption(features, tokenizer, seed=0))
    return task, collate(features, np.arange(len(features)), tokenizer.pad_token_id)


@pytest.mark.parametrize("layout", ["padded", "flat"])
@pytest.mark.parametrize("name", [*ENCODERS, "deberta-v3"])
def test_loss_and_gradients_are_those_of_labels(name, layout, tokenizers):
    tokenizer = tokenizers["wordpiece"]
    settings = {"model_type": "deberta-v2", "legacy": False} if name == "deberta-v3" else {"model_type": name}
    config = miniature(model.load_config(Model(init="random", config=settings), None, tokenizer), 2, tokenizer)
    config.initializer_range = 0.1
    config.pad_token_id = tokenizer.pad_token_id
    if name == "big_bird":
        config.attention_type = "original_full"
    torch.manual_seed(0)
    built = transformers.AutoModelForMaskedLM.from_config(config).eval()
    task, batch = masked(tokenizer)
    ids = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    labels = torch.where(batch.weights > 0, batch.targets, IGNORED)
    expected = built(**ids, labels=labels).loss * batch.weights.sum()
    expected.backward()
    gradients = {key: parameter.grad.clone() for key, parameter in built.named_parameters() if parameter.grad is not None}
    built.zero_grad(set_to_none=True)

    flat = None
    if layout == "flat":
        try:
            flat = attention.Flat(built)
        except attention.Unsupported as reason:
            pytest.skip(str(reason))
    with flat.rows(batch.segments) if flat else torch.enable_grad():
        items = task.items(built, batch)
    ours = chunks.loss(items, Supervised(), list(built.parameters()))
    ours.backward()
    assert len(items) == int(batch.weights.sum()) < batch.attention_mask.sum()
    assert items.head is not None, "the head sees hidden positions only"
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for key, parameter in built.named_parameters():
        if key in gradients:
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=0, atol=float(1e-5 * largest), msg=key)


def test_losses_in_chunks_are_those_of_one(tokenizers, checkpoint, monkeypatch):
    """As with a large vocabulary, whose logits never exist together."""
    built = transformers.AutoModelForMaskedLM.from_pretrained(checkpoint("bert-masked")).eval()
    task, batch = masked(tokenizers["wordpiece"])
    logits = built(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)[batch.supervised]
    expected = F.cross_entropy(logits, batch.targets.flatten()[batch.supervised], reduction="sum")
    monkeypatch.setitem(chunks.LOGITS, "cpu", 2 * len(tokenizers["wordpiece"]))
    monkeypatch.setitem(chunks.MOST, "cpu", 2 * len(tokenizers["wordpiece"]))
    items = task.items(built, batch)
    assert chunks.chunk_size(items) == 2 < len(items)
    assert chunks.loss(items, Supervised(), list(built.parameters())).item() == pytest.approx(expected.item(), rel=1e-6)
