"""Where the kinds named in recipes come from: a table of built-ins, then installed entry points.

Nothing is imported until it is named.  A third party adds a kind with an entry point in the group
`ftkit.task`, `ftkit.method` or `ftkit.objective`; built-ins cannot be shadowed.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

BUILTIN: dict[str, dict[str, str]] = {
    "task": {
        "text-classification": "ftkit.tasks.text_classification:TextClassification",
        "causal-lm": "ftkit.tasks.causal_lm:CausalLM",
    },
    "method": {
        "full": "ftkit.methods.full:Full",
        "partial": "ftkit.methods.partial:Partial",
        "head": "ftkit.methods.head:Head",
        "lora": "ftkit.methods.lora:LoRA",
        "qlora": "ftkit.methods.qlora:QLoRA",
    },
    "objective": {
        "supervised": "ftkit.objectives.supervised:Supervised",
    },
}


def known(axis: str) -> list[str]:
    """Every kind of `axis` (task, method, objective): built-ins first, then what is installed."""
    return [*BUILTIN[axis], *sorted({point.name for point in entry_points(group=f"ftkit.{axis}")} - set(BUILTIN[axis]))]


def find(axis: str, kind: str) -> type[Any]:
    """The class of a kind.  Raises KeyError, whose message names the nearest and all known kinds."""
    target = BUILTIN[axis].get(kind)
    if target is None:
        for point in entry_points(group=f"ftkit.{axis}"):
            if point.name == kind:
                return point.load()
        names = known(axis)
        close = difflib.get_close_matches(kind, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise KeyError(f"unknown {axis} {kind!r}{hint} (known: {', '.join(names)})")
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)
