"""The noise of NEFTune: its distribution, and when there is any."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from ftkit.data.batches import collate, segments
from ftkit.loop import Position, fit
from ftkit.neftune import Noise
from ftkit.prepare import prepare
from ftkit.recipe import read
from ftkit.report import Reporter
from ftkit.session import open_session

ALPHA, WIDTH = 5.0, 64


MASK = (torch.arange(400) < torch.tensor([400, 100])[:, None]).long()  # rows of 400 and of 100 real tokens


@pytest.mark.parametrize("flat", [False, True])
def test_the_noise_is_uniform_and_smaller_in_longer_rows(flat):
    """U(-1, 1) * alpha / sqrt(L * d), L the length of the row (github.com/neelsjain/NEFTune)."""
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(10, WIDTH)
    noise = Noise(embedding, ALPHA)
    ids = torch.ones((1, 500) if flat else (2, 400), dtype=torch.int64)
    plain = embedding(ids)
    with noise.rows(SimpleNamespace(attention_mask=MASK, segments=segments(MASK.numpy()))):
        added = (embedding(ids) - plain).detach()
    for row, length in zip(added[0].split([400, 100]) if flat else added, (400, 100), strict=True):
        bound = ALPHA / math.sqrt(length * WIDTH)
        assert 0.99 * bound < row.abs().max() <= bound * (1 + 1e-5)
        assert row.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert abs(row.mean().item()) < 0.02 * bound
        quartiles = torch.quantile(row.flatten(), torch.tensor([0.25, 0.75]))
        assert quartiles.tolist() == pytest.approx([-bound / 2, bound / 2], rel=0.03)
    assert torch.equal(embedding(ids), plain)


@pytest.mark.parametrize(("model", "rows", "method"), [("bert", "single", "full"), ("llama", "chats", "lora"), ("bert", "single", "head")])
def test_there_is_noise_in_training_alone(model, rows, method, recipe, tmp_path):
    with Reporter(None, quiet=True) as report:
        session = open_session(prepare(read(recipe(model, rows, {"neftune": ALPHA, "epochs": 2, "steps": None}, method=method)), report), report)
        session.compute_frozen(tmp_path, report, lambda: None)
    assert session.frozen is None  # what layers see is new in every epoch
    seen = []
    session.base.model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append((args[0], output.detach())))
    weight = session.base.model.get_input_embeddings().weight
    before = weight.detach().clone()
    next(fit(session, Position()))
    ids, given = seen[-1]
    assert not torch.equal(given, before[ids])
    session.wrapped.eval()
    with torch.no_grad():
        session.wrapped(collate(session.prepared.train, range(2), session.pad_token_id), lambda parts: None)
    ids, given = seen[-1]
    assert torch.equal(given, weight[ids])


def test_a_run_with_noise_is_verified_and_can_be_repeated(recipe, ftkit, tmp_path, verify_here):
    losses = []
    for output in ("one", "two"):
        done = ftkit("train", recipe("llama", "prompts", {"neftune": ALPHA}, output=str(tmp_path / output)))
        assert done.code == 0, done.err
        losses.append([line.get("loss") for line in map(json.loads, (tmp_path / output / "log.jsonl").open())])
    assert losses[0] == losses[1]
