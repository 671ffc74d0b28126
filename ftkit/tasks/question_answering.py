"""Extractive question answering: which words of a text answer a question, or that none do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from ftkit.data.files import json_type
from ftkit.data.types import Features, Items, Limits, Row, RowError
from ftkit.errors import DataError
from ftkit.recipe.spec import Default, Generation, Spec, option
from ftkit.tasks import Column, Shape
from ftkit.tasks.squad import Judged, Score, best_threshold, score
from ftkit.tasks.streaming import Streaming
from ftkit.tasks.texts import features_of
from ftkit.tasks.windows import check_tokenizer, windows_of

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ftkit.data.features import FeatureSet
    from ftkit.data.types import Batch, Scores, Targets

QUESTION = Column("question", "what is asked", "query")
CONTEXT = Column("context", "the text that the answer stands in", "passage", "paragraph")
ANSWERS = Column("answers", "right answers, each with its text and answer_start, the character of the context where it begins; none if there is none", "answer")
ANSWER_START = Column("answer_start", "where answers begin that are plain text")

NULL = 0  # the position that stands for no answer: the first one, BERT's [CLS], is never in the context
ANSWERED_WINDOWS = 16  # answered together

EXAMPLES = (  # a context, a question, its answer
    ("Anna met Paul in Bern last May.", "Where did Anna meet Paul?", "Bern"),
    ("The Rhine flows through Basel to the sea.", "Which river flows through Basel?", "The Rhine"),
    ("Ahab sailed from Nantucket with thirty men.", "How many men sailed with Ahab?", "thirty"),
    ("It rained in Oslo all week.", "Where did it rain?", "Oslo"),
    ("The baker sold every loaf before noon.", "Who sold the bread?", "The baker"),
    ("Two owls nest in the church tower.", "Where do the owls nest?", "in the church tower"),
    ("The library opens at nine on weekdays.", "When does the library open?", "at nine"),
    ("He peeled the apples and baked a cake.", "What did he bake?", "a cake"),
    ("Her coat is blue and too long.", "What colour is her coat?", "blue"),
    ("The train to Bergen was ten minutes late.", "How late was the train?", "ten minutes"),
    ("The old bridge is closed to cars.", "What is closed?", "The old bridge"),
    ("Snow fell on Mount Fuji in October.", "When did snow fall?", "October"),
)


class Answer(NamedTuple):
    """A right answer, and the character of the context where it begins."""

    text: str
    start: int


class Span(NamedTuple):
    """Characters of a context, and the sum of the logits of their first and last token."""

    score: float
    start: int
    end: int


class QuestionAnswering(Spec):
    """Which part of a text answers a question."""

    kind: Literal["question-answering"] = "question-answering"
    stride: int = option(128, "tokens that the windows of a context longer than data.max_length share", "transformers' run_qa.py", ge=0)
    max_answer_length: int = option(30, "tokens in an answer at most, when one is looked for", "transformers' run_qa.py", ge=1)
    n_best: int = option(20, "answers to a question that `ftkit predict` gives, the best first", "transformers' run_qa.py", ge=1)
    null_threshold: float | None = option(
        None,
        "no answer is said where its score is higher than that of the best answer by more than this (arXiv 1810.04805, 4.3); "
        "if empty, 0 where training rows have questions without an answer, else every question is answered",
    )

    shapes: ClassVar[tuple[Shape, ...]] = (Shape(QUESTION, CONTEXT, optional=(ANSWERS, ANSWER_START)),)
    txt_row: ClassVar[str] = "line"
    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    peft_type: ClassVar[None] = None  # that of its own, QUESTION_ANS, loses token_type_ids on the way to the model (0.21.2)
    targets: ClassVar[Targets] = "positions"
    new_head: ClassVar[bool] = True
    main_metric: ClassVar[str] = "f1"
    defaults: ClassVar[Mapping[str, Default]] = {
        "data.max_length": Default(384, "transformers' run_qa.py"),
    }

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Those of questions with and without an answer, where both are, and what the best threshold would give."""
        if self.null_threshold is None:
            return ("f1", "exact_match", "loss")
        of_both = ("f1_has_answer", "exact_match_has_answer", "exact_match_no_answer")
        return ("f1", "exact_match", *of_both, "best_f1", "best_f1_threshold", "loss")

    def examples(self) -> list[dict[str, Any]]:
        """Short contexts; the last question has no answer if recipes know such."""
        rows = [
            {"question": question, "context": text, "answers": [{"text": answer, "answer_start": text.index(answer)}]} for text, question, answer in EXAMPLES
        ]
        return rows if self.null_threshold is None else [*rows[:-1], {**rows[-1], "question": "Who climbed it?", "answers": []}]

    def resolve(self, rows: Iterable[Row]) -> QuestionAnswering:
        """With a threshold for no answer, where there are training rows without one."""
        answered, unanswered, flaw = 0, 0, ""
        for row in rows:
            try:
                some = bool(_answers(row))
            except RowError as error:  # encode() says it of each such row
                flaw = flaw or f": {row.where}: {error}"
                continue
            answered, unanswered = answered + some, unanswered + (not some)
        if not answered:
            raise DataError(f"the training rows have no answer that can be used{flaw}")
        return self if self.null_threshold is not None or not unanswered else self.model_copy(update={"null_threshold": 0.0})

    def check(self, tokenizer: Any) -> None:
        """Refuse a tokenizer that does not say which characters its tokens are of."""
        check_tokenizer(tokenizer, self.kind, "answers cannot be found there")

    def config_kwargs(self) -> dict[str, Any]:
        """A logit for each of two roles of a token."""
        names = ["start", "end"]
        return {"num_labels": 2, "id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}

    def encode(self, row: Row, tokenizer: Any, limits: Limits) -> list[Features]:
        """The question and a window of the context, several if it is long; the target is the first token of the first answer, and the last.

        A window without the whole of it has the position of no answer as both, as in transformers' run_qa.py.
        `truncation: drop` and `error` look at whole rows.
        """
        question, context, answers = row.values["question"].strip(), row.values["context"], _answers(row)
        asked = len(tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"])
        room = limits.max_length - tokenizer.num_special_tokens_to_add(pair=True) - asked
        if room < 1:
            if limits.truncation == "drop":
                return []
            raise RowError(f"the question has {asked} tokens, which leaves no room for the context in data.max_length: {limits.max_length}")
        windows = windows_of(tokenizer, context, limits, self.stride, room, before=question)
        if len(windows) > 1 and limits.truncation == "drop":
            return []
        if len(windows) > 1 and limits.truncation == "error":
            raise RowError(f"more tokens than data.max_length: {limits.max_length}")
        spans = [[(0, 0) if span is None else _stripped(context, *span) for span in window.spans] for window in windows]
        if not any(start < end for each in spans for start, end in each):
            raise RowError("the tokenizer makes nothing of the context")
        places = [_tokens_of(answers[0], each) if answers else None for each in spans]
        if answers and not any(places):
            length = len(answers[0].text)
            raise RowError(f"no window holds the whole of the answer {answers[0].text[:40]!r} ({length:,} characters); raise data.max_length or task.stride")
        return [
            Features(window.input_ids, [*(place or (NULL, NULL))], [1.0], window.token_type_ids, spans=[*chain.from_iterable(each)])
            for window, place, each in zip(windows, places, spans, strict=True)
        ]

    def items(self, model: Any, batch: Batch) -> Items:
        """Two of each row, where the answer begins and where it ends, each with a logit for all positions of its row [2 B, L].

        Together they count as their row.  Padding is no position: unlike the loss that transformers' models compute of
        `start_positions` and `end_positions`, theirs does not depend on the rows beside it.
        """
        import torch

        from ftkit import prompts

        output = model(**batch.inputs)
        logits = torch.stack((output.start_logits, output.end_logits), 1)  # [B, 2, L]
        if virtual := prompts.of(model):
            logits = logits[..., virtual.length :]
        padding = batch.attention_mask[:, None, -logits.shape[-1] :] == 0
        return Items(
            states=logits.masked_fill(padding, -torch.inf).flatten(0, 1),
            head=None,
            num_classes=logits.shape[-1],
            targets=batch.targets.flatten(),
            weights=batch.weights.repeat_interleave(2) / 2,
            rows=batch.row_ids.repeat_interleave(2),
            kind=self.targets,
        )

    def complete(self, model: Any, tokenizer: Any) -> None:
        """What is said depends on logits and text alone."""

    def metrics(self, rows: Sequence[Row], features: FeatureSet) -> AnswerMetrics:
        return AnswerMetrics(self, rows, features)

    def chosen(self, best: Span, null: float) -> Span | None:
        """The best answer, or none where this is said: `null` is its score."""
        return None if self.null_threshold is not None and null - best.score > self.null_threshold else best

    def predict(self, model: Any, tokenizer: Any, rows: list[Row], limits: Limits, generation: Generation) -> list[dict[str, Any]]:
        """`text` with the characters `start` to `end` of the context, its `score` (sum of two logits) and `probability`; and the `n_best` such answers.

        No answer is an empty text, `start` and `end` being null; it is among the best where recipes have a null_threshold.
        Probabilities are the softmax of the scores of these.
        """
        import numpy as np
        import torch

        from ftkit.data.batches import collate

        features = features_of(rows, lambda row: self.encode(row, tokenizer, limits))
        found: list[set[Span]] = [set() for _ in rows]
        nulls: list[list[float]] = [[] for _ in rows]
        for start in range(0, len(features), ANSWERED_WINDOWS):
            indices = np.arange(len(features))[start : start + ANSWERED_WINDOWS]
            with torch.inference_mode():
                logits = self.items(model, collate(features, indices, tokenizer.pad_token_id).to(model.device)).states
            for row, spans, null in zip(features.row[start : start + ANSWERED_WINDOWS].tolist(), *self.best(logits, features, indices), strict=True):
                found[row] |= set(spans)
                nulls[row].append(null)
        return [self._answer(row.values["context"], spans, null) for row, spans, null in zip(rows, found, map(min, nulls), strict=True)]

    def _answer(self, context: str, found: Iterable[Span], null: float) -> dict[str, Any]:
        """What is said, of spans of all windows."""
        import torch

        best: dict[tuple[int, int], Span] = {}
        for span in sorted(found, reverse=True):  # neighbouring windows see the same characters
            best.setdefault((span.start, span.end), span)
        spans: list[Span | None] = [*islice(best.values(), self.n_best)]
        said = self.chosen(max(found), null)
        if self.null_threshold is not None:
            spans.append(None)
        scores = [null if span is None else span.score for span in spans]
        probabilities = torch.tensor(scores).softmax(0).tolist()
        answers = [_in_words(context, span) | {"score": value, "probability": p} for span, value, p in zip(spans, scores, probabilities, strict=True)]
        return answers[spans.index(said)] | {"n_best": sorted(answers, key=lambda answer: answer["score"], reverse=True)}

    def best(self, logits: torch.Tensor, features: FeatureSet, indices: np.ndarray, count: int | None = None) -> tuple[list[list[Span]], list[float]]:
        """The `count` best spans of each of these features, n_best if None, and the score of no answer; logits [2 n, L].

        All pairs of a first and a last token are compared that are at most max_answer_length apart.  A feature may have fewer.
        """
        import numpy as np
        import torch
        from torch.nn import functional as F

        both = logits.float().unflatten(0, (-1, 2))  # [n, 2, L]
        spans = np.zeros((len(both), both.shape[-1], 2), np.int64)
        for place, index in enumerate(indices.tolist()):
            own = features.get(index)["spans"].reshape(-1, 2)
            spans[place, : len(own)] = own
        characters = torch.from_numpy(spans).to(logits.device)
        outside = characters[..., 0] == characters[..., 1]
        first, last = both.masked_fill(outside.unsqueeze(1), -torch.inf).unbind(1)
        length = min(self.max_answer_length, both.shape[-1])
        pairs = first.unsqueeze(-1) + F.pad(last, (0, length - 1), value=-torch.inf).unfold(-1, length, 1)  # [n, L, length]
        scores, places = pairs.flatten(1).topk(min(count or self.n_best, pairs[0].numel()))
        begins, tokens = places // length, places % length
        starts = characters[..., 0].gather(1, begins)
        ends = characters[..., 1].gather(1, (begins + tokens).clamp(max=both.shape[-1] - 1))
        found = [
            [Span(*span) for span in zip(*row, strict=True) if span[0] != -torch.inf]
            for row in zip(scores.tolist(), starts.tolist(), ends.tolist(), strict=True)
        ]
        return found, both[..., NULL].sum(1).tolist()


class AnswerMetrics(Streaming):
    """Exact match and F1 of the answers to whole questions; the loss by windows.

    Of each window its best answer is kept, and the score of no answer; one that is seen twice changes nothing.
    """

    def __init__(self, task: QuestionAnswering, rows: Sequence[Row], features: FeatureSet) -> None:
        import torch

        super().__init__()
        self.task, self.rows, self.features = task, rows, features
        self.keep("windows", torch.zeros(0, 5))  # a request to stop may come before the first

    def update(self, scores: Scores) -> None:
        import torch

        self.add_loss(scores)
        indices = scores.rows[::2].cpu()
        found, nulls = self.task.best(scores.logits, self.features, indices.numpy(), 1)
        kept = [(index, null, *span) for index, spans, null in zip(indices.tolist(), found, nulls, strict=True) for span in spans]
        self.keep("windows", torch.tensor(kept).reshape(-1, 5))

    def _questions(self) -> Iterator[tuple[int, Span, float]]:
        """The first feature that was measured of each question, its best answer, and the score of no answer, in order."""
        windows: dict[int, list[tuple[int, float, Span]]] = {}
        for index, null, value, start, end in self.all("windows").tolist():
            windows.setdefault(int(self.features.row[int(index)]), []).append((int(index), null, Span(value, int(start), int(end))))
        for _, each in sorted(windows.items()):
            indices, nulls, spans = zip(*each, strict=True)
            yield min(indices), max(spans), min(nulls)

    def compute(self) -> dict[str, float]:
        """Fractions from 0 to 1; where recipes have a null_threshold, also of questions with an answer, and without."""
        scores, judged = self._judged()
        values = _means(scores)
        if self.task.null_threshold is not None:
            with_answer = [each for each, question in zip(scores, judged, strict=True) if question.answerable]
            without = [each for each, question in zip(scores, judged, strict=True) if not question.answerable]
            values |= {f"{name}_has_answer": value for name, value in _means(with_answer).items()}
            values |= {f"{name}_no_answer": value for name, value in _means(without).items() if name == "exact_match"}  # F1 is the same
            values |= dict(zip(("best_f1", "best_f1_threshold"), best_threshold(judged), strict=True))
        return values | self.loss()

    def draws(self) -> Iterator[dict[str, float]]:
        """Of whole questions."""
        import torch

        scores = torch.tensor([(each.f1, each.exact_match) for each in self._judged()[0]], dtype=torch.float64)
        return (dict(zip(("f1", "exact_match"), drawn.mean(0).tolist(), strict=True)) for drawn in self.redrawn(scores))

    def _judged(self) -> tuple[list[Score], list[Judged]]:
        """How right what is said of each question is; and its best answer, beside the threshold from which on none is said."""
        version = 1 if self.task.null_threshold is None else 2
        scores, judged = [], []
        for index, best, null in self._questions():
            row = self.rows[int(self.features.row[index])]
            right, context = [answer.text for answer in _answers(row)], row.values["context"]
            scores.append(score(_in_words(context, self.task.chosen(best, null))["text"], right, version))
            judged.append(Judged(null - best.score, score(_in_words(context, best)["text"], right, version).f1, bool(right)))
        return scores, judged

    def records(self) -> list[dict[str, Any]]:
        """Of each question the right answers, what the model says, and the score of the best answer; and that of no answer where this can be said."""
        found = []
        for index, best, null in self._questions():
            row = self.rows[int(self.features.row[index])]
            said = _in_words(row.values["context"], self.task.chosen(best, null))
            record = {"feature": index, "answers": [answer.text for answer in _answers(row)], **said, "score": best.score}
            found.append(record if self.task.null_threshold is None else record | {"null_score": null})
        return found


def _means(scores: Sequence[Score]) -> dict[str, float]:
    """Those of some questions, if there are any."""
    return {name: sum(getattr(each, name) for each in scores) / len(scores) for name in ("f1", "exact_match") if scores}


def _answers(row: Row) -> list[Answer]:
    """The right answers of a row, in any of the forms that they are given in; RowError where they are not in the context."""
    given, start = row.values.get("answers"), row.values.get("answer_start")
    if given is None:
        return []
    if isinstance(given, list) and all(isinstance(each, dict) for each in given):
        pairs = [(each.get("text"), each.get("answer_start")) for each in given]
    else:
        texts, starts = (given.get("text"), given.get("answer_start")) if isinstance(given, dict) else (given, start)
        texts, starts = ([] if each is None else each if isinstance(each, list) else [each] for each in (texts, starts))
        if len(texts) != len(starts):
            raise RowError(f"{len(texts)} answers, but {len(starts)} answer_start: each needs the character of the context where it begins")
        pairs = list(zip(texts, starts, strict=True))
    return [_checked(text, start, row.values["context"]) for text, start in pairs]


def _checked(text: Any, start: Any, context: str) -> Answer:
    if not isinstance(text, str):
        raise RowError(f"an answer must be text, but is {json_type(text)}")
    if not text.strip():
        raise RowError("an answer is empty")
    try:
        number = float(start)
    except (TypeError, ValueError):
        number = -1.0
    if isinstance(start, bool) or not number.is_integer() or number < 0:
        raise RowError(f"answer_start must be a number of characters from 0, but is {start!r}")
    place = int(number)
    if context[place : place + len(text)] != text:
        other = context.find(text)
        where = f"it begins at {other}" if other >= 0 else "it is nowhere in the context"
        raise RowError(f"the answer {text[:40]!r} does not begin at answer_start {place}, where {context[place : place + len(text)][:40]!r} stands: {where}")
    return Answer(text, place)


def _in_words(context: str, span: Span | None) -> dict[str, Any]:
    """What is said, and of which characters it is; an empty text where there is no answer."""
    return {"text": "", "start": None, "end": None} if span is None else {"text": context[span.start : span.end], "start": span.start, "end": span.end}


def _stripped(context: str, start: int, end: int) -> tuple[int, int]:
    """The characters of a token without spaces around them."""
    while start < end and context[start].isspace():
        start += 1
    while start < end and context[end - 1].isspace():
        end -= 1
    return start, end


def _tokens_of(answer: Answer, spans: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """The first and the last token of an answer, if the window has the whole of it."""
    start, end = answer.start + len(answer.text) - len(answer.text.lstrip()), answer.start + len(answer.text.rstrip())
    own = [(place, *span) for place, span in enumerate(spans) if span[0] < span[1]]
    inside = [place for place, first, last in own if first < end and last > start]
    return (inside[0], inside[-1]) if inside and own[0][1] <= start and own[-1][2] >= end else None
