"""Local data files -> tables of records, in the format their ending (or the recipe) names."""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import json
import re
import sys
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from ftkit.errors import DataError, DiskError, RecipeError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import pyarrow as pa

    from ftkit.data.ondisk import Spool

    Note = Callable[[str], None]
    Poll = Callable[[], None]
    Choose = Callable[[list[str]], list[str]]  # which of these columns are wanted

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "txt",
    ".conll": "conll",
    ".conllu": "conllu",
}
SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation", "test": "test"}
WHOLE = {"json": "write it as jsonl, an object a line", "txt": "with data.format: lines, each line of a txt file is a row"}
TEXTUAL = ("decimal", "date", "time", "duration")  # in the names of Arrow's types
PART_BYTES = 2**20  # of a text that is read in parts
_SPLIT_NAME = re.compile(rf"({'|'.join(SPLITS)})(?:[-_.].*)?", re.IGNORECASE)


@dataclass(slots=True)
class Table:
    """What a file (or a split of a hub data set) holds, before anyone asked what it means."""

    source: str
    columns: list[str] = field(default_factory=list)
    records: list[tuple[int, dict[str, Any]]] | Spool[tuple[int, dict[str, Any]]] = field(default_factory=list)  # Row.number and the record
    bad: list[tuple[int, str]] = field(default_factory=list)  # Row.number and the reason why it cannot be used
    sha256: str = ""

    def reject(self, number: int, reason: str) -> None:
        self.bad.append((number, reason))

    def flaws(self) -> list[str]:
        """What cannot be used, each as "file:row: reason"."""
        return [f"{self.source}:{number}: {reason}" for number, reason in sorted(self.bad)]

    def add(self, number: int, record: Any) -> None:
        """Take a JSON value as a record; columns are the keys in order of appearance."""
        if not isinstance(record, dict):
            self.reject(number, f"a row must be an object with named values, but is {json_type(record)}")
            return
        self.records.append((number, record))
        for name in record:
            if name not in self.columns:
                self.columns.append(name)


def json_type(value: Any) -> str:
    """The JSON name of a value's type, with its article."""
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def format_of(path: Path) -> str | None:
    """The format that the ending names (`.gz` aside); None if it names none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    found = FORMATS.get(suffixes[-1]) if suffixes else None
    return None if found == "parquet" and path.suffix.lower() == ".gz" else found


def find(source: str, split: str, format: str | None, note: Note) -> dict[str, list[Path]]:
    """The data files behind a path, by split.

    A file, or a directory whose entries are not named after splits, is all `split`.  Raises DataError
    if there is nothing to read, or if several formats lie side by side; DiskError if the disk does not tell.
    """
    path = Path(source).expanduser()
    with _clear_errors(path):
        return _find(path, split, format, note)


def _find(path: Path, split: str, format: str | None, note: Note) -> dict[str, list[Path]]:
    if path.is_file():
        return {split: [path]}
    if not path.is_dir():
        raise DataError(f"{path}: {'is not a regular file' if path.exists() else _missing(path)}")
    by_split: dict[str, list[Path]] = {}
    for entry in sorted(path.iterdir()):
        if (match := _SPLIT_NAME.fullmatch(entry.name)) and (found := _data_files(entry, format)):
            by_split.setdefault(SPLITS[match[1].lower()], []).extend(found)
    files = _data_files(path, format)
    if by_split:
        _check_one_format(path, [file for found in by_split.values() for file in found], format)
        rest = [file.name for file in files if not _SPLIT_NAME.fullmatch(file.name)]
        if rest:
            note(f"{path}: left out, since other files are named after splits: {', '.join(rest)}")
        return by_split
    if not files:
        wanted = format or ", ".join(FORMATS)
        raise DataError(f"{path}: no data files in this directory (looked for {wanted})")
    _check_one_format(path, files, format)
    return {split: files}


def _data_files(path: Path, format: str | None) -> list[Path]:
    entries = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    wanted = "txt" if format == "lines" else format
    found = [entry for entry in entries if entry.is_file() and not entry.name.startswith(".")]
    return [entry for entry in found if (name := format_of(entry)) and wanted in (None, name)]


def _check_one_format(path: Path, files: list[Path], format: str | None) -> None:
    """Several formats side by side may well be the same rows twice."""
    formats = sorted({format_of(file) or "" for file in files})
    if len(formats) > 1 and format is None:
        raise DataError(f"{path}: this directory mixes {', '.join(formats)} files; choose with\n  data: {{format: {formats[0]}}}")


def _missing(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"no such file (there is no directory {parent} either)"
    close = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=1)
    hint = f"; did you mean {parent / close[0]}?" if close else ""
    hub = "" if path.suffix else "; a data set on the hub is written org/name"
    return f"no such file or directory{hint}{hub}"


def read(
    path: Path, format: str | None, txt_row: str, note: Note, poll: Poll = lambda: None, choose: Choose = list, new: Callable[[str], Table] = Table
) -> Table:
    """The records of one file; of a Parquet file only the chosen columns.  `poll` is called between lines and may raise to stop.

    Rows that cannot be parsed go to `bad`.  Raises DataError if the file as a whole is not of its
    format, or has no rows; DiskError if the disk does not give it.  `new` makes the table.
    """
    format = format or format_of(path)
    if format is None:
        raise DataError(
            f"{path}: the ending {path.suffix or '(none)'!r} says nothing about the format (known: {', '.join(FORMATS)}); name it with\n"
            "  data: {format: csv}   # or tsv, jsonl, json, parquet, txt, lines, conll, conllu"
        )
    if format == "txt" and txt_row == "line":
        format = "lines"
    table = new(str(path))
    if not isinstance(table.records, list) and format in WHOLE:
        raise RecipeError(f"data.streaming: {path} would be read into memory as a whole; {WHOLE[format]}")
    with _clear_errors(path):
        with path.open("rb") as file:
            table.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty")
        if format == "parquet":
            _read_parquet(path, table, poll, choose)
        else:
            with _open(path) as file:
                _READERS[format](file, table, note, poll)
    if not table.records and not table.bad:
        header = f" after its header ({', '.join(table.columns)})" if table.columns else ""
        raise DataError(f"{path}: the file has no rows{header}")
    return table


def read_text(path: Path) -> Iterator[str]:
    """A file of text in parts of whole lines.  Raises DataError if it is not UTF-8, DiskError if the disk does not give it."""
    offset = 0
    with _clear_errors(path), _open(path) as file:
        while lines := file.readlines(PART_BYTES):
            data = b"".join(lines)
            try:
                text = _decode(data, offset)
            except ValueError as error:
                raise DataError(f"{path}: {error}") from error
            yield text if offset else text.removeprefix("\ufeff")
            offset += len(data)


def _open(path: Path) -> BinaryIO:
    return cast("BinaryIO", gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: not a complete gzip file ({error})") from error
    except OSError as error:
        raise DiskError(f"{path}: cannot be read: {error.strerror or error}") from error


# --- text ---------------------------------------------------------------------------------------


def _lines(file: BinaryIO, poll: Poll) -> Iterator[tuple[int, int, bytes]]:
    """Physical lines, without a byte order mark: number from 1, byte offset, bytes with their end of line."""
    offset = 0
    for number, line in enumerate(file, 1):
        poll()
        yield number, offset, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        offset += len(line)


def _decode(data: bytes, offset: int) -> str:
    """Raises ValueError with the first byte that is not UTF-8 and where it stands in the file."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        hint = "; this looks like UTF-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else ""
        raise ValueError(f"not UTF-8: byte 0x{data[error.start]:02x} at byte offset {offset + error.start}{hint}") from error


def _read_lines(file: BinaryIO, table: Table, note: Note, poll: Poll) -> None:
    table.columns = ["text"]
    for number, offset, data in _lines(file, poll):
        try:
            line = _decode(data, offset).rstrip("\r\n")
        except ValueError as error:
            table.reject(number, str(error))
            continue
        if line.strip():
            table.records.append((number, {"text": line}))


def _read_txt(file: BinaryIO, table: Table, note: Note, poll: Poll) -> None:
    table.columns = ["text"]
    data = file.read()
    try:
        text = _decode(data, 0).removeprefix("\ufeff")
    except ValueError as error:
        table.reject(1, str(error))
        return
    if text.strip():
        table.records.append((1, {"text": text}))


# --- words in columns ---------------------------------------------------------------------------


def _read_conll(file: BinaryIO, table: Table, note: Note, poll: Poll) -> None:
    """A word a line: itself in the first column, its tag in the last one; rows end at blank lines (CoNLL-2003)."""
    for number, lines in _blocks(file, table, poll):
        if lines[0][0] != "-DOCSTART-":
            _add_words(table, number, [(cells[0], cells[-1]) for cells in lines], len({len(cells) for cells in lines}) == 1 < len(lines[0]))


def _read_conllu(file: BinaryIO, table: Table, note: Note, poll: Poll) -> None:
    """FORM and UPOS of CoNLL-U (universaldependencies.org/format.html); comments, ranges of words and empty nodes are left out."""
    for number, lines in _blocks(file, table, poll, tabs=True):
        words = [cells for cells in lines if not cells[0].startswith("#") and not set(cells[0]) & {"-", "."}]
        if words:
            whole = all(len(cells) == 10 for cells in words)
            _add_words(table, number, [(cells[1], cells[3]) for cells in words if whole], whole)


def _blocks(file: BinaryIO, table: Table, poll: Poll, tabs: bool = False) -> Iterator[tuple[int, list[list[str]]]]:
    """Lines between blank ones, in columns: the number of the first one, and the cells of each."""
    first, lines, broken = 0, list[list[str]](), ""
    for number, offset, data in chain(_lines(file, poll), [(0, 0, b"")]):
        try:
            line = _decode(data, offset).rstrip("\r\n")
        except ValueError as error:
            line, broken = "?", broken or str(error)
        if line.strip():
            first = first or number
            lines.append(line.split("\t") if tabs or "\t" in line else line.split())
            continue
        if broken:
            table.reject(first, broken)
        elif lines:
            yield first, lines
        first, lines, broken = 0, [], ""


def _add_words(table: Table, number: int, words: list[tuple[str, str]], even: bool) -> None:
    table.columns = ["tokens", "tags"]
    if even:
        table.records.append((number, {"tokens": [word for word, _ in words], "tags": [tag for _, tag in words]}))
    else:
        table.reject(number, "the lines of this sentence have different numbers of columns, or too few")


# --- JSON ---------------------------------------------------------------------------------------


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


def _read_jsonl(file: BinaryIO, table: Table, note: Note, poll: Poll) -> None:
    for number, offset, data in _lines(file, poll):
        if not data.strip():
            continue
        try:
            record = _parse(_decode(data, offset).rstrip("\r\n"))
        except json.JSONDecodeError as error:
            table.reject(number, f"not JSON: {error.msg} at column {error.colno}")
        except ValueError as error:
            table.reject(number, str(error))
        else:
            table.add(number, record)


def _read_json(file: BinaryIO, table: Table, note: Note, poll: Poll) -> None:
    try:
        document = _parse(_decode(file.read(), 0).removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        hint = "; if each line is a row of its own, set data.format: jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{table.source}:{error.lineno}:{error.colno}: not JSON: {error.msg}{hint}") from error
    except ValueError as error:
        raise DataError(f"{table.source}: {error}") from error
    if isinstance(document, dict):
        if not isinstance(document.get("data"), list):
            keys = ", ".join(list(document)[:10]) or "none"
            raise DataError(f'{table.source}: expected a list of rows, or {{"data": [rows]}}; this is an object with the keys {keys}')
        document = document["data"]
    if isinstance(document, list) and document and isinstance(document[0], dict) and "paragraphs" in document[0]:
        document = _questions(document, table)
    if not isinstance(document, list):
        raise DataError(f'{table.source}: expected a list of rows, or {{"data": [rows]}}; this is {json_type(document)}')
    for number, record in enumerate(document, 1):
        table.add(number, record)


def _questions(articles: list[Any], table: Table) -> list[Any]:
    """SQuAD's nested form as rows: each question with its context, in order; one that `is_impossible` without answers."""
    found = []
    for place, article in enumerate(articles, 1):
        for paragraph in _list_of(article, "paragraphs", table, f"article {place}"):
            for question in _list_of(paragraph, "qas", table, f"a paragraph of article {place}"):
                if isinstance(question, dict):
                    question = {"context": paragraph.get("context")} | question
                    if question.get("is_impossible"):
                        question["answers"] = []
                found.append(question)
    return found


def _list_of(holder: Any, name: str, table: Table, where: str) -> list[Any]:
    """What is expected to be there, or DataError."""
    if not isinstance(holder, dict) or not isinstance(holder.get(name), list):
        raise DataError(f'{table.source}: {where} has no list of {name}; SQuAD\'s form is {{"data": [{{"paragraphs": [{{"context", "qas": [...]}}]}}]}}')
    return holder[name]


# --- delimited ----------------------------------------------------------------------------------


def _read_csv(file: BinaryIO, table: Table, note: Note, poll: Poll) -> None:
    _delimited(file, table, poll, delimiter=",", strict=True)


def _read_tsv(file: BinaryIO, table: Table, note: Note, poll: Poll) -> None:
    """Programs write TSV with quotes as in CSV; by its definition, and in GLUE, a quote is just a character.

    Quotes at the beginning of two texts look like one field of several lines; where each of these lines is
    a whole row by itself, that is what they are.
    """
    folded = _delimited(file, table, poll, delimiter="\t", strict=True)
    if table.bad or (folded and len(table.columns) > 1):
        file.seek(0)
        literal = Table(table.source, records=[] if isinstance(table.records, list) else table.records.behind(), sha256=table.sha256)
        _delimited(file, literal, poll, delimiter="\t", quoting=csv.QUOTE_NONE)
        if literal.columns == table.columns and (not literal.bad or len(literal.bad) < len(table.bad)):  # a quoted header means quoted fields
            note(f"{table.source}: quotes do not delimit its fields and are kept as characters")
            table.columns, table.records, table.bad = literal.columns, literal.records, literal.bad


def _delimited(file: BinaryIO, table: Table, poll: Poll, **dialect: Any) -> bool:
    """Fill the table; returns whether any row spans several lines."""
    folded = False
    undecodable: dict[int, str] = {}  # physical line -> reason

    def lines() -> Iterator[str]:
        for number, offset, data in _lines(file, poll):
            try:
                yield _decode(data, offset)
            except ValueError as error:
                undecodable[number] = str(error)
                yield data.decode(errors="replace")

    csv.field_size_limit(sys.maxsize)  # a document in a field may well exceed the default of 128 KiB
    reader = csv.reader(lines(), **dialect)
    for number, first, fields in _records(reader):
        last = reader.line_num
        folded = folded or last > first
        reason = next((undecodable[line] for line in range(first, last + 1) if line in undecodable), None)
        if reason is None and isinstance(fields, csv.Error):
            reason = "a quote is opened and never closed" if "end of data" in str(fields) else str(fields)
        elif reason is None and number and len(fields) != len(table.columns):
            reason = f"{len(fields)} fields where the header has {len(table.columns)}"
        place = f"line {first}" if first == last else f"lines {first} to {last}"
        if number == 0:
            table.columns = [] if reason else [name.strip() for name in fields]
            repeated = sorted({name for name in table.columns if table.columns.count(name) > 1})
            if repeated:
                reason = f"the column {repeated[0]!r} stands there twice"
            if reason:
                raise DataError(f"{table.source}: header, {place}: {reason}")
        elif reason:
            table.reject(number, f"{reason} ({place})")
        else:
            table.records.append((number, dict(zip(table.columns, fields, strict=True))))
    return folded


def _records(reader: Any) -> Iterator[tuple[int, int, Any]]:
    """Record number (0 is the header), first physical line, and the fields or the csv.Error in their place."""
    number = 0
    while True:
        first = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fields = error
        if fields:  # a blank line is no record
            yield number, first, fields
            number += 1


# --- Arrow --------------------------------------------------------------------------------------


def _read_parquet(path: Path, table: Table, poll: Poll, choose: Choose) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            table.columns = list(file.schema_arrow.names)
            add_batches(table, file.iter_batches(columns=choose(table.columns)), poll)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # Arrow calls damaged data an OSError, too
            raise
        raise DataError(f"{path}: not a readable Parquet file ({first_line(error)})") from error


def add_batches(
    table: Table, batches: Iterable[pa.RecordBatch], poll: Poll = lambda: None, change: Callable[[dict[str, Any]], dict[str, Any]] = lambda record: record
) -> None:
    """Fill the table with the rows of Arrow record batches, numbered from 1, each as `change` makes it."""
    number = 0
    for batch in batches:
        poll()
        textual = any(word in str(kind) for kind in batch.schema.types for word in TEXTUAL)
        try:
            records = batch.to_pylist()
        except UnicodeDecodeError:  # Arrow does not check strings: find the rows that are not UTF-8
            records = [_one_record(batch, index) for index in range(batch.num_rows)]
        for record in records:
            number += 1
            if isinstance(record, str):
                table.reject(number, record)
            else:
                table.records.append((number, change(_as_text(record) if textual else record)))


def _as_text(value: Any) -> Any:
    """The value with numbers that JSON does not know, and times, as text."""
    if isinstance(value, dict):
        return {key: _as_text(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_as_text(inner) for inner in value]
    return str(value) if isinstance(value, Decimal | date | time | timedelta) else value


def _one_record(batch: pa.RecordBatch, index: int) -> dict[str, Any] | str:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return f"not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start} of a value"


_READERS: dict[str, Callable[[BinaryIO, Table, Note, Poll], None]] = {
    "csv": _read_csv,
    "tsv": _read_tsv,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "txt": _read_txt,
    "lines": _read_lines,
    "conll": _read_conll,
    "conllu": _read_conllu,
}
