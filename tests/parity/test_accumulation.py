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
from ftkit.sources import locate
from ftkit.tasks.causal_lm import CausalLM
from ftkit.tasks.sentence_embedding import SentenceEmbedding
from ftkit.tasks.seq2seq import Seq2Seq
from ftkit.tasks.text_classification import TextClassification

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SAME = 1e-6  # of the largest gradient
SAME_COUPLED = 5e-6  # texts that attract and repel each other cancel out, and cosines, and so their rounding, count 20 times


COUPLED = {  # rows that learn from each other
    "bert-in-batch": SentenceEmbedding(negatives=1, symmetric=True),
    "bert-cosent": SentenceEmbedding(loss="cosent"),
}


@pytest.fixture(params=["bert", "llama", "llama-lora", "t5", *COUPLED])
def case(request, data, checkpoint):
    name = request.param.partition("-")[0]
    known = {"bert": TextClassification(labels=["garden", "harbour", "kitchen"]), "t5": Seq2Seq()} | COUPLED
    task = known.get(request.param, known.get(name, CausalLM()))
    spec = Model(name=checkpoint(name), config={"bert": STILL, "t5": {"dropout_rate": 0.0}}.get(name, {}))
    source = locate(spec)
    tokenizer = model.load_tokenizer(spec, source, None, ())
    method = LoRA(dropout=0.0) if "lora" in request.param else Full()
    base = model.load(spec, source, model.load_config(spec, source), tokenizer, task, method, torch.float32, 0, torch.device("cpu"))
    torch.manual_seed(0)
    learner = method.apply(base)
    if request.param in COUPLED:
        lines = map(json.loads, (data.alike / "train.jsonl").read_text().splitlines())
        values = [{"text": line["sentence1"], "text_pair": line["sentence2"], "score": line["score"]} for line in lines]
        values = [value | ({"negative": [value["text"][::-1]]} if task.negatives else {}) for value in values]
        rows = [Row(each, "train.jsonl", i) for i, each in enumerate(values, 1)]
    elif name == "bert":
        lines = (data.single / "train.csv").read_text().splitlines()[1:]
        rows = [Row(dict(zip(("text", "label"), line.rsplit(",", 1), strict=True)), "train.csv", i) for i, line in enumerate(lines, 1)]
    else:
        directory = data.rewritten if name == "t5" else data.prompts
        rows = [Row(json.loads(line), "train.jsonl", i) for i, line in enumerate((directory / "train.jsonl").read_text().splitlines(), 1)]
    features = FeatureSet.of([task.encode(row, tokenizer, Limits(96, "error")) for row in rows])
    same = SAME_COUPLED if request.param in COUPLED else SAME
    return SimpleNamespace(base=base, trainee=Trainee(learner, base.inner(), task, Supervised()), features=features, pad=tokenizer.pad_token_id, same=same)


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
    outcome = loop.train_step(Accelerator(cpu=True, mixed_precision="no"), case.trainee, case.trainee, keep, micro_batches, None)
    return tuple(value.item() for value in outcome), keep.gradients


def assert_same(case, one, other) -> None:
    (outcome, gradients), (others, other_gradients) = one, other
    np.testing.assert_allclose(outcome, others, rtol=case.same)
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    assert largest > 0
    for name, gradient in gradients.items():
        assert (gradient - other_gradients[name]).abs().max().item() <= case.same * largest, name


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_gradients_are_those_of_the_whole_batch(case, parts):
    batch = np.arange(8)
    assert_same(case, step(case, [batch]), step(case, split(batch, case.features.lengths, parts, 1, 0)))


def test_unequal_parts_count_by_what_is_supervised_in_them(case):
    batch = np.arange(11)
    assert_same(case, step(case, [batch]), step(case, [batch[:1], batch[1:3], batch[3:]]))


def test_recomputed_activations_give_the_same_gradients(case):
    batch = np.arange(8)
    kept = step(case, [batch])
    check_checkpointing(case.base, Train())
    recompute.everywhere(case.base.model)
    assert [module for module in case.base.model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert_same(case, kept, step(case, [batch]))


@pytest.mark.parametrize("case", COUPLED, indirect=True)
def test_dropout_is_that_of_the_pass_before(case):
    """What a part is among the others is what they were when their gradients were computed."""
    for module in case.base.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    batch, seen, forward = np.arange(8), [], case.base.model.forward
    case.base.model.forward = lambda **inputs: seen.append(forward(**inputs).last_hidden_state) or SimpleNamespace(last_hidden_state=seen[-1])
    step(case, split(batch, case.features.lengths, 2, 1, 0))
    first, second, first_again, second_again = seen
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)


def test_rows_of_weight_0_change_nothing(case):
    """What a process without rows computes beside the others."""
    batch = np.arange(5)
    assert_same(case, step(case, [batch]), step(case, [batch, np.array([], np.int64)]))
