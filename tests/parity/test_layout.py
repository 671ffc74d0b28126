"""Flat and padded: the same batches, and after 20 steps the same weights; and where flat is impossible, the run says so."""

from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState

from ftkit import attention, layout, loop, plain_attention
from ftkit.errors import RecipeError
from ftkit.loop import Position, fit
from ftkit.prepare import prepare
from ftkit.recipe import read
from ftkit.report import Reporter
from ftkit.session import open_session

BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
RUNS = {
    "bert": ("bert", BERT, "single", {"kind": "full"}, {}),
    "bert-answers": ("bert", BERT, "asked", {"kind": "full"}, {}),
    "bert-pairs-checkpointed": ("bert", BERT, "pairs", {"kind": "full"}, {"gradient_checkpointing": True}),
    "distilbert-partial": ("distilbert", {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}, "single", {"kind": "partial", "last": 1}, {}),
    "llama-classification": ("llama", {}, "single", {"kind": "full"}, {}),
    "bert-masks": ("bert-masked", BERT, "masked", {"kind": "full"}, {}),
    "bert-documents": ("bert-pretrained", BERT, "documents", {"kind": "full"}, {}),
    "electra-texts": ("electra-pretrained", BERT, "texts", {"kind": "full"}, {"learning_rate": 0.005}),
    "llama-accumulated": ("llama", {}, "chats", {"kind": "full"}, {"accumulate": 3}),
    "llama-lora": ("llama", {}, "prompts", {"kind": "lora", "r": 4, "dropout": 0.0}, {}),
    "bert-adapter": ("bert", BERT, "single", {"kind": "adapter", "placement": "houlsby", "reduction": 2}, {"learning_rate": 0.5}),
    "gpt2-bitfit-checkpointed": (
        "gpt2",
        {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "prompts",
        {"kind": "bitfit"},
        {"gradient_checkpointing": True},
    ),
    "gpt2": ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, "prompts", {"kind": "full"}, {}),
}


def session(path, asked, report):
    return open_session(prepare(read(path, [f"train.layout={asked}"]), report), report)


@pytest.mark.parametrize("rounded", ["", "at once", "ahead"])
@pytest.mark.parametrize("name", RUNS)
def test_after_twenty_steps_the_weights_are_those_of_padded_batches(name, rounded, recipe, checkpoint, monkeypatch):
    """`rounded`: filled up to round numbers of tokens, at once as in bfloat16 on a CPU, ahead as on a GPU."""
    model, overrides, rows, method, changes = RUNS[name]
    train = {"steps": 20, "optimizer": "sgd", "learning_rate": 0.05, "max_grad_norm": None, **changes}
    path = recipe({"name": checkpoint(model), "config": overrides}, rows, train, method=method)
    monkeypatch.setattr(loop, "made_for_each_shape", lambda model: rounded == "at once")
    monkeypatch.setattr(loop, "chosen_for_each_shape", lambda device: rounded == "ahead")
    seen = numbers_of_tokens(monkeypatch)
    with Reporter(None, quiet=True) as report:
        padded, flat = (session(path, layout, report) for layout in ("padded", "flat"))
    start = {key: parameter.detach().clone() for key, parameter in padded.trainable.items()}
    losses = [[(step.loss, step.tokens) for step in fit(each, Position())] for each in (padded, flat)]
    assert flat.sampler.layout == "flat"
    assert losses[1] == [(pytest.approx(loss, rel=1e-5), tokens) for loss, tokens in losses[0]]
    moved = max((parameter - start[key]).abs().max() for key, parameter in padded.trainable.items())
    apart = max((parameter - flat.trainable[key]).abs().max() for key, parameter in padded.trainable.items())
    assert moved > 1e-2
    assert apart < 1e-4 * moved
    assert all(number % 32 == 0 for number in seen if number > 32) == bool(rounded)


@pytest.mark.parametrize("name", ["llama", "llama-accumulated", "bert"])
def test_after_twenty_steps_in_bfloat16_the_weights_are_as_near_to_those_of_float32(name, recipe, checkpoint, monkeypatch):
    """As near to those of training in float32 as where only attention is computed in float32."""
    model, overrides, rows, _, changes = RUNS.get(name, ("llama", {}, "chats", None, {}))
    calls, attended = [], plain_attention.attend
    monkeypatch.setattr(plain_attention, "attend", lambda *args: calls.append(args[0].dtype) or attended(*args))

    def trained(**settings):
        train = {"steps": 20, "optimizer": "sgd", "learning_rate": 0.05, "max_grad_norm": None, **changes, **settings}
        path = recipe({"name": checkpoint(model), "config": overrides}, rows, train)
        AcceleratorState._reset_state(True)  # it knows one precision
        with Reporter(None, quiet=True) as report:
            opened = session(path, "flat", report)
        start = {key: parameter.detach().clone() for key, parameter in opened.trainable.items()}
        calls.clear()
        losses = [step.loss for step in fit(opened, Position())]
        return losses, torch.cat([(parameter.detach() - start[key]).flatten() for key, parameter in opened.trainable.items()])

    exact = trained(precision="fp32")
    slow = trained(precision="bf16", fast_attention=False)
    assert torch.bfloat16 not in calls
    fast = trained(precision="bf16")
    assert set(calls) == {torch.bfloat16}
    assert fast[0] == pytest.approx(slow[0], rel=1e-2)
    assert (fast[1] - exact[1]).norm() < 1.5 * (slow[1] - exact[1]).norm() < 0.02 * exact[1].norm()


def numbers_of_tokens(monkeypatch):
    """A list that fills with the tokens of each flat batch."""
    seen, gather = [], attention.Flat._gather

    def noted(self, *args):
        if self._segments is not None:
            seen.append(len(self._segments.index))
        return gather(self, *args)

    monkeypatch.setattr(attention.Flat, "_gather", noted)
    return seen


@pytest.mark.parametrize(("settings", "rounds"), [({"precision": "bf16"}, True), ({"precision": "bf16", "round_batches": False}, False), ({}, False)])
def test_batches_are_rounded_in_bfloat16_unless_switched_off(settings, rounds, recipe, monkeypatch):
    seen = numbers_of_tokens(monkeypatch)
    with Reporter(None, quiet=True) as report:
        opened = session(recipe("llama", "chats", settings), "flat", report)
    seen.clear()  # of the trial
    next(fit(opened, Position()))
    assert [number % 32 == 0 for number in seen] == [rounds]


def test_a_generator_computes_no_padding_either(recipe, monkeypatch):
    seen = numbers_of_tokens(monkeypatch)
    with Reporter(None, quiet=True) as report:
        opened = session(recipe("electra-pretrained", "texts"), "flat", report)
    seen.clear()  # of the trial
    step = next(fit(opened, Position()))
    assert seen == [step.tokens] * 2
    opened.release()
    assert opened.beside.config._attn_implementation != "ftkit"
    assert not opened.beside.base_model._forward_pre_hooks


def test_cudnn_plans_no_attention_of_a_run(recipe):
    with Reporter(None, quiet=True) as report:
        opened = session(recipe("bert", "single"), "padded", report)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    opened.release()
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_it_is_the_default_where_it_is_possible(recipe):
    with Reporter(None, quiet=True) as report:
        assert session(recipe("bert", "single"), "auto", report).sampler.layout == "flat"
        assert session(recipe("bert", "single"), "bucketed", report).flat is None


IMPOSSIBLE = {
    "own-attention": ({"model_type": "gptj", "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 4}, {}, "its attention is its own"),
    "softcap": ({**LLAMA, "model_type": "gemma2", "head_dim": 16}, {}, "its attention wants softcap"),
    "not-passed-on": ({**LLAMA, "model_type": "stablelm"}, {}, "its layers do not pass on to attention"),
    "asked-for-another": (LLAMA, {"attention": "eager"}, "model.attention: eager asks for another attention function"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_where_it_is_impossible_rows_are_bucketed_and_the_run_says_why(name, recipe, checkpoint):
    config, settings, reason = IMPOSSIBLE[name]
    path = recipe({"init": "random", "config": {**config, "initializer_range": 0.3}, "tokenizer": checkpoint("llama"), **settings}, "prompts")
    with Reporter(None, quiet=True) as report:
        opened = session(path, "auto", report)
        assert (opened.sampler.layout, opened.flat) == ("bucketed", None)
        assert [note for note in report.notes if "rows are bucketed by length and padded" in note and reason in note]
        assert opened.base.model.config._attn_implementation == settings.get("attention", opened.base.model.config._attn_implementation) != "ftkit"
        with pytest.raises(RecipeError, match=f"train.layout: flat is impossible here .*{reason}"):
            session(path, "flat", report)


def test_rows_that_see_each_other_are_not_laid_flat(recipe, monkeypatch):
    """The trial before the first step: here attention takes all rows for one."""
    gather = attention.Flat._gather

    def confused(self, stack, args, kwargs):
        changed = gather(self, stack, args, kwargs)
        if changed is not None and "segments" in changed[1]:
            whole = sum(changed[1]["segments"].lengths)
            bounds = torch.tensor([0, whole], dtype=torch.int32)
            changed[1]["segments"] = replace(changed[1]["segments"], lengths=[whole], bounds=bounds, groups=[(1, whole)], padding=None)
        return changed

    monkeypatch.setattr(attention.Flat, "_gather", confused)
    with Reporter(None, quiet=True) as report:
        opened = session(recipe("llama", "prompts"), "auto", report)
        assert opened.sampler.layout == "bucketed"
        assert [note for note in report.notes if "rows feel what is in the row beside them" in note]


def test_a_leak_is_found_where_weights_are_small_and_coarse(recipe, checkpoint):
    """The short convolutions of LFM2 reach over the borders of rows: with usual random weights in bfloat16 by far less than its rounding."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    config = {"model_type": "lfm2", **sizes, "layer_types": ["conv", "full_attention"]}
    path = recipe({"init": "random", "config": config, "tokenizer": checkpoint("llama"), "dtype": "bfloat16"}, "prompts", method="lora")
    with Reporter(None, quiet=True) as report:
        assert session(path, "auto", report).sampler.layout == "bucketed"
        assert [note for note in report.notes if "rows feel what is in the row beside them" in note]


def test_positions_that_are_wrong_are_found(recipe, monkeypatch):
    gather = attention.Flat._gather

    def shifted(self, stack, args, kwargs):
        changed = gather(self, stack, args, kwargs)
        if changed is not None and "segments" in changed[1]:
            changed[1]["position_ids"] = changed[1]["position_ids"] ** 2
        return changed

    monkeypatch.setattr(attention.Flat, "_gather", shifted)
    with Reporter(None, quiet=True) as report:
        assert session(recipe("llama", "prompts"), "auto", report).sampler.layout == "bucketed"
        assert [note for note in report.notes if "rows get other answers than alone" in note]


@pytest.mark.parametrize("wrong", [False, True])
def test_what_rounding_explains_is_measured_where_it_is_more_than_usual(wrong, recipe, checkpoint, monkeypatch):
    """As in deep models in bfloat16: of a Llama of the shape of 8B with random weights, logits differ by 6 % of the largest."""
    gather = attention.Flat._gather

    def changed(self, stack, args, kwargs):
        found = gather(self, stack, args, kwargs)
        if wrong and found is not None and "segments" in found[1]:
            found[1]["position_ids"] = found[1]["position_ids"] ** 2
        return found

    monkeypatch.setattr(attention.Flat, "_gather", changed)
    monkeypatch.setitem(layout.TOLERANCE, torch.bfloat16, 1e-6)
    config = {"model_type": "llama", **LLAMA, "hidden_size": 256}
    path = recipe({"init": "random", "config": config, "tokenizer": checkpoint("llama"), "dtype": "bfloat16"}, "prompts", method="lora")
    with Reporter(None, quiet=True) as report:
        assert session(path, "auto", report).sampler.layout == ("bucketed" if wrong else "flat")
        assert wrong == any("rows get other answers than alone" in note for note in report.notes)


def test_batches_of_tokens_make_up_epochs(recipe):
    with Reporter(None, quiet=True) as report:
        opened = session(recipe("bert", "single", {"steps": None, "epochs": 2, "batch_size": None, "batch_tokens": 64}), "auto", report)
    steps = list(fit(opened, Position()))
    assert len(steps) == opened.num_steps == opened.sampler.steps(2)
    assert steps[-1].epoch == 2
    assert max(step.tokens for step in steps) <= 64
    assert sum(step.tokens for step in steps) == 2 * int(opened.prepared.train.offsets[-1])
