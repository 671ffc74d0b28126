"""An architecture made tiny: its config with few layers and narrow ones, for models that train in a second."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HIDDEN, HEADS, POSITIONS, WINDOW, CHUNK = 32, 2, 128, 64, 8
NARROWEST = HIDDEN // HEADS  # width of a matrix: keys of one head
WIDTH = re.compile(r"(^|_)(size|dim|inner|embd|model|ff)$")  # names of widths, which shrink as the hidden one does
NO_WIDTH = {"vocab_size", "type_vocab_size", "head_dim"}

# What a name on the hub contains -> its architecture, where no config is at hand; the first hit counts.
ARCHITECTURES = {
    "bigbird-pegasus": "bigbird_pegasus",
    "bigbird": "big_bird",
    "reformer": "reformer",
    "distilbert": "distilbert",
    "modernbert": "modernbert",
    "camembert": "camembert",
    "deberta-v": "deberta-v2",
    "deberta": "deberta",
    "xlm-roberta": "xlm-roberta",
    "multilingual-e5": "xlm-roberta",
    "bge-m3": "xlm-roberta",
    "roberta": "roberta",
    "albert": "albert",
    "electra": "electra",
    "mpnet": "mpnet",
    "minilm": "bert",
    "bert": "bert",
    "bge-": "bert",
    "e5-": "bert",
    "gte-": "bert",
    "gpt2": "gpt2",
    "gpt-neox": "gpt_neox",
    "pythia": "gpt_neox",
    "phi-3": "phi3",
    "phi-4": "phi3",
    "qwen3": "qwen3",
    "qwen2": "qwen2",
    "gemma-3": "gemma3_text",
    "gemma-2": "gemma2",
    "gemma": "gemma",
    "mistral": "mistral",
    "smollm3": "smollm3",
    "smollm": "llama",
    "llama": "llama",
    "opt-": "opt",
    "bloom": "bloom",
    "mbart": "mbart",
    "bart": "bart",
    "pegasus": "pegasus",
    "opus-mt": "marian",
    "umt5": "umt5",
    "mt5": "mt5",
    "t5": "t5",
}


def architecture(name: str) -> str | None:
    """The architecture (model_type) that a hub id speaks of; None if it tells nothing."""
    own = name.rpartition("/")[2].lower()
    return next((kind for part, kind in ARCHITECTURES.items() if part in own), None)


def miniature(config: PreTrainedConfig, layers: int, tokenizer: Any) -> PreTrainedConfig:
    """The config with `layers` layers of 32 channels, 128 positions and the tokenizer's vocabulary.

    Works on what settings are called: widths keep their proportions, lists with an entry a layer keep each
    kind of entry, scaled rotary positions become plain ones.
    """
    small = copy.deepcopy(config)
    text = small.get_text_config()
    settings, names = text.to_dict(), text.attribute_map
    hidden, depth = text.hidden_size, text.num_hidden_layers
    for name, value in settings.items():
        if isinstance(value, int) and value > 2 * HIDDEN and WIDTH.search(name) and name not in NO_WIDTH:
            setattr(text, name, max(NARROWEST, value * HIDDEN // hidden // 8 * 8))
        elif isinstance(value, list | tuple) and WIDTH.search(name):
            setattr(text, name, _narrowed(value, hidden))
        elif isinstance(value, list | tuple) and len(value) == depth:
            setattr(text, name, type(value)((list(dict.fromkeys(value)) * layers)[:layers]))
        elif isinstance(value, dict):
            setattr(text, name, _unscaled(value))
    grouped = settings.get("num_key_value_heads") not in (None, settings.get("num_attention_heads"))
    sizes = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_decoder_layers": layers,
        "decoder_layers": layers,
        "num_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2 if grouped else HEADS,
        "head_dim": NARROWEST,
        "rotary_dim": NARROWEST,
        "max_position_embeddings": POSITIONS,
        "sliding_window": WINDOW,
        "local_attn_chunk_length": CHUNK,
        "lsh_attn_chunk_length": CHUNK,
    }
    for name, size in sizes.items():
        value = settings.get(names.get(name, name))
        if isinstance(value, int) and value > size:
            setattr(text, name, size)
    text.vocab_size = 1 + max(tokenizer.get_vocab().values())
    for name, value in settings.items():
        if name.endswith("_token_id") and isinstance(value, int) and value >= text.vocab_size:
            setattr(text, name, getattr(tokenizer, "pad_token_id" if name == "decoder_start_token_id" else name, None))
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    return small


def _narrowed(widths: Sequence[int], hidden: int) -> list[int]:
    """Widths in proportion, whose sum is so, too."""
    shares = [width * HIDDEN // hidden for width in widths[:-1]]
    return [*shares, sum(widths) * HIDDEN // hidden - sum(shares)]


def _unscaled(settings: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions without what stretches them to longer texts, which is written for the widths of the real heads."""
    if "rope_type" in settings:
        return {"rope_type": "default"} | {name: settings[name] for name in ("rope_theta", "partial_rotary_factor") if name in settings}
    return {name: _unscaled(value) if isinstance(value, dict) else value for name, value in settings.items()}
