"""Causal language modelling: the next token of plain text, of completions, and of answers in chats."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from ftkit.data.types import Features, Limits, Row, RowError
from ftkit.errors import DataError, RecipeError
from ftkit.recipe.spec import Default, Generation, Spec
from ftkit.tasks import Column, Shape, chat, language_model, text_metrics
from ftkit.tasks.language_model import LanguageModelMetrics, generation_config

if TYPE_CHECKING:
    from ftkit.data.features import FeatureSet
    from ftkit.data.types import Batch, Items, Scores, Targets

MESSAGES = Column("messages", "a chat: a list of {role, content}; assistant messages are learned", "conversation", "chat", "dialogue")
PROMPT = Column("prompt", "text that is given", "instruction", "input", "question", "query")
COMPLETION = Column("completion", "its continuation, which is learned", "response", "output", "answer")
TEXT = Column("text", "plain text, all of it learned", "content", "document")

EXAMPLES = (  # questions and their answers
    ("What do bees make?", "Bees make honey and wax."),
    ("How many days has a week?", "A week has seven days."),
    ("Where do whales live?", "Whales live in the sea."),
    ("What is ice made of?", "Ice is frozen water."),
    ("Which season follows winter?", "Spring follows winter."),
    ("What does a clock show?", "A clock shows the time."),
    ("Who bakes bread?", "A baker bakes bread."),
    ("What falls from clouds?", "Rain and snow fall from clouds."),
    ("How many legs has a spider?", "A spider has eight legs."),
    ("What grows on an oak?", "Acorns grow on an oak."),
    ("What keeps a boat in its place?", "An anchor keeps it in its place."),
    ("When does the sun rise?", "The sun rises in the morning."),
)
T = TypeVar("T")
GENERATED_ROWS = 16  # rows generated together: the cache of keys and values grows with them


class Manner(NamedTuple):
    """What a tokenizer does to every text."""

    opens: bool  # with a beginning-of-text token
    special: dict[str, int]

    @classmethod
    def of(cls, tokenizer: Any) -> Manner:
        bos = tokenizer.bos_token_id
        return cls(bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos], chat.special_tokens(tokenizer))


class CausalLM(Spec):
    """What comes next: plain text, completions of prompts, or answers in chats."""

    kind: Literal["causal-lm"] = "causal-lm"

    shapes: ClassVar[tuple[Shape, ...]] = (Shape(MESSAGES), Shape(PROMPT, COMPLETION), Shape(TEXT))
    txt_row: ClassVar[str] = "file"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    peft_type: ClassVar[str] = "CAUSAL_LM"
    targets: ClassVar[Targets] = "classes"
    new_head: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Default]] = {
        "data.max_length": Default(1024, "TRL's SFTConfig"),
        "train.schedule": Default("cosine", "Stanford Alpaca's training command"),
        "train.warmup": Default(0.03, "Stanford Alpaca's training command"),
        "train.weight_decay": Default(0.0, "Stanford Alpaca's training command"),
        "eval.batch_size": Default(16, "16 x 1024 positions; their logits are computed a chunk at a time"),
    }
    metric_names: ClassVar[tuple[str, ...]] = (*LanguageModelMetrics.NAMES, *text_metrics.PACKAGES)
    written: ClassVar[Mapping[str, str | None]] = text_metrics.PACKAGES
    main_metric: ClassVar[str] = "loss"

    def examples(self) -> list[dict[str, Any]]:
        """Questions and answers as chats, as prompts and completions, and as plain text."""
        return [
            {
                "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
                "prompt": f"{question} ",
                "completion": answer,
                "text": f"{question} {answer}",
            }
            for question, answer in EXAMPLES
        ]

    def resolve(self, rows: Iterable[Row]) -> CausalLM:
        return self

    def check(self, tokenizer: Any) -> None:
        """Refuse a tokenizer without any way to say that a text or a turn ends."""
        if tokenizer.eos_token_id is None and tokenizer.chat_template is None:
            raise _no_end(tokenizer)

    def config_kwargs(self) -> dict[str, Any]:
        return {}

    def encode(self, row: Row, tokenizer: Any, limits: Limits) -> list[Features]:
        """Tokens whose successors are the targets; prompts have weight 0.

        Text: whole documents, beginning as the tokenizer begins them and ending in the end-of-text token.
        Longer ones become windows that overlap by one token, so that each token but the first is
        predicted once; `truncation: drop` and `error` look at documents.
        Prompt and completion are tokenised each by itself: generation sees the prompt so, too.
        Chats: see `ftkit.tasks.chat`; `truncation: left` drops the oldest exchanges first.
        """
        if "messages" in row.values:
            return self._encode_chat(row.values["messages"], tokenizer, limits)
        if tokenizer.eos_token_id is None:
            raise _no_end(tokenizer)
        if "prompt" in row.values:
            prompt = self._opening_ids(row.values["prompt"], tokenizer)
            completion = _ended(_plain_ids(row.values["completion"], tokenizer), tokenizer)
            if not prompt or completion == [tokenizer.eos_token_id]:
                raise RowError(f"the {'completion' if prompt else 'prompt'} is empty")
            trained = [False] * len(prompt) + [True] * len(completion)
            return _fit(prompt + completion, trained, limits, tokenizer)
        input_ids = _ended(self._opening_ids(row.values["text"], tokenizer), tokenizer)
        if len(input_ids) < 2:
            raise RowError("the text is empty")
        if len(input_ids) > limits.max_length + 1 and limits.truncation in ("drop", "error"):
            return _fit(input_ids, [True] * len(input_ids), limits, tokenizer)
        starts = range(0, len(input_ids) - 1, limits.max_length)
        windows = [input_ids[start : start + limits.max_length + 1] for start in starts]
        return [_features(window, [True] * len(window)) for window in windows]

    def _encode_chat(self, messages: list[dict[str, Any]], tokenizer: Any, limits: Limits) -> list[Features]:
        special = self._manner(tokenizer).special
        whole = rendered = chat.render(messages, tokenizer, special)
        if len(whole.input_ids) > limits.max_length + 1 and limits.truncation == "left":
            latest = chat.without_oldest_exchanges(messages, lambda shorter: len(chat.render(shorter, tokenizer, special).input_ids) <= limits.max_length + 1)
            rendered = chat.render(latest, tokenizer, special)
        fitted = _fit(rendered.input_ids, rendered.trained, limits, tokenizer)
        for features in fitted:
            features.truncated += len(whole.input_ids) - len(rendered.input_ids)
            features.untrained_answers = rendered.untrained_answers
        return fitted

    def items(self, model: Any, batch: Batch) -> Items:
        """The n supervised positions before the output head: it never sees the others."""
        mask = None if batch.segments is None else batch.attention_mask
        return language_model.of_one_stack(batch, model, input_ids=batch.input_ids, attention_mask=mask, use_cache=False, return_dict=True)

    def complete(self, model: Any, tokenizer: Any) -> None:
        """Generation stops at the end of a text and of a turn, whatever reads the saved model."""
        model.generation_config.eos_token_id = chat.stop_token_ids(tokenizer)
        model.generation_config.pad_token_id = tokenizer.pad_token_id

    def metrics(self, rows: Sequence[Row], features: FeatureSet) -> LanguageModelMetrics:
        return LanguageModelMetrics()

    def records(self, parts: Iterable[Scores]) -> list[dict[str, Any]]:
        return language_model.records(parts)

    def after(self, row: Row, text: str, shown: Sequence[Row]) -> Row:
        """The row behind instructions and rows with their answers, none of which is learned or measured."""
        if "messages" in row.values:
            first = [{"role": "system", "content": text}] if text else []
            of_rows = [[message for message in each.values["messages"] if not text or message["role"] != "system"] for each in (*shown, row)]
            examples = [message | {"weight": 0} if message["role"] == "assistant" else message for each in of_rows[:-1] for message in each]
            return replace(row, values={"messages": [*first, *examples, *of_rows[-1]]})
        if "prompt" not in row.values:
            raise RecipeError("--prompt and --shots are for rows with prompts and answers, not for plain text")
        examples = [each.values["prompt"] + each.values["completion"] for each in shown]
        return replace(row, values={**row.values, "prompt": "\n\n".join([*filter(None, [text]), *examples, row.values["prompt"]])})

    def judge(self, answers: Sequence[Mapping[str, Any]], rows: Sequence[Row], names: Collection[str]) -> dict[str, float]:
        """Metrics of what `predict` said to rows that end with an answer."""
        references = [self.reference(row) for row in rows]
        known = [(answer, reference) for answer, reference in zip(answers, references, strict=True) if reference is not None]
        return text_metrics.measured([answer for answer, _ in known], [reference for _, reference in known], names)

    def reference(self, row: Row) -> str | None:
        """The completion, or the answer that ends a chat; None of plain text, and of a chat that ends otherwise."""
        if "messages" not in row.values:
            return row.values.get("completion")
        last = row.values["messages"][-1]
        return last.get("content") if last["role"] == "assistant" else None

    def asked(self, row: Row) -> str:
        """The prompt, or the message that the last answer of a chat is to."""
        if "messages" not in row.values:
            return row.values.get("prompt") or row.values["text"]
        said = [str(message.get("content") or "") for message in row.values["messages"] if message["role"] != "assistant"]
        return said[-1] if said else ""

    def predict(self, model: Any, tokenizer: Any, rows: list[Row], limits: Limits, generation: Generation) -> list[dict[str, Any]]:
        """Continuations: `text`, and whether it `finished` by itself.

        Of a prompt that is too long the end is kept: `truncated` says how many tokens were not.  An answer
        for which fewer than eval.generation.max_new_tokens positions were left says how many (`max_new_tokens`).
        """
        room = _Room(model, limits, generation)
        whole = [self._prompt(row, tokenizer) for row in rows]
        for row, prompt in zip(rows, whole, strict=True):
            room.check(row, prompt)
        prompts = [self._fitted(row, prompt, tokenizer, room.prompt) for row, prompt in zip(rows, whole, strict=True)]
        stops = chat.stop_token_ids(tokenizer)
        answers: list[dict[str, Any]] = []
        was_training = model.training
        model.eval()
        for given, prompt, ids in zip(whole, prompts, self.continuations(model, tokenizer, prompts, room.answer, generation), strict=True):
            finished = ids[-1] in stops
            answers.append({"text": tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True), "finished": finished})
            if len(given) > len(prompt):
                answers[-1]["truncated"] = len(given) - len(prompt)
            if (allowed := room.answer(prompt)) < generation.max_new_tokens:
                answers[-1]["max_new_tokens"] = allowed
        model.train(was_training)
        return answers

    def continuations(
        self, model: Any, tokenizer: Any, prompts: list[list[int]], allowed: Callable[[list[int]], int], generation: Generation, **others: Any
    ) -> list[list[int]]:
        """The tokens that the model, in eval mode, writes after each prompt: at most as many as `allowed`, up to one that ends the answer, that included.

        `others` are settings of transformers' generation.
        """
        import torch

        stops = chat.stop_token_ids(tokenizer)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: list[list[int]] = [[] for _ in prompts]
        for chosen, most in _batches(order, lambda i: allowed(prompts[i])):
            with torch.inference_mode():
                cut = generation.model_copy(update={"max_new_tokens": most})
                written = _generate(model, [prompts[i] for i in chosen], stops, tokenizer, cut, **others)
            for i, ids in zip(chosen, written, strict=True):
                end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
                found[i] = ids[: end + 1]
        return found

    def reply(self, model: Any, tokenizer: Any, messages: list[dict[str, Any]], limits: Limits, generation: Generation, streamer: Any) -> str:
        """The answer to a conversation, also written token by token to `streamer`; what is too long forgets its oldest exchanges.

        Raises RecipeError for a tokenizer without a chat template.  Beams cannot be streamed: there is one.
        """
        import torch

        room = _Room(model, limits, generation)
        row = Row({"messages": messages}, "chat", len(messages))
        prompt = self._fitted(row, self._prompt(row, tokenizer), tokenizer, room.prompt)
        streamed = generation.model_copy(update={"num_beams": 1, "max_new_tokens": room.answer(prompt)})
        with torch.inference_mode():
            (ids,) = _generate(model, [prompt], chat.stop_token_ids(tokenizer), tokenizer, streamed, streamer)
        return tokenizer.decode(ids, skip_special_tokens=True)

    def _prompt(self, row: Row, tokenizer: Any) -> list[int]:
        """The tokens of the whole prompt."""
        with row.named():
            if "messages" in row.values:
                return chat.prompt_ids(row.values["messages"], tokenizer)
            ids = self._opening_ids(row.values.get("prompt") or row.values["text"], tokenizer)
            if not ids:
                raise RowError("the prompt is empty")
        return ids

    def _fitted(self, row: Row, prompt: list[int], tokenizer: Any, longest: int) -> list[int]:
        """What is left of a prompt in `longest` tokens: a chat loses its oldest exchanges, then the start is cut off, but for a beginning-of-text token."""
        if len(prompt) > longest and "messages" in row.values:
            prompt = chat.prompt_ids(row.values["messages"], tokenizer, longest)
        return _without_start(prompt, max(0, len(prompt) - longest), _keeps(prompt, tokenizer))

    def _opening_ids(self, text: str, tokenizer: Any) -> list[int]:
        """The tokens of a text that more follows: with a beginning-of-text token if the tokenizer adds one, never two, and no end."""
        ids = _plain_ids(text, tokenizer)
        bos = tokenizer.bos_token_id
        return [bos, *ids] if self._manner(tokenizer).opens and ids[:1] != [bos] else ids

    def _manner(self, tokenizer: Any) -> Manner:
        """Asked once, not for every row: where thousands of tokens were added, a tokenizer takes long to answer."""
        if tokenizer not in self._manners:
            self._manners[tokenizer] = Manner.of(tokenizer)
        return self._manners[tokenizer]

    @cached_property
    def _manners(self) -> WeakKeyDictionary[Any, Manner]:
        return WeakKeyDictionary()


class _Room:
    """How a prompt and its answer share the positions of a model."""

    def __init__(self, model: Any, limits: Limits, generation: Generation) -> None:
        from ftkit import prompts
        from ftkit.model import max_positions

        self.limits, self.asked = limits, generation.max_new_tokens
        virtual = prompts.of(model)
        self.positions = (max_positions(model.config) or sys.maxsize) - (virtual.length if virtual else 0)
        # The answer comes first, but an answer as long as the model has positions would leave nothing of the question.
        self.prompt = min(limits.max_length, max(self.positions - self.asked, self.positions // 2))

    def answer(self, prompt: list[int]) -> int:
        """Tokens that may follow a prompt."""
        return min(self.asked, self.positions - len(prompt))

    def check(self, row: Row, prompt: list[int]) -> None:
        """Refuse a prompt that would have to be cut, where data.truncation says so."""
        if self.limits.truncation == "error" and len(prompt) > self.prompt:
            raise DataError(
                f"{row.where}: the prompt has {len(prompt)} tokens, more than the {self.prompt} that "
                f"data.max_length: {self.limits.max_length} and eval.generation.max_new_tokens: {self.asked} leave for it"
            )


def _batches(order: list[int], allowed: Callable[[int], int]) -> Iterator[tuple[list[int], int]]:
    """Rows to generate together, of like length, and how many tokens each of them may get: it is the same for all."""
    for limit, group in groupby(order, key=allowed):
        rows = list(group)
        yield from ((rows[start : start + GENERATED_ROWS], limit) for start in range(0, len(rows), GENERATED_ROWS))


def _generate(
    model: Any, prompts: list[list[int]], stops: list[int], tokenizer: Any, generation: Generation, streamer: Any = None, **others: Any
) -> list[list[int]]:
    """The tokens that the model writes after each prompt, the stop token included, padding after it."""
    import torch

    length = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    input_ids = torch.tensor([[pad] * (length - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    config = generation_config(generation, stops, pad, **others)
    return language_model.generate(model, config, input_ids=input_ids, attention_mask=mask, streamer=streamer)[:, length:].tolist()


def _plain_ids(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def _no_end(tokenizer: Any) -> RecipeError:
    return RecipeError(
        f"the tokenizer of {tokenizer.name_or_path or 'this run'} has no end-of-text token (eos_token), so the model could never learn to stop; "
        "name another one (model.tokenizer: that of a causal language model)"
    )


def _fit(input_ids: list[int], trained: list[bool], limits: Limits, tokenizer: Any) -> list[Features]:
    """One feature of at most max_length positions; the last token is only a target."""
    excess = len(input_ids) - 1 - limits.max_length
    if excess <= 0:
        return [_features(input_ids, trained)]
    if limits.truncation == "drop":
        return []
    if limits.truncation == "error":
        raise RowError(f"{len(input_ids)} tokens, more than data.max_length: {limits.max_length}")
    if limits.truncation == "right":
        return [_features(input_ids[:-excess], trained[:-excess], truncated=excess)]
    keep = _keeps(input_ids, tokenizer)
    return [_features(_without_start(input_ids, excess, keep), _without_start(trained, excess, keep), truncated=excess)]


def _keeps(input_ids: list[int], tokenizer: Any) -> int:
    """How many tokens at the start stay when the start is cut off: that which begins a text."""
    return int(input_ids[0] == tokenizer.bos_token_id)


def _without_start(values: list[T], excess: int, keep: int) -> list[T]:
    return values[:keep] + values[keep + excess :]


def _features(input_ids: list[int], trained: list[bool], truncated: int = 0) -> Features:
    return Features(input_ids[:-1], input_ids[1:], [float(mark) for mark in trained[1:]], truncated=truncated)
