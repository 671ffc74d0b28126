"""Labels, numbers and weights of classes: targets, losses and metrics beside those of transformers, torch, scikit-learn and SciPy."""

import math

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError
from torch.nn import functional as F

from ftkit import objectives
from ftkit.data.batches import collate
from ftkit.data.features import FeatureSet
from ftkit.data.types import Limits, Row, RowError, Scores
from ftkit.errors import DataError, RecipeError
from ftkit.objectives.supervised import Supervised
from ftkit.recipe.spec import Generation
from ftkit.tasks.problems import auroc, balanced, ranks
from ftkit.tasks.text_classification import TextClassification

MANY = TextClassification(problem="multi-label", labels=["a", "b", "c"])
NUMBER = TextClassification(problem="regression")
LIMITS = Limits(96, "right")


def row(number=1, **values):
    return Row({"text": "roses in the garden"} | values, "rows.jsonl", number)


def scores(logits, targets, kind, weights=None):
    return Scores(logits, targets, torch.ones(len(logits)) if weights is None else weights, torch.arange(len(logits)), kind=kind)


@pytest.mark.parametrize(("given", "target"), [(["c", "a"], [1.0, 0.0, 1.0]), ("b", [0.0, 1.0, 0.0]), ([], [0.0] * 3), (None, [0.0] * 3)])
def test_labels_become_a_number_each(given, target, tokenizers):
    values = {} if given is None else {"label": given}
    (features,) = MANY.encode(row(**values), tokenizers["wordpiece"], LIMITS)
    assert features.targets == target
    assert features.weights == [1.0]


@pytest.mark.parametrize(("given", "target"), [(2, 2.0), ("3.5", 3.5), (-1e3, -1000.0)])
def test_scores_are_numbers(given, target, tokenizers):
    (features,) = NUMBER.encode(row(score=given), tokenizers["wordpiece"], LIMITS)
    assert features.targets == [target]


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        (MANY, {"label": ["a", "d"]}, "label 'd' does not occur in the training rows"),
        (MANY, {"label": ["a", None]}, "label None is neither a word nor a number"),
        (NUMBER, {"score": "high"}, "score 'high' is not a number"),
        (NUMBER, {"score": "nan"}, "score 'nan' is not a finite number"),
        (NUMBER, {"score": True}, "score True is not a finite number"),
        (NUMBER, {"score": [1]}, "is not a number"),
    ],
)
def test_rows_that_cannot_be_used_are_told(task, values, message, tokenizers):
    with pytest.raises(RowError, match=message):
        task.encode(row(**values), tokenizers["wordpiece"], LIMITS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"problem": "regression", "labels": ["a"]}, "labels has no effect with problem: regression"),
        ({"problem": "multi-label", "class_weights": "balanced"}, "class_weights has no effect with problem: multi-label"),
        ({"threshold": 0.3}, "threshold has no effect with problem: single-label"),
    ],
)
def test_options_without_effect_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        TextClassification(**settings)


def test_labels_are_those_of_the_training_rows():
    rows = [row(label=["b", "a"]), row(), row(label=["c"])]
    assert TextClassification(problem="multi-label").resolve(rows).labels == ["a", "b", "c"]
    with pytest.raises(DataError, match="have no label that can be used"):
        TextClassification(problem="multi-label").resolve([row()])
    assert NUMBER.resolve([]) == NUMBER


@pytest.mark.parametrize("task", [MANY, NUMBER, TextClassification(problem="multi-label", labels=["only"])], ids=["labels", "numbers", "one label"])
def test_the_loss_is_that_of_the_model_of_transformers(task, tokenizers, checkpoint):
    config = transformers.AutoConfig.from_pretrained(checkpoint("bert"), **task.config_kwargs())
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    given = [{"score": 1.5}, {"score": -2}, {"score": 0.25}] if task is NUMBER else [{"label": task.labels[:1]}, {}, {"label": task.labels}]
    features = FeatureSet.of(task.encode(row(**values), tokenizers["wordpiece"], LIMITS) for values in given)
    batch = collate(features, np.arange(3), 0)
    items = task.items(model, batch)
    theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=items.targets).loss
    assert (Supervised().loss(items.scores()) / 3).item() == pytest.approx(theirs.item(), rel=1e-6)


def test_class_weights_are_those_of_torch(tokenizers):
    weights = {"a": 3.0, "b": 0.5}
    task = TextClassification(labels=["a", "b", "c"], class_weights=weights)
    encoded = [task.encode(row(label=name), tokenizers["wordpiece"], LIMITS)[0] for name in "abcab"]
    torch.manual_seed(0)
    logits = torch.randn(5, 3)
    targets, found = torch.tensor([each.targets[0] for each in encoded]), torch.tensor([each.weights[0] for each in encoded])
    ours = Supervised().loss(scores(logits, targets, "classes", found)) / found.sum()
    assert ours.item() == pytest.approx(F.cross_entropy(logits, targets, weight=torch.tensor([3.0, 0.5, 1.0])).item(), rel=1e-6)
    metrics = task.metrics([], None)
    metrics.update(scores(logits, targets, "classes", found))
    values = metrics.compute()
    assert values["accuracy"] == (logits.argmax(-1) == targets).double().mean()  # each row counts once
    assert values["loss"] == pytest.approx(ours.item(), rel=1e-6)


def test_balanced_weights_let_all_classes_count_alike():
    task = TextClassification(class_weights="balanced").resolve([row(label="a")] * 6 + [row(label="b")] * 2)
    assert task.class_weights == {"a": pytest.approx(8 / 12), "b": pytest.approx(2.0)}
    counts = {"a": 6, "b": 2}
    assert sum(balanced(counts)[name] * count for name, count in counts.items()) == pytest.approx(8)
    with pytest.raises(RecipeError, match=r"task\.class_weights: 'z' is no label \(known: 'a', 'b'\)"):
        TextClassification(class_weights={"z": 2.0}).resolve([row(label="a"), row(label="b")])


def test_metrics_of_labels_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = torch.Generator().manual_seed(0)
    gold = (torch.rand(80, 3, generator=rng) < torch.tensor([0.5, 0.2, 0.1])).float()
    logits = torch.randn(80, 3, generator=rng) + gold
    ours = MANY.metrics([], None)
    for part in (slice(0, 50), slice(50, 80)):
        ours.update(scores(logits[part], gold[part], "labels"))
    found = ours.compute()
    probabilities = logits.sigmoid().numpy()
    said = probabilities >= 0.5
    assert found["f1"] == pytest.approx(metrics.f1_score(gold, said, average="macro"), abs=1e-12)
    assert found["f1_micro"] == pytest.approx(metrics.f1_score(gold, said, average="micro"), abs=1e-12)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(gold, said), abs=1e-12)
    assert found["auroc"] == pytest.approx(metrics.roc_auc_score(gold, probabilities, average="macro"), abs=1e-12)
    assert found["loss"] == pytest.approx(F.binary_cross_entropy_with_logits(logits, gold).item(), abs=1e-6)


def test_the_threshold_decides_what_is_said():
    task = MANY.model_copy(update={"threshold": 0.2})
    logits = torch.tensor([[-1.0, -3.0, 2.0]])
    assert MANY._problem.answers(logits)[0]["labels"] == ["c"]
    assert task._problem.answers(logits)[0]["labels"] == ["a", "c"]


def test_correlations_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = torch.Generator().manual_seed(0)
    gold = torch.randint(6, (70,), generator=rng).float()  # with ties
    logits = (gold + torch.randn(70, generator=rng))[:, None]
    ours = NUMBER.metrics([], None)
    for part in (slice(0, 20), slice(20, 70)):
        ours.update(scores(logits[part], gold[part], "numbers"))
    found = ours.compute()
    assert found["pearson"] == pytest.approx(stats.pearsonr(logits[:, 0].double(), gold.double())[0], abs=1e-12)
    assert found["spearman"] == pytest.approx(stats.spearmanr(logits[:, 0], gold)[0], abs=1e-12)
    assert found["mse"] == pytest.approx(F.mse_loss(logits[:, 0], gold).item(), abs=1e-6)
    assert found["loss"] == pytest.approx(found["mse"], abs=1e-6)
    assert torch.equal(ranks(gold.double()), torch.tensor(stats.rankdata(gold)))


def test_numbers_that_do_not_vary_have_no_correlation():
    ours = NUMBER.metrics([], None)
    ours.update(scores(torch.ones(3, 1), torch.tensor([1.0, 2.0, 3.0]), "numbers"))
    assert ours.compute()["pearson"] == ours.compute()["spearman"] == 0.0


def test_the_area_under_the_curve_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = torch.Generator().manual_seed(0)
    gold = torch.randint(2, (60,), generator=rng)
    logits = torch.randint(-2, 3, (60, 2), generator=rng).float()  # with ties
    ours = TextClassification(labels=["no", "yes"]).metrics([], None)
    ours.update(scores(logits, gold, "classes"))
    assert ours.compute()["auroc"] == pytest.approx(metrics.roc_auc_score(gold, logits.softmax(-1)[:, 1]), abs=1e-12)
    assert math.isnan(auroc(torch.ones(3), torch.ones(3)))
    alone = TextClassification(labels=["no", "yes"]).metrics([], None)
    alone.update(scores(logits[:3], torch.ones(3).long(), "classes"))
    assert "auroc" not in alone.compute()


def test_the_calibration_error_is_that_of_its_definition():
    rng = torch.Generator().manual_seed(0)
    gold, logits = torch.randint(3, (200,), generator=rng), 2 * torch.randn(200, 3, generator=rng)
    ours = TextClassification(labels=["a", "b", "c"]).metrics([], None)
    for part in (slice(0, 90), slice(90, 200)):
        ours.update(scores(logits[part], gold[part], "classes"))
    best, said = logits.softmax(-1).max(-1)
    expected = 0.0
    for i in range(15):
        within = (best > i / 15) & (best <= (i + 1) / 15)
        if within.any():
            expected += within.double().mean() * abs((said == gold)[within].double().mean() - best[within].double().mean())
    assert ours.compute()["ece"] == pytest.approx(float(expected), abs=1e-6)


def test_rows_of_no_weight_count_for_nothing():
    for task, logits, targets, kind in (
        (MANY, torch.randn(2, 3), torch.ones(2, 3), "labels"),
        (NUMBER, torch.randn(2, 1), torch.ones(2), "numbers"),
    ):
        ours, alone = task.metrics([], None), task.metrics([], None)
        ours.update(scores(logits, targets, kind, torch.tensor([1.0, 0.0])))
        alone.update(scores(logits[:1], targets[:1], kind))
        assert ours.compute() == alone.compute()


def test_answers_need_no_labels(tokenizers, checkpoint):
    for task, keys in ((MANY, {"labels", "scores"}), (NUMBER, {"score"})):
        config = transformers.AutoConfig.from_pretrained(checkpoint("bert"), **task.config_kwargs())
        model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
        (answer,) = task.predict(model, tokenizers["wordpiece"], [row()], LIMITS, Generation())
        assert answer.keys() == keys


def test_losses_are_of_the_kind_of_the_targets():
    logits = torch.tensor([[2.0, -1.0]])
    assert objectives.losses(scores(logits, torch.tensor([0]), "classes"))[0] == pytest.approx(math.log(1 + math.exp(-3)), rel=1e-6)
    assert objectives.losses(scores(logits[:, :1], torch.tensor([5.0]), "numbers")).tolist() == [9.0]


def test_the_area_of_several_classes_is_the_mean_of_each_against_the_rest():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = torch.Generator().manual_seed(0)
    gold, logits = torch.randint(4, (90,), generator=rng), torch.randn(90, 4, generator=rng)
    ours = TextClassification(labels=["a", "b", "c", "d"]).metrics([], None)
    ours.update(scores(logits, gold, "classes"))
    expected = metrics.roc_auc_score(gold, logits.double().softmax(-1), multi_class="ovr", average="macro")
    assert ours.compute()["auroc"] == pytest.approx(expected, abs=1e-6)


def test_many_classes_keep_no_probabilities():
    names = [f"{i:02}" for i in range(21)]
    task = TextClassification(labels=names)
    ours = task.metrics([], None)
    ours.update(scores(torch.randn(5, 21), torch.arange(5), "classes"))
    assert not ours.kept
    assert "auroc" not in task.metric_names


def test_the_table_of_classes_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = torch.Generator().manual_seed(0)
    gold, logits = torch.randint(2, (50,), generator=rng), torch.randn(50, 3, generator=rng)  # class c never occurs
    ours = TextClassification(labels=["a", "b", "c"]).metrics([], None)
    ours.update(scores(logits, gold, "classes"))
    details, said = ours.details(), logits.argmax(-1)
    expected = metrics.precision_recall_fscore_support(gold, said, labels=range(3), zero_division=0)
    assert [list(row.values()) for row in details["classes"].values()] == [pytest.approx(row) for row in zip(*expected, strict=True)]
    assert details["confusion"] == metrics.confusion_matrix(gold, said, labels=range(3)).tolist()

    wanted, logits = (torch.rand(50, 3, generator=rng) < 0.3).float(), torch.randn(50, 3, generator=rng)
    ours = MANY.metrics([], None)
    ours.update(scores(logits, wanted, "labels"))
    expected = metrics.precision_recall_fscore_support(wanted, logits > 0, zero_division=0)
    assert [list(row.values()) for row in ours.details()["classes"].values()] == [pytest.approx(row) for row in zip(*expected, strict=True)]


def test_intervals_of_fractions_are_those_of_the_binomial_distribution():
    """80 of 100 right: 0.8 with a standard error of 0.04."""
    stats = pytest.importorskip("scipy.stats")
    low, high = (stats.binom(100, 0.8).ppf(q) / 100 for q in (0.025, 0.975))
    for task, kind in ((TextClassification(labels=["a", "b"]), "classes"), (TextClassification(problem="multi-label", labels=["a", "b"]), "labels")):
        said = torch.nn.functional.one_hot(torch.arange(100) % 2, 2).float()
        gold = said.argmax(-1)
        gold[:20] = 1 - gold[:20]
        ours = task.metrics([], None)
        ours.update(scores(20 * said - 10, gold if kind == "classes" else torch.nn.functional.one_hot(gold, 2).float(), kind))
        intervals = ours.details()["intervals"]
        assert intervals["accuracy"] == pytest.approx([low, high], abs=0.011)
        assert intervals["accuracy"] == ours.details()["intervals"]["accuracy"]  # each time the same


def test_intervals_of_correlations_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = torch.Generator().manual_seed(0)
    gold = torch.randn(80, generator=rng)
    said = gold + torch.randn(80, generator=rng)
    ours = NUMBER.metrics([], None)
    ours.update(scores(said[:, None], gold, "numbers"))
    for name, statistic in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        drawn = stats.bootstrap(
            (said.numpy(), gold.numpy()),
            lambda x, y, of=statistic: of(x, y)[0],
            paired=True,
            vectorized=False,
            n_resamples=1000,
            method="percentile",
            rng=0,
        )
        assert ours.details()["intervals"][name] == pytest.approx(list(drawn.confidence_interval), abs=0.02)


def test_labels_that_separate_have_intervals_of_their_own():
    ours = TextClassification(labels=["a", "b"]).metrics([], None)
    ours.update(scores(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]), "classes"))
    low, high = ours.details()["intervals"]["auroc"]  # draws of one class alone have none
    assert low == high == 1.0
