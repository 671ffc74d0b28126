"""The data of a recipe -> rows under the task's column names, by split, with every flaw said."""

from __future__ import annotations

import difflib
import hashlib
import heapq
import json
import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ftkit.data import files, formats, hub
from ftkit.data.files import Table
from ftkit.data.ondisk import Spool
from ftkit.data.types import Row, RowError, Rows
from ftkit.errors import DataError, RecipeError
from ftkit.tasks import Shape

if TYPE_CHECKING:
    from collections.abc import Callable

    from ftkit.data.files import Choose, Note, Poll
    from ftkit.data.types import RowList
    from ftkit.recipe.spec import Data
    from ftkit.tasks import Task

SMALL = 1 << 20  # bytes of a file whose rows are kept in memory
SHOWN = 10  # bad rows that a message names; all are counted


class ColumnMap(NamedTuple):
    """How the records of a table become the values of a row."""

    columns: dict[str, str]  # what the task calls a column -> what the file calls it
    required: frozenset[str]  # of those, under the task's names
    conversion: formats.Conversion | None = None

    @property
    def needed(self) -> list[str]:
        """The columns that a file must have, under its names."""
        return list(self.conversion.required) if self.conversion else [self.columns[name] for name in self.columns if name in self.required]

    @property
    def used(self) -> set[str]:
        """The columns that are read where a file has them, under its names."""
        return {*self.conversion.required, *self.conversion.optional} if self.conversion else set(self.columns.values())

    def values(self, record: dict[str, Any]) -> dict[str, Any]:
        """Raises RowError with the reason if the record cannot be used."""
        if self.conversion:
            empty = [name for name in self.conversion.required if formats.is_empty(record.get(name))]
            if empty:
                raise RowError(f"{empty[0]} is empty")
            return {"messages": self.conversion.messages(record)}
        values = {}
        for name, theirs in self.columns.items():
            value = record.get(theirs)
            if not formats.is_empty(value):
                values[name] = formats.checked(name, value)
            elif name in self.required:
                raise RowError(f"{theirs} is {'null' if value is None else 'empty'}")
        return values


def load_rows(data: Data, task: Task, seed: int, note: Note, poll: Poll = lambda: None) -> Rows:
    """Read everything that `data` names.  `poll` is called between rows and may raise to stop.

    Random choices (a validation fraction, the sample of `limit`) depend on the seed and the number of
    rows alone.  Raises DataError for files and rows that cannot be used, HubError for the hub,
    RecipeError for columns that the task does not know.
    """
    choose = _choice(task, data.columns)

    def source(name: str, split: str) -> _Source:
        return _Source(name, split, data.format, task.txt_row, note, poll, choose)

    new = _beginning(data.streaming)
    names = [data.train] if isinstance(data.train, str) else data.train
    sources = [source(name, "train") for name in names]
    tables = [table for each in sources for table in each.tables("train", new)]
    if not any(table.records for table in tables):
        raise DataError(_listed([line for table in tables for line in table.flaws()], f"{', '.join(names)}: no row can be read"))
    columns = _column_map(tables, data.columns, task)
    note(f"columns: {_described(columns, tables)}")
    reader = _Reader(columns, poll)
    train = pool = reader.rows(tables, data.streaming)
    del tables  # the rows would be on disk twice

    def others(given: _Source, split: str) -> RowList:
        return reader.rows(given.tables(split, _where_possible(new, data.format, task.txt_row)), data.streaming)

    own = sources[0] if len(sources) == 1 else None  # whose further splits belong to this training split
    validation: dict[str, RowList] = {}
    if isinstance(data.validation, float):
        train, validation["validation"] = _split(train, data.validation, seed)
    elif isinstance(data.validation, dict):
        validation = {name: others(source(file, "validation"), "validation") for name, file in data.validation.items()}
    elif given := source(data.validation, "validation") if data.validation else own:
        validation = {name: others(given, name) for name in given.validation_splits(required=bool(data.validation))}
    tested = source(data.test, "test") if data.test else own
    if tested and not data.test and (tested.on_hub or "test" not in tested.splits):  # the labels of test splits on the hub are often withheld
        tested = None
    test: RowList = others(tested, "test") if tested else []

    report_bad(reader.bad, data.on_bad_rows, note)
    for name, rows in {"train": train, **validation, **({"test": test} if tested else {})}.items():
        if not rows:
            raise DataError(f"{name}: no row is left")
    if not validation:
        note("no validation data: nothing is measured beside the training loss (data.validation: a file, or a fraction such as 0.1)")
    if data.limit and data.limit < len(train):
        note(f"data.limit: a random sample of {data.limit} of {len(train)} training rows")
        places = set(_sample(len(train), data.limit, f"limit {seed}"))
        train = _those(train, places.__contains__)
    _report_leaks(train, {**validation, "test": test}, note)
    return Rows(train, validation, test, reader.sha256, {} if columns.conversion else columns.columns, reader.bad, pool)


def load_split(source: str, split: str | None, data: Data, task: Task, note: Note, answers: bool = True) -> RowList:
    """The rows of a file, directory or hub id, of the same kind as those that a run was trained on; on disk unless it is a small file.

    `data` is that of the run: its columns are looked for first, then the names they usually have.  Without
    `answers`, the columns that the model is to find out need not be there.  Of several splits, `split` says
    which, else it is the test or validation split.  Raises DataError, HubError.
    """
    format, txt_row = None if files.format_of(Path(source)) else data.format, task.txt_row if answers else "line"
    found = _Source(source, split or "test", format, txt_row, note)
    usual = next((name for name in ("test", "validation") if name in found.splits), next(iter(found.splits)))
    on_disk = not Path(source).is_file() or Path(source).stat().st_size > SMALL
    tables = found.tables(split or usual, _where_possible(_beginning(on_disk), format, txt_row))
    columns = _map_as_trained(tables, data.columns, task, answers)
    note(f"{source}: {_described(columns, tables)}")
    reader = _Reader(columns)
    rows = reader.rows(tables, on_disk)
    report_bad(reader.bad, data.on_bad_rows, note)
    if not rows:
        raise DataError(f"{source}: no row is left")
    return rows


def report_bad(bad: list[str], on_bad_rows: str, note: Note) -> None:
    """Stop at bad rows (DataError), or say what is left out."""
    if bad and on_bad_rows == "error":
        told = _listed(bad, f"{_plural(len(bad), 'row')} cannot be used")
        raise DataError(f"{told}\nRepair or remove them; a recipe with data.on_bad_rows: skip leaves them out")
    if bad:
        note(_listed(bad, f"{_plural(len(bad), 'bad row')} left out"))


def _listed(bad: list[str], summary: str) -> str:
    more = [f"and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
    return "\n  ".join([f"{summary}:", *bad[:SHOWN], *more]) if bad else summary


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


# --- sources and splits -------------------------------------------------------------------------


class _Source:
    """A file, a directory or a hub id; its splits are known at once and read when asked for."""

    def __init__(self, name: str, split: str, format: str | None, txt_row: str, note: Note, poll: Poll = lambda: None, choose: Choose = list) -> None:
        self.name, self.on_hub = name, hub.is_hub_id(name)
        self.splits: dict[str, Callable[[Callable[[str], Table]], list[Table]]]
        if self.on_hub:
            if format:
                note(f"{name}: data.format is about files and does not change how the hub's data is read")
            data = hub.load(name, note)
            named = {key: key if (usual := files.SPLITS.get(key, key)) in data.splits else usual for key in data.splits}
            self.splits = {usual: partial(_hub_tables, name, key, data, poll, choose) for key, usual in named.items()}
        else:
            found = files.find(name, split, format, note)
            self.splits = {key: partial(_file_tables, paths, format, txt_row, note, poll, choose) for key, paths in found.items()}

    def tables(self, split: str, new: Callable[[str], Table] = Table) -> list[Table]:
        """Those of a split, each begun by `new`."""
        if split not in self.splits:
            raise DataError(f"{self.name}: has no split {split!r}; there are: {', '.join(self.splits)}")
        return self.splits[split](new)

    def validation_splits(self, required: bool) -> list[str]:
        """`validation`, or all of its kind (`validation_matched`, ...)."""
        if "validation" in self.splits or not any(name.startswith("validation") for name in self.splits):
            return ["validation"] if required or "validation" in self.splits else []
        return [name for name in self.splits if name.startswith("validation")]


def _beginning(streaming: bool) -> Callable[[str], Table]:
    """What makes a table without records yet: in memory, or on disk, all in the same files, since there may be thousands of tables."""
    if not streaming:
        return Table
    records: Spool[Any] = Spool(list, tuple)
    return lambda source: Table(source, records=records.behind())


def _where_possible(on_disk: Callable[[str], Table], format: str | None, txt_row: str) -> Callable[[str], Table]:
    """The same, but in memory for files that are read as a whole."""

    def begin(source: str) -> Table:
        own = format or files.format_of(Path(source))
        return Table(source) if own in files.WHOLE and not (own == "txt" and txt_row == "line") else on_disk(source)

    return begin


def _hub_tables(name: str, split: str, data: hub.HubData, poll: Poll, choose: Choose, new: Callable[[str], Table]) -> list[Table]:
    return [hub.table(name, split, data, poll, choose, new)]


def _file_tables(paths: list[Path], format: str | None, txt_row: str, note: Note, poll: Poll, choose: Choose, new: Callable[[str], Table]) -> list[Table]:
    return [files.read(path, format, txt_row, note, poll, choose, new) for path in paths]


def _split(rows: RowList, fraction: float, seed: int) -> tuple[RowList, RowList]:
    if len(rows) < 2:
        raise DataError(f"data.validation: {fraction} of {len(rows)} rows leaves nothing to train on")
    size = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
    chosen = _sample(len(rows), size, f"validation {seed}")
    places = set(chosen)
    return _those(rows, lambda place: place not in places), _those(rows, places.__contains__)


def _those(rows: RowList, wanted: Callable[[int], bool]) -> RowList:
    """The rows at the places that are wanted; on disk if they were."""
    taken: RowList = [] if isinstance(rows, list) else rows.empty()
    for i, row in enumerate(rows):
        if wanted(i):
            taken.append(row)
    return taken


def _sample(n: int, size: int, seed: str) -> list[int]:
    """`size` of the numbers below n, ascending; only `random()` gives the same sequence in every Python."""
    generator = random.Random(seed)
    return sorted(i for _, i in heapq.nsmallest(size, ((generator.random(), i) for i in range(n))))


def _dumped(row: Row) -> list[Any]:
    return [row.values, row.file, row.number]


def _loaded(values: list[Any]) -> Row:
    return Row(*values)


def _report_leaks(train: RowList, others: dict[str, RowList], note: Note) -> None:
    digests = {split: [_inputs_digest(row) for row in rows] for split, rows in others.items()}
    wanted = {digest for each in digests.values() for digest in each}
    seen = {digest for row in train if (digest := _inputs_digest(row)) in wanted} if wanted else set()
    for split, rows in others.items():
        if leaked := sum(digest in seen for digest in digests[split]):
            note(f"{split}: {leaked:,} of {_plural(len(rows), 'row')} with the same inputs as a training row")


def _inputs_digest(row: Row) -> bytes:
    inputs = {name: value for name, value in row.values.items() if name not in formats.OUTPUTS}
    return hashlib.blake2b(json.dumps(inputs, sort_keys=True, default=str).encode(), digest_size=16).digest()


# --- columns ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Reader:
    """Tables -> rows, keeping account of what was read and what could not be used."""

    columns: ColumnMap
    poll: Poll = lambda: None
    bad: list[str] = field(default_factory=list)
    sha256: dict[str, str] = field(default_factory=dict)

    def rows(self, tables: list[Table], on_disk: bool) -> RowList:
        """Those of the tables that can be used."""
        rows: RowList = Spool(_dumped, _loaded) if on_disk else []
        for table in tables:
            absent = [name for name in self.columns.needed if name not in table.columns]
            if absent and table.records:
                raise DataError(
                    f"{table.source}: lacks the column {absent[0]!r}{_nearest(absent[0], table.columns)}\n"
                    f"  there are: {', '.join(table.columns)}\n  needed, as in the training data: {', '.join(self.columns.needed)}"
                )
            self.sha256[table.source] = table.sha256
            for number, record in table.records:
                self.poll()
                try:
                    rows.append(Row(self.columns.values(record), table.source, number))
                except RowError as error:
                    table.reject(number, str(error))
            self.bad += table.flaws()
        return rows


def _choice(task: Task, given: dict[str, str]) -> Choose:
    """Picks the columns that may mean something to the task; the others could fill the memory, as embeddings and images do."""
    names = {alias for shape in task.shapes for column in (*shape.required, *shape.optional) for alias in column.aliases}
    names |= formats.CHAT_COLUMNS if "messages" in names else set()
    return lambda columns: [name for name in columns if name.lower() in names or name in given.values()] or columns


def _column_map(tables: list[Table], given: dict[str, str], task: Task) -> ColumnMap:
    """Find the task's columns in the files: the recipe's words first, then the most specific shape that fits."""
    source = tables[0].source
    theirs = list(dict.fromkeys(name for table in tables for name in table.columns))
    known = list(dict.fromkeys(column.name for shape in task.shapes for column in (*shape.required, *shape.optional)))
    for name, mapped in given.items():
        if name not in known:
            raise RecipeError(f"data.columns.{name}: {task.kind} has no such column{_nearest(name, known)} (known: {', '.join(known)})")
        if mapped not in theirs:
            raise DataError(_undecided(source, f"there is no column {mapped!r}{_nearest(mapped, theirs)}", theirs, task, given))
    first = next(record for table in tables for _, record in table.records)
    if not given and (conversion := formats.detect(theirs, first, "messages" in known, "prompt" in known)):
        used = [*conversion.required, *(name for name in conversion.optional if name in theirs)]
        return ColumnMap({"messages": ", ".join(used)}, frozenset({"messages"}), conversion)
    for shape in _shapes(task, given):
        candidates = _candidates(shape, theirs, given)
        required = frozenset(column.name for column in shape.required)
        if any(not candidates[name] for name in required):
            continue
        for name, found in candidates.items():
            if len(found) > 1:
                raise DataError(_undecided(source, f"{name} could be {' or '.join(map(repr, found))}", theirs, task, given))
        return ColumnMap({name: found[0] for name, found in candidates.items() if found}, required)
    raise DataError(_undecided(source, f"its columns are not those of {task.kind}", theirs, task, given))


def _map_as_trained(tables: list[Table], trained: dict[str, str], task: Task, answers: bool) -> ColumnMap:
    """The columns that a run was trained on, in other files; `trained` is empty where it converted a chat format."""
    theirs = list(dict.fromkeys(name for table in tables for name in table.columns))
    first = next((record for table in tables for _, record in table.records), {})
    names = set(trained) or {"messages"}
    chat = names == {"messages"} and trained.get("messages") not in theirs
    if chat and (conversion := formats.detect(theirs, first, True, False, answers)):
        return ColumnMap({"messages": ", ".join(conversion.required)}, frozenset({"messages"}), conversion)
    shape = next(shape for shape in task.shapes if {column.name for column in shape.required} <= names)
    given = {column.name for column in (*shape.required, *shape.optional) if column.name in names and (answers or column.name not in formats.OUTPUTS)}
    required = shape.required if answers else shape.asked
    wanted = Shape(*required, optional=tuple(column for column in (*shape.required, *shape.optional) if column.name in given and column not in required))
    found = _candidates(wanted, theirs, {name: trained[name] for name in given if trained.get(name) in theirs})
    if len(required) == len(theirs) == 1:  # nothing else can be meant
        found[required[0].name] = theirs
    for column in required:
        if len(found[column.name]) != 1:
            many = " or ".join(map(repr, found[column.name]))
            what = f"{column.name} could be {many}" if many else f"there is no column for {column.name} ({trained.get(column.name, column.name)!r} in training)"
            raise DataError(f"{tables[0].source}: {what}\n  there are: {', '.join(theirs) or 'none'}")
    return ColumnMap({name: candidates[0] for name, candidates in found.items() if candidates}, frozenset(column.name for column in required))


def _shapes(task: Task, given: dict[str, str]) -> list[Shape]:
    """The shapes that have the given columns; if one needs no other, only that."""
    fitting = [shape for shape in task.shapes if set(given) <= {column.name for column in (*shape.required, *shape.optional)}]
    complete = [shape for shape in fitting if given and {column.name for column in shape.required} <= set(given)]
    return complete or fitting


def _candidates(shape: Shape, theirs: list[str], given: dict[str, str]) -> dict[str, list[str]]:
    """The file's columns that could be each of the task's: the given one, else its own name, else an alias."""
    columns = (*shape.required, *shape.optional)
    own = {column.name: [name for name in theirs if name.lower() == column.name] for column in columns}
    taken = {*given.values(), *(name for found in own.values() for name in found)}
    aliased = {column.name: [name for name in theirs if name.lower() in column.aliases and name not in taken] for column in columns}
    return {column.name: [given[column.name]] if column.name in given else own[column.name] or aliased[column.name] for column in columns}


def _undecided(source: str, problem: str, theirs: list[str], task: Task, given: dict[str, str]) -> str:
    shape = (_shapes(task, given) or task.shapes)[-1]
    found = _candidates(shape, theirs, {name: mapped for name, mapped in given.items() if mapped in theirs})
    free = [name for name in theirs if not any(name in names for names in found.values())]
    only = free[0] if len(free) == 1 else "COLUMN"
    guesses = {column.name: found[column.name][0] if found[column.name] else only for column in shape.required}
    needed = ", or ".join(" + ".join(column.name for column in each.required) for each in task.shapes)
    pairs = ", ".join(f"{name}: {mapped if mapped.isidentifier() else json.dumps(mapped)}" for name, mapped in guesses.items())
    return "\n".join(
        [
            f"{source}: {problem}",
            f"  there are: {', '.join(theirs) or 'none'}",
            f"  needed: {needed}",
            "  say in the recipe which is which:",
            f"    data: {{columns: {{{pairs}}}}}",
        ]
    )


def _nearest(name: str, names: list[str]) -> str:
    lowered = {each.lower(): each for each in names}
    close = difflib.get_close_matches(name.lower(), lowered, n=1)
    return f"; did you mean {lowered[close[0]]!r}?" if close else ""


def _described(columns: ColumnMap, tables: list[Table]) -> str:
    how = f" ({columns.conversion.name})" if columns.conversion else ""
    used = "; ".join(f"{name} from {theirs}{how}" for name, theirs in columns.columns.items())
    unused = sorted({name for table in tables for name in table.columns} - columns.used)
    return used + (f"; not used: {', '.join(unused)}" if unused else "")
