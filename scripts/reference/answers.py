"""Fine-tune a model that finds answers as transformers' run_qa.py does: what ftkit is compared with.

python -m reference.answers --model DIR --train rows.jsonl --validation rows.jsonl --report out.json
Rows have `question`, `context` and `answers`, a list of {text, answer_start}, or {text: [...], answer_start: [...]}.
"""

from __future__ import annotations

import collections
import re
import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, DataCollatorWithPadding, set_seed

from benchmarks.measure import Watch
from reference import plain
from reference.classification import read

BEST, LONGEST = 20, 30  # answers looked at, and tokens in one


def windows(row: dict[str, Any], tokenizer: Any, args: Any) -> Any:
    return tokenizer(
        row["question"].strip(),
        row["context"],
        truncation="only_second",
        max_length=args.max_length,
        stride=args.stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )


def right(row: dict[str, Any]) -> list[tuple[str, int]]:
    """The answers of a row, each with the character where it begins."""
    given = row["answers"]
    if isinstance(given, dict):
        return list(zip(given["text"], given["answer_start"], strict=True))
    return [(answer["text"], answer["answer_start"]) for answer in given]


def training(rows: list[dict[str, Any]], tokenizer: Any, args: Any) -> Dataset:
    """A window a row, with the first and last token of the answer; those of [CLS] where the window has no answer."""
    found = []
    for row in rows:
        encoded = windows(row, tokenizer, args)
        text, begin = right(row)[0]
        end = begin + len(text)
        for number, ids in enumerate(encoded["input_ids"]):
            places = [place for place, of in enumerate(encoded.sequence_ids(number)) if of == 1]
            offsets = encoded["offset_mapping"][number]
            inside = offsets[places[0]][0] <= begin and offsets[places[-1]][1] >= end
            start = next(place for place in reversed(places) if offsets[place][0] <= begin) if inside else 0
            stop = next(place for place in places if offsets[place][1] >= end) if inside else 0
            found.append({**{name: encoded[name][number] for name in tokenizer.model_input_names}, "start_positions": start, "end_positions": stop})
            assert len(ids) <= args.max_length
    return Dataset.from_list(found)


def answers(rows: list[dict[str, Any]], tokenizer: Any, args: Any, trainer: Any) -> list[str]:
    """The likeliest span of all windows of each row."""
    features, owners = [], []
    for index, row in enumerate(rows):
        encoded = windows(row, tokenizer, args)
        for number in range(len(encoded["input_ids"])):
            features.append({name: encoded[name][number] for name in tokenizer.model_input_names})
            of_context = [of == 1 for of in encoded.sequence_ids(number)]
            owners.append((index, [offset if own else None for offset, own in zip(encoded["offset_mapping"][number], of_context, strict=True)]))
    starts, ends = trainer.predict(Dataset.from_list(features)).predictions
    best: list[tuple[float, str]] = [(-np.inf, "")] * len(rows)
    for (index, offsets), start, end in zip(owners, starts, ends, strict=True):
        for first in np.argsort(start)[-1 : -BEST - 1 : -1]:
            for last in np.argsort(end)[-1 : -BEST - 1 : -1]:
                if max(first, last) >= len(offsets) or not offsets[first] or not offsets[last] or not 0 <= last - first < LONGEST:
                    continue
                if start[first] + end[last] > best[index][0]:
                    best[index] = start[first] + end[last], rows[index]["context"][offsets[first][0] : offsets[last][1]]
    return [text for _, text in best]


def words(text: str) -> list[str]:
    """As SQuAD's evaluate-v1.1.py compares them."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def f1(said: str, true: str) -> float:
    one, other = words(said), words(true)
    same = sum((collections.Counter(one) & collections.Counter(other)).values())
    return 2 * same / (len(one) + len(other)) if same else 0.0


def main() -> None:
    options = plain.parser(__doc__, batch_size=32, learning_rate=3e-5, epochs=2)
    options.add_argument("--validation", type=Path, required=True)
    options.add_argument("--method", choices=["full"], default="full")
    options.add_argument("--max-length", type=int, default=384)
    options.add_argument("--stride", type=int, default=128)
    args = options.parse_args()

    set_seed(args.seed)
    rows, measured = read(args.train), read(args.validation)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    watch = Watch(args.warm_up)
    trainer = plain.train(
        args,
        {"lr_scheduler_type": "linear", "warmup_steps": 0.1, "weight_decay": 0.01, "per_device_eval_batch_size": 64},
        watch,
        model=AutoModelForQuestionAnswering.from_pretrained(args.model, dtype=torch.float32),
        train_dataset=training(rows, tokenizer, args),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    loss = trainer.evaluate(training(measured, tokenizer, args))["eval_loss"]
    said = answers(measured, tokenizer, args, trainer)
    golds = [[text for text, _ in right(row)] for row in measured]
    found = {
        "loss": loss,
        "exact_match": float(np.mean([max(words(text) == words(gold) for gold in each) for text, each in zip(said, golds, strict=True)])),
        "f1": float(np.mean([max(f1(text, gold) for gold in each) for text, each in zip(said, golds, strict=True)])),
    }
    watch.write(args.report, supervised=round(len(rows) * args.epochs), metrics=found)


if __name__ == "__main__":
    main()
