"""Parameter groups, and schedules equal to those of transformers at every step."""

import sys

import pytest
import torch
import transformers
from torch import nn

from ftkit import optim
from ftkit.errors import MissingDependency, RecipeError
from ftkit.recipe.spec import Train

CPU = torch.device("cpu")


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 2)


def names_by_decay(model, optimizer):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}


def test_only_matrices_that_learn_decay():
    model = Tiny()
    optimizer = optim.build(model, Train(weight_decay=0.1), CPU)
    assert names_by_decay(model, optimizer) == {
        0.1: {"embedding.weight", "head.weight"},
        0.0: {"norm.weight", "norm.bias", "head.bias"},
    }


def test_decay_agrees_with_transformers_trainer():
    config = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    bert = transformers.BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    for model in (transformers.T5ForConditionalGeneration(config), transformers.BertForSequenceClassification(bert)):
        oracle = transformers.Trainer.get_decay_parameter_names(None, model)
        for name, parameter in model.named_parameters():
            assert optim.decays(name, parameter) == (name in oracle), name


def test_a_learning_rate_by_name_makes_groups_that_remember_their_peak():
    model = Tiny()
    optimizer = optim.build(model, Train(weight_decay=0.0, learning_rate=1e-3), CPU, lambda name: 1e-2 if name.startswith("head") else 1e-3)
    assert {(group["initial_lr"], group["lr"], len(group["params"])) for group in optimizer.param_groups} == {(1e-2, 1e-2, 2), (1e-3, 1e-3, 3)}


def test_adamw_is_fused():
    optimizer = optim.build(Tiny(), Train(), CPU)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["fused"] is True


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "paged_adamw_8bit", "lion_8bit", "sgd"])
def test_every_optimizer_lowers_a_loss(kind):
    torch.manual_seed(0)
    model = nn.Linear(80, 80)  # above bitsandbytes' 4096 elements, so that the state really is 8-bit
    rows = torch.randn(16, 80)
    optimizer = optim.build(model, Train(optimizer=kind, learning_rate=1e-2 if kind == "sgd" else 1e-3), CPU)
    losses = []
    for _ in range(20):
        loss = (model(rows) - rows).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    if "8bit" in kind:
        assert optimizer.state[model.weight]["state1"].dtype == torch.uint8


def test_a_missing_bitsandbytes_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependency, match=r"train.optimizer: lion_8bit needs bitsandbytes"):
        optim.build(Tiny(), Train(optimizer="lion_8bit"), CPU)


def test_a_model_that_cannot_learn_is_refused():
    with pytest.raises(RecipeError, match="no parameter learns"):
        optim.build(Tiny().requires_grad_(False), Train(), CPU)


@pytest.mark.parametrize("num_steps", [2, 7, 100])
@pytest.mark.parametrize("warmup", [0, 0.1, 0.06, 1, 5])
@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "wsd"])
def test_schedules_equal_those_of_transformers(name, warmup, num_steps):
    if warmup >= num_steps:
        pytest.skip("refused: see below")
    num_warmup = transformers.TrainingArguments.get_warmup_steps(train_arguments(warmup), num_steps)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    oracle = {
        "linear": lambda: transformers.get_linear_schedule_with_warmup(optimizer, num_warmup, num_steps),
        "cosine": lambda: transformers.get_cosine_schedule_with_warmup(optimizer, num_warmup, num_steps),
        "constant": lambda: transformers.get_constant_schedule_with_warmup(optimizer, num_warmup),
        "wsd": lambda: transformers.get_wsd_schedule(optimizer, num_warmup, -(-num_steps // 5), num_training_steps=num_steps, decay_type="linear"),
    }[name]()
    factor = optim.schedule(Train(schedule=name, warmup=warmup), num_steps)
    for step in range(num_steps + 1):
        assert factor(step) == pytest.approx(oracle.get_last_lr()[0], rel=1e-12, abs=1e-15), step
        optimizer.step()
        oracle.step()


class train_arguments:
    """Just what TrainingArguments.get_warmup_steps reads."""

    def __init__(self, warmup_steps):
        self.warmup_steps = warmup_steps


def test_a_share_of_warmup_never_swallows_the_whole_run():
    assert optim.schedule(Train(warmup=0.1), 1)(0) == 1.0
    assert [optim.schedule(Train(warmup=0.9), 2)(step) for step in range(2)] == [0.0, 1.0]


def test_more_warmup_than_steps_is_refused():
    with pytest.raises(RecipeError, match=r"train.warmup: 100 steps of warm-up, but the run has only 100"):
        optim.schedule(Train(warmup=100), 100)


@pytest.mark.parametrize(
    ("settings", "width", "expected"),
    [
        ("method: lora", 128, 1e-3),
        ("method: lora", 384, 1e-3),
        ("method: lora", 4096, 1.6e-4),
        ("method: full", 768, 5.8e-5),
        ("method: prompt", 4096, 3e-1),  # the same for models of every size
        ("method: lora\ntrain: {learning_rate: 1e-3}", 4096, 1e-3),
    ],
)
def test_default_rates_fall_with_the_width_of_the_model(settings, width, expected, tmp_path):
    from ftkit.recipe import read

    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: some/model\ntask: text-classification\ndata: {{train: rows.csv}}\n{settings}\n")
    assert optim.learning_rate(read(path), transformers.BertConfig(hidden_size=width)) == expected


def test_what_trains_from_nothing_keeps_its_own_default(tmp_path):
    from ftkit.recipe import read

    path = tmp_path / "recipe.yaml"
    path.write_text("model: {init: random, config: {model_type: llama}}\ntask: causal-lm\ndata: {train: rows.txt}\n")
    assert optim.learning_rate(read(path), transformers.LlamaConfig(hidden_size=4096)) == 5e-4
