"""What layers make of real tokens, against what transformers says of padded rows, and how far two models' are from each other, against direct sums."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from ftkit import intermediate
from ftkit.attention import Flat
from ftkit.data.batches import collate
from ftkit.data.features import FeatureSet
from ftkit.data.types import Features, Scores
from ftkit.intermediate import Inside, Watch
from ftkit.objectives.distill import Distill

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 48, "vocab_size": 60}
CONFIGS = {
    "bert": transformers.BertConfig(**SIZES),
    "distilbert": transformers.DistilBertConfig(dim=32, n_heads=4, hidden_dim=48, n_layers=3, vocab_size=60),
    "llama": transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
}
LENGTHS = [9, 4, 6]


def built(name: str, seed: int = 0):
    torch.manual_seed(seed)
    return transformers.AutoModel.from_config(CONFIGS[name], attn_implementation="eager").eval()


def batch(lengths=LENGTHS, weights=(1.0, 1.0, 1.0)):
    rows = [[Features(list(range(3, 3 + length)), [0], [weight])] for length, weight in zip(lengths, weights, strict=True)]
    return collate(FeatureSet.of(rows), np.arange(len(rows)), 0)


def seen(model, given, flat: bool, compared: bool = True) -> Inside:
    laid_out = Flat(model) if flat else None
    watch = Watch(model, compared)
    with watch.rows(given):
        if laid_out is None:
            model(**given.inputs)
        else:
            with laid_out.rows(given.segments):
                model(**given.inputs)
    found = watch.seen()
    watch.remove()
    if laid_out:
        laid_out.remove()
    return found


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_seen_is_what_transformers_says(name, flat):
    model, given = built(name), batch()
    real = given.attention_mask.bool()
    expected = model(**given.inputs, output_hidden_states=True, output_attentions=True)
    found = seen(model, given, flat)
    assert len(found.states) == 4
    for ours, theirs in zip(found.states[:-1], expected.hidden_states[:-1], strict=True):  # after the last one some have a norm
        torch.testing.assert_close(ours, theirs[real], rtol=1e-4, atol=1e-5)
    assert found.causal is (name == "llama")
    for (query, key, _), attentions in zip(found.compared, expected.attentions, strict=True):
        for products, row in zip(intermediate._products(query, key, LENGTHS), attentions, strict=True):
            length = products.shape[-1]
            if found.causal:
                products = products.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
            torch.testing.assert_close(products.softmax(-1), row[:, :length, :length], rtol=1e-4, atol=1e-5)


def test_a_model_is_left_as_it_was():
    model, given = built("bert"), batch()
    before = model(**given.inputs).last_hidden_state
    seen(model, given, flat=False)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(**given.inputs).last_hidden_state, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "watch") for module in model.modules())


def distance(**weights) -> float:
    student, teacher = (seen(built("bert", seed), batch(), flat=True) for seed in (0, 1))
    objective = Distill(teacher="runs/teacher", relation_heads=4, **weights)
    return objective.difference(student, teacher, batch()).item()


def hidden(seed: int) -> tuple[torch.Tensor, ...]:
    return built("bert", seed)(**batch().inputs, output_hidden_states=True).hidden_states


def test_states_are_as_far_apart_as_pytorch_says():
    real = batch().attention_mask.bool()
    pairs = [(one[real], other[real]) for one, other in zip(hidden(0), hidden(1), strict=True)]
    count = len(pairs[0][0])
    assert distance(embeddings=2.0) == pytest.approx(2 * count * F.mse_loss(*pairs[0]).item(), rel=1e-4)
    assert distance(hidden=3.0) == pytest.approx(3 * count * sum(F.mse_loss(*pair).item() for pair in pairs[1:]) / 3, rel=1e-4)
    assert distance(cosine=1.0) == pytest.approx(F.cosine_embedding_loss(*pairs[-1], torch.ones(count), reduction="sum").item(), rel=1e-4)


def test_attention_and_relations_are_as_far_apart_as_their_papers_say():
    ours, theirs = (seen(built("bert", seed), batch(), flat=False).compared for seed in (0, 1))
    rows = [slice(start, stop) for start, stop in pairwise(np.cumsum([0, *LENGTHS]))]

    def products(left, right, row):  # [heads, n, n]
        return left[row].transpose(0, 1) @ right[row].permute(1, 2, 0) / 8**0.5

    maps = [[products(own[0], own[1], row) - products(other[0], other[1], row) for row in rows] for own, other in zip(ours, theirs, strict=True)]
    expected = sum((each.square().mean() * each.shape[-1]).item() for layer in maps for each in layer) / 3
    assert distance(attention=1.0) == pytest.approx(expected, rel=1e-4)
    related = [
        F.kl_div(products(own, own, row).log_softmax(-1), products(other, other, row).softmax(-1), reduction="sum").item() / 4
        for own, other in zip(ours[-1], theirs[-1], strict=True)
        for row in rows
    ]
    assert distance(relations=1.0) == pytest.approx(sum(related) / 3, rel=1e-4)


def test_rows_in_which_nothing_is_supervised_count_for_nothing():
    given = batch(weights=(1.0, 0.0, 1.0))
    assert intermediate.token_weights(given).tolist() == [1.0] * 9 + [0.0] * 4 + [1.0] * 6
    student, teacher = (seen(built("bert", seed), given, flat=True) for seed in (0, 1))
    whole = Distill(teacher="runs/teacher", hidden=1.0).difference(student, teacher, given).item()
    alone, others = (seen(built("bert", seed), batch([9, 6], (1.0, 1.0)), flat=True) for seed in (0, 1))
    assert Distill(teacher="runs/teacher", hidden=1.0).difference(alone, others, batch([9, 6], (1.0, 1.0))).item() == pytest.approx(whole, rel=1e-5)


def test_the_weights_of_distilbert_are_a_preset():
    """Its script sums 5 ce, 2 mlm and 1 cos at temperature 2."""
    torch.manual_seed(0)
    own, theirs, targets = torch.randn(6, 11), torch.randn(6, 11), torch.randint(11, (6,))
    objective = Distill(teacher="runs/teacher", preset="distilbert")
    ce = F.kl_div((own / 2).log_softmax(-1), (theirs / 2).softmax(-1), reduction="batchmean") * 4
    mlm = F.cross_entropy(own, targets)
    found = objective.loss(Scores(own, targets, torch.ones(6), torch.arange(6), teacher=theirs)) / 6
    assert 7 * found.item() == pytest.approx((5 * ce + 2 * mlm).item(), rel=1e-6)
    assert 7 * objective.cosine == pytest.approx(1)
    assert Distill.model_validate(objective.model_dump()) == objective
    assert Distill(teacher="runs/teacher", preset="distilbert", cosine=0.0).cosine == 0


@pytest.mark.parametrize(
    ("kind", "sizes", "expected"),
    [
        ("uniform", (6, 12), [1, 3, 5, 7, 9, 11]),
        ("uniform", (3, 4), [0, 1, 3]),
        ("last", (2, 6), [4, 5]),
        ([0, 5], (2, 6), [0, 5]),
        ("uniform", (2, 2), [0, 1]),
    ],
)
def test_layers_are_mapped(kind, sizes, expected):
    assert intermediate.layer_map(kind, *sizes) == expected
