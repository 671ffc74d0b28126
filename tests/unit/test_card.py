"""The model card: true, readable by the hub, and with code that runs."""

from __future__ import annotations

import copy
import re
import runpy
from pathlib import Path

import pytest
import yaml

from ftkit.card import model_card, public_name
from ftkit.recipe import read

MANIFEST = {
    "artifact": {
        "loads_with": "peft",
        "auto_class": "AutoModelForSequenceClassification",
        "base": "google-bert/bert-base-uncased",
        "revision": "86b5e0934494bd15c9632b12f734a8a67f723594",
        "load_kwargs": {"dtype": "float32", "num_labels": 2, "id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}},
    },
    "verification": {"max_difference": 1.2e-7, "tolerance": 1e-5},
    "versions": {"ftkit": "0.1.0", "torch": "2.13.0", "bitsandbytes": None},
    "parameters": {"trainable": 295_682, "total": 109_779_970},
    "precision": "bf16",
    "hardware": {"gpus": []},
    "model": {"architecture": "BertForSequenceClassification"},
    "data": {"audit": {"train": {"rows": 25_000}}},
}
METRICS = {
    "base": {"validation": {"accuracy": 0.5, "f1": 0.4, "loss": 0.7, "loss_count": 1640.0}},
    "validation": {"accuracy": 0.93, "f1": 0.92, "loss": 0.2, "loss_count": 1640.0},
}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Builds a recipe from its YAML lines, in the empty directory of the test."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.csv").write_text("text,label\nfine,good\n")

    def build(*overrides: str, **keys: str):
        lines = {
            "model": "google-bert/bert-base-uncased",
            "task": "text-classification",
            "data": "{train: 'stanfordnlp/imdb:plain_text@main'}",
            "method": "{kind: lora, r: 16}",
            "output": "runs/imdb-lora",
        } | keys
        (tmp_path / "recipe.yaml").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
        return read(tmp_path / "recipe.yaml", overrides).recipe

    return build


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def code(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def test_a_student_names_its_teacher_but_not_where_it_lies(recipe, tmp_path):
    (tmp_path / "runs").mkdir()  # else it would be a model on the hub
    card = model_card(recipe(objective="{kind: distill, teacher: runs/large}"), MANIFEST, METRICS, {})
    assert "for 3 epochs, as a student of `large`." in card
    assert str(tmp_path) not in card


def test_the_hub_understands_the_front_matter(recipe):
    from huggingface_hub import ModelCard

    card = model_card(recipe(), MANIFEST, METRICS, {})
    front = front_matter(card)
    assert front.pop("model-index")
    assert front == {
        "base_model": "google-bert/bert-base-uncased",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "datasets": ["stanfordnlp/imdb"],
        "tags": ["ftkit", "text-classification", "lora"],
    }
    data = ModelCard(card).data
    assert data.model_name == "imdb-lora"
    assert [(result.metric_type, result.metric_value, result.dataset_type, result.dataset_split) for result in data.eval_results] == [
        ("accuracy", 0.93, "stanfordnlp/imdb", "validation"),
        ("f1", 0.92, "stanfordnlp/imdb", "validation"),
        ("loss", 0.2, "stanfordnlp/imdb", "validation"),
    ]


def test_the_card_says_what_was_done(recipe):
    card = model_card(recipe(), MANIFEST, METRICS, {})
    assert (
        "`google-bert/bert-base-uncased` was trained for `text-classification` with method `lora`, which changes 295,682 of 109,779,970 "
        "parameters, on 25,000 rows of `stanfordnlp/imdb:plain_text@main` for 3 epochs. "
        "Its accuracy on validation is 0.9300; before training it was 0.5000."
    ) in card
    for row in (
        "| validation | accuracy | 0.5000 | 0.9300 |",
        "| validation | loss (n = 1,640) | 0.7000 | 0.2000 |",
        "| learning rate | 0.001, linear, warm-up 0.1 |",
        "| batch size | 32 rows a step |",
        "| precision | bf16 |",
        "| seed | 42 |",
        "| lora: r | 16 |",
    ):
        assert row in card.splitlines()
    assert "largest difference 1.2e-07, tolerance 1e-05" in card
    assert "ftkit 0.1.0, torch 2.13.0." in card


def test_the_card_shows_intervals_and_classes(recipe):
    found = {"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": 1200}
    details = {"validation": {"intervals": {"accuracy": [0.91, 0.95]}, "classes": {"good|bad": found}}}
    lines = model_card(recipe(), MANIFEST, METRICS, details).splitlines()
    assert "| validation | accuracy | 0.5000 | 0.9300 | 0.9100 to 0.9500 |" in lines
    assert "| validation | loss (n = 1,640) | 0.7000 | 0.2000 | - |" in lines
    assert "| good\\|bad | 0.5000 | 1.000 | 0.6667 | 1,200 |" in lines
    many = {str(i): found for i in range(31)}
    assert "Classes of" not in model_card(recipe(), MANIFEST, METRICS, {"validation": {"classes": many}})


def test_a_run_that_may_stop_early_is_at_most_so_long(recipe):
    overrides = ("train.steps=200", "train.epochs=null", "train.early_stopping={patience: 2}")
    assert "for at most 200 steps." in model_card(recipe(*overrides), MANIFEST, METRICS, {})


def test_what_was_not_measured_is_not_claimed(recipe):
    card = model_card(recipe(), MANIFEST, {"base": {}}, {})
    assert "How good it is was not measured" in card
    assert "model-index" not in front_matter(card)
    card = model_card(recipe(), MANIFEST, {"test": {"f1": 0.5}}, {})
    assert "Its f1 on test is 0.5000; before training it was not measured." in card


def test_nothing_tells_where_files_lie(recipe, tmp_path):
    base = tmp_path / "secret-home" / "my-bert"
    base.mkdir(parents=True)
    manifest = copy.deepcopy(MANIFEST)
    manifest["artifact"] |= {"base": str(base), "revision": None}
    card = model_card(recipe(model=str(base), data="{train: train.csv}"), manifest, METRICS, {})
    assert str(tmp_path) not in card
    assert "secret-home" not in card
    assert "`my-bert` was trained" in card
    assert "rows of `train.csv`" in card
    front = front_matter(card)
    assert "base_model" not in front  # the hub would link to a model of that name
    assert "datasets" not in front


def test_a_run_directory_goes_by_its_own_name():
    assert public_name("/home/someone/runs/first/model") == "first"
    assert public_name("org/name") == "org/name"


def test_random_weights_are_fine_tuned_from_nothing(recipe):
    manifest = MANIFEST | {"artifact": {"loads_with": "transformers", "auto_class": "AutoModelForCausalLM", "load_kwargs": {"dtype": "float32"}}}
    built = recipe(model="{init: random, config: {model_type: llama}, tokenizer: {train: data}}", task="causal-lm", method="full")
    card = model_card(built, manifest, {"validation": {"loss": 3.0, "loss_count": 10.0}}, {})
    front = front_matter(card)
    assert "base_model" not in front
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", "text-generation")
    assert "A new `BertForSequenceClassification`, from random weights, was trained" in card


def test_quantised_bases_load_as_they_were_verified(recipe):
    manifest = copy.deepcopy(MANIFEST)
    manifest["artifact"]["load_kwargs"]["quantization_config"] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    script = code(model_card(recipe(), manifest, METRICS, {}))
    compile(script, "card", "exec")
    assert "quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4'),\n    device_map='cpu'" in script
    assert "import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig" in script


def test_the_code_loads_onto_the_kind_of_device_that_was_verified(recipe):
    script = code(model_card(recipe(), MANIFEST | {"hardware": {"gpus": ["NVIDIA H200"]}}, METRICS, {}))
    assert "device_map='cuda'" in script
    assert "device_map" not in code(model_card(recipe(), MANIFEST, METRICS, {}))


def test_own_code_is_trusted_for_the_tokenizer_too(recipe):
    manifest = copy.deepcopy(MANIFEST)
    manifest["artifact"]["load_kwargs"]["trust_remote_code"] = True
    script = code(model_card(recipe(), manifest, METRICS, {}))
    assert script.count("trust_remote_code=True") == 2
    assert script.endswith("from_pretrained('model', trust_remote_code=True)\n")


@pytest.mark.parametrize(("place", "name"), [("my-bert", "my-bert"), ("first/model", "first/model")])
def test_a_local_base_is_for_the_reader_to_place(recipe, tmp_path, place, name):
    """Its name alone would be looked for on the hub, where another model may be called so."""
    (tmp_path / place).mkdir(parents=True)
    manifest = copy.deepcopy(MANIFEST)
    manifest["artifact"] |= {"base": str(tmp_path / place), "revision": None}
    manifest["verification"]["base_sha256"] = "0123abcd"
    script = code(model_card(recipe(model=str(tmp_path / place)), manifest, METRICS, {}))
    compile(script, "card", "exec")
    assert f"path = 'PATH/TO/{name}'  # the local model that this was trained on; sha256 over its tensors, in manifest.json: 0123abcd" in script
    assert "from_pretrained(\n    path,\n" in script
    assert str(tmp_path) not in script


@pytest.fixture
def tiny(tmp_path):
    """A BERT of a few thousand weights and its tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    config = BertConfig(vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, id2label={0: "bad", 1: "good"})
    return BertForSequenceClassification(config), BertTokenizer(str(tmp_path / "vocab.txt"))


def run_code(card: str, directory: Path) -> dict:
    """Execute the card's code as a reader would, in the run directory, which is the current one."""
    (directory / "load.py").write_text(code(card))
    return runpy.run_path(str(directory / "load.py"))


def test_the_code_loads_a_whole_model(recipe, tiny, tmp_path):
    model, tokenizer = tiny
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    artifact = {"loads_with": "transformers", "auto_class": "AutoModelForSequenceClassification", "load_kwargs": {"dtype": "float32"}}
    loaded = run_code(model_card(recipe(method="full"), MANIFEST | {"artifact": artifact}, METRICS, {}), tmp_path)
    assert loaded["model"].classifier.weight.equal(model.classifier.weight)
    assert loaded["tokenizer"]("good")["input_ids"] == tokenizer("good")["input_ids"]


def test_the_code_loads_an_adapter_and_its_base(recipe, tiny, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    model, tokenizer = tiny
    model.save_pretrained(tmp_path / "model" / "base")
    adapter = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    manifest = copy.deepcopy(MANIFEST)
    manifest["artifact"] |= {"base": "base", "revision": None}
    loaded = run_code(model_card(recipe(), manifest, METRICS, {}), tmp_path)
    inputs = loaded["tokenizer"](["good bad"], return_tensors="pt")
    assert loaded["model"].config.id2label == {0: "bad", 1: "good"}
    # weights that are mapped from a file may lie at other addresses, for which some kernels add in another order
    torch.testing.assert_close(loaded["model"].eval()(**inputs).logits, adapter.eval()(**inputs).logits, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("loads_with", "library"), [("transformers", "sentence-transformers"), ("peft", "sentence-transformers"), ("ftkit", "ftkit")])
def test_embeddings_are_made_by_the_library_that_pools(recipe, loads_with, library):
    artifact = MANIFEST["artifact"] | {"loads_with": loads_with, "auto_class": "AutoModel", "load_kwargs": {"dtype": "float32", "add_pooling_layer": False}}
    card = model_card(recipe(task="sentence-embedding"), MANIFEST | {"artifact": artifact}, METRICS, {})
    assert (front_matter(card)["library_name"], front_matter(card)["pipeline_tag"]) == (library, "sentence-similarity")
    assert ("SentenceTransformer('model')" in card) == (library == "sentence-transformers")
