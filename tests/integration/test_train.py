"""`ftkit train` end to end: the run directory, repetition, what is written where, and verification that cannot be fooled."""

import csv
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ftkit import checkpoint as checkpoints
from ftkit import recipe as recipes
from ftkit import verify

FROM_NOTHING = {
    "init": "random",
    "config": {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 96,
    },
    "tokenizer": {"train": "data", "vocab_size": 300},
}
LONG_FROM_NOTHING = FROM_NOTHING | {
    "config": {
        "model_type": "reformer",
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "hidden_size": 32,
        "num_attention_heads": 2,
        "attention_head_size": 16,
        "feed_forward_size": 64,
        "axial_pos_embds_dim": [8, 24],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    }
}
RUNS = {  # model, rows, method
    "bert-full": ("bert", "single", {"kind": "full"}),
    "distilbert-lora": ("distilbert", "single", {"kind": "lora", "r": 4}),
    "bert-pairs-partial": ("bert", "pairs", {"kind": "partial", "last": 1}),
    "gpt2-pairs-head": ("gpt2", "pairs", {"kind": "head"}),
    "llama-text-full": (FROM_NOTHING, "text", {"kind": "full"}),
    "llama-text-lora": (FROM_NOTHING, "text", {"kind": "lora", "r": 4}),
    "gpt2-prompts-lora": ("gpt2", "prompts", {"kind": "lora", "dora": True}),
    "gpt2-chats-lora-tokens": ("gpt2", "chats", {"kind": "lora", "r": 4, "trainable_token_indices": ["<|im_end|>", "Ġgarden", 306]}),
    "llama-chats-pissa": ("llama", "chats", {"kind": "lora", "init": "pissa", "r": 2}),
    "llama-chats-qlora": ("llama", "chats", {"kind": "qlora"}),
    "bert-adapter": ("bert", "single", {"kind": "adapter", "reduction": 4}),
    "llama-text-adapter": (FROM_NOTHING, "text", {"kind": "adapter", "placement": "houlsby"}),
    "gpt2-prompts-bitfit": ("gpt2", "prompts", {"kind": "bitfit"}),
    "bert-ia3": ("bert", "pairs", {"kind": "ia3"}),
    "llama-chats-vera": ("llama", "chats", {"kind": "vera", "r": 16}),
    "bert-head-4-bits": ("bert", "single", {"kind": "head", "bits": 4}),
    "gpt2-prompts-bitfit-4-bits": ("gpt2", "prompts", {"kind": "bitfit", "bits": 4}),
    "llama-chats-adapter-4-bits": ("llama", "chats", {"kind": "adapter", "reduction": 4, "bits": 4}),
    "bert-labelled-full": ("bert", "labelled", {"kind": "full"}),
    "gpt2-labelled-lora": ("gpt2", "labelled", {"kind": "lora", "r": 4}),
    "bert-scored-full": ("bert", "scored", {"kind": "full"}),
    "distilbert-scored-lora": ("distilbert", "scored", {"kind": "lora", "r": 4}),
    "bert-masked-full": ("bert-masked", "masked", {"kind": "full"}),
    "bert-headless-masked-full": ("bert", "masked", {"kind": "full"}),
    "distilbert-masked-lora": ("distilbert-masked", "masked", {"kind": "lora", "r": 4}),
    "bert-documents-full": ("bert-pretrained", "documents", {"kind": "full"}),
    "bert-headless-documents-full": ("bert", "documents", {"kind": "full"}),
    "albert-lines-partial": ("albert-pretrained", "lines", {"kind": "partial", "last": 1}),
    "electra-texts-full": ("electra-pretrained", "texts", {"kind": "full"}),
    "electra-texts-lora": ("electra-pretrained", "texts", {"kind": "lora", "r": 4}),
    "electra-texts-prompt": ("electra-pretrained", "texts", {"kind": "prompt", "num_virtual_tokens": 4}),
    "bert-tagged-full": ("bert", "tagged", {"kind": "full"}),
    "gpt2-tagged-lora": ("gpt2", "tagged", {"kind": "lora", "r": 4}),
    "distilbert-tagged-head": ("distilbert", "tagged", {"kind": "head"}),
    "bert-asked-full": ("bert", "asked", {"kind": "full"}),
    "gpt2-asked-lora": ("gpt2", "asked", {"kind": "lora", "r": 4}),
    "llama-asked-full": ("llama", "asked", {"kind": "full"}),
    "llama-asked-qlora": ("llama", "asked", {"kind": "qlora"}),
    "distilbert-asked-head": ("distilbert", "asked", {"kind": "head"}),
    "bert-matched-full": ("bert", "matched", {"kind": "full"}),
    "gpt2-alike-lora": ("gpt2", "alike", {"kind": "lora", "r": 4}),
    "distilbert-matched-adapter": ("distilbert", "matched", {"kind": "adapter", "reduction": 4}),
    "bert-premises-lora": ("bert", "premises", {"kind": "lora", "r": 4}),
    "bert-ranked-partial": ("bert", "ranked", {"kind": "partial", "last": 1}),
    "bigbird-asked-lora": ("big_bird", "asked", {"kind": "lora", "r": 4}),
    "reformer-asked-lora": ("reformer", "asked", {"kind": "lora", "r": 4}),
    "reformer-masked-partial": ("reformer-masked", "masked", {"kind": "partial", "last": 1}),
    "reformer-prompts-full": (LONG_FROM_NOTHING, "prompts", {"kind": "full"}),
    "t5-rewritten-full": ("t5", "rewritten", {"kind": "full"}),
    "bart-rewritten-lora": ("bart", "rewritten", {"kind": "lora", "r": 4}),
    "t5-single-full": ("t5", "single", {"kind": "full"}),
    "bart-pairs-lora": ("bart", "pairs", {"kind": "lora", "r": 4}),
    "t5-tagged-lora": ("t5", "tagged", {"kind": "lora", "r": 4}),
    "t5-asked-full": ("t5", "asked", {"kind": "full"}),
    "bart-asked-ia3": ("bart", "asked", {"kind": "ia3"}),
    "t5-rewritten-adapter": ("t5", "rewritten", {"kind": "adapter", "placement": "houlsby"}),
}
STEP_KEYS = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes"}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {f"{path.relative_to(directory)}:{name}": value for path in directory.rglob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.parametrize(
    ("model", "rows", "method"),
    [
        ("bert", "single", {"kind": "full"}),
        ("bert", "single", {"kind": "partial", "last": 1}),
        ("bert", "single", {"kind": "qlora", "bits": 4}),
        ("gpt2", "prompts", {"kind": "qlora", "bits": 8}),
        ("bert", "single", {"kind": "head", "bits": 8}),
        ("gpt2", "prompts", {"kind": "bitfit", "bits": 4}),
        ("bert", "single", {"kind": "vera", "bits": 4, "r": 16}),
        ("llama", "chats", {"kind": "lora"}),
        ("t5", "rewritten", {"kind": "full"}),
    ],
)
def test_a_run_in_bfloat16_gives_back_what_it_saved(model, rows, method, ftkit, recipe, tmp_path, verify_here):
    """Biases of quantised layers are rounded in place by bitsandbytes, which a fresh load does not find."""
    outcome = ftkit("train", recipe(model, rows, train={"precision": "bf16"}, method=method), "--json")
    assert outcome.code == 0, outcome.err
    measured = json.loads(ftkit("eval", tmp_path / "run", "--json").out)["metrics"]
    kept = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for split, values in measured.items():
        assert values["loss"] == pytest.approx(kept[split]["loss"], rel=2e-2)  # other batches, rounded to 8 bits


@pytest.mark.parametrize("name", RUNS)
def test_a_run_writes_every_file_of_its_directory_and_can_be_repeated(name, ftkit, recipe, data, tmp_path, verify_here, assert_same_run):
    model, rows, method = RUNS[name]
    path, run = recipe(model, rows, method=method), tmp_path / "run"

    outcome = ftkit("train", path, "--json")

    assert outcome.code == 0, outcome.err
    summary = json.loads(outcome.out)
    assert summary["output"] == str(run)
    files = {"recipe.yaml", "manifest.json", "log.jsonl", "metrics.json", "details.json", "model", "checkpoints", "predictions", "plots", "README.md"}
    assert {entry.name for entry in run.iterdir()} == files
    assert not [str(entry) for entry in run.rglob(".*")]
    assert {Path(file).name for file, _ in summary["files"]} == files

    resolved = (run / "recipe.yaml").read_text(encoding="utf-8")
    again = recipes.read(run / "recipe.yaml").recipe
    assert recipes.dump(again) == resolved
    assert again.train == recipes.read(path).recipe.train

    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["status"], manifest["exit_code"], manifest["seed"]) == ("finished", 0, 42)
    assert manifest["model"].keys() >= {"name", "revision", "architecture"}
    assert manifest["versions"].keys() >= {"ftkit", "python", "torch", "transformers", "peft", "accelerate"}
    assert manifest["hardware"].keys() >= {"threads", "cores", "gpus", "processes"}
    sources = {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in getattr(data, rows).iterdir()}
    assert manifest["data"]["sha256"] == sources
    stored = sum(value.numel() for value in tensors(run / "checkpoints" / "step-4").values())
    assert 0 < manifest["parameters"]["trainable"] <= min(manifest["parameters"]["total"], stored)
    loads_with = {"full": "transformers", "partial": "transformers", "head": "transformers", "adapter": "ftkit", "bitfit": "ftkit"}.get(method["kind"], "peft")
    assert manifest["artifact"]["loads_with"] == loads_with
    assert "dtype" in manifest["artifact"]["load_kwargs"]
    assert 0 <= manifest["verification"]["max_difference"] <= manifest["verification"]["tolerance"]
    assert (run / "model" / "base").is_dir() == (model is FROM_NOTHING and loads_with != "transformers")

    records = lines(run / "log.jsonl")
    steps = [record for record in records if "split" not in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert all(record.keys() == STEP_KEYS and all(map(math.isfinite, record.values())) for record in steps)
    assert {(record["step"], record["split"]) for record in records if "split" in record} >= {(2, "validation"), (4, "validation"), (4, "test")}

    metrics, details = (json.loads((run / file).read_text(encoding="utf-8")) for file in ("metrics.json", "details.json"))
    assert details.keys() == {"validation", "test"}
    assert all(found.get("intervals", {}).keys() <= metrics[split].keys() for split, found in details.items())
    assert metrics.keys() == {"base", "validation", "test"}
    assert metrics["base"].keys() == {"validation", "test"}
    for split, count in {"validation": 12, "test": 8}.items():
        predictions = lines(run / "predictions" / f"{split}.jsonl")
        numbers = [prediction["row"] for prediction in predictions]
        assert numbers == sorted(numbers)
        assert set(numbers) == set(range(1, count + 1))
        told, found = metrics[split], recomputed(predictions)
        assert {key: told[key] for key in found} == pytest.approx(found, rel=1e-5)

    plots = {"loss.png", "confusion.png", "confusion-test.png"} if rows in ("single", "pairs", "premises", "tagged") else {"loss.png"}
    assert {plot.name for plot in (run / "plots").iterdir()} == plots
    assert all(plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for plot in (run / "plots").iterdir())
    card = (run / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert card.startswith("---\n")
    assert isinstance(front, dict)
    assert ("ftkit.load" if loads_with == "ftkit" else "from_pretrained") in card
    for step in (run / "checkpoints").iterdir():
        assert checkpoints.flaw(step) is None
    assert {step.name for step in (run / "checkpoints").iterdir()} <= {"step-2", "step-4"}

    repeated = ftkit("train", run / "recipe.yaml", f"output={tmp_path / 'again'}")
    assert repeated.code == 0, repeated.err
    assert_same_run(run, tmp_path / "again")


def recomputed(predictions: list[dict]) -> dict[str, float]:
    """The metrics that the predictions themselves tell."""
    if "similarity" in predictions[0]:
        return {}  # those of the whole set: tests/unit/test_sentence_embedding.py
    if "relevance" in predictions[0]:
        losses = [math.log(p if gold else 1 - p) for gold, p in ((each["relevance"], each["prediction"]) for each in predictions)]
        return {"loss": -sum(losses) / len(losses)}
    if "masks" in predictions[0]:
        mean = sum(each["mask_loss"] * each["masks"] for each in predictions) / sum(each["masks"] for each in predictions)
        right = [each["prediction"] == each["label"] for each in predictions if "label" in each]
        return {"perplexity": math.exp(mean)} | ({"accuracy": sum(right) / len(right)} if right else {})
    if "label" in predictions[0]:
        return {"accuracy": sum(each["prediction"] == each["label"] for each in predictions) / len(predictions)}
    if "predictions" in predictions[0] and "labels" in predictions[0]:
        return {"accuracy": sum(each["predictions"] == each["labels"] for each in predictions) / len(predictions)}
    if "answers" in predictions[0]:
        return {"exact_match": sum(each["text"].lower() in (each["answers"] or [""]) for each in predictions) / len(predictions)}
    if "score" in predictions[0]:
        return {"mse": sum((each["prediction"] - each["score"]) ** 2 for each in predictions) / len(predictions)}
    if "tags" in predictions[0]:
        pairs = [pair for each in predictions for pair in zip(each["tags"], each["predictions"], strict=True)]
        return {"accuracy": sum(gold == said for gold, said in pairs) / len(pairs)}
    tokens = sum(each["tokens"] for each in predictions)
    return {"loss": sum(each["loss"] * each["tokens"] for each in predictions) / tokens, "loss_count": tokens}


def test_a_run_writes_nothing_outside_its_directory_and_the_cache(recipe, tmp_path):
    """The command as users start it, in a process of its own; verification loads the result in another one."""
    places = {name: tmp_path / "places" / name for name in ("home", "temporary", "here", "cache")}
    for place in places.values():
        place.mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "HF_", "MPL"))}
    environment |= {"HOME": str(places["home"]), "TMPDIR": str(places["temporary"]), "FTKIT_CACHE": str(places["cache"]), "HF_HUB_OFFLINE": "1"}
    path = recipe("bert", "single", output="runs/bert")
    before = sorted(tmp_path.iterdir())

    done = subprocess.run([sys.executable, "-m", "ftkit", "train", str(path)], cwd=places["here"], env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout
    assert sorted(tmp_path.iterdir()) == before
    assert [*places["here"].iterdir()] == [places["here"] / "runs"]
    assert [*(places["here"] / "runs").iterdir()] == [places["here"] / "runs" / "bert"]
    assert [str(left) for name in ("home", "temporary") for left in places[name].rglob("*") if left.is_file()] == []


def damaged(path: Path) -> bytes:
    """The file with the lowest bit of one element of a tensor changed, or with one character changed, in the middle."""
    if path.suffix != ".safetensors":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        return bytes(content)
    original, values = path.read_bytes(), load_file(path)
    name = sorted(values)[len(values) // 2]
    changed = values[name].clone()
    changed.view(-1).view(torch.uint8)[changed.nbytes // 2 // changed.element_size() * changed.element_size()] ^= 1
    save_file(values | {name: changed}, path, {"format": "pt"})
    version = path.read_bytes()
    path.write_bytes(original)
    return version


@pytest.mark.parametrize(
    "name", ["bert-full", "llama-text-lora", "llama-chats-pissa", "llama-chats-qlora", "bert-adapter", "gpt2-prompts-bitfit", "bert-head-4-bits"]
)
def test_one_changed_bit_in_any_saved_file_is_seen_and_exit_9(name, ftkit, recipe, tmp_path, verify_here, monkeypatch):
    model, rows, method = RUNS[name]
    check, unseen, tried = verify.check, [], set()

    def tampering(directory, artifact, expected):
        """Every file is damaged once and repaired; the damage of the last one is left to the run."""
        assert check(directory, artifact, expected)["max_difference"] <= expected.tolerance
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            original = path.read_bytes()
            path.write_bytes(damaged(path))
            tried.add(path.suffix)
            try:
                check(directory, artifact, expected)
                unseen.append(path.name)
            except verify.VerificationFailed:
                pass
            path.write_bytes(original)
        path.write_bytes(damaged(path))
        return check(directory, artifact, expected)

    monkeypatch.setattr(verify, "check", tampering)
    path = recipe(model, rows, {"steps": 1}, method=method)
    outcome = ftkit("train", path)

    assert outcome.code == 9, outcome.err
    assert unseen == []
    assert tried >= {".safetensors", ".json"}
    assert "Traceback" not in outcome.err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["status"], manifest["exit_code"]) == ("failed", 9)

    monkeypatch.setattr(verify, "check", check)
    assert ftkit("train", path, "--resume").code == 0
    assert json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))["status"] == "finished"


def test_a_used_directory_is_refused_and_replaced_only_when_asked(ftkit, recipe, tmp_path, verify_here):
    path, run = recipe("bert", "single", {"steps": 1}), tmp_path / "run"
    run.mkdir()
    (run / "thesis.tex").write_text("years of work")
    for flags in ([], ["--overwrite"], ["--resume"]):
        assert ftkit("train", path, *flags).code == 2
    assert [*run.iterdir()] == [run / "thesis.tex"]
    (run / "thesis.tex").unlink()

    assert ftkit("train", path).code == 0
    first = (run / "manifest.json").read_bytes()
    (run / "notes.txt").write_text("mine")
    refused = ftkit("train", path)
    assert refused.code == 2
    assert "--resume" in refused.err
    assert "--overwrite" in refused.err
    assert (run / "manifest.json").read_bytes() == first

    assert ftkit("train", path, "train.seed=1", "--overwrite").code == 0
    assert json.loads((run / "manifest.json").read_text(encoding="utf-8"))["seed"] == 1
    assert (run / "notes.txt").read_text() == "mine"


def test_labels_keep_their_names_in_the_saved_model(ftkit, recipe, data, tmp_path, verify_here):
    from transformers import AutoModelForSequenceClassification

    assert ftkit("train", recipe("bert", "single", {"steps": 1})).code == 0
    with (data.single / "train.csv").open(encoding="utf-8") as file:
        labels = sorted({row["label"] for row in csv.DictReader(file)})
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model").config.id2label == dict(enumerate(labels))
