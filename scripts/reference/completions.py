"""Fine-tune a language model on prompts and completions as one does with transformers' Trainer: what ftkit is compared with.

python -m reference.completions --model DIR --train rows.jsonl --validation rows.jsonl --report out.json
Rows have `prompt` and `completion`, which alone is learned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, set_seed

from benchmarks.measure import Watch
from reference import plain
from reference.causal_lm import IGNORED
from reference.classification import read


def dataset(rows: list[dict[str, Any]], tokenizer: Any) -> Dataset:
    def encode(row: dict[str, Any]) -> dict[str, Any]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = prompt + completion
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(prompt) + completion}

    return Dataset.from_list(rows).map(encode, remove_columns=list(rows[0]))


def main() -> None:
    options = plain.parser(__doc__, batch_size=32, learning_rate=5e-4, epochs=3)
    options.add_argument("--validation", type=Path, required=True)
    options.add_argument("--method", choices=["full"], default="full")
    args = options.parse_args()

    set_seed(args.seed)
    rows = read(args.train)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    watch = Watch(args.warm_up)
    trainer = plain.train(
        args,
        {"lr_scheduler_type": "linear", "warmup_steps": 0.1, "weight_decay": 0.01, "per_device_eval_batch_size": 1},
        watch,
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        train_dataset=dataset(rows, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    total = count = 0.0
    measured = dataset(read(args.validation), tokenizer)
    for number, labels in enumerate(measured["labels"]):
        learned = sum(label != IGNORED for label in labels)
        total += trainer.evaluate(measured.select([number]))["eval_loss"] * learned
        count += learned
    watch.write(args.report, supervised=0, metrics={"loss": total / count})


if __name__ == "__main__":
    main()
