"""Tiny models, tokenizers and data sets that are made in code, and the real command called in this process."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test may reach for the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are slower on many threads, and equal bits need equal threads

import csv
import gc
import json
import random
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

TOPICS = {
    "garden": ["roses", "tulips", "bees", "soil", "hedge", "rake", "seeds", "rain", "worms", "compost"],
    "kitchen": ["bread", "butter", "oven", "soup", "knife", "plates", "pepper", "onions", "kettle", "flour"],
    "harbour": ["boats", "anchors", "gulls", "nets", "ropes", "tide", "sailors", "crates", "fog", "lamps"],
}
FILLERS = ["the", "old", "small", "quiet", "two", "my", "our", "many", "of", "with", "near", "under", "before", "after", "and"]


def sentence(rng: random.Random, topic: str, words: int) -> str:
    """About half of the words tell the topic."""
    return " ".join(rng.choice(TOPICS[topic] if rng.random() < 0.5 else FILLERS) for _ in range(words))


def examples(count: int, seed: int) -> list[tuple[str, str]]:
    """Texts of 3 to 13 words, and the topic that each is about."""
    rng = random.Random(seed)
    topics = [list(TOPICS)[i % len(TOPICS)] for i in range(count)]
    return [(f"{rng.choice(TOPICS[topic])} {sentence(rng, topic, rng.randint(2, 12))}", topic) for topic in topics]


class DataSets(NamedTuple):
    """Files of 32 training, 12 validation and 8 test rows, each in the words of `TOPICS`."""

    single: Path  # directories with train.csv or .jsonl, validation and test
    pairs: Path
    text: Path
    masked: Path
    documents: Path
    lines: Path
    texts: Path
    prompts: Path
    chats: Path
    rewritten: Path
    tagged: Path
    labelled: Path
    scored: Path
    asked: Path
    matched: Path
    alike: Path
    premises: Path
    ranked: Path


def pytest_addoption(parser):
    """What takes too long for every change."""
    parser.addoption("--whole-matrix", action="store_true", help="try every method with every architecture for every task, which takes some minutes more")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The tests of a file run in one process, since they share fixtures; those of the matrix, which takes longest, a task in each."""
    for item in items:
        task = item.callspec.params["task"] if item.path.name == "test_matrix.py" and hasattr(item, "callspec") else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path} {task}"))


def write_csv(path: Path, header: list[str], rows: list) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> DataSets:
    found = DataSets(*(tmp_path_factory.mktemp(name) for name in DataSets._fields))
    for seed, (split, count) in enumerate({"train": 32, "validation": 12, "test": 8}.items()):
        rows = examples(count, seed)
        others = [text for text, _ in examples(count, seed + 100)]
        write_csv(found.single / f"{split}.csv", ["text", "label"], rows)
        pairs = [(text, other if i % 2 else text, ("same", "other")[i % 2]) for i, ((text, _), other) in enumerate(zip(rows, others, strict=True))]
        write_csv(found.pairs / f"{split}.csv", ["sentence1", "sentence2", "label"], pairs)
        write_csv(found.premises / f"{split}.csv", ["premise", "hypothesis", "label"], pairs)
        write_jsonl(found.text / f"{split}.jsonl", [{"text": text} for text, _ in rows])
        write_jsonl(found.masked / f"{split}.jsonl", [{"text": f"{text}\n{other}"} for (text, _), other in zip(rows, others, strict=True)])
        documents = [{"text": f"{text}\n{other}\nnear the {topic}"} for (text, topic), other in zip(rows, others, strict=True)]
        write_jsonl(found.documents / f"{split}.jsonl", documents)
        write_jsonl(found.lines / f"{split}.jsonl", documents)
        write_jsonl(found.texts / f"{split}.jsonl", documents)
        write_jsonl(found.prompts / f"{split}.jsonl", [{"prompt": f"where are {text}? ", "completion": f"in the {topic}"} for text, topic in rows])
        write_jsonl(found.rewritten / f"{split}.jsonl", [{"source": text, "target": f"{topic} {text.split()[0]}"} for text, topic in rows])
        write_jsonl(found.tagged / f"{split}.jsonl", [{"tokens": text.split(), "ner_tags": tags(text.split())} for text, _ in rows])
        places = [[topic for topic in TOPICS if set(text.split()) & set(TOPICS[topic])] for text, _ in rows]
        write_jsonl(
            found.labelled / f"{split}.jsonl",
            [{"text": text, "label": place if i % 4 else []} for i, ((text, _), place) in enumerate(zip(rows, places, strict=True))],
        )
        scores = [len(set(text.split()) & set(other.split())) / 2 for (text, _), other in zip(rows, others, strict=True)]
        write_csv(
            found.scored / f"{split}.csv",
            ["sentence1", "sentence2", "score"],
            [(text, other, score) for (text, _), other, score in zip(rows, others, scores, strict=True)],
        )
        write_jsonl(found.asked / f"{split}.jsonl", [asked(text, topic, answerable=i % 4 > 0) for i, (text, topic) in enumerate(rows)])
        write_csv(
            found.matched / f"{split}.csv",
            ["anchor", "positive", "negative"],
            [(text, f"{text.split()[0]} {other}", other) for (text, _), other in zip(rows, others, strict=True)],
        )
        write_jsonl(
            found.alike / f"{split}.jsonl",
            [{"sentence1": text, "sentence2": other, "score": min(score, 5.0)} for (text, _), other, score in zip(rows, others, scores, strict=True)],
        )
        write_jsonl(
            found.ranked / f"{split}.jsonl",  # of each query four texts, one of which is about the same
            [
                {"query": rows[i // 4 * 4][0], "document": text if i % 4 else f"{text} {rows[i][0].split()[0]}", "label": int(i % 4 == 0)}
                for i, text in enumerate(others)
            ],
        )
        chats = [[{"role": "user", "content": f"where are {text}?"}, {"role": "assistant", "content": f"in the {topic}"}] for text, topic in rows]
        write_jsonl(found.chats / f"{split}.jsonl", [{"messages": chat if i % 2 else [*chat, *chats[i - 1]]} for i, chat in enumerate(chats)])
    return found


def tags(words: list[str]) -> list[str]:
    """Words of a topic, one after the other, are spans of it."""
    topics = [next((topic for topic in TOPICS if word in TOPICS[topic]), None) for word in words]
    return ["O" if topic is None else f"{'I' if before == topic else 'B'}-{topic}" for before, topic in zip([None, *topics], topics, strict=False)]


def asked(text: str, topic: str, answerable: bool) -> dict:
    """A question whose answer is the last word of the topic in a text, or one about a topic of which there is no word."""
    words = text.split()
    place = max(i for i, word in enumerate(words) if word in TOPICS[topic])
    answers = [{"text": words[place], "answer_start": len(" ".join([*words[:place], ""]))}]
    other = next(each for each in TOPICS if each != topic)
    return {"question": f"where in the {topic if answerable else other}?", "context": text, "answers": answers if answerable else []}


def corpus() -> list[str]:
    return [f"where are {text}? in the {topic}" for text, topic in examples(60, 7)]


@pytest.fixture(scope="session")
def tokenizers():
    """A WordPiece tokenizer as BERT has, and byte-level BPE tokenizers: one with a chat template, and one that ends each text, as T5 does."""
    from ftkit.recipe.spec import TrainedTokenizer
    from ftkit.tokenizer import train_tokenizer

    sizes = {"wordpiece": 160, "bpe": 320}
    found = {kind: train_tokenizer(TrainedTokenizer(train="data", kind=kind, vocab_size=size), corpus()) for kind, size in sizes.items()}
    return found | {"ending": train_tokenizer(TrainedTokenizer(train="data", kind="bpe", vocab_size=sizes["bpe"]), corpus(), ending=True)}


def architecture(name: str):
    """The config of a model with two layers of 32 channels, and the kind of its tokenizer."""
    import transformers

    if name == "bert":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 96}
        return transformers.BertConfig(**sizes), "wordpiece"
    if name in ("albert", "electra"):
        sizes = {"hidden_size": 32, "embedding_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        return transformers.AutoConfig.for_model(name, **sizes, max_position_embeddings=96), "wordpiece"
    if name == "distilbert":
        return transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=96), "wordpiece"
    if name == "llama":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 160}
        return transformers.LlamaConfig(**sizes, num_key_value_heads=1), "bpe"
    if name == "big_bird":  # whose blocks take rows of 15 tokens or more
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 96}
        return transformers.BigBirdConfig(**sizes, block_size=2, num_random_blocks=1), "wordpiece"
    if name == "reformer":
        sizes = {"hidden_size": 32, "num_attention_heads": 2, "attention_head_size": 16, "feed_forward_size": 64, "attn_layers": ["local", "lsh"]}
        chunks = {"local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "axial_pos_shape": [8, 12], "axial_pos_embds_dim": [8, 24]}
        return transformers.ReformerConfig(**sizes, **chunks, max_position_embeddings=96), "wordpiece"
    if name in ("t5", "mt5"):
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
        return (transformers.T5Config if name == "t5" else transformers.MT5Config)(**sizes), "ending"
    if name == "bart":
        sizes = {f"{stack}_{size}": value for stack in ("encoder", "decoder") for size, value in {"layers": 2, "attention_heads": 2, "ffn_dim": 64}.items()}
        return transformers.BartConfig(**sizes, d_model=32, max_position_embeddings=160, init_std=0.1), "ending"
    assert name == "gpt2"
    return transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=160), "bpe"


@pytest.fixture(scope="session")
def checkpoint(tokenizers, tmp_path_factory):
    """checkpoint(name): a directory with random weights of an architecture and its tokenizer, as `from_pretrained` reads it.

    The encoders are stored without a head, or with that of a masked language model ("bert-masked"), or of pre-training ("bert-pretrained"), the decoders
    with that of a language model.
    """
    import torch
    import transformers

    from ftkit.model import adopt_tokens

    @cache
    def make(name: str) -> str:
        plain, _, head = name.partition("-")
        config, kind = architecture(plain)
        tokenizer = tokenizers[kind]
        config.vocab_size = len(tokenizer)
        config.initializer_range = 0.1  # with the usual 0.02 a random model of 32 channels tells no two texts apart
        adopt_tokens(config, tokenizer)
        torch.manual_seed(0)
        written = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
        heads = {"": transformers.AutoModel, "masked": transformers.AutoModelForMaskedLM, "pretrained": transformers.AutoModelForPreTraining}
        auto = heads[head] if kind == "wordpiece" else written
        directory = tmp_path_factory.mktemp(name)
        auto.from_config(config).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return str(directory)

    return make


@pytest.fixture(scope="session", autouse=True)
def cache_directory(tmp_path_factory):
    """The token cache of all tests: what it holds is keyed by content."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FTKIT_CACHE", str(directory))
        yield directory


@pytest.fixture(autouse=True)
def own_accelerate_state():
    """accelerate keeps its first settings for the whole process, and another test may have other ones."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(True)


@pytest.fixture(scope="module", autouse=True)
def imports_out_of_the_way():
    """Runs collect garbage on purpose; what the libraries left in memory when they were imported need not be walked each time."""
    gc.freeze()


class Outcome(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def ftkit(capsys):
    """The command in this process: ftkit("train", path, "train.steps=3") gives exit code, stdout and stderr."""
    from accelerate.state import AcceleratorState

    from ftkit.cli import main

    def run(*arguments: object) -> Outcome:
        AcceleratorState._reset_state(True)  # a process of its own would start with none
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


TASKS = {
    "single": "text-classification",
    "pairs": "text-classification",
    "labelled": {"kind": "text-classification", "problem": "multi-label"},
    "scored": {"kind": "text-classification", "problem": "regression"},
    "tagged": "token-classification",
    "masked": "masked-lm",
    "documents": "next-sentence",
    "lines": "sentence-order",
    "texts": "replaced-token-detection",
    "rewritten": "seq2seq",
    "asked": "question-answering",
    "matched": "sentence-embedding",
    "alike": {"kind": "sentence-embedding", "loss": "cosine", "score_range": [0, 5]},
    "premises": {"kind": "sentence-embedding", "loss": "softmax"},
    "ranked": "reranking",
}
TRAIN = {"steps": 4, "batch_size": 8, "learning_rate": 1e-3, "eval_every": 2, "save_every": 2, "log_every": 1, "precision": "fp32"}


@pytest.fixture
def recipe(data, checkpoint, tmp_path):
    """recipe("bert", "single", method={"kind": "lora"}, train={"steps": 3}) writes a recipe and gives its path; its run goes to tmp_path/run."""

    def write(model: str | dict, rows: str, train: dict | None = None, name: str = "recipe.yaml", **sections) -> Path:
        directory = getattr(data, rows)
        files = {split: str(next(directory.glob(f"{split}.*"))) for split in ("train", "validation", "test")}
        values = {
            "model": checkpoint(model) if isinstance(model, str) else model,
            "task": TASKS.get(rows, "causal-lm"),
            "data": files,
            "train": {**TRAIN, **(train or {})},
            "output": str(tmp_path / "run"),
            **sections,
        }
        path = tmp_path / name
        path.write_text(json.dumps(values), encoding="utf-8")
        return path

    return write


@pytest.fixture
def verify_here(monkeypatch):
    """Do the work of verification's fresh process in this one, which takes 5 s less."""
    from ftkit import reload

    run_process = subprocess.run

    def run(command, **kwargs):
        if reload.__file__ not in command:
            return run_process(command, **kwargs)
        try:
            reload.main(Path(command[-1]))
        except Exception as error:
            return SimpleNamespace(returncode=1, stderr=f"{type(error).__name__}: {error}")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
