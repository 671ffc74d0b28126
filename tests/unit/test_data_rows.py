"""From the `data` section of a recipe to rows: columns, conversions, bad rows, splits."""

import json
import random

import pyarrow as pa
import pytest
from pyarrow import parquet

from ftkit.data.rows import ColumnMap, load_rows
from ftkit.errors import DataError, RecipeError
from ftkit.recipe.spec import Data
from ftkit.tasks import Column, Shape

TEXT = Column("text", "a text", "sentence", "premise", "review")
PAIR = Column("text_pair", "a second text", "hypothesis")
LABEL = Column("label", "its class", "class")
NOTE = Column("score", "a remark", "remark")


class Classify:
    kind = "classify"
    txt_row = "line"
    shapes = (Shape(TEXT, PAIR, LABEL), Shape(TEXT, LABEL, optional=(NOTE,)))


class Generate:
    kind = "generate"
    txt_row = "file"
    shapes = (Shape(Column("messages", "a chat")), Shape(Column("prompt", "given", "question"), Column("completion", "learned", "answer")), Shape(TEXT))


class ChatOnly:
    kind = "chat-only"
    txt_row = "file"
    shapes = (Shape(Column("messages", "a chat")),)


@pytest.fixture
def write(tmp_path):
    def write_file(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            path.write_text(rows)
        return str(path)

    return write_file


def load(task=Classify, notes=None, seed=1, **data):
    return load_rows(Data(**data), task, seed, (notes if notes is not None else []).append)


def values(rows):
    return [row.values for row in rows]


def refused(task=Classify, error=DataError, **data):
    with pytest.raises(error) as caught:
        load(task, **data)
    return str(caught.value)


# --- columns ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "columns", "found"),
    [
        ("text,label", {}, {"text": "text", "label": "label"}),
        ("Sentence,Class,idx", {}, {"text": "Sentence", "label": "Class"}),
        ("premise,hypothesis,label", {}, {"text": "premise", "text_pair": "hypothesis", "label": "label"}),
        ("text,review,label", {}, {"text": "text", "label": "label"}),
        ("review,sentence,label", {"text": "review"}, {"text": "review", "label": "label"}),
        ("x,y,z", {"text": "z", "label": "x"}, {"text": "z", "label": "x"}),
        ("premise,hypothesis,label", {"text": "premise", "label": "label"}, {"text": "premise", "label": "label"}),
        ("text,label,remark", {}, {"text": "text", "label": "label", "score": "remark"}),
    ],
)
def test_columns_are_found_or_given(write, header, columns, found):
    cells = header.split(",")
    rows = load(train=write("d.csv", f"{header}\n{header}\n"), columns=columns)
    assert rows.columns == found
    assert rows.train[0].values == {name: theirs for name, theirs in found.items() if theirs in cells}


def test_the_mapping_is_said(write):
    notes = []
    load(notes=notes, train=write("d.csv", "sentence,class,idx\na,b,1\n"))
    assert notes[0] == "columns: text from sentence; label from class; not used: idx"


def test_ambiguous_columns_are_refused_with_the_line_to_add(write):
    message = refused(train=write("d.csv", "review,sentence,label\na,b,c\n"))
    assert "text could be 'review' or 'sentence'" in message
    assert "data: {columns: {text: review, label: label}}" in message


def test_missing_columns_are_refused_with_those_there_are(write):
    message = refused(train=write("d.csv", "body of it,label\na,b\n"))
    assert "there are: body of it, label" in message
    assert "needed: text + text_pair + label, or text + label" in message
    assert 'data: {columns: {text: "body of it", label: label}}' in message
    message = refused(train=write("e.csv", "sentence,title,author\na,b,c\n"))
    assert "data: {columns: {text: sentence, label: COLUMN}}" in message


def test_a_given_column_must_be_in_the_file(write):
    message = refused(train=write("d.csv", "sentence,label\na,b\n"), columns={"text": "sentense"})
    assert "there is no column 'sentense'; did you mean 'sentence'?" in message
    assert "there are: sentence, label" in message


def test_a_given_column_must_be_one_of_the_task(write):
    message = refused(error=RecipeError, train=write("d.csv", "text,label\na,b\n"), columns={"lable": "label"})
    assert "data.columns.lable: classify has no such column; did you mean 'label'? (known: text, text_pair, label, score)" in message


def test_validation_files_must_have_the_columns_of_the_training_file(write):
    train, validation = write("t.csv", "sentence,label\na,b\n"), write("v.csv", "text,label\na,b\n")
    message = refused(train=train, validation=validation)
    assert message.startswith(f"{validation}: lacks the column 'sentence'")
    assert "there are: text, label" in message


def test_columns_that_mean_nothing_to_the_task_are_not_converted(tmp_path, monkeypatch):
    path, notes, converted = str(tmp_path / "d.parquet"), [], []
    row = {"embedding": [0.0] * 4, "Sentence": "a", "class": "b", "mine": "c"}
    parquet.write_table(pa.Table.from_pylist([row]), path)
    values = ColumnMap.values
    monkeypatch.setattr(ColumnMap, "values", lambda self, record: converted.append(list(record)) or values(self, record))
    assert load(notes=notes, train=path).train[0].values == {"text": "a", "label": "b"}
    assert load(train=path, columns={"text": "mine"}).train[0].values == {"text": "c", "label": "b"}
    assert converted == [["Sentence", "class"], ["Sentence", "class", "mine"]]
    assert notes[0].endswith("not used: embedding, mine")
    assert "there are: embedding, Sentence, class, mine" in refused(ChatOnly, train=path)


# --- bad rows -----------------------------------------------------------------------------------

BAD = [
    {"text": "fine", "label": 0},
    {"text": None, "label": 0},
    {"label": 0},
    {"text": "  ", "label": 0},
    {"text": 3, "label": 0},
    {"text": "x", "label": float("nan")},
    {"text": "half a pair \ud800", "label": 1},
]
REASONS = [
    "2: text is null",
    "3: text is null",
    "4: text is empty",
    "5: text must be text, but is a number",
    "6: label is empty",
    "7: text holds half of a surrogate pair at character 12",
]


def test_bad_rows_stop_the_run_and_are_all_counted(write):
    path = write("d.jsonl", BAD)
    message = refused(train=path)
    assert message.startswith("6 rows cannot be used:")
    for reason in REASONS:
        assert f"{path}:{reason}" in message
    assert "data.on_bad_rows: skip" in message


def test_ten_bad_rows_are_shown(write):
    message = refused(train=write("d.csv", "text,label\n" + ",x\n" * 25))
    assert message.count("text is empty") == 10
    assert "25 rows cannot be used" in message
    assert "and 15 more" in message


def test_bad_rows_can_be_left_out(write):
    path, notes = write("d.jsonl", BAD), []
    rows = load(train=path, on_bad_rows="skip", notes=notes)
    assert values(rows.train) == [{"text": "fine", "label": 0}]
    assert [line.startswith(f"{path}:{reason}") for line, reason in zip(rows.bad, REASONS, strict=True)] == [True] * 6
    assert any(note.startswith("6 bad rows left out:") for note in notes)


def test_bad_rows_of_the_file_and_of_the_task_are_told_in_order(write):
    message = refused(train=write("d.csv", "text,label\n,1\na,1,2\n,2\nb,3\n"))
    assert [line.split(":")[1] for line in message.splitlines()[1:4]] == ["1", "2", "3"]


def test_no_row_left_is_an_error(write):
    assert "no row is left" in refused(train=write("d.csv", "text,label\n,1\n"), on_bad_rows="skip")
    assert "no row can be read" in refused(train=write("d.jsonl", [1, 2]), on_bad_rows="skip")


def test_no_row_left_to_test_on_is_an_error_where_one_is_named(write, tmp_path):
    train, test = write("set/train.csv", "text,label\na,b\n"), write("set/test.csv", "text,label\n,1\n")
    assert "test: no row is left" in refused(train=train, test=test, on_bad_rows="skip")
    assert "test: no row is left" in refused(train=str(tmp_path / "set"), on_bad_rows="skip")


def test_bad_validation_rows_count_too(write):
    train, validation = write("t.csv", "text,label\na,b\n"), write("v.csv", "text,label\nc,\n")
    assert f"{validation}:1: label is empty" in refused(train=train, validation=validation)


# --- conversions --------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SYSTEM = {"role": "system", "content": "Be kind"}


@pytest.mark.parametrize(
    ("record", "messages", "name"),
    [
        ({"messages": CHAT}, CHAT, None),
        ({"messages": [{**CHAT[0], "name": None}, {**CHAT[1], "weight": 1}]}, [CHAT[0], {**CHAT[1], "weight": 1}], None),
        ({"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{}]}]},
         [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [{}]}], None),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, CHAT, "ShareGPT"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be kind"}, [SYSTEM, *CHAT], "ShareGPT"),
        ({"conversations": [{"from": "system", "value": "Be kind"}, {"from": "function_call", "value": "f()"}, {"from": "observation", "value": "1"}]},
         [SYSTEM, {"role": "assistant", "content": "f()"}, {"role": "tool", "content": "1"}], "ShareGPT"),
        ({"instruction": "Hi", "output": "Hello"}, CHAT, "Alpaca"),
        ({"instruction": "Add", "input": "1 1", "output": "2", "system": "Be kind", "history": [["Hi", "Hello"]]},
         [SYSTEM, *CHAT, {"role": "user", "content": "Add\n\n1 1"}, {"role": "assistant", "content": "2"}], "Alpaca"),
        ({"prompt": [CHAT[0]], "completion": [CHAT[1]]}, CHAT, "prompt/completion messages"),
    ],
)  # fmt: skip
def test_chat_formats_become_messages(write, record, messages, name):
    notes = []
    assert values(load(Generate, notes, train=write("d.jsonl", [record])).train) == [{"messages": messages}]
    assert (f"({name})" in notes[0]) if name else ("(" not in notes[0])


def test_plain_prompts_stay_what_they_are_where_the_task_reads_them(write):
    path = write("d.jsonl", [{"prompt": "Hi", "completion": "Hello"}])
    assert values(load(Generate, train=path).train) == [{"prompt": "Hi", "completion": "Hello"}]
    assert values(load(ChatOnly, train=path).train) == [{"messages": CHAT}]
    path = write("e.jsonl", [{"question": "Hi", "answer": "Hello"}])
    assert values(load(Generate, train=path).train) == [{"prompt": "Hi", "completion": "Hello"}]


def test_a_given_column_may_hold_sharegpt_turns(write):
    path = write("d.jsonl", [{"dialog": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}])
    assert values(load(Generate, train=path, columns={"messages": "dialog"}).train) == [{"messages": CHAT}]


def test_tasks_without_messages_see_no_chat_format(write):
    assert "its columns are not those of classify" in refused(train=write("d.jsonl", [{"instruction": "Hi", "output": "Hello"}]))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": "Hi"}, "messages must be a list of {role, content}, but is a string"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["Hi"]}, "message 1 must be {role, content}, but is a string"),
        ({"messages": [CHAT[0], {"role": "asistant", "content": "x"}]}, "message 2 has the role 'asistant'; known are assistant,"),
        ({"messages": [{"role": "user"}]}, "the content of message 1 must be text, but is null"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "message 1 holds half of a surrogate pair"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "message 1 is from 'robot'; known are human"),
        ({"conversations": None}, "conversations is empty"),
        ({"instruction": "Hi", "output": ""}, "output is empty"),
        ({"instruction": "Hi", "output": 3}, "output must be text, but is a number"),
        ({"instruction": "Hi", "output": "x", "history": ["Hi"]}, "history must be a list of [instruction, output] pairs"),
        ({"prompt": "Hi", "completion": ["x"]}, "completion must be text, but is a list"),
        ({"prompt": [CHAT[0]], "completion": 3}, "completion must be text, but is a number"),
    ],
)
def test_malformed_chats_are_bad_rows(write, record, reason):
    path = write("d.jsonl", [record])
    assert f"{path}:1: {reason}" in refused(Generate, train=path)


# --- splits -------------------------------------------------------------------------------------


def numbered(n, start=0):
    return [{"text": f"row {i}", "label": i % 3} for i in range(start, start + n)]


def test_a_fraction_is_set_aside_by_seed(write):
    path = write("d.jsonl", numbered(100))
    rows, again, other = load(train=path, validation=0.2), load(train=path, validation=0.2), load(train=path, validation=0.2, seed=2)
    assert (len(rows.train), len(rows.validation["validation"])) == (80, 20)
    assert sorted(row.number for row in [*rows.train, *rows.validation["validation"]]) == list(range(1, 101))
    assert [row.number for row in rows.train] == sorted(row.number for row in rows.train)
    assert rows.train == again.train
    assert rows.train != other.train


def test_the_split_is_the_same_everywhere(write):
    random.seed(0)
    rows = load(train=write("d.jsonl", numbered(12)), validation=0.25, seed=42)
    assert [row.number for row in rows.validation["validation"]] == [6, 11, 12]


def test_a_fraction_leaves_a_row_on_each_side(write):
    rows = load(train=write("d.jsonl", numbered(2)), validation=0.01)
    assert (len(rows.train), len(rows.validation["validation"])) == (1, 1)
    assert "leaves nothing to train on" in refused(train=write("e.jsonl", numbered(1)), validation=0.5)


def test_limit_samples_training_rows_in_file_order(write):
    path, notes = write("d.jsonl", numbered(50)), []
    rows = load(train=path, validation=0.2, limit=10, notes=notes)
    order = [row.number for row in rows.train]
    assert len(order) == 10
    assert order == sorted(order) != list(range(1, 11))
    assert len(rows.validation["validation"]) == 10
    assert "data.limit: a random sample of 10 of 40 training rows" in notes


def test_validation_and_test_files(write):
    train, first, second = write("t.jsonl", numbered(5)), write("v.jsonl", numbered(2, 10)), write("w.jsonl", numbered(3, 20))
    rows = load(train=train, validation=first, test=second)
    assert {name: len(split) for name, split in rows.validation.items()} == {"validation": 2}
    assert len(rows.test) == 3
    assert set(rows.sha256) == {train, first, second}
    rows = load(train=train, validation={"in_domain": first, "out_of_domain": second})
    assert {name: len(split) for name, split in rows.validation.items()} == {"in_domain": 2, "out_of_domain": 3}


def test_several_training_files(write):
    rows = load(train=[write("a.jsonl", numbered(2)), write("b.csv", "text,label\nx,1\n")])
    assert [row.where.rpartition("/")[2] for row in rows.train] == ["a.jsonl:1", "a.jsonl:2", "b.csv:1"]


def test_a_directory_named_after_splits_is_used_whole(write, tmp_path):
    write("set/train.jsonl", numbered(4)), write("set/dev.jsonl", numbered(2, 10)), write("set/test.jsonl", numbered(3, 20))
    folder = str(tmp_path / "set")
    rows = load(train=folder)
    assert (len(rows.train), len(rows.validation["validation"]), len(rows.test)) == (4, 2, 3)
    rows = load(train=folder, validation=0.5)
    assert (len(rows.train), len(rows.validation["validation"])) == (2, 2)
    rows = load(train=write("other.jsonl", numbered(1)), validation=folder, test=folder)
    assert (len(rows.train), len(rows.validation["validation"]), len(rows.test)) == (1, 2, 3)


def test_a_directory_without_the_split_asked_for(write, tmp_path):
    write("set/test.jsonl", numbered(4))
    assert "has no split 'train'; there are: test" in refused(train=str(tmp_path / "set"))


def test_no_validation_is_said(write):
    notes = []
    assert load(train=write("d.jsonl", numbered(2)), notes=notes).validation == {}
    assert any(note.startswith("no validation data") for note in notes)


def test_rows_that_also_stand_in_train_are_counted(write):
    notes = []
    relabelled = [{"text": "row 1", "label": "another"}, {"text": "row 77", "label": 0}]
    load(train=write("t.jsonl", numbered(5)), validation=write("v.jsonl", relabelled), notes=notes)
    assert "validation: 1 of 2 rows with the same inputs as a training row" in notes


def test_txt_files(write):
    assert values(load(Generate, train=write("d.txt", "one\n\ntwo\n")).train) == [{"text": "one\n\ntwo\n"}]
    assert values(load(Generate, train=write("d.txt", "one\n\ntwo\n"), format="lines").train) == [{"text": "one"}, {"text": "two"}]
