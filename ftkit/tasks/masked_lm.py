"""Masked language modelling: which tokens stood where some are hidden; pre-training and further pre-training of encoders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from weakref import WeakKeyDictionary

from pydantic import model_validator

from ftkit.data.types import Features, Limits, Row, RowError
from ftkit.errors import DataError, RecipeError
from ftkit.recipe.spec import Default, Generation, Spec, option
from ftkit.tasks import Column, Shape, language_model
from ftkit.tasks.language_model import LanguageModelMetrics
from ftkit.tasks.packing import Frame, cut, packed

if TYPE_CHECKING:
    import torch

    from ftkit.data.features import Corruption
    from ftkit.data.types import Batch, Items, Scores, Targets

TEXT = Column("text", "plain text", "content", "document", "sentence")

EXAMPLES = (
    "Bees make honey and wax in the old tree.",
    "A week has seven days.",
    "The whale swam far out into the quiet sea.",
    "Ice is frozen water.",
    "Spring follows winter, and the snow melts.",
    "The clock on the tower shows the time.",
    "A baker bakes bread early in the morning.",
    "Rain and snow fall from clouds.",
    "The spider has eight legs and a fine web.",
    "Acorns grow on an oak.",
    "An anchor keeps the boat in its place.",
    "The sun rises over the hills.",
)
BEST = 5  # tokens among which a right one counts for accuracy_5


class Replacement(Spec):
    """What stands for hidden tokens; the rest of them is seen as it is."""

    mask: float = option(0.8, "share that the mask token stands for", "BERT (arXiv 1810.04805, A.1)", ge=0, le=1)
    random: float = option(0.1, "share that any other token stands for", "BERT (arXiv 1810.04805, A.1)", ge=0, le=1)

    @model_validator(mode="after")
    def _within_one(self) -> Replacement:
        if self.mask + self.random > 1 + 1e-9:
            raise ValueError(f"replace.mask and replace.random are shares of the hidden tokens, and {self.mask:g} + {self.random:g} is more than 1")
        return self


class MaskedLM(Spec):
    """Which tokens stood where some are hidden."""

    kind: Literal["masked-lm"] = "masked-lm"
    probability: float = option(0.15, "share of the tokens that are hidden", "BERT (arXiv 1810.04805, 3.1)", gt=0, lt=1)
    unit: Literal["token", "whole-word", "span"] = option(
        "token", "what is hidden together: a token, a word, or a span of words (SpanBERT, arXiv 1907.10529)", "BERT (arXiv 1810.04805)"
    )
    masking: Literal["dynamic", "static"] = option(
        "dynamic", "other tokens in each epoch, or the same in all; those that are measured are always the same", "RoBERTa (arXiv 1907.11692, 4.1)"
    )
    replace: Replacement = option({}, "what stands for hidden tokens", validate_default=True)
    packing: Literal["doc-sentences", "full-sentences", "lines"] = option(
        "doc-sentences",
        "an input is as many whole lines as fit, of one document (a txt file, or a row of other formats) or of several; or lines: a row, a line of a txt file",
        "RoBERTa (arXiv 1907.11692, table 2)",
    )
    top_k: int = option(5, "tokens that predict gives for each mask", "transformers' fill-mask pipeline", ge=1)

    shapes: ClassVar[tuple[Shape, ...]] = (Shape(TEXT),)
    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    peft_type: ClassVar[str] = "FEATURE_EXTRACTION"  # PEFT has no name for it; its model of that name hands inputs and outputs on as they are
    targets: ClassVar[Targets] = "classes"
    new_head: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Default]] = {
        "data.max_length": Default(512, "the positions of BERT (arXiv 1810.04805)"),
    }
    metric_names: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "accuracy", "accuracy_5")
    main_metric: ClassVar[str] = "loss"

    @property
    def txt_row(self) -> str:
        return "line" if self.packing == "lines" else "file"

    def examples(self) -> list[dict[str, Any]]:
        return [{"text": text} for text in EXAMPLES]

    def resolve(self, rows: Iterable[Row]) -> MaskedLM:
        return self

    def check(self, tokenizer: Any) -> None:
        """Refuse a tokenizer that cannot hide tokens, or does not tell words where these are wanted."""
        name = tokenizer.name_or_path or "this run"
        if tokenizer.mask_token_id is None:
            raise RecipeError(
                f"task {self.kind}: the tokenizer of {name} has no mask token (mask_token), so nothing can be hidden; "
                "name one that has (model.tokenizer: that of an encoder such as BERT), or train one: {train: data, kind: wordpiece}"
            )
        if self.unit != "token" and not getattr(tokenizer, "is_fast", False):
            raise RecipeError(
                f"task.unit: {self.unit}: the tokenizer of {name} does not say which tokens make up a word; "
                "use unit: token, or a tokenizer that is made by the tokenizers library (a tokenizer.json)"
            )

    def config_kwargs(self) -> dict[str, Any]:
        return {}

    def encode(self, row: Row, tokenizer: Any, limits: Limits) -> list[Features]:
        """Tokens that may be hidden, which are their own targets, and special ones, which may not; a token that goes on with a word has the target ~token.

        `lines`: a row, cut where it is longer than `max_length`.  `doc-sentences`: the lines of a row, as many together
        as fit.  `full-sentences`: its lines by themselves, for `packed`.  `truncation: drop` and `error` look at rows.
        """
        frame = self._frame(tokenizer)
        pieces = self._pieces(row.values["text"], tokenizer)
        if not pieces:
            raise RowError("the text is empty" if not row.values["text"].strip() else "the tokenizer makes no token of the text")
        length = limits.max_length - frame.size
        if limits.truncation in ("drop", "error") and (total := sum(len(piece.input_ids) for piece in pieces)) > length:
            if limits.truncation == "drop":
                return []
            raise RowError(f"{total + frame.size} tokens, more than data.max_length: {limits.max_length}")
        parts = [part for piece in pieces for part in cut(piece, length)]
        if self.packing == "full-sentences":
            return parts
        if self.packing == "doc-sentences":
            parts = [part for _, part in packed(((0, part) for part in parts), length)]
        return [frame.around(part) for part in parts]

    def packed(self, features: Iterable[tuple[int, list[Features]]], tokenizer: Any, limits: Limits) -> Iterator[tuple[int, list[Features]]]:
        """Under `full-sentences` inputs of the lines of successive rows; else as they are."""
        if self.packing != "full-sentences":
            yield from features
            return
        frame = self._frame(tokenizer)
        parts = ((row, part) for row, parts in features for part in parts)
        for row, together in packed(parts, limits.max_length - frame.size, tokenizer.sep_token_id):
            yield row, [frame.around(together)]

    def _pieces(self, text: str, tokenizer: Any) -> list[Features]:
        """The lines of a text, or the text as it is under `packing: lines`, without special tokens around; those without a token are left out."""
        encoded = tokenizer([text] if self.packing == "lines" else text.splitlines() or [""], add_special_tokens=False, verbose=False)
        special = self._frame(tokenizer).special
        pieces = []
        for number, ids in enumerate(encoded["input_ids"]):
            words = range(len(ids)) if self.unit == "token" else encoded.word_ids(number)
            goes_on = [place > 0 and words[place] == words[place - 1] for place in range(len(ids))]
            targets = [~token if on else token for token, on in zip(ids, goes_on, strict=True)]
            pieces.append(Features(ids, targets, [float(token not in special) for token in ids]))
        return [piece for piece in pieces if piece.input_ids]

    def _frame(self, tokenizer: Any) -> Frame:
        """Asked once, not for every row."""
        if tokenizer not in self._frames:
            self._frames[tokenizer] = Frame.of(tokenizer)
        return self._frames[tokenizer]

    @cached_property
    def _frames(self) -> WeakKeyDictionary[Any, Frame]:
        return WeakKeyDictionary()

    def corruption(self, tokenizer: Any, seed: int) -> Corruption:
        """The masks of each feature."""
        import numpy as np

        from ftkit.data.features import Corruption
        from ftkit.tasks.masking import Masking

        others = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
        masking = Masking(self.probability, self.unit, self.replace.mask, self.replace.random, tokenizer.mask_token_id, np.array(others))
        anew = self.masking == "dynamic"
        return Corruption(masking, seed, anew, f"of the supervised tokens {self.probability:.0%} are hidden at a time, and only these count")

    def items(self, model: Any, batch: Batch) -> Items:
        """The n supervised positions before the output head, its dense layer included: it never sees the others."""
        types = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}
        return language_model.of_one_stack(batch, model, attention_mask=batch.attention_mask, **types)

    def complete(self, model: Any, tokenizer: Any) -> None:
        """A masked language model needs nothing beside its weights."""

    def metrics(self) -> MaskedMetrics:
        return MaskedMetrics()

    def records(self, parts: Iterable[Scores]) -> list[dict[str, Any]]:
        return language_model.records(parts)

    def predict(self, model: Any, tokenizer: Any, rows: list[Row], limits: Limits, generation: Generation) -> list[dict[str, Any]]:
        """`masks`: for each mask token of a text the likeliest tokens, with their probabilities; `text`: with the likeliest ones in their places.

        Of a text that is too long the beginning is read: `truncated` says how many tokens were not.
        """
        import numpy as np
        import torch

        from ftkit import chunks
        from ftkit.data.batches import collate
        from ftkit.data.features import FeatureSet

        frame = self._frame(tokenizer)
        whole = [self._asked(row, tokenizer) for row in rows]
        read = [ids[: limits.max_length - frame.size] for ids in whole]
        asked = [frame.around(Features(ids, [0] * len(ids), [float(token == tokenizer.mask_token_id) for token in ids])) for ids in read]
        batch = collate(FeatureSet.of([each] for each in asked), np.arange(len(asked)), tokenizer.pad_token_id).to(model.device)
        found: list[list[list[dict[str, Any]]]] = [[] for _ in rows]
        best: list[list[int]] = [[] for _ in rows]
        with torch.inference_mode():
            for scores in chunks.scores(self.items(model, batch)):
                likeliest = scores.logits.float().softmax(-1).topk(min(self.top_k, scores.logits.shape[-1]))
                for row, probabilities, tokens in zip(*(part.tolist() for part in (scores.rows, *likeliest)), strict=True):
                    found[row].append([{"token": tokenizer.decode([token]), "probability": p} for token, p in zip(tokens, probabilities, strict=True)])
                    best[row].append(tokens[0])
        answers = []
        for ids, seen, masks, fillings in zip(whole, read, found, best, strict=True):
            given = iter(fillings)
            filled = [next(given, token) if token == tokenizer.mask_token_id else token for token in ids]
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
