"""Token embeddings of which only the rows in use learn: the weights, and what is measured on the way, of all rows learning."""

import pytest
import torch
import transformers

from ftkit import checkpoint as checkpoints
from ftkit import embeddings
from ftkit.data.features import FeatureSet
from ftkit.data.types import Features
from ftkit.errors import RecipeError
from ftkit.evaluate import measure
from ftkit.loop import Position, fit
from ftkit.prepare import prepare
from ftkit.recipe import read
from ftkit.report import Reporter
from ftkit.session import open_session
from ftkit.signals import StopRequest

TRAIN = {"steps": 20, "batch_size": 8, "learning_rate": 0.01, "weight_decay": 0.1, "schedule": "cosine"}
BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
RUNS = {
    "bert": ("bert", BERT, "single", {"kind": "full"}),
    "bert-pattern": ("bert", BERT, "pairs", {"kind": "partial", "pattern": "word_embeddings"}),
    "distilbert": ("distilbert", {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}, "single", {"kind": "full"}),
    "llama": ("llama", {"tie_word_embeddings": False}, "chats", {"kind": "full"}),
}


@pytest.fixture(autouse=True)
def spares_little(monkeypatch):
    monkeypatch.setattr(embeddings, "LEAST", 1)


@pytest.fixture
def path(recipe, checkpoint):
    def write(name: str, **train):
        model, overrides, rows, method = RUNS[name]
        return recipe({"name": checkpoint(model), "config": overrides}, rows, {**TRAIN, **train}, method=method)

    return write


def opened(path, report, *overrides):
    return open_session(prepare(read(path, ["data.limit=16", *overrides]), report), report)


def weights(session):
    return {name: tensor.detach().clone() for name, tensor in session.learner.state_dict().items()}


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("name", RUNS)
def test_after_twenty_steps_all_rows_are_as_if_all_had_learned(name, layout, path):
    found = []
    with Reporter(None, quiet=True) as report:
        for skip in ("true", "false"):
            session = opened(path(name), report, f"train.layout={layout}", f"train.skip_unused_embeddings={skip}")
            start = weights(session)
            embedding = session.base.model.get_input_embeddings()
            assert (session.used is not None) is (skip == "true")
            losses = [step.loss for step in fit(session, Position())]
            if session.used:
                unused = torch.ones(len(embedding.weight), dtype=torch.bool).index_fill_(0, session.used.tokens, False)
                assert 10 < unused.sum() < len(unused) - 10
                assert torch.equal(embedding.weight, start[_name(session)])  # until the end nobody writes there
            values = {split: measured.values for split, measured in measure(session, session.splits, report, StopRequest()).items()}
            session.release()
            found.append((losses, values, weights(session)))
    assert any("token embeddings" in note for note in report.notes)
    (losses, values, ours), (expected_losses, expected_values, theirs) = found
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    for split, expected in expected_values.items():
        assert values[split]["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert ours.keys() == theirs.keys()  # nothing is left behind
    key = _name(session)
    moved, apart = (theirs[key] - start[key]).abs(), (ours[key] - theirs[key]).abs()
    assert moved[unused].max() > 1e-3  # they decayed
    assert apart.max() < 1e-5 * moved.max()


def _name(session):
    weight = session.base.model.get_input_embeddings().weight
    return next(name for name, parameter in session.learner.named_parameters() if parameter is weight)


def test_a_run_that_goes_on_has_the_same_bits(path):
    """The rows out of use are not in its checkpoint; how much of them is left, is."""
    where = path("bert", steps=6)
    with Reporter(None, quiet=True) as report:
        whole, cut, resumed = (opened(where, report) for _ in range(3))
        for _ in fit(whole, Position()):
            pass
        position = Position()
        steps = fit(cut, position)
        for _ in range(3):
            next(steps)
        measure(cut, cut.splits, report, StopRequest())
        learned = {name: tensor.clone() for name, tensor in checkpoints.learned(cut.learner).items()}
        state = checkpoints.capture_optimizer(cut.optimizer, cut.learner.named_parameters())
        assert not any(name.endswith("word_embeddings.weight") for name in learned)
        checkpoints.restore_model(resumed.learner, learned)
        checkpoints.restore_optimizer(resumed.optimizer, resumed.learner.named_parameters(), state)
        for _ in fit(resumed, Position(step=position.step, epoch=position.epoch, batch=position.batch)):
            pass
        for session in (whole, resumed):
            session.release()
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name


@pytest.mark.parametrize(
    ("model", "overrides", "train"),
    [
        ("gpt2", {}, {}),  # tied to the head, which gives all rows gradients
        ("bert", {}, {"optimizer": "sgd"}),  # coupled decay and momentum
    ],
)
def test_where_other_rows_would_do_more_than_decay_all_learn(model, overrides, train, recipe, checkpoint):
    rows = "single" if model == "bert" else "text"
    where = recipe({"name": checkpoint(model), "config": overrides}, rows, {**TRAIN, **train}, method={"kind": "full"})
    with Reporter(None, quiet=True) as report:
        assert opened(where, report).used is None


def test_models_without_a_table_of_tokens_stay_as_they_are():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "downsampling_rate": 2}
    model = transformers.CanineForSequenceClassification(transformers.CanineConfig(**sizes))
    assert embeddings.choose(model, FeatureSet.of([[Features([1, 2], [0], [1.0])]]), (0,)) is None


def test_nothing_is_changed_where_little_is_spared(path, monkeypatch):
    monkeypatch.setattr(embeddings, "LEAST", 1 << 20)
    with Reporter(None, quiet=True) as report:
        assert opened(path("bert"), report).used is None


def test_a_model_that_takes_its_embeddings_from_elsewhere_is_refused():
    embedding = torch.nn.Embedding(10, 4)
    used = embeddings.Used(embedding, torch.tensor([1, 3]))
    optimizer = torch.optim.AdamW(embedding.parameters())
    used.follow(optimizer)
    with pytest.raises(RecipeError, match="skip_unused_embeddings: false"):
        optimizer.step()


def test_a_token_that_was_not_foreseen_ends_the_run_instead_of_learning_nothing():
    embedding = torch.nn.Embedding(10, 4)
    used = embeddings.Used(embedding, torch.tensor([1, 3]))
    assert embedding(torch.tensor([3])).requires_grad
    with pytest.raises(IndexError):
        embedding(torch.tensor([2]))
    embedding.eval()
    assert torch.equal(embedding(torch.tensor([2, 3])), embedding.weight[[2, 3]])
    used.restore()
    assert type(embedding).forward == embedding.forward.__func__
    assert [name for name, _ in embedding.named_parameters()] == ["weight"]
    assert embedding.weight.requires_grad
