"""Activations computed again: in as few layers as a budget asks for, with the weights of a run that keeps them."""

import pytest
import torch

from ftkit import recompute
from ftkit.attention import layers_of
from ftkit.data.batches import collate, largest_micro_batch
from ftkit.errors import RecipeError
from ftkit.loop import Position, fit
from ftkit.prepare import prepare
from ftkit.recipe import read
from ftkit.recipe.spec import num_bytes
from ftkit.recompute import Kept, fewest
from ftkit.report import Reporter
from ftkit.session import open_session

LLAMA = {"num_hidden_layers": 4, "intermediate_size": 256}
TRAIN = {"steps": 6, "optimizer": "sgd", "learning_rate": 0.05, "max_grad_norm": None, "batch_size": 16}
FOUR = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.1, **LLAMA}


def opened(path, report, *overrides):
    return open_session(prepare(read(path, overrides), report), report)


@pytest.fixture
def path(recipe, checkpoint):
    def write(method="full", **train):
        return recipe({"init": "random", "config": FOUR, "tokenizer": checkpoint("llama")}, "chats", {**TRAIN, **train}, method=method)

    return write


def bytes_kept(session, batch) -> int:
    """All that a forward pass keeps for its backward pass: each storage once, weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in session.learner.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        session.wrapped.train()(batch)
    return sum(storage.nbytes() for storage in kept.values())


METHODS = {"full": "full", "lora": {"kind": "lora", "r": 4, "dropout": 0.1}, "partial": {"kind": "partial", "last": 2}}


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("name", METHODS)
def test_a_budget_is_kept_and_changes_no_weight(name, layout, path, monkeypatch):
    seen: list[list[Kept]] = []
    monkeypatch.setattr(recompute, "fewest", lambda kept, budget: seen.append(kept) or fewest(kept, budget))
    where = path(METHODS[name], layout=layout)
    with Reporter(None, quiet=True) as report:
        plain = opened(where, report, "train.gradient_checkpointing=1GB")
        (kept,) = seen
        busy = len(kept)
        assert busy == (2 if name == "partial" else 4)
        assert not [layer for layer in layers_of(plain.base.model) if layer.gradient_checkpointing]
        start = {key: parameter.detach().clone() for key, parameter in plain.trainable.items()}
        batch = collate(plain.prepared.train, largest_micro_batch(plain.sampler, 1, 1), plain.pad_token_id)
        whole = bytes_kept(plain, batch)
        torch.manual_seed(1)
        losses = [step.loss for step in fit(plain, Position())]
        for count in range(1, busy + 1):
            allowed = sum(each.recomputed for each in kept[:count]) + sum(each.as_it_is for each in kept[count:])
            again = opened(where, report, f"train.gradient_checkpointing={allowed / 1e6:.6f} MB")
            assert [note for note in report.notes if f"activations of {count} of {busy} layers are computed again" in note]
            chosen = [layer.gradient_checkpointing for layer in layers_of(again.base.model)]
            assert chosen == [False] * (4 - busy) + [True] * count + [False] * (busy - count)
            # a table of positions is everybody's: kept until no layer needs it
            tables = 2 * batch.input_ids.numel() * 16 * 4
            assert 0 <= whole - bytes_kept(again, batch) - sum(each.as_it_is - each.recomputed for each in kept[:count]) <= tables
            torch.manual_seed(1)
            assert [step.loss for step in fit(again, Position())] == [pytest.approx(loss, rel=1e-6) for loss in losses]
            moved = max((parameter - start[key]).abs().max() for key, parameter in plain.trainable.items())
            assert max((parameter - plain.trainable[key]).abs().max() for key, parameter in again.trainable.items()) < 1e-5 * moved


def test_too_small_a_budget_is_refused(path):
    with Reporter(None, quiet=True) as report, pytest.raises(RecipeError, match=r"with all layers computed again, .* are kept, more than 0.001 MB"):
        opened(path(), report, "train.gradient_checkpointing=0.001 MB")


def test_frozen_layers_below_get_no_gradient(path):
    """transformers lets the embeddings' output require gradients, for checkpoints of another kind."""
    with Reporter(None, quiet=True) as report:
        session = opened(path(METHODS["partial"]), report, "train.gradient_checkpointing=true")
    needed = []
    for layer in layers_of(session.base.model):
        layer.register_forward_hook(lambda module, args, output: needed.append(output.requires_grad))
    next(fit(session, Position()))
    assert needed[:4] == [False, False, True, True]


def test_units():
    assert [num_bytes(budget) for budget in ("2GB", "1.5 MB", "1 GiB", "512MiB")] == [2 * 10**9, 1_500_000, 2**30, 2**29]


def test_the_lowest_layers_are_chosen_and_no_more_than_needed():
    kept = [Kept(100, 10)] * 4
    assert [fewest(kept, budget) for budget in (400, 399, 310, 309, 130, 40, 39)] == [0, 1, 1, 2, 3, 4, None]
