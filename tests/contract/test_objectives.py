"""Every built-in objective keeps the contract; objectives with the usual mistakes do not."""

from typing import ClassVar, Literal

import pytest
import torch
from torch.nn import functional as F
from transformers.trainer_pt_utils import LabelSmoother

from ftkit import plugins
from ftkit.data.types import Scores
from ftkit.objectives.supervised import Supervised
from ftkit.recipe.spec import Spec, option
from ftkit.testing import check_objective

SETTINGS = {"distill": {"teacher": "runs/teacher"}}


@pytest.mark.parametrize("kind", plugins.BUILTIN["objective"])
def test_an_objective_keeps_the_contract(kind):
    check_objective(plugins.find("objective", kind)(**SETTINGS.get(kind, {})))


def test_smoothed_labels_keep_the_contract():
    check_objective(Supervised(label_smoothing=0.1))


def test_smoothed_labels_are_those_of_transformers():
    torch.manual_seed(0)
    logits, targets = torch.randn(1, 12, 7, dtype=torch.float64).float(), torch.randint(7, (1, 12))
    theirs = LabelSmoother(epsilon=0.2)({"logits": logits}, targets.masked_fill(torch.arange(12) < 3, -100))  # a mean over the 9 that count
    weights = (torch.arange(12) >= 3).float()
    ours = Supervised(label_smoothing=0.2).loss(Scores(logits[0], targets[0], weights, torch.arange(12)))
    assert ours.item() / 9 == pytest.approx(theirs.item(), rel=1e-6)
    assert Supervised().loss(Scores(logits[0], targets[0], weights, torch.arange(12))).item() != pytest.approx(ours.item(), rel=1e-3)


class Broken(Spec):
    """Cross-entropy with the mistakes below."""

    kind: Literal["broken"] = "broken"
    in_chunks: bool = option(True, "as the built-in objective")
    label_smoothing: ClassVar[float | None] = None


class Mean(Broken):
    """Averages."""

    def loss(self, scores: Scores) -> torch.Tensor:
        return F.cross_entropy(scores.logits.float(), scores.targets)


class Unweighted(Broken):
    """Forgets the weights."""

    def loss(self, scores: Scores) -> torch.Tensor:
        return F.cross_entropy(scores.logits.float(), scores.targets, reduction="sum")


class Silent(Spec):
    """Does not say whether its items may be computed apart."""

    kind: Literal["silent"] = "silent"


class Vague(Spec):
    """Does not say whether it may be computed for some of the classes."""

    kind: Literal["vague"] = "vague"
    in_chunks: bool = option(True, "as the built-in objective")


class Cut(Broken):
    """Gives a constant where there is no item."""

    def loss(self, scores: Scores) -> torch.Tensor:
        losses = F.cross_entropy(scores.logits.float(), scores.targets, reduction="none") * scores.weights
        return losses.sum() if len(losses) else torch.zeros(())


class Half(Broken):
    """Computes in whatever dtype the logits have."""

    def loss(self, scores: Scores) -> torch.Tensor:
        return (F.cross_entropy(scores.logits, scores.targets, reduction="none") * scores.weights.to(scores.logits.dtype)).sum()


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        (Mean(), "return the sum, not the mean"),
        (Silent(), "does not say whether it is computed in_chunks"),
        (Vague(), "does not say whether it is a cross-entropy with the targets"),
        (Unweighted(), "multiply each item by its weight"),
        (Cut(), "of no item has no gradient"),
        (Half(), "compute it in float32"),
    ],
    ids=["mean", "silent", "vague", "unweighted", "cut", "half"],
)
def test_a_broken_objective_is_told_what_to_change(objective, told):
    with pytest.raises(AssertionError, match=told):
        check_objective(objective)
