"""Tokenizers trained on text, for models that start from nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

from ftkit.errors import DataError, RecipeError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from ftkit.recipe.spec import TrainedTokenizer

BYTES = 256
MAX_ALPHABET = 1000  # characters that WordPiece starts from, the most frequent ones; the others become [UNK]
BERT_TOKENS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
TEXT_TOKENS = {"pad_token": "<|pad|>", "eos_token": "<|eos|>"}
TURN_TOKENS = ("<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


class VocabularySize(DataError):
    """The texts do not give as many tokens as are asked for, but `found`."""

    def __init__(self, message: str, found: int) -> None:
        super().__init__(message)
        self.found = found


def train_tokenizer(spec: TrainedTokenizer, texts: Iterable[str], ending: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly `spec.vocab_size` tokens; the same texts give the same tokenizer.

    bpe and unigram work on bytes: they meet no unknown character, give back every text exactly, and
    bring a ChatML template; with `ending`, each text ends with <|eos|>, as for T5.  wordpiece is BERT's: lower case,
    `[CLS] a [SEP] b [SEP]`.
    Raises RecipeError for a vocabulary too small for its bytes, VocabularySize for texts too few to fill it,
    or with too many characters for it.
    """
    tokenizer, names, extra, template = _wordpiece(spec, texts) if spec.kind == "wordpiece" else _bytes(spec, texts, ending)
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **names,
        additional_special_tokens=list(extra),
        chat_template=template,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", *(["token_type_ids"] if spec.kind == "wordpiece" else []), "attention_mask"],
    )


def _check_size(tokenizer: Tokenizer, spec: TrainedTokenizer) -> None:
    found = tokenizer.get_vocab_size()
    if found < spec.vocab_size:
        few = f"the text gives {found} tokens, fewer than vocab_size: {spec.vocab_size}; give more text, or vocab_size: {found}"
        raise VocabularySize(f"model.tokenizer: {few}", found)
    if found > spec.vocab_size:
        many = f"the characters of the text alone give {found} tokens, more than vocab_size: {spec.vocab_size}; give vocab_size: {found} or more, or kind: bpe"
        raise VocabularySize(f"model.tokenizer: {many}", found)


Trained = tuple["Tokenizer", dict[str, str], tuple[str, ...], str | None]  # special tokens by role, and others; chat template


def _wordpiece(spec: TrainedTokenizer, texts: Iterable[str]) -> Trained:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = list(BERT_TOKENS.values())
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    # The trainer breaks ties by the ids of characters, and gives ids to inner ones (##a) in the order of a hash map:
    # for the same result every time the characters are chosen here, and the inner ones go in as special tokens.
    sentences = [tokenizer.normalizer.normalize_str(text) for text in texts]
    counts = Counter(chain.from_iterable(sentences))
    ranked = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    rare = {ord(c): None for c in ranked[MAX_ALPHABET:]}
    sentences = [sentence.translate(rare) for sentence in sentences]
    inner = sorted({f"##{c}" for sentence in sentences for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(sentence) for c in word[1:]})
    trainer = trainers.WordPieceTrainer(vocab_size=spec.vocab_size, special_tokens=[*special, *inner], limit_alphabet=MAX_ALPHABET, show_progress=False)
    tokenizer.train_from_iterator(sentences, trainer)
    _check_size(tokenizer, spec)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][: len(special)]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer, BERT_TOKENS, (), None


def _bytes(spec: TrainedTokenizer, texts: Iterable[str], ending: bool) -> Trained:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = [*TEXT_TOKENS.values(), *TURN_TOKENS]
    if spec.vocab_size <= BYTES + len(special):
        raise RecipeError(f"model.tokenizer.vocab_size: {spec.vocab_size} is too small: {BYTES} bytes and {len(special)} special tokens come first")
    options: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "special_tokens": special,
        "initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet()),
        "show_progress": False,
    }
    bpe = spec.kind == "bpe"
    tokenizer = Tokenizer(models.BPE() if bpe else models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**options) if bpe else trainers.UnigramTrainer(**options))
    _check_size(tokenizer, spec)
    tokenizer, end = tokenizer if bpe else _canonical(tokenizer, special), TEXT_TOKENS["eos_token"]
    if ending:
        tokenizer.post_processor = processors.TemplateProcessing(f"$A {end}", f"$A {end} $B:1 {end}:1", [(end, tokenizer.token_to_id(end))])
    return tokenizer, TEXT_TOKENS, TURN_TOKENS, CHAT_TEMPLATE


def _canonical(unigram: Tokenizer, special: list[str]) -> Tokenizer:
    """The tokenizer with its pieces in one order and their scores rounded: the trainer's differ from run to run.

    It sums floats in the order of a hash map, and gives bytes that are no pieces of their own the lowest
    score plus 0.0001, 0.0002, ... in such an order; here they share the lowest.
    """
    from tokenizers import Tokenizer

    state = json.loads(unigram.to_str())
    scores = {piece: score for piece, score in state["model"]["vocab"] if piece not in special}
    lowest = min(scores.values())
    for piece, score in scores.items():
        spare = len(piece) == 1 and score < lowest + BYTES * 0.0001
        scores[piece] = round(lowest if spare else score, 6)
    ranked = sorted(scores.items(), key=lambda entry: (-entry[1], entry[0]))
    state["model"]["vocab"] = [*((token, 0.0) for token in special), *ranked]
    return Tokenizer.from_str(json.dumps(state))
