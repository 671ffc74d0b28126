"""Train a masked language model further as transformers' run_mlm.py does: what ftkit is compared with.

python -m reference.masks --model DIR --train rows.jsonl --validation rows.jsonl --report out.json
Rows have `text`; texts are joined and cut into inputs of equal length.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AddedToken, AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling, set_seed

from benchmarks.measure import Watch
from reference import plain
from reference.classification import read


def dataset(rows: list[dict[str, Any]], tokenizer: Any, max_length: int) -> Dataset:
    ids = list(chain.from_iterable(tokenizer(row["text"])["input_ids"] for row in rows))
    parts = [ids[start : start + max_length] for start in range(0, len(ids) - max_length + 1, max_length)]
    return Dataset.from_dict({"input_ids": parts})


def main() -> None:
    options = plain.parser(__doc__, batch_size=32, learning_rate=5e-5, epochs=1)
    options.add_argument("--validation", type=Path, required=True)
    options.add_argument("--method", choices=["full"], default="full")
    options.add_argument("--max-length", type=int, default=128)
    options.add_argument("--steps", type=int, default=-1)
    options.add_argument("--tokens", type=Path, help="file of tokens that are added, one a line")
    args = options.parse_args()

    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForMaskedLM.from_pretrained(args.model, dtype=torch.float32)
    if args.tokens:
        words = args.tokens.read_text(encoding="utf-8").split("\n")[:-1]
        tokenizer.add_tokens([AddedToken(word, single_word=True) for word in words])  # not within longer words
        model.resize_token_embeddings(len(tokenizer))
    watch = Watch(args.warm_up)
    train = dataset(read(args.train), tokenizer, args.max_length)
    trainer = plain.train(
        args,
        {"lr_scheduler_type": "linear", "warmup_steps": 0.1, "weight_decay": 0.01, "per_device_eval_batch_size": 64, "max_steps": args.steps},
        watch,
        model=model,
        train_dataset=train,
        data_collator=DataCollatorForLanguageModeling(tokenizer),
        processing_class=tokenizer,
    )
    measured = trainer.evaluate(dataset(read(args.validation), tokenizer, args.max_length))
    watch.write(args.report, supervised=0, metrics={"loss": measured["eval_loss"]})


if __name__ == "__main__":
    main()
