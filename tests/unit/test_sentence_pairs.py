"""How documents become pairs of segments, and which of these belong together."""

import json
from collections import Counter
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest

from ftkit.data.features import FeatureSet
from ftkit.data.types import Limits, Row, RowError
from ftkit.errors import DataError
from ftkit.tasks.next_sentence import NextSentence
from ftkit.tasks.pairing import LINE
from ftkit.tasks.sentence_order import SentenceOrder

WIDE = Limits(96, "right")
DOCUMENTS = [
    "roses and tulips in the old garden\nthe small hedge\nsoil with worms",
    "boats near the quiet tide\nropes under the lamps",
    "bread and butter and soup\nthe kettle\nmy oven\nflour",
]
TASKS = {"next": NextSentence, "order": SentenceOrder}


@pytest.fixture
def tokenizer(tokenizers):
    return tokenizers["wordpiece"]


def row(text, number=1):
    return Row({"text": text}, "rows.jsonl", number)


def features(task, tokenizer, documents=DOCUMENTS, seed=0, limits=WIDE):
    plain = FeatureSet.of([task.encode(row(text), tokenizer, limits) for text in documents])
    return replace(plain, corruption=task.corruption(plain, tokenizer, seed))


def segments(example, tokenizer) -> tuple[list[int], list[int]]:
    """The tokens of both, as they were before any was hidden."""
    tokens = [example["targets"][0], *np.where(example["targets"] < 0, example["input_ids"], example["targets"])[1:]]
    first, second, rest = [], [], 0
    for token in tokens[1:]:
        if token == tokenizer.sep_token_id:
            rest += 1
        else:
            (first, second)[rest].append(int(token))
    assert rest == 2
    return first, second


def lines(text, tokenizer) -> list[list[int]]:
    return [tokenizer(line, add_special_tokens=False)["input_ids"] for line in text.splitlines()]


def joined(parts) -> list[int]:
    return list(chain.from_iterable(parts))


def test_a_document_is_cut_into_inputs_of_whole_lines_that_begin_with_a_mark(tokenizer):
    (whole,) = SentenceOrder().encode(row(DOCUMENTS[0]), tokenizer, WIDE)
    expected = lines(DOCUMENTS[0], tokenizer)
    assert whole.input_ids[1:-2] == joined(expected)
    assert [whole.weights[1 + len(joined(expected[:number]))] for number in range(3)] == [LINE] * 3
    assert whole.weights.count(LINE) == 3
    parts = SentenceOrder().encode(row(DOCUMENTS[0]), tokenizer, Limits(len(expected[0]) + 3, "right"))
    assert len(parts) > 1
    assert all(len(part.input_ids) <= len(expected[0]) + 3 for part in parts)
    assert joined(part.input_ids[1:-2] for part in parts) == joined(expected)


def test_pairs_of_sentences_are_two_lines_each(tokenizer):
    """The last one of an odd number is alone, and is cut between words."""
    task = SentenceOrder(packing="sentence-pair")
    own = lines(DOCUMENTS[0], tokenizer)
    assert [each.input_ids[1:-2] for each in task.encode(row(DOCUMENTS[0]), tokenizer, WIDE)] == [own[0] + own[1], own[2]]
    made = features(task, tokenizer)
    for epoch in range(20):
        found = made.get(0, epoch)
        assert sorted(map(len, segments(found, tokenizer))) == sorted(map(len, own[:2]))


@pytest.mark.parametrize("kind", TASKS)
def test_half_of_the_pairs_are_false_and_lengths_tell_nothing(kind, tokenizer):
    made = features(TASKS[kind](), tokenizer)
    truths = Counter()
    for epoch in range(300):
        for index in range(3):
            found, stored = made.get(index, epoch), made.stored(index)
            assert len(found["input_ids"]) == len(stored["input_ids"])
            first, second = segments(found, tokenizer)
            assert first
            assert second
            assert found["token_type_ids"].tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1)
            own = lines(DOCUMENTS[index], tokenizer)
            false = bool(~found["targets"][0])
            truths[false] += 1
            ends = [len(joined(own[:number])) for number in range(1, len(own))]
            if not false:
                assert first + second == joined(own)
                assert len(first) in ends, "the first segment ends with a line"
            elif kind == "order":
                assert second + first == joined(own)
                assert len(second) in ends
            else:
                others = [joined(lines(text, tokenizer)) for number, text in enumerate(DOCUMENTS) if number != index]
                assert first == joined(own)[: len(first)]
                text = " ".join(map(str, [*others[0], *others[1], *others[0], *others[1]])) + " | " + " ".join(map(str, [*others[1], *others[0]] * 2))
                assert " ".join(map(str, second)) in text
    assert abs(truths[True] / truths.total() - 0.5) < 4 * 0.5 / truths.total() ** 0.5


@pytest.mark.parametrize("kind", TASKS)
def test_pairs_and_masks_depend_on_seed_epoch_and_place_alone(kind, tokenizer):
    def said(seed, epoch, **fields):
        made = features(TASKS[kind](**fields), tokenizer, seed=seed)
        return [{name: np.asarray(value).tolist() for name, value in made.get(i, epoch).items() if value is not None} for i in range(3)]

    assert said(1, 3) == said(1, 3)
    assert said(1, 3) != said(1, 4)
    assert said(1, 3) != said(2, 3)
    assert said(1, 7, masking="static") == said(1, 0, masking="static") == said(1, 0)


def test_special_tokens_are_never_hidden_and_a_share_of_the_others_is(tokenizer):
    made = features(NextSentence(), tokenizer)
    for epoch in range(100):
        found = made.get(0, epoch)
        hidden = np.flatnonzero(found["weights"])[1:]  # after the pair's own
        assert found["weights"][0] == 1
        assert found["targets"][0] in (-1, -2)
        assert len(hidden) == max(1, round(0.15 * (len(found["weights"]) - 3)))
        assert not set(found["targets"][hidden].tolist()) & set(tokenizer.all_special_ids)
        assert found["input_ids"][0] == tokenizer.cls_token_id


def test_a_line_alone_is_cut_between_words(tokenizer):
    made = features(SentenceOrder(unit="whole-word"), tokenizer, ["unfathomable harbour compost", "roses"])
    words = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("unfathomable", "harbour", "compost")]
    assert len(words[0]) > 1
    for epoch in range(50):
        first, second = segments(made.get(0, epoch), tokenizer)
        if ~made.get(0, epoch)["targets"][0]:
            first, second = second, first
        assert len(first) in (len(words[0]), len(words[0]) + len(words[1]))


def test_what_is_no_pair_is_refused(tokenizer):
    one = next(token for token in tokenizer.get_vocab() if token.isalpha() and len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1)
    with pytest.raises(RowError, match="cannot be cut into two segments"):
        SentenceOrder().encode(row(one), tokenizer, WIDE)
    with pytest.raises(RowError, match="the text is empty"):
        SentenceOrder().encode(row(" \n "), tokenizer, WIDE)


def test_a_document_alone_has_no_false_next_segment(tokenizer):
    task = NextSentence()
    with pytest.raises(DataError, match="there is only one; give more of them in each set, or use task: sentence-order"):
        features(task, tokenizer, DOCUMENTS[:1])
    with pytest.raises(DataError, match="there is only one"):
        task.resolve([row(DOCUMENTS[0])])
    assert task.resolve(map(row, DOCUMENTS)) == task
    features(SentenceOrder(), tokenizer, DOCUMENTS[:1])


def test_the_command_trains_and_tells_pairs(ftkit, recipe, verify_here, tmp_path):
    done = ftkit("train", recipe("bert-pretrained", "documents"), "--json")
    assert done.code == 0, done.err
    assert "half of the pairs of segments are not_next" in done.err
    metrics = json.loads(done.out)["metrics"]["validation"]
    assert set(metrics) == {"loss", "perplexity", "token_accuracy", "accuracy", "f1_binary", "loss_count"}
    records = [json.loads(line) for line in (tmp_path / "run" / "predictions" / "validation.jsonl").read_text().splitlines()]
    right = [record["label"] == record["prediction"] for record in records]
    assert sum(right) / len(right) == pytest.approx(metrics["accuracy"])
    said = ftkit("predict", tmp_path / "run", "roses in the garden", "the hedge")
    assert said.code == 0, said.err
    answer = json.loads(said.out)
    assert answer["label"] in ("next", "not_next")
    assert 0.5 <= answer["probability"] <= 1


@pytest.mark.parametrize("name", ["distilbert-masked", "electra-pretrained"])
def test_an_architecture_without_the_head_is_refused(name, ftkit, recipe):
    done = ftkit("train", recipe(name, "documents"))
    assert done.code == 2, done.err
    assert "no head that tells of two segments how they belong together; BERT, ALBERT, ERNIE and BigBird have one" in done.err
