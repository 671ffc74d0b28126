"""Texts of a row are read apart, losses are those of the papers, and metrics are of the whole set."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError
from torch.nn import functional as F

from ftkit.data.batches import collate
from ftkit.data.features import FeatureSet, _Builder
from ftkit.data.types import Limits, Row, RowError, Scores
from ftkit.errors import DataError
from ftkit.objectives.supervised import Supervised
from ftkit.recipe.spec import Generation
from ftkit.tasks import contrast, streaming
from ftkit.tasks.pooling import pool
from ftkit.tasks.sentence_embedding import SentenceEmbedding

WIDE = Limits(96, "right")
IN_BATCH = SentenceEmbedding()


def row(number=1, **values):
    return Row(values, "rows.jsonl", number)


def pair(text, other, **more):
    return row(text=text, text_pair=other, **more)


PAIRS = [
    pair("roses and tulips", "tulips"),
    pair("boats near the quiet tide of the old harbour", "two boats"),
    pair("bread", "butter and soup, many onions"),
]
SCORED = [pair(each.values["text"], each.values["text_pair"], score=score) for each, score in zip(PAIRS, (0, 2.5, "5"), strict=True)]


def features_of(task, rows, tokenizer):
    return FeatureSet.of([task.encode(each, tokenizer, WIDE) for each in rows])


# --- rows -----------------------------------------------------------------------------------------------------


def test_texts_of_a_row_are_tokenised_apart(tokenizers):
    tokenizer = tokenizers["wordpiece"]
    task = IN_BATCH.resolve([pair("roses", "tulips", negative=["soup", "old boats"])])
    assert task.negatives == 2
    (features,) = task.encode(pair("roses", "two tulips", negative=["soup", "old boats"]), tokenizer, WIDE)
    alone = [tokenizer(text)["input_ids"] for text in ("roses", "two tulips", "soup", "old boats")]
    assert features.texts == [len(each) for each in alone]
    assert features.input_ids == [token for each in alone for token in each]
    assert (features.targets, features.weights) == ([0], [1.0])


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_batch_has_the_texts_of_each_row_side_by_side(on_disk, tokenizers, tmp_path):
    tokenizer, builder = tokenizers["wordpiece"], _Builder(on_disk)
    for place, each in enumerate(PAIRS):
        builder.add(place, IN_BATCH.encode(each, tokenizer, WIDE))
    builder.build().save(tmp_path / "features.safetensors", {})
    features, _ = FeatureSet.load(tmp_path / "features.safetensors", on_disk)
    batch = collate(features, np.array([2, 0]), tokenizer.pad_token_id)
    texts = ["bread", "butter and soup, many onions", "roses and tulips", "tulips"]
    padded = tokenizer(texts, padding=True, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(getattr(batch, name), padded[name])
    assert batch.row_ids.tolist() == [2, 0]
    assert batch.weights.tolist() == [1, 1]
    assert batch.segments.lengths == padded["attention_mask"].sum(1).tolist()
    assert features.lengths.tolist() == [sum(features.get(i)["texts"]) for i in range(3)]


def test_a_text_is_cut_by_itself(tokenizers):
    tokenizer = tokenizers["wordpiece"]
    long = pair("boats " * 30, "soup")
    (cut,) = IN_BATCH.encode(long, tokenizer, Limits(16, "left"))
    whole = tokenizer(["boats " * 30, "soup"])["input_ids"]
    assert cut.texts == [16, len(whole[1])]
    assert cut.truncated == len(whole[0]) - 16
    assert IN_BATCH.encode(long, tokenizer, Limits(16, "drop")) == []
    with pytest.raises(RowError, match=r"more than data\.max_length: 16"):
        IN_BATCH.encode(long, tokenizer, Limits(16, "error"))


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        (SentenceEmbedding(loss="cosine"), {"score": 1.5}, r"score 1\.5 is outside of task\.score_range: 0 to 1"),
        (SentenceEmbedding(loss="cosine", score_range=[1, 5]), {"score": 0}, r"score 0 is outside of task\.score_range: 1 to 5"),
        (SentenceEmbedding(loss="cosine"), {"score": "high"}, "score 'high' is not a number"),
        (SentenceEmbedding(loss="cosent"), {"score": "nan"}, "score 'nan' is not a finite number"),
        (SentenceEmbedding(negatives=2), {"negative": ["soup"]}, "1 texts in negative, but 2 in the first training row"),
    ],
)
def test_rows_that_cannot_be_used_are_told(task, values, message, tokenizers):
    with pytest.raises(RowError, match=message):
        task.encode(pair("a", "b", **values), tokenizers["wordpiece"], WIDE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "cosine", "scale": 10}, "scale has no effect with loss: cosine"),
        ({"loss": "cosent", "symmetric": True}, "symmetric has no effect with loss: cosent"),
        ({"loss": "cosent", "score_range": [0, 5]}, "score_range has no effect with loss: cosent"),
        ({"loss": "cosent", "negatives": 1}, "negatives has no effect with loss: cosent"),
        ({"loss": "cosine", "score_range": [5, 0]}, "give the lowest score, then the highest"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        SentenceEmbedding(**settings)


def test_scores_are_shares_of_their_range(tokenizers):
    task = SentenceEmbedding(loss="cosine", score_range=[0, 5])
    targets = [task.encode(each, tokenizers["wordpiece"], WIDE)[0].targets for each in SCORED]
    assert targets == [[0.0], [0.5], [1.0]]
    assert SentenceEmbedding(loss="cosent").encode(SCORED[1], tokenizers["wordpiece"], WIDE)[0].targets == [2.5]


def test_one_score_only_is_nothing_to_put_in_order():
    with pytest.raises(DataError, match=r"one score only \(2\.5\)"):
        SentenceEmbedding(loss="cosent").resolve([SCORED[1], pair("a", "b", score="2.50")])
    assert SentenceEmbedding(loss="cosent").resolve(SCORED).loss == "cosent"


# --- pooling --------------------------------------------------------------------------------------------------


def test_pooling_sees_real_tokens_only():
    torch.manual_seed(0)
    states, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    torch.testing.assert_close(pool(states, mask, "mean"), torch.stack((states[0].mean(0), states[1, :2].mean(0))))
    assert torch.equal(pool(states, mask, "cls"), states[:, 0])
    assert torch.equal(pool(states, mask, "last"), torch.stack((states[0, 3], states[1, 1])))
    assert pool(states.bfloat16(), mask, "mean").dtype == torch.float32


# --- losses: by their definitions, in double precision ------------------------------------------------------------


def embeddings(rows=6, texts=2, width=5):
    torch.manual_seed(3)
    return torch.randn(rows, texts, width, dtype=torch.float64)


def mean(task, found, targets=None):
    """As the objective has it, over the rows."""
    targets = torch.zeros(len(found)) if targets is None else targets
    scores = Scores(found, targets, torch.ones(len(found)), torch.arange(len(found)), kind=task.targets, losses=task._contrast.losses)
    return Supervised().loss(scores).item() / len(found)


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


@pytest.mark.parametrize("texts", [2, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_in_batch_is_the_cross_entropy_of_the_own_text(texts, symmetric):
    found, scale = embeddings(texts=texts), 7.0
    forward, backward = [], []
    for i, own in enumerate(found):
        candidates = [other[k] for k in range(1, texts) for other in found]
        logits = [scale * cosine(own[0], each) for each in candidates]
        forward.append(math.log(sum(map(math.exp, logits))) - logits[i])
        logits = [scale * cosine(own[1], other[0]) for other in found]
        backward.append(math.log(sum(map(math.exp, logits))) - logits[i])
    expected = (sum(forward) + sum(backward)) / 2 / len(found) if symmetric else sum(forward) / len(found)
    assert mean(SentenceEmbedding(scale=scale, symmetric=symmetric), found) == pytest.approx(expected, rel=1e-6)


def test_cosine_is_the_squared_error_of_the_cosine():
    found, targets = embeddings(), torch.rand(6)
    expected = np.mean([(cosine(*own) - target.item()) ** 2 for own, target in zip(found, targets, strict=True)])
    assert mean(SentenceEmbedding(loss="cosine"), found, targets) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scores", [[0, 1, 2, 3, 4, 5], [2, 2, 0, 5, 0, 2], [1, 1, 1, 1, 1, 1]], ids=["all", "ties", "same"])
def test_cosent_is_of_all_pairs_in_the_wrong_order(scores):
    found, scale = embeddings(), 20.0
    said = [cosine(*own) for own in found]
    terms = [math.exp(scale * (said[low] - said[high])) for low in range(6) for high in range(6) if scores[low] < scores[high]]
    expected = math.log(1 + sum(terms))
    assert mean(SentenceEmbedding(loss="cosent"), found, torch.tensor(scores, dtype=torch.float32)) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("task", [SentenceEmbedding(), SentenceEmbedding(symmetric=True), SentenceEmbedding(loss="cosine"), SentenceEmbedding(loss="cosent")])
def test_gradients_are_finite_where_there_is_nothing_to_learn(task):
    """One row alone, and equal texts."""
    found = torch.ones(1, 2, 5, requires_grad=True)
    task._contrast.losses(found, torch.ones(1)).sum().backward()
    assert found.grad.isfinite().all()


# --- metrics --------------------------------------------------------------------------------------------------


def measured(task, found, targets, parts):
    metrics = task.metrics([], None)
    for part in torch.arange(len(found)).tensor_split(parts):
        metrics.update(Scores(found[part], targets[part], torch.ones(len(part)), part, kind=task.targets, losses=task._contrast.losses))
    return metrics.compute()


@pytest.mark.parametrize("loss", ["cosine", "cosent"])
def test_correlations_are_those_of_scipy(loss):
    stats = pytest.importorskip("scipy.stats")
    task, found, targets = SentenceEmbedding(loss=loss), embeddings(40).float(), torch.rand(40).round(decimals=1)
    said = [cosine(*own) for own in found]
    values = measured(task, found, targets, 3)
    assert values["spearman"] == pytest.approx(stats.spearmanr(said, targets).statistic, abs=1e-6)
    assert values["pearson"] == pytest.approx(stats.pearsonr(said, targets).statistic, abs=1e-6)
    assert values["loss"] == pytest.approx(mean(task, found, targets), rel=1e-5)
    assert values["loss_count"] == 40
    assert task.main_metric == "spearman"


@pytest.mark.parametrize("in_memory", [0, 200, 1 << 20])
@pytest.mark.parametrize("task", [SentenceEmbedding(), SentenceEmbedding(symmetric=True)])
def test_retrieval_is_among_the_texts_of_the_whole_set(task, in_memory, monkeypatch):
    monkeypatch.setattr(contrast, "BLOCK", 7)
    monkeypatch.setattr(streaming, "IN_MEMORY", in_memory)
    torch.manual_seed(1)
    found = torch.randn(40, 3, 6)
    found[:, 1] += 0.6 * found[:, 0]
    found[5, 2] = found[5, 1]  # a copy of the right text is no nearer than it
    values = measured(task, found, torch.zeros(40), 4)
    unit = F.normalize(found, dim=-1).double()
    candidates = torch.cat((unit[:, 1], unit[:, 2]))
    places = [1 + sum((unit[i, 0] @ each > unit[i, 0] @ unit[i, 1] + 1e-6).item() for each in candidates) for i in range(40)]
    assert max(places) > 10 > 1 == min(places)
    assert values["recall_1"] == pytest.approx(np.mean([place == 1 for place in places]))
    assert values["recall_10"] == pytest.approx(np.mean([place <= 10 for place in places]))
    assert values["mrr_10"] == pytest.approx(np.mean([1 / place if place <= 10 else 0 for place in places]))
    assert values["ndcg_10"] == pytest.approx(np.mean([1 / math.log2(place + 1) if place <= 10 else 0 for place in places]))
    assert values["loss"] == pytest.approx(mean(task, found), rel=1e-5)
    assert values["loss_count"] == 40


# --- a model --------------------------------------------------------------------------------------------------


@pytest.fixture
def model(checkpoint):
    return transformers.AutoModel.from_pretrained(checkpoint("bert"), add_pooling_layer=False).eval()


@pytest.mark.parametrize("normalize", [False, True])
def test_predict_gives_the_embedding_of_a_text_and_the_cosine_of_a_pair(model, tokenizers, normalize):
    tokenizer, task = tokenizers["wordpiece"], SentenceEmbedding(normalize=normalize)
    rows = [row(text="roses and tulips"), PAIRS[1], row(text="bread")]
    answers = task.predict(model, tokenizer, rows, WIDE, Generation())

    def alone(text):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        return F.normalize(states.mean(0), dim=0) if normalize else states.mean(0)

    assert [list(answer) for answer in answers] == [["embedding"], ["similarity"], ["embedding"]]
    torch.testing.assert_close(torch.tensor(answers[0]["embedding"]), alone("roses and tulips"))
    assert answers[1]["similarity"] == pytest.approx(cosine(alone(PAIRS[1].values["text"]), alone("two boats")), abs=1e-6)
    json.dumps(answers, allow_nan=False)


def test_records_are_of_pairs(model, tokenizers):
    tokenizer, task = tokenizers["wordpiece"], SentenceEmbedding(loss="cosent")
    batch = collate(features_of(task, SCORED, tokenizer), np.arange(3), tokenizer.pad_token_id)
    with torch.no_grad():
        records = task.records([task.items(model, batch).scores()])
    asked = task.predict(model, tokenizer, PAIRS, WIDE, Generation())
    assert [each["score"] for each in records] == [0, 2.5, 5]
    assert [each["similarity"] for each in records] == pytest.approx([each["similarity"] for each in asked], abs=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_texts_of_a_flat_batch_have_the_embeddings_they_have_alone(model, tokenizers, pooling):
    from ftkit.attention import Flat
    from ftkit.loop import Trainee

    tokenizer, task = tokenizers["wordpiece"], SentenceEmbedding(pooling=pooling)
    trainee = Trainee(model, model, task, Supervised(), Flat(model)).eval()
    seen = []
    with torch.no_grad():
        trainee(collate(features_of(task, PAIRS, tokenizer), np.arange(3), tokenizer.pad_token_id), seen.extend)
    trainee.flat.remove()
    alone = [
        [task.predict(model, tokenizer, [row(text=each.values[name])], WIDE, Generation())[0]["embedding"] for name in ("text", "text_pair")] for each in PAIRS
    ]
    torch.testing.assert_close(seen[0].logits, torch.tensor(alone), rtol=1e-4, atol=1e-5)


def test_a_pair_is_told_its_label_and_the_layer_for_it_is_kept_beside_the_model(ftkit, recipe, tmp_path, verify_here):
    done = ftkit("train", recipe("bert", "premises", {"steps": 12}), "--json")
    assert done.code == 0, done.err
    metrics = json.loads(done.out)["metrics"]["validation"]
    run = tmp_path / "run"
    assert {"accuracy", "f1", "mcc", "loss"} <= metrics.keys()
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["parameters"]["groups"]["softmax layer"] == {"trainable": 3 * 32 * 2 + 2, "total": 3 * 32 * 2 + 2}
    assert (run / "model" / "softmax.safetensors").is_file()
    measured = ftkit("eval", run, "--json")
    assert measured.code == 0, measured.err
    assert json.loads(measured.out)["metrics"]["validation"] == {name: pytest.approx(value, rel=1e-5, abs=1e-6) for name, value in metrics.items()}
    records = [json.loads(line) for line in (run / "predictions" / "validation.jsonl").read_text().splitlines()]
    assert sum(record["label"] == record["prediction"] for record in records) / len(records) == pytest.approx(metrics["accuracy"])


@pytest.mark.parametrize(("fields", "told"), [({"loss": "softmax", "scale": 2}, "scale has no effect"), ({"labels": ["a", "b"]}, "labels has no effect with")])
def test_options_of_another_loss_are_refused(fields, told):
    with pytest.raises(ValueError, match=told):
        SentenceEmbedding(**fields)
