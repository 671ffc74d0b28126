"""What the plain scripts share: their options, and a Trainer with its usual settings."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from benchmarks.flops import RANK
from benchmarks.measure import Watch
from reference.clock import Clock, Counted


def parser(description: str | None, batch_size: int, learning_rate: float, epochs: float) -> argparse.ArgumentParser:
    """The options of every plain script, with the defaults of one."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", required=True)
    found.add_argument("--train", type=Path, required=True)
    found.add_argument("--epochs", type=float, default=epochs)
    found.add_argument("--batch-size", type=int, default=batch_size)
    found.add_argument("--learning-rate", type=float, default=learning_rate)
    found.add_argument("--seed", type=int, default=42)
    found.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    found.add_argument("--warm-up", type=int, default=0, metavar="STEPS", help="leave the first ones out of what is measured")
    found.add_argument("--grouped", action="store_true", help="batches of rows of about one length")
    found.add_argument("--output", type=Path, help="save the model there")
    found.add_argument("--report", type=Path, required=True, help="write measurements there, as JSON")
    return found


def chat_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of the scripts for chats."""
    found = parser(description, batch_size=8, learning_rate=5e-4, epochs=1)
    found.add_argument("--max-length", type=int, default=512)
    found.add_argument("--method", choices=["full", "lora", "qlora"], default="full")
    found.add_argument("--checkpointing", choices=["on", "off"], help="compute activations again in the backward pass (as the library does by default)")
    return found


def chat_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The Trainer's settings for chats, beside those of every script."""
    recompute: dict[str, Any] = {} if args.checkpointing is None else {"gradient_checkpointing": args.checkpointing == "on"}
    if args.checkpointing == "on":
        recompute["gradient_checkpointing_kwargs"] = {"use_reentrant": False}  # the other way gives no gradients above frozen layers
    return {"lr_scheduler_type": "cosine", "warmup_steps": 0.03, "weight_decay": 0.0, **recompute}


def load(args: argparse.Namespace) -> Any:
    """A language model: frozen weights in 4 bits for QLoRA, and in bfloat16 where a GPU computes in it; what learns in float32."""
    half = args.method != "full" and args.precision == "bf16" and torch.cuda.is_available()
    quantised = {"quantization_config": quantisation(args.precision), "device_map": {"": device()}} if args.method == "qlora" else {}
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16 if half else torch.float32, **quantised)


def device() -> str:
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def quantisation(precision: str) -> BitsAndBytesConfig:
    """QLoRA's, with the settings of ftkit's method of that name."""
    compute = torch.bfloat16 if precision == "bf16" else torch.float32
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute)


def adapter() -> LoraConfig:
    """LoRA on every linear layer of a language model, with the settings of ftkit's method of that name."""
    return LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear")


def train(
    args: argparse.Namespace,
    settings: dict[str, Any],
    watch: Watch,
    trainer_class: type[Trainer] = Trainer,
    arguments_class: type[TrainingArguments] = TrainingArguments,
    **parts: Any,
) -> Trainer:
    """Train with `parts` (model, rows, collator, ...) and `settings` beside those of the options; save if asked."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trainer_class(
            args=arguments_class(
                output_dir=scratch,
                num_train_epochs=args.epochs,
                per_device_train_batch_size=args.batch_size,
                learning_rate=args.learning_rate,
                seed=args.seed,
                bf16=args.precision == "bf16",
                use_cpu=not torch.cuda.is_available(),  # without it bf16 is refused there
                train_sampling_strategy="group_by_length" if args.grouped else "random",
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **settings,
            ),
            callbacks=[Clock(watch)],
            **parts,
        )
        trainer.data_collator = Counted(trainer.data_collator, watch)
        trainer.train()
    if args.output:
        trainer.save_model(str(args.output))
    return trainer
