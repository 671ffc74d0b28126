"""Conversations as tokens, and which of them the model must learn to produce.

A chat template says nothing about who writes which token, so the template is rendered twice for each
answer: up to the point where the model takes over (`add_generation_prompt`), and with the answer.  What
the second rendering adds is what a generating model writes; all else, such as the empty
`<think></think>` that some generation prompts supply, is given to it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any, NamedTuple

from ftkit.data.types import RowError
from ftkit.errors import RecipeError

PROBE = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good morning."}]
BESIDE_CONTENT = ("tool_calls", "reasoning_content", "thinking")  # what an answer may hold more, under the names that templates know


class Rendered(NamedTuple):
    """A conversation up to the end of its last trained answer."""

    input_ids: list[int]
    trained: list[bool]  # aligned with input_ids: tokens that the model is to produce
    untrained_answers: int  # answers left out because the template shows them differently later on


class _Answer(NamedTuple):
    """Where in a rendered text an answer stands."""

    text: str  # the conversation, ending with this answer
    start: int  # end of what the generation prompt supplies
    end: int  # end of the end-of-turn token


def render(messages: list[dict[str, Any]], tokenizer: Any, special: dict[str, int] | None = None) -> Rendered:
    """The tokens of a conversation, with those of its assistant messages (unless `weight: 0`) marked as trained.

    The text is tokenised as a whole.  A token on both sides of the point where an answer starts holds
    characters that no prompt contains, so a generating model has to write it: it is trained.

    Templates that show an answer differently once the conversation goes on (they drop old reasoning)
    leave only those answers to train that stand in the whole conversation as they were generated: the
    last one at least.

    `special` are the tokenizer's `special_tokens`, for callers with many rows.  Raises RowError for messages
    that the template refuses, rewrites or leaves out, RecipeError for a tokenizer without a chat template and
    for a template that never ends a turn.
    """
    trained = _trained(messages)
    if not trained:
        raise RowError("no assistant message to learn from")
    messages = _plain(messages)
    special = special or special_tokens(tokenizer)
    for i in trained:
        _check_shown(messages[: i + 1], tokenizer)
    last = _answer(messages[: trained[-1] + 1], tokenizer, special)
    answers = [_earlier_answer(messages[: i + 1], tokenizer, special, last.text) for i in trained[:-1]]
    spans = [(answer.start, answer.end) for answer in [*answers, last] if answer is not None]
    input_ids, marks = _tokenize(last.text, spans, tokenizer)
    end = len(marks) - marks[::-1].index(True)  # what follows the last answer is never looked at
    if input_ids[end - 1] not in special.values():
        raise _never_ends(tokenizer, last.text[last.start :])
    return Rendered(input_ids[:end], marks[:end], answers.count(None))


def prompt_ids(messages: list[dict[str, Any]], tokenizer: Any, longest: int | None = None) -> list[int]:
    """The tokens after which the model is to answer; an answer that already ends the conversation is left out.

    Where they are more than `longest`, the oldest exchanges are left out, too; the last one stays, whatever its length.
    """

    def tokens(messages: list[dict[str, Any]]) -> list[int]:
        text = _text(messages, tokenizer, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    messages = _plain(messages)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise RowError("no message to answer")
    if longest is not None:
        answered = [*messages, {"role": "assistant"}]
        messages = without_oldest_exchanges(answered, lambda shorter: len(tokens(shorter[:-1])) <= longest)[:-1]
    return tokens(messages)


def without_oldest_exchanges(messages: list[dict[str, Any]], fits: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
    """A conversation that is too long, without as many of its oldest exchanges as it takes until the rest `fits`.

    Leading system messages stay, and so does the exchange of the last answer to learn, whether it fits or not.
    """
    first = next((i for i, message in enumerate(messages) if message["role"] not in ("system", "developer")), len(messages))
    last = max(_trained(messages), default=0)
    starts = [first, *(i for i, message in enumerate(messages) if message["role"] == "user" and first < i < last)]

    def since(start: int) -> list[dict[str, Any]]:
        return messages[:first] + messages[start:]

    place = bisect_left(starts, True, key=lambda start: fits(since(start)))
    return since(starts[min(place, len(starts) - 1)])


def stop_token_ids(tokenizer: Any) -> list[int]:
    """The tokens that end a generated answer: the tokenizer's end of text, and the template's end of turn.

    Belongs into `generation_config.json` as `eos_token_id`; without the second, chats never stop.
    """
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template is not None:
        try:
            rendered = render(PROBE, tokenizer)
        except (RowError, RecipeError):  # a template that nothing was trained with
            return ids
        ids.append(rendered.input_ids[-1])
    return list(dict.fromkeys(ids))


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Special tokens and their ids, those included that have no role such as eos."""
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def _trained(messages: list[dict[str, Any]]) -> list[int]:
    """The places of the answers to learn."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight") != 0]


def _plain(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages without their weights, which templates need not know."""
    for number, message in enumerate(messages, 1):
        if (weight := message.get("weight")) not in (None, 0, 1):
            raise RowError(f"message {number}: weight must be 0 or 1, not {weight!r}")
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def _check_shown(messages: list[dict[str, Any]], tokenizer: Any) -> None:
    """Refuse an answer, the last message, that is empty, or that holds something beside its content which the template never shows."""
    *before, answer = messages
    if not (answer.get("content") or "").strip() and not answer.get("tool_calls"):
        raise RowError(f"message {len(messages)} (assistant) is empty: there is nothing to learn in it")
    for name in BESIDE_CONTENT:
        if not answer.get(name):
            continue
        try:
            shown = _text(messages, tokenizer, add_generation_prompt=False)
            without = _text([*before, {key: value for key, value in answer.items() if key != name}], tokenizer, add_generation_prompt=False)
        except RowError:  # a template that misses it does not ignore it; one that refuses the whole says so itself
            continue
        if shown == without:
            raise RowError(f"message {len(messages)}: the chat template ignores its {name}, which would not be learned; take another template, or leave it out")


def _text(messages: list[dict[str, Any]], tokenizer: Any, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise RecipeError(
            f"the tokenizer of {_name(tokenizer)} has no chat template, so it cannot say how messages become text; name one that has "
            "(model.tokenizer: an instruct model of the same family), or give plain columns (data.columns: {prompt: ..., completion: ...})"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError) as error:
        raise RowError(f"the chat template refuses the messages: {error}") from error


def _answer(messages: list[dict[str, Any]], tokenizer: Any, special: dict[str, int]) -> _Answer:
    """The answer that the last message is, in the rendering of all messages."""
    if len(messages) == 1:
        raise RowError("the conversation starts with the only answer to learn: there is no prompt for it")
    prompt = _text(messages[:-1], tokenizer, add_generation_prompt=True)
    text = _text(messages, tokenizer, add_generation_prompt=False)
    if not text.startswith(prompt):
        supplied = prompt.removeprefix(_text(messages[:-1], tokenizer, add_generation_prompt=False))
        raise RowError(
            f"the chat template prompts for an answer with {supplied[-60:]!r}, but renders the answer differently ({text[-60:]!r}): a model trained on the one "
            "would not be asked for it by the other; give the data in columns prompt and completion, or another chat template"
        )
    answer = text[len(prompt) :]
    content = messages[-1].get("content")
    if isinstance(content, str) and "".join(content.split()) not in "".join(answer.split()):
        raise RowError(f"the chat template leaves out or rewrites part of the answer {content[:60]!r}, which would not be learned; it renders {answer[:60]!r}")
    return _Answer(text, len(prompt), len(prompt) + _end_of_turn(answer, tokenizer, special))


def _earlier_answer(messages: list[dict[str, Any]], tokenizer: Any, special: dict[str, int], whole: str) -> _Answer | None:
    """The answer that the last message is, if `whole`, the rendering of the conversation, begins with the same text."""
    try:
        answer = _answer(messages, tokenizer, special)
    except RowError:
        return None
    return answer if whole.startswith(answer.text[: answer.end]) else None


def _end_of_turn(answer: str, tokenizer: Any, special: dict[str, int]) -> int:
    """Where the first unbroken run of special tokens ends, in the special tokens and white space that `answer` ends with.

    Phi-3 ends a last answer with `<|end|>\\n<|endoftext|>`: the turn ends with the first of them.
    Cohere's `<|END_RESPONSE|><|END_OF_TURN_TOKEN|>` are both to be written.
    """
    end, rest, stripped = None, answer, answer.rstrip()
    lengths = {*map(len, special)}  # few, while there may be thousands of tokens
    while size := max((n for n in lengths if stripped[-n:] in special), default=0):
        if end is None or stripped != rest:
            end = len(stripped)
        rest = stripped[:-size]
        stripped = rest.rstrip()
    if end is None:
        raise _never_ends(tokenizer, answer)
    return end


def _never_ends(tokenizer: Any, answer: str) -> RecipeError:
    wanted = tokenizer.eos_token or "an end-of-turn token"
    return RecipeError(
        f"the chat template of {_name(tokenizer)} ends an answer with {answer[-30:]!r}, in which no special token of the tokenizer ends the turn: "
        f"a model trained so would never learn to stop; let the template write {wanted} after each answer, make the text that ends it a special token, "
        f"or give columns prompt and completion, which end with {wanted}"
    )


def _name(tokenizer: Any) -> str:
    return tokenizer.name_or_path or "this run"


def _tokenize(text: str, spans: list[tuple[int, int]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Token ids of `text`, which already has its special tokens, and for each whether it lies in a span of characters."""
    if not tokenizer.is_fast:
        return _tokenize_pieces(text, spans, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    marks, done, spans = [], 0, [*spans]
    for start, end in encoded["offset_mapping"]:
        start = min(start, done)  # some tokenizers leave white space out of the offsets
        done = max(end, done)
        while spans and start >= spans[0][1]:
            spans.pop(0)
        marks.append(bool(spans) and max(end, start + 1) > spans[0][0])
    return encoded["input_ids"], marks


def _tokenize_pieces(text: str, spans: list[tuple[int, int]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The same for a tokenizer that cannot tell which characters a token stands for: cut first, then tokenise."""
    input_ids: list[int] = []
    marks: list[bool] = []
    done = 0
    for start, end in [*spans, (len(text), len(text))]:
        for piece, inside in ((text[done:start], False), (text[start:end], True)):
            ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"] if piece else []
            input_ids += ids
            marks += [inside] * len(ids)
        done = end
    return input_ids, marks
