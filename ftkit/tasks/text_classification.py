"""Text classification: one label a row, for a text or a pair of texts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftkit.data.types import Features, Items, Limits, Row, RowError
from ftkit.errors import DataError, RecipeError
from ftkit.recipe.spec import Default, Generation, Spec, option
from ftkit.tasks import Column, Shape
from ftkit.tasks.classes import in_order, name_of, of_confusion, some

if TYPE_CHECKING:
    import torch

    from ftkit.data.types import Batch, Scores

TEXT = Column("text", "the text to classify", "sentence", "sentence1", "premise", "question1", "content", "review", "document")
PAIR = Column("text_pair", "a second text", "sentence2", "hypothesis", "question2")
LABEL = Column("label", "its class: a word or a number", "labels", "class", "category", "intent", "target", "gold_label")

EXAMPLES = (  # a sentence, a second one, and whether it follows from the first
    ("All the lamps in the hall are lit.", "The hall is dark.", "no"),
    ("Three boats left the harbour at dawn.", "Boats left the harbour.", "yes"),
    ("The baker sold every loaf before noon.", "There was bread left at one.", "no"),
    ("Anna waters the roses each evening.", "Someone waters the roses.", "yes"),
    ("It has not rained since March.", "It rained in April.", "no"),
    ("The old bridge is closed to cars.", "Cars cannot cross the old bridge.", "yes"),
    ("Nobody in the village owns a horse.", "The smith owns a horse.", "no"),
    ("The train was ten minutes late.", "The train was late.", "yes"),
    ("Her coat is blue and too long.", "Her coat is red.", "no"),
    ("Two owls nest in the church tower.", "Birds nest in the tower.", "yes"),
    ("The library opens at nine on weekdays.", "The library is open at eight on Monday.", "no"),
    ("He peeled the apples and baked a cake.", "He baked something.", "yes"),
)


class TextClassification(Spec):
    """Which class a text, or a pair of texts, belongs to."""

    kind: Literal["text-classification"] = "text-classification"
    labels: list[str] | None = option(None, "class names in the order of the model's outputs; those of the training rows, sorted, if empty")

    shapes: ClassVar[tuple[Shape, ...]] = (Shape(TEXT, PAIR, LABEL), Shape(TEXT, LABEL))
    txt_row: ClassVar[str] = "line"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_type: ClassVar[str] = "SEQ_CLS"
    new_head: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Default]] = {
        "data.max_length": Default(512, "the positions of BERT (arXiv 1810.04805)"),
    }
    main_metric: ClassVar[str] = "accuracy"

    @property
    def metric_names(self) -> tuple[str, ...]:
        """`f1_binary` is that of the second label of two."""
        binary = ("f1_binary",) if self.labels is None or len(self.labels) == 2 else ()
        return ("accuracy", "f1", *binary, "mcc", "loss")

    def examples(self) -> list[dict[str, Any]]:
        """Pairs of sentences under the labels of the recipe, if it has any."""
        labels = self.labels or []
        return [{"text": text, "text_pair": pair, "label": labels[i % len(labels)] if labels else label} for i, (text, pair, label) in enumerate(EXAMPLES)]

    def resolve(self, rows: Iterable[Row]) -> TextClassification:
        """With the label names of the training rows, numbers in numeric order and words in alphabetic order."""
        found, flaw = set(), ""
        for row in rows:
            try:
                found.add(name_of(row.values["label"]))
            except RowError as error:  # encode() says it of each such row
                flaw = flaw or f"{row.where}: {error}"
        if flaw and not found:
            raise DataError(f"the training rows have no label that can be used: {flaw}")
        if self.labels is None:
            labels = in_order(found)
        else:
            labels = self.labels
            if missing := sorted(found - set(labels)):
                raise DataError(f"task.labels lacks labels of the training rows: {some(missing)}")
        if len(found) < 2:
            raise DataError(f"the training rows have one label only ({some(sorted(found))}): there is nothing to tell apart")
        if len(set(labels)) < len(labels):
            raise RecipeError(f"task.labels repeats a label: {some(sorted({x for x in labels if labels.count(x) > 1}))}")
        return self.model_copy(update={"labels": labels})

    def check(self, tokenizer: Any) -> None:
        """Every tokenizer will do."""

    def config_kwargs(self) -> dict[str, Any]:
        names = self._names
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": "single_label_classification",
        }

    @property
    def _names(self) -> list[str]:
        assert self.labels is not None, "resolve() comes first"
        return self.labels

    def encode(self, row: Row, tokenizer: Any, limits: Limits) -> list[Features]:
        name = name_of(row.values["label"]) if "label" in row.values else self._names[0]
        if name not in self._names:
            raise RowError(f"label {name!r} does not occur in the training rows (known: {some(self._names)})")
        texts = [row.values["text"], *([row.values["text_pair"]] if "text_pair" in row.values else [])]
        encoded = tokenizer(*texts, truncation=False, verbose=False)
        excess = len(encoded["input_ids"]) - limits.max_length
        if excess > 0:
            if limits.truncation == "drop":
                return []
            if limits.truncation == "error":
                raise RowError(f"{len(encoded['input_ids'])} tokens, more than data.max_length: {limits.max_length}")
            side, tokenizer.truncation_side = tokenizer.truncation_side, limits.truncation
            encoded = tokenizer(*texts, truncation="longest_first", max_length=limits.max_length)
            tokenizer.truncation_side = side
        if not encoded["input_ids"]:
            raise RowError("no tokens")
        return [
            Features(
                input_ids=encoded["input_ids"],
                token_type_ids=encoded.get("token_type_ids"),
                targets=[self._names.index(name)],
                weights=[1.0],
                truncated=max(excess, 0),
            )
        ]

    def items(self, model: Any, batch: Batch) -> Items:
        """Every row, with its logits [C]."""
        types = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **types).logits
        return Items(logits, None, logits.shape[1], batch.targets, batch.weights, batch.row_ids)

    def complete(self, model: Any, tokenizer: Any) -> None:
        """The labels are in the config already."""

    def metrics(self) -> ClassificationMetrics:
        return ClassificationMetrics(len(self._names))

    def records(self, parts: Iterable[Scores]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for scores in parts:
            best, index = scores.logits.float().softmax(-1).max(-1)
            columns = zip(scores.rows.tolist(), scores.targets.tolist(), index.tolist(), best.tolist(), strict=True)
            found += [{"feature": row, "label": self._names[gold], "prediction": self._names[said], "probability": p} for row, gold, said, p in columns]
        return found

    def baselines(self, train: Iterable[Row], rows: Iterable[Row]) -> dict[str, float]:
        """Accuracy on rows without any model: the commonest training label, and words counted by naive Bayes.

        Multinomial naive Bayes with add-one smoothing, the baseline of Wang and Manning 2012 (aclanthology.org/P12-2018).
        """
        from collections import Counter

        import numpy as np

        counts: dict[str, Counter[str]] = {}
        prior: Counter[str] = Counter()
        for row in train:
            name = name_of(row.values["label"])
            prior[name] += 1
            counts.setdefault(name, Counter()).update(_words(row))
        vocabulary = set().union(*counts.values())
        gold, texts = [], []
        for row in rows:
            gold.append(name_of(row.values["label"]))
            texts.append([word for word in _words(row) if word in vocabulary])
        place = {word: i for i, word in enumerate({word for text in texts for word in text})}
        smoothed_WC = np.ones((len(place), len(counts)))  # words of these rows only: those of all rows could fill the memory
        for label, counter in enumerate(counts.values()):
            for word in place.keys() & counter.keys():
                smoothed_WC[place[word], label] += counter[word]
        totals_C = np.array([counter.total() + len(vocabulary) for counter in counts.values()])
        likelihood_WC, prior_C = np.log(smoothed_WC / totals_C), np.log([prior[name] for name in counts])
        names = list(counts)
        said = [names[(prior_C + likelihood_WC[[place[word] for word in text]].sum(0)).argmax()] for text in texts]
        return {
            "majority": gold.count(max(prior, key=prior.__getitem__)) / len(gold),
            "bag_of_words": sum(map(str.__eq__, said, gold)) / len(gold),
        }

    def predict(self, model: Any, tokenizer: Any, rows: list[Row], limits: Limits, generation: Generation) -> list[dict[str, Any]]:
        """The likeliest label of each row, its probability, and the probabilities of all labels."""
        import numpy as np
        import torch

        from ftkit.data.batches import collate
        from ftkit.data.features import FeatureSet

        def encode(row: Row) -> list[Features]:
            try:
                return self.encode(row, tokenizer, limits)
            except RowError as error:
                raise DataError(f"{row.where}: {error}") from error

        features = FeatureSet.of(map(encode, rows))
        batch = collate(features, np.arange(len(features)), tokenizer.pad_token_id).to(model.device)
        with torch.inference_mode():
            probabilities = self.items(model, batch).states.float().softmax(-1).tolist()
        answers = [dict(zip(self._names, row, strict=True)) for row in probabilities]
        return [{"label": max(scores, key=scores.__getitem__), "probability": max(scores.values()), "scores": scores} for scores in answers]


class ClassificationMetrics:
    """Accuracy, F1 and MCC from one confusion matrix; loss with its denominator."""

    def __init__(self, num_labels: int) -> None:
        import torch

        # float64 sums: counts stay exact, and those of several processes add up
        self.sums: dict[str, torch.Tensor] = {
            "confusion": torch.zeros(num_labels, num_labels, dtype=torch.float64),  # [gold, predicted]
            "loss": torch.zeros((), dtype=torch.float64),
        }

    def update(self, scores: Scores) -> None:
        from torch.nn import functional as F

        gold, said = scores.targets.cpu(), scores.logits.argmax(-1).cpu()
        self.sums["confusion"].index_put_((gold, said), scores.weights.double().cpu(), accumulate=True)
        losses = F.cross_entropy(scores.logits.float(), scores.targets, reduction="none")
        self.sums["loss"] += (losses.double() * scores.weights).sum().cpu()

    def compute(self) -> dict[str, float]:
        """Those of `classes.of_confusion`, and the loss."""
        total = self.sums["confusion"].sum().item()
        return of_confusion(self.sums["confusion"]) | {"loss": self.sums["loss"].item() / total, "loss_count": total}


def _words(row: Row) -> list[str]:
    texts = (row.values["text"], row.values.get("text_pair", ""))
    return re.findall(r"\w+", " ".join(texts).lower())
