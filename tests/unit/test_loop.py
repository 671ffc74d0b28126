"""The loop's own pieces: which frozen modules fall still, and in which order batches come."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from ftkit import loop
from ftkit.data.batches import Sampler, ahead, by_length, split
from ftkit.errors import Diverged
from ftkit.loop import Position, batches, frozen_bottom


def gpt2():
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16))


def names(model, modules):
    return [name for name, module in model.named_modules() if any(module is other for other in modules)]


def test_all_of_a_frozen_model_falls_still():
    model = gpt2().requires_grad_(False)
    assert names(model, frozen_bottom(model)) == [""]


def test_nothing_falls_still_where_everything_learns():
    assert frozen_bottom(gpt2()) == []


def test_what_is_below_the_first_learning_layer_falls_still_with_its_dropout():
    model = gpt2().requires_grad_(False)
    model.h[1].requires_grad_(True)
    assert names(model, frozen_bottom(model)) == ["wte", "wpe", "drop", "h.0"]


def test_the_dropout_of_an_adapter_stays_active():
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(target_modules=["c_attn"], lora_dropout=0.5), gpt2())
    still = names(model, frozen_bottom(model))
    assert "drop" in still
    assert not [name for name in still if "lora" in name]


@pytest.mark.parametrize("layout", ["padded", "bucketed", "flat"])
def test_an_epoch_has_every_row_once_in_an_order_of_its_own(layout):
    lengths = np.random.default_rng(0).integers(1, 100, 333)
    first, second = (Sampler(lengths, 8, None, layout, seed=1).epoch(epoch) for epoch in (0, 1))
    assert len(first) == 42
    for epoch in (first, second):
        assert sorted(np.concatenate(epoch)) == list(range(333))
    assert not np.array_equal(np.concatenate(first), np.concatenate(second))
    again = Sampler(lengths, 8, None, layout, seed=1).epoch(0)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("layout", ["flat", "bucketed"])
def test_a_batch_of_tokens_holds_as_many_rows_as_fit_and_one_at_least(layout):
    lengths = np.random.default_rng(0).integers(1, 100, 333)
    lengths[7] = 5000
    sampler = Sampler(lengths, None, 400, layout, seed=1)
    epoch = sampler.epoch(0)
    assert sorted(np.concatenate(epoch)) == list(range(333))
    totals = [int(lengths[batch].sum()) for batch in epoch]
    assert [batch.tolist() for batch, total in zip(epoch, totals, strict=True) if total > 400] == [[7]]
    if layout == "flat":  # no batch could have taken the first row of the next
        assert all(total + lengths[after[0]] > 400 for total, after in zip(totals, epoch[1:], strict=False))
    assert np.mean(totals) > 300
    assert sampler.steps(2) == len(epoch) + len(sampler.epoch(1))
    assert sampler.steps(1.5) == len(epoch) + -(-len(sampler.epoch(1)) // 2)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 42), (3, 126), (0.5, 21), (0.01, 1), (1.1, 47)])
def test_steps_of_batches_of_rows(epochs, steps):
    assert Sampler(np.ones(333, np.int64), 8, None, "flat", 0).steps(epochs) == steps


def test_buckets_hold_rows_of_like_length():
    lengths = np.random.default_rng(0).integers(1, 500, 4000)

    def padding(layout):
        slots = sum(len(batch) * lengths[batch].max() for batch in Sampler(lengths, 8, None, layout, seed=0).epoch(0))
        return 1 - lengths.sum() / slots

    assert padding("padded") > 0.4
    assert padding("bucketed") < 0.03


def test_buckets_of_few_rows_still_mix_them():
    """20 batches of one length each, sorted: not all of the shortest rows may come in the same few batches of every epoch."""
    lengths = np.sort(np.random.default_rng(0).integers(1, 500, 160))
    batches = Sampler(lengths, 8, None, "bucketed", seed=0).epoch(0)
    shortest = sum(bool(set(batch) & set(range(8))) for batch in batches)
    assert len(batches) == 20
    assert shortest >= 3


@pytest.mark.parametrize(("accumulate", "world"), [(1, 1), (4, 1), (3, 2), (1, 4), (9, 2)])
def test_shares_of_a_batch_are_disjoint_and_whole(accumulate, world):
    lengths = np.arange(100)
    batch = np.array([5, 1, 9, 3, 7, 50, 2])
    shares = [split(batch, lengths, accumulate, world, rank) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1, "every process runs as many forward passes"
    assert sorted(np.concatenate([part for share in shares for part in share])) == sorted(batch)


def test_processes_share_an_evaluation():
    lengths = np.arange(10)
    shares = [list(by_length(lengths, 2, 3, rank)) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 2], "one that waits for the others in a forward pass must not wait forever"
    assert sorted(np.concatenate([batch for share in shares for batch in share])) == list(range(10))


@pytest.mark.parametrize(("batch_size", "batch_tokens"), [(4, None), (None, 40)])
def test_batches_go_on_where_they_stopped(batch_size, batch_tokens):
    sampler = Sampler(np.arange(1, 19), batch_size, batch_tokens, "bucketed", seed=3)
    whole = [(batch.tolist(), place) for batch, place in batches(sampler, Position(), 13)]
    for stop in range(13):
        place = whole[stop][1]
        rest = [(batch.tolist(), place) for batch, place in batches(sampler, Position(place.step, place.epoch, place.batch), 13)]
        assert whole[: stop + 1] + rest == whole
    done = [place.epochs_done for _, place in whole]
    assert done == sorted(done)
    assert [place.step for _, place in whole] == list(range(1, 14))
    if batch_size:
        assert whole[4][1] == (5, 1, 0, 1.0)
        assert whole[-1][1] == (13, 2, 3, 2.6)


def test_the_next_is_made_while_one_is_in_use():
    made = []

    def make(item):
        made.append(item)
        return item * 2

    found = ahead(make, iter([1, 2, 3]))
    assert next(found) == 2
    assert [*found] == [4, 6]
    assert made == [1, 2, 3]
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda item: 1 / item, [1, 0, 2]))
    assert list(ahead(make, [])) == []


class Fused(nn.Module):
    """A learner whose loss is the weight times what the batch says; and the optimizer as accelerate wraps it."""

    coupled = False

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def held(self):
        return [self.weight]

    def counts(self, batch):
        return batch.weights.double().sum()

    def forward(self, batch):
        return (self.weight * batch.targets).sum()


@pytest.mark.parametrize("later", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(later, monkeypatch):
    """`later`: as on a GPU, where nobody looks before the update."""
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    trainee = Fused()
    optimizer = accelerator.prepare(torch.optim.AdamW(trainee.parameters(), lr=0.1, fused=True))
    monkeypatch.setattr(loop, "looks_itself", lambda optimizer, accelerator: later)

    def batch(target):
        return SimpleNamespace(weights=torch.ones(1), targets=torch.tensor([target]), to=lambda device: batch(target))

    def step(target):
        return loop.train_step(accelerator, trainee, trainee, optimizer, [batch(target)], 1.0)

    loop.check_finite(step(2.0))
    before = trainee.weight.item()
    assert before != 1
    if later:
        outcome = step(math.inf)
        with pytest.raises(Diverged, match="loss inf"):
            loop.check_finite(outcome)
    else:
        with pytest.raises(Diverged, match="loss inf"):
            step(math.inf)
    assert trainee.weight.item() == before
    trainee.zero_grad()
    step(2.0)
    assert trainee.weight.item() not in (before, math.inf)


def test_a_frozen_module_stays_still_through_train_and_eval():
    from ftkit.loop import Trainee

    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    trainee = Trainee(model, model, task=None, objective=None)  # type: ignore[arg-type]
    assert trainee.train().training
    assert not model[0][1].training
    assert model[1].training
    x = torch.ones(64, 2)
    assert torch.equal(trainee.model[0](x), trainee.model[0](x))
