"""Compiled layers: the weights of layers that Python runs, up to rounding."""

import shutil

import pytest
import torch
import transformers

from ftkit import compiled
from ftkit.attention import layers_of
from ftkit.errors import MissingDependency, RecipeError
from ftkit.loop import Position, fit
from ftkit.prepare import prepare
from ftkit.recipe import read
from ftkit.report import Reporter
from ftkit.session import open_session

TRAIN = {"steps": 20, "optimizer": "sgd", "learning_rate": 0.05, "max_grad_norm": None}
BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
RUNS = {
    "bert": ("bert", BERT, "single", "full"),
    "llama-lora": ("llama", {}, "chats", {"kind": "lora", "r": 4, "dropout": 0.0}),
}


def session(path, report, *overrides):
    return open_session(prepare(read(path, overrides), report), report)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
@pytest.mark.parametrize("name", RUNS)
def test_after_twenty_steps_the_weights_are_those_without(name, recipe, checkpoint):
    model, overrides, rows, method = RUNS[name]
    path = recipe({"name": checkpoint(model), "config": overrides}, rows, TRAIN, method=method)
    with Reporter(None, quiet=True) as report:
        plain, ours = session(path, report), session(path, report, "train.compile=true")
    assert all(layer._compiled_call_impl for layer in layers_of(ours.base.model))
    start = {key: parameter.detach().clone() for key, parameter in plain.trainable.items()}
    before = compiled.seconds()
    losses = [[step.loss for step in fit(each, Position())] for each in (plain, ours)]
    assert compiled.seconds() > before
    assert losses[1] == [pytest.approx(loss, rel=1e-4) for loss in losses[0]]
    moved = max((parameter - start[key]).abs().max() for key, parameter in plain.trainable.items())
    assert moved > 1e-2
    assert max((parameter - plain.trainable[key]).abs().max() for key, parameter in ours.trainable.items()) < 1e-3 * moved
    ours.release()
    assert not any(layer._compiled_call_impl for layer in layers_of(ours.base.model))


def test_no_compiler_is_told_before_the_run(recipe, checkpoint, monkeypatch):
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with Reporter(None, quiet=True) as report, pytest.raises(MissingDependency, match=r"train.compile needs a C\+\+ compiler"):
        session(recipe("bert", "single", {"compile": True}), report)


def test_a_model_without_one_list_of_layers_is_refused():
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=100)
    with pytest.raises(RecipeError, match=r"train\.compile: T5ForConditionalGeneration has no single list of layers"):
        compiled.check(transformers.T5ForConditionalGeneration(config), torch.device("cpu"))
