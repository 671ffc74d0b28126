"""A cross-encoder learns relevance by binary cross-entropy, and is measured by the order it gives to the texts of a query."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from ftkit.data.types import Limits, Row, RowError, Scores
from ftkit.objectives.supervised import Supervised
from ftkit.tasks.reranking import Reranking

reference = pytest.importorskip("sklearn.metrics")
TASK = Reranking()


def row(query, text, score):
    return Row({"text": query, "text_pair": text, "score": score}, "rows.jsonl", 1)


def scores(logits, relevance, queries):
    """As the task's items have them; `queries` are texts."""
    targets = torch.tensor([[float(gold), *TASK._target(row(query, "", 0))[1:]] for gold, query in zip(relevance, queries, strict=True)])
    logits = torch.as_tensor(logits, dtype=torch.float32)[:, None]
    return Scores(logits, targets, torch.ones(len(targets)), torch.arange(len(targets)), kind="numbers", losses=TASK._problem.losses)


def test_a_row_says_how_relevant_it_is_and_for_which_query(tokenizers):
    task = Reranking(score_range=[0, 4])
    first, second, third = (
        task.encode(each, tokenizers["wordpiece"], Limits(96, "right"))[0] for each in (row("a", "b", 1), row("a", "c", 4), row("d", "b", 0))
    )
    assert [each.targets[0] for each in (first, second, third)] == [0.25, 1.0, 0.0]
    assert first.targets[1:] == second.targets[1:] != third.targets[1:]
    assert np.float32(first.targets).tolist() == first.targets
    assert len(first.weights) == 1


@pytest.mark.parametrize(("score", "message"), [(2, r"score 2 is outside of task\.score_range: 0 to 1"), ("yes", "score 'yes' is not a number")])
def test_rows_that_cannot_be_used_are_told(score, message, tokenizers):
    with pytest.raises(RowError, match=message):
        TASK.encode(row("a", "b", score), tokenizers["wordpiece"], Limits(96, "right"))
    with pytest.raises(ValidationError, match="lowest score, then the highest"):
        Reranking(score_range=[1, 1])


def test_the_loss_is_binary_cross_entropy():
    said, gold = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 0.0, 0.25])
    expected = torch.nn.BCEWithLogitsLoss()(said, gold).item()
    assert Supervised().loss(scores(said, gold, "aab")).item() / 3 == pytest.approx(expected, rel=1e-6)


def test_texts_are_ranked_within_their_query():
    rng = np.random.default_rng(0)
    said, queries = rng.normal(size=60), [str(i % 4) for i in range(60)]
    gold = (rng.random(60) < 0.3).astype(float)
    gold[3::4] = 0  # of the last query nothing is relevant
    metrics = TASK.metrics([], None)
    for part in np.array_split(rng.permutation(60), 3):
        metrics.update(scores(said[part], gold[part], [queries[i] for i in part]))
    found = metrics.compute()
    of_query = [(said[i::4], gold[i::4]) for i in range(3)]
    places = [1 + np.flatnonzero(own[np.argsort(-numbers)])[0] for numbers, own in of_query]
    assert found["mrr_10"] == pytest.approx(np.mean([1 / place if place <= 10 else 0 for place in places]))
    assert found["ndcg_10"] == pytest.approx(np.mean([reference.ndcg_score([own], [numbers], k=10) for numbers, own in of_query]))
    assert found["auroc"] == pytest.approx(reference.roc_auc_score(gold, said))
    assert found["loss_count"] == 60


def test_graded_relevance_gains_by_its_grade():
    gold, said = [0.5, 1.0, 0.0, 0.25], [3.0, 2.0, 1.0, 0.0]
    metrics = TASK.metrics([], None)
    metrics.update(scores(said, gold, "aaaa"))
    assert metrics.compute()["ndcg_10"] == pytest.approx(reference.ndcg_score([gold], [said], k=10))


def test_a_set_without_an_order_has_no_rank():
    metrics = TASK.metrics([], None)
    metrics.update(scores([1.0, 0.0], [1, 0], "ab"))
    assert metrics.compute().keys() == {"auroc", "loss", "loss_count"}


def test_equal_numbers_are_no_merit():
    metrics = TASK.metrics([], None)
    metrics.update(scores([1.0, 1.0, 1.0], [1, 0, 0], "aaa"))
    assert metrics.compute()["mrr_10"] == pytest.approx(1 / 3)


def test_predict_says_a_probability():
    assert TASK._problem.answers(torch.tensor([[0.0]])) == [{"score": 0.5}]
