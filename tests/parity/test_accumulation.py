"""A batch in one piece, in several, in single rows: one gradient."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from ftkit import loop, model, recompute
from ftkit.data.batches import collate, split
from ftkit.data.features import FeatureSet
from ftkit.data.types import Limits, Row
from ftkit.loop import Trainee
from ftkit.methods.full import Full
from ftkit.methods.lora import LoRA
from ftkit.objectives.supervised import Supervised
from ftkit.recipe.spec import Model, Train
from ftkit.session import check_checkpointing
from ftkit.tasks.causal_lm import CausalLM
from ftkit.tasks.seq2seq import Seq2Seq
from ftkit.tasks.text_classification import TextClassification

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SAME = 1e-6  # of the largest gradient


@pytest.fixture(params=["bert", "llama", "llama-lora", "t5"])
def case(request, data, checkpoint):
    name = request.param.partition("-")[0]
    task = {"bert": TextClassification(labels=["garden", "harbour", "kitchen"]), "t5": Seq2Seq()}.get(name, CausalLM())
    spec = Model(name=checkpoint(name), config={"bert": STILL, "t5": {"dropout_rate": 0.0}}.get(name, {}))
    source = model.locate(spec)
    tokenizer = model.load_tokenizer(spec, source, None, ())
    method = LoRA(dropout=0.0) if "lora" in request.param else Full()
    base = model.load(spec, source, model.load_config(spec, source), tokenizer, task, method, torch.float32, 0, torch.device("cpu"))
    torch.manual_seed(0)
    learner = method.apply(base)
    if name == "bert":
        lines = (data.single / "train.csv").read_text().splitlines()[1:]
        rows = [Row(dict(zip(("text", "label"), line.rsplit(",", 1), strict=True)), "train.csv", i) for i, line in enumerate(lines, 1)]
    else:
        directory = data.rewritten if name == "t5" else data.prompts
        rows = [Row(json.loads(line), "train.jsonl", i) for i, line in enumerate((directory / "train.jsonl").read_text().splitlines(), 1)]
    features = FeatureSet.of([task.encode(row, tokenizer, Limits(96, "error")) for row in rows])
    return SimpleNamespace(base=base, trainee=Trainee(learner, base.inner(), task, Supervised()), features=features, pad=tokenizer.pad_token_id)


class Keep:
    """An optimizer that keeps the gradients instead of following them."""

    def __init__(self, trainee) -> None:
        self.trainee, self.gradients = trainee, {}

    def step(self) -> None:
        self.gradients = {name: p.grad.clone() for name, p in self.trainee.named_parameters() if p.requires_grad}

    def zero_grad(self, set_to_none: bool) -> None:
        self.trainee.zero_grad(set_to_none)


def step(case, parts: list[np.ndarray]) -> tuple[tuple[float, float, float], dict[str, torch.Tensor]]:
    keep = Keep(case.trainee.train())
    micro_batches = [collate(case.features, part, case.pad) for part in parts]
    outcome = loop.train_step(Accelerator(cpu=True, mixed_precision="no"), case.trainee, keep, micro_batches, None)
    return tuple(value.item() for value in outcome), keep.gradients


def assert_same(one, other) -> None:
    (outcome, gradients), (others, other_gradients) = one, other
    np.testing.assert_allclose(outcome, others, rtol=SAME)
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    assert largest > 0
    for name, gradient in gradients.items():
        assert (gradient - other_gradients[name]).abs().max().item() <= SAME * largest, name


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_gradients_are_those_of_the_whole_batch(case, parts):
    batch = np.arange(8)
    assert_same(step(case, [batch]), step(case, split(batch, case.features.lengths, parts, 1, 0)))


def test_unequal_parts_count_by_what_is_supervised_in_them(case):
    batch = np.arange(11)
    assert_same(step(case, [batch]), step(case, [batch[:1], batch[1:3], batch[3:]]))


def test_recomputed_activations_give_the_same_gradients(case):
    batch = np.arange(8)
    kept = step(case, [batch])
    check_checkpointing(case.base, Train())
    recompute.everywhere(case.base.model)
    assert [module for module in case.base.model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert_same(kept, step(case, [batch]))


def test_rows_of_weight_0_change_nothing(case):
    """What a process without rows computes beside the others."""
    batch = np.arange(5)
    assert_same(step(case, [batch]), step(case, [batch, np.array([], np.int64)]))
