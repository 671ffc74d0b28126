"""The loss in chunks of items or slices of classes, and that of all logits at once: after 20 steps the same weights."""

import pytest

from ftkit import chunks, slices
from ftkit.loop import Position, fit
from ftkit.prepare import prepare
from ftkit.recipe import read
from ftkit.report import Reporter
from ftkit.session import open_session

GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
RUNS = {
    "llama-chats": ("llama", {}, "chats", {"kind": "full"}),
    "llama-lora": ("llama", {}, "prompts", {"kind": "lora", "r": 4, "dropout": 0.0}),
    "gpt2-tied": ("gpt2", GPT2, "text", {"kind": "full"}),
}


@pytest.mark.parametrize("way", ["items", "classes"])
@pytest.mark.parametrize("name", RUNS)
def test_after_twenty_steps_the_weights_are_those_of_all_logits_at_once(name, way, recipe, checkpoint, monkeypatch):
    model, overrides, rows, method = RUNS[name]
    monkeypatch.setitem(chunks.LOGITS, "cpu", 2000)  # some six positions
    monkeypatch.setitem(chunks.MOST, "cpu", 2000)
    monkeypatch.setattr(slices, "CLASSES", 32)
    monkeypatch.setattr(chunks, "sliced", lambda items, objective: items.layer if way == "classes" else None)
    heads = []
    train = {"steps": 20, "optimizer": "sgd", "learning_rate": 0.05, "max_grad_norm": None}
    path = recipe({"name": checkpoint(model), "config": overrides}, rows, train, method=method)
    sessions = []
    with Reporter(None, quiet=True) as report:
        for in_chunks in ("true", "false"):
            sessions.append(open_session(prepare(read(path, [f"objective.in_chunks={in_chunks}"]), report), report))
            sessions[-1].base.model.get_output_embeddings().register_forward_hook(lambda module, args, output: heads[-1].append(output.shape[-2]))
    start = {key: parameter.detach().clone() for key, parameter in sessions[0].trainable.items()}
    losses = []
    for session in sessions:
        heads.append([])
        losses.append([step.loss for step in fit(session, Position())])
    assert len(heads[0]) > 5 * len(heads[1]) == 5 * 20
    assert way == "classes" or sum(heads[0]) == sum(heads[1])
    assert losses[0] == [pytest.approx(loss, rel=1e-5) for loss in losses[1]]
    moved = max((parameter - start[key]).abs().max() for key, parameter in sessions[0].trainable.items())
    apart = max((parameter - sessions[1].trainable[key]).abs().max() for key, parameter in sessions[0].trainable.items())
    assert moved > 1e-3
    assert apart < 1e-4 * moved
