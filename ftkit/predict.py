"""`ftkit predict`: what a run says to texts, to the rows of a file, or in a conversation."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ftkit.data.ondisk import Spool
from ftkit.data.rows import load_split
from ftkit.data.types import Row
from ftkit.errors import RecipeError
from ftkit.opened import Opened, open_here
from ftkit.report import Reporter

if TYPE_CHECKING:
    from ftkit.tasks import Shape

WINDOW = 16  # batches of rows are sorted by length together: little padding, and the first answers come soon


def predict(target: str, texts: Sequence[str], file: str | None) -> Iterator[dict[str, Any]]:
    """The answers of a run, in order: to texts, or to the rows of a file, which need no labels.

    A run on pairs takes the texts two by two.  Answers to a file say the number of their `row`.
    """
    with Reporter(None) as report:
        run = open_here(target, report)
        if file is not None:
            rows = load_split(file, None, run.recipe.data, run.recipe.task, report.note, answers=False)
            return ({"row": row.number} | answer for row, answer in zip(rows, _answers(run, rows), strict=True))
    return _answers(run, _rows(run, texts))


def write_csv(answers: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Lines of CSV (RFC 4180, but for its line ends) with a column for each key that any answer has; lists and objects are JSON.

    The answers are known when this returns, and wait on disk: only then are the columns.
    """
    known: Spool[dict[str, Any]] = Spool(dict, dict)
    columns: dict[str, None] = {}
    for answer in answers:
        known.append(answer)
        columns |= dict.fromkeys(answer)
    return _csv(list(columns), known)


def _csv(columns: list[str], answers: Iterable[dict[str, Any]]) -> Iterator[str]:
    line = io.StringIO()
    writer = csv.DictWriter(line, columns, lineterminator="\n")
    writer.writeheader()
    for answer in answers:
        yield line.getvalue()
        line.seek(0)
        line.truncate()
        writer.writerow({name: json.dumps(value, ensure_ascii=False) if isinstance(value, bool | list | dict) else value for name, value in answer.items()})
    yield line.getvalue()


def chat(target: str) -> None:
    """Talk to a run in the terminal until the input ends: answers appear on stdout as they are written.

    Raises RecipeError for a run that does not talk.
    """
    from transformers import TextStreamer

    with Reporter(None) as report:
        run = open_here(target, report)
    reply = getattr(run.recipe.task, "reply", None)
    if reply is None:
        raise RecipeError(f"--chat: {target} does {run.recipe.task.kind}, which is no conversation; give texts, or --file F")
    messages: list[dict[str, str]] = []
    while question := _ask():
        messages.append({"role": "user", "content": question})
        streamer = TextStreamer(run.tokenizer, skip_prompt=True, skip_special_tokens=True)
        answer = reply(run.model, run.tokenizer, messages, run.limits, run.recipe.eval.generation, streamer)
        messages.append({"role": "assistant", "content": answer})


def _ask() -> str:
    """What the user says next; empty at the end."""
    print("> ", end="", file=sys.stderr, flush=True)
    try:
        return input().strip()
    except EOFError:
        print(file=sys.stderr)
        return ""


def _rows(run: Opened, texts: Sequence[str]) -> list[Row]:
    """Texts as rows of the kind that the run was trained on."""
    names = _inputs(run)
    if len(texts) % len(names):
        raise RecipeError(f"{run.path} reads {' and '.join(names)}: give {len(names)} texts for each answer, or a file with these columns (--file F)")
    blank = [number for number, text in enumerate(texts, 1) if not text.strip()]
    if blank:
        raise RecipeError(f"text {blank[0]} is empty")
    values: list[dict[str, Any]] = [dict(zip(names, texts[i : i + len(names)], strict=True)) for i in range(0, len(texts), len(names))]
    if names == ["messages"]:
        values = [{"messages": [{"role": "user", "content": each["messages"]}]} for each in values]
    return [Row(each, "text", number) for number, each in enumerate(values, 1)]


def _inputs(run: Opened) -> list[str]:
    """The columns that the run is given, in the order of its task; a converted chat format leaves none in the recipe."""
    trained = set(run.recipe.data.columns) or {"messages"}
    shape: Shape = next(shape for shape in run.recipe.task.shapes if {column.name for column in shape.required} <= trained)
    return [column.name for column in shape.asked]


def _answers(run: Opened, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Answers in order; rows of like length are answered together."""
    recipe, size = run.recipe, run.recipe.eval.batch_size
    # every row has an answer: one too long is cut where the recipe would have left it out of the training
    limits = run.limits._replace(truncation="right") if run.limits.truncation == "drop" else run.limits
    for start in range(0, len(rows), WINDOW * size):
        window = rows[start : start + WINDOW * size]
        order = sorted(range(len(window)), key=lambda i: len(str(window[i].values)))
        answers: dict[int, dict[str, Any]] = {}
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            said = recipe.task.predict(run.model, run.tokenizer, [window[i] for i in chosen], limits, recipe.eval.generation)
            answers.update(zip(chosen, said, strict=True))
        for i in range(len(window)):
            yield answers[i]
