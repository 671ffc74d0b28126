"""Exact match and F1 beside another way to count them, and beside numbers of the official scripts."""

import random
import re

import pytest

from ftkit.tasks.squad import Judged, best_threshold, normalised, score


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Rhine.", "rhine"),
        ("an apple, a pear & THE fig", "apple pear fig"),
        ("theatre", "theatre"),
        ("the-end", "theend"),
        ("a.b", "ab"),
        ("The", ""),
        ("1,234.50", "123450"),
        ("1943년, 서울특별시", "1943년 서울특별시"),
        ("“Bern”", "“bern”"),  # punctuation is that of ASCII
    ],
)
def test_texts_are_compared_without_case_punctuation_and_articles(text, expected):
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("said", "answers", "version", "exact_match", "f1"),
    [
        ("the Rhine", ["Rhine"], 1, 1, 1),
        ("Rhine river", ["Rhine", "the river Rhine"], 1, 0, 1),
        ("in Bern last May", ["Bern"], 1, 0, 0.4),
        ("in Bern last May", ["last year", "May of last year"], 1, 0, 0.5),
        ("Oslo", ["Bern"], 1, 0, 0),
        ("Oslo Oslo", ["Oslo"], 1, 0, 2 / 3),
        ("the", ["The"], 1, 1, 0),
        ("the", ["The"], 2, 1, 1),
        ("", [], 2, 1, 1),
        ("Bern", [], 2, 0, 0),
        ("Bern", [], 1, 0, 0),
        ("", ["Bern"], 2, 0, 0),
        ("서울 에서", ["서울"], 1, 0, 2 / 3),
    ],
)
def test_numbers_are_those_of_the_official_scripts(said, answers, version, exact_match, f1):
    assert score(said, answers, version) == (exact_match, pytest.approx(f1))


def plain_f1(said: str, right: str) -> float:
    """Words crossed out one by one."""
    words = [re.sub(r"[^\w\s]|_", "", text.lower()).split() for text in (said, right)]
    own, others = ([word for word in each if word not in ("a", "an", "the")] for each in words)
    left, both = list(others), 0
    for word in own:
        if word in left:
            left.remove(word)
            both += 1
    precision, recall = (both / len(each) if each else 0 for each in (own, others))
    return 2 * precision * recall / (precision + recall) if both else 0.0


def test_f1_is_that_of_words_crossed_out_one_by_one():
    rng = random.Random(0)
    words = ["The", "old", "Boats,", "boats", "of", "a", "tide", "(tide)", "안녕", "an"]
    for _ in range(500):
        said, *answers = (" ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(rng.randint(2, 4)))
        assert score(said, answers, 1).f1 == pytest.approx(max(plain_f1(said, answer) for answer in answers))


def test_the_best_threshold_is_the_best_of_all():
    rng = random.Random(1)
    for _ in range(100):
        questions = [Judged(rng.uniform(-3, 3), rng.choice([0, 0.5, 1]) if answerable else 0, answerable) for answerable in rng.choices([True, False], k=9)]

        def mean(threshold, questions=questions):
            return sum((not each.answerable) if each.null_margin > threshold else each.score for each in questions) / len(questions)

        best, threshold = best_threshold(questions)
        everywhere = [mean(each) for each in [-10, *(question.null_margin for question in questions)]]
        assert best == pytest.approx(max(everywhere))
        if best > mean(-10):
            assert mean(threshold) == pytest.approx(best)
