"""On-policy distillation: which rows the student answers itself, what becomes of them, and runs of the real command."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ftkit import on_policy
from ftkit.data.batches import collate
from ftkit.data.features import FeatureSet
from ftkit.data.types import Features, Limits, Row
from ftkit.errors import RecipeError
from ftkit.objectives.distill import Distill
from ftkit.on_policy import Author
from ftkit.recipe.spec import Generation
from ftkit.tasks import language_model

STOP = 9


def features() -> FeatureSet:
    """Rows 1 2 3 -> 4 .. of growing answers, and a chat in which the answer 5 comes before another."""
    rows = [Features([1, 2, 3, *[4] * n], [2, 3, *[4] * n, STOP], [0.0, 0.0, *[1.0] * (n + 1)]) for n in range(4)]
    rows.append(Features([1, 5, 6, 7], [5, 6, 7, STOP], [1.0, 0.0, 0.0, 0.5]))
    return FeatureSet.of([[row] for row in rows])


class Student(torch.nn.Module):
    """One whose vocabulary is filled up to 12."""

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=12))


def author(share: float, answer=lambda prompt: [8, STOP], max_length: int = 16) -> Author:
    """A student that answers at once."""
    asked = []

    def continuations(model, tokenizer, prompts, allowed, generation, **settings):
        assert (generation.temperature, settings["repetition_penalty"], settings["suppress_tokens"]) == (1.0, 1.0, [10, 11])
        asked.extend(prompts)
        return [answer(prompt)[: allowed(prompt)] for prompt in prompts]

    recipe = SimpleNamespace(train=SimpleNamespace(seed=3), objective=Distill(teacher="t", on_policy=share), task=SimpleNamespace(continuations=continuations))
    session = SimpleNamespace(
        recipe=recipe,
        trainee=SimpleNamespace(model=Student()),
        tokenizer=range(10),
        limits=Limits(max_length, "right"),
        pad_token_id=0,
        accelerator=SimpleNamespace(autocast=torch.no_grad),
    )
    made = Author(session)
    session.asked = asked
    return made


def row(batch, number: int) -> tuple[list, list, list]:
    real = batch.attention_mask[number].bool()
    return batch.input_ids[number][real].tolist(), batch.targets[number][real].tolist(), batch.weights[number][real].tolist()


def test_answers_are_those_of_the_student():
    rows, writer = features(), author(1.0)
    batch = writer.rewritten(collate(rows, np.array([0, 3, 4]), 0), epoch=0)
    assert batch.row_ids.tolist() == [0, 3, 4]
    assert row(batch, 0) == row(batch, 1) == ([1, 2, 3, 8], [2, 3, 8, STOP], [0, 0, 1, 1])
    assert row(batch, 2) == ([1, 5, 6, 7, 8], [5, 6, 7, 8, STOP], [0, 0, 0, 0.5, 0.5])  # the last answer alone, with its weight
    assert batch.written.tolist() == [True] * 3
    assert batch.supervised.tolist() == np.flatnonzero(batch.weights).tolist()
    assert writer.session.asked == [[1, 2, 3], [1, 2, 3], [1, 5, 6, 7]]


def test_an_answer_takes_no_more_than_there_is_room_for():
    batch = author(1.0, lambda prompt: [8] * 99, max_length=5).rewritten(collate(features(), np.array([0, 4]), 0), epoch=0)
    assert [len(row(batch, number)[0]) for number in range(2)] == [5, 5]  # and one token that is only a target


def test_a_row_whose_prompt_was_cut_off_is_the_datas():
    rows = FeatureSet.of([[Features([4], [STOP], [1.0])], [Features([4, 4], [4, STOP], [1.0, 1.0])], [Features([1, 2], [2, STOP], [0.0, 1.0])]])
    batch = author(1.0).rewritten(collate(rows, np.arange(3), 0), epoch=0)
    assert batch.row_ids[batch.written].tolist() == [2]
    assert (author(1.0).rewritten(collate(rows, np.arange(2), 0), epoch=0)).written is None


def test_batches_of_so_many_tokens_have_room_for_answers():
    recipe = SimpleNamespace(objective=Distill(teacher="t", on_policy=0.5, max_new_tokens=3))
    assert on_policy.lengths(recipe, features(), 8).tolist() == [6, 7, 8, 8, 7]
    assert on_policy.lengths(SimpleNamespace(objective=Distill(teacher="t")), features(), 8).tolist() == [3, 4, 5, 6, 4]


def test_rows_lie_by_length_as_before():
    batch = author(0.5, lambda prompt: [8] * 6).rewritten(collate(features(), np.arange(5), 0), epoch=0)
    assert 0 < batch.written.sum() < 5
    lengths = batch.attention_mask.sum(1).tolist()
    assert lengths == sorted(lengths)
    for number, (place, written) in enumerate(zip(batch.row_ids.tolist(), batch.written.tolist(), strict=True)):
        stored = features().get(place)
        inputs, targets, weights = row(batch, number)
        assert (8 in targets) is written
        if not written:
            assert (inputs, targets, weights) == tuple(stored[name].tolist() for name in ("input_ids", "targets", "weights"))


def test_which_rows_these_are_depends_on_seed_epoch_and_row_alone():
    writer, rows = author(0.5), FeatureSet.of([[Features([1, 2], [2, STOP], [0.0, 1.0])] for _ in range(400)])

    def chosen(parts, epoch: int) -> set[int]:
        batches = [writer.rewritten(collate(rows, part, 0), epoch) for part in parts]
        return {i for batch in batches if batch.written is not None for i in batch.row_ids[batch.written].tolist()}

    whole = chosen([np.arange(400)], 0)
    assert chosen(np.array_split(np.random.default_rng(0).permutation(400), 7), 0) == whole
    assert 160 < len(whole) < 240
    assert chosen([np.arange(400)], 1) != whole
    assert not chosen([np.array([], int)], 0)  # a process without rows


REFUSED = [
    ({"text": "x"}, {}, "plain text has no prompt that the student could answer"),
    ({"prompt": "x"}, {"parallel": "fsdp"}, "the student writes with whole weights"),
    ({"prompt": "x"}, {"gradient_checkpointing": "2GB"}, "what layers keep is measured on the data's answers"),
]


@pytest.mark.parametrize(("values", "train", "message"), REFUSED)
def test_what_cannot_be_written_is_refused(values, train, message):
    recipe = SimpleNamespace(
        train=SimpleNamespace(**{"parallel": "ddp", "gradient_checkpointing": False} | train), objective=Distill(teacher="t", on_policy=0.5)
    )
    with pytest.raises(RecipeError, match=message):
        on_policy.check(recipe, Row(values, "t.jsonl", 1))


@pytest.fixture
def distil(ftkit, recipe, checkpoint, verify_here, tmp_path):
    """distil(name, settings...) trains a student of one layer of a tiny Llama's two."""
    path = recipe("llama", "chats", {"steps": 2}, "teacher.yaml", output=str(tmp_path / "teacher"))
    assert ftkit("train", path).code == 0
    model = {"name": checkpoint("llama"), "config": {"num_hidden_layers": 1}}

    def student(name: str, train: dict | None = None, method: str = "full", flags: tuple = (), **objective):
        settings = {"kind": "distill", "teacher": str(tmp_path / "teacher"), "max_new_tokens": 8} | objective
        path = recipe(model, "chats", train, f"{name}.yaml", output=str(tmp_path / name), objective=settings, method=method)
        outcome = ftkit("train", path, *flags)
        assert outcome.code == 0, outcome.err
        return tmp_path / name, outcome.err

    return student


def losses(run: Path) -> list[float]:
    return [step["loss"] for step in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "split" not in step]


@pytest.mark.parametrize(("layout", "method"), [("flat", "lora"), ("padded", "full"), ("bucketed", "prompt"), ("flat", "prefix")])
def test_a_student_learns_from_what_it_writes(layout, method, distil):
    run, told = distil("run", {"layout": layout}, method, on_policy=1.0, temperature=1.0, divergence="jensen-shannon", beta=0.1)
    assert "objective.cache: the student writes answers anew in each epoch, so the teacher is asked in each step" in told
    assert all(0 < loss < 1 for loss in losses(run))  # of the tiny models, which are nearly equal: cross-entropy is above 5


def test_a_run_that_was_cut_off_writes_the_same(distil, assert_same_run):
    train = {"steps": 6, "save_every": 2, "accumulate": 2}
    run, _ = distil("run", train, on_policy=0.5)
    cut, _ = distil("cut", train, on_policy=0.5)
    shutil.rmtree(cut / "checkpoints" / "step-6")
    (cut / "manifest.json").write_text(json.dumps(json.loads((cut / "manifest.json").read_text()) | {"status": "preempted"}))
    distil("cut", train, flags=("--resume",), on_policy=0.5)
    assert_same_run(cut, run)


def test_answers_are_not_told_by_settings_of_the_model(checkpoint):
    """Which change what a model says, as those of many chat models do."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    model.generation_config.update(repetition_penalty=1.3, min_p=0.2, no_repeat_ngram_size=2, top_k=5)
    config = language_model.generation_config(Generation(temperature=1.0), [1], 0, **language_model.UNCHANGED)
    given, _ = model._prepare_generation_config(config)
    prompt = torch.tensor([[5, 6, 7, 5, 6]])
    processors = model._get_logits_processor(given, input_ids_seq_length=5, encoder_input_ids=prompt, device="cpu")
    logits = torch.randn(1, model.config.vocab_size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(processors(prompt, logits.clone()).softmax(-1), logits.softmax(-1))


def test_rows_of_the_data_are_learned_as_ever(distil):
    """A share so small that no row is chosen."""
    plain, few = (losses(distil(name, on_policy=share, max_new_tokens=128, cache=False)[0]) for name, share in (("plain", 0.0), ("few", 1e-9)))
    assert few == pytest.approx(plain, rel=1e-6)
