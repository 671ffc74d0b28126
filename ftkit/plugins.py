"""Where the kinds named in recipes come from: a table of built-ins, then installed entry points.

Nothing is imported until it is named.  A third party adds a kind with an entry point in the group
`ftkit.task`, `ftkit.method` or `ftkit.objective`; built-ins cannot be shadowed.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ftkit.errors import MissingDependency, RecipeError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

BUILTIN: dict[str, dict[str, str]] = {
    "task": {
        "text-classification": "ftkit.tasks.text_classification:TextClassification",
        "token-classification": "ftkit.tasks.token_classification:TokenClassification",
        "question-answering": "ftkit.tasks.question_answering:QuestionAnswering",
        "masked-lm": "ftkit.tasks.masked_lm:MaskedLM",
        "replaced-token-detection": "ftkit.tasks.replaced_token_detection:ReplacedTokenDetection",
        "next-sentence": "ftkit.tasks.next_sentence:NextSentence",
        "sentence-order": "ftkit.tasks.sentence_order:SentenceOrder",
        "sentence-embedding": "ftkit.tasks.sentence_embedding:SentenceEmbedding",
        "reranking": "ftkit.tasks.reranking:Reranking",
        "causal-lm": "ftkit.tasks.causal_lm:CausalLM",
        "seq2seq": "ftkit.tasks.seq2seq:Seq2Seq",
    },
    "method": {
        "full": "ftkit.methods.full:Full",
        "partial": "ftkit.methods.partial:Partial",
        "head": "ftkit.methods.head:Head",
        "lora": "ftkit.methods.lora:LoRA",
        "qlora": "ftkit.methods.qlora:QLoRA",
        "ia3": "ftkit.methods.ia3:IA3",
        "vera": "ftkit.methods.vera:VeRA",
        "bitfit": "ftkit.methods.bitfit:BitFit",
        "prompt": "ftkit.methods.prompt:PromptTuning",
        "p-tuning": "ftkit.methods.p_tuning:PTuning",
        "prefix": "ftkit.methods.prefix:PrefixTuning",
        "adapter": "ftkit.methods.adapter:Adapter",
    },
    "objective": {
        "supervised": "ftkit.objectives.supervised:Supervised",
        "distill": "ftkit.objectives.distill:Distill",
    },
}


def known(axis: str) -> list[str]:
    """Every kind of `axis` (task, method, objective): built-ins first, then what is installed."""
    return [*BUILTIN[axis], *sorted(_installed(axis))]


def find(axis: str, kind: str) -> type[Any]:
    """The class of a kind.

    Raises RecipeError, which names the nearest and all known kinds; MissingDependency if an installed one is broken.
    """
    if kind in BUILTIN[axis]:
        module, _, name = BUILTIN[axis][kind].partition(":")
        return getattr(import_module(module), name)
    installed = _installed(axis)
    if kind in installed:
        try:
            return installed[kind].load()
        except ImportError as error:
            raise MissingDependency(f"{axis} `{kind}`, from {installed[kind].value}, cannot be imported: {error}") from error
    names = [*BUILTIN[axis], *sorted(installed)]
    close = difflib.get_close_matches(kind, names, n=1)
    hint = f"; did you mean `{close[0]}`?" if close else ""
    raise RecipeError(f"unknown {axis} `{kind}`{hint} (known: {', '.join(names)})")


def _installed(axis: str) -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points  # reads every installed package: only for what is not built in

    return {point.name: point for point in entry_points(group=f"ftkit.{axis}") if point.name not in BUILTIN[axis]}
