"""How the rows of a batch become the positions that a model computes: padded, bucketed by length, or flat.

Flat computes real tokens only, in batches of any rows, and is the default wherever a model allows it and is seen to
give the same answers.  Bucketed pads rows of about one length; its batches are less random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ftkit.attention import Flat, Unsupported
from ftkit.data.batches import collate, segments
from ftkit.data.features import FeatureSet
from ftkit.data.types import Features
from ftkit.errors import RecipeError
from ftkit.methods.modules import embedding_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ftkit.data.types import Scores
    from ftkit.loop import Trainee
    from ftkit.recipe.spec import Recipe
    from ftkit.report import Reporter

# Largest difference between flat and separate rows, relative to the largest logit: sums in another order, over layers.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EXPECTED = (Unsupported, RuntimeError, ValueError, TypeError, AttributeError, IndexError)  # of code that is made for rows side by side
TRIED_TOKENS = (12, 7)  # in the rows of the trial, at most


def flat(asked: str, otherwise: str, recipe: Recipe, model: PreTrainedModel, report: Reporter) -> Flat | None:
    """The model's flat layers, where they are asked for or allowed (`auto`) and the architecture has what it takes.

    Raises RecipeError where they are asked for and it has not.
    """
    if asked not in ("auto", "flat"):
        return None
    try:
        return _flat(recipe, model)
    except Unsupported as error:
        _refuse(asked, otherwise, model, str(error), report)
        return None


def _flat(recipe: Recipe, model: PreTrainedModel) -> Flat:
    if recipe.model.attention:
        raise Unsupported(f"model.attention: {recipe.model.attention} asks for another attention function")
    return Flat(model, recipe.train.fast_dropout, recipe.train.fast_attention, recipe.train.round_batches)


def flat_beside(trainee: Trainee, recipe: Recipe, report: Reporter) -> Flat | None:
    """The flat layers of the model that reads rows before a flat one does, if there is such a model and it has what they take."""
    if trainee.flat is None or not hasattr(recipe.task, "prior"):
        return None
    companion: Any = trainee.beside
    try:
        return _flat(recipe, companion)
    except Unsupported as error:
        report.note(f"the {recipe.task.companion} computes padding, too: {type(companion).__name__}: {error}")  # type: ignore[attr-defined]
        return None


def foreseen(recipe: Recipe, skeleton: PreTrainedModel) -> tuple[str, str | None]:
    """The layout that a run will have, and why not flat, as far as a model without weights can tell: the run tries it."""
    if recipe.train.layout not in ("auto", "flat"):
        return recipe.train.layout, None
    mask = np.array([[1, 1, 1], [1, 1, 0]])
    ids = torch.from_numpy(mask).to("meta")
    try:
        with _flat(recipe, skeleton).rows(segments(mask).to("meta")):
            skeleton.base_model(input_ids=ids, attention_mask=ids)
    except Unsupported as error:
        return "bucketed", str(error)
    except EXPECTED:  # some kernels take no tensors without data
        pass
    return "flat", None


def tried(asked: str, otherwise: str, trainee: Trainee, features: FeatureSet, pad_token_id: int, precision: str, report: Reporter) -> str:
    """The layout that the run will have: flat only where the trial below finds nothing, else `otherwise`, where not flat is allowed.

    Takes the model off flat again where rows get other answers than alone, or feel what is in the row beside them,
    or where its code expects rows side by side.
    """
    if trainee.flat is None:
        return otherwise if asked == "auto" else asked
    device = next(trainee.parameters()).device
    # float32 wherever the weights are: in it, a row that sees a little of another one shows most clearly
    mixed = device.type == "cuda" or any(parameter.dtype not in (torch.float32, torch.uint8) for parameter in trainee.parameters())
    autocast = torch.autocast(device.type, DTYPES[precision], enabled=mixed and DTYPES[precision] is not torch.float32)
    try:
        with autocast:
            _try(trainee, trainee.flat, two_rows(features), pad_token_id, DTYPES[precision] if autocast._enabled else torch.float32)
        return "flat"
    except torch.OutOfMemoryError:
        raise
    except EXPECTED as error:
        reason = first_line(error)
    model = trainee.flat.model
    for part in (trainee.flat, trainee.flat_beside):
        if part is not None:
            part.remove()
    trainee.flat = trainee.flat_beside = None
    _refuse(asked, otherwise, model, reason, report)
    return otherwise


def _refuse(asked: str, otherwise: str, model: PreTrainedModel, reason: str, report: Reporter) -> None:
    """Say why it is not flat, or stop where that is asked for."""
    if asked == "flat":
        raise impossible(model, reason)
    how = "bucketed by length and padded" if otherwise == "bucketed" else otherwise
    report.note(f"rows are {how}; without padding (layout: flat) is impossible here: {type(model).__name__}: {reason}")


def impossible(model: PreTrainedModel, reason: str) -> RecipeError:
    """What a recipe is told that asks for flat."""
    return RecipeError(f"train.layout: flat is impossible here ({type(model).__name__}: {reason}); use layout: bucketed")


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def coarsest(trainee: Trainee, arithmetic: torch.dtype) -> torch.dtype:
    """Of the types at work, that in which two ways to add the same differ most."""
    used = {parameter.dtype for parameter in trainee.parameters()} | {arithmetic}
    return max((dtype if dtype in TOLERANCE else torch.bfloat16 for dtype in used), key=lambda dtype: torch.finfo(dtype).eps)  # that of few bits, perhaps


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest one, relative to the largest number of the other; infinite between tensors of different shapes."""
    if one.shape != other.shape:
        return float("inf")
    return ((one - other).abs().max() / other.abs().max().clamp(min=1e-12)).item()


def within(off: float, dtype: torch.dtype, model: PreTrainedModel, compute: Callable[[], list[torch.Tensor]]) -> float:
    """The difference that rounding explains: TOLERANCE, or, where `off` is more than that, twice what `compute` differs by for other roundings.

    It is computed again with embeddings of tokens that are half a unit of their last place larger and smaller, in turns:
    then most sums on the way are rounded otherwise.  Of Llamas of 32 layers with random weights in bfloat16, logits
    differ by 6 % of the largest.
    """
    if off <= TOLERANCE[dtype]:
        return TOLERANCE[dtype]

    def nudged(embedding: nn.Module, args: tuple[Any, ...], states: torch.Tensor) -> torch.Tensor:
        signs = 1 - 2 * (torch.arange(states.shape[-1], device=states.device) % 2)
        return (states * (1 + signs * torch.finfo(dtype).eps / 2)).to(states.dtype)

    usual = compute()
    hook = embedding_of(model).register_forward_hook(nudged)
    try:
        return max(TOLERANCE[dtype], 2 * max(map(difference, compute(), usual)))
    finally:
        hook.remove()


def _try(trainee: Trainee, flat: Flat, rows: FeatureSet, pad_token_id: int, arithmetic: torch.dtype) -> None:
    """Raise Unsupported if one of two rows, computed flat, feels other tokens in the row beside it, or gets another answer than alone.

    The first has no tolerance: what a row does not see cannot change a bit of its numbers.  Only experts, which take
    tokens of all rows together, may add in another order.
    """
    dtype = coarsest(trainee, arithmetic)

    def said(features: FeatureSet, *indices: int) -> list[torch.Tensor]:
        return logits(trainee, features, indices, pad_token_id)

    def alone() -> list[torch.Tensor]:
        with flat.off():
            return [said(rows, index)[0] for index in (0, 1)]

    was_training = trainee.training
    trainee.eval()
    with torch.no_grad():
        together = said(rows, 0, 1)
        experts = any("expert" in name for name in flat.model.config.to_dict())
        for changed in (0, 1):
            others = said(_with_other_tokens(rows, changed), 0, 1)
            felt = difference(others[1 - changed], together[1 - changed])
            if felt > (TOLERANCE[dtype] / 100 if experts else 0):
                raise Unsupported(f"rows feel what is in the row beside them (by {felt:.1g} of the largest logit)")
        off = max(map(difference, together, alone()))
        limit = within(off, dtype, flat.model, alone)
    trainee.train(was_training)
    if not off <= limit:
        raise Unsupported(f"rows get other answers than alone (by {off:.1g} of the largest logit, more than {limit:g})")


def logits(trainee: Trainee, features: FeatureSet, indices: Sequence[int], pad_token_id: int) -> list[torch.Tensor]:
    """Those of each of these rows, computed in one batch, for the classes that it has: float32, one after the other."""
    found: list[torch.Tensor] = []
    owners: list[torch.Tensor] = []

    def judge(parts: Iterator[Scores]) -> None:
        for scores in parts:
            found.append(scores.logits.float().flatten())
            owners.append(scores.rows.repeat_interleave(scores.logits[:1].numel()))

    device = next(trainee.parameters()).device
    trainee(collate(features, np.array(indices), pad_token_id).to(device), judge)
    of_rows = [torch.cat(found)[torch.cat(owners) == index] for index in indices]
    return [each[each != -torch.inf] for each in of_rows]  # a shorter row has fewer positions


def two_rows(features: FeatureSet) -> FeatureSet:
    """The beginnings of the two longest rows, cut to different lengths, with everything in them supervised."""
    longest = int(features.lengths.argmax())
    others = [start + int(part.argmax()) for start, part in ((0, features.lengths[:longest]), (longest + 1, features.lengths[longest + 1 :])) if len(part)]
    chosen, limit = [], TRIED_TOKENS[0]
    for index in (longest, max(others, key=features.lengths.__getitem__, default=longest)):
        row = features.get(index)
        cut = row["texts"].clip(max=limit).tolist()
        starts = np.cumsum([0, *row["texts"][:-1]])
        tokens = np.concatenate([start + np.arange(length) for start, length in zip(starts, cut, strict=True)])
        width = features.width
        targets = row["targets"] if features.per_row else row["targets"][: len(tokens) * width]
        types = None if row["token_type_ids"] is None else row["token_type_ids"][tokens].tolist()
        texts = None if features.texts is None else cut
        chosen.append(Features(row["input_ids"][tokens].tolist(), targets.tolist(), [1.0] * (len(targets) // width), types, apart=features.apart, texts=texts))
        limit = min(TRIED_TOKENS[1], max(1, max(cut) - 1))
    return FeatureSet.of([[row] for row in chosen])


def _with_other_tokens(rows: FeatureSet, index: int) -> FeatureSet:
    """The same rows, with the tokens of one of them in the reverse order and its first one from the other row: other tokens, none unknown to the model."""
    ids = rows.input_ids[:].copy()
    own = slice(rows.offsets[index], rows.offsets[index + 1])
    ids[own] = ids[own][::-1]
    ids[own.start] = ids[rows.offsets[1 - index + 1] - 1]
    return replace(rows, input_ids=ids)
