"""Metrics of written text, by hand and beside the packages that define them."""

import pytest

from ftkit.tasks import text_metrics
from ftkit.tasks.text_metrics import measured, rouge_l

TEXTS = ["the owl lives in a tower", "bees drink nectar", "the fox", "구름 위에 집"]
REFERENCES = ["The owl lives in the old tower.", "Bees make honey and drink nectar.", "A whale lives in the sea.", "구름 아래 집"]


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        # Lin 2004, 3.1: police killed the gunman; LCS 3, 2 and of 4 words each
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("the owl lives in a tower", "The owl lives in the old tower.", 2 * 5 / (6 + 7)),
        ("a b a b", "b a b a b a", 2 * 4 / (4 + 6)),
        ("It's 3-4_x", "it s 3 4 x", 1.0),
        ("구름 위에 집", "구름 아래 집", 2 / 3),
        ("nothing alike", "other words", 0.0),
        ("", "words", 0.0),
        ("...", "!", 0.0),
    ],
)
def test_rouge_l_by_hand(text, reference, expected):
    assert rouge_l(text, reference) == pytest.approx(expected, abs=1e-12)
    assert rouge_l(reference, text) == pytest.approx(expected, abs=1e-12)


def finished(texts):
    return [{"text": text, "finished": True} for text in texts]


def test_of_a_set_rouge_l_is_the_mean():
    found = measured(finished(TEXTS), REFERENCES, ["rouge_l"])
    assert found == {"rouge_l": pytest.approx(sum(map(rouge_l, TEXTS, REFERENCES)) / 4)}


def test_bleu_and_chrf_are_sacrebleus_of_the_whole_set():
    sacrebleu = pytest.importorskip("sacrebleu")
    found = measured(finished(TEXTS), REFERENCES, ["bleu", "chrf", "loss"])
    assert found == {"bleu": sacrebleu.corpus_bleu(TEXTS, [REFERENCES]).score / 100, "chrf": sacrebleu.corpus_chrf(TEXTS, [REFERENCES]).score / 100}
    assert all(0 < value < 1 for value in found.values())
    assert measured(finished(REFERENCES), REFERENCES, list(text_metrics.PACKAGES)) == pytest.approx(dict.fromkeys(text_metrics.PACKAGES, 1))


def test_bleu_by_hand():
    """One text of six words: precisions 5/6, 3/5, 2/4, 1/3, as long as its reference."""
    pytest.importorskip("sacrebleu")
    assert measured(finished(["the cat sat on the mat"]), ["the cat sat on a mat"], ["bleu"])["bleu"] == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_what_is_alike_but_for_white_space_matches_and_what_runs_on_does_not_stop():
    answers = [{"text": " a tower\n", "finished": True}, {"text": "A tower", "finished": True}, {"text": "a  tower", "finished": False}]
    assert measured(answers, ["a tower"] * 3, ["exact_match", "stop_rate"]) == pytest.approx({"exact_match": 2 / 3, "stop_rate": 2 / 3})
