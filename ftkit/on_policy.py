"""On-policy distillation (GKD, arXiv 2306.13649): of some rows the student writes the answer itself, and learns what the teacher says of that.

Which rows these are depends on seed, epoch and row alone.  What the student writes is sampled from all that it says, at temperature 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ftkit.data.batches import collate
from ftkit.data.features import FeatureSet
from ftkit.data.types import Features
from ftkit.errors import RecipeError
from ftkit.recipe.spec import Generation

if TYPE_CHECKING:
    from ftkit.data.features import Example
    from ftkit.data.types import Batch
    from ftkit.recipe.spec import Recipe
    from ftkit.session import Session


def wanted(recipe: Recipe) -> bool:
    """Whether the student writes any answers."""
    return bool(getattr(recipe.objective, "on_policy", 0))


def check(recipe: Recipe, features: FeatureSet) -> None:
    """Refuse rows without prompts, and weights that no process has as a whole."""
    if not wanted(recipe):
        return
    if features.get(0)["weights"][0]:
        raise RecipeError("objective.on_policy: plain text has no prompt that the student could answer; give rows with prompts or messages, or leave it out")
    if recipe.train.parallel == "fsdp":
        raise RecipeError("objective.on_policy: the student writes with whole weights, which train.parallel: fsdp shares out; use parallel: ddp")


class Author(NamedTuple):
    """The student that writes answers to prompts of its training rows."""

    session: Session

    def chooses(self, epoch: int, feature: int) -> bool:
        """Whether the answer of a row is to be the student's in an epoch."""
        draw = np.random.default_rng((self.session.recipe.train.seed, epoch, feature)).random()
        return bool(draw < self.session.recipe.objective.on_policy)

    def rewritten(self, batch: Batch, epoch: int) -> Batch:
        """The batch with answers of the student's in place of the last ones of some of its rows; what was supervised before these, is not.

        Leaves the student in eval mode if it wrote anything.
        """
        features, indices = batch.source
        examples = [features.get(int(i), epoch) for i in indices]
        chosen = [place for place, i in enumerate(indices) if batch.weights[place].any() and self.chooses(epoch, int(i))]
        if not chosen:
            return batch
        made = [_features(example) for example in examples]
        prompts = [examples[place]["input_ids"][: _begin(examples[place]) + 1].tolist() for place in chosen]
        for place, prompt, answer in zip(chosen, prompts, self._answers(prompts), strict=True):
            made[place] = _answered(prompt, answer, float(examples[place]["weights"][len(prompt) - 1]))
        order = np.argsort([len(each.input_ids) for each in made], kind="stable")  # as `split` has them
        # Behind them one that is in no batch: a set of nothing but rows of one token looks as if rows were classified.
        done = collate(FeatureSet.of([*([made[place]] for place in order), [_answered([0, 0], [0], 0.0)]]), np.arange(len(made)), self.session.pad_token_id)
        return replace(done, row_ids=batch.row_ids[order], written=torch.from_numpy(np.isin(order, chosen)))

    def _answers(self, prompts: list[list[int]]) -> list[list[int]]:
        """Tokens, with that which ends the answer if the student came to it."""
        session, model = self.session, self.session.trainee.model.eval()
        most, longest = session.recipe.objective.max_new_tokens, session.limits.max_length + 1  # the last token is only a target
        sampled = Generation(max_new_tokens=most, temperature=1.0, top_p=1.0)
        with session.accelerator.autocast():
            return session.recipe.task.continuations(model, session.tokenizer, prompts, lambda prompt: min(most, longest - len(prompt)), sampled)


def _begin(example: Example) -> int:
    """The first of the last supervised positions that follow each other."""
    supervised = np.flatnonzero(example["weights"])
    gaps = np.flatnonzero(np.diff(supervised) > 1)
    return int(supervised[gaps[-1] + 1 if len(gaps) else 0])


def _features(example: Example) -> Features:
    return Features(*(example[name].tolist() for name in ("input_ids", "targets", "weights")))


def _answered(prompt: list[int], answer: list[int], weight: float) -> Features:
    whole: list[Any] = [*prompt, *answer]
    return Features(whole[:-1], whole[1:], [0.0] * (len(prompt) - 1) + [weight] * len(answer))
