"""What chat formats mean by the turns that they hold."""

import pytest

from ftkit.data.formats import PROMPT_COMPLETION, checked
from ftkit.data.types import RowError

ASKED, ANSWERED = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def test_answers_inside_a_prompt_are_given_and_not_learned():
    messages = PROMPT_COMPLETION.messages({"prompt": [ASKED, ANSWERED, ASKED], "completion": [ANSWERED, ASKED, ANSWERED]})
    assert messages == [ASKED, {**ANSWERED, "weight": 0}, ASKED, ANSWERED, ASKED, ANSWERED]
    shared = PROMPT_COMPLETION.messages({"prompt": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}, ASKED], "completion": "Bye"})
    assert shared == [ASKED, {**ANSWERED, "weight": 0}, ASKED, {**ANSWERED, "content": "Bye"}]


def test_a_prompt_may_say_itself_what_is_learned():
    weighted = {**ANSWERED, "weight": 1}
    assert PROMPT_COMPLETION.messages({"prompt": [ASKED, weighted, ASKED], "completion": [ANSWERED]})[1] == weighted


def test_negatives_are_texts():
    assert checked("negative", "soup") == ["soup"]
    assert checked("negative", ["soup", "two boats"]) == ["soup", "two boats"]
    for value, message in ((["soup", " "], "text 2 of negative is empty"), (7, "text 1 of negative must be text, but is a number")):
        with pytest.raises(RowError, match=message):
            checked("negative", value)
