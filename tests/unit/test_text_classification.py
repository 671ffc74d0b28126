"""Labels, truncation, metrics against scikit-learn, and the baselines."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch

from ftkit.data.types import Limits, Row, RowError, Scores
from ftkit.errors import DataError, RecipeError
from ftkit.tasks.text_classification import TextClassification


def rows(*labels, text="roses and tulips"):
    return [Row({"text": text, "label": label}, "t.csv", i + 1) for i, label in enumerate(labels)]


def test_words_are_sorted_by_alphabet_and_numbers_by_size():
    assert TextClassification().resolve(rows("b", "a", "b")).labels == ["a", "b"]
    assert TextClassification().resolve(rows("10", "9", "-1")).labels == ["-1", "9", "10"]


def test_one_label_in_many_spellings():
    assert TextClassification().resolve(rows(1, "1", 1.0, " 1 ", 0)).labels == ["0", "1"]


def test_booleans_are_words():
    assert TextClassification().resolve(rows(True, False, "true")).labels == ["false", "true"]


def test_only_ascii_digits_are_numbers():
    assert TextClassification().resolve(rows("²", "1")).labels == ["1", "²"]
    assert TextClassification().resolve(rows("--1", "2")).labels == ["--1", "2"]


def test_the_order_of_equal_numbers_does_not_depend_on_hashes():
    assert TextClassification().resolve(rows("1", "01", "001", "-0", "0")).labels == ["-0", "0", "001", "01", "1"]


BAD_LABELS = {0.5: "label 0.5 is not a whole number", "": "the label is empty", (1,): "is neither a word nor a number", None: "is neither a word nor a number"}


@pytest.mark.parametrize("label", BAD_LABELS)
def test_a_label_that_is_none_is_left_to_the_account_of_bad_rows(tokenizers, label):
    value = list(label) if isinstance(label, tuple) else label
    task = TextClassification().resolve(rows("a", value, "b"))
    assert task.labels == ["a", "b"]
    with pytest.raises(RowError, match=BAD_LABELS[label]):
        task.encode(rows(value)[0], tokenizers["wordpiece"], Limits(16, "right"))


def test_where_no_label_can_be_used_the_reason_is_told():
    with pytest.raises(DataError, match=r"no label that can be used: t\.csv:1: label 0\.5 is not a whole number; for regression"):
        TextClassification().resolve(rows(0.5, 1.5))


def test_given_labels_keep_their_order_and_must_be_complete():
    assert TextClassification(labels=["b", "a", "unused"]).resolve(rows("a", "b")).labels == ["b", "a", "unused"]
    with pytest.raises(DataError, match="lacks labels of the training rows: 'c'"):
        TextClassification(labels=["a", "b"]).resolve(rows("a", "c"))
    with pytest.raises(RecipeError, match="repeats a label: 'a'"):
        TextClassification(labels=["a", "b", "a"]).resolve(rows("a", "b"))


def test_the_config_carries_the_labels():
    kwargs = TextClassification(labels=["no", "yes"]).config_kwargs()
    assert kwargs["id2label"] == {0: "no", 1: "yes"}
    assert kwargs["label2id"] == {"no": 0, "yes": 1}


class TestEncode:
    task = TextClassification(labels=["a", "b"])

    def row(self, **values):
        return Row(values, "t.csv", 1)

    def test_a_row_has_one_target(self, tokenizers):
        (features,) = self.task.encode(self.row(text="roses", label="b"), tokenizers["wordpiece"], Limits(16, "right"))
        assert (features.targets, features.weights, features.truncated) == ([1], [1.0], 0)
        assert features.input_ids == tokenizers["wordpiece"]("roses")["input_ids"]

    def test_pairs_have_types(self, tokenizers):
        (features,) = self.task.encode(self.row(text="roses", text_pair="bread", label="b"), tokenizers["wordpiece"], Limits(16, "right"))
        assert set(features.token_type_ids) == {0, 1}
        assert features.input_ids.count(tokenizers["wordpiece"].sep_token_id) == 2

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_truncation_keeps_one_side_and_counts(self, tokenizers, side):
        tokenizer = tokenizers["wordpiece"]
        text = "roses " * 5 + "bread " * 5
        whole = tokenizer(text)["input_ids"]
        (features,) = self.task.encode(self.row(text=text, label="a"), tokenizer, Limits(6, side))
        assert len(features.input_ids) == 6
        assert features.truncated == len(whole) - 6
        inner = whole[1:5] if side == "right" else whole[-5:-1]
        assert features.input_ids[1:-1] == inner
        assert tokenizer.truncation_side == "right", "the tokenizer is as it was"

    def test_long_rows_can_be_dropped_or_refused(self, tokenizers):
        row = self.row(text="roses " * 20, label="a")
        assert self.task.encode(row, tokenizers["wordpiece"], Limits(6, "drop")) == []
        with pytest.raises(RowError, match=r"\d+ tokens, more than data.max_length: 6"):
            self.task.encode(row, tokenizers["wordpiece"], Limits(6, "error"))

    def test_an_unknown_label_is_named(self, tokenizers):
        with pytest.raises(RowError, match="label 'c' does not occur in the training rows \\(known: 'a', 'b'\\)"):
            self.task.encode(self.row(text="roses", label="c"), tokenizers["wordpiece"], Limits(6, "right"))


def scores(logits, targets, weights=None):
    n = len(targets)
    weights = torch.ones(n) if weights is None else torch.tensor(weights)
    return Scores(torch.tensor(logits, dtype=torch.float32), torch.tensor(targets), weights, torch.arange(n))


@pytest.mark.parametrize("num_labels", [2, 3, 7])
def test_metrics_equal_scikit_learns(num_labels):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(num_labels)
    gold = rng.integers(0, num_labels, 500)
    logits = rng.normal(size=(500, num_labels)) + 1.5 * np.eye(num_labels)[gold]
    said = logits.argmax(1)
    task = TextClassification(labels=[str(i) for i in range(num_labels)])
    ours = task.metrics([], None)
    for part in np.array_split(np.arange(500), 7):
        ours.update(scores(logits[part], gold[part]))
    found = ours.compute()
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(gold, said), abs=1e-12)
    assert found["f1"] == pytest.approx(metrics.f1_score(gold, said, average="macro"), abs=1e-12)
    assert found["mcc"] == pytest.approx(metrics.matthews_corrcoef(gold, said), abs=1e-12)
    assert found["loss"] == pytest.approx(metrics.log_loss(gold, torch.tensor(logits, dtype=torch.float32).softmax(-1).numpy()), abs=1e-6)
    assert found["loss_count"] == 500
    assert found.keys() == {*task.metric_names, "loss_count"}
    assert ("f1_binary" in found) == (num_labels == 2)
    if num_labels == 2:
        assert found["f1_binary"] == pytest.approx(metrics.f1_score(gold, said), abs=1e-12)


def test_mcc_of_a_model_that_always_says_the_same_is_zero():
    metrics = TextClassification(labels=["a", "b"]).metrics([], None)
    metrics.update(scores([[1.0, 0.0]] * 4, [0, 0, 1, 0]))
    assert metrics.compute()["mcc"] == 0.0


def test_rows_of_weight_zero_count_for_nothing():
    metrics = TextClassification(labels=["a", "b"]).metrics([], None)
    metrics.update(scores([[1.0, 0.0], [0.0, 1.0]], [0, 0], [1.0, 0.0]))
    found = metrics.compute()
    assert (found["accuracy"], found["loss_count"]) == (1.0, 1.0)


def test_baselines_of_a_set_that_words_decide():
    train = [*rows("a", "a", "a", text="roses tulips"), *rows("b", "b", text="bread butter")]
    test = [*rows("a", text="tulips bees"), *rows("b", "b", text="butter of bread")]
    found = TextClassification(labels=["a", "b"]).baselines(train, test)
    assert found == {"majority": pytest.approx(1 / 3), "bag_of_words": 1.0}


def naive_bayes(train, test):
    """Accuracy by the definition, word by word."""
    prior = Counter(row.values["label"] for row in train)
    counts = {label: Counter(word for row in train if row.values["label"] == label for word in row.values["text"].split()) for label in prior}
    vocabulary = {word for counter in counts.values() for word in counter}

    def score(label, row):
        known = [word for word in row.values["text"].split() if word in vocabulary]
        return math.log(prior[label]) + sum(math.log((counts[label][word] + 1) / (counts[label].total() + len(vocabulary))) for word in known)

    return sum(max(prior, key=lambda label: score(label, row)) == row.values["label"] for row in test) / len(test)


@pytest.mark.parametrize("seed", range(5))
def test_the_words_are_weighed_as_naive_bayes_does(seed):
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(40)]

    def drawn(count):
        labels = [rng.choice("aabc") for _ in range(count)]
        return [Row({"text": " ".join([*rng.choices(words, k=rng.randint(0, 6)), label * rng.randint(1, 3)]), "label": label}, "t", 1) for label in labels]

    train, test = drawn(30), drawn(60)
    found = TextClassification(labels=["a", "b", "c"]).baselines(train, test)["bag_of_words"]
    assert found == pytest.approx(naive_bayes(train, test), abs=1e-12)
    assert 0 < found < 1
