"""Spans of tags are those of conlleval, and so are precision, recall and F1."""

import random

import pytest
import torch

from ftkit.data.features import FeatureSet
from ftkit.data.types import Features, Scores
from ftkit.tasks.spans import Span, spans, tagged, types_of
from ftkit.tasks.token_classification import TagMetrics


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-PER I-PER O", [("PER", 1, 3)]),
        ("B-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("I-PER I-PER O I-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),  # IOB1
        ("I-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("B-PER I-LOC", [("PER", 0, 1), ("LOC", 1, 2)]),
        ("B-PER I-PER E-PER S-LOC", [("PER", 0, 3), ("LOC", 3, 4)]),  # IOBES
        ("S-PER I-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("E-PER E-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("O O", []),
        ("", []),
        ("I-PER", [("PER", 0, 1)]),
        ("B-a-b I-a-b", [("a-b", 0, 2)]),
    ],
)
def test_spans(tags, expected):
    assert list(spans(tags.split())) == [Span(*each) for each in expected]


def conlleval(gold, said):
    """Spans that begin and end together, by the two functions of the script, word by word: (gold, predicted, correct) by type."""

    def parts(tag):
        return ("O", "") if tag == "O" else tuple(tag.split("-", 1))

    def ends(before, now):
        (b, b_type), (n, n_type) = before, now
        return (b in "ES" or (b in "BI" and n in "BSO") or (b != "O" and b_type != n_type)) and b != "O"

    def starts(before, now):
        (b, b_type), (n, n_type) = before, now
        return n in "BS" or (b in "ESO" and n in "EI") or (n != "O" and b_type != n_type)

    counts, in_correct = {}, False

    def add(kind, column):
        counts.setdefault(kind, [0, 0, 0])[column] += 1

    last_gold, last_said = ("O", ""), ("O", "")
    for one, other in zip([*gold, "O"], [*said, "O"], strict=True):
        one, other = parts(one), parts(other)
        if in_correct:
            ended = ends(last_gold, one), ends(last_said, other)
            if all(ended) and last_gold[1] == last_said[1]:
                add(last_gold[1], 2)
                in_correct = False
            elif ended[0] != ended[1] or one[1] != other[1]:
                in_correct = False
        begun = starts(last_gold, one), starts(last_said, other)
        if all(begun) and one[1] == other[1]:
            in_correct = True
        if begun[0]:
            add(one[1], 0)
        if begun[1]:
            add(other[1], 1)
        last_gold, last_said = one, other
    return counts


NAMES = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER", "E-PER", "S-LOC"]


def test_metrics_are_those_of_conlleval():
    rng = random.Random(0)
    features = FeatureSet.of([[Features([1], [0], [1.0])]] * 300)
    metrics, counts = TagMetrics(NAMES, features), {}
    for row in range(300):
        gold = [rng.choice(NAMES) for _ in range(rng.randint(1, 12))]
        said = [tag if rng.random() < 0.7 else rng.choice(NAMES) for tag in gold]
        for kind, found in conlleval(gold, said).items():
            counts[kind] = [a + b for a, b in zip(counts.get(kind, [0, 0, 0]), found, strict=True)]
        logits = torch.nn.functional.one_hot(torch.tensor([NAMES.index(tag) for tag in said]), len(NAMES)).float()
        targets = torch.tensor([NAMES.index(tag) for tag in gold])
        metrics.update(Scores(logits, targets, torch.ones(len(gold)), torch.full((len(gold),), row)))
    values = metrics.compute()
    of_gold, predicted, both = (sum(column) for column in zip(*counts.values(), strict=True))
    assert values["precision"] == pytest.approx(both / predicted, abs=1e-12)
    assert values["recall"] == pytest.approx(both / of_gold, abs=1e-12)
    assert values["f1"] == pytest.approx(2 * both / (of_gold + predicted), abs=1e-12)
    assert 0.3 < values["f1"] < 0.9
    for kind, (g, s, b) in counts.items():
        assert values[f"f1_{kind}"] == pytest.approx(2 * b / (g + s), abs=1e-12)


def test_tags_of_words_alone_are_no_spans():
    assert not tagged(["NOUN", "VERB", "O"])
    assert not tagged(["O"])
    assert not tagged(["I-PER", "X"])
    assert tagged(["O", "I-PER"])
    assert types_of(["O", "B-PER", "I-PER", "B-LOC"]) == ["LOC", "PER"]
