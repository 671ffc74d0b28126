"""What the columns of a row must hold, and the chat formats of the field -> `messages`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ftkit.data.files import json_type
from ftkit.data.types import RowError

if TYPE_CHECKING:
    from collections.abc import Callable

TEXTS = frozenset({"text", "text_pair", "question", "context", "source", "target", "prompt", "completion"})
LISTS = frozenset({"tokens", "tags"})
OUTPUTS = frozenset({"label", "score", "tags", "answers", "answer_start", "target", "completion"})  # the rest is what a model is given

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "system": "system",
}


class Conversion(NamedTuple):
    """A known chat format: the columns that tell it, those it reads if they are there, and its meaning."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    messages: Callable[[dict[str, Any]], list[dict[str, Any]]]  # raises RowError
    answer: str = ""  # the required column that only training needs

    @property
    def question(self) -> Conversion:
        """The same for rows that are to be answered."""
        return self._replace(required=tuple(name for name in self.required if name != self.answer))


def checked(column: str, value: Any) -> Any:
    """The value in the one form that tasks see.  Raises RowError if it is not what the column holds."""
    if column == "messages":
        return messages(value)
    if column == "negative":
        return [_checked_text(f"text {number} of negative", text) for number, text in enumerate(value if isinstance(value, list) else [value], 1)]
    if column in TEXTS:
        return _checked_text(column, value)
    if column == "tokens" and isinstance(value, str):  # a text that is to be tagged
        _check_unicode(column, value)
    elif column in LISTS and not isinstance(value, list):
        raise RowError(f"{column} must be a list, but is {json_type(value)}")
    return value


def _checked_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RowError(f"{name} must be text, but is {json_type(value)}")
    if not value.strip():
        raise RowError(f"{name} is empty")
    _check_unicode(name, value)
    return value


def is_empty(value: Any) -> bool:
    """Whether nothing stands there: null, not a number, blank text, an empty list."""
    return value is None or value != value or (isinstance(value, str) and not value.strip()) or value in ([], {})


def messages(value: Any) -> list[dict[str, Any]]:
    """OpenAI messages, checked; ShareGPT's from/value entries are rewritten."""
    if not isinstance(value, list) or not value:
        raise RowError(f"messages must be a list of {{role, content}}, but is {'empty' if value == [] else json_type(value)}")
    return [_message(item, number) for number, item in enumerate(value, 1)]


def _message(item: Any, number: int) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise RowError(f"message {number} must be {{role, content}}, but is {json_type(item)}")
    if "from" in item and "role" not in item:
        if item["from"] not in SHAREGPT_ROLES:
            raise RowError(f"message {number} is from {item['from']!r}; known are {', '.join(SHAREGPT_ROLES)}")
        item = {"role": SHAREGPT_ROLES[item["from"]], "content": item.get("value")}
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        raise RowError(f"message {number} has the role {role!r}; known are {', '.join(sorted(ROLES))}")
    if content is None and item.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise RowError(f"the content of message {number} must be text, but is {json_type(content)}")
    _check_unicode(f"message {number}", content)
    # Parquet gives every message the keys of all of them, null where a message has none
    rest = {key: entry for key, entry in item.items() if key not in ("role", "content") and entry is not None}
    return {"role": role, "content": content, **rest}


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{name} holds half of a surrogate pair at character {error.start}, which is not Unicode text") from error


def _text(record: dict[str, Any], column: str) -> str:
    value = record.get(column)
    if not isinstance(value, str):
        raise RowError(f"{column} must be text, but is {'missing' if value is None else json_type(value)}")
    if not value.strip():
        raise RowError(f"{column} is empty")
    return value


def _system(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [] if is_empty(record.get("system")) else [{"role": "system", "content": _text(record, "system")}]


def _sharegpt(record: dict[str, Any]) -> list[dict[str, Any]]:
    turns = messages(record["conversations"])
    return turns if turns[0]["role"] == "system" else _system(record) + turns


def _alpaca(record: dict[str, Any]) -> list[dict[str, Any]]:
    turns = _system(record)
    for pair in record.get("history") or []:
        if not (isinstance(pair, list) and len(pair) == 2):
            raise RowError("history must be a list of [instruction, output] pairs")
        turns += [{"role": role, "content": content} for role, content in zip(("user", "assistant"), pair, strict=True)]
    prompt = _text(record, "instruction")
    if not is_empty(record.get("input")):
        prompt += "\n\n" + _text(record, "input")
    answer = [] if is_empty(record.get("output")) else [{"role": "assistant", "content": _text(record, "output")}]
    return messages([*turns, {"role": "user", "content": prompt}, *answer])


def _prompt_completion(record: dict[str, Any]) -> list[dict[str, Any]]:
    """TRL's conversational form: both are lists of messages, of which the completion's are learned; a plain string is one turn."""

    def turns(column: str, role: str) -> list[Any]:
        value = record.get(column)
        return value if isinstance(value, list) else [{"role": role, "content": _text(record, column)}]

    given = turns("prompt", "user")
    learned = [] if is_empty(record.get("completion")) else turns("completion", "assistant")
    return [
        {"weight": 0, **message} if number < len(given) and message["role"] == "assistant" else message
        for number, message in enumerate(messages(given + learned))
    ]


SHAREGPT = Conversion("ShareGPT", ("conversations",), ("system",), _sharegpt)
ALPACA = Conversion("Alpaca", ("instruction", "output"), ("input", "system", "history"), _alpaca, "output")
PROMPT_COMPLETION = Conversion("prompt/completion messages", ("prompt", "completion"), (), _prompt_completion, "completion")

CHAT_COLUMNS = frozenset(name for each in (SHAREGPT, ALPACA, PROMPT_COMPLETION) for name in (*each.required, *each.optional))


def detect(columns: list[str], first: dict[str, Any], has_messages: bool, has_prompt: bool, answers: bool = True) -> Conversion | None:
    """The chat format of a table with these columns, for a task that reads `messages`.

    Prompts and completions that are plain strings stay as they are for a task that reads those columns.
    Where no `answers` are needed, a column of plain text is what users say.
    """
    if not has_messages or "messages" in columns:
        return None
    sharegpt, alpaca, prompts = (each if answers else each.question for each in (SHAREGPT, ALPACA, PROMPT_COMPLETION))
    for conversion in (sharegpt, alpaca):
        if set(conversion.required) <= set(columns):
            return conversion
    if set(prompts.required) <= set(columns) and (isinstance(first.get("prompt"), list) or not has_prompt):
        return prompts
    plain = columns[0] if len(columns) == 1 else "text"
    return None if answers or not isinstance(first.get(plain), str) else Conversion("what users say", (plain,), (), partial(_said, plain))


def _said(column: str, record: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": _text(record, column)}]
