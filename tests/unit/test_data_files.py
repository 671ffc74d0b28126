"""Every format and every way a file can be wrong."""

import gzip
import json
import os

import pyarrow as pa
import pytest
from pyarrow import parquet

from ftkit.data import files
from ftkit.errors import DataError, DiskError


@pytest.fixture
def read(tmp_path):
    def read_file(name, content, format=None, txt_row="line", notes=None):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return files.read(path, format, txt_row, (notes if notes is not None else []).append)

    return read_file


def rows(table):
    return [record for _, record in table.records]


def numbers(table):
    return [number for number, _ in table.records]


TWO = [{"text": "one, or two", "label": "a"}, {"text": "zwei", "label": "b"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.csv", 'text,label\n"one, or two",a\nzwei,b\n'),
        ("d.csv", '\ufefftext,label\r\n"one, or two",a\r\n\r\nzwei,b'),
        ("d.tsv", "text\tlabel\none, or two\ta\nzwei\tb\n"),
        ("d.jsonl", "\n".join(map(json.dumps, TWO))),
        ("d.ndjson", "\ufeff" + "\n\n".join(map(json.dumps, TWO)) + "\n"),
        ("d.json", json.dumps(TWO)),
        ("d.JSON", "\ufeff" + json.dumps({"version": 1, "data": TWO})),
        ("d.csv.gz", gzip.compress(b'text,label\n"one, or two",a\nzwei,b\n', mtime=0)),
        ("d.jsonl.gz", gzip.compress("\n".join(map(json.dumps, TWO)).encode(), mtime=0)),
    ],
)
def test_formats_give_the_same_rows(read, name, content):
    table = read(name, content)
    assert rows(table) == TWO
    assert table.columns == ["text", "label"]
    assert table.bad == []
    assert len(table.sha256) == 64


def test_parquet(tmp_path):
    path = tmp_path / "d.parquet"
    parquet.write_table(pa.Table.from_pylist([{**row, "turns": [{"role": "user"}]} for row in TWO]), path)
    table = files.read(path, None, "line", print)
    assert rows(table) == [{**row, "turns": [{"role": "user"}]} for row in TWO]
    assert numbers(table) == [1, 2]


def test_parquet_names_rows_that_are_not_utf8(tmp_path):
    path = tmp_path / "d.parquet"
    parquet.write_table(pa.table({"text": pa.array([b"good", b"b\xffd", b"fine"]).view(pa.string())}), path)
    table = files.read(path, None, "line", print)
    assert numbers(table) == [1, 3]
    assert table.flaws() == [f"{path}:2: not UTF-8: byte 0xff at offset 1 of a value"]


def test_a_damaged_parquet_file_is_a_data_error(tmp_path):
    path = tmp_path / "d.parquet"
    parquet.write_table(pa.table({"text": [f"row {i}" for i in range(500)]}), path)
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"d\.parquet: not a readable Parquet file"):
        files.read(path, None, "line", print)


def test_numbers_are_lines_for_jsonl_and_records_for_csv(read):
    assert numbers(read("d.jsonl", '\n{"a": 1}\n\n{"a": 2}\n')) == [2, 4]
    assert numbers(read("d.txt", "\nfirst\n\nsecond\n")) == [2, 4]
    assert numbers(read("d.csv", 'text\n"one\nrow"\ntwo\n')) == [1, 2]


def test_txt_is_lines_or_a_file_as_the_task_says(read):
    text = "\ufeffA line.\r\n\nAnother.\n"
    assert rows(read("d.txt", text, txt_row="line")) == [{"text": "A line."}, {"text": "Another."}]
    assert rows(read("d.txt", text, txt_row="file")) == [{"text": "A line.\r\n\nAnother.\n"}]
    assert rows(read("d.txt", text, format="lines", txt_row="file")) == [{"text": "A line."}, {"text": "Another."}]


@pytest.mark.parametrize("name", ["d.txt", "d.txt.gz"])
def test_text_is_read_in_parts_of_whole_lines(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "PART_BYTES", 8)
    content = "\ufeffone\ntwo\r\n\nthree and four\nfünf".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert list(files.read_text(tmp_path / name)) == ["one\ntwo\r\n", "\nthree and four\n", "fünf"]
    (tmp_path / "bad.txt").write_bytes(content[:-1] + b"\xff")
    with pytest.raises(DataError, match=rf"bad\.txt: not UTF-8: byte 0xff at byte offset {len(content) - 1}"):
        list(files.read_text(tmp_path / "bad.txt"))


SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Bern",
            "paragraphs": [
                {
                    "context": "Anna lives in Bern.",
                    "qas": [
                        {"id": "a", "question": "Who?", "answers": [{"text": "Anna", "answer_start": 0}], "is_impossible": False},
                        {"id": "b", "question": "When?", "answers": [], "plausible_answers": [{"text": "Bern", "answer_start": 14}], "is_impossible": True},
                    ],
                }
            ],
        },
        {"title": "Oslo", "paragraphs": [{"context": "It rained.", "qas": [{"id": "c", "question": "What?", "answers": []}, "not a question"]}]},
    ],
}


def test_nested_questions_are_rows_with_their_context(read):
    table = read("d.json", json.dumps(SQUAD))
    assert [(row["question"], row["context"], row["answers"]) for row in rows(table)] == [
        ("Who?", "Anna lives in Bern.", [{"text": "Anna", "answer_start": 0}]),
        ("When?", "Anna lives in Bern.", []),
        ("What?", "It rained.", []),
    ]
    assert numbers(table) == [1, 2, 3]
    assert table.bad == [(4, "a row must be an object with named values, but is a string")]
    assert table.columns[:4] == ["context", "id", "question", "answers"]


@pytest.mark.parametrize(
    ("article", "reason"),
    [
        ({"paragraphs": {}}, "article 1 has no list of paragraphs"),
        ({"paragraphs": [{"context": "a"}]}, "a paragraph of article 1 has no list of qas"),
        ({"paragraphs": ["a"]}, "a paragraph of article 1 has no list of qas"),
    ],
)
def test_what_is_nested_otherwise_is_refused(read, article, reason):
    with pytest.raises(DataError, match=rf"d\.json: {reason}; SQuAD's form is "):
        read("d.json", json.dumps({"data": [article]}))


CONLL = "-DOCSTART- -X- O O\n\nEU NNP I-NP B-ORG\nrejects VBZ I-VP O\n\n\n# NN I-NP O\n"


@pytest.mark.parametrize("content", [CONLL, CONLL.replace(" ", "\t"), CONLL.rstrip("\n"), "\ufeff" + CONLL.replace("\n", "\r\n")])
def test_conll_has_a_word_a_line(read, content):
    table = read("d.conll", content)
    assert rows(table) == [{"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}, {"tokens": ["#"], "tags": ["O"]}]
    assert numbers(table) == [3, 7]
    assert table.columns == ["tokens", "tags"]


def test_conllu_has_words_and_their_parts_of_speech(read):
    def line(*first):
        return "\t".join([*first, *["_"] * (10 - len(first))]) + "\n"

    content = "# text = vámonos\n" + line("1-2", "vámonos") + line("1", "vamos", "ir", "VERB") + line("2", "nos", "nosotros", "PRON") + "\n"
    content += "# text = x\n" + line("1", "of course", "x", "ADV") + line("1.1", "hidden", "x", "X")
    table = read("d.conllu", content)
    assert rows(table) == [{"tokens": ["vamos", "nos"], "tags": ["VERB", "PRON"]}, {"tokens": ["of course"], "tags": ["ADV"]}]
    assert numbers(table) == [1, 6]


@pytest.mark.parametrize(
    ("name", "content", "number", "reason"),
    [
        ("d.conll", "a O\n\nb X O\nc O\n", 3, "different numbers of columns"),
        ("d.conll", "a O\n\nb\nc\n", 3, "or too few"),
        ("d.conll", b"a O\n\nb\xff O\nc O\n", 3, "not UTF-8: byte 0xff at byte offset 6"),
        ("d.conllu", "1\ta\ta\tX\n", 1, "different numbers of columns"),
    ],
)
def test_a_sentence_that_is_not_in_columns_is_a_bad_row(read, name, content, number, reason):
    table = read(name, content)
    assert [bad[0] for bad in table.bad] == [number]
    assert reason in table.bad[0][1]


def test_format_overrides_the_ending(read):
    assert rows(read("d.data", '{"text": "x"}\n', format="jsonl")) == [{"text": "x"}]


def test_tsv_takes_quotes_as_characters_where_they_do_not_delimit(read):
    notes = []
    literal = read("glue.tsv", 'sentence\tlabel\n"Oh!" he said\t1\nan inch is 1"\t0\n', notes=notes)
    assert [row["sentence"] for row in rows(literal)] == ['"Oh!" he said', 'an inch is 1"']
    assert "quotes" in notes[0]
    quoted = read("excel.tsv", 'sentence\tlabel\n"say ""a\tb"""\t1\n')
    assert rows(quoted) == [{"sentence": 'say "a\tb"', "label": "1"}]


def test_quotes_of_a_tsv_do_not_swallow_whole_rows(read):
    notes = []
    swallowed = read("d.tsv", 'sentence\tlabel\n"Hello\t1\nplain\t0\nworld"\t0\n', notes=notes)
    assert [row["sentence"] for row in rows(swallowed)] == ['"Hello', "plain", 'world"']
    assert "kept as characters" in notes[0]


@pytest.mark.parametrize("content", ['sentence\tlabel\n"Hello\nworld"\t0\n', 'sentence\n"Hello\nworld"\n', '"sentence"\t"n\no"\n"Hello\nworld"\t"1\n2"\n'])
def test_a_field_of_a_tsv_may_have_several_lines(read, content):
    assert [row["sentence"] for row in rows(read("d.tsv", content))] == ["Hello\nworld"]


def test_a_field_may_be_longer_than_the_csv_module_likes(read):
    assert len(rows(read("d.csv", "text\n" + "x" * 200_000))[0]["text"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "number", "reason"),
    [
        ("d.csv", "text,label\na,1\nb\nc,3\n", 2, "1 fields where the header has 2 (line 3)"),
        ("d.csv", 'text,label\n"two\nlines",1\nb,2,x\n', 2, "3 fields where the header has 2 (line 4)"),
        ("d.csv", 'text,label\na,1\n"b,2\nc,3\n', 2, "a quote is opened and never closed (lines 3 to 4)"),
        ("d.csv", 'text,label\n"a"b,1\nc,2\n', 1, "expected after"),
        ("d.csv", b"text,label\na,1\ncaf\xe9,2\n", 2, "not UTF-8: byte 0xe9 at byte offset 18 (line 3)"),
        ("d.jsonl", '{"a": 1}\n{"a": \n', 2, "not JSON: Expecting value at column 7"),
        ("d.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', 2, "not UTF-8: byte 0xff at byte offset 16"),
        ("d.jsonl", '{"a": 1}\n[1]\n', 2, "a row must be an object with named values, but is a list"),
        ("d.jsonl", '{"a": 1}\n' + "[" * 100_000, 2, "JSON nested too deeply"),
        ("d.json", '[{"a": 1}, "b"]', 2, "but is a string"),
        ("d.txt", b"fine\nb\xc3\n", 2, "byte 0xc3 at byte offset 6"),
    ],
)
def test_a_bad_row_is_named_and_the_others_are_kept(read, name, content, number, reason):
    table = read(name, content)
    assert [bad for bad, _ in table.bad] == [number]
    assert reason in table.bad[0][1]
    assert table.records


def test_a_txt_file_that_is_not_utf8_is_one_bad_row(read):
    assert read("d.txt", "text".encode("utf-16"), txt_row="file").bad == [(1, "not UTF-8: byte 0xff at byte offset 0; this looks like UTF-16")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", "", "the file is empty"),
        ("d.csv", "\n\n", "the file has no rows"),
        ("d.csv", "text,label\n", "the file has no rows after its header (text, label)"),
        ("d.csv", "text,text\na,b\n", "header, line 1: the column 'text' stands there twice"),
        ("d.csv", b"te\xe9xt\na\n", "header, line 1: not UTF-8: byte 0xe9 at byte offset 2"),
        ("d.jsonl", "\n", "the file has no rows"),
        ("d.txt", " \n", "the file has no rows"),
        ("d.json", "[]", "the file has no rows"),
        ("d.json", '{"a": 1}\n{"a": 2}', "d.json:2:1: not JSON: Extra data; if each line is a row of its own, set data.format: jsonl"),
        ("d.json", '{"rows": []}', "this is an object with the keys rows"),
        ("d.json", "3", "expected a list of rows"),
        ("d.json", b'["\xff"]', "not UTF-8: byte 0xff at byte offset 2"),
        ("d.parquet", "no parquet", "not a readable Parquet file"),
        ("d.csv.gz", "no gzip", "not a complete gzip file"),
        ("d.csv.gz", gzip.compress(b"text\n" + bytes(range(97, 120)) * 50, mtime=0)[:-12], "not a complete gzip file"),
        ("d.xlsx", "PK", "the ending '.xlsx' says nothing about the format"),
        ("data", "x", "the ending '(none)' says nothing about the format"),
    ],
)
def test_a_bad_file_is_a_data_error(read, name, content, message):
    with pytest.raises(DataError) as caught:
        read(name, content)
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert caught.value.code == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("text\na\n")
    path.chmod(0)
    with pytest.raises(DiskError, match="Permission denied"):
        files.read(path, None, "line", print)


def find(path, split="train", format=None):
    notes = []
    found = files.find(str(path), split, format, notes.append)
    return {name: [file.name for file in paths] for name, paths in found.items()}, notes


def touch(directory, *names):
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")


def test_a_directory_is_its_files_in_order(tmp_path):
    touch(tmp_path, "b.txt", "a.txt", ".hidden.txt", "README.md")
    assert find(tmp_path, "validation") == ({"validation": ["a.txt", "b.txt"]}, [])


def test_files_and_directories_named_after_splits(tmp_path):
    touch(tmp_path, "train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "dev.parquet", "test/b.parquet", "test/a.parquet", "more.csv")
    found, notes = find(tmp_path)
    assert found == {
        "train": ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        "validation": ["dev.parquet"],
        "test": ["a.parquet", "b.parquet"],
    }
    assert notes == [f"{tmp_path}: left out, since other files are named after splits: more.csv"]


@pytest.mark.parametrize("names", [("a.csv", "b.jsonl"), ("train.csv", "train.jsonl"), ("train.csv", "train/b.jsonl"), ("dev.csv", "train.jsonl")])
def test_mixed_formats_need_a_choice(tmp_path, names):
    touch(tmp_path, *names)
    with pytest.raises(DataError, match=r"mixes csv, jsonl files; choose with\n  data: {format: csv}"):
        find(tmp_path)
    assert find(tmp_path, format="jsonl")[0] == {"train": [names[1].rpartition("/")[2]]}


def test_nothing_there(tmp_path):
    touch(tmp_path, "train.csv", "empty/README.md")
    with pytest.raises(DataError, match=r"no such file or directory; did you mean .*train\.csv\?"):
        find(tmp_path / "trian.csv")
    with pytest.raises(DataError, match=r"there is no directory .*nowhere either"):
        find(tmp_path / "nowhere" / "train.csv")
    with pytest.raises(DataError, match="no data files in this directory"):
        find(tmp_path / "empty")
    with pytest.raises(DataError, match="a data set on the hub is written org/name"):
        find("imdb")


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "d.csv")
    with pytest.raises(DataError, match="is not a regular file"):
        find(tmp_path / "d.csv")
