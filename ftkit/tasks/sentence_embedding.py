"""Sentence embedding: a vector for each text, near to those of texts that mean the same (SBERT, arXiv 1908.10084)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from ftkit.data.types import Features, Items, Limits, Row, RowError
from ftkit.errors import DataError
from ftkit.recipe.spec import Default, Generation, Spec, option
from ftkit.tasks import Column, Shape
from ftkit.tasks.classes import name_of, occurring, ordered
from ftkit.tasks.contrast import Contrast, Cosine, InBatch, Order, cosines
from ftkit.tasks.pooling import Pooling, pool, write_layout
from ftkit.tasks.problems import OneClass, ScoreRange, number_of, share_of
from ftkit.tasks.text_classification import EXAMPLES, LABEL, SCORE
from ftkit.tasks.texts import batch_of, fit

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from ftkit.data.features import FeatureSet
    from ftkit.data.types import Batch, Scores, Targets
    from ftkit.tasks import Metrics

TEXT = Column("text", "a text, such as a question", "anchor", "query", "question", "sentence", "sentence1", "premise", "text1")
PAIR = Column("text_pair", "a text that belongs to it, or is compared with it", "positive", "answer", "passage", "document", "sentence2", "hypothesis", "text2")
NEGATIVE = Column("negative", "a text that looks as if it belonged to it and does not, or a list of them, as many in each row", "negatives", "hard_negative")
TEXTS = (TEXT.name, PAIR.name)
HEAD = "softmax.safetensors"


class SentenceEmbedding(Spec):
    """A vector for each text; those of texts that belong together have a high cosine."""

    kind: Literal["sentence-embedding"] = "sentence-embedding"
    loss: Literal["in-batch", "cosine", "cosent", "softmax"] = option(
        "in-batch",
        "in-batch: a text's own `text_pair` among those of all rows of a batch, and their `negative` (arXiv 1705.00652); "
        "cosine: squared error of the cosine and `score`; cosent: pairs in the order of their `score` (doi:10.1109/TASLP.2024.3402087); "
        "softmax: the `label` of a pair, such as those of NLI, from both embeddings and their difference (SBERT, arXiv 1908.10084, 3)",
        "pairs that belong together are what there is most of",
    )
    pooling: Pooling = option(
        "mean", "what a text's embedding is of its tokens' states: their mean, the first (cls), or the last", "SBERT (arXiv 1908.10084, 6)"
    )
    normalize: bool = option(False, "embeddings of length 1, whose dot product is their cosine")
    scale: float | None = option(None, "cosines count so many times in the loss of in-batch and cosent; 20 if empty (sentence-transformers)", gt=0)
    symmetric: bool = option(False, "in-batch: also each `text_pair`'s own text among all texts, by half (arXiv 2310.19923)")
    negatives: int | None = option(None, "in-batch: texts in `negative` of each row; as many as the first training row has, if empty", ge=0)
    score_range: ScoreRange = option([0.0, 1.0], "cosine: the scores that cosines of 0 and of 1 stand for, such as [0, 5]")
    labels: list[str] | None = option(None, "softmax: class names in order; those of the training rows, sorted, if empty")

    txt_row: ClassVar[str] = "line"
    auto_class: ClassVar[str] = "AutoModel"
    peft_type: ClassVar[str] = "FEATURE_EXTRACTION"
    new_head: ClassVar[bool] = False
    companion: ClassVar[str] = "softmax layer"
    defaults: ClassVar[Mapping[str, Default]] = {
        "data.max_length": Default(512, "the positions of BERT (arXiv 1810.04805)"),
    }

    @model_validator(mode="after")
    def _no_option_without_effect(self) -> SentenceEmbedding:
        if self.loss in ("cosine", "softmax") and self.scale is not None:
            raise ValueError(f"scale has no effect with loss: {self.loss}; leave it out")
        if self.loss != "softmax" and self.labels is not None:
            raise ValueError(f"labels has no effect with loss: {self.loss}; leave it out")
        if self.loss != "in-batch" and self.symmetric:
            raise ValueError(f"symmetric has no effect with loss: {self.loss}; leave it out")
        if self.loss != "in-batch" and self.negatives is not None:
            raise ValueError(f"negatives has no effect with loss: {self.loss}; leave it out")
        if self.loss != "cosine" and self.score_range != [0.0, 1.0]:
            raise ValueError(f"score_range has no effect with loss: {self.loss}; leave it out")
        return self

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """A question is a text, or a pair that is to be compared."""
        if self.loss == "in-batch":
            return (Shape(TEXT, PAIR, NEGATIVE, asked=(TEXT,)), Shape(TEXT, PAIR, asked=(TEXT,)))
        return (Shape(TEXT, PAIR, LABEL if self.loss == "softmax" else SCORE, asked=(TEXT,)),)

    @property
    def _contrast(self) -> Contrast | OneClass:
        if self.loss == "cosine":
            return Cosine()
        if self.loss == "softmax":
            return OneClass(self.labels)
        return Order(self.scale or 20.0) if self.loss == "cosent" else InBatch(self.scale or 20.0, self.symmetric)

    @property
    def targets(self) -> Targets:
        if self.loss == "softmax":
            return "classes"
        return "matches" if self.loss == "in-batch" else "numbers"

    @property
    def coupled(self) -> bool:
        return self.loss in ("in-batch", "cosent")

    @property
    def metric_names(self) -> tuple[str, ...]:
        return self._contrast.metric_names

    @property
    def main_metric(self) -> str:
        return self.metric_names[0]

    def examples(self) -> list[dict[str, Any]]:
        """Pairs of sentences; what looks as if it belonged to one belongs to the next."""
        low, high = self.score_range
        others = [pair for _, pair, _ in (*EXAMPLES[1:], EXAMPLES[0])]
        return [
            {"text": text, "text_pair": pair, "negative": [other], "score": high if label == "yes" else low, "label": label}
            for (text, pair, label), other in zip(EXAMPLES, others, strict=True)
        ]

    def resolve(self, rows: Iterable[Row]) -> SentenceEmbedding:
        """With the number of texts in `negative`, or the labels; refuses rows of one score for the loss that puts them in order."""
        if self.loss == "softmax":
            return self.model_copy(update={"labels": ordered(occurring(rows, lambda row: [name_of(row.values["label"])]), self.labels)})
        if self.loss == "in-batch" and self.negatives is None:
            return self.model_copy(update={"negatives": next((len(row.values.get("negative", ())) for row in rows), 0)})
        if self.loss == "cosent":
            scores = _scores(rows)
            first = next(scores, None)
            if first is not None and all(score == first for score in scores):
                raise DataError(f"the training rows have one score only ({first:g}): there is nothing to put in order, which loss: cosent learns")
        return self

    def check(self, tokenizer: Any) -> None:
        """Every tokenizer will do."""

    def config_kwargs(self) -> dict[str, Any]:
        return {}

    def encode(self, row: Row, tokenizer: Any, limits: Limits) -> list[Features]:
        """The texts of a row one after the other: each is read apart, and cut by itself."""
        target: list[int] | list[float] = [0]
        if self.loss == "softmax":
            target = OneClass(self.labels).target(row.values["label"])
        elif self.loss != "in-batch":
            target = [share_of(row.values["score"], self.score_range) if self.loss == "cosine" else number_of(row.values["score"])]
        negatives = row.values.get("negative", [])
        if len(negatives) != (self.negatives or 0):
            raise RowError(f"{len(negatives)} texts in negative, but {self.negatives} in the first training row: all rows must have as many")
        fitted = [fit(tokenizer, [text], limits) for text in (row.values["text"], row.values["text_pair"], *negatives)]
        kept = [each for each in fitted if each is not None]
        if len(kept) < len(fitted):
            return []
        types = None if kept[0].token_type_ids is None else [kind for each in kept for kind in each.token_type_ids or ()]
        return [
            Features(
                input_ids=[token for each in kept for token in each.input_ids],
                targets=target,
                weights=[1.0],
                token_type_ids=types,
                truncated=sum(each.truncated for each in kept),
                texts=[len(each.input_ids) for each in kept],
            )
        ]

    def _embeddings(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Of the texts in a model's inputs [B, L]: float32 [B, H]."""
        from torch.nn import functional as F

        pooled = pool(model(**inputs).last_hidden_state, inputs["attention_mask"], self.pooling)
        return F.normalize(pooled, dim=-1) if self.normalize else pooled

    def items(self, model: Any, batch: Batch) -> Items:
        """Every row, with the embeddings of its texts [P, H]: how they are told apart is the loss's affair, what they are depends on no other row."""
        embeddings = self._embeddings(model, batch.inputs)
        return Items(
            states=embeddings.unflatten(0, (len(batch.row_ids), -1)),
            head=None,
            num_classes=embeddings.shape[-1],
            targets=batch.targets,
            weights=batch.weights,
            rows=batch.row_ids,
            kind=self.targets,
            losses=self._contrast.losses,
        )

    def beside(self, model: Any) -> nn.Module | None:
        """The layer that tells labels apart: it is for training and measuring, as in SBERT, and no part of the model."""
        from torch import nn

        if self.loss != "softmax":
            return None
        return nn.Linear(3 * model.config.get_text_config().hidden_size, len(self.labels or ()))

    def judged(self, beside: nn.Module, items: Items) -> Items:
        """Labels, of the embeddings of two texts and their difference."""
        return replace(items, head=partial(_told_apart, beside), num_classes=len(self.labels or ()))

    def write_beside(self, beside: nn.Module, directory: Path) -> dict[str, Any] | None:
        from safetensors.torch import save_file

        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in beside.state_dict().items()}, directory / HEAD, {"format": "pt"})
        return None  # which no library loads

    def read_beside(self, model: Any, directory: Path) -> nn.Module | None:
        from safetensors.torch import load_file

        layer = self.beside(model)
        if layer is not None:
            layer.load_state_dict(load_file(directory / HEAD))
        return layer

    def complete(self, model: Any, tokenizer: Any) -> None:
        """What goes beside the weights is in files of its own."""

    def lay_out(self, directory: Path, config: Any, max_length: int) -> None:
        """The files by which sentence-transformers loads the model."""
        streams = 2 if config.model_type == "reformer" else 1  # of states, each as wide as the model
        write_layout(directory, streams * config.get_text_config().hidden_size, self.pooling, self.normalize, max_length)

    def read_off(self, model: Any, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What these files must make of inputs [L], by the names that `reload.embeddings` gives it: [H] each."""
        import torch

        found = {}
        for number, row in enumerate(rows):
            inputs = {name: values[None].to(model.device) for name, values in row.items()}
            with torch.no_grad():
                (embedding,) = self._embeddings(model, inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])})
            found[f"row {number}: embedding"] = embedding.cpu()
        return found

    def metrics(self, rows: Sequence[Row], features: FeatureSet) -> Metrics:
        return self._contrast.metrics()

    def records(self, parts: Iterable[Scores]) -> list[dict[str, Any]]:
        """The cosine of each pair, beside its score if it has one; or what it is told, beside its label."""
        if self.loss == "softmax":
            classes = OneClass(self.labels)
            return [{"feature": row} | each for scores in parts for row, each in zip(scores.rows.tolist(), classes.records(scores), strict=True)]
        found = []
        for scores in parts:
            gold = scores.targets.tolist()
            for place, (row, cosine) in enumerate(zip(scores.rows.tolist(), cosines(scores.logits).tolist(), strict=True)):
                found.append({"feature": row, **({} if self.targets == "matches" else {"score": gold[place]}), "similarity": cosine})
        return found

    def predict(self, model: Any, tokenizer: Any, rows: list[Row], limits: Limits, generation: Generation) -> list[dict[str, Any]]:
        """The `embedding` of each text, a list of numbers; of a pair, their `similarity`, a cosine."""
        import torch

        def encode(row: Row) -> list[Features]:
            fitted = [fit(tokenizer, [row.values[name]], limits) for name in TEXTS if name in row.values]
            return [Features(each.input_ids, [0], [1.0], each.token_type_ids) for each in fitted if each is not None]

        batch = batch_of(rows, encode, tokenizer, model.device)
        with torch.inference_mode():
            found = iter(self._embeddings(model, batch.inputs))
        answers: list[dict[str, Any]] = []
        for row in rows:
            own = torch.stack([next(found) for name in TEXTS if name in row.values])
            answers.append({"embedding": own[0].tolist()} if len(own) == 1 else {"similarity": cosines(own[None]).item()})
        return answers


def _told_apart(layer: nn.Module, embeddings: torch.Tensor) -> torch.Tensor:
    """Logits [n, C] of rows of texts [n, P, H]."""
    import torch

    one, other = embeddings[:, 0], embeddings[:, 1]
    found: torch.Tensor = layer(torch.cat((one, other, (one - other).abs()), -1))
    return found


def _scores(rows: Iterable[Row]) -> Iterator[float]:
    """Those of the rows that can be used; encode() tells of each other one."""
    for row in rows:
        try:
            yield number_of(row.values["score"])
        except RowError:
            continue
