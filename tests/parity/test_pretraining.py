"""Losses of pre-training that are sums of two: those of transformers' own heads, and one gradient however a batch is cut."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from ftkit import loop, model
from ftkit.data.batches import collate, split
from ftkit.data.features import FeatureSet
from ftkit.data.types import Limits, Row
from ftkit.loop import Trainee
from ftkit.methods.full import Full
from ftkit.objectives.supervised import Supervised
from ftkit.recipe.spec import Model
from ftkit.sources import locate
from ftkit.tasks.next_sentence import NextSentence
from ftkit.tasks.replaced_token_detection import ReplacedTokenDetection
from ftkit.tasks.sentence_order import SentenceOrder

CASES = {
    "bert": NextSentence(),
    "albert": SentenceOrder(),
    "electra": ReplacedTokenDetection(probability=0.3),
    "electra-apart": ReplacedTokenDetection(probability=0.3, share_embeddings=False, generator_size=0.5),
}
IGNORED = -100  # by transformers' losses
SAME = 1e-6  # of the largest gradient


@pytest.fixture(params=CASES)
def case(request, data, checkpoint):
    """A model with both losses, without dropout, and eleven documents of different lengths."""
    task = CASES[request.param]
    name = request.param.partition("-")[0]
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | ({"classifier_dropout_prob": 0.0} if name == "albert" else {})
    spec = Model(name=checkpoint(f"{name}-pretrained"), config=still)
    source = locate(spec)
    tokenizer = model.load_tokenizer(spec, source, None, ())
    base = model.load(spec, source, model.load_config(spec, source), tokenizer, task, Full(), torch.float32, 0, torch.device("cpu"))
    torch.manual_seed(0)
    beside = task.beside(base.model) if hasattr(task, "beside") else None
    trainee = Trainee(Full().apply(base), base.inner(), task, Supervised(), beside=beside)
    lines = (data.documents / "train.jsonl").read_text().splitlines()[:11]
    features = FeatureSet.of([task.encode(Row(json.loads(line), "train.jsonl", i), tokenizer, Limits(96, "error")) for i, line in enumerate(lines, 1)])
    features = replace(features, corruption=task.corruption(features, tokenizer, seed=0))
    return SimpleNamespace(base=base, trainee=trainee, task=task, features=features, pad=tokenizer.pad_token_id, name=name)


def labels_of(batch, tokens):
    return tokens.masked_fill((batch.weights == 0) | (tokens < 0), IGNORED)


def theirs(case, batch) -> torch.Tensor:
    """What transformers' classes call the loss of a batch."""
    inputs = {"attention_mask": batch.attention_mask, "token_type_ids": batch.token_type_ids}
    if case.name == "electra":
        made, _ = case.task.prior(case.trainee.beside, batch)
        generator = case.trainee.beside(input_ids=batch.input_ids, labels=labels_of(batch, batch.targets[..., 0]), **inputs).loss
        return generator + 50 * case.base.model(input_ids=made.input_ids, labels=made.targets, **inputs).loss
    pairs = {"bert": "next_sentence_label", "albert": "sentence_order_label"}[case.name]
    return case.base.model(input_ids=batch.input_ids, labels=labels_of(batch, batch.targets), **{pairs: ~batch.targets[:, 0]}, **inputs).loss


def gradients(case, loss) -> dict[str, torch.Tensor]:
    case.trainee.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in case.trainee.named_parameters() if parameter.grad is not None}


def test_loss_and_gradients_are_those_of_transformers(case):
    batch = collate(case.features, np.arange(11), case.pad)
    ours = (case.trainee.train()(batch) / case.trainee.counts(batch)).sum()
    expected = theirs(case, batch)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    one, other = gradients(case, ours), gradients(case, expected)
    largest = max(gradient.abs().max().item() for gradient in other.values())
    assert one.keys() == other.keys()
    for name, gradient in other.items():
        assert (one[name] - gradient).abs().max().item() <= SAME * largest, name


class Keep:
    """An optimizer that keeps the gradients instead of following them."""

    def __init__(self, trainee) -> None:
        self.trainee, self.gradients = trainee, {}

    def step(self) -> None:
        self.gradients = {name: p.grad.clone() for name, p in self.trainee.named_parameters() if p.grad is not None}

    def zero_grad(self, set_to_none: bool) -> None:
        self.trainee.zero_grad(set_to_none)


@pytest.mark.parametrize("parts", [2, 4, 11])
def test_parts_of_a_batch_add_up_to_its_gradient(case, parts):
    def step(pieces):
        keep = Keep(case.trainee.train())
        micro_batches = [collate(case.features, piece, case.pad) for piece in pieces]
        outcome = loop.train_step(Accelerator(cpu=True, mixed_precision="no"), case.trainee, case.trainee, keep, micro_batches, None)
        return outcome.loss.item(), keep.gradients

    batch = np.arange(11)
    (loss, whole), (other, summed) = step([batch]), step(split(batch, case.features.lengths, parts, 1, 0))
    assert other == pytest.approx(loss, rel=SAME)
    largest = max(gradient.abs().max().item() for gradient in whole.values())
    for name, gradient in whole.items():
        assert (summed[name] - gradient).abs().max().item() <= 2 * SAME * largest, name
