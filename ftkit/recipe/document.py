"""YAML text to values that know their line, by the rules of YAML 1.2's core schema, and back.

The values are built from PyYAML's parse events, not by its composer: the limits hold before anything is
built (libyaml's composer overflows the C stack on deep nesting), and its YAML 1.1 scalars, where `1e-4`
is text and `no` is false, never come in.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from ftkit.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_BYTES = 1_000_000
MAX_DEPTH = 64
MAX_PROBLEMS = 50

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Place(NamedTuple):
    """Where a value was written.  Lines and columns count from 1; 0 means the source as a whole."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return ":".join([self.source, *(str(number) for number in (self.line, self.column) if number)])


class Problem(NamedTuple):
    """One thing that is wrong in a recipe."""

    place: Place
    message: str


class Node(NamedTuple):
    """A value, and the place of its key (of itself in a list)."""

    value: Any  # a scalar, a list of nodes, or a dict of nodes
    place: Place

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def changed(self, change: Callable[[tuple[str, ...], Node], Node], path: tuple[str, ...] = ()) -> Node:
        """With `change(path, node)` in place of every node, children first; list items have the path of their list."""
        value = self.value
        if isinstance(value, dict):
            value = {key: child.changed(change, (*path, key)) for key, child in value.items()}
        elif isinstance(value, list):
            value = [child.changed(change, path) for child in value]
        return change(path, Node(value, self.place))


def refuse(problems: list[Problem]) -> None:
    """Raise one RecipeError with all problems, a line each, in the order of the file; nothing if there are none."""
    if problems:
        lines = [f"{place}: {message}" for place, message in sorted(set(problems))]
        if len(lines) > MAX_PROBLEMS:
            lines[MAX_PROBLEMS:] = [f"... and {len(lines) - MAX_PROBLEMS} more"]
        raise RecipeError("\n".join(lines))


def scalar(text: str) -> Any:
    """What a plain (unquoted) scalar means.  Raises ValueError for an integer beyond 64 bits."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        number = int(text, base) if len(text) <= 64 else 2**64
        if not -(2**63) <= number < 2**64:
            raise ValueError(f"the number {shown(text)} does not fit into 64 bits")
        return number
    if _FLOAT.fullmatch(text):
        return float(text)
    if _SPECIAL.fullmatch(text):
        return float(text.replace(".", "", 1))
    return text


def parse(text: str, source: str, problems: list[Problem]) -> Node:
    """The value of a document, or of the scalar or flow value of a command line.

    Duplicate keys and oversized numbers are added to `problems`.  Raises RecipeError for everything after
    which the text cannot be read on: bad syntax, the limits, and the parts of YAML that recipes may not use.
    """
    try:
        size = len(text.encode())
    except UnicodeEncodeError:  # bytes of a command line that are not UTF-8
        raise RecipeError(f"{source}: not UTF-8 text") from None
    if size > MAX_BYTES:
        raise RecipeError(f"{source}: larger than {MAX_BYTES:,} bytes; a recipe holds settings, data belongs into data files")
    return _Reader(text, source, problems).document()


class _Reader:
    """Recursive descent over parse events, at most MAX_DEPTH deep."""

    def __init__(self, text: str, source: str, problems: list[Problem]) -> None:
        self.source, self.problems = source, problems
        self.events = self._checked(text)

    def _place(self, event: Any) -> Place:
        return Place(self.source, event.start_mark.line + 1, event.start_mark.column + 1)

    def _checked(self, text: str) -> Iterator[Any]:
        """The events of one document that is made of maps, lists and scalars only."""
        documents = 0
        try:
            for event in yaml.parse(text, Loader=_Loader):
                if isinstance(event, yaml.StreamStartEvent | yaml.DocumentEndEvent | yaml.StreamEndEvent):
                    continue
                if isinstance(event, yaml.DocumentStartEvent):
                    documents += 1
                    if documents > 1:
                        raise RecipeError(f"{self._place(event)}: a recipe is one document; remove this `---` and what follows")
                    continue
                if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                    raise RecipeError(f"{self._place(event)}: anchors (&) and aliases (*) are not allowed; write the value out, or use `extends`")
                if getattr(event, "tag", None):
                    raise RecipeError(f"{self._place(event)}: tags (!) are not allowed; quote the value if it is text")
                yield event
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = Place(self.source, mark.line + 1, mark.column + 1) if mark else Place(self.source)
            raise RecipeError(f"{place}: not valid YAML: {error.problem or error.context}") from None
        except yaml.reader.ReaderError as error:
            line = text.encode()[: error.position].count(b"\n") + 1
            raise RecipeError(f"{Place(self.source, line)}: not valid YAML: {error.reason}") from None

    def document(self) -> Node:
        first = next(self.events, None)
        node = Node(None, Place(self.source)) if first is None else self._node(first, Place(self.source), 1)
        next(self.events, None)  # a second document is an error of its own
        return node

    def _node(self, event: Any, place: Place, depth: int) -> Node:
        if isinstance(event, yaml.ScalarEvent):
            return Node(self._scalar(event), place)
        if depth > MAX_DEPTH:
            raise RecipeError(f"{self._place(event)}: nested deeper than {MAX_DEPTH} levels")
        return Node(self._map(depth) if isinstance(event, yaml.MappingStartEvent) else self._list(depth), place)

    def _scalar(self, event: Any) -> Any:
        plain, _ = event.implicit
        try:
            return scalar(event.value) if plain else event.value
        except ValueError as error:
            self.problems.append(Problem(self._place(event), str(error)))

    def _list(self, depth: int) -> list[Node]:
        items = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self._node(event, self._place(event), depth + 1))
        return items

    def _map(self, depth: int) -> dict[str, Node]:
        items: dict[str, Node] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            place = self._place(event)
            if not isinstance(event, yaml.ScalarEvent):
                raise RecipeError(f"{place}: a key must be a word, not a list or a map")
            key, (plain, _) = event.value, event.implicit
            if plain and key == "<<":
                raise RecipeError(f"{place}: merge keys (<<) are not allowed; use `extends`")
            value = self._node(next(self.events), place, depth + 1)
            if key in items:
                self.problems.append(Problem(place, f"key `{shown(key)}` is given twice, first in line {items[key].place.line}"))
            items.setdefault(key, value)
        return items


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        plain = isinstance(scalar(text), str)
    except ValueError:
        plain = False
    # Left alone, PyYAML quotes what YAML 1.1 would not read as text, but lets some line breaks through.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain and text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)


def dump(value: Any) -> str:
    """YAML that means `value` to this reader and to YAML 1.1 readers alike."""
    return _dump(value, default_flow_style=False)


def one_line(value: Any) -> str:
    """The same in YAML's flow style."""
    return _dump(value, default_flow_style=True).removesuffix("\n...\n").strip()


def _dump(value: Any, **style: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf"), **style)


def shown(value: Any) -> str:
    """A value as messages quote it: shortened, on one line, without control characters."""
    text = value if isinstance(value, str) else one_line(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 60 else f"{text[:57]}..."
