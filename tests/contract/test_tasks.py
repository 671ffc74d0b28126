"""Every built-in task keeps the contract in every shape of its rows, and tasks with the usual mistakes do not."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ftkit import model, plugins
from ftkit.data.formats import checked
from ftkit.data.types import Features, Row, RowError
from ftkit.methods.full import Full
from ftkit.recipe.spec import Model
from ftkit.sources import locate
from ftkit.tasks.causal_lm import CausalLM
from ftkit.tasks.masked_lm import MaskedLM
from ftkit.tasks.next_sentence import NextSentence
from ftkit.tasks.problems import ClassMetrics
from ftkit.tasks.question_answering import QuestionAnswering
from ftkit.tasks.replaced_token_detection import ReplacedTokenDetection
from ftkit.tasks.reranking import Reranking
from ftkit.tasks.sentence_embedding import SentenceEmbedding
from ftkit.tasks.sentence_order import SentenceOrder
from ftkit.tasks.seq2seq import Seq2Seq
from ftkit.tasks.text_classification import TextClassification
from ftkit.tasks.token_classification import TokenClassification
from ftkit.testing import check_task

SHAPES = {  # data set -> task, how its file calls the columns, architectures with the head
    "single": (TextClassification(), {"text": "text", "label": "label"}, ("bert", "distilbert", "llama", "gpt2", "t5", "bart")),
    "pairs": (TextClassification(), {"sentence1": "text", "sentence2": "text_pair", "label": "label"}, ("bert", "llama", "t5", "bart")),
    "labelled": (TextClassification(problem="multi-label"), {"text": "text", "label": "label"}, ("bert", "llama")),
    "scored": (TextClassification(problem="regression"), {"sentence1": "text", "sentence2": "text_pair", "score": "score"}, ("bert", "gpt2")),
    "masked": (MaskedLM(), {"text": "text"}, ("bert-masked", "distilbert-masked")),
    "documents": (NextSentence(), {"text": "text"}, ("bert-pretrained",)),
    "texts": (ReplacedTokenDetection(), {"text": "text"}, ("electra-pretrained",)),
    "lines": (SentenceOrder(), {"text": "text"}, ("albert-pretrained", "bert-pretrained")),
    "text": (CausalLM(), {"text": "text"}, ("llama", "gpt2")),
    "prompts": (CausalLM(), {"prompt": "prompt", "completion": "completion"}, ("llama", "gpt2")),
    "chats": (CausalLM(), {"messages": "messages"}, ("llama",)),
    "tagged": (TokenClassification(), {"tokens": "tokens", "ner_tags": "tags"}, ("bert", "distilbert", "gpt2", "llama", "t5", "mt5")),
    "asked": (QuestionAnswering(), {"question": "question", "context": "context", "answers": "answers"}, ("bert", "distilbert", "gpt2", "t5", "bart")),
    "matched": (SentenceEmbedding(symmetric=True), {"anchor": "text", "positive": "text_pair", "negative": "negative"}, ("bert", "distilbert")),
    "alike": (
        SentenceEmbedding(loss="cosent", pooling="last", normalize=True),
        {"sentence1": "text", "sentence2": "text_pair", "score": "score"},
        ("gpt2", "llama"),
    ),
    "premises": (SentenceEmbedding(loss="softmax"), {"premise": "text", "hypothesis": "text_pair", "label": "label"}, ("bert", "gpt2")),
    "ranked": (Reranking(), {"query": "text", "document": "text_pair", "label": "score"}, ("bert", "llama")),
    "rewritten": (Seq2Seq(), {"source": "source", "target": "target"}, ("t5", "mt5", "bart")),
}


def rows(directory: Path, columns: dict[str, str], count: int = 8) -> list[Row]:
    path = next(directory.glob("train.*"))
    with path.open(encoding="utf-8") as file:
        values = list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]
    return [Row({name: checked(name, row[column]) for column, name in columns.items()}, str(path), number) for number, row in enumerate(values[:count], 1)]


def loaded(checkpoint: str):
    """The tokenizer of a checkpoint, and a factory of models with the head of a task."""
    spec = Model(name=checkpoint)
    source = locate(spec)
    tokenizer = model.load_tokenizer(spec, source, None, ())

    def load(task):
        config = model.load_config(spec, source)
        return model.load(spec, source, config, tokenizer, task, Full(), torch.float32, 0, torch.device("cpu")).model

    return tokenizer, load


def test_every_built_in_task_is_here():
    assert {task.kind for task, _, _ in SHAPES.values()} == set(plugins.BUILTIN["task"])


@pytest.mark.parametrize(("shape", "architecture"), [(shape, name) for shape, (_, _, names) in SHAPES.items() for name in names])
def test_a_task_keeps_the_contract(shape, architecture, data, checkpoint):
    task, columns, _ = SHAPES[shape]
    examples = rows(getattr(data, shape), columns)
    asked = {
        "masked": lambda text: {"text": f"{text} [MASK]"},
        **dict.fromkeys(("documents", "lines"), lambda text: dict(zip(("text", "text_pair"), text.splitlines(), strict=False))),
    }
    questions = [replace(row, values=asked[shape](row.values["text"])) for row in examples] if shape in asked else None
    check_task(task, examples, *loaded(checkpoint(architecture)), questions)


class Unmasked(TextClassification):
    """Lets the padding in."""

    def items(self, model, batch):
        return super().items(model, replace(batch, attention_mask=torch.ones_like(batch.input_ids)))


class Silent(TextClassification):
    """Does not tell what it cuts."""

    def encode(self, row, tokenizer, limits):
        return [Features(**{**_fields(each), "truncated": 0}) for each in super().encode(row, tokenizer, limits)]


class Lenient(TextClassification):
    """Cuts where it should refuse."""

    def encode(self, row, tokenizer, limits):
        try:
            return super().encode(row, tokenizer, limits)
        except RowError:
            return super().encode(row, tokenizer, limits._replace(truncation="right"))


class Miscounted(TextClassification):
    """A target, two weights."""

    def encode(self, row, tokenizer, limits):
        return [Features(**{**_fields(each), "weights": each.weights * 2}) for each in super().encode(row, tokenizer, limits)]


class Averaged(TextClassification):
    """Averages where sums are wanted."""

    def metrics(self, rows, features):
        return AveragedMetrics(self._names)


class AveragedMetrics(ClassMetrics):
    """The largest loss so far is no sum."""

    def update(self, scores):
        before = self.sums["loss"].clone()
        super().update(scores)
        self.sums["loss"] = torch.maximum(before, (self.sums["loss"] - before) / len(scores.weights))


class Lost(TextClassification):
    """Forgets the last record."""

    def records(self, parts):
        return super().records(parts)[:-1]


class Tensors(TextClassification):
    """Answers with what JSON does not know."""

    def predict(self, model, tokenizer, rows, limits, generation):
        return [{"probability": torch.tensor(0.5)} for _ in rows]


class Careless(MaskedLM):
    """Draws from a generator of its own."""

    def corruption(self, features, tokenizer, seed):
        found, own = super().corruption(features, tokenizer, seed), np.random.default_rng(0)
        return replace(found, change=lambda example, rng: found.change(example, own))


class Overwriting(MaskedLM):
    """Hides tokens in what is stored."""

    def corruption(self, features, tokenizer, seed):
        found = super().corruption(features, tokenizer, seed)

        def change(example, rng):
            example["input_ids"][:] = found.change(example, rng)["input_ids"]
            return example

        return replace(found, change=change)


def _fields(features: Features) -> dict:
    return {name: getattr(features, name) for name in Features.__dataclass_fields__}


@pytest.mark.parametrize(("task", "told"), [(Careless(), "draw from the generator that is given"), (Overwriting(), "change a copy")])
def test_a_task_that_corrupts_wrongly_is_told_what_to_change(task, told, data, checkpoint):
    with pytest.raises(AssertionError, match=told):
        check_task(task, rows(data.masked, {"text": "text"}), *loaded(checkpoint("bert-masked")))


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (Unmasked(), "mask the padding"),
        (Silent(), "truncated says 0"),
        (Lenient(), "must raise RowError"),
        (Miscounted(), "1 targets, but 2 weights"),
        (Averaged(), "keep sums, not means"),
        (Lost(), "one object for each feature"),
        (Tensors(), "cannot be written as JSON"),
    ],
    ids=["unmasked", "silent", "lenient", "miscounted", "averaged", "lost", "tensors"],
)
def test_a_broken_task_is_told_what_to_change(task, told, data, checkpoint):
    _, columns, _ = SHAPES["single"]
    with pytest.raises(AssertionError, match=told):
        check_task(task, rows(data.single, columns), *loaded(checkpoint("bert")))
