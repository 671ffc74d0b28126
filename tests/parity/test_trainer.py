"""Our training step beside transformers' Trainer: the same losses and gradient norms, step for step."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from torch.nn import functional as F
from torch.utils.data import SequentialSampler

from ftkit import loop, model, optim
from ftkit.data.batches import Sampler
from ftkit.data.features import FeatureSet
from ftkit.data.types import Limits, Row
from ftkit.loop import Position, Trainee
from ftkit.methods.full import Full
from ftkit.methods.lora import LoRA
from ftkit.objectives.supervised import Supervised
from ftkit.recipe.spec import Model, Train
from ftkit.sources import locate
from ftkit.tasks.causal_lm import CausalLM
from ftkit.tasks.masked_lm import MaskedLM
from ftkit.tasks.question_answering import QuestionAnswering
from ftkit.tasks.seq2seq import Seq2Seq
from ftkit.tasks.text_classification import TextClassification
from ftkit.tasks.token_classification import TokenClassification

IGNORED = -100
ROWS, BATCH = 20, 6  # the last batch of an epoch has 2 rows
TRAIN = Train.model_validate({"steps": 7, "batch_size": BATCH, "learning_rate": 3e-3, "schedule": "cosine", "warmup": 2, "weight_decay": 0.1})


WORDS = ["the", "old", "boats", "and", "nets", "under", "a", "small", "oven", "near", "roses"]


def sentences(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(2, 14))) for _ in range(count)]


CASES = {
    "bert-classification": ("bert", Full(), TextClassification(), {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "bert-numbers-of-pairs": (
        "bert",
        Full(),
        TextClassification(problem="regression"),
        {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "bert-tags": ("bert", Full(), TokenClassification(subwords="all"), {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "bert-answers": ("bert", Full(), QuestionAnswering(), {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "bert-masks": ("bert-masked", Full(), MaskedLM(masking="static"), {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "llama-lora": ("llama", LoRA(r=4, dropout=0.0), CausalLM(), {}),
    "t5-seq2seq": ("t5", Full(), Seq2Seq(), {"dropout_rate": 0.0}),
    "bart-lora-seq2seq": ("bart", LoRA(r=4, dropout=0.0), Seq2Seq(), {"dropout": 0.0}),
}


def rows(task) -> list[Row]:
    texts = sentences(ROWS)
    if isinstance(task, TextClassification) and task.problem == "regression":
        pairs = zip(texts, texts[1:] + texts[:1], strict=True)
        return [Row({"text": one, "text_pair": other, "score": len(one) / 20}, "rows", i) for i, (one, other) in enumerate(pairs, 1)]
    if isinstance(task, TextClassification):
        return [Row({"text": text, "label": "even" if len(text) % 2 else "odd"}, "rows", i) for i, text in enumerate(texts, 1)]
    if isinstance(task, TokenClassification):
        tagged = [(text.split(), ["B-X" if word in ("boats", "nets") else "O" for word in text.split()]) for text in texts]
        return [Row({"tokens": words, "tags": tags}, "rows", i) for i, (words, tags) in enumerate(tagged, 1)]
    if isinstance(task, QuestionAnswering):
        answers = [(text.split()[-1], text.rindex(" ") + 1) for text in texts]
        asked = [
            {"question": "near what?", "context": text, "answers": [{"text": word, "answer_start": start}]}
            for text, (word, start) in zip(texts, answers, strict=True)
        ]
        return [Row(each, "rows", i) for i, each in enumerate(asked, 1)]
    if isinstance(task, Seq2Seq):
        return [Row({"source": text, "target": text[: len(text) // 2 : -1]}, "rows", i) for i, text in enumerate(texts, 1)]
    if isinstance(task, MaskedLM):
        return [Row({"text": text}, "rows", i) for i, text in enumerate(texts, 1)]
    return [Row({"prompt": text, "completion": text[::-1]}, "rows", i) for i, text in enumerate(texts, 1)]


@pytest.fixture(params=CASES)
def case(request, checkpoint):
    """Everything that both sides start from; `learner` makes equal weights each time."""
    name, method, task, overrides = CASES[request.param]
    spec = Model(name=checkpoint(name), config=overrides)
    source = locate(spec)
    tokenizer = model.load_tokenizer(spec, source, None, ())
    examples = rows(task)
    task = task.resolve(examples)

    def learner():
        base = model.load(spec, source, model.load_config(spec, source), tokenizer, task, method, torch.float32, 0, torch.device("cpu"))
        torch.manual_seed(1)
        return method.apply(base), base

    features = FeatureSet.of([task.encode(row, tokenizer, Limits(96, "error")) for row in examples])
    if isinstance(task, MaskedLM):
        features = replace(features, corruption=task.corruption(features, tokenizer, seed=0))
    return SimpleNamespace(task=task, tokenizer=tokenizer, learner=learner, features=features)


def ours(case, accumulate: int, monkeypatch) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """Loss and gradient norm of each step, and the learned weights; the rows come in order, and split in order."""

    class InOrder(Sampler):
        def epoch(self, number):
            return self._cut(np.arange(len(self.lengths)))

    def halves(batch, lengths, parts, world, rank):
        size = BATCH // accumulate
        return [batch[i : i + size] for i in range(0, len(batch), size)]

    monkeypatch.setattr(loop, "split", halves)
    learner, base = case.learner()
    trainee = Trainee(learner, base.inner(), case.task, Supervised())
    session = SimpleNamespace(
        accelerator=Accelerator(cpu=True, mixed_precision="no"),
        trainee=trainee,
        wrapped=trainee,
        optimizer=optim.build(learner, TRAIN, torch.device("cpu")),
        schedule=optim.schedule(TRAIN, TRAIN.steps),
        num_steps=TRAIN.steps,
        recipe=SimpleNamespace(train=TRAIN, objective=trainee.objective),
        prepared=SimpleNamespace(train=case.features),
        sampler=InOrder(case.features.lengths, BATCH, None, "padded", 0),
        accumulate=accumulate,
        waiting=lambda epoch: [],
        pad_token_id=case.tokenizer.pad_token_id,
    )
    return [(step.loss, step.grad_norm) for step in loop.fit(session, Position())], learned(learner)


def learned(learner) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learner.named_parameters() if parameter.requires_grad}


class Losses(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.steps.append((logs["loss"], logs["grad_norm"]))


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def mean_over_the_batch(outputs, labels, num_items_in_batch):
    """Up to transformers 5.23 classification models take `num_items_in_batch` and ignore it: their losses of micro-batches are added up undivided."""
    if labels.is_floating_point():
        return F.mse_loss(outputs.logits.squeeze(-1), labels, reduction="sum") / num_items_in_batch
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def theirs(case, accumulate: int, tmp_path) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """The same of Trainer with its usual data collator, cross-entropy of the model, AdamW and schedule."""
    learner, base = case.learner()
    kinds = (TextClassification, Seq2Seq, TokenClassification, QuestionAnswering, MaskedLM)
    classification, pairs, tags, answers, masks = (isinstance(case.task, kind) for kind in kinds)

    def example(index: int) -> dict:
        row = case.features.get(index)
        if pairs:
            return {"input_ids": row["input_ids"].tolist(), "labels": row["targets"].tolist()}
        if classification:
            return {"input_ids": row["input_ids"].tolist(), "token_type_ids": row["token_type_ids"].tolist(), "labels": row["targets"][0].item()}
        if answers:
            labels = [*row["targets"].tolist(), len(row["input_ids"])]
            return {"input_ids": row["input_ids"].tolist(), "token_type_ids": row["token_type_ids"].tolist(), "labels": labels}
        if tags or masks:
            classes = len(case.task.labels) if tags else len(case.tokenizer)
            labels = [int(t) % classes if w else IGNORED for t, w in zip(row["targets"], row["weights"], strict=True)]
            return {"input_ids": row["input_ids"].tolist(), "token_type_ids": row["token_type_ids"].tolist(), "labels": labels}
        # the model shifts labels itself; the last target is a token of its own
        ids = [*row["input_ids"].tolist(), int(row["targets"][-1])]
        labels = [IGNORED, *(int(t) if w else IGNORED for t, w in zip(row["targets"], row["weights"], strict=True))]
        return {"input_ids": ids, "labels": labels}

    if pairs:
        collator = transformers.DataCollatorForSeq2Seq(case.tokenizer, base.model)
    else:
        collator = (transformers.DataCollatorWithPadding if classification or answers else transformers.DataCollatorForTokenClassification)(case.tokenizer)
    losses = Losses()
    trainer = InOrder(
        model=learner,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path / "trainer"),
            per_device_train_batch_size=BATCH // accumulate,
            gradient_accumulation_steps=accumulate,
            max_steps=TRAIN.steps,
            learning_rate=TRAIN.learning_rate,
            weight_decay=TRAIN.weight_decay,
            warmup_steps=int(TRAIN.warmup),
            lr_scheduler_type="cosine",
            max_grad_norm=TRAIN.max_grad_norm,
            logging_steps=1,
            logging_first_step=True,
            save_strategy="no",
            label_names=["labels"],
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=[example(i) for i in range(ROWS)],
        data_collator=collator,
        compute_loss_func=LOSSES.get(type(case.task)),
        callbacks=[losses],
    )
    trainer.train()
    return losses.steps, learned(learner)


def mean_over_the_tokens(outputs, labels, num_items_in_batch):
    """So do encoder-decoders, models that tag tokens, and BERT's that fill masks."""
    return F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum") / num_items_in_batch


def mean_over_both_ends(outputs, labels, num_items_in_batch):
    """So do those that find answers, which also take padding for positions: start, end and length of each row are three labels."""
    starts, ends, lengths = labels.unbind(1)
    padding = torch.arange(outputs.start_logits.shape[1]) >= lengths[:, None]
    of_ends = ((outputs.start_logits, starts), (outputs.end_logits, ends))
    return sum(F.cross_entropy(logits.masked_fill(padding, -torch.inf), place, reduction="sum") for logits, place in of_ends) / (num_items_in_batch / 3 * 2)


LOSSES = {
    TextClassification: mean_over_the_batch,
    Seq2Seq: mean_over_the_tokens,
    TokenClassification: mean_over_the_tokens,
    MaskedLM: mean_over_the_tokens,
    QuestionAnswering: mean_over_both_ends,
}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_losses_gradient_norms_and_weights_are_those_of_trainer(case, accumulate, tmp_path, monkeypatch):
    """Micro-batches hold unequal numbers of supervised tokens: a mean of means would show."""
    our_steps, our_weights = ours(case, accumulate, monkeypatch)
    their_steps, their_weights = theirs(case, accumulate, tmp_path)
    assert len(our_steps) == TRAIN.steps
    np.testing.assert_allclose(our_steps, their_steps, rtol=1e-6)
    for name, weight in their_weights.items():
        if isinstance(case.task, MaskedLM) and name.endswith("key.bias"):
            continue  # softmax does not feel it: its gradient is the rounding of others, which AdamW makes large
        torch.testing.assert_close(our_weights[name], weight, rtol=0, atol=1e-6, msg=name)
