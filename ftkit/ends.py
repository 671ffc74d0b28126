"""Classifiers that read their answer at the end of a text, as T5's and BART's do, of texts in which ends stand, too.

Their code in transformers 5.23 raises ValueError for a batch whose rows have not all as many ends; of a row alone it takes the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import Seq2SeqSequenceClassifierOutput

from ftkit.methods.modules import two_stacks


def mend(model: Any) -> None:
    """Let such a classifier, if there is one, answer any rows side by side."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and "classification_head" in dict(module.named_children()) and two_stacks(module):
            module.forward = partial(_in_parts, module, module.forward)


def _in_parts(model: Any, compute: Callable[..., Any], input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None, **inputs: Any) -> Any:
    """Rows with as many ends together; input_ids, attention_mask: [B, L] -> logits [B, C]."""
    counts = None if input_ids is None else (input_ids == model.config.eos_token_id).sum(1)
    if input_ids is None or counts is None or (counts == counts[0]).all():
        return compute(input_ids=input_ids, attention_mask=attention_mask, **inputs)
    places = [(counts == count).nonzero().squeeze(1) for count in counts.unique()]
    parts = [compute(input_ids=input_ids[at], attention_mask=None if attention_mask is None else attention_mask[at], **inputs).logits for at in places]
    return Seq2SeqSequenceClassifierOutput(logits=torch.cat(parts)[torch.cat(places).argsort()])
