"""Beside sentence-transformers: the same losses and gradients, and models that it loads give the same embeddings and scores."""

import json

import numpy as np
import pytest
import torch
import transformers

from ftkit.data.batches import collate
from ftkit.data.features import FeatureSet
from ftkit.data.types import Limits, Row
from ftkit.loop import Trainee
from ftkit.objectives.supervised import Supervised
from ftkit.tasks.sentence_embedding import SentenceEmbedding

theirs = pytest.importorskip("sentence_transformers")
losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

LOSSES = {  # ours, theirs, texts in a row
    "in-batch": (SentenceEmbedding(), lambda model: losses.MultipleNegativesRankingLoss(model), 2),
    "in-batch, negatives": (SentenceEmbedding(negatives=2, scale=10), lambda model: losses.MultipleNegativesRankingLoss(model, scale=10), 4),
    "in-batch, symmetric": (SentenceEmbedding(symmetric=True), lambda model: losses.MultipleNegativesSymmetricRankingLoss(model), 2),
    "in-batch, symmetric, negatives": (SentenceEmbedding(symmetric=True, negatives=1), lambda model: losses.MultipleNegativesSymmetricRankingLoss(model), 3),
    "cosine": (SentenceEmbedding(loss="cosine"), lambda model: losses.CosineSimilarityLoss(model), 2),
    "cosent": (SentenceEmbedding(loss="cosent"), lambda model: losses.CoSENTLoss(model), 2),
}
TEXTS = ["roses and tulips", "old boats", "bread, butter and soup", "two nets near the quiet tide of the harbour", "my kettle", "many worms in the rain"]
SCORES = [0.0, 0.5, 0.5, 1.0, 0.25, 0.0]


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_embeddings_are_the_same(name):
    task, make, texts = LOSSES[name]
    torch.manual_seed(0)
    found = torch.randn(8, texts, 16, requires_grad=True)
    scores = torch.rand(8).round(decimals=1)
    expected = make(None).compute_loss_from_embeddings(list(found.unbind(1)), scores)
    (wanted,) = torch.autograd.grad(expected, found)
    ours = task._contrast.losses(found, scores).mean()
    (gradient,) = torch.autograd.grad(ours, found)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_a_model_are_the_same(name, pooling, checkpoint, tokenizers, tmp_path):
    """Of a batch of rows of several lengths, in eval mode: dropout is drawn in another order."""
    ours, make, texts = LOSSES[name]
    task, tokenizer = ours.model_copy(update={"pooling": pooling}), tokenizers["wordpiece"]
    model = transformers.AutoModel.from_pretrained(checkpoint("bert"), add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    task.lay_out(tmp_path, model.config, 96)
    columns = [TEXTS[i:] + TEXTS[:i] for i in range(texts)]
    rows = [
        {"text": text, "text_pair": other, "negative": negatives, "score": score}
        for (text, other, *negatives), score in zip(zip(*columns, strict=True), SCORES, strict=True)
    ]
    features = FeatureSet.of([task.encode(Row(row, "rows", 1), tokenizer, Limits(96, "error")) for row in rows])
    trainee = Trainee(model, model, task, Supervised()).eval()
    value = trainee(collate(features, np.arange(len(rows)), tokenizer.pad_token_id)) / len(rows)
    value.backward()

    reference = theirs.SentenceTransformer(str(tmp_path), device="cpu").eval()
    expected = make(reference)([reference.preprocess(column) for column in columns], torch.tensor(SCORES))
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    wanted = dict(reference[0].auto_model.named_parameters())
    largest = max(parameter.grad.abs().max() for parameter in wanted.values() if parameter.grad is not None)
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad - wanted[parameter_name].grad).abs().max() <= 1e-5 * largest, parameter_name


def test_the_labels_of_pairs_are_learned_as_there(checkpoint, tokenizers, tmp_path):
    """SBERT's softmax over both embeddings and their difference, with one layer beside either model."""
    task, tokenizer = SentenceEmbedding(loss="softmax", labels=["no", "perhaps", "yes"]), tokenizers["wordpiece"]
    model = transformers.AutoModel.from_pretrained(checkpoint("bert"), add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    task.lay_out(tmp_path, model.config, 96)
    labels = [0, 2, 1, 1, 0, 2]
    others = TEXTS[1:] + TEXTS[:1]
    rows = [{"text": text, "text_pair": other, "label": task.labels[i]} for text, other, i in zip(TEXTS, others, labels, strict=True)]
    features = FeatureSet.of([task.encode(Row(row, "rows", 1), tokenizer, Limits(96, "error")) for row in rows])
    torch.manual_seed(0)
    layer = task.beside(model)
    trainee = Trainee(model, model, task, Supervised(), beside=layer).eval()
    value = trainee(collate(features, np.arange(6), tokenizer.pad_token_id)) / 6
    value.backward()

    reference = theirs.SentenceTransformer(str(tmp_path), device="cpu").eval()
    loss = losses.SoftmaxLoss(reference, sentence_embedding_dimension=32, num_labels=3)
    loss.classifier.load_state_dict(layer.state_dict())
    expected = loss([reference.preprocess(column) for column in (TEXTS, others)], torch.tensor(labels))
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    wanted = dict(reference[0].auto_model.named_parameters())
    largest = max(parameter.grad.abs().max() for parameter in wanted.values() if parameter.grad is not None)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - wanted[name].grad).abs().max() <= 1e-5 * largest, name
    torch.testing.assert_close(layer.weight.grad, loss.classifier.weight.grad, rtol=1e-5, atol=1e-7)


RUNS = {  # model, task, method
    "bert-mean-full": ("bert", {"kind": "sentence-embedding"}, "full"),
    "bert-cls-normalized-lora": ("bert", {"kind": "sentence-embedding", "pooling": "cls", "normalize": True}, "lora"),
    "bert-softmax-lora": ("bert", {"kind": "sentence-embedding", "loss": "softmax"}, "lora"),
    "distilbert-mean-partial": ("distilbert", {"kind": "sentence-embedding", "normalize": True}, {"kind": "partial", "last": 1}),
    "gpt2-last-full": ("gpt2", {"kind": "sentence-embedding", "pooling": "last"}, "full"),
}
SETS = {"softmax": "premises"}


def answers(outcome) -> list[dict]:
    assert outcome.code == 0, outcome.err
    return [json.loads(line) for line in outcome.out.splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_loads_as_a_sentence_transformer(name, ftkit, recipe, tmp_path, verify_here):
    model, task, method = RUNS[name]
    done = ftkit("train", recipe(model, SETS.get(task.get("loss"), "matched"), {"steps": 2}, task=task, method=method))
    assert done.code == 0, done.err
    said = torch.tensor([each["embedding"] for each in answers(ftkit("predict", tmp_path / "run", *TEXTS))])
    places = [tmp_path / "run" / "model"]
    if method == "lora":
        done = ftkit("merge-adapter", tmp_path / "run", "-o", tmp_path / "merged")
        assert done.code == 0, done.err
        places.append(tmp_path / "merged")
    for place in places:
        loaded = theirs.SentenceTransformer(str(place), device="cpu")
        found = torch.from_numpy(loaded.encode(TEXTS))
        assert (found - said).abs().max() <= 1e-5 * said.abs().max(), place
        assert loaded.max_seq_length == json.loads((place / "sentence_bert_config.json").read_text())["max_seq_length"]


def test_a_reranker_loads_as_a_cross_encoder(ftkit, recipe, data, tmp_path, verify_here):
    done = ftkit("train", recipe("bert", "ranked", {"steps": 2}))
    assert done.code == 0, done.err
    path = data.ranked / "test.jsonl"
    said = [each["score"] for each in answers(ftkit("predict", tmp_path / "run", "--file", path))]
    pairs = [(row["query"], row["document"]) for row in map(json.loads, path.read_text().splitlines())]
    found = theirs.CrossEncoder(str(tmp_path / "run" / "model"), device="cpu").predict(pairs)
    assert said == pytest.approx(found.tolist(), abs=1e-6)
