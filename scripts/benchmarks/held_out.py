"""The loss of a saved model on held-out rows, a mean over supervised items: one judge for every side of a comparison."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def chat_loss(directory: str, rows: list[dict[str, Any]], max_length: int, quantised: bool) -> float:
    """Mean over the tokens of all answers; each row by itself, without padding, in float32, beside a base in 4 bits where it was trained so."""
    from reference import plain
    from reference.causal_lm import encode

    tokenizer, device = AutoTokenizer.from_pretrained(directory), plain.device()
    as_trained = {"quantization_config": plain.quantisation("fp32")} if quantised else {}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, device_map={"": device}, **as_trained).eval()
    total, count = 0.0, 0
    for row in rows:
        encoded = encode(row, tokenizer, max_length)
        labels = torch.tensor(encoded["labels"][1:], device=device)
        logits = model(input_ids=torch.tensor([encoded["input_ids"]], device=device)).logits[0, :-1]
        total += F.cross_entropy(logits, labels, reduction="sum").item()  # -100 is ignored
        count += int((labels >= 0).sum())
    return total / count


def class_loss(directory: str, rows: list[dict[str, Any]]) -> float:
    """Mean over the rows, whose labels are class numbers; each by itself, without padding."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    losses = [F.cross_entropy(model(**tokenizer(row["text"], truncation=True, return_tensors="pt")).logits, torch.tensor([row["label"]])) for row in rows]
    return sum(loss.item() for loss in losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--quantised", action="store_true", help="the base in 4 bits")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()]
    with torch.inference_mode():
        loss = chat_loss(args.model, rows, args.max_length, args.quantised) if "messages" in rows[0] else class_loss(args.model, rows)
    print(json.dumps({"loss": loss}))


if __name__ == "__main__":
    main()
