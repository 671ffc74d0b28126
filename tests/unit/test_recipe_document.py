"""YAML by the rules of 1.2's core schema, with limits that hold before anything is built."""

from __future__ import annotations

import math
import random
import time

import pytest
import yaml

from ftkit.errors import RecipeError
from ftkit.recipe.document import MAX_BYTES, MAX_DEPTH, Node, Place, Problem, dump, parse, refuse, scalar, shown


def read(text: str) -> object:
    problems: list[Problem] = []
    value = parse(text, "r.yaml", problems).plain()
    refuse(problems)
    return value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E+3", 1000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-0.0", -0.0),
        ("10", 10),
        ("010", 10),
        ("+7", 7),
        ("0o10", 8),
        ("0x1F", 31),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("y", "y"),
        ("null", None),
        ("~", None),
        ("", None),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("0b1", "0b1"),
        ("1e-4x", "1e-4x"),
        ("nULL", "nULL"),
        ("=", "="),
        ("٣", "٣"),
    ],
)
def test_plain_scalars_mean_what_yaml_1_2_says(text: str, value: object) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)
    assert read(f"key: {text}") == {"key": value}


def test_not_a_number() -> None:
    assert math.isnan(scalar(".nan"))


@pytest.mark.parametrize("quoted", ["'1'", '"true"', '"null"'])
def test_quoted_scalars_are_text(quoted: str) -> None:
    assert read(f"key: {quoted}") == {"key": quoted[1:-1]}


def test_block_scalars_are_text() -> None:
    assert read("a: |\n  1\nb: >-\n  no\n  way\n") == {"a": "1\n", "b": "no way"}


def test_keys_are_always_text() -> None:
    assert read("{1: a, null: b, true: c}") == {"1": "a", "null": "b", "true": "c"}


def test_places_are_those_of_keys_and_of_list_items() -> None:
    node = parse("a:\n  b: 1\n  ü: [x,  y]\n", "r.yaml", [])
    inner = node.value["a"].value
    assert inner["b"].place == Place("r.yaml", 2, 3)
    assert [item.place for item in inner["ü"].value] == [Place("r.yaml", 3, 7), Place("r.yaml", 3, 11)]
    assert str(inner["b"].place) == "r.yaml:2:3"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: !!python/object/apply:os.system [ls]", 1, "tags"),
        ("a: 1\nb: !!str 1", 2, "tags"),
        ("a: ! 1", 1, "tags"),
        ("a: &x 1", 1, "anchors"),
        ("a: [&x 1, *x]", 1, "anchors"),
        ("a: *x", 1, "aliases"),
        ("a: 1\n<<: {b: 2}", 2, "merge keys"),
        ("? [a]\n: 1", 1, "a key must be a word"),
        ("a: 1\n---\nb: 2", 2, "one document"),
        ("a: [1, 2\n", 2, "not valid YAML"),
        ("a: 1\n b: 2", 2, "not valid YAML"),
        ("a: 1\nb:\t- 2", 2, "not valid YAML"),
        ("a: 1\nb: x\0y", 2, "control characters"),
        ("a: 1\nb: 2\nb: 3", 3, "given twice, first in line 2"),
        ("a: {b: 1, b: 1}", 1, "given twice"),
        ("a: 99999999999999999999", 1, "64 bits"),
        (f"a: 0x{'f' * 100_000}", 1, "64 bits"),
        (f"a: {'9' * 100_000}", 1, "64 bits"),
    ],
)
def test_what_recipes_may_not_hold(text: str, line: int, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        read(text)
    assert str(caught.value).startswith(f"r.yaml:{line}:")
    assert len(str(caught.value)) < 300


def test_quoted_merge_key_is_a_key() -> None:
    assert read("'<<': 1") == {"<<": 1}


def test_every_duplicate_is_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        read("a: 1\na: 2\nb: {c: 1, c: 2}\n")
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == ["2", "3"]


@pytest.mark.parametrize("unit", ["[", "{a: ", "- ", "? "])
def test_deep_nesting_is_refused_before_it_is_built(unit: str) -> None:
    started = time.process_time()
    with pytest.raises(RecipeError, match=f"deeper than {MAX_DEPTH}|a key must be a word|not valid YAML"):
        read(unit * (MAX_BYTES // len(unit)))
    assert time.process_time() - started < 5


def test_depth_up_to_the_limit_is_read() -> None:
    value = read("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    for _ in range(MAX_DEPTH - 1):
        (value,) = value  # type: ignore[misc]
    assert value == []


def test_alias_bomb() -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))]
    with pytest.raises(RecipeError, match="anchors"):
        read("\n".join(lines))


def test_size_limit() -> None:
    with pytest.raises(RecipeError, match="larger than"):
        read("#" * (MAX_BYTES + 1))
    assert read("#" * MAX_BYTES) is None


def test_many_problems_are_cut() -> None:
    with pytest.raises(RecipeError) as caught:
        refuse([Problem(Place("r.yaml", line, 1), "wrong") for line in range(1, 1001)])
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("r.yaml:1:")
    assert lines[-1] == "... and 950 more"


def _random_value(rng: random.Random, depth: int) -> object:
    kind = rng.randrange(9 if depth else 6)
    if kind >= 6:
        if kind == 6:
            return [_random_value(rng, depth - 1) for _ in range(rng.randrange(4))]
        return {_random_text(rng): _random_value(rng, depth - 1) for _ in range(rng.randrange(4))}
    return [
        None,
        rng.random() < 0.5,
        rng.randrange(-(2**63), 2**64),
        rng.choice([rng.uniform(-1e6, 1e6), 10.0 ** rng.randrange(-300, 300), math.inf, -math.inf, 5e-324, 1e22, -0.0]),
        _random_text(rng),
        rng.choice(TRICKY),
    ][kind]


WORDS = "no yes on off y n null ~ Null true FALSE 1e-4 1e5 010 0o10 0x1f 1_000 .inf .nan 12:30:45 2024-01-01 0b11"
SIGNS = "= << - ? : , [ ] { } # & * ! | > % @ ` --- ..."
TRICKY = WORDS.split() + SIGNS.split()
TRICKY += [
    "",
    " ",
    " x",
    "x ",
    "a: b",
    "a #b",
    "- a",
    "\n",
    "a\nb",
    "a\n\nb\n",
    "\t",
    "\x00",
    "\x1b[31m",
    "\x85",
    "\u2028",
    "\ufeff",
    "'",
    '"',
    "\\",
    "ü",
    "🙂",
    "x" * 2000,
]


def _random_text(rng: random.Random) -> str:
    alphabet = "ab1. :-#'\"\\{}[],&*!|>%@`~?\n\t\r\x00\x07\x85\u2028\ufeffé中🙂"
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(12)))


@pytest.mark.parametrize("seed", range(300))
def test_what_is_dumped_is_read_back(seed: int) -> None:
    value = {"key": _random_value(random.Random(seed), 3)}
    assert read(dump(value)) == value


@pytest.mark.parametrize("text", TRICKY)
def test_dumped_text_is_text_to_yaml_1_1_readers_too(text: str) -> None:
    assert read(dump({text: [text]})) == {text: [text]}
    assert yaml.safe_load(dump([text])) == [text]


def test_shared_values_are_written_out() -> None:
    shared = ["x"]
    assert read(dump({"a": shared, "b": shared})) == {"a": ["x"], "b": ["x"]}


def test_quoted_values_are_short_and_harmless() -> None:
    assert shown("\x1b[31mred") == r"'\x1b[31mred'"
    assert len(shown("x" * 1000)) == 60
    assert shown(None) == "null"
    assert shown({"a": [1, "1"]}) == '{a: [1, "1"]}'


def test_changed_rebuilds_with_paths() -> None:
    seen = []

    def note(path: tuple[str, ...], node: Node) -> Node:
        seen.append(path)
        return node

    tree = parse("a: {b: [1, 2]}", "r.yaml", [])
    assert tree.changed(note) == tree
    assert seen == [("a", "b"), ("a", "b"), ("a", "b"), ("a",), ()]
