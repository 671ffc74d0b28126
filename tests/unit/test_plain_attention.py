"""Attention with dropout, forward and backward, beside what autograd makes of the formula with the same masks."""

import pytest
import torch

from ftkit import plain_attention
from ftkit.attention import _masks, _Padded, _Real
from ftkit.data import batches
from ftkit.data.batches import segments
from ftkit.dropout import num_lost

LENGTHS, HEADS, DIM, P = (2, 5, 5, 7), 4, 3, 0.3
SCALING = 0.7


@pytest.fixture
def draws(monkeypatch):
    """The random bits of each group: the same in every forward pass."""
    found = {}

    def drawn(shares):
        if shares.shape not in found:
            found[shares.shape] = torch.randint(-(2**15), 2**15, shares.shape, dtype=torch.int16, generator=torch.Generator().manual_seed(len(found)))
        return found[shares.shape]

    monkeypatch.setattr(plain_attention, "drawn", drawn)
    return found


def attended(states, segments, masks, bias):
    """What is tested, of the tokens."""
    padded = [_Padded.apply(part, *segments.padding) for part in states] if segments.padding else states
    output = plain_attention.attend(*padded, segments.groups, masks, bias, SCALING, P)
    return _Real.apply(output, *segments.padding) if segments.padding else output


@pytest.fixture(params=[0, 30, 2000], ids=["of-one-length", "a-few-padded", "one-group"])
def rows(request, monkeypatch):
    monkeypatch.setattr(batches, "CALL", request.param)
    mask = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    return segments(mask.numpy())


def formula(query, key, value, segments, causal, bias, draws):
    """Row by row: softmax, the masks that were drawn, and the sum."""
    key, value = (states.repeat_interleave(HEADS // states.shape[1], 1) for states in (key, value))
    outputs, start, row = [], 0, 0
    for (count, length), bits in zip(segments.groups, draws, strict=True):
        gone = bits.view(count, HEADS, length, length) < num_lost(P) - 2**15
        for number in range(count):
            n = segments.lengths[row]
            q, k, v = (states[start : start + n].transpose(0, 1) for states in (query, key, value))
            scores = SCALING * q @ k.transpose(1, 2)
            if bias is not None:
                scores = scores + bias[0, :, :n, :n]
            if causal:
                scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
            shares = scores.softmax(-1) * ~gone[number, :, :n, :n] / (1 - num_lost(P) / 2**16)
            outputs.append((shares @ v).transpose(0, 1))
            start, row = start + n, row + 1
    return torch.cat(outputs)


@pytest.mark.parametrize("biased", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_outputs_and_gradients_are_those_of_the_formula(rows, kv_heads, causal, biased, draws):
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    states = [torch.randn(tokens, heads, DIM, dtype=torch.float64) for heads in (HEADS, kv_heads, kv_heads)]
    bias = torch.randn(1, HEADS, max(LENGTHS), max(LENGTHS), dtype=torch.float64) if biased else None
    masks = list(_masks(rows, max(LENGTHS) if causal else None, causal, torch.device("cpu")))
    if causal:
        masks = [torch.ones(length, length, dtype=torch.bool).tril() for _, length in rows.groups]
    given = [part.clone().requires_grad_() for part in (*states, *([] if bias is None else [bias]))]
    other = [part.detach().clone().requires_grad_() for part in given]

    found = attended(given[:3], rows, masks, given[3] if biased else None)
    expected = formula(*other[:3], rows, causal, other[3] if biased else None, list(draws.values()))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    above = torch.randn_like(found)
    found.backward(above)
    expected.backward(above)
    for one, two in zip(given, other, strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-10, atol=1e-12)


def test_in_few_bits_the_softmax_is_computed_in_more(rows, draws):
    """bfloat16 in and out; as close to the exact result as rounding allows."""
    states = [torch.randn(sum(LENGTHS), HEADS, 8) for _ in range(3)]
    masks = list(_masks(rows, None, False, torch.device("cpu")))
    exact = attended(states, rows, masks, None)
    few = [part.bfloat16().requires_grad_() for part in states]
    with torch.autocast("cpu", torch.bfloat16):
        found = attended(few, rows, masks, None)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.05)
    found.sum().backward()
    assert all(part.grad.dtype == torch.bfloat16 and part.grad.isfinite().all() for part in few)
