"""Merge several adapters of one base, each with a weight: W + sum of w_i (W_i - W), W_i being the base with adapter i alone.

For LoRA that is the weighted sum of the updates (arXiv 2212.04089 adds and subtracts what was learned so).  A new head
has no base: it becomes the weighted mean of the adapters' heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ftkit import device
from ftkit.errors import RecipeError
from ftkit.merge import Adapter, check_empty, check_fits, check_mergeable, find, load_float, merged_alone, publish, stored_as, tokenizer_and_rows
from ftkit.model import head_of, quiet_libraries

SAME = ("auto_class", "revision", "load_kwargs")  # what adapters of one base share beside its name


def combine(
    targets: Sequence[str], weights: Sequence[float] | None, output: str | Path, dtype: str | None = None, note: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Write the base with several runs' or PEFT's adapters as a plain transformers directory; equal weights that sum to 1 if None.

    Each adapter is merged alone first and compared with itself unmerged.  Raises as `merge.merge`.
    """
    quiet_libraries()
    output = Path(output)
    check_empty(output)
    shares = list(weights) if weights is not None else [1 / len(targets)] * len(targets)
    if len(shares) != len(targets):
        raise RecipeError(f"--weights: {len(shares)} weights for {len(targets)} adapters")
    if not all(map(math.isfinite, shares)):
        raise RecipeError("--weights: give finite numbers")
    found = [find(Path(target)) for target in targets]
    for adapter in found:
        check_mergeable(adapter, "stored")
        check_fits(adapter)
        _check_same_base(found[0], adapter)
    written, here = stored_as(found[0], dtype), str(device.pick())
    tokenizer, rows = tokenizer_and_rows(found[0])
    combined = load_float(found[0], "stored", here).float()
    base = {name: tensor.clone() for name, tensor in combined.state_dict().items()}
    heads = tuple(f"{name}." for name in head_of(combined)) if found[0].artifact["auto_class"] != "AutoModelForCausalLM" else ()
    if heads and not sum(shares):
        raise RecipeError("--weights: they sum to 0, which leaves nothing of the adapters' heads")
    total = {name: torch.zeros_like(tensor) if name.startswith(heads) else tensor.clone() for name, tensor in base.items()}
    differences = {}
    for adapter, share in zip(found, shares, strict=True):
        alone, facts = merged_alone(adapter, "stored", "float32", rows, here, note)
        differences[str(adapter.directory)] = facts["max_difference"]
        if alone.config.tie_word_embeddings != combined.config.tie_word_embeddings:
            raise RecipeError(f"{adapter.directory} changes one of two embeddings that share their weights; merge it alone")
        for name, tensor in alone.state_dict().items():
            if name.startswith(heads):
                total[name] += tensor * (share / sum(shares))
            elif tensor.is_floating_point():
                total[name] += share * (tensor - base[name])
        if alone.can_generate():
            combined.generation_config = alone.generation_config
        del alone
        device.free_memory()
    combined.load_state_dict(total)
    names = ", ".join(f"{share:g} of {adapter.directory}" for adapter, share in zip(found, shares, strict=True))
    summary = {
        "output": str(output),
        "adapters": {str(adapter.directory): share for adapter, share in zip(found, shares, strict=True)},
        "base": found[0].source.name,
        "revision": found[0].source.revision,
        "dtype": written,
        "max_difference": differences,
        "rows": len(rows),
    }
    what = f"{found[0].source.name} with the updates of several adapters: {names}, in {written}, by ftkit."
    merged = combined.to(getattr(torch, written)).eval()
    return summary | {"verification": publish(merged, found[0], tokenizer, rows, written, what, output)}


def _check_same_base(one: Adapter, other: Adapter) -> None:
    """Refuse adapters that were not trained on the same weights, or for other labels."""
    differing = [name for name in SAME if one.artifact.get(name) != other.artifact.get(name)]
    if one.source.name != other.source.name:
        differing.insert(0, "base")
    if one.base_sha256 and other.base_sha256 and one.base_sha256 != other.base_sha256:
        differing.append("base_sha256")
    if differing:
        said = "; ".join(f"{name}: {getattr(one, name, one.artifact.get(name))} and {getattr(other, name, other.artifact.get(name))}" for name in differing)
        raise RecipeError(f"{one.directory} and {other.directory} do not belong to one base ({said})")
