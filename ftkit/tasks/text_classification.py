"""Text classification: one label a row, for a text or a pair of texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ftkit.data.types import Row
from ftkit.errors import RecipeError
from ftkit.recipe.spec import option
from ftkit.tasks import Column, Shape
from ftkit.tasks.classes import name_of, occurring, ordered, some
from ftkit.tasks.problems import AnyLabels, Number, OneClass, Problem, balanced
from ftkit.tasks.text_task import TextTask

TEXT = Column("text", "the text to classify", "sentence", "sentence1", "premise", "question1", "content", "review", "document")
PAIR = Column("text_pair", "a second text", "sentence2", "hypothesis", "question2")
SCORE = Column("score", "a number: how alike two texts are, how good something is", "similarity_score", "similarity", "rating", "value")
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


class TextClassification(TextTask):
    """What a text, or a pair of texts, is told: a class, labels, or a number."""

    kind: Literal["text-classification"] = "text-classification"
    problem: Literal["single-label", "multi-label", "regression"] = option(
        "single-label", "single-label: one class a row; multi-label: any of the labels, `label` being a list; regression: a number, `score`"
    )
    labels: list[str] | None = option(None, "class names in the order of the model's outputs; those of the training rows, sorted, if empty")
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None = option(
        None, "how much a row of each class counts in the loss; balanced: so much that all classes count alike; the same for all if empty"
    )
    threshold: float = option(0.5, "probability from which on a label is said, of multi-label", gt=0, lt=1)

    @model_validator(mode="after")
    def _no_option_without_effect(self) -> TextClassification:
        if self.problem == "regression" and self.labels is not None:
            raise ValueError("labels has no effect with problem: regression; leave it out")
        if self.problem != "single-label" and self.class_weights is not None:
            raise ValueError(f"class_weights has no effect with problem: {self.problem}; leave it out")
        if self.problem != "multi-label" and self.threshold != 0.5:
            raise ValueError(f"threshold has no effect with problem: {self.problem}; leave it out")
        return self

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """With labels in a list, a row may have none."""
        if self.problem == "multi-label":
            return (Shape(TEXT, PAIR, optional=(LABEL,)), Shape(TEXT, optional=(LABEL,)))
        outcome = SCORE if self.problem == "regression" else LABEL
        return (Shape(TEXT, PAIR, outcome), Shape(TEXT, outcome))

    @property
    def _problem(self) -> Problem:
        if self.problem == "regression":
            return Number()
        return AnyLabels(self.labels, self.threshold) if self.problem == "multi-label" else OneClass(self.labels)

    def examples(self) -> list[dict[str, Any]]:
        """Pairs of sentences under the labels of the recipe, if it has any, or with numbers."""
        labels = self.labels or []
        rows = [{"text": text, "text_pair": pair, "label": labels[i % len(labels)] if labels else label} for i, (text, pair, label) in enumerate(EXAMPLES)]
        if self.problem == "multi-label":
            return [{**row, "label": [row["label"]]} for row in rows]
        return [{**row, "score": float(i % 6)} for i, row in enumerate(rows)] if self.problem == "regression" else rows

    def resolve(self, rows: Iterable[Row]) -> TextClassification:
        """With the label names of the training rows, numbers in numeric order and words in alphabetic order, and the weights of classes."""
        if self.problem == "regression":
            return self
        single = self.problem == "single-label"
        found = occurring(rows, self.classes_of if single else lambda row: AnyLabels.named(row.values.get("label", [])))
        labels = ordered(found, self.labels, at_least=2 if single else 1)
        weights = balanced(found) if self.class_weights == "balanced" else self.class_weights
        if weights is not None and (unknown := sorted(set(weights) - set(labels))):
            raise RecipeError(f"task.class_weights: {some(unknown)} is no label (known: {some(labels)})")
        return self.model_copy(update={"labels": labels, "class_weights": weights})

    def config_kwargs(self) -> dict[str, Any]:
        names = ["LABEL_0"] if self.problem == "regression" else self._names  # transformers' name where there is none
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": self._problem.problem_type,
        }

    @property
    def _names(self) -> list[str]:
        assert self.labels is not None, "resolve() comes first"
        return self.labels

    def classes_of(self, row: Row) -> list[str]:
        """The one class of a row; nothing of several labels, or of a number.  Raises RowError."""
        return [name_of(row.values["label"])] if self.problem == "single-label" else []

    def _weight(self, row: Row) -> float:
        if not isinstance(self.class_weights, dict) or "label" not in row.values:
            return 1.0
        return self.class_weights.get(name_of(row.values["label"]), 1.0)

    def baselines(self, train: Iterable[Row], rows: Iterable[Row]) -> dict[str, float]:
        """Accuracy on rows without any model, where each has one class: the commonest training label, and words counted by naive Bayes.

        Multinomial naive Bayes with add-one smoothing, the baseline of Wang and Manning 2012 (aclanthology.org/P12-2018).
        """
        import numpy as np

        if self.problem != "single-label":
            return {}
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


def _words(row: Row) -> list[str]:
    texts = (row.values["text"], row.values.get("text_pair", ""))
    return re.findall(r"\w+", " ".join(texts).lower())
