"""What architectures have, as far as methods and tasks need it: the support matrix, without torch.

The table was made from the classes of transformers 5.23, and the tests hold it against them.  An architecture that is
not here is not refused: what its modules show decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from ftkit import plugins

if TYPE_CHECKING:
    from ftkit.methods import Method
    from ftkit.tasks import Task

# A head by its Auto class, and what modules must show; `own head`: the head of its language model is, by default, not its input embedding.
TRAITS = {
    "AutoModelForSequenceClassification": "no classification head",
    "AutoModelForTokenClassification": "no head that tags tokens",
    "AutoModelForQuestionAnswering": "no head that finds answers",
    "AutoModelForMaskedLM": "no head that fills masks",
    "sentence pairs": "no head that tells whether two segments follow each other",
    "replaced tokens": "no head that tells replaced tokens",
    "AutoModel": "two stacks of layers",
    "AutoModelForCausalLM": "no head that continues text",
    "AutoModelForSeq2SeqLM": "no head that rewrites text",
    "layers": "no list of layers",
    "linear": "no linear modules",
    "untransposed": "linear modules that keep their weights transposed",
    "biases": "no biases",
    "keys, values": "no keys and values that names tell",
    "feed-forward": "no feed-forward layers that shapes tell",
    "attention output": "no end of attention that names and shapes tell",
    "own head": "no head apart from the input embedding",
    "few bits": "feed-forward layers that compute in another type than weights of few bits are stored in",
    "attention interface": "attention that is its own, or wants what others have not",
}
CLASSIFIER, TAGGER, FINDER = "AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering"
MASKED, PAIRS, REPLACED = "AutoModelForMaskedLM", "sentence pairs", "replaced tokens"
CAUSAL, REWRITER = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
NEW_HEADS = {CLASSIFIER, TAGGER, FINDER}
BARE = "AutoModel"  # without any head
USUAL = {*NEW_HEADS, BARE, "layers", "linear", "untransposed", "keys, values", "feed-forward", "attention output", "attention interface", "few bits"}
BIASED = {*USUAL, "biases"}
ENCODER = {*BIASED, MASKED}
DECODER, BIASED_DECODER = {*USUAL, CAUSAL}, {*BIASED, CAUSAL}
TWO_STACKS, BIASED_TWO_STACKS = ({*usual, REWRITER} - NEW_HEADS - {BARE} for usual in (USUAL, BIASED))
OWN = {"attention interface"}  # which attention that is an architecture's own does not go through

TABLE: dict[str, set[str]] = {
    "albert": ENCODER | {PAIRS},
    "bert": ENCODER | {PAIRS},
    "big_bird": ENCODER - OWN | {PAIRS},
    "camembert": ENCODER,
    "deberta": ENCODER - OWN,
    "deberta-v2": ENCODER - OWN,
    "distilbert": ENCODER,
    "electra": ENCODER | {REPLACED},
    "ernie": ENCODER | {PAIRS},
    "megatron-bert": ENCODER - OWN | {PAIRS},
    "modernbert": {*USUAL, MASKED},
    "mpnet": ENCODER - OWN,
    "reformer": BIASED - OWN - {TAGGER} | {MASKED, CAUSAL, "own head"},
    "roberta": ENCODER,
    "roberta-prelayernorm": ENCODER,
    "squeezebert": {*NEW_HEADS, MASKED, "layers", "biases", "few bits"},  # convolutions in place of linear modules
    "xlm-roberta": ENCODER,
    "bloom": BIASED_DECODER - OWN,
    "cohere": DECODER - NEW_HEADS,
    "falcon": BIASED_DECODER - OWN,
    "gemma": DECODER - {FINDER},
    "gemma2": DECODER - OWN - {FINDER},
    "gemma3_text": DECODER - {TAGGER, FINDER},
    "gpt2": BIASED_DECODER - {"untransposed"},
    "gpt_bigcode": BIASED_DECODER - {FINDER},
    "gpt_neo": BIASED_DECODER - OWN,
    "gpt_neox": BIASED_DECODER | {"own head"},
    "gptj": BIASED_DECODER - OWN - {TAGGER} | {"own head"},
    "granite": DECODER - NEW_HEADS | {"own head"},
    "llama": DECODER | {"own head"},
    "mistral": DECODER | {"own head"},
    "mixtral": DECODER - {"feed-forward"} | {"own head"},  # experts are no linear modules
    "olmo2": DECODER - {TAGGER, FINDER} | {"own head"},
    "opt": BIASED_DECODER - {TAGGER},
    "phi": BIASED_DECODER - {FINDER} | {"own head"},
    "phi3": DECODER - {FINDER} | {"own head"},
    "qwen2": BIASED_DECODER | {"own head"},
    "qwen2_moe": BIASED_DECODER | {"own head"},
    "qwen3": DECODER | {"own head"},
    "smollm3": DECODER,
    "stablelm": BIASED_DECODER - {FINDER} | {"own head"},  # in its norms
    "starcoder2": BIASED_DECODER - {FINDER},
    "bart": BIASED_TWO_STACKS | {CLASSIFIER, FINDER},
    "blenderbot": BIASED_TWO_STACKS,
    "bigbird_pegasus": BIASED_TWO_STACKS - OWN | {CLASSIFIER, FINDER},
    "led": BIASED_TWO_STACKS - OWN | {FINDER},
    "longt5": TWO_STACKS - OWN - {"few bits"},
    "m2m_100": BIASED_TWO_STACKS,
    "marian": BIASED_TWO_STACKS,
    "mbart": BIASED_TWO_STACKS | {CLASSIFIER, FINDER},
    "mt5": TWO_STACKS | NEW_HEADS,
    "mvp": BIASED_TWO_STACKS - OWN | {CLASSIFIER, FINDER},
    "pegasus": BIASED_TWO_STACKS,
    "pegasus_x": BIASED_TWO_STACKS - OWN,
    "plbart": BIASED_TWO_STACKS | {CLASSIFIER},
    "t5": TWO_STACKS | NEW_HEADS,
    "umt5": TWO_STACKS | NEW_HEADS,
}

# By architecture and head: methods that fail for another reason than what modules show.
EXCEPTIONS = {("big_bird", FINDER): (("prompt", "p-tuning"), "a head that takes all before a separator for the question, virtual tokens, too")}


class Gap(NamedTuple):
    """What a combination lacks."""

    architecture: str
    method: str
    reason: str


def head(task: Task) -> str:
    """The trait that a task's head is: its own name where several share an Auto class."""
    return getattr(task, "head", task.auto_class)


def lacking(architecture: str, method: Method, task: Task) -> list[str]:
    """What an architecture of the table lacks for a method on a task; empty where all is there."""
    has = TABLE[architecture] - ({"own head"} if task.auto_class == BARE else set()) | ({"own head"} if head(task) == REPLACED else set())
    kinds, exception = EXCEPTIONS.get((architecture, task.auto_class), ((), ""))
    lacks = [reason for trait, reason in TRAITS.items() if trait in {head(task), *method.needs(task.new_head)} and trait not in has]
    return [*lacks, exception] if method.kind in kinds else lacks


def methods() -> dict[str, Method]:
    """Each known method with its defaults, and by example what it must be given; those that may have their base in 4 bits also as `kind/4`."""
    kinds = {kind: plugins.find("method", kind) for kind in plugins.known("method")}
    found = {kind: cls(**cls.example) for kind, cls in kinds.items()}
    return found | {f"{kind}/4": kinds[kind](**kinds[kind].example, bits=4) for kind, method in found.items() if getattr(method, "bits", 4) is None}


def gaps(task: Task) -> Iterator[Gap]:
    """The combinations with a task that are impossible, of the architectures that have its head."""
    known = methods()
    for architecture, has in TABLE.items():
        if head(task) in has:
            for kind, method in known.items():
                if found := lacking(architecture, method, task):
                    yield Gap(architecture, kind, ", ".join(found))
