"""Fine-tune a classifier, or a model of a number, as one does with transformers' Trainer and peft: what ftkit is compared with.

python -m reference.classification --model DIR --train rows.jsonl --validation rows.jsonl --report out.json
Rows have `text`, perhaps `text_pair`, and `label`, or `score`, a number.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, matthews_corrcoef
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from benchmarks.measure import Watch
from reference import plain


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def dataset(rows: list[dict[str, Any]], labels: list[Any], tokenizer: Any) -> Dataset:
    def encode(row: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer(row["text"], row.get("text_pair"), truncation=True)
        return {**encoded, "labels": float(row["score"]) if "score" in row else labels.index(row["label"])}

    return Dataset.from_list(rows).map(encode, remove_columns=list(rows[0]))


def choose(model: Any, method: str, last: int) -> Any:
    """The model with the parts that learn: the same ones as ftkit's method of that name; `last` layers with partial."""
    if method == "lora":
        layers = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"  # all linear layers; not the pooler, not the head
        return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.05, target_modules=layers))
    if method in ("head", "partial"):
        model.base_model.requires_grad_(False)
    if method == "partial":
        model.base_model.encoder.layer[-last:].requires_grad_(True)
        model.base_model.pooler.requires_grad_(True)
    return model


def metrics(prediction: Any) -> dict[str, float]:
    said = np.argmax(prediction.predictions, axis=-1)
    return {"accuracy": accuracy_score(prediction.label_ids, said), "mcc": matthews_corrcoef(prediction.label_ids, said)}


def correlations(prediction: Any) -> dict[str, float]:
    said = prediction.predictions.squeeze(-1)
    return {"pearson": pearsonr(said, prediction.label_ids)[0], "spearman": spearmanr(said, prediction.label_ids)[0]}


def main() -> None:
    options = plain.parser(__doc__, batch_size=32, learning_rate=5e-5, epochs=3)
    options.add_argument("--validation", type=Path)
    options.add_argument("--method", choices=["full", "partial", "head", "lora"], default="full")
    options.add_argument("--last", type=int, default=2, metavar="LAYERS")
    args = options.parse_args()

    set_seed(args.seed)
    rows = read(args.train)
    labels = sorted({row["label"] for row in rows if "label" in row})
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(labels) or 1, dtype=torch.float32)
    watch = Watch(args.warm_up)
    trainer = plain.train(
        args,
        {"lr_scheduler_type": "linear", "warmup_steps": 0.1, "weight_decay": 0.01, "per_device_eval_batch_size": 64},
        watch,
        model=choose(model, args.method, args.last),
        train_dataset=dataset(rows, labels, tokenizer),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=metrics if labels else correlations,
    )
    measured = trainer.evaluate(dataset(read(args.validation), labels, tokenizer)) if args.validation else {}
    watch.write(args.report, supervised=round(len(rows) * args.epochs), metrics={name.removeprefix("eval_"): value for name, value in measured.items()})


if __name__ == "__main__":
    main()
