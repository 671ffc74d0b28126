"""How far what a student says is from what its teacher says, over the classes of many items."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IMPOSSIBLE = -1e4  # a logit whose probability float32 cannot tell from 0; with -inf differences are none


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float, kind: str, independent: bool = False, beta: float = 0.5) -> torch.Tensor:
    """float32 [n]: how far the student's distribution over C classes is from the teacher's, both [n, C] logits.

    Jensen-Shannon's is that of GKD (arXiv 2306.13649, eq. 1), with weight `beta` on the teacher's side.
    `independent`: of C yes-no answers instead, their mean.  A class that cannot be (-inf) counts for nothing, in gradients, too.
    """
    if kind == "forward" and not independent:
        told: torch.Tensor = _Told.apply(student, teacher, temperature)
        return told

    def distribution(logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities, [n, C] or [n, C, 2]."""
        logits = (logits.float() / temperature).clamp(min=IMPOSSIBLE)
        return torch.stack((F.logsigmoid(logits), F.logsigmoid(-logits)), -1) if independent else logits.log_softmax(-1)

    def kl(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """KL(one || other)."""
        return (one.exp() * (one - other)).sum(-1)

    own, given = distribution(student), distribution(teacher)
    if kind == "forward":
        found = kl(given, own)
    elif kind == "reverse":
        found = kl(own, given)
    else:
        middle = torch.logaddexp(own + math.log1p(-beta), given + math.log(beta))
        found = beta * kl(given, middle) + (1 - beta) * kl(own, middle)
    return found.mean(-1) if independent else found


class _Told(torch.autograd.Function):
    """KL(teacher || student) of logits [n, C], of which the teacher learns nothing: its gradient is the difference of both distributions.

    Logits of a vocabulary are large: autograd goes over them, and keeps them, twice as often.
    """

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        own, given = ((logits.float() / temperature).clamp_(min=IMPOSSIBLE).log_softmax(-1) for logits in (student, teacher))
        probable = given.exp()
        found = given.sub_(own).mul_(probable).sum(-1)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(own.exp_().sub_(probable).masked_fill_(student < IMPOSSIBLE * temperature, 0))
        ctx.temperature, ctx.dtype = temperature, student.dtype
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (apart,) = ctx.saved_tensors
        return (apart * (outer / ctx.temperature).unsqueeze(-1)).to(ctx.dtype), None, None
