"""Fine-tune a language model on chats as one does with TRL's SFTTrainer: what ftkit is compared with.

python -m reference.sft --model DIR --train rows.jsonl --report out.json [--packing]
Rows have `messages`, of which the last one is learned.
"""

from __future__ import annotations

import json

from datasets import Dataset
from transformers import AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from benchmarks.measure import Watch
from reference import plain


def main() -> None:
    options = plain.chat_parser(__doc__)
    options.add_argument("--packing", action="store_true", help="rows end to end, cut at the maximal length")
    args = options.parse_args()

    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = [json.loads(line)["messages"] for line in args.train.read_text(encoding="utf-8").splitlines()]
    watch = Watch(args.warm_up)
    plain.train(
        args,
        plain.chat_settings(args) | {"max_length": args.max_length, "packing": args.packing},
        watch,
        SFTTrainer,
        SFTConfig,
        model=plain.load(args),
        train_dataset=Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows]),
        processing_class=tokenizer,
        peft_config=None if args.method == "full" else plain.adapter(),
    )
    watch.write(args.report)


if __name__ == "__main__":
    main()
