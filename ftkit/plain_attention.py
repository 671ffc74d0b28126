"""Attention of rows laid end to end by plain products of matrices, forward and backward written out.

For what torch's kernels for a CPU lack: they do not drop attention weights out, and their backward pass in bfloat16
takes 2 to 5 times as long as in float32.  What autograd makes of the single operations copies each state several times
and keeps three tensors of the size of the weights; here one is kept, and the random bits of dropout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ftkit.dropout import LEVELS, drawn, kept, num_lost


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: Sequence[tuple[int, int]],
    masks: Sequence[torch.Tensor | None],
    bias: torch.Tensor | None,
    scaling: float | None,
    p: float,
) -> torch.Tensor:
    """softmax(scaling * query @ key.T + bias) @ value within each row, a share `p` of the softmax dropped out; in the type of the states.

    query: [S, heads, head_dim], key, value: [S, heads or a divisor, head_dim] of the S positions of `groups` of
    (count, length) rows -> [S, heads, head_dim].  masks: what the positions of each group look at: bool, as
    [count, heads, length, length] broadcasts; None: all.  bias: [1, heads, longest, longest]; scaling: head_dim ** -0.5 if None.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output: torch.Tensor = _Attention.apply(query, key, value, bias, groups, masks, scaling, num_lost(p) if p else None)
    return output


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        groups: Sequence[tuple[int, int]],
        masks: Sequence[torch.Tensor | None],
        scaling: float,
        lost: int | None,
    ) -> torch.Tensor:
        output, heads = torch.empty_like(query, memory_format=torch.contiguous_format), key.shape[1]
        saved: list[torch.Tensor | None] = []
        blocks = (_blocks(states, groups, heads) for states in (query, key, value))
        with torch.autocast(query.device.type, enabled=False):  # as in the backward pass
            for q, k, v, mask, place in zip(*blocks, masks, _places(output, groups), strict=True):
                scores = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=scaling)
                each = scores.view(*place.shape[:3], -1)  # [count, query heads, length, length]
                if bias is not None:
                    each += bias[:, :, : each.shape[2], : each.shape[2]]
                if mask is not None:
                    each += torch.zeros(mask.shape, dtype=each.dtype, device=each.device).masked_fill_(~mask, float("-inf"))
                shares = scores.softmax(-1)  # of bfloat16, too, it is computed in float32
                bits = None if lost is None else drawn(shares)
                place.copy_((_dropped(shares, bits, lost) @ v).view(place.shape))
                saved += q, k, v, shares, bits
        ctx.save_for_backward(bias, *saved)
        ctx.groups, ctx.heads, ctx.scaling, ctx.lost, ctx.more = groups, heads, scaling, lost, LEVELS / (LEVELS - (lost or 0))
        return output.mul_(ctx.more)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        bias, *saved = ctx.saved_tensors
        of_bias = torch.zeros_like(bias) if ctx.needs_input_grad[3] else None
        of_query, of_key, of_value = (grad.new_empty(len(grad), heads, grad.shape[2]) for heads in (grad.shape[1], ctx.heads, ctx.heads))
        blocks = _blocks(grad * ctx.more, ctx.groups, ctx.heads)
        for out, *places in zip(blocks, *(_places(states, ctx.groups) for states in (of_query, of_key, of_value)), strict=True):
            q, k, v, shares, bits = (saved.pop(0) for _ in range(5))
            of_shares = _dropped(out @ v.transpose(1, 2), bits, ctx.lost)
            of_scores = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype)
            of_each = of_scores @ k, of_scores.transpose(1, 2) @ q, _dropped(shares, bits, ctx.lost).transpose(1, 2) @ out
            for place, found in zip(places, of_each, strict=True):
                place.copy_(found.view(place.shape))
            if of_bias is not None:
                of_bias[:, :, : v.shape[1], : v.shape[1]] += of_scores.view(*places[0].shape[:3], -1).sum(0)
        return of_query.mul_(ctx.scaling), of_key.mul_(ctx.scaling), of_value, of_bias, None, None, None, None


def _dropped(shares: torch.Tensor, bits: torch.Tensor | None, lost: int | None) -> torch.Tensor:
    return shares if bits is None or lost is None else shares * kept(bits, lost, shares.dtype)


def _places(states: torch.Tensor, groups: Sequence[tuple[int, int]]) -> Iterator[torch.Tensor]:
    """[S, heads, head_dim] -> of each group [count, heads, length, head_dim], in the same memory."""
    parts = states.split([count * length for count, length in groups])
    return (part.unflatten(0, group).transpose(1, 2) for part, group in zip(parts, groups, strict=True))


def _blocks(states: torch.Tensor, groups: Sequence[tuple[int, int]], heads: int) -> Iterator[torch.Tensor]:
    """[S, a multiple m of `heads`, head_dim] -> of each group [count * heads, m * length, head_dim]: all queries of a key together."""
    return (place.reshape(len(place) * heads, -1, place.shape[3]) for place in _places(states, groups))
