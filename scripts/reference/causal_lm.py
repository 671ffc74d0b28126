"""Fine-tune a language model on chats as one does with transformers' Trainer: what ftkit is compared with.

python -m reference.causal_lm --model DIR --train rows.jsonl --report out.json
Rows have `messages`, of which the last one is learned.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, DataCollatorWithFlattening, set_seed

from benchmarks.measure import Watch
from reference import plain

IGNORED = -100


def encode(row: dict[str, Any], tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """The chat up to the token that ends the answer; only the answer has labels."""
    prompt = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False).rstrip("\n")
    given = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    input_ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=max_length)["input_ids"]
    return {"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "labels": [IGNORED] * given + input_ids[given:]}


def dataset(path: Path, tokenizer: Any, max_length: int) -> Dataset:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return Dataset.from_list(rows).map(encode, fn_kwargs={"tokenizer": tokenizer, "max_length": max_length}, remove_columns=list(rows[0]))


def main() -> None:
    options = plain.chat_parser(__doc__)
    options.add_argument("--flattened", action="store_true", help="rows of a batch end to end in one, told apart by position_ids")
    args = options.parse_args()

    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = plain.load(args)
    if args.method == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.checkpointing == "on")
    if args.method != "full":
        model = get_peft_model(model, plain.adapter())
    train = dataset(args.train, tokenizer, args.max_length)
    watch = Watch(args.warm_up)
    plain.train(
        args,
        plain.chat_settings(args),
        watch,
        model=model,
        train_dataset=train,
        data_collator=DataCollatorWithFlattening() if args.flattened else DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    supervised = sum(label != IGNORED for labels in train["labels"] for label in labels[1:])
    watch.write(args.report, supervised=round(supervised * args.epochs))


if __name__ == "__main__":
    main()
