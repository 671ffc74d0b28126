"""Frozen layers computed once: the same weights after several epochs, and each frozen layer run once a row.

That a resumed run has the same bits is in tests/integration/test_resume.py.
"""

import gc
import weakref

import pytest
import torch

from ftkit import frozen, loop
from ftkit.attention import layers_of
from ftkit.errors import DiskError
from ftkit.finish import _release
from ftkit.loop import Position, fit
from ftkit.prepare import prepare
from ftkit.recipe import read
from ftkit.report import Reporter
from ftkit.session import open_session

RUNS = {  # model, overrides, rows, method, frozen layers
    "bert-head": ("bert", {}, "single", {"kind": "head"}, 2),
    "bert-head-in-4-bits": ("bert", {}, "single", {"kind": "head", "bits": 4}, 2),
    "bert-partial": ("bert", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, "pairs", {"kind": "partial", "last": 1}, 1),
    "distilbert-head": ("distilbert", {"seq_classif_dropout": 0.0}, "single", {"kind": "head"}, 2),
    "bert-answers-head": ("bert", {}, "asked", {"kind": "head"}, 2),
    "llama-partial": ("llama", {}, "chats", {"kind": "partial", "last": 1}, 1),
    "gpt2-partial": ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, "prompts", {"kind": "partial", "pattern": r"h\.1\."}, 1),
    "llama-upper-lora": ("llama", {}, "prompts", {"kind": "lora", "r": 4, "dropout": 0.0, "targets": r"layers\.1\."}, 1),
}
TRAIN = {"epochs": 3, "optimizer": "sgd", "learning_rate": 0.05, "max_grad_norm": None}
TRAIN |= {"steps": None}  # the fixture's recipe counts steps


def session(path, report, *overrides):
    return open_session(prepare(read(path, overrides), report), report)


def trained(opened):
    return [(step.loss, step.grad_norm) for step in fit(opened, Position())], opened.trainable


@pytest.fixture
def path(recipe, checkpoint):
    def write(name: str, **train):
        model, overrides, rows, method, _ = RUNS[name]
        return recipe({"name": checkpoint(model), "config": overrides}, rows, {**TRAIN, **train}, method=method)

    return write


@pytest.mark.parametrize(("layout", "rounds"), [("flat", False), ("flat", True), ("bucketed", False)], ids=["flat", "rounded", "bucketed"])
@pytest.mark.parametrize("name", RUNS)
def test_three_epochs_give_the_weights_that_they_give_without(name, layout, rounds, path, tmp_path, monkeypatch):
    """In padded batches dropout of the head draws other numbers than in flat ones, but not with frozen layers or without."""
    monkeypatch.setattr(loop, "made_for_each_shape", lambda model: rounds)
    where = path(name, layout=layout)
    with Reporter(None, quiet=True) as report:
        without, once = session(where, report), session(where, report)
        assert not [note for note in report.notes if "computed once" in note]
        once.compute_frozen(tmp_path, report, lambda: None)
        assert [note for note in report.notes if f"the lowest {RUNS[name][-1]} layers are frozen: they are computed once" in note]
    start = {key: parameter.detach().clone() for key, parameter in once.trainable.items()}
    torch.manual_seed(5)
    losses, weights = trained(without)
    torch.manual_seed(5)
    losses_once, weights_once = trained(once)
    assert losses_once == [(pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-4)) for loss, norm in losses]
    moved = max((weights[key] - start[key]).abs().max() for key in start)
    assert moved > 1e-3
    assert max((weights[key] - weights_once[key]).abs().max() for key in start) < 1e-4 * moved


@pytest.mark.parametrize("name", ["bert-head", "llama-partial"])
def test_in_bfloat16_layers_are_computed_once_too(name, path, tmp_path):
    """What two ways to compute differ by is more there, and was taken for a row that depends on others."""
    where = path(name, precision="bf16")
    with Reporter(None, quiet=True) as report:
        without, once = session(where, report), session(where, report)
        once.compute_frozen(tmp_path, report, lambda: None)
        assert once.frozen is not None, report.notes
    torch.manual_seed(5)
    losses, _ = trained(without)
    torch.manual_seed(5)
    losses_once, _ = trained(once)
    assert [loss for loss, _ in losses_once] == [pytest.approx(loss, rel=2e-2) for loss, _ in losses]


def test_each_frozen_layer_computes_each_row_once(path, tmp_path):
    with Reporter(None, quiet=True) as report:
        opened = session(path("bert-partial"), report)
        seen = [0, 0]
        for index, layer in enumerate(layers_of(opened.base.model)):
            layer.attention.register_forward_hook(lambda module, args, output, index=index: seen.__setitem__(index, seen[index] + args[0].shape[:2].numel()))
        opened.compute_frozen(tmp_path, report, lambda: None)
        recorded, seen[:] = list(seen), [0, 0]
        for _ in fit(opened, Position()):
            pass
    features = opened.prepared.train
    everything = int(features.offsets[-1]) + sum(int(each.offsets[-1]) for _, each in opened.splits.values())
    tried = {12, 7, 19}  # tokens of the two rows that are tried before, alone and together
    assert recorded[0] - everything in range(min(tried), 8 * max(tried))  # flat: real tokens, no padding
    assert recorded[1] < 5 * max(tried)  # what is above is computed for the trial only
    assert seen == [0, 3 * int(features.offsets[-1])]


def test_the_backward_pass_stops_above_them(path, tmp_path):
    with Reporter(None, quiet=True) as report:
        opened = recorded(path("llama-partial"), report, tmp_path, "method.reuse=false")
    assert opened.frozen is None
    reached = []
    for layer in layers_of(opened.base.model):
        layer.register_forward_hook(lambda module, args, output: reached.append(output.requires_grad))
    next(fit(opened, Position()))
    assert reached == [False, True]


def test_more_than_memory_is_mapped_from_a_file_that_leaves_nothing(path, tmp_path, monkeypatch):
    where = path("bert-head")
    with Reporter(None, quiet=True) as report:
        expected, _ = trained(recorded(where, report, tmp_path))
        monkeypatch.setattr(frozen, "IN_MEMORY", 0)
        found, _ = trained(recorded(where, report, tmp_path))
        assert [note for note in report.notes if "kept in a file" in note]
        assert found == expected
        assert not list(tmp_path.glob(".frozen*"))
        monkeypatch.setattr(frozen, "disk_budget", lambda directory: 0)
        assert recorded(where, report, tmp_path).frozen is None
        assert [note for note in report.notes if "computed anew each time" in note]


def recorded(where, report, directory, *overrides):
    opened = session(where, report, *overrides)
    opened.compute_frozen(directory, report, lambda: None)
    return opened


def test_a_full_disk_is_told_as_such(path, tmp_path, monkeypatch):
    def full(descriptor, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frozen, "IN_MEMORY", 0)
    monkeypatch.setattr(frozen.os, "posix_fallocate", full)
    with Reporter(None, quiet=True) as report, pytest.raises(DiskError, match=r"no room for the states above the frozen layers .*No space left"):
        recorded(path("bert-head"), report, tmp_path)


def test_nothing_is_kept_where_rows_are_seen_once_or_nothing_is_frozen(path, recipe, tmp_path):
    with Reporter(None, quiet=True) as report:
        assert recorded(path("bert-head", epochs=1), report, tmp_path).frozen is None
        for method in ("full", "lora", {"kind": "partial", "first": 1}):
            assert recorded(recipe("bert", "single", TRAIN, method=method), report, tmp_path).frozen is None


MPNET = {"model_type": "mpnet", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
WITHOUT = {  # config, method, why
    "a learning bias that is defined after the layers": (MPNET, {"kind": "partial", "pattern": "relative_attention_bias"}, None),
    "padding that states depend on": (
        {"model_type": "fnet", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64},
        {"kind": "head"},
        "what they give for a row depends on the rows beside it",
    ),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_layers_whose_states_change_are_computed_each_time(name, recipe, checkpoint, tmp_path):
    config, method, reason = WITHOUT[name]
    model = {"init": "random", "config": {**config, "initializer_range": 0.2}, "tokenizer": checkpoint("bert")}
    with Reporter(None, quiet=True) as report:
        assert recorded(recipe(model, "single", TRAIN, method=method), report, tmp_path).frozen is None
        assert reason is None or [note for note in report.notes if reason in note]


def test_states_of_another_shape_are_those_of_other_rows(path, tmp_path, monkeypatch):
    whole = frozen.Frozen.states_of
    monkeypatch.setattr(frozen.Frozen, "states_of", lambda self, batch, compute: whole(self, batch, compute)[len(batch.input_ids) - 1 :])
    with Reporter(None, quiet=True) as report:
        assert recorded(path("bert-head"), report, tmp_path).frozen is None
    assert [note for note in report.notes if "what they give for a row depends on the rows beside it" in note]


def test_states_keep_their_type(recipe, checkpoint, tmp_path):
    """A base in bfloat16, which float32 states would not fit."""
    method = {"kind": "lora", "r": 4, "targets": r"layers\.1\."}
    path = recipe({"name": checkpoint("llama"), "dtype": "bfloat16"}, "prompts", {**TRAIN, "precision": "fp32"}, method=method)
    with Reporter(None, quiet=True) as report:
        opened = recorded(path, report, tmp_path)
        assert {kept.states.dtype for kept in opened.frozen._kept.values()} == {torch.bfloat16}
        next(fit(opened, Position()))


def test_a_released_session_holds_no_model(path, tmp_path):
    with Reporter(None, quiet=True) as report:
        opened = recorded(path("bert-head"), report, tmp_path)
    held = weakref.ref(opened.base.model)
    opened.release()
    _release(opened)
    gc.collect()
    assert held() is None


def test_the_trial_draws_no_random_number_of_the_run(path, tmp_path):
    with Reporter(None, quiet=True) as report:
        opened = session(path("bert-head"), report)
        before = torch.get_rng_state()
        opened.compute_frozen(tmp_path, report, lambda: None)
    assert opened.frozen is not None
    assert torch.equal(torch.get_rng_state(), before)
