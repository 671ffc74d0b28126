"""Dropout that is drawn faster: the share that was asked for, at random, with the gradients of what was kept."""

import pytest
import torch
from torch import nn

from ftkit.dropout import Dropout, dropped, quicken
from ftkit.prepare import prepare
from ftkit.recipe import read
from ftkit.report import Reporter
from ftkit.session import open_session


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_share_of_p_is_dropped_out_and_the_mean_stays(p):
    torch.manual_seed(0)
    x = torch.ones(200, 3, 333)
    found = dropped(x, p)
    gone = found == 0
    assert gone.float().mean() == pytest.approx(p, abs=4 * (p * (1 - p) / x.numel()) ** 0.5)
    assert found[~gone].unique().tolist() == pytest.approx([1 / (1 - p)], rel=1e-4)
    # at random: neighbours, and the same places of two draws, have nothing to do with each other
    both = p**2
    other = dropped(x, p) == 0
    for one, two in ((gone, other), (gone[:, :, 1:], gone[:, :, :-1]), (gone[1:], gone[:-1])):
        assert (one & two).float().mean() == pytest.approx(both, abs=4 * (both * (1 - both) / one.numel()) ** 0.5)


@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_go_where_values_went(shape, dtype):
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    found = dropped(x, 0.5)
    found.sum().backward()
    assert torch.equal(x.grad, found)  # of ones, values and gradients are the factor or zero
    assert found.dtype == dtype


def test_a_seed_gives_the_same_again():
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(dropped(torch.ones(10, 10), 0.5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_every_dropout_of_a_model_is_replaced_and_works_in_training_only():
    inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval()
    model = nn.Sequential(nn.Dropout(0.3), inner, nn.Dropout1d(0.1))
    quicken(model)
    assert [(type(module), module.p, module.training) for module in model.modules() if isinstance(module, nn.Dropout | nn.Dropout1d)] == [
        (Dropout, 0.3, True),
        (Dropout, 0.5, False),
        (nn.Dropout1d, 0.1, True),
    ]
    x = torch.ones(100, 100)
    assert torch.equal(model[1][1](x), x)
    assert not torch.equal(model[0](x), x)
    assert Dropout(0.5)(torch.ones(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("fast", [True, False])
def test_a_recipe_may_ask_for_torch_s_own(fast, recipe):
    path = recipe("bert", "single", {"fast_dropout": fast})
    with Reporter(None, quiet=True) as report:
        session = open_session(prepare(read(path), report), report)
    found = {type(module) for module in session.base.model.modules() if isinstance(module, nn.Dropout)}
    assert found == {Dropout if fast else nn.Dropout}
