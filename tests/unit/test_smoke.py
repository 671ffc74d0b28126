"""Rehearsals: every kind of recipe in seconds, on tiny random models, without the network."""

from __future__ import annotations

import json
import random
import re
import shutil
import socket
from itertools import chain, zip_longest
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from ftkit.data.types import Row
from ftkit.miniature import ARCHITECTURES, architecture, miniature
from ftkit.smoke import _few

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("**/*.yaml"))


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Sockets cannot connect, and the hub's cache is empty."""

    def refuse(self, address):
        raise AssertionError(f"the network is asked for: {address}")

    from datasets import config
    from huggingface_hub import constants

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: refuse(None, _))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")


@pytest.fixture
def smoke(ftkit, tmp_path, no_network, verify_here):
    """smoke(recipe, ...): what a rehearsal ended with; the recipe is a dict, or the path of a file."""

    def run(recipe, *overrides):
        if isinstance(recipe, dict):
            (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"output": str(tmp_path / "run")} | recipe))
            recipe = tmp_path / "recipe.yaml"
        return ftkit("train", recipe, *overrides, "--smoke", "--json")

    return run


def classify(model, rows, **more):
    """A recipe of text classification."""
    return {"model": model, "task": "text-classification", "data": {"train": str(rows)}, **more}


METHODS = {
    "full": "full",
    "head": "head",
    "partial": {"kind": "partial", "last": 1},
    "lora": {"kind": "lora", "r": 4, "trainable_token_indices": ["<tool>", 128011]},
    "qlora": {"kind": "qlora", "r": 64},
    "ia3": "ia3",
    "vera": "vera",
    "adapter": "adapter",
    "prompt": "prompt",
    "p-tuning": {"kind": "p-tuning", "encoder": "lstm", "num_virtual_tokens": 4},
    "prefix": {"kind": "prefix", "prefix_projection": True},
}
MODELS = {
    "text-classification": ("distilbert/distilbert-base-uncased", ["single", "pairs"]),
    "token-classification": ("google-bert/bert-base-cased", ["tagged"]),
    "question-answering": ("google-bert/bert-base-cased", ["asked"]),
    "masked-lm": ("google-bert/bert-base-uncased", ["masked"]),
    "sentence-embedding": ("sentence-transformers/all-MiniLM-L6-v2", ["matched"]),
    "reranking": ("cross-encoder/ms-marco-MiniLM-L6-v2", ["ranked"]),
    "causal-lm": ("meta-llama/Llama-3.2-1B-Instruct", ["chats", "prompts", "text"]),
    "seq2seq": ("google-t5/t5-small", ["rewritten"]),
}


UNTRIED = {("seq2seq", "head"), ("masked-lm", "head"), ("sentence-embedding", "head")}  # which is the input embedding, or is not there


@pytest.mark.parametrize(("task", "method"), [(task, method) for task in MODELS for method in METHODS if (task, method) not in UNTRIED])
def test_every_method_is_rehearsed_for_every_task(smoke, data, tmp_path, task, method):
    model, kinds = MODELS[task]
    directory: Path = getattr(data, kinds[list(METHODS).index(method) % len(kinds)])
    files = {name: str(next(directory.glob(f"{name}.*"))) for name in ("train", "validation", "test")}
    settings = {"kind": "lora", "r": 4} if (task, method) == ("masked-lm", "lora") else METHODS[method]  # tokens of a head with a bias cannot learn alone
    done = smoke({"model": model, "task": task, "method": settings, "data": files})
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert summary["smoke"] is True
    output = Path(summary["output"])
    assert output == tmp_path / "run-smoke"
    assert set(summary["metrics"]) == {"base", "validation", "test"}
    assert summary["verification"]["max_difference"] <= summary["verification"]["tolerance"]
    manifest = json.loads((output / "manifest.json").read_text())
    assert (manifest["smoke"], manifest["status"]) == (True, "finished")
    adapter = method in ("lora", "qlora", "ia3", "vera")
    assert ("merge" in summary) is adapter
    if adapter:
        assert summary["merge"]["max_difference"] <= summary["merge"]["tolerance"]
    if method == "qlora":
        assert manifest["artifact"]["load_kwargs"]["quantization_config"]["load_in_4bit"]
    assert "the config of" in done.err
    assert "stands for the data" not in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("task", "method"), [("text-classification", "full"), ("masked-lm", "full"), ("causal-lm", "lora")])
def test_a_tiny_teacher_is_trained_first(smoke, data, task, method):
    model, kinds = MODELS[task]
    train = str(next(getattr(data, kinds[0]).glob("train.*")))
    objective = {"kind": "distill", "teacher": "runs/large"}
    done = smoke({"model": model, "task": task, "method": method, "objective": objective, "data": {"train": train, "validation": 0.2}})
    assert done.code == 0, done.err
    assert re.search("substituted: a tiny model, trained first, stands for the teacher .*runs/large", done.err)
    assert "its teacher" in done.err


def test_a_part_of_a_model_and_its_teacher_are_tiny(smoke, data):
    model = {"name": "google-bert/bert-base-uncased", "layers": [1, 4, 11], "convert": "distilbert"}
    done = smoke(classify(model, data.single / "train.csv", objective={"kind": "distill", "teacher": "runs/large"}))
    assert done.code == 0, done.err
    assert json.loads((Path(json.loads(done.out)["output"]) / "manifest.json").read_text())["model"]["architecture"].startswith("DistilBert")


HALF = {"name": "google/flan-t5-small", "dtype": "float16"}  # T5 keeps some of its weights in float32 all the same


def test_weights_are_not_asked_for(smoke, data, checkpoint, tmp_path):
    shutil.copytree(checkpoint("bert"), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")  # as in a clone for CI
    done = smoke(classify(str(tmp_path / "model"), data.single / "train.csv"))
    assert done.code == 0, done.err


@pytest.mark.parametrize("model", ["facebook/bart-base", "google/mt5-small", HALF, "google/pegasus-xsum"])
def test_encoder_decoders_are_told_by_name(smoke, data, model):
    files = {name: str(data.rewritten / f"{name}.jsonl") for name in ("train", "validation")}
    done = smoke({"model": model, "task": {"kind": "seq2seq", "max_target_length": 512}, "method": "lora", "data": files})
    assert done.code == 0, done.err
    merged = json.loads(done.out)["merge"]
    assert merged["max_difference"] <= merged["tolerance"]


@pytest.mark.parametrize("model", ["facebook/bart-base", "google-t5/t5-small"])
def test_encoder_decoders_read_an_answer_at_the_end_of_a_text(smoke, data, model):
    done = smoke({"model": model, "task": "text-classification", "data": {"train": str(data.single / "train.csv"), "validation": 0.25}})
    assert done.code == 0, done.err


def test_what_is_on_the_disk_is_used(smoke, data, checkpoint, tmp_path):
    recipe = {"model": checkpoint("bert"), "task": "text-classification", "data": {"train": str(data.single / "train.csv"), "validation": 0.25}}
    done = smoke(recipe)
    assert done.code == 0, done.err
    assert "substituted" not in done.err
    base = transformers.AutoTokenizer.from_pretrained(checkpoint("bert"))
    small = transformers.AutoTokenizer.from_pretrained(tmp_path / "run-smoke" / "model")
    assert small.get_vocab() == base.get_vocab()
    assert smoke(recipe).code == 0  # in the place of the first


def test_it_does_not_write_over_anything_else(smoke, data, checkpoint, tmp_path):
    (tmp_path / "run-smoke").mkdir()
    (tmp_path / "run-smoke" / "thesis.txt").write_text("done at last")
    done = smoke(classify(checkpoint("bert"), data.single / "train.csv"))
    assert done.code == 2
    assert "holds something else" in done.out
    assert [path.name for path in (tmp_path / "run-smoke").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("columns", "task", "found"),
    [
        ({}, "text-classification", {"text", "label"}),
        ({"text": "premise", "text_pair": "hypothesis"}, "text-classification", {"text", "text_pair", "label"}),
        ({}, {"kind": "text-classification", "problem": "multi-label"}, {"text", "label"}),
        ({"question": "q", "context": "c"}, "question-answering", {"question", "context", "answers"}),
        ({}, "causal-lm", {"text"}),
        ({"messages": "talk"}, "causal-lm", {"messages"}),
        ({"prompt": "q", "completion": "a"}, "causal-lm", {"prompt", "completion"}),
    ],
)
def test_example_rows_have_the_columns_of_the_recipe(smoke, tmp_path, columns, task, found):
    model = {"init": "random", "config": {"model_type": "gpt2"}, "tokenizer": {"train": "data", "vocab_size": 4000}}
    files = {"train": "gone/train.jsonl", "validation": {"a": "gone/a.jsonl", "b": "gone/b.jsonl"}}
    done = smoke({"model": model, "task": task, "data": files | {"columns": columns}})
    assert done.code == 0, done.err
    assert "gone/train.jsonl is not on this machine; example rows" in done.err
    with (tmp_path / "run-smoke" / "smoke" / "train.jsonl").open() as file:
        assert set(json.loads(file.readline())) == found
    assert set(json.loads(done.out)["metrics"]) == {"base", "a", "b"}


def test_flaws_of_rows_that_are_here_are_told(smoke, checkpoint, tmp_path):
    (tmp_path / "train.csv").write_text("words,topic\na,b\nc,d\n")
    done = smoke(classify(checkpoint("bert"), tmp_path / "train.csv"))
    assert done.code == 3
    assert "there are: words, topic" in done.out


@pytest.mark.parametrize(
    ("method", "code"),
    [
        ({"kind": "partial", "last": 5}, 0),
        ({"kind": "lora", "targets": r"layer\.5\..*q_lin"}, 0),
        ({"kind": "lora", "targets": ["nonsense"]}, 2),
        ({"kind": "partial", "last": 7}, 2),
    ],
)
def test_a_method_that_names_deep_layers_keeps_them(smoke, data, method, code):
    done = smoke(classify("distilbert/distilbert-base-uncased", data.single / "train.csv", method=method))
    assert done.code == code, done.err
    assert "Traceback" not in done.err


def test_a_name_that_tells_no_architecture(smoke, data):
    done = smoke(classify("org/our-own-thing", data.single / "train.csv"))
    assert done.code == 8
    assert "does not tell its architecture" in done.out


def test_a_script_of_many_characters_gets_a_larger_vocabulary(smoke, tmp_path):
    words = ["".join(chr(0x1200 + (7 * i + j) % 250) for j in range(25)) for i in range(40)]
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"{word},{i % 2}\n" for i, word in enumerate(words)))
    done = smoke(classify("distilbert/distilbert-base-uncased", tmp_path / "train.csv"))
    assert done.code == 0, done.err
    (size,) = re.findall(r"a wordpiece one of (\d+) tokens stands for it", done.err)
    assert int(size) > 320


def test_what_needs_a_gpu_is_left_out_without_one(smoke, data, checkpoint):
    train = {"precision": "fp16", "parallel": "fsdp", "epochs": 7, "warmup": 500, "trackers": ["wandb"]}
    done = smoke(classify({"name": checkpoint("bert"), "attention": "flash_attention_2"}, data.single / "train.csv", train=train))
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    assert done.code == 0, done.err
    assert "train.precision: auto in place of fp16" in done.err


def test_it_is_neither_resumed_nor_launched(ftkit, data, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(classify(checkpoint("bert"), data.single / "train.csv")))
    assert ftkit("train", tmp_path / "recipe.yaml", "--smoke", "--resume").code == 2
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = ftkit("train", tmp_path / "recipe.yaml", "--smoke")
    assert done.code == 2
    assert "--smoke takes no launcher" in done.err


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_pass(smoke, ftkit, path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    done = smoke(path, f"output={tmp_path / 'run'}")
    assert done.code == 0, done.err
    assert json.loads(done.out)["smoke"] is True
    done = ftkit("check", tmp_path / "run-smoke" / "smoke" / "recipe.yaml")
    assert done.code == 0, done.err


# --- tiny configs -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted({*ARCHITECTURES.values(), "mixtral", "falcon", "phi", "olmo2"}))
def test_any_architecture_is_made_tiny(tokenizers, kind):
    config = transformers.CONFIG_MAPPING[kind]()
    small = miniature(config, 2, tokenizers["bpe"])
    assert small.num_hidden_layers == 2
    heads = [transformers.AutoModelForSequenceClassification, transformers.AutoModelForCausalLM]
    for auto in [transformers.AutoModelForSeq2SeqLM] if small.is_encoder_decoder else heads:
        if type(small) not in auto._model_mapping:
            continue
        small.pad_token_id = 0
        if kind == "reformer":
            small.is_decoder = auto is transformers.AutoModelForCausalLM
        model = auto.from_config(small).eval()
        assert sum(parameter.numel() for parameter in model.parameters()) < 300_000
        ids = torch.randint(1, len(tokenizers["bpe"]), (2, 100))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | ({"decoder_input_ids": ids} if small.is_encoder_decoder else {})
        assert model(**inputs).logits.isfinite().all()


def test_stretched_positions_and_layer_lists_follow(tokenizers):
    stretched = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "rope_theta": 5e5, "original_max_position_embeddings": 4096}
    small = miniature(transformers.Phi3Config(rope_parameters=stretched), 2, tokenizers["bpe"])
    assert small.rope_parameters == {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 1.0}
    gemma = miniature(transformers.Gemma2Config(), 2, tokenizers["bpe"])
    assert gemma.layer_types == ["sliding_attention", "full_attention"]


def test_names_tell_their_architecture():
    assert architecture("distilbert/distilbert-base-uncased") == "distilbert"
    assert architecture("sentence-transformers/all-MiniLM-L6-v2") == "bert"
    assert architecture("microsoft/deberta-v3-base") == "deberta-v2"
    assert architecture("microsoft/Phi-3-mini-4k-instruct") == "phi3"
    assert architecture("HuggingFaceTB/SmolLM2-135M-Instruct") == "llama"
    assert architecture("google-t5/t5-small") == "t5"
    assert architecture("google/mt5-small") == "mt5"
    assert architecture("google/bigbird-roberta-base") == "big_bird"
    assert architecture("google/reformer-crime-and-punishment") == "reformer"
    assert architecture("facebook/bart-large-cnn") == "bart"
    assert architecture("bert-fans/our-own-thing") is None
    assert all(kind in transformers.CONFIG_MAPPING for kind in ARCHITECTURES.values())


@pytest.mark.parametrize("answers", [1, 3, 50, 5000])
def test_the_few_rows_are_short_and_of_many_answers_without_holding_all(answers):
    """Beside the plain way, which sorts all rows."""
    rng = random.Random(answers)
    rows = [Row({"prompt": "x" * rng.randint(1, 60), "completion": str(rng.randrange(answers))}, "file", number) for number in range(3000)]
    by_answer: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: len(str(row.values))):
        by_answer.setdefault(row.values["completion"], []).append(row)
    expected = [row for row in chain.from_iterable(zip_longest(*by_answer.values())) if row is not None][:8]
    assert _few(rows, 8) == expected
