"""Fine-tune a tagger of words as one does with transformers' Trainer: what ftkit is compared with.

python -m reference.tagging --model DIR --train rows.jsonl --validation rows.jsonl --report out.json
Rows have `tokens` and `tags`.  Needs seqeval (pip install seqeval).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from seqeval.metrics import f1_score
from transformers import AutoModelForTokenClassification, AutoTokenizer, DataCollatorForTokenClassification, set_seed

from benchmarks.measure import Watch
from reference import plain
from reference.classification import read

IGNORED = -100  # the label that transformers' losses leave out


def dataset(rows: list[dict[str, Any]], labels: list[str], tokenizer: Any) -> Dataset:
    """With the tag of each word at its first token."""

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer(row["tokens"], is_split_into_words=True, truncation=True)
        words = encoded.word_ids()
        first = [word is not None and word != before for word, before in zip(words, [None, *words], strict=False)]
        return {**encoded, "labels": [labels.index(row["tags"][word]) if begins else IGNORED for word, begins in zip(words, first, strict=True)]}

    return Dataset.from_list(rows).map(encode, remove_columns=list(rows[0]))


def main() -> None:
    options = plain.parser(__doc__, batch_size=32, learning_rate=5e-5, epochs=3)
    options.add_argument("--validation", type=Path, required=True)
    options.add_argument("--method", choices=["full"], default="full")
    args = options.parse_args()

    set_seed(args.seed)
    rows = read(args.train)
    labels = sorted({tag for row in rows for tag in row["tags"]})
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    watch = Watch(args.warm_up)

    def metrics(prediction: Any) -> dict[str, float]:
        kept = [(gold, said, gold != IGNORED) for gold, said in zip(prediction.label_ids, np.argmax(prediction.predictions, -1), strict=True)]
        gold, said = ([[labels[i] for i in each[of][each[2]]] for each in kept] for of in (0, 1))
        right = sum(a == b for one, other in zip(gold, said, strict=True) for a, b in zip(one, other, strict=True))
        found = {"accuracy": right / sum(map(len, gold))}
        return found | ({"f1": f1_score(gold, said)} if "O" in labels else {})

    trainer = plain.train(
        args,
        {"lr_scheduler_type": "linear", "warmup_steps": 0.1, "weight_decay": 0.01, "per_device_eval_batch_size": 64},
        watch,
        model=AutoModelForTokenClassification.from_pretrained(args.model, num_labels=len(labels), dtype=torch.float32),
        train_dataset=dataset(rows, labels, tokenizer),
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
        compute_metrics=metrics,
    )
    measured = trainer.evaluate(dataset(read(args.validation), labels, tokenizer))
    watch.write(args.report, supervised=round(len(rows) * args.epochs), metrics={name.removeprefix("eval_"): value for name, value in measured.items()})


if __name__ == "__main__":
    main()
