"""How many floating-point operations it takes to train a Llama, and how many a GPU can do."""

from __future__ import annotations

from typing import NamedTuple

RANK = 8  # of the updates of LoRA, on all sides of a comparison
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # a second, dense products in bfloat16, of boards with SXM sockets
SLOWER = ("PCIe", "NVL", "MIG")  # boards, and parts of boards, that share the name and do less; A100 does not on PCIe


class Llama(NamedTuple):
    """The shape of a model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool = False

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of the linear modules of one layer."""
        kv = self.hidden // self.heads * self.kv_heads
        up, down = (self.hidden, self.intermediate), (self.intermediate, self.hidden)
        return (self.hidden, self.hidden), (self.hidden, kv), (self.hidden, kv), (self.hidden, self.hidden), up, up, down

    @property
    def parameters(self) -> int:
        layer = sum(inputs * outputs for inputs, outputs in self.matrices) + 2 * self.hidden
        return self.layers * layer + self.hidden + self.vocabulary * self.hidden * (1 if self.tied else 2)


def of_row(shape: Llama, method: str, tokens: int, supervised: int) -> int:
    """Operations that one training step needs for a row of `tokens`, of which `supervised` have a target.

    Two for each weight that takes part in a product, three times: forward, for the gradient of what goes in, and, where the
    weight learns, for its own.  Nobody needs logits of positions without a target: the vocabulary projection counts for
    supervised positions only.  Causal attention: the half of all pairs, twice as much back as forward.  What a side
    computes beyond that (padding, logits of prompts, activations again) counts for nothing.
    """
    weights = shape.layers * sum(inputs * outputs for inputs, outputs in shape.matrices)
    updates = 0 if method == "full" else shape.layers * RANK * sum(inputs + outputs for inputs, outputs in shape.matrices)
    passes = 6 if method == "full" else 4
    attention = 6 * shape.layers * shape.hidden * tokens**2  # forward: two products of 2 x hidden operations a pair, and half of the pairs
    return tokens * (passes * weights + 6 * updates) + supervised * passes * shape.hidden * shape.vocabulary + attention


def peak(device: str) -> float | None:
    """What a GPU of that name does a second at most; None where that is not known."""
    known = next((flops for name, flops in PEAKS.items() if name in device), None)
    slower = any(word in device for word in SLOWER) and not ("A100" in device and "MIG" not in device)
    return None if slower else known
