"""BigBird's block-sparse attention (arXiv 2007.14062), where rows are long enough for it.

Its code in transformers 5.23 goes over to full attention with the first batch that is too short for blocks, and stays
there: long rows, too, would be computed so from then on, and otherwise than by a model that was just loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ftkit import reload


def mend(model: Any) -> None:
    """Let a BigBird, if it is one, begin each batch with the attention of its config."""
    if (module := reload.sparse(model)) is not None:
        module.set_attention_type = partial(_switch, module.set_attention_type)
        module.register_forward_pre_hook(lambda module, _: module.set_attention_type(module.config.attention_type))


def _switch(switch: Callable[[str], None], value: str) -> None:
    """Modules that are made for it get the weights that are there: they need none of their own, nor the random numbers for them."""
    with torch.device("meta"):
        switch(value)
