"""Which tokens of a chat are learned, for templates in the shapes of the well-known families."""

import pytest

from ftkit.data.types import RowError
from ftkit.errors import RecipeError
from ftkit.recipe.spec import TrainedTokenizer
from ftkit.tasks import chat
from ftkit.tokenizer import train_tokenizer

SENTENCES = ["The library opens at nine.", "Where do I return a book?", "You can return it at the front desk.", "assistant user system model"] * 5

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
COHERE = (
    "{% for m in messages %}<|turn|>{{ m.role }}"
    "{% if m.role == 'assistant' %}<|response|>{{ m.content }}<|/response|>{% else %}{{ m.content }}{% endif %}<|/turn|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant<|response|>{% endif %}"
)
QWEN3 = (  # an empty thought in the last answer only; older ones lose theirs
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_THINK = QWEN3.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")
DEEPSEEK_R1 = (  # drops every thought, and opens one in the generation prompt
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
TOOLS = CHATML.replace(
    "{{ m.content }}<|im_end|>", "{{ m.content }}{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}</call>{% endfor %}<|im_end|>"
)
REASONS = CHATML.replace(
    "{{ m.content }}<|im_end|>", "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>"
)
NEVER_ENDS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"

SPECIAL = [
    *("<|bos|>", "<|header|>", "<|/header|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    *("<|turn|>", "<|/turn|>", "<|response|>", "<|/response|>", "<|User|>", "<|Assistant|>"),
]


@pytest.fixture(scope="module")
def base():
    tokenizer = train_tokenizer(TrainedTokenizer(train="data", vocab_size=330), SENTENCES)
    tokenizer.add_special_tokens({"bos_token": "<|bos|>", "additional_special_tokens": [*tokenizer.extra_special_tokens, *SPECIAL]})
    return tokenizer


@pytest.fixture
def tokenizer(base):
    """`base`, whose template a test may set."""
    before = base.chat_template
    yield base
    base.chat_template = before


def turns(*texts, system=None):
    """Messages of a user and an assistant in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def learned(rendered, tokenizer):
    """The learned runs of tokens, as text."""
    runs, before = [], False
    for token, mark in zip(rendered.input_ids, rendered.trained, strict=True):
        if mark and not before:
            runs.append([])
        if mark:
            runs[-1].append(token)
        before = mark
    return [tokenizer.decode(run) for run in runs]


TWO_TURNS = turns("Where do I return a book?", "At the desk.", "When?", "At nine.")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["At the desk.<|im_end|>", "At nine.<|im_end|>"]),
        (LLAMA3, ["At the desk.<|eot_id|>", "At nine.<|eot_id|>"]),
        (GEMMA, ["At the desk.<end_of_turn>", "At nine.<end_of_turn>"]),
        (PHI3, ["At the desk.<|end|>", "At nine.<|end|>"]),
        (MISTRAL, [" At the desk.<|eos|>", " At nine.<|eos|>"]),
        (ZEPHYR, ["At the desk.<|eos|>", "At nine.<|eos|>"]),
        (COHERE, ["At the desk.<|/response|><|/turn|>", "At nine.<|/response|><|/turn|>"]),
        (QWEN3, ["<think>\n\n</think>\n\nAt nine.<|im_end|>"]),
        (NO_THINK, ["At nine.<|im_end|>"]),
    ],
    ids=["chatml", "llama3", "gemma", "phi3", "mistral", "zephyr", "cohere", "qwen3", "qwen3-no-think"],
)
def test_answers_and_the_end_of_their_turn_are_learned_and_nothing_else(tokenizer, template, expected):
    tokenizer.chat_template = template
    rendered = chat.render(TWO_TURNS, tokenizer)
    assert learned(rendered, tokenizer) == expected
    assert rendered.trained[-1], "what follows the last answer is cut off"
    assert rendered.untrained_answers == 2 - len(expected)
    whole = tokenizer.apply_chat_template(TWO_TURNS, return_dict=False)
    assert rendered.input_ids == whole[: len(rendered.input_ids)]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, PHI3, MISTRAL, ZEPHYR, COHERE, QWEN3, NO_THINK])
def test_the_given_part_is_what_generation_is_prompted_with(tokenizer, template):
    tokenizer.chat_template = template
    rendered = chat.render(TWO_TURNS, tokenizer)
    prompt = chat.prompt_ids(TWO_TURNS, tokenizer)
    assert chat.prompt_ids(TWO_TURNS[:-1], tokenizer) == prompt
    assert rendered.input_ids[: len(prompt)] == prompt
    assert all(rendered.trained[len(prompt) :])


@pytest.mark.parametrize("template", [LLAMA3, GEMMA, MISTRAL])
def test_one_beginning_of_text(tokenizer, template):
    tokenizer.chat_template = template
    assert chat.render(TWO_TURNS, tokenizer).input_ids.count(tokenizer.bos_token_id) == 1


def test_a_prompt_that_repeats_the_answer_stays_untrained(tokenizer):
    tokenizer.chat_template = CHATML
    assert learned(chat.render(turns("At nine.", "At nine.", system="At nine."), tokenizer), tokenizer) == ["At nine.<|im_end|>"]


def test_weights_of_messages_choose_the_answers(tokenizer):
    tokenizer.chat_template = CHATML
    first, last = ([{**m, "weight": int(i == place)} if m["role"] == "assistant" else m for i, m in enumerate(TWO_TURNS)] for place in (1, 3))
    assert learned(chat.render(first, tokenizer), tokenizer) == ["At the desk.<|im_end|>"]
    assert learned(chat.render(last, tokenizer), tokenizer) == ["At nine.<|im_end|>"]
    with pytest.raises(RowError, match="no assistant message"):
        chat.render([{**m, "weight": 0} for m in TWO_TURNS], tokenizer)
    with pytest.raises(RowError, match=r"message 2: weight must be 0 or 1, not 0\.5"):
        chat.render([TWO_TURNS[0], {**TWO_TURNS[1], "weight": 0.5}], tokenizer)


def test_trailing_questions_are_cut_off(tokenizer):
    tokenizer.chat_template = CHATML
    assert chat.render([*TWO_TURNS, {"role": "user", "content": "Thanks"}], tokenizer) == chat.render(TWO_TURNS, tokenizer)


def test_reasoning_of_the_last_answer_is_learned_and_older_reasoning_is_not(tokenizer):
    tokenizer.chat_template = QWEN3
    messages = turns("Where?", "<think>\nHm.\n</think>\n\nHere.", "When?", "<think>\nNine?\n</think>\n\nAt nine.")
    rendered = chat.render(messages, tokenizer)
    assert learned(rendered, tokenizer) == ["<think>\nNine?\n</think>\n\nAt nine.<|im_end|>"]
    assert rendered.untrained_answers == 1
    assert "Hm." not in tokenizer.decode(rendered.input_ids)


def test_a_template_that_prompts_otherwise_than_it_renders_is_refused(tokenizer):
    tokenizer.chat_template = DEEPSEEK_R1
    with pytest.raises(RowError, match=r"prompts for an answer with '<\|Assistant\|><think>\\n', but renders the answer differently"):
        chat.render(turns("When?", "At nine."), tokenizer)


def test_an_answer_that_the_template_shortens_is_refused(tokenizer):
    tokenizer.chat_template = DEEPSEEK_R1.replace("<think>\n{% endif %}", "{% endif %}")
    assert learned(chat.render(turns("When?", "At nine."), tokenizer), tokenizer) == ["At nine.<|eos|>"]
    with pytest.raises(RowError, match="leaves out or rewrites part of the answer '<think>Nine"):
        chat.render(turns("When?", "<think>Nine?</think>At nine."), tokenizer)


@pytest.mark.parametrize("template", [NEVER_ENDS, CHATML.replace("<|im_end|>", "<|im_stop|>")], ids=["plain", "not a token"])
def test_a_template_that_never_ends_the_turn_is_refused(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(RecipeError, match=r"never learn to stop; let the template write <\|eos\|> after each answer"):
        chat.render(turns("When?", "At nine."), tokenizer)
    assert chat.stop_token_ids(tokenizer) == [tokenizer.eos_token_id]


def test_a_tokenizer_without_template_names_both_ways_out(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(RecipeError, match=r"no chat template.*model\.tokenizer.*data\.columns: \{prompt: \.\.\., completion: \.\.\.\}"):
        chat.render(TWO_TURNS, tokenizer)
    assert chat.stop_token_ids(tokenizer) == [tokenizer.eos_token_id]


def test_messages_that_the_template_refuses(tokenizer):
    tokenizer.chat_template = GEMMA
    with pytest.raises(RowError, match="System role not supported"):
        chat.render(turns("When?", "At nine.", system="Be brief."), tokenizer)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (turns("When?"), "no assistant message"),
        ([{"role": "assistant", "content": "Hello."}], "no prompt for it"),
        (turns("When?", "  "), r"message 2 \(assistant\) is empty"),
    ],
)
def test_chats_without_anything_to_learn(tokenizer, messages, reason):
    tokenizer.chat_template = CHATML
    with pytest.raises(RowError, match=reason):
        chat.render(messages, tokenizer)


CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": {}}}]}
CALLED = [{"role": "user", "content": "When?"}, CALL, {"role": "tool", "content": "9"}, {"role": "assistant", "content": "At nine."}]


def test_tool_calls_are_learned_as_the_template_writes_them(tokenizer):
    tokenizer.chat_template = TOOLS
    assert learned(chat.render(CALLED, tokenizer), tokenizer) == ["<call>clock</call><|im_end|>", "At nine.<|im_end|>"]


@pytest.mark.parametrize("messages", [CALLED, CALLED[:2]], ids=["earlier", "last"])
def test_tool_calls_that_the_template_ignores_are_refused(tokenizer, messages):
    """What would be learned is the end of the turn alone: to say nothing."""
    tokenizer.chat_template = CHATML
    with pytest.raises(RowError, match=r"message 2: the chat template ignores its tool_calls, which would not be learned"):
        chat.render(messages, tokenizer)
    given = [{**m, "weight": 0} if m is CALL else m for m in [*CALLED[:3], *turns("When?", "At nine.")]]
    assert learned(chat.render(given, tokenizer), tokenizer) == ["At nine.<|im_end|>"]


def test_a_template_that_refuses_an_answer_without_its_tool_calls_does_not_ignore_them(tokenizer):
    tokenizer.chat_template = TOOLS.replace(
        "{{ m.content }}", "{{ raise_exception('nothing said') if m.role == 'assistant' and not m.content and not m.tool_calls }}{{ m.content }}"
    )
    assert learned(chat.render(CALLED, tokenizer), tokenizer) == ["<call>clock</call><|im_end|>", "At nine.<|im_end|>"]


def test_reasoning_that_the_template_never_shows_is_refused(tokenizer):
    messages = [{**m, "reasoning_content": "Hm."} if m["role"] == "assistant" else m for m in TWO_TURNS]
    tokenizer.chat_template = REASONS  # of the last answer only
    rendered = chat.render(messages, tokenizer)
    assert learned(rendered, tokenizer) == ["<think>Hm.</think>At nine.<|im_end|>"]
    assert rendered.untrained_answers == 1
    tokenizer.chat_template = CHATML
    with pytest.raises(RowError, match=r"message 2: the chat template ignores its reasoning_content"):
        chat.render(messages, tokenizer)


def test_an_empty_answer_can_be_part_of_a_prompt(tokenizer):
    tokenizer.chat_template = CHATML
    assert tokenizer.decode(chat.prompt_ids(turns("When?", "", "When?"), tokenizer)).count("assistant\n<|im_end|>") == 1


def test_a_greeting_before_any_question_is_counted_and_not_learned(tokenizer):
    tokenizer.chat_template = CHATML
    rendered = chat.render([{"role": "assistant", "content": "Hello."}, *turns("When?", "At nine.")], tokenizer)
    assert learned(rendered, tokenizer) == ["At nine.<|im_end|>"]
    assert rendered.untrained_answers == 1


def test_a_token_across_the_start_of_an_answer_is_learned(tokenizer):
    """The prompt ends in a space that the tokenizer joins to the first word: only the model can write that token."""
    tokenizer.chat_template = NEVER_ENDS.replace("{{ m.content }}\n", "{{ m.content }}{{ eos_token }}")
    rendered = chat.render(turns("When?", "book"), tokenizer)
    assert learned(rendered, tokenizer) == [" book<|eos|>"]
    assert tokenizer.convert_ids_to_tokens(rendered.input_ids)[-2] == "Ġbook"


def test_offsets_that_leave_out_white_space_do_not_shift_the_answer(tokenizer):
    """RoBERTa-like tokenizers trim offsets: a space before an answer then seems to be an empty token at its start."""
    from tokenizers import processors

    tokenizer.chat_template = NEVER_ENDS.replace("{{ m.content }}\n", "{{ m.content }}{{ eos_token }}")
    tokenizer._tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    try:
        offsets = tokenizer("a 9", return_offsets_mapping=True)["offset_mapping"]
        assert offsets == [(0, 1), (2, 2), (2, 3)]
        assert learned(chat.render(turns("When?", "9"), tokenizer), tokenizer) == ["9<|eos|>"]
    finally:
        tokenizer._tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)


def test_a_tokenizer_without_offsets_gives_the_same(tokenizer):
    class Slow:
        """The same tokenizer, as one written in Python: it cannot say which characters a token stands for."""

        is_fast = False

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, text, return_offsets_mapping=False, **options):
            if return_offsets_mapping:
                raise NotImplementedError
            return tokenizer(text, **options)

    for template in (CHATML, LLAMA3, PHI3, QWEN3):
        tokenizer.chat_template = template
        assert chat.render(TWO_TURNS, Slow()) == chat.render(TWO_TURNS, tokenizer)


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>"), (PHI3, "<|end|>"), (COHERE, "<|/turn|>"), (MISTRAL, "<|eos|>")])
def test_generation_stops_at_the_end_of_turn_and_of_text(tokenizer, template, end):
    tokenizer.chat_template = template
    ids = chat.stop_token_ids(tokenizer)
    assert set(ids) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)}
    assert len(ids) == len(set(ids))


def contents(messages):
    return [message["content"] for message in messages]


def test_the_oldest_exchanges_go_first_and_the_system_message_stays():
    messages = turns("a", "b", "c", "d", "e", "f", system="s")
    assert contents(chat.without_oldest_exchanges(messages, lambda shorter: len(shorter) <= 5)) == ["s", "c", "d", "e", "f"]
    assert contents(chat.without_oldest_exchanges(messages, lambda shorter: len(shorter) <= 4)) == ["s", "e", "f"]
    assert contents(chat.without_oldest_exchanges(messages, lambda shorter: False)) == ["s", "e", "f"], "the last one stays, whatever its length"
    assert contents(chat.without_oldest_exchanges(turns("a", "b", "c"), lambda shorter: False)) == ["a", "b", "c"], "c has no answer"


def test_an_exchange_goes_only_if_an_answer_to_learn_is_left():
    messages = turns("a", "b", "c", "d")
    messages[3]["weight"] = 0
    assert contents(chat.without_oldest_exchanges(messages, lambda shorter: False)) == ["a", "b", "c", "d"]


def test_few_lengths_are_tried():
    tried = []
    messages = turns(*map(str, range(400)))
    left = chat.without_oldest_exchanges(messages, lambda shorter: tried.append(shorter) or len(shorter) <= 100)
    assert len(left) == 100
    assert len(tried) < 10
