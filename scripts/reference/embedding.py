"""Fine-tune an embedding model on scored pairs as one does with sentence-transformers: what ftkit is compared with.

python -m reference.embedding --model DIR --train rows.jsonl --validation rows.jsonl --report out.json
Rows have `text`, `text_pair` and `score`.  Needs sentence-transformers (pip install sentence-transformers).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments, models
from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.losses import CoSENTLoss
from transformers import set_seed

from benchmarks.measure import Watch
from reference import plain
from reference.classification import read
from reference.clock import Clock


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {"sentence1": [row["text"] for row in rows], "sentence2": [row["text_pair"] for row in rows], "score": [float(row["score"]) for row in rows]}


def main() -> None:
    options = plain.parser(__doc__, batch_size=32, learning_rate=2e-5, epochs=1)
    options.add_argument("--validation", type=Path, required=True)
    options.add_argument("--method", choices=["full"], default="full")
    args = options.parse_args()

    set_seed(args.seed)
    encoder = models.Transformer(args.model)
    model = SentenceTransformer(modules=[encoder, models.Pooling(encoder.get_word_embedding_dimension(), "mean")], device=plain.device())
    rows, measured = read(args.train), columns(read(args.validation))
    watch = Watch(args.warm_up)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=scratch,
                num_train_epochs=args.epochs,
                per_device_train_batch_size=args.batch_size,
                learning_rate=args.learning_rate,
                warmup_steps=0.1,
                weight_decay=0.01,
                seed=args.seed,
                use_cpu=not torch.cuda.is_available(),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict(columns(rows)),
            loss=CoSENTLoss(model),
            callbacks=[Clock(watch)],
        )
        trainer.train()
    found = EmbeddingSimilarityEvaluator(measured["sentence1"], measured["sentence2"], measured["score"])(model)
    watch.write(args.report, supervised=round(len(rows) * args.epochs), metrics={"spearman": found["spearman_cosine"], "pearson": found["pearson_cosine"]})


if __name__ == "__main__":
    main()
