"""What a generator puts in the places of hidden tokens, and who learns from it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ftkit.data.batches import collate
from ftkit.data.features import FeatureSet
from ftkit.data.types import Items, Limits, Row
from ftkit.errors import RecipeError
from ftkit.tasks import replaced_token_detection
from ftkit.tasks.replaced_token_detection import DRAWS, ReplacedTokenDetection

TEXTS = ["roses and tulips in the old garden", "boats near the quiet tide", "bread, butter and soup", "ropes under the small lamps of the harbour"]


@pytest.fixture
def model(checkpoint):
    torch.manual_seed(0)
    return transformers.AutoModelForPreTraining.from_pretrained(checkpoint("electra-pretrained")).eval()


@pytest.fixture
def features(tokenizers):
    def make(task, seed=0):
        tokenizer = tokenizers["wordpiece"]
        plain = FeatureSet.of([task.encode(Row({"text": text}, "rows", 1), tokenizer, Limits(96, "right")) for text in TEXTS])
        return replace(plain, corruption=task.corruption(plain, tokenizer, seed))

    return make


def test_tokens_are_drawn_from_what_the_generator_says():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]]).log_softmax(-1)
    count = 20_000
    items = Items(logits.expand(count, -1), None, 4, torch.zeros(count), torch.ones(count), torch.zeros(count))
    draws = torch.randint(DRAWS, (count,), generator=torch.Generator().manual_seed(0))
    found = torch.bincount(replaced_token_detection._drawn(items, draws), minlength=4) / count
    expected = logits[0].exp()
    assert (found - expected).abs().max() < 4 * (0.25 / count) ** 0.5
    assert replaced_token_detection._drawn(items, torch.zeros_like(draws)).max() == 0
    assert replaced_token_detection._drawn(items, torch.full_like(draws, DRAWS - 1)).min() == 3


def test_the_model_sees_the_text_but_for_what_was_drawn(model, features, tokenizers):
    task = ReplacedTokenDetection(probability=0.3)
    made = features(task)
    torch.manual_seed(0)
    generator = task.beside(model).eval()
    batch = collate(made, np.arange(4), tokenizers["wordpiece"].pad_token_id, epoch=2)
    found, items = task.prior(generator, batch)
    for row, text in enumerate(TEXTS):
        own = torch.tensor(tokenizers["wordpiece"](text)["input_ids"])
        seen, labels, hidden = found.input_ids[row, : len(own)], found.targets[row, : len(own)], batch.weights[row, : len(own)] > 0
        assert torch.equal(seen != own, labels > 0)
        assert torch.equal(seen[~hidden], own[~hidden])
        assert found.weights[row].tolist() == batch.attention_mask[row].tolist(), "every real token counts, special ones too"
        assert not (batch.input_ids[row, : len(own)][hidden] == own[hidden]).all(), "the generator does not see them"
    assert len(items) == int(batch.weights.sum())
    alone, _ = task.prior(generator, collate(made, np.array([3]), 0, epoch=2))
    assert torch.equal(alone.input_ids[0], found.input_ids[3, : alone.input_ids.shape[1]]), "what is drawn does not depend on the batch"
    assert not torch.equal(task.prior(generator, collate(made, np.arange(4), 0, epoch=3))[0].input_ids, found.input_ids)


def test_the_generator_is_a_small_one_with_the_same_embeddings(model):
    generator = ReplacedTokenDetection().beside(model)
    assert (generator.config.num_attention_heads, generator.config.hidden_size, generator.config.intermediate_size) == (1, 16, 16)
    assert generator.config.num_hidden_layers == model.config.num_hidden_layers
    ours = dict(model.electra.embeddings.named_parameters())
    assert all(parameter is ours[name] for name, parameter in generator.electra.embeddings.named_parameters())
    assert generator.generator_lm_head.weight is ours["word_embeddings.weight"]
    apart = ReplacedTokenDetection(share_embeddings=False).beside(model)
    assert not {id(parameter) for parameter in apart.parameters()} & {id(parameter) for parameter in model.parameters()}


def test_a_generator_that_does_not_fit_is_refused(model, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16, "max_position_embeddings": 96}
    for name, other, told in (
        ("words", {"vocab_size": model.config.vocab_size + 1, "embedding_size": 16}, "has .* tokens and the model .*; what it writes means nothing"),
        ("widths", {"vocab_size": model.config.vocab_size, "embedding_size": 8}, "in the generator and .* in the model; set share_embeddings: false"),
    ):
        transformers.ElectraForMaskedLM(transformers.ElectraConfig(**sizes, **other)).save_pretrained(tmp_path / name)
        with pytest.raises(RecipeError, match=told):
            ReplacedTokenDetection(generator=str(tmp_path / name)).beside(model)


def test_both_learn_and_both_are_saved(ftkit, recipe, verify_here, tmp_path):
    done = ftkit("train", recipe("electra-pretrained", "texts", {"steps": 12}), "--json")
    assert done.code == 0, done.err
    metrics = json.loads(done.out)["metrics"]
    assert metrics["validation"]["loss"] < metrics["base"]["validation"]["loss"]
    run = tmp_path / "run"
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["artifact"]["companion"] == {"directory": "generator", "auto_class": "AutoModelForMaskedLM", "load_kwargs": {"dtype": "float32"}}
    assert manifest["parameters"]["groups"]["generator"]["trainable"] == manifest["parameters"]["groups"]["generator"]["total"] > 0
    model = transformers.AutoModelForPreTraining.from_pretrained(run / "model")
    generator = transformers.AutoModelForMaskedLM.from_pretrained(run / "model" / "generator")
    assert torch.equal(model.electra.embeddings.word_embeddings.weight, generator.electra.embeddings.word_embeddings.weight)
    measured = ftkit("eval", run, "--json")
    assert measured.code == 0, measured.err
    again = json.loads(measured.out)["metrics"]["validation"]
    assert again == {name: pytest.approx(value, rel=1e-5) for name, value in metrics["validation"].items()}
    said = ftkit("predict", run, "roses in the garden")
    assert said.code == 0, said.err
    answer = json.loads(said.out)
    assert len(answer["tokens"]) == len(answer["probabilities"])
    records = [json.loads(line) for line in (run / "predictions" / "validation.jsonl").read_text().splitlines()]
    assert sum(record["replaced"] for record in records) > 0
    assert all(record["found"] <= record["replaced"] <= record["masks"] for record in records)


def test_a_changed_generator_is_noticed(ftkit, recipe, verify_here, tmp_path, monkeypatch):
    from ftkit import verify

    check = verify.check

    def spoilt(directory, artifact, expected):
        path = directory / "generator" / "model.safetensors"
        tensors = load_file(path)
        name = next(iter(tensors))
        tensors[name].view(-1)[0] += 1
        save_file(tensors, path, {"format": "pt"})
        return check(directory, artifact, expected)

    monkeypatch.setattr(verify, "check", spoilt)
    done = ftkit("train", recipe("electra-pretrained", "texts"))
    assert done.code == 9, done.err
    assert "generator/model.safetensors is not as it was written" in done.err


def test_an_architecture_without_the_head_is_refused(ftkit, recipe):
    done = ftkit("train", recipe("bert-pretrained", "texts"))
    assert done.code == 2, done.err
    assert "BertForPreTraining has no head that tells replaced tokens; ELECTRA has one" in done.err
