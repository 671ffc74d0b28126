"""How the rows of a batch become the positions that a model computes: padded, bucketed by length, or flat.

Flat computes real tokens only, in batches of any rows, and is the default wherever a model allows it and is seen to
give the same answers.  Bucketed pads rows of about one length; its batches are less random.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ftkit.attention import Flat, Unsupported
from ftkit.data.batches import collate, segments
from ftkit.data.features import FeatureSet
from ftkit.data.types import Features
from ftkit.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ftkit.loop import Trainee
    from ftkit.recipe.spec import Recipe
    from ftkit.report import Reporter

# Largest difference between flat and separate rows, relative to the largest logit: sums in another order, over layers.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EXPECTED = (Unsupported, RuntimeError, ValueError, TypeError, AttributeError, IndexError)  # of code that is made for rows side by side
TRIED_TOKENS = (12, 7)  # in the rows of the trial, at most


def flat(asked: str, recipe: Recipe, model: PreTrainedModel, report: Reporter) -> Flat | None:
    """The model's flat layers, where they are asked for or allowed (`auto`) and the architecture has what it takes.

    Raises RecipeError where they are asked for and it has not.
    """
    if asked not in ("auto", "flat"):
        return None
    try:
        return _flat(recipe, model)
    except Unsupported as error:
        _refuse(asked, model, str(error), report)
        return None


def _flat(recipe: Recipe, model: PreTrainedModel) -> Flat:
    if recipe.model.attention:
        raise Unsupported(f"model.attention: {recipe.model.attention} asks for another attention function")
    return Flat(model)


def foreseen(recipe: Recipe, skeleton: PreTrainedModel) -> tuple[str, str | None]:
    """The layout that a run will have, and why not flat, as far as a model without weights can tell."""
    if recipe.train.layout not in ("auto", "flat"):
        return recipe.train.layout, None
    mask = np.array([[1, 1, 1], [1, 1, 0]])
    ids = torch.from_numpy(mask).to("meta")
    try:
        with _flat(recipe, skeleton).rows(segments(mask).to("meta")):
            skeleton.base_model(input_ids=ids, attention_mask=ids)
    except EXPECTED as error:
        return "bucketed", _first_line(error)
    return "flat", None


def tried(asked: str, trainee: Trainee, features: FeatureSet, pad_token_id: int, device: torch.device, precision: str, report: Reporter) -> str:
    """The layout that the run will have: flat only where two rows get the same answers as each does alone, by the model's own eager attention.

    Takes the model off flat again where they do not, or where its code expects rows side by side.
    """
    if trainee.flat is None:
        return "bucketed" if asked == "auto" else asked
    # float32 wherever the weights are: in it, a row that sees a little of another one shows most clearly
    autocast = torch.autocast(device.type, DTYPES[precision], enabled=device.type == "cuda" and precision != "fp32")
    used = {parameter.dtype for parameter in trainee.parameters()} | ({DTYPES[precision]} if autocast._enabled else set())
    tolerance = max(TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]) for dtype in used)  # weights in few bits are computed in bfloat16, perhaps
    try:
        with autocast:
            difference = _difference(trainee, trainee.flat, _two_rows(features), pad_token_id, device)
        if difference <= tolerance:
            return "flat"
        reason = f"rows get other answers than alone (by {difference:.1g} of the largest, more than {tolerance:g})"
    except torch.OutOfMemoryError:
        raise
    except EXPECTED as error:
        reason = _first_line(error)
    model = trainee.flat.model
    trainee.flat.remove()
    trainee.flat = None
    _refuse(asked, model, reason, report)
    return "bucketed"


def _refuse(asked: str, model: PreTrainedModel, reason: str, report: Reporter) -> None:
    """Say why it is not flat, or stop where that is asked for."""
    if asked == "flat":
        raise RecipeError(f"train.layout: flat is impossible here ({type(model).__name__}: {reason}); use layout: bucketed")
    report.note(f"rows are bucketed by length and padded; without padding (layout: flat) is impossible here: {type(model).__name__}: {reason}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _difference(trainee: Trainee, flat: Flat, rows: FeatureSet, pad_token_id: int, device: torch.device) -> float:
    """The largest difference of a logit between two rows computed flat and each alone, relative to the largest logit."""

    def said(*indices: int) -> torch.Tensor:
        logits: list[torch.Tensor] = []
        trainee(collate(rows, np.array(indices), pad_token_id).to(device), lambda parts: logits.extend(scores.logits.float() for scores in parts))
        return torch.cat(logits)

    was_training = trainee.training
    trainee.eval()
    with torch.no_grad():
        together = said(0, 1)
        with flat.off():
            apart = torch.cat([said(0), said(1)])
    trainee.train(was_training)
    return ((together - apart).abs().max() / apart.abs().max().clamp(min=1e-12)).item()


def _two_rows(features: FeatureSet) -> FeatureSet:
    """The beginnings of the two longest rows, cut to different lengths, with everything in them supervised."""
    order = np.argsort(-features.lengths, kind="stable")
    chosen, limit = [], TRIED_TOKENS[0]
    for index in (order[0], order[min(1, len(order) - 1)]):
        row = features.get(int(index))
        tokens = slice(min(limit, len(row["input_ids"])))
        targets = row["targets"] if features.per_row else row["targets"][tokens]
        types = None if row["token_type_ids"] is None else row["token_type_ids"][tokens].tolist()
        chosen.append(Features(row["input_ids"][tokens].tolist(), targets.tolist(), [1.0] * len(targets), types))
        limit = min(TRIED_TOKENS[1], max(1, tokens.stop - 1))
    return FeatureSet.of([[row] for row in chosen])
