"""Tokens that a stored model does not know: which ones a text would gain from, and how they begin in tokenizer and model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ftkit.data import files
from ftkit.errors import DataError, RecipeError
from ftkit.tasks.classes import some

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ftkit.recipe.spec import AddedTokens

WORD = re.compile(r"[^\W\d_]+")


class Proposal(NamedTuple):
    """New tokens for a text, and what they change in it."""

    tokens: list[str]  # most gain first
    words: int  # of the text, between white space
    before: float  # tokens a word
    after: float


def propose(name: str, paths: Sequence[str], size: int, least: int) -> Proposal:
    """The words of text files that cost a model's tokenizer most tokens beyond one each, at most `size`, that occur `least` times or more.

    A token that is unknown counts twice.
    Raises RecipeError for a model without a tokenizer, DataError for files that cannot be read or hold no word.
    """
    from ftkit import model
    from ftkit.recipe.spec import AddedTokens, Model
    from ftkit.sources import locate

    spec = Model(name=name)
    tokenizer = model.load_tokenizer(spec, locate(spec), None, ())
    for path in paths:
        if not Path(path).is_file():
            raise DataError(f"there is no file {path}")
    counts: Counter[str] = Counter()
    words = 0
    for text in _texts(paths):
        counts.update(WORD.findall(text))
        words += len(text.split())
    if not words:
        raise DataError(f"{', '.join(paths)}: no word in it")
    before = _tokens(tokenizer, paths) / words
    written = _written(tokenizer)
    alike: dict[Any, Counter[str]] = {}  # words that are the same to the tokenizer, such as in upper and lower case
    costs: dict[Any, int] = {}
    for word, count in counts.items():
        ids = _ids(tokenizer, written(word))
        unknown = ids.count(tokenizer.unk_token_id)
        key = word if unknown else tuple(ids)
        alike.setdefault(key, Counter())[word] = count
        costs[key] = len(ids) - 1 + unknown
    gains = {max(same, key=lambda word: (same[word], word)): costs[key] * same.total() for key, same in alike.items() if same.total() >= least}
    chosen = sorted((word for word, gain in gains.items() if gain > 0), key=lambda word: (-gains[word], word))[:size]
    tokens = [written(word) for word in chosen]
    if tokens:
        add(tokenizer, AddedTokens(tokens=tokens))
    return Proposal(tokens, words, before, _tokens(tokenizer, paths) / words)


def _texts(paths: Iterable[str]) -> Iterator[str]:
    for path in paths:
        yield from files.read_text(Path(path))


def _tokens(tokenizer: Any, paths: Iterable[str]) -> int:
    return sum(len(_ids(tokenizer, text)) for text in _texts(paths))


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _written(tokenizer: Any) -> Callable[[str], str]:
    """A word as it stands in a text: with the space before it, where that is part of its tokens, as in byte-level BPE."""
    spaced = _ids(tokenizer, "a a")[-1:] != _ids(tokenizer, "a")[-1:]
    return (lambda word: f" {word}") if spaced else lambda word: word


def listed(added: AddedTokens) -> list[str]:
    """The tokens; DataError for a file that is not there."""
    if added.file is None:
        return list(added.tokens or ())
    if not Path(added.file).is_file():
        raise DataError(f"model.add_tokens.file: there is no file {added.file}")
    return [line for line in "".join(files.read_text(Path(added.file))).splitlines() if line.strip()]


def add(tokenizer: Any, added: AddedTokens) -> None:
    """Let the tokenizer know the tokens; a word is none within a longer one.

    Raises RecipeError for tokens that it knows already, that repeat, or that are blank.
    """
    from transformers import AddedToken

    tokens = listed(added)
    if not tokens:
        raise RecipeError(f"model.add_tokens.file: {added.file} holds none; give some, or leave add_tokens out")
    if blank := [token for token in tokens if not token.strip() or not _ids(tokenizer, token)]:
        raise RecipeError(f"model.add_tokens: nothing to the tokenizer: {some(blank)}")
    if repeated := sorted(token for token, count in Counter(tokens).items() if count > 1):
        raise RecipeError(f"model.add_tokens: named more than once: {some(repeated)}")
    vocabulary = tokenizer.get_vocab()
    alone = {token: ids[0] for token in tokens if len(ids := _ids(tokenizer, token)) == 1}
    if known := [token for token in tokens if token in vocabulary or alone.get(token, tokenizer.unk_token_id) != tokenizer.unk_token_id]:
        raise RecipeError(f"model.add_tokens: one token each already, so leave them out: {some(known)}")
    tokenizer.add_tokens([AddedToken(token, single_word=bool(WORD.fullmatch(token))) for token in tokens])


def grow(model: PreTrainedModel, tokenizer: Any, added: AddedTokens) -> list[int]:
    """Give the model embeddings for all tokens of the tokenizer, where it has fewer; the ids of the added ones.

    Raises RecipeError where the layer that transformers takes for the output head has no row for each token.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head is not None and len(head.weight) != embedding.num_embeddings:
        raise RecipeError(f"model.add_tokens: the head of {type(model).__name__} does not grow with its vocabulary; leave it out")
    if len(tokenizer) > embedding.num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    known = tokenizer.get_vocab()  # a rehearsal's tokenizer may lack them
    return sorted(known[token] for token in listed(added) if token in known)


def initialise(model: PreTrainedModel, tokenizer: Any, before: Any, added: AddedTokens, seed: int) -> None:
    """Let the rows of added tokens, in the embedding and in an output head, begin as `added.init` says; `before` is the tokenizer without them."""
    import torch

    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    tables = [embedding.weight, *((head.weight, head.bias) if head is not None else ())]
    tokens = listed(added)
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(tokens), device=embedding.weight.device)
    pieces = [_ids(before, token) for token in tokens]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for table in {id(table): table for table in tables if table is not None}.values():  # a head may share its weights
            old = table[: len(before)].float()
            rows = torch.stack([old[each if added.init == "subwords" else slice(None)].mean(0) for each in pieces])
            if added.init == "noise":
                rows += old.std(0) * torch.randn(rows.shape, generator=generator).to(rows.device)
            table[ids] = rows.to(table.dtype)
