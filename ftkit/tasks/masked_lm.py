"""Masked language modelling: which tokens stood where some are hidden; pre-training and further pre-training of encoders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftkit.data.types import Features, Limits, Row
from ftkit.errors import DataError
from ftkit.recipe.spec import Generation, option
from ftkit.tasks import language_model
from ftkit.tasks.language_model import LanguageModelMetrics
from ftkit.tasks.masked_text import PackedText

if TYPE_CHECKING:
    import torch

    from ftkit.data.features import FeatureSet
    from ftkit.data.types import Batch, Items, Scores

BEST = 5  # tokens among which a right one counts for accuracy_5


class MaskedLM(PackedText):
    """Which tokens stood where some are hidden."""

    kind: Literal["masked-lm"] = "masked-lm"
    top_k: int = option(5, "tokens that predict gives for each mask", "transformers' fill-mask pipeline", ge=1)

    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    metric_names: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "accuracy", "accuracy_5")
    main_metric: ClassVar[str] = "loss"

    def items(self, model: Any, batch: Batch) -> Items:
        """The n supervised positions before the output head, its dense layer included: it never sees the others."""
        return language_model.of_one_stack(batch, model, **batch.inputs)

    def metrics(self, rows: Sequence[Row], features: FeatureSet) -> MaskedMetrics:
        return MaskedMetrics()

    def records(self, parts: Iterable[Scores]) -> list[dict[str, Any]]:
        return language_model.records(parts)

    def predict(self, model: Any, tokenizer: Any, rows: list[Row], limits: Limits, generation: Generation) -> list[dict[str, Any]]:
        """`masks`: for each mask token of a text the likeliest tokens, with their probabilities; `text`: with the likeliest ones in their places.

        Of a text that is too long the beginning is read: `truncated` says how many tokens were not.
        """
        import numpy as np
        import torch

        from ftkit import chunks, prompts
        from ftkit.data.batches import collate
        from ftkit.data.features import FeatureSet

        frame = self._frame(tokenizer)
        whole = [self._asked(row, tokenizer) for row in rows]
        read = [ids[: limits.max_length - frame.size] for ids in whole]
        asked = [frame.around(Features(ids, [0] * len(ids), [float(token == tokenizer.mask_token_id) for token in ids])) for ids in read]
        batch = collate(FeatureSet.of([each] for each in asked), np.arange(len(asked)), tokenizer.pad_token_id).to(model.device)
        found: list[list[list[dict[str, Any]]]] = [[] for _ in rows]
        best: list[list[int]] = [[] for _ in rows]
        with torch.inference_mode(), prompts.given(model, batch) as given:
            for scores in chunks.scores(self.items(model, given)):
                likeliest = scores.logits.float().softmax(-1).topk(min(self.top_k, scores.logits.shape[-1]))
                for row, probabilities, tokens in zip(*(part.tolist() for part in (scores.rows, *likeliest)), strict=True):
                    found[row].append([{"token": tokenizer.decode([token]), "probability": p} for token, p in zip(tokens, probabilities, strict=True)])
                    best[row].append(tokens[0])
        answers = []
        for ids, seen, masks, fillings in zip(whole, read, found, best, strict=True):
            fill = iter(fillings)
            filled = [next(fill, token) if token == tokenizer.mask_token_id else token for token in ids]
            answer = {"text": tokenizer.decode(filled), "masks": masks}
            answers.append(answer | ({"truncated": len(ids) - len(seen)} if len(seen) < len(ids) else {}))
        return answers

    def _asked(self, row: Row, tokenizer: Any) -> list[int]:
        """The tokens of a text with masks."""
        ids: list[int] = tokenizer(row.values["text"], add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.mask_token_id not in ids:
            raise DataError(f"{row.where}: the text has no {tokenizer.mask_token}, in the place of which something could be said")
        return ids


class MaskedMetrics(LanguageModelMetrics):
    """Of the hidden tokens: loss, perplexity, and how many are the likeliest, or among the five likeliest."""

    def __init__(self) -> None:
        super().__init__()
        self.sums["among"] = self.sums["correct"].clone()

    def update(self, scores: Scores) -> None:
        super().update(scores)
        of_target: torch.Tensor = scores.logits.gather(1, scores.targets[:, None])
        among = (scores.logits > of_target).sum(1) < BEST
        self.sums["among"] += (among.double() * scores.weights.double()).sum().cpu()

    def compute(self) -> dict[str, float]:
        values = super().compute()
        accuracy = values.pop("token_accuracy")
        return values | {"accuracy": accuracy, "accuracy_5": (self.sums["among"] / self.sums["count"]).item()}
