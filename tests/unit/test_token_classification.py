"""Tags stand at the first token of their words, whatever the tokenizer, and windows take each word once."""

import json

import numpy as np
import pytest
import torch
import transformers

from ftkit.data.batches import collate
from ftkit.data.features import FeatureSet
from ftkit.data.types import Features, Limits, Row, RowError, Scores
from ftkit.errors import DataError, RecipeError
from ftkit.recipe.spec import Generation
from ftkit.tasks.token_classification import TokenClassification

TASK = TokenClassification(labels=["O", "B-X", "I-X"])
WIDE = Limits(96, "right")


def row(words, tags=None, number=1):
    return Row({"tokens": words} | ({} if tags is None else {"tags": tags}), "rows.jsonl", number)


def supervised(features, tokenizer, names=TASK.labels):
    """(token, tag) of what is learned."""
    return [
        (tokenizer.convert_ids_to_tokens(token), names[target % len(names)])
        for each in features
        for token, target, weight in zip(each.input_ids, each.targets, each.weights, strict=True)
        if weight
    ]


WORDS = ["roses", "unfathomable", "e-gima.com", "#1", "harbour", "."]
TAGS = ["O", "B-X", "I-X", "O", "B-X", "O"]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_the_first_token_of_each_word_has_its_tag(kind, tokenizers):
    tokenizer = tokenizers[kind]
    (features,) = TASK.encode(row(WORDS, TAGS), tokenizer, WIDE)
    found = supervised([features], tokenizer)
    assert [tag for _, tag in found] == TAGS
    if kind == "wordpiece":
        words = tokenizer(WORDS, is_split_into_words=True)
        assert features.input_ids == words["input_ids"]
        ids = words.word_ids()
        first = [place for place, word in enumerate(ids) if word is not None and ids[place - 1] != word]
        assert [place for place, weight in enumerate(features.weights) if weight] == first


def test_all_tokens_of_a_word_go_on_with_it(tokenizers):
    tokenizer, task = tokenizers["wordpiece"], TokenClassification(labels=["O", "B-X", "I-X"], subwords="all")
    (features,) = task.encode(row(WORDS, TAGS), tokenizer, WIDE)
    ids = tokenizer(WORDS, is_split_into_words=True).word_ids()
    expected = []
    for place, word in enumerate(ids):
        if word is not None:
            first = ids[place - 1] != word
            expected.append(TAGS[word] if first or TAGS[word] != "B-X" else "I-X")
    assert [tag for _, tag in supervised([features], tokenizer)] == expected
    assert len(expected) > len(WORDS)


def test_metrics_count_words_where_all_tokens_are_learned(tokenizers, checkpoint):
    tokenizer = tokenizers["wordpiece"]
    config = transformers.AutoConfig.from_pretrained(checkpoint("bert"), **TASK.config_kwargs())
    torch.manual_seed(0)
    model = transformers.AutoModelForTokenClassification.from_config(config).eval()
    counted, losses = [], []
    for subwords in ("first", "all"):
        task = TokenClassification(labels=TASK.labels, subwords=subwords)
        features = FeatureSet.of([task.encode(row(WORDS, TAGS), tokenizer, WIDE)])
        scores = task.items(model, collate(features, np.array([0]), 0)).scores()
        metrics = task.metrics([], features)
        metrics.update(scores)
        counted.append(metrics.sums["confusion"])
        losses.append(metrics.compute()["loss_count"])
        assert task.records([scores])[0]["tags"] == TAGS
    assert torch.equal(*counted)
    assert losses[0] == len(WORDS) < losses[1]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
@pytest.mark.parametrize("stride", [0, 4, 100])
def test_windows_take_each_word_once_and_in_order(kind, stride, tokenizers):
    words = [("boats", "roses", "unfathomable")[i % 3] for i in range(30)]
    tags = [("O", "B-X", "I-X")[i % 3] for i in range(30)]
    task = TASK.model_copy(update={"stride": stride})
    features = task.encode(row(words, tags), tokenizers[kind], Limits(24, "right"))
    assert len(features) > 3
    assert all(len(each.input_ids) <= 24 for each in features)
    assert [tag for _, tag in supervised(features, tokenizers[kind])] == tags


def test_a_word_is_taken_where_it_has_the_most_around_it(tokenizers):
    words = ["soup"] * 40  # a token each
    features = TASK.model_copy(update={"stride": 10}).encode(row(words, ["O"] * 40), tokenizers["wordpiece"], Limits(22, "right"))
    assert len(features) > 2
    for each in features[1:-1]:
        places = [place for place, weight in enumerate(each.weights) if weight]
        assert 5 <= places[0] <= 7  # 10 tokens are shared, behind one that is special
        assert 14 <= places[-1] <= 16


@pytest.mark.parametrize("mode", ["drop", "error"])
def test_long_rows_can_be_refused(mode, tokenizers):
    long = row(["boats"] * 40, ["O"] * 40)
    if mode == "drop":
        assert TASK.encode(long, tokenizers["wordpiece"], Limits(22, mode)) == []
    else:
        with pytest.raises(RowError, match=r"more tokens than data.max_length: 22"):
            TASK.encode(long, tokenizers["wordpiece"], Limits(22, mode))


def test_words_that_make_no_token_are_counted(tokenizers):
    """A variation selector alone is cleaned away."""
    features = TASK.encode(row(["roses", "\ufe0f", "soup"], ["O", "B-X", "O"]), tokenizers["wordpiece"], WIDE)
    assert [tag for _, tag in supervised(features, tokenizers["wordpiece"])] == ["O", "O"]
    assert features[0].silent_words == 1


@pytest.mark.parametrize(
    ("words", "tags", "message"),
    [
        (["a", "b"], ["O"], "1 tags for 2 tokens"),
        (["a", " "], ["O", "O"], "token 2 is empty"),
        (["a", 3], ["O", "O"], "token 2 is 3, not text"),
        (["a"], ["B-Y"], "tag 'B-Y' does not occur in the training rows"),
        (["a"], [None], "tag None is neither a word nor a number"),
        (["a"], [""], "the tag is empty"),
        ("a b", ["O", "O"], "tokens must be a list, but is a string"),
    ],
)
def test_rows_that_cannot_be_used_are_told(words, tags, message, tokenizers):
    with pytest.raises(RowError, match=message):
        TASK.encode(row(words, tags), tokenizers["wordpiece"], WIDE)


def test_labels_are_those_of_the_training_rows():
    rows = [row(["a", "b"], ["O", "B-X"]), row(["c"], ["B-A"])]
    assert TokenClassification().resolve(rows).labels == ["B-A", "B-X", "O"]
    assert TokenClassification().resolve([row(["a"] * 3, [10, 2, 1])]).labels == ["1", "2", "10"]
    with pytest.raises(DataError, match=r"task.labels lacks tags of the training rows: 'B-A'"):
        TASK.resolve(rows)
    with pytest.raises(DataError, match="one tag only"):
        TokenClassification().resolve([row(["a"], ["O"])])
    with pytest.raises(RecipeError, match="repeats a tag: 'O'"):
        TokenClassification(labels=["O", "O", "B-X"]).resolve([row(["a", "b"], ["O", "B-X"])])
    with pytest.raises(DataError, match=r"no tag that can be used: rows.jsonl:1: 1 tags for 2 tokens"):
        TokenClassification().resolve([row(["a", "b"], ["O"])])


def test_numbers_stand_for_places_among_labels_that_are_words(tokenizers):
    features = TASK.resolve([row(["a", "b"], [0, 2])]).encode(row(["roses", "soup"], [1, 2.0]), tokenizers["wordpiece"], WIDE)
    assert [tag for _, tag in supervised(features, tokenizers["wordpiece"])] == ["B-X", "I-X"]
    with pytest.raises(DataError, match="lacks tags of the training rows: '3'"):
        TASK.resolve([row(["a", "b"], [0, 3])])


def test_metrics_are_those_of_the_tags():
    assert TASK.main_metric == TokenClassification().main_metric == "f1"
    assert "f1_X" in TASK.metric_names
    words = TokenClassification(labels=["NOUN", "VERB"])
    assert (words.main_metric, words.metric_names) == ("accuracy", ("accuracy", "f1", "loss"))


def test_a_tokenizer_without_places_is_refused():
    with pytest.raises(RecipeError, match="does not say where in a text its tokens stand"):
        TASK.check(transformers.CanineTokenizer())


class Told(torch.nn.Module):
    """Says X of what a token of the word `boats` begins."""

    def __init__(self, tokenizer):
        super().__init__()
        self.first = tokenizer("boats", add_special_tokens=False)["input_ids"][0]
        self.device = torch.device("cpu")

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        said = (input_ids == self.first).long()
        return transformers.modeling_outputs.TokenClassifierOutput(logits=torch.nn.functional.one_hot(said, 3).float() * 9)


class TestPredict:
    def answers(self, tokenizer, rows, length=96):
        return TASK.predict(Told(tokenizer), tokenizer, rows, Limits(length, "right"), Generation())

    def test_spans_are_those_of_the_text(self, tokenizers):
        tokenizer = tokenizers["wordpiece"]
        text = "old  boats, (boats)\tand soup"
        one, other = self.answers(tokenizer, [row(text), row(["soup", "boats"])])
        assert one["tags"] == ["O", "B-X", "O", "O", "B-X", "O", "O", "O"]
        assert [(each["start"], each["end"], each["text"], each["label"]) for each in one["spans"]] == [(5, 10, "boats", "X"), (13, 18, "boats", "X")]
        assert text[5:10] == text[13:18] == "boats"
        assert other["spans"] == [{"label": "X", "start": 5, "end": 10, "text": "boats", "probability": pytest.approx(1, abs=1e-3)}]
        json.dumps(one, allow_nan=False)

    def test_long_texts_go_through_windows(self, tokenizers):
        tokenizer = tokenizers["wordpiece"]
        words = [("soup", "roses", "boats")[i % 3] for i in range(50)]
        (found,) = self.answers(tokenizer, [row(words)], length=16)
        assert found["tags"] == ["B-X" if word == "boats" else "O" for word in words]
        assert len(found["spans"]) == words.count("boats")

    def test_rows_that_cannot_be_answered_are_told(self, tokenizers):
        with pytest.raises(DataError, match=r"rows\.jsonl:7: token 2 is 3, not text"):
            self.answers(tokenizers["wordpiece"], [row(["boats", 3], number=7)])

    def test_a_word_that_makes_no_token_is_outside(self, tokenizers):
        (found,) = self.answers(tokenizers["wordpiece"], [row(["\ufe0f", "boats"])])
        assert found["tags"] == ["O", "B-X"]


def of_rows(rows) -> FeatureSet:
    """A set of features that came from these rows, one after the other."""
    return FeatureSet.of([[Features([1], [0], [1.0])] * list(rows).count(row) for row in range(max(rows) + 1)])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_a_span_across_windows_is_one(order):
    """In whatever order they are measured; rows 0 and 2 are one window, row 1 is two."""
    gold = [["O", "B-X"], ["O", "B-X", "I-X"], ["I-X", "O"], ["B-X"]]
    said = [["O", "B-X"], ["O", "B-X", "I-X"], ["I-X", "B-X"], ["O"]]
    features = of_rows([0, 1, 1, 2])
    metrics = TASK.metrics([], features)
    for feature in order:
        targets, answers = ([TASK.labels.index(tag) for tag in tags[feature]] for tags in (gold, said))
        metrics.update(Scores(torch.eye(3)[answers] * 9, torch.tensor(targets), torch.ones(len(targets)), torch.full((len(targets),), feature)))
    found = metrics.compute()
    # three names, of which two are found, and one that is none: the second goes from one window into the next
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert found["f1_X"] == pytest.approx(2 / 3)
    assert found["accuracy"] == pytest.approx(6 / 8)
    assert metrics.details()["classes"]["X"]["support"] == 3


def test_the_interval_of_spans_comes_from_whole_rows():
    """Of ten rows with ten names each, nine are right: a draw is one of rows, not of a hundred names."""
    names = torch.eye(3)[[1] * 10] * 9
    wrong = torch.eye(3)[[0] * 10] * 9
    metrics = TASK.metrics([], of_rows(range(10)))
    logits = torch.cat([names] * 9 + [wrong])
    metrics.update(Scores(logits, torch.ones(100).long() * TASK.labels.index("B-X"), torch.ones(100), torch.arange(100) // 10))
    found = metrics.details()
    assert found["classes"]["X"] == {"precision": 1.0, "recall": 0.9, "f1": pytest.approx(18 / 19), "support": 100}
    assert found["intervals"]["recall"] == pytest.approx([0.7, 1.0])  # of a hundred names: 0.84 to 0.95
    assert found["intervals"]["accuracy"] == pytest.approx([0.7, 1.0])
