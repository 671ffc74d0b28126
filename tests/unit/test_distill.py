"""Distillation: the loss against a direct reference, and what is kept of what a teacher says."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ftkit.data.types import Items, Scores
from ftkit.divergences import divergence
from ftkit.objectives.distill import Distill
from ftkit.objectives.supervised import Supervised
from ftkit.teachers import Cached, Lessons, _most_likely

DIVERGENCES = ["forward", "reverse", "jensen-shannon"]


def scores(kind: str = "classes", n: int = 10, count: int = 5) -> Scores:
    rng = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(n, count, generator=rng) for _ in range(2))
    targets = torch.randint(count, (n,), generator=rng)
    if kind == "labels":
        targets = torch.randint(2, (n, count), generator=rng).float()
    if kind == "positions":  # rows end
        for logits in (student, teacher):
            logits[::2, 3:] = -torch.inf
        targets = targets.clamp(max=2)
    return Scores(student.requires_grad_(), targets, torch.rand(n, generator=rng), torch.arange(n), kind=kind, teacher=teacher)


def distill(**fields) -> Distill:
    return Distill(teacher="runs/teacher", **fields)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_targets_are_those_of_torch(temperature):
    given = scores()
    own, theirs = (logits / temperature for logits in (given.logits, given.teacher))
    soft = temperature**2 * F.kl_div(own.log_softmax(-1), theirs.softmax(-1), reduction="none").sum(-1)
    hard = F.cross_entropy(given.logits, given.targets, reduction="none")
    expected = ((0.3 * hard + 0.7 * soft) * given.weights).sum()
    assert distill(alpha=0.3, temperature=temperature).loss(given).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_other_divergences_are_by_their_definitions():
    given = scores()
    p, q = given.teacher.softmax(-1), given.logits.softmax(-1)
    middle = (p + q) / 2

    def kl(one, other):
        return (one * (one / other).log()).sum(-1)

    for kind, expected in (("forward", kl(p, q)), ("reverse", kl(q, p)), ("jensen-shannon", (kl(p, middle) + kl(q, middle)) / 2)):
        torch.testing.assert_close(divergence(given.logits, given.teacher, 1.0, kind), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_jensen_shannon_is_weighted_as_in_gkd(beta):
    given = scores()
    p, q = given.teacher.softmax(-1).double(), given.logits.softmax(-1).double()
    middle = beta * p + (1 - beta) * q
    expected = beta * (p * (p / middle).log()).sum(-1) + (1 - beta) * (q * (q / middle).log()).sum(-1)
    torch.testing.assert_close(divergence(given.logits, given.teacher, 1.0, "jensen-shannon", beta=beta).double(), expected, rtol=1e-5, atol=1e-6)


def test_what_the_student_wrote_is_no_target():
    given = scores()
    given.written = torch.arange(10) % 3 == 0
    objective = distill(alpha=0.4, temperature=1.0)
    hard = F.cross_entropy(given.logits, given.targets, reduction="none") * ~given.written
    soft = divergence(given.logits, given.teacher, 1.0, "forward")
    assert objective.loss(given).item() == pytest.approx(((0.4 * hard + 0.6 * soft) * given.weights).sum().item(), rel=1e-6)


def test_labels_are_answers_of_their_own():
    given = scores("labels")
    p, q = given.teacher.sigmoid(), given.logits.sigmoid()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean(-1)
    torch.testing.assert_close(divergence(given.logits, given.teacher, 1.0, "forward", independent=True), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_forward_divergence_is_that_of_its_definition(dtype):
    given = scores("positions")
    logits = given.logits.detach().to(dtype).requires_grad_()
    weights = torch.linspace(1, 6, len(logits))
    (divergence(logits, given.teacher, 2.0, "forward") * weights).sum().backward()
    exact = logits.detach().double().requires_grad_()
    own, told = ((each.double() / 2).clamp(min=-1e4).log_softmax(-1) for each in (exact, given.teacher))
    ((told.exp() * (told - own)).sum(-1) * weights.double()).sum().backward()
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_positions_behind_the_end_of_a_row_count_for_nothing(kind):
    given = scores("positions")
    loss = distill(divergence=kind).loss(given)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(given.logits.grad).all()
    assert not given.logits.grad[::2, 3:].any()
    short = divergence(given.logits[::2, :3], given.teacher[::2, :3], 2.0, kind)
    torch.testing.assert_close(divergence(given.logits, given.teacher, 2.0, kind)[::2], short)


@pytest.mark.parametrize("kind", ["classes", "labels", "positions"])
def test_with_the_datas_own_targets_alone_it_is_supervised(kind):
    given = scores(kind)
    assert distill(alpha=1.0).loss(given).item() == pytest.approx(Supervised().loss(given).item(), rel=1e-6)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_student_that_says_the_same_has_no_soft_loss(kind):
    given = scores()
    given.teacher = given.logits.detach()
    assert distill(alpha=0.0, divergence=kind).loss(given).item() == pytest.approx(0.0, abs=1e-5)


def test_tokens_that_do_not_exist_are_not_compared():
    given = scores()
    expected = distill(alpha=0.0).loss(given).item()
    given.logits = F.pad(given.logits, (0, 3), value=9.0)
    assert distill(alpha=0.0).loss(given).item() == expected


def items(n: int, count: int, kind: str = "classes") -> Items:
    return Items(torch.zeros(n, 3), None, count, torch.zeros(n, dtype=torch.int64), torch.ones(n), torch.arange(n), kind=kind)


class Rows:
    """As much of a batch as is asked for."""

    def __init__(self, *indices: int) -> None:
        self.source = (None, np.array(indices))


OWN = Lessons(None, None, 0)


def test_what_was_said_is_found_by_the_features_of_a_batch():
    said = torch.arange(10.0).view(5, 2)
    cached = Cached(OWN, np.array([0, 2, 2, 5]), said, None, 2)
    found = cached.answers(Rows(2, 0), items(6, 2))  # the last one fills the batch up, without weight
    assert found.scores().logits[:5, 0].tolist() == [4, 6, 8, 0, 2]
    assert len(found.states) == 6
    assert len(cached.answers(Rows(0), items(0, 2)).states) == 0  # a process without rows has one of weight 0
    elsewhere = Cached(Lessons(None, np.array([2, 1, 0]), 0), np.array([0, 2, 2, 5]), said, None, 2)
    assert elsewhere.answers(Rows(0), items(3, 2)).states[:, 0].tolist() == [4, 6, 8]
    assert cached.answers(Rows(0), items(2, 1, "positions")).states.shape == (2, 1)  # of shorter rows than the longest


def test_of_many_classes_the_most_likely_are_as_they_were_and_the_others_alike():
    torch.manual_seed(0)
    logits, temperature, k = 3 * torch.randn(4, 40), 2.0, 12
    soft = (logits / temperature).softmax(-1)
    kept, which = _most_likely(logits, k, temperature)
    cached = Cached(OWN, np.array([0, 4]), kept, which.int(), 40)
    again = (cached.answers(Rows(0), items(4, 40)).scores().logits / temperature).softmax(-1)
    top, expected = soft.topk(k)
    assert torch.equal(which, expected)
    torch.testing.assert_close(again.gather(1, which), top)
    torch.testing.assert_close(again.sum(-1), torch.ones(4))
    others = torch.ones(4, 40, dtype=torch.bool).scatter(1, which, False)
    torch.testing.assert_close(again[others].view(4, -1), (1 - top.sum(-1, keepdim=True)).expand(-1, 28) / 28)
