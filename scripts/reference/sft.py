"""Fine-tune a language model on chats as one does with TRL's SFTTrainer: what ftkit is compared with.

python -m reference.sft --model DIR --train rows.jsonl --report out.json [--packing]
Rows have `messages`, of which the last one is learned.
"""

from __future__ import annotations

import json

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from benchmarks.measure import Watch
from reference import plain


def main() -> None:
    options = plain.parser(__doc__, batch_size=8, learning_rate=5e-4, epochs=1)
    options.add_argument("--max-length", type=int, default=512)
    options.add_argument("--method", choices=["full", "lora"], default="full")
    options.add_argument("--packing", action="store_true", help="rows end to end, cut at the maximal length")
    args = options.parse_args()

    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = [json.loads(line)["messages"] for line in args.train.read_text(encoding="utf-8").splitlines()]
    watch = Watch()
    plain.train(
        args,
        plain.CHAT | {"max_length": args.max_length, "packing": args.packing},
        watch,
        SFTTrainer,
        SFTConfig,
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        train_dataset=Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows]),
        processing_class=tokenizer,
        peft_config=plain.adapter() if args.method == "lora" else None,
    )
    watch.write(args.report)


if __name__ == "__main__":
    main()
