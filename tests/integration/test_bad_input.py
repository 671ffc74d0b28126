"""What users get wrong: mistake -> exit code -> message.  No traceback, nothing lost, nothing half written."""

from __future__ import annotations

import errno
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml


@dataclass
class Scene:
    """A recipe that would train, and the place where it can be spoilt."""

    path: Path
    recipe: dict[str, Any]
    checkpoint: Any
    data: Any
    monkeypatch: pytest.MonkeyPatch

    def file(self, name: str, content: str | bytes) -> str:
        path = self.path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def train(self, name: str, content: str | bytes) -> None:
        self.recipe["data"]["train"] = self.file(name, content)

    def chat(self, model: str) -> None:
        self.recipe |= {"task": "causal-lm", "model": model}
        self.recipe["data"] = {"train": str(self.data.chats / "train.jsonl")}

    def rewrite(self, model: str = "t5", **sections: Any) -> None:
        self.recipe |= {"task": "seq2seq", "model": self.checkpoint(model), "data": {"train": str(self.data.rewritten / "train.jsonl")}} | sections

    def fill(self, **task: Any) -> None:
        train = {"train": str(self.data.masked / "train.jsonl")}
        self.recipe |= {"task": {"kind": "masked-lm"} | task, "model": self.checkpoint("bert-masked"), "data": train}

    def embed(self, **settings: Any) -> None:
        name = "matched.csv" if settings.get("loss", "in-batch") == "in-batch" else "alike.jsonl"
        file = getattr(self.data, name.partition(".")[0]) / f"train.{name.partition('.')[2]}"
        self.recipe |= {"task": {"kind": "sentence-embedding"} | settings, "data": {"train": str(file)}}

    def model_without(self, *names: str, architecture: str = "bert") -> str:
        directory = self.path / "model"
        shutil.copytree(self.checkpoint(architecture), directory)
        for name in names:
            for path in directory.glob(name):
                path.unlink()
        return str(directory)


@pytest.fixture
def scene(tmp_path, checkpoint, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = {
        "model": checkpoint("bert"),
        "task": "text-classification",
        "data": {"train": str(data.single / "train.csv"), "validation": str(data.single / "validation.csv")},
        "train": {"steps": 1, "batch_size": 4},
        "output": str(tmp_path / "run"),
    }
    return Scene(tmp_path, recipe, checkpoint, data, monkeypatch)


MISTAKES: dict[str, tuple[Any, int, str]] = {}


def mistake(code: int, message: str):
    """Enter a mistake into the table: the exit code it ends with, and what stderr must say (a regular expression)."""

    def enter(spoil):
        MISTAKES[spoil.__name__] = (spoil, code, message)
        return spoil

    return enter


@mistake(3, r"gone\.csv: no such file")
def missing_file(scene):
    scene.recipe["data"]["train"] = str(scene.path / "gone.csv")


@mistake(3, r"no data file|no .*files")
def directory_without_data(scene):
    (scene.path / "empty").mkdir()
    scene.recipe["data"]["train"] = str(scene.path / "empty")


@mistake(3, r"empty\.csv.*(empty|no row)")
def empty_file(scene):
    scene.train("empty.csv", "")


@mistake(3, r"header\.csv.*no row")
def header_only(scene):
    scene.train("header.csv", "text,label\n")


@mistake(3, r"one label only \('a'\)")
def one_label_only(scene):
    scene.train("one.csv", "text,label\nroses,a\nbread,a\n")
    scene.recipe["data"].pop("validation")


@mistake(3, r"1 row cannot be used:\n  .*t\.jsonl:2: label 0\.5 is not a whole number")
def label_that_is_a_fraction(scene):
    scene.train("t.jsonl", '{"text": "roses", "label": "garden"}\n{"text": "bread", "label": 0.5}\n{"text": "boats", "label": "harbour"}\n')
    scene.recipe["data"].pop("validation")


@mistake(3, r"validation\.csv:2: label 'sky' does not occur in the training rows")
def label_unseen_in_training(scene):
    scene.recipe["data"]["validation"] = scene.file("validation.csv", "text,label\nroses,garden\nboats,sky\n")


@mistake(3, r"validation\.csv:1: .* all 2 rows of validation have the one label 'garden'")
def one_class_to_measure_on(scene):
    scene.recipe["data"]["validation"] = scene.file("validation.csv", "text,label\nroses,garden\nboats,garden\n")


@mistake(3, r"tags\.jsonl:1: .* all 2 rows of test have the one label 'O'")
def one_tag_to_measure_on(scene):
    learned = scene.file("train.jsonl", '{"tokens": ["Ann", "ran"], "tags": ["B-PER", "O"]}\n' * 2)
    scene.recipe |= {"task": "token-classification", "data": {"train": learned}}
    scene.recipe["data"]["test"] = scene.file("tags.jsonl", '{"tokens": ["he", "ran"], "tags": ["O", "O"]}\n' * 2)


@mistake(3, r"task\.labels: garden, harbour, kitchen, .* in the order kitchen, garden, harbour")
def labels_in_another_order_than_stored(scene):
    directory = shutil.copytree(scene.checkpoint("bert"), scene.path / "stored")
    config = json.loads((directory / "config.json").read_text()) | {"id2label": {"0": "kitchen", "1": "garden", "2": "harbour"}}
    (directory / "config.json").write_text(json.dumps(config))
    scene.recipe |= {"model": str(directory), "task": {"kind": "text-classification", "labels": ["garden", "harbour", "kitchen"]}}


@mistake(3, r"columns(.|\n)*there are: body, label\n *needed: text")
def text_column_missing(scene):
    scene.train("t.csv", "body_of_it,label\nroses,a\nbread,b\n".replace("body_of_it", "body"))


@mistake(3, r"t\.csv:2: text is empty")
def null_text(scene):
    scene.train("t.csv", "text,label\nroses,garden\n,kitchen\nboats,harbour\n")


@mistake(3, r"t\.jsonl:2: label is null")
def null_label(scene):
    scene.train("t.jsonl", '{"text": "roses", "label": "a"}\n{"text": "bread", "label": null}\n')


@mistake(3, r"t\.jsonl:2: ")
def broken_json_line(scene):
    scene.train("t.jsonl", '{"text": "roses", "label": "a"}\n{"text": "bread", "la\n')


@mistake(3, r"t\.csv:2.*UTF-8")
def not_utf8(scene):
    scene.train("t.csv", b"text,label\nroses,a\n\xff\xfe bread,b\n")


@mistake(3, r"t\.csv:1: \d+ tokens, more than data\.max_length: 16")
def row_longer_than_allowed(scene):
    scene.train("t.csv", "text,label\n" + "roses " * 40 + ",garden\nbread,kitchen\n")
    scene.recipe["data"] |= {"max_length": 16, "truncation": "error"}


@mistake(3, r"validation: nothing is supervised in its 2 rows, so there is nothing to measure \(data\.max_length: 16 cuts it off\)")
def every_answer_cut_off(scene):
    scene.chat(scene.checkpoint("llama"))
    rows = [{"prompt": "where are roses?" * repeats, "completion": "in the garden"} for repeats in (9, 9, 1)]
    lines = [json.dumps(row) + "\n" for row in rows]
    files = {"validation": scene.file("v.jsonl", "".join(lines[:2])), "train": scene.file("t.jsonl", lines[2])}
    scene.recipe["data"] = {**files, "max_length": 16}


@mistake(2, r"data\.max_length: 4096, but the model has \d+ positions")
def longer_than_the_model(scene):
    scene.recipe["data"]["max_length"] = 4096


@mistake(2, r"method prompt: 96 virtual tokens leave none of the 96 positions of the model for a row")
def a_prompt_longer_than_the_model(scene):
    scene.recipe["method"] = {"kind": "prompt", "num_virtual_tokens": 96}


@mistake(2, r"data\.max_length: 90, but the model has 76 positions beside 20 virtual tokens")
def rows_longer_than_a_prompt_leaves_room_for(scene):
    scene.recipe["method"] = "p-tuning"
    scene.recipe["data"]["max_length"] = 90


@mistake(2, r"method\.init: text: the model has 96 positions, and no keys and values of the 200 tokens that method\.num_virtual_tokens asks for")
def a_prefix_of_more_words_than_the_model_reads(scene):
    scene.recipe["method"] = {"kind": "prefix", "num_virtual_tokens": 200, "init": "text", "init_text": "roses"}


@mistake(2, r"method\.init_text: the tokenizer makes no token of it")
def a_prompt_that_begins_as_nothing(scene):
    scene.recipe["method"] = {"kind": "prompt", "init": "text", "init_text": " "}


@mistake(2, r"model\.attention: sdpa asks for another attention function than the one that prefixes are put into; leave it out")
def a_prefix_with_other_attention(scene):
    scene.recipe["method"] = "prefix"
    scene.recipe["model"] = {"name": scene.recipe["model"], "attention": "sdpa"}


@mistake(8, r"someone/unknown-model.*(hub|network)")
def unknown_model(scene):
    scene.recipe["model"] = "someone/unknown-model"


@mistake(2, r"there is no directory .*/models/gone")
def missing_model_directory(scene):
    scene.recipe["model"] = "./models/gone"


@mistake(2, r"holds no model|without config\.json")
def directory_that_is_no_model(scene):
    scene.recipe["model"] = str(scene.data.single)


@mistake(2, r"has no tokenizer")
def model_without_tokenizer(scene):
    scene.recipe["model"] = scene.model_without("tokenizer*", "vocab*", "special*")


@mistake(2, r"chat template(.|\n)*prompt")
def model_without_chat_template(scene):
    model = scene.model_without("chat_template*", architecture="llama")
    config = Path(model, "tokenizer_config.json")
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "chat_template"}))
    scene.chat(model)


@mistake(2, r"turn")
def template_that_never_ends_a_turn(scene):
    model = scene.model_without("chat_template*", architecture="llama")
    Path(model, "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    scene.chat(model)


@mistake(2, r"distilbert has no head for it")
def architecture_without_the_head(scene):
    scene.recipe |= {"task": "causal-lm", "model": scene.checkpoint("distilbert")}
    scene.recipe["data"] = {"train": str(scene.data.text / "train.jsonl")}


@mistake(2, r"task text-classification: .*first token, which would see no other; set model\.config: \{is_decoder: false\}")
def reformer_whose_answer_sees_one_token(scene):
    scene.recipe["model"] = {"name": scene.checkpoint("reformer"), "config": {"is_decoder": True}}


@mistake(2, r"axial_pos_embds_dim: \[8, 24\] must add up to hidden_size: 64")
def axial_positions_of_another_width(scene):
    scene.recipe["model"] = {"name": scene.checkpoint("reformer"), "config": {"hidden_size": 64}}


@mistake(2, r"train\.gradient_checkpointing: ReformerForSequenceClassification does not support it")
def reversible_layers_recomputed_twice(scene):
    scene.recipe["model"] = scene.checkpoint("reformer")
    scene.recipe["train"]["gradient_checkpointing"] = True


@mistake(2, r"train\.compile: ReformerForSequenceClassification has no single list of layers")
def reversible_layers_compiled(scene):
    scene.recipe["model"] = scene.checkpoint("reformer")
    scene.recipe["train"]["compile"] = True


@mistake(2, r"no safetensors weights")
def pickled_weights(scene):
    scene.recipe["model"] = scene.model_without("*.safetensors")
    Path(scene.recipe["model"], "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n")


@mistake(7, r"model/model\.safetensors is broken \(.*\); copy it here or download it once more")
def weights_that_were_cut_off(scene):
    scene.recipe["model"] = scene.model_without()
    weights = Path(scene.recipe["model"], "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])


@mistake(7, r"model/model\.safetensors only points to weights, for Git LFS; fetch them with `git lfs pull`")
def weights_that_git_did_not_fetch(scene):
    scene.recipe["model"] = scene.model_without()
    Path(scene.recipe["model"], "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 90866404\n")


@mistake(7, r"adapter/adapter_model\.safetensors is broken")
def an_adapter_that_was_cut_off(scene):
    adapter = scene.path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": scene.checkpoint("bert")}))
    (adapter / "adapter_model.safetensors").write_bytes(b"\x10")
    scene.recipe["model"] = str(adapter)


@mistake(2, r"'q_project' matches no linear module.*query")
def lora_targets_that_match_nothing(scene):
    scene.recipe["method"] = {"kind": "lora", "targets": ["q_project"]}


@mistake(2, r"no linear module")
def lora_targets_that_match_only_the_head(scene):
    scene.recipe["method"] = {"kind": "lora", "targets": ["classifier"]}


@mistake(2, r"'(\(unclosed|\[unclosed).*regular expression")
def pattern_that_is_no_expression(scene):
    scene.recipe["method"] = {"kind": "partial", "pattern": "[unclosed"}


@mistake(2, r"9 layers asked for, \w+ has 2")
def more_layers_than_there_are(scene):
    scene.recipe["method"] = {"kind": "partial", "last": 9}


@mistake(4, r"train\.trackers: wandb is not installed; pip install 'ftkit\[wandb\]'")
def tracker_that_is_not_installed(scene):
    scene.monkeypatch.setitem(sys.modules, "wandb", None)
    scene.recipe["train"]["trackers"] = ["wandb"]


@mistake(4, r"bitsandbytes.*not installed")
def four_bits_without_bitsandbytes(scene):
    import importlib.util

    real = importlib.util.find_spec
    scene.monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else real(name, *rest))
    scene.recipe["method"] = "qlora"


@mistake(2, r"loads stored weights in few bits; with init: random there are none")
def four_bits_of_random_weights(scene):
    scene.recipe |= {"method": "qlora", "model": {"name": scene.checkpoint("bert"), "init": "random"}}


@mistake(4, r"fp16 needs a GPU")
def fp16_on_a_cpu(scene):
    import torch

    scene.monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    scene.recipe["train"]["precision"] = "fp16"


@mistake(4, r"fsdp needs GPUs")
def fsdp_on_a_cpu(scene):
    import torch

    scene.monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    scene.recipe["train"]["parallel"] = "fsdp"


@mistake(7, r"free")
def full_disk(scene):
    scene.monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))


@mistake(7, r"cannot write into")
def unwritable_output(scene):
    import os

    locked = scene.path / "locked"
    locked.mkdir()
    real = os.access
    scene.monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked and real(path, mode))  # root may write everywhere
    scene.recipe["output"] = str(locked / "run")


@mistake(2, r"not empty and not a run of ftkit")
def output_with_something_else(scene):
    (scene.path / "run").mkdir()
    (scene.path / "run" / "thesis.tex").write_text("years of work")


@mistake(2, r"thesis\.tex is a file")
def output_that_is_a_file(scene):
    scene.recipe["output"] = scene.file("thesis.tex", "years of work")


@mistake(6, r"step 1: loss nan.*on the rows .*train\.csv:\d+.*it did not change the weights")
def divergence(scene):
    from ftkit.objectives.supervised import Supervised

    scene.monkeypatch.setattr(Supervised, "loss", lambda self, scores: scores.logits.sum() * float("nan"))


@mistake(2, r"early_stopping\.metric: 'f2' is not a metric of text-classification on these rows; there are accuracy")
def early_stopping_on_an_unknown_metric(scene):
    scene.recipe["train"]["early_stopping"] = {"metric": "f2"}


@mistake(2, r"eval\.metrics: 'acuracy' is not a metric of text-classification on these rows; there are accuracy")
def unknown_metric(scene):
    scene.recipe["eval"] = {"metrics": ["acuracy"]}


@mistake(2, r"early_stopping\.metric: 'f1_binary' is not a metric of text-classification on these rows; there are accuracy, f1, auroc, mcc, ece, loss")
def early_stopping_on_f1_of_two_labels_where_there_are_three(scene):
    scene.recipe["train"]["early_stopping"] = {"metric": "f1_binary"}


@mistake(2, r"early_stopping needs validation rows")
def early_stopping_without_validation(scene):
    scene.recipe["data"].pop("validation")
    scene.recipe["train"]["early_stopping"] = {"metric": "loss"}


@mistake(2, r"LlamaConfig has no 'hiden_size'; did you mean 'hidden_size'\?")
def unknown_config_override(scene):
    scene.recipe |= {"model": {"init": "random", "tokenizer": {"train": "data"}, "config": {"model_type": "llama", "hiden_size": 32}}, "task": "causal-lm"}
    scene.recipe["data"] = {"train": str(scene.data.text / "train.jsonl")}


@mistake(2, r"task\.max_target_length: 200, but the model has 160 positions; give 160 or fewer")
def targets_beyond_the_decoders_positions(scene):
    scene.rewrite("bart", task={"kind": "seq2seq", "max_target_length": 200})


@mistake(2, r"train\.layout: flat is impossible here \(T5ForConditionalGeneration: it has two stacks of layers\); use layout: bucketed")
def two_stacks_without_padding(scene):
    scene.rewrite(train={"steps": 1, "layout": "flat"})


@mistake(2, r"task seq2seq: llama has no head for it")
def a_decoder_that_is_to_rewrite(scene):
    scene.rewrite("llama")


@mistake(4, r"eval\.metrics: chrf needs sacrebleu, which is not installed: pip install 'ftkit\[sacrebleu\]'")
def a_metric_whose_package_is_missing(scene):
    scene.rewrite(eval={"metrics": ["rouge_l", "chrf"]})
    scene.monkeypatch.setitem(sys.modules, "sacrebleu", None)


@mistake(2, r"eval\.metrics: stop_rate compares what the model writes with answers, and the rows of .*v\.txt have none")
def metrics_of_answers_where_there_are_none(scene):
    scene.recipe |= {"task": "causal-lm", "model": scene.checkpoint("llama"), "eval": {"metrics": ["loss", "stop_rate"]}}
    scene.recipe["data"] = {"train": scene.file("t.txt", "old boats"), "validation": scene.file("v.txt", "old roses")}


@mistake(2, r"eval\.generation\.samples: 3, but models of task text-classification write no text; leave it out")
def samples_of_what_a_classifier_writes(scene):
    scene.recipe["eval"] = {"generation": {"samples": 3}}


@mistake(2, r"train\.early_stopping\.metric: rouge_l is of text that the model writes after training; there are loss, perplexity, token_accuracy")
def early_stopping_on_what_is_measured_at_the_end(scene):
    scene.rewrite(train={"steps": 1, "early_stopping": {"metric": "rouge_l"}})


@mistake(3, r"2 rows cannot be used:\n.*t\.jsonl:2: 1 tags for 2 tokens\n.*t\.jsonl:3: token 1 is 5, not text\nRepair or remove them")
def tags_that_do_not_match(scene):
    scene.recipe["task"] = "token-classification"
    rows = [(["old", "boats"], ["O", "B-X"]), (["old", "boats"], ["O"]), ([5, "boats"], ["O", "B-X"])]
    scene.recipe["data"] = {"train": scene.file("t.jsonl", "".join(json.dumps({"tokens": words, "tags": tags}) + "\n" for words, tags in rows))}


def ask(scene, *answers, question="where is bread?"):
    """Rows that ask where bread is, with answers as given."""
    rows = [{"question": question, "context": "old bread and soup", "answers": each} for each in answers]
    scene.recipe["task"] = "question-answering"
    scene.recipe["data"] = {"train": scene.file("t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))}


RIGHT = {"text": "bread", "answer_start": 4}


@mistake(
    3,
    r"2 rows cannot be used:\n.*t\.jsonl:2: the answer 'bread' does not begin at answer_start 5, where 'read ' stands: it begins at 4\n"
    r".*t\.jsonl:3: the answer 'boats' does not begin at answer_start 4, where 'bread' stands: it is nowhere in the context\n",
)
def answers_that_are_not_where_they_should_be(scene):
    ask(scene, [RIGHT], [{"text": "bread", "answer_start": 5}], [{"text": "boats", "answer_start": 4}])


@mistake(3, r"1 row cannot be used:\n.*t\.json:2: the answer 'bread' does not begin at answer_start 0")
def a_nested_answer_that_is_not_where_it_should_be(scene):
    wrong = RIGHT | {"answer_start": 0}
    questions = [{"id": str(i), "question": "where is bread?", "answers": [answer]} for i, answer in enumerate([RIGHT, wrong])]
    ask(scene)
    scene.train("t.json", json.dumps({"data": [{"paragraphs": [{"context": "old bread and soup", "qas": questions}]}]}))


@mistake(3, r"t\.jsonl:1: the question has \d+ tokens, which leaves no room for the context in data\.max_length: 16")
def a_question_without_room_for_the_context(scene):
    ask(scene, [RIGHT], question="where is bread? " * 9)
    scene.recipe["data"]["max_length"] = 16


@mistake(3, r"the training rows have no answer that can be used")
def questions_without_any_answer(scene):
    ask(scene, [], None)


@mistake(3, r"t\.jsonl:1: question is empty")
def an_empty_question(scene):
    ask(scene, [RIGHT], question=" ")


@mistake(2, r"objective\.label_smoothing: 0\.1 is for classes, and the rows have positions; leave it out")
def smoothed_positions(scene):
    ask(scene, [RIGHT])
    scene.recipe["objective"] = {"kind": "supervised", "label_smoothing": 0.1}


@mistake(2, r"objective\.label_smoothing: 0\.1 is for classes, and the rows have numbers; leave it out")
def smoothed_numbers(scene):
    scene.recipe |= {"task": {"kind": "text-classification", "problem": "regression"}, "objective": {"kind": "supervised", "label_smoothing": 0.1}}
    scene.recipe["data"] = {"train": str(scene.data.scored / "train.csv")}


@mistake(3, r"v\.conll:3: tag 'B-Y' does not occur in the training rows \(known: 'B-X', 'O'\)")
def a_tag_seen_only_in_validation(scene):
    scene.recipe["task"] = "token-classification"
    scene.recipe["data"] = {"train": scene.file("t.conll", "old O\nboats B-X\n"), "validation": scene.file("v.conll", "old O\n\nboats B-Y\n")}


@mistake(3, r"t\.conll:3: the lines of this sentence have different numbers of columns")
def a_sentence_with_a_broken_line(scene):
    scene.recipe["task"] = "token-classification"
    scene.recipe["data"] = {"train": scene.file("t.conll", "old O\n\nboats NN B-X\nsoup O\n")}


@mistake(3, r"2 rows cannot be used:\n.*t\.jsonl:1: target is empty\n.*t\.jsonl:2: source must be text, but is a number")
def rows_with_nothing_to_write(scene):
    scene.rewrite()
    scene.train("t.jsonl", '{"source": "a", "target": " "}\n{"source": 3, "target": "b"}\n{"source": "a", "target": "b"}\n')


@mistake(2, r"task\.probability.* must be below 1")
def more_masks_than_tokens(scene):
    scene.fill(probability=1.5)


@mistake(2, r"recipe\.yaml:\d+:\d+: replace\.mask and replace\.random are shares of the hidden tokens, and 0\.8 \+ 0\.3 is more than 1")
def more_than_all_masks_replaced(scene):
    scene.fill(replace={"mask": 0.8, "random": 0.3})


@mistake(2, r"no mask token \(mask_token\), so nothing can be hidden; name one that has .* or train one: \{train: data, kind: wordpiece\}")
def masks_without_a_mask_token(scene):
    scene.fill()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    scene.recipe["model"] = {"init": "random", "config": {"model_type": "roberta", **sizes}, "tokenizer": {"train": "data", "vocab_size": 300}}


@mistake(2, r"BartForSequenceClassification reads its answer at the end of a text, token None, which the tokenizer does not end texts with")
def an_answer_at_the_end_of_texts_without_an_end(scene):
    sizes = {f"{stack}_{size}": value for stack in ("encoder", "decoder") for size, value in {"layers": 1, "attention_heads": 2, "ffn_dim": 64}.items()}
    tokenizer = {"train": "data", "kind": "wordpiece", "vocab_size": 120}
    scene.recipe["model"] = {"init": "random", "config": {"model_type": "bart", "d_model": 32, **sizes}, "tokenizer": tokenizer}


@mistake(2, r"T5ForSequenceClassification reads its answer at the end of a text, token 1, and the tokenizer pads with it, too; give it another pad_token")
def an_answer_at_the_end_of_texts_that_looks_like_padding(scene):
    scene.recipe["model"] = scene.model_without(architecture="t5")
    path = Path(scene.recipe["model"]) / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | {"pad_token": settings["eos_token"]}), encoding="utf-8")


@mistake(2, r"task masked-lm: BartForConditionalGeneration writes text with a decoder and fills no masks in place")
def masks_for_an_encoder_decoder(scene):
    scene.fill()
    sizes = {f"{stack}_{size}": value for stack in ("encoder", "decoder") for size, value in {"layers": 1, "attention_heads": 2, "ffn_dim": 64}.items()}
    tokenizer = {"train": "data", "kind": "wordpiece", "vocab_size": 120}
    scene.recipe["model"] = {"init": "random", "config": {"model_type": "bart", "d_model": 32, **sizes}, "tokenizer": tokenizer}


@mistake(2, r"task masked-lm: .* has no head for it; the new one shares its weights with the embeddings, which method lora freezes; use method: full")
def a_new_head_on_frozen_embeddings(scene):
    scene.fill()
    scene.recipe |= {"model": scene.checkpoint("bert"), "method": "lora"}


@mistake(3, r"t\.jsonl:2: text is empty")
def nothing_to_mask(scene):
    scene.fill()
    scene.train("t.jsonl", '{"text": "roses and bees"}\n{"text": " \\n "}\n')


@mistake(3, r"t\.jsonl:2: the tokenizer makes no token of the text")
def a_text_that_is_cleaned_away(scene):
    scene.fill()
    scene.train("t.jsonl", '{"text": "roses and bees"}\n{"text": "\\ufe0f"}\n')


@mistake(3, r"1 row cannot be used:\n.*t\.csv:2: positive is empty")
def a_pair_of_one_text(scene):
    scene.embed()
    scene.train("t.csv", "anchor,positive\nroses,tulips\nboats, \nbread,butter\n")


@mistake(3, r"t\.jsonl:2: 1 texts in negative, but 2 in the first training row: all rows must have as many")
def rows_with_unlike_numbers_of_negatives(scene):
    scene.embed()
    rows = [{"anchor": "roses", "positive": "tulips", "negative": negative} for negative in (["soup", "boats"], "soup")]
    scene.train("t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


@mistake(3, r"2 rows cannot be used:\n.*t\.csv:1: score '4' is outside of task\.score_range: 0 to 1\n.*t\.csv:2: score 'high' is not a number")
def scores_out_of_range(scene):
    scene.embed(loss="cosine")
    scene.train("t.csv", "sentence1,sentence2,score\nroses,tulips,4\nboats,nets,high\nbread,soup,0.5\n")


@mistake(3, r"the training rows have one score only \(1\): there is nothing to put in order, which loss: cosent learns")
def one_score_only(scene):
    scene.embed(loss="cosent")
    scene.train("t.csv", "sentence1,sentence2,score\nroses,tulips,1\nboats,nets,1.0\n")


@mistake(2, r"train\.batch_size: 1, but with this loss a row learns from the other rows of its batch; give 2 or more")
def a_row_without_others_to_learn_from(scene):
    scene.embed()
    scene.recipe["train"]["batch_size"] = 1


@mistake(2, r"method head: BertModel has no head for task sentence-embedding; use method: partial, with last: 1")
def a_head_where_there_is_none(scene):
    scene.embed()
    scene.recipe["method"] = "head"


@mistake(2, r"task sentence-embedding: t5 has two stacks of layers")
def an_embedding_of_two_stacks(scene):
    scene.embed()
    scene.recipe["model"] = scene.checkpoint("t5")


@mistake(3, r"t\.csv:2: score '3' is outside of task\.score_range: 0 to 1")
def relevance_out_of_range(scene):
    scene.recipe |= {"task": "reranking", "data": {}}
    scene.train("t.csv", "query,document,label\nroses,tulips,1\nboats,nets,3\n")


@mistake(2, r"has no adapter_model.safetensors; pickled weights \(.bin\) are not read")
def half_an_adapter_as_the_model(scene):
    adapter = scene.path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    scene.recipe["model"] = str(adapter)


TOPICS = ["garden", "harbour", "kitchen"]


def teach(scene: Scene, task: dict[str, Any], model: str = "bert", status: str = "finished") -> None:
    """As much of a finished run as is read before its weights are, and let the recipe learn from it."""
    run = scene.path / "teacher"
    shutil.copytree(scene.checkpoint(model), run / "model")
    kwargs = {"dtype": "float32", "num_labels": len(task.get("labels", ()))}
    artifact = {"loads_with": "transformers", "auto_class": "AutoModelForSequenceClassification", "load_kwargs": kwargs}
    manifest = {"status": status, "artifact": artifact, "verification": {"base_sha256": None}, "parameters": {"total": 10**6}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    scene.file("teacher/recipe.yaml", yaml.safe_dump(scene.recipe | {"task": task, "data": scene.recipe["data"] | {"max_length": 96}}))
    scene.recipe["objective"] = {"kind": "distill", "teacher": str(run)}


@mistake(2, r"objective\.teacher: .*gone does not exist; train the teacher with ftkit first, then name its run")
def no_teacher(scene):
    scene.recipe["objective"] = {"kind": "distill", "teacher": "gone"}


@mistake(2, r"objective\.teacher: .* is no run directory; train the teacher")
def a_teacher_that_ftkit_did_not_train(scene):
    scene.recipe["objective"] = {"kind": "distill", "teacher": scene.checkpoint("bert")}


@mistake(2, r"objective\.teacher: .*empty is a directory without manifest\.json and config\.json, so no teacher; name a finished run of ftkit, or a")
def a_teacher_in_an_empty_directory(scene):
    (scene.path / "empty").mkdir()
    scene.recipe["objective"] = {"kind": "distill", "teacher": str(scene.path / "empty")}


@mistake(2, r"objective\.teacher_revision: .* is a directory on this disk, which has none; leave it out")
def a_revision_of_a_directory(scene):
    scene.recipe["objective"] = {"kind": "distill", "teacher": scene.checkpoint("gpt2"), "teacher_revision": "main"}


@mistake(2, r"objective\.teacher_bits: the teacher is in few bits as it is; leave it out")
def a_teacher_rounded_twice(scene):
    teach(scene, {"kind": "text-classification", "problem": "single-label", "labels": TOPICS})
    manifest = json.loads((scene.path / "teacher" / "manifest.json").read_text())
    manifest["artifact"]["load_kwargs"]["quantization_config"] = {"load_in_4bit": True}
    scene.file("teacher/manifest.json", json.dumps(manifest))
    scene.recipe["objective"]["teacher_bits"] = 4


@mistake(2, r"missing required key `objective\.teacher`: run directory of the trained teacher")
def distillation_without_a_teacher(scene):
    scene.recipe["objective"] = "distill"


@mistake(2, r"teacher has no model yet: its run is preempted")
def a_teacher_that_still_learns(scene):
    teach(scene, {"kind": "text-classification", "labels": TOPICS}, status="preempted")


@mistake(2, r"teacher was trained for token-classification, and this run is for text-classification")
def a_teacher_of_another_task(scene):
    teach(scene, {"kind": "token-classification"})


@mistake(2, r"teacher was trained for problem: multi-label, and this run is for single-label")
def a_teacher_of_another_problem(scene):
    teach(scene, {"kind": "text-classification", "problem": "multi-label", "labels": TOPICS})


@mistake(2, r"teacher has other labels: bad, good; this run has garden, harbour, kitchen\. Give them in task\.labels as the teacher has them")
def a_teacher_of_other_labels(scene):
    teach(scene, {"kind": "text-classification", "problem": "single-label", "labels": ["bad", "good"]})


@mistake(2, r"teacher has the same labels in another order: kitchen, harbour, garden; this run has garden, harbour, kitchen")
def a_teacher_with_its_labels_in_another_order(scene):
    teach(scene, {"kind": "text-classification", "problem": "single-label", "labels": TOPICS[::-1]})


@mistake(2, r"teacher has another tokenizer, and token-classification compares scores token by token, .*; use a student with the teacher's tokenizer")
def a_teacher_of_other_tokens(scene):
    scene.recipe |= {"task": {"kind": "token-classification", "labels": ["O", "B-X"]}}
    scene.train("t.conll", "old O\nboats B-X\n")
    del scene.recipe["data"]["validation"]
    teach(scene, scene.recipe["task"], "gpt2")


@mistake(2, r"data\.max_length: 150, but objective\.teacher: .*teacher has 96 positions; give 96 or fewer")
def rows_longer_than_the_teacher_reads(scene):
    teach(scene, {"kind": "text-classification", "problem": "single-label", "labels": TOPICS})
    scene.recipe["model"] = {"name": scene.recipe["model"], "config": {"max_position_embeddings": 150}, "init": "random"}
    scene.recipe["data"]["max_length"] = 150


@mistake(2, r"objective distill: text-classification with numbers has no scores of classes that could be softened; use objective: supervised")
def a_teacher_of_numbers(scene):
    scene.recipe |= {"task": {"kind": "text-classification", "problem": "regression"}, "objective": {"kind": "distill", "teacher": "gone"}}
    scene.recipe["data"] = {"train": str(scene.data.scored / "train.csv")}


@mistake(2, r"objective\.on_policy: students of causal-lm write answers, those of text-classification do not; leave it out")
def a_classifier_that_is_to_write(scene):
    teach(scene, {"kind": "text-classification", "problem": "single-label", "labels": TOPICS})
    scene.recipe["objective"]["on_policy"] = 0.5


@mistake(2, r"objective\.on_policy: plain text has no prompt that the student could answer; give rows with prompts or messages, or leave it out")
def answers_to_plain_text(scene):
    scene.recipe |= {"model": scene.checkpoint("gpt2"), "task": "causal-lm", "data": {"train": str(scene.data.text / "train.jsonl"), "max_length": 32}}
    teach(scene, {"kind": "causal-lm"}, "gpt2")
    scene.recipe["objective"]["on_policy"] = 0.5


@mistake(2, r"alpha: 1 asks no teacher, and what on_policy lets the student write is learned from a teacher alone; leave on_policy out")
def answers_that_nobody_judges(scene):
    scene.recipe["objective"] = {"kind": "distill", "teacher": "gone", "alpha": 1, "on_policy": 0.5}


@mistake(2, r"beta has no effect with divergence: reverse; leave it out, or set divergence: jensen-shannon")
def a_beta_of_another_divergence(scene):
    scene.recipe["objective"] = {"kind": "distill", "teacher": "gone", "divergence": "reverse", "beta": 0.1}


@mistake(7, r"the scores that the teacher gives 32 items, 3 each, take 384 .*, and the cache may hold 100 .*; set FTKIT_CACHE_LIMIT higher, or let the teacher")
def a_cache_too_small_for_what_the_teacher_says(scene):
    teach(scene, {"kind": "text-classification", "problem": "single-label", "labels": TOPICS})
    scene.monkeypatch.setenv("FTKIT_CACHE_LIMIT", "100")


@mistake(7, r"the scores that the teacher gives 32 items, 3 each, take 384 .*, and .*cache.* has 100 .*; set FTKIT_CACHE to another place, or let the teacher")
def a_disk_too_full_for_what_the_teacher_says(scene):
    teach(scene, {"kind": "text-classification", "problem": "single-label", "labels": TOPICS})
    scene.monkeypatch.setattr("ftkit.teachers.shutil.disk_usage", lambda path: SimpleNamespace(free=100))


def compare(scene: Scene, **objective: Any) -> None:
    """With a teacher layer by layer."""
    teach(scene, {"kind": "text-classification", "problem": "single-label", "labels": TOPICS})
    scene.recipe["objective"] |= objective


@mistake(2, r"objective\.layer_map: there is no layer 7: the teacher has 2, counted from 0")
def a_layer_that_the_teacher_has_not(scene):
    compare(scene, hidden=1, layer_map=[0, 7])


@mistake(2, r"objective\.layer_map: it names 1 layers, one for each of the student's, which has 2")
def a_layer_map_of_another_student(scene):
    compare(scene, hidden=1, layer_map=[1])


@mistake(2, r"layer_map has no effect without hidden, cosine, attention or relations; leave it out")
def a_layer_map_for_nothing(scene):
    compare(scene, layer_map="last")


@mistake(2, r"objective\.attention: the student has 4 heads in a layer, the teacher 2; use relations, which need no equal heads")
def other_heads_than_the_teachers(scene):
    compare(scene, attention=1)
    scene.recipe["model"] = {"name": scene.recipe["model"], "config": {"num_attention_heads": 4}}


@mistake(2, r"objective\.relation_heads: 32 numbers, as wide as keys are, cannot be cut into 12 heads; give a divisor")
def relations_that_cannot_be_cut(scene):
    compare(scene, relations=1)


@mistake(2, r"objective distill: layers cannot be compared with train\.gradient_checkpointing; leave it out, or compare scores alone")
def layers_compared_and_recomputed(scene):
    compare(scene, hidden=1)
    scene.recipe["train"]["gradient_checkpointing"] = True


@mistake(2, r"objective distill: layers cannot be compared with method prompt, whose virtual tokens the teacher has not; leave it out")
def layers_compared_behind_a_prompt(scene):
    compare(scene, hidden=1)
    scene.recipe["method"] = {"kind": "prompt", "num_virtual_tokens": 4}


@mistake(2, r"cache_states: attention and relations compare queries and keys, which are not kept; leave it out")
def queries_that_are_to_be_kept(scene):
    compare(scene, hidden=1, attention=1, cache_states=True)


@mistake(2, r"cache_states has no effect without cache, and hidden, cosine or embeddings; leave it out")
def states_that_nothing_is_compared_with(scene):
    compare(scene, cache_states=True)


@mistake(2, r"teacher was trained with prompt, whose virtual tokens the student has not; compare scores alone, not layers")
def layers_of_a_teacher_behind_a_prompt(scene):
    scene.recipe["method"] = {"kind": "prompt", "num_virtual_tokens": 4}
    compare(scene, hidden=1)
    scene.recipe["method"] = "full"


@mistake(2, r"teacher has another tokenizer, and layers are compared token by token, which are not the same ones; use a student with")
def layers_of_other_tokens(scene):
    teach(scene, {"kind": "text-classification", "problem": "single-label", "labels": TOPICS}, "gpt2")
    scene.recipe["objective"]["hidden"] = 1


@mistake(2, r"model\.layers: there is no layer 2: bert has 2, counted from 0")
def a_layer_that_is_not_there(scene):
    scene.recipe["model"] = {"name": scene.recipe["model"], "layers": [0, 2]}


@mistake(2, r"layers: one of them is there twice")
def a_layer_twice(scene):
    scene.recipe["model"] = {"name": scene.recipe["model"], "layers": [1, 1]}


@mistake(2, r"layers and convert are for a stored model; with init: random give the config of the student in model\.config")
def layers_of_nothing(scene):
    scene.recipe["model"] = {"name": scene.recipe["model"], "layers": [1], "init": "random"}


@mistake(2, r"model\.convert: distilbert is made of a BERT, and this is gpt2; leave it out")
def a_distilbert_of_a_decoder(scene):
    scene.recipe["model"] = {"name": scene.checkpoint("gpt2"), "convert": "distilbert"}


@mistake(2, r"method qlora loads stored weights in few bits, where nothing can be left out; train the student first")
def layers_in_few_bits(scene):
    scene.recipe |= {"model": {"name": scene.recipe["model"], "layers": [1]}, "method": "qlora"}


@mistake(2, r"model\.layers: the layers of Reformer\w+ cannot be told from its other modules; leave it out")
def layers_of_two_streams(scene):
    scene.recipe["model"] = {"name": scene.checkpoint("reformer"), "layers": [1]}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_and_costs_nothing(name, scene, ftkit):
    spoil, code, message = MISTAKES[name]
    spoil(scene)
    recipe = scene.path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(scene.recipe))
    before = {path: path.read_bytes() for path in scene.path.rglob("*") if path.is_file()}
    outcome = ftkit("train", recipe)
    assert outcome.code == code, outcome.err
    assert re.search(message, outcome.err), outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    assert all(path.read_bytes() == content for path, content in before.items()), "nothing of the user's may change"


def test_labels_that_cannot_be_used_may_be_left_out(scene, ftkit, verify_here):
    """In the training rows and in those that are measured, whose baselines know of none but the used ones."""
    rows = [{"text": f"roses {i}", "label": i % 2 == 0} for i in range(8)]
    bad = [{"text": "bread", "label": 0.5}, {"text": "butter", "label": [1]}]
    lines = "".join(json.dumps(row) + "\n" for row in [*bad, *rows])
    scene.recipe["data"] = {"train": scene.file("t.jsonl", lines), "validation": scene.file("v.jsonl", lines), "on_bad_rows": "skip"}
    recipe = scene.path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(scene.recipe))
    outcome = ftkit("train", recipe, "--json")
    assert outcome.code == 0, outcome.err
    assert re.search(r"2 bad rows left out:\n.*t\.jsonl:1: label 0\.5 .*\n.*t\.jsonl:2: label \[1\] ", outcome.err)
    assert json.loads(outcome.out)["baselines"]["majority"] == 0.5


REFUSED_AT_ONCE = {
    "typo_in_a_number": ("train: {learning_rate: 1e-4x}", r"recipe\.yaml:4:\d+: .*1e-4x.* is not a number"),
    "unknown_key": ("train: {lerning_rate: 1e-4}", r"recipe\.yaml:4:\d+: .*lerning_rate.*learning_rate"),
    "unknown_method": ("method: lorra", r"lorra.*lora"),
    "yaml_tag": ("train: !!python/object/apply:os.system [echo]", r"recipe\.yaml:4:\d+: .*tag"),
    "alias_bomb": ("a: &a [x]\nb: &b [*a, *a]", r"recipe\.yaml:4:\d+: .*(anchor|alias)"),
    "nesting": ("a: " + "[" * 10_000_000, r"larger|1 MB|deeper"),
}


@pytest.mark.parametrize("name", REFUSED_AT_ONCE)
def test_a_recipe_that_cannot_be_read_is_refused(name, tmp_path, ftkit):
    line, message = REFUSED_AT_ONCE[name]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: x/y\ntask: text-classification\ndata: {{train: t.csv}}\n{line}\n")
    outcome = ftkit("train", recipe)
    assert outcome.code == 2
    assert re.search(message, outcome.err), outcome.err
    assert "Traceback" not in outcome.err


def test_a_disk_that_fills_up_while_saving_keeps_the_older_checkpoint(scene, ftkit, monkeypatch):
    """The second checkpoint fails as a full disk does; the first is whole and the run continues from it."""
    from ftkit import checkpoint

    real, calls = checkpoint.save_file, []

    def filling(tensors, path, *rest):
        calls.append(path)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(tensors, path, *rest)

    monkeypatch.setattr(checkpoint, "save_file", filling)
    scene.recipe["train"] |= {"steps": 4, "save_every": 1}
    recipe = scene.path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(scene.recipe))
    outcome = ftkit("train", recipe)
    assert outcome.code == 7, outcome.err
    assert "No space left" in outcome.err
    assert [path.name for path in (scene.path / "run" / "checkpoints").iterdir()] == ["step-1"]
    assert checkpoint.flaw(scene.path / "run" / "checkpoints" / "step-1") is None
    assert json.loads((scene.path / "run" / "manifest.json").read_text())["exit_code"] == 7
