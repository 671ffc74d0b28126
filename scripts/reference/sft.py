"""Fine-tune a language model on chats as one does with TRL's SFTTrainer: what ftkit is compared with.

python -m reference.sft --model DIR --train rows.jsonl --report out.json [--packing]
Rows have `messages`, of which the last one is learned.
"""

from __future__ import annotations

import json
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from benchmarks.measure import Watch
from reference import plain
from reference.clock import Clock


def main() -> None:
    options = plain.parser(__doc__, batch_size=8, learning_rate=5e-4, epochs=1)
    options.add_argument("--max-length", type=int, default=512)
    options.add_argument("--method", choices=["full", "lora"], default="full")
    options.add_argument("--packing", action="store_true", help="rows end to end, cut at the maximal length")
    args = options.parse_args()

    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = [json.loads(line)["messages"] for line in args.train.read_text(encoding="utf-8").splitlines()]
    adapter = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear")
    watch = Watch()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
            args=SFTConfig(
                output_dir=scratch,
                num_train_epochs=args.epochs,
                per_device_train_batch_size=args.batch_size,
                learning_rate=args.learning_rate,
                seed=args.seed,
                bf16=args.precision == "bf16",
                max_length=args.max_length,
                packing=args.packing,
                train_sampling_strategy="group_by_length" if args.grouped else "random",
                lr_scheduler_type="cosine",
                warmup_steps=0.03,
                weight_decay=0.0,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows]),
            processing_class=tokenizer,
            peft_config=adapter if args.method == "lora" else None,
            callbacks=[Clock(watch)],
        )
        trainer.train()
    if args.output:
        trainer.save_model(str(args.output))
    watch.write(args.report)


if __name__ == "__main__":
    main()
