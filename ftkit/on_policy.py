"""On-policy distillation (GKD, arXiv 2306.13649): of some rows the student writes the answer itself, and learns what the teacher says of that.

Which rows these are depends on seed, epoch and row alone.  What the student writes is sampled from all that it says, at temperature 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch

from ftkit.data.batches import collate
from ftkit.data.features import FeatureSet
from ftkit.data.types import Features
from ftkit.errors import RecipeError
from ftkit.recipe.spec import Generation
from ftkit.tasks.language_model import UNCHANGED

if TYPE_CHECKING:
    from ftkit.data.features import Example
    from ftkit.data.types import Batch, Row
    from ftkit.recipe.spec import Recipe
    from ftkit.session import Session


def wanted(recipe: Recipe) -> bool:
    """Whether the student writes any answers."""
    return bool(getattr(recipe.objective, "on_policy", 0))


def check(recipe: Recipe, row: Row) -> None:
    """Refuse rows without prompts, weights that no process has as a whole, and a budget of memory for rows as they are; `row` is one of training."""
    if not wanted(recipe):
        return
    if not {"prompt", "messages"} & row.values.keys():
        raise RecipeError("objective.on_policy: plain text has no prompt that the student could answer; give rows with prompts or messages, or leave it out")
    if isinstance(recipe.train.gradient_checkpointing, str):
        raise RecipeError("train.gradient_checkpointing: what layers keep is measured on the data's answers, and those of objective.on_policy vary; give true")
    if recipe.train.parallel == "fsdp":
        raise RecipeError("objective.on_policy: the student writes with whole weights, which train.parallel: fsdp shares out; use parallel: ddp")


def lengths(recipe: Recipe, features: FeatureSet, longest: int) -> np.ndarray:
    """int32 [n]: tokens that each feature may have, so that batches of so many tokens hold what the student may write."""
    if not wanted(recipe):
        return features.lengths
    return np.minimum(features.lengths + recipe.objective.max_new_tokens, np.int32(longest)).astype(np.int32)


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
        begins = [_begin(example) if batch.weights[place].any() else 0 for place, example in enumerate(examples)]
        chosen = [place for place, i in enumerate(indices) if begins[place] and self.chooses(epoch, int(i))]  # one token is what truncation left of a prompt
        if not chosen:
            return batch
        made = [_features(example) for example in examples]
        prompts = [examples[place]["input_ids"][: begins[place] + 1].tolist() for place in chosen]
        for place, prompt, answer in zip(chosen, prompts, self._answers(prompts), strict=True):
            made[place] = _answered(prompt, answer, float(examples[place]["weights"][len(prompt) - 1]))
        order = np.argsort([len(each.input_ids) for each in made], kind="stable")  # as `split` has them
        done = collate(FeatureSet.of([made[place]] for place in order), np.arange(len(made)), self.session.pad_token_id)
        return replace(done, row_ids=batch.row_ids[order], written=torch.from_numpy(np.isin(order, chosen)))

    def _answers(self, prompts: list[list[int]]) -> list[list[int]]:
        """Tokens, with that which ends the answer if the student came to it."""
        session, model = self.session, cast("Any", self.session.trainee.model.eval())
        most, longest = session.recipe.objective.max_new_tokens, session.limits.max_length + 1  # the last token is only a target
        sampled = Generation(max_new_tokens=most, temperature=1.0, top_p=1.0)
        no_tokens = range(len(session.tokenizer), model.config.get_text_config().vocab_size)  # which fill up the student's vocabulary, not the teacher's
        with session.accelerator.autocast():
            return session.recipe.task.continuations(
                model,
                session.tokenizer,
                prompts,
                lambda prompt: min(most, longest - len(prompt)),
                sampled,
                **UNCHANGED,
                suppress_tokens=list(no_tokens) or None,
            )


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
