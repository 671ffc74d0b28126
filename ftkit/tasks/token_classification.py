"""Token classification: a tag for each word, such as parts of speech, or names in BIO tags."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from ftkit.data.types import Features, Items, Limits, Row, RowError
from ftkit.errors import DataError
from ftkit.recipe.spec import Default, Generation, Spec, option
from ftkit.tasks import Column, Shape
from ftkit.tasks.classes import by_class, counts_of, name_of, of_confusion, ordered, some
from ftkit.tasks.spans import OUTSIDE, spans, tagged, types_of
from ftkit.tasks.streaming import Streaming
from ftkit.tasks.windows import check_tokenizer, windows_of

if TYPE_CHECKING:
    import torch

    from ftkit.data.features import FeatureSet
    from ftkit.data.types import Batch, Scores, Targets

TOKENS = Column("tokens", "the words of a text, in a list", "words")
TAGS = Column("tags", "their tags, as many", "ner_tags", "pos_tags", "upos", "ner", "pos", "labels")
WORD = re.compile(r"\w+(?:[-'\u2019.@_/]\w+)*|[^\w\s]")  # of a text that comes as one: punctuation apart, but for that within words

EXAMPLES = (  # words, and which of them are names
    ("Anna met Paul Klee in Bern .", "B-PER O B-PER I-PER O B-LOC O"),
    ("The Rhine flows through Basel .", "O B-LOC O O B-LOC O"),
    ("Mr Darcy wrote to Elizabeth .", "O B-PER O O B-PER O"),
    ("It rained in New York all week .", "O O O B-LOC I-LOC O O O"),
    ("Nobody asked Alice .", "O O B-PER O"),
    ("From Oslo the train goes to Bergen .", "O B-LOC O O O O B-LOC O"),
    ("The bread was fresh .", "O O O O O"),
    ("Ahab sailed from Nantucket .", "B-PER O O B-LOC O"),
    ("Snow fell on Mount Fuji .", "O O O B-LOC I-LOC O"),
    ("Emma Woodhouse was rich .", "B-PER I-PER O O O"),
    ("They live near Lake Como .", "O O O B-LOC I-LOC O"),
    ("Father Brown smiled at Flambeau .", "O B-PER O O B-PER O"),
)


class Words(NamedTuple):
    """A window of a row: tokens, and of which word each is, None for special ones."""

    input_ids: list[int]
    token_type_ids: list[int] | None
    words: list[int | None]


class TokenClassification(Spec):
    """Which class each word of a text belongs to."""

    kind: Literal["token-classification"] = "token-classification"
    labels: list[str] | None = option(
        None, "tag names in the order of the model's outputs, or of the numbers in the data; those of the training rows, sorted, if empty"
    )
    subwords: Literal["first", "all"] = option(
        "first", "tokens of a word that are learned: the first one, or all, with I- after B-; the first one says what the word is", "arXiv 1810.04805, 5.3"
    )
    stride: int = option(128, "tokens that the windows of a row longer than data.max_length share; a word is taken where it has the most around it", ge=0)

    shapes: ClassVar[tuple[Shape, ...]] = (Shape(TOKENS, TAGS),)
    txt_row: ClassVar[str] = "line"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    peft_type: ClassVar[str] = "TOKEN_CLS"
    targets: ClassVar[Targets] = "classes"
    new_head: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Default]] = {
        "data.max_length": Default(512, "the positions of BERT (arXiv 1810.04805)"),
    }

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Of BIO tags: precision, recall and F1 of whole spans, and F1 of each type; else the macro F1 of tags."""
        if self.labels is not None and not tagged(self.labels):
            return ("accuracy", "f1", "loss")
        types = [f"f1_{kind}" for kind in types_of(self.labels or ())]
        return ("f1", "precision", "recall", "accuracy", "loss", *types)

    @property
    def main_metric(self) -> str:
        return "accuracy" if self.labels is not None and not tagged(self.labels) else "f1"

    def examples(self) -> list[dict[str, Any]]:
        """Sentences with names, under the tags of the recipe, if it has any."""
        labels = self.labels or []
        rows = [{"tokens": words.split(), "tags": tags.split()} for words, tags in EXAMPLES]
        return [{**row, "tags": [labels[i % len(labels)] for i in range(len(row["tags"]))]} for row in rows] if labels else rows

    def resolve(self, rows: Iterable[Row]) -> TokenClassification:
        """With the tag names of the training rows, numbers in numeric order and words in alphabetic order."""
        found, flaw = set[str](), ""
        for row in rows:
            try:
                found.update(self.classes_of(row))
            except RowError as error:  # encode() says it of each such row
                flaw = flaw or f"{row.where}: {error}"
        if flaw and not found:
            raise DataError(f"the training rows have no tag that can be used: {flaw}")
        return self.model_copy(update={"labels": ordered(found, self.labels, "tag")})

    def check(self, tokenizer: Any) -> None:
        """Refuse a tokenizer that does not say which characters its tokens are of."""
        check_tokenizer(tokenizer, self.kind, "tags cannot be given to them")

    def config_kwargs(self) -> dict[str, Any]:
        names = self._names
        return {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}

    @property
    def _names(self) -> list[str]:
        assert self.labels is not None, "resolve() comes first"
        return self.labels

    def classes_of(self, row: Row) -> list[str]:
        """The tags of a row; whole numbers stand for places among `labels`, where these are words."""
        if isinstance(row.values["tokens"], str):
            raise RowError("tokens must be a list, but is a string")
        words, tags = row.values["tokens"], [name_of(tag, "tag") for tag in row.values["tags"]]
        if len(tags) != len(words):
            raise RowError(f"{len(tags)} tags for {len(words)} tokens")
        if not self.labels:
            return tags
        known = set(self.labels)
        numbered = {str(i): name for i, name in enumerate(self.labels)}
        return [tag if tag in known else numbered.get(tag, tag) for tag in tags]

    def encode(self, row: Row, tokenizer: Any, limits: Limits) -> list[Features]:
        """The words joined by spaces, a target at the first token of each, or at all; long rows as windows that overlap.

        Each word is learned and measured in one window.  `truncation: drop` and `error` look at whole rows.
        """
        places = {name: i for i, name in enumerate(self._names)}
        tags = self.classes_of(row) if "tags" in row.values else [self._names[0]] * len(row.values["tokens"])
        if unknown := [tag for tag in tags if tag not in places]:
            raise RowError(f"tag {unknown[0]!r} does not occur in the training rows (known: {some(self._names)})")
        windows = self._windows(_words(row), tokenizer, limits)
        if len(windows) > 1 and limits.truncation == "drop":
            return []
        if len(windows) > 1 and limits.truncation == "error":
            raise RowError(f"more tokens than data.max_length: {limits.max_length}")
        chosen = _chosen(windows)
        features = []
        for number, window in enumerate(windows):
            targets, weights, before = [0] * len(window.words), [0.0] * len(window.words), None
            for place, word in enumerate(window.words):
                first = word != before
                if word is not None and chosen[word] == number and (first or self.subwords == "all"):
                    targets[place] = places[tags[word]] if first else len(places) + places[self._goes_on(tags[word])]
                    weights[place] = 1.0
                before = word
            features.append(Features(window.input_ids, targets, weights, window.token_type_ids))
        features[0].silent_words = len(tags) - len(chosen)
        return features

    def _goes_on(self, tag: str) -> str:
        """The tag of a word's further tokens."""
        inner = f"I-{tag[2:]}"
        return inner if tag.startswith("B-") and inner in self._names else tag

    def _windows(self, words: Sequence[str], tokenizer: Any, limits: Limits) -> list[Words]:
        """The tokens of words joined by spaces, in windows of at most `max_length`."""
        text, starts = " ".join(words), [0]
        for word in words[:-1]:
            starts.append(starts[-1] + len(word) + 1)
        room = limits.max_length - tokenizer.num_special_tokens_to_add()
        return [
            Words(window.input_ids, window.token_type_ids, [None if span is None else _word_at(text, starts, *span) for span in window.spans])
            for window in windows_of(tokenizer, text, limits, self.stride, room)
        ]

    def items(self, model: Any, batch: Batch) -> Items:
        """The n tokens with a target, with their logits [n, C]."""
        logits = _logits(model, batch)
        targets, classes = batch.targets.flatten()[batch.supervised], logits.shape[-1]
        return Items(
            states=logits.flatten(0, 1)[batch.supervised],
            head=None,
            num_classes=classes,
            targets=targets % classes,
            weights=batch.weights.flatten()[batch.supervised],
            rows=batch.row_ids[batch.supervised // batch.input_ids.shape[1]],
            counted=targets < classes,
        )

    def complete(self, model: Any, tokenizer: Any) -> None:
        """The tags are in the config already."""

    def metrics(self, rows: Sequence[Row], features: FeatureSet) -> TagMetrics:
        return TagMetrics(self._names, features)

    def records(self, parts: Iterable[Scores]) -> list[dict[str, Any]]:
        """The tags of each feature's words, as they are and as the model says."""
        found: dict[int, dict[str, Any]] = {}
        for row, gold, said in _tag_rows(parts):
            found.setdefault(row, {"feature": row, "tags": [], "predictions": []})
            found[row]["tags"] += [self._names[i] for i in gold]
            found[row]["predictions"] += [self._names[i] for i in said]
        return list(found.values())

    def predict(self, model: Any, tokenizer: Any, rows: list[Row], limits: Limits, generation: Generation) -> list[dict[str, Any]]:
        """`tags` of the words; `spans`, each with its characters `start` to `end` of the text and the mean probability of its tags.

        A text in one piece is parted into words at spaces and punctuation; words in a list are joined by spaces.  Of tags
        without BIO each word is a span.  The tag of a word that the tokenizer makes nothing of is O, or null where there is none.
        """
        import numpy as np
        import torch

        from ftkit.data.batches import collate
        from ftkit.data.features import FeatureSet

        def words_of(row: Row) -> list[str]:
            with row.named():
                return _words(row)

        answers, texts = [], [words_of(row) for row in rows]
        windows = [self._windows(words, tokenizer, limits) for words in texts]
        features = FeatureSet.of([Features(w.input_ids, [0] * len(w.words), [1.0] * len(w.words), w.token_type_ids) for w in each] for each in windows)
        batch = collate(features, np.arange(len(features)), tokenizer.pad_token_id).to(model.device)
        with torch.inference_mode():
            logits = _logits(model, batch)[:, -batch.input_ids.shape[1] :]  # those of virtual tokens come first
        best, index = (part.tolist() for part in logits.float().softmax(-1).max(-1))
        of_windows = iter(zip(best, index, strict=True))
        for row, words, each in zip(rows, texts, windows, strict=True):
            chosen, said = _chosen(each), dict[int, tuple[str, float]]()
            for number, (window, (probabilities, tags)) in enumerate(zip(each, of_windows, strict=False)):
                for word, p, tag in zip(window.words, probabilities, tags, strict=False):
                    if word is not None and chosen[word] == number:
                        said.setdefault(word, (self._names[tag], p))
            answers.append(self._answer(row, words, said))
        return answers

    def _answer(self, row: Row, words: Sequence[str], said: Mapping[int, tuple[str, float]]) -> dict[str, Any]:
        text = row.values["tokens"] if isinstance(row.values["tokens"], str) else " ".join(words)
        places, end = [], 0
        for word in words:
            places.append(text.index(word, end))
            end = places[-1] + len(word)
        bio = tagged(self._names)
        tags = [said[i][0] if i in said else OUTSIDE if OUTSIDE in self._names else None for i in range(len(words))]
        whole = spans([tag or OUTSIDE for tag in tags]) if bio else ((tag, i, i + 1) for i, tag in enumerate(tags) if tag not in (None, OUTSIDE))
        found = []
        for label, first, last in whole:
            start, end = places[first], places[last - 1] + len(words[last - 1])
            probabilities = [said[i][1] for i in range(first, last) if i in said]
            mean = sum(probabilities) / len(probabilities)
            found.append({"label": label, "start": start, "end": end, "text": text[start:end], "probability": mean})
        return {"tags": tags, "spans": found}


class TagMetrics(Streaming):
    """Counts of tags and of spans, by words; the loss by tokens.

    Of rows that are several windows, which may be in several batches, the tags are kept: spans go across their borders.
    """

    def __init__(self, names: Sequence[str], features: FeatureSet) -> None:
        import torch

        self.names, self.features = names, features
        self.types = types_of(names) if tagged(names) else []
        super().__init__(confusion=(len(names), len(names)), spans=(len(self.types), 3))  # [gold, predicted]; gold, predicted, both
        self.keep("rows", torch.zeros(0, 5))  # a request to stop may come before the first
        self.keep("windows", torch.zeros(0, 3))

    def update(self, scores: Scores) -> None:
        import torch

        self.add_loss(scores)
        rows, windows = list[list[int]](), list[tuple[int, int, int]]()
        for feature, gold, said in _tag_rows([scores]):
            self.sums["confusion"].index_put_((torch.tensor(gold), torch.tensor(said)), torch.ones(len(gold), dtype=torch.float64), accumulate=True)
            if self._one_of_several(feature):
                windows += zip([feature] * len(gold), gold, said, strict=True)
            else:
                rows.append(self._counted(gold, said, self.sums["spans"]))
        self.keep("rows", torch.tensor(rows, dtype=torch.float32).view(-1, 5))
        self.keep("windows", torch.tensor(windows, dtype=torch.float32).view(-1, 3))

    def _one_of_several(self, feature: int) -> bool:
        """Whether it is a window of a row that has others."""
        row = self.features.row
        return any(0 <= other < len(row) and row[other] == row[feature] for other in (feature - 1, feature + 1))

    def _counted(self, gold: list[int], said: list[int], of_types: torch.Tensor) -> list[int]:
        """Spans of a row of tags, as they are, as the model says, and both; right words, and words.  Spans are added to those `of_types`."""
        place = {kind: i for i, kind in enumerate(self.types)}
        right, given = ({*spans([self.names[i] for i in tags])} if self.types else set() for tags in (gold, said))
        for column, found in enumerate((right, given, right & given)):
            for span in found:
                of_types[place[span.label], column] += 1
        return [len(right), len(given), len(right & given), sum(map(int.__eq__, gold, said)), len(gold)]

    def _whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float64 [k, 5] and [types, 3]: counts of all rows, and spans of each type, those of several windows put together."""
        import torch

        of_types, rows = self.sums["spans"].clone(), list[list[int]]()
        words = sorted(self.all("windows").long().tolist(), key=lambda word: word[0])  # windows in order, each as it was
        for _, row in groupby(words, key=lambda word: int(self.features.row[word[0]])):
            _, gold, said = zip(*row, strict=True)
            rows.append(self._counted(list(gold), list(said), of_types))
        return torch.cat((self.all("rows"), torch.tensor(rows, dtype=torch.float64).view(-1, 5))), of_types

    def compute(self) -> dict[str, float]:
        """Fractions from 0 to 1; of spans over all types (micro), as conlleval's."""
        rows, _ = self._whole()
        found = self._of_rows(rows)
        if not self.types:
            return found | {"f1": of_confusion(self.sums["confusion"])["f1"]} | self.loss()
        return found | self.loss() | {f"f1_{kind}": values["f1"] for kind, values in self._classes().items()}

    def _of_rows(self, rows: torch.Tensor) -> dict[str, float]:
        """Of counts of each row, float64 [k, 5]."""
        *of_spans, right, words = rows.sum(0).tolist()
        accuracy = {"accuracy": right / words}
        if not self.types:
            return accuracy
        values = by_class(("all",), *([count] for count in of_spans))["all"]
        return {name: values[name] for name in ("f1", "precision", "recall")} | accuracy

    def _classes(self) -> dict[str, dict[str, float]]:
        """Of types of spans, or of tags."""
        if self.types:
            return by_class(self.types, *self._whole()[1].T.tolist())
        return by_class(self.names, *counts_of(self.sums["confusion"]))

    def draws(self) -> Iterator[dict[str, float]]:
        """Of whole rows: their words go together."""
        return map(self._of_rows, self.redrawn(self._whole()[0]))

    def details(self) -> dict[str, Any]:
        """Beside the intervals, each type of span, or tag, and `confusion` of words, [tag, prediction]."""
        return super().details() | {"classes": self._classes(), "confusion": self.sums["confusion"].long().tolist()}


def _tag_rows(parts: Iterable[Scores]) -> Iterator[tuple[int, list[int], list[int]]]:
    """Of each feature in the parts: its index, and the tags of its words, as they are and as the model says."""
    for scores in parts:
        counted = scores.weights > 0 if scores.counted is None else scores.counted & (scores.weights > 0)
        rows, gold, said = (each[counted].tolist() for each in (scores.rows, scores.targets, scores.logits.argmax(-1)))
        start = 0
        for place in range(1, len(rows) + 1):
            if place == len(rows) or rows[place] != rows[start]:
                yield rows[start], gold[start:place], said[start:place]
                start = place


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    """Of every position: [B, L, C]."""
    found: torch.Tensor = model(**batch.inputs).logits
    return found


def _words(row: Row) -> list[str]:
    """Those of a row; RowError for what is no word."""
    given = row.values["tokens"]
    if isinstance(given, str):
        return WORD.findall(given)
    for number, word in enumerate(given, 1):
        if not isinstance(word, str) or not word.strip():
            raise RowError(f"token {number} is {'empty' if isinstance(word, str) else f'{word!r}, not text'}")
    return [word.strip() for word in given]


def _word_at(text: str, starts: Sequence[int], start: int, end: int) -> int | None:
    """The word that the first character of a token belongs to that is no space; None for a token of spaces."""
    while start < end and text[start].isspace():
        start += 1
    return bisect_right(starts, start) - 1 if start < end else None


def _chosen(windows: Sequence[Words]) -> dict[int, int]:
    """For each word that has a token, the window where the first one has the most tokens on its nearer side."""
    best: dict[int, tuple[int, int]] = {}
    for number, window in enumerate(windows):
        for place, word in enumerate(window.words):
            if word is not None and (place == 0 or window.words[place - 1] != word):
                around = min(place, len(window.words) - 1 - place)
                if word not in best or around > best[word][0]:
                    best[word] = around, number
    return {word: number for word, (_, number) in best.items()}
