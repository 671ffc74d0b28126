"""Recipes from files, parents and command lines to one value that knows where everything came from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from ftkit import plugins
from ftkit.errors import MissingDependency, RecipeError
from ftkit.recipe import dump, read, schema
from ftkit.recipe.spec import Default, Spec, option

ROOT = Path(__file__).parents[2]


class Sorting(Spec):
    """A task."""

    kind: Literal["sorting"] = "sorting"
    labels: tuple[str, ...] | None = option(None, "names")
    defaults: ClassVar[Mapping[str, Default]] = {
        "train.learning_rate": Default(3e-5, "the task"),
        "train.batch_size": Default(16, "the task"),
        "data.max_length": Default(128, "the task"),
    }


class Whole(Spec):
    """A method."""

    kind: Literal["full"] = "full"
    defaults: ClassVar[Mapping[str, Default]] = {}


class Small(Spec):
    """Another method."""

    kind: Literal["small"] = "small"
    r: int = option(8, "rank", "a paper", ge=1)
    targets: str | list[str] = option("all", "modules")
    defaults: ClassVar[Mapping[str, Default]] = {"train.learning_rate": Default(2e-4, "the method")}


class Smaller(Spec):
    """A method with a field of the same name as another's."""

    kind: Literal["smaller"] = "smaller"
    r: int = option(2, "rank", ge=1)


class Right(Spec):
    """An objective."""

    kind: Literal["supervised"] = "supervised"


BUILTIN = {
    "task": {"sorting": f"{__name__}:Sorting"},
    "method": {"full": f"{__name__}:Whole", "small": f"{__name__}:Small", "smaller": f"{__name__}:Smaller"},
    "objective": {"supervised": f"{__name__}:Right"},
}
MINIMAL = "model: org/base\ntask: sorting\ndata: {train: rows.csv}\n"


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(plugins, "BUILTIN", BUILTIN)
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str, name: str = "recipe.yaml") -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return name


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(write(text), overrides)
    return str(caught.value).splitlines()


class TestValues:
    def test_strings_are_short_for_maps(self) -> None:
        recipe = read(write(MINIMAL + "method: small\nobjective: supervised\n")).recipe
        assert (recipe.model.name, recipe.task.kind, recipe.method.kind, recipe.objective.kind) == ("org/base", "sorting", "small", "supervised")
        assert recipe == read(write("model: {name: org/base}\ntask: {kind: sorting}\ndata: {train: rows.csv}\nmethod: {kind: small}\n")).recipe

    def test_only_three_keys_are_needed(self, place: Path) -> None:
        recipe = read(write(MINIMAL, "recipes/first.yaml")).recipe
        assert recipe.method.kind == "full"
        assert recipe.objective.kind == "supervised"
        assert recipe.output == str(place / "runs" / "first")

    def test_lists_may_be_tuples_in_the_spec(self) -> None:
        recipe = read(write(MINIMAL.replace("task: sorting", "task: {kind: sorting, labels: [a, b]}"))).recipe
        assert recipe.task.labels == ("a", "b")

    def test_empty_sections_are_as_if_left_out(self) -> None:
        assert read(write(MINIMAL + "train:\neval:\nmethod:\n")).recipe == read(write(MINIMAL)).recipe

    def test_numbers(self) -> None:
        train = read(write(MINIMAL + "train: {learning_rate: 1e-4, batch_size: 010, epochs: 2}\n")).recipe.train
        assert (train.learning_rate, train.batch_size, train.epochs) == (1e-4, 10, 2.0)

    def test_byte_order_mark(self) -> None:
        Path("bom.yaml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
        assert read("bom.yaml").recipe.model.name == "org/base"


class TestDefaults:
    def test_order(self) -> None:
        def rate(text: str) -> tuple[float, str]:
            resolved = read(write(MINIMAL + text))
            return resolved.recipe.train.learning_rate, resolved.origins["train.learning_rate"]

        assert rate("") == (3e-5, "default: the task")
        assert rate("method: small") == (2e-4, "default: the method")
        assert rate("train: {learning_rate: 1}\nmethod: small") == (1.0, "recipe.yaml:4")
        scratch, origin = read(write(MINIMAL.replace("org/base", "{name: org/base, init: random}") + "method: small"))
        assert scratch.train.learning_rate == 5e-4
        assert "arXiv" in origin["train.learning_rate"]

    def test_origins_name_every_leaf(self) -> None:
        write(MINIMAL + "train:\n  seed: 1\n  batch_size: 8\ndata: {train: x.csv}\n".replace("data: {train: x.csv}\n", ""), "base.yaml")
        text = "extends: base.yaml\nmethod:\n  kind: small\ntrain:\n  seed: 2\nmodel: {config: {hidden_size: 8}}\n"
        origins = read(write(text), ["train.keep=3"]).origins
        assert origins["train.seed"] == "recipe.yaml:5"
        assert origins["train.batch_size"] == "base.yaml:6"
        assert origins["train.keep"] == "command line"
        assert origins["model.name"] == "base.yaml:1"
        assert origins["model.config.hidden_size"] == "recipe.yaml:6"
        assert origins["method.kind"] == "recipe.yaml:3"
        assert origins["method.r"] == "default: a paper"
        assert origins["objective.kind"].startswith("default: ")
        assert origins["data.max_length"] == "default: the task"
        assert origins["train.schedule"].startswith("default: BERT")
        assert origins["eval.generation.top_p"].startswith("default")
        assert "train" not in origins

    def test_steps_stand_instead_of_epochs(self) -> None:
        assert read(write(MINIMAL)).recipe.train.epochs == 3.0
        recipe = read(write(MINIMAL + "train: {steps: 5}")).recipe
        assert (recipe.train.steps, recipe.train.epochs) == (5, None)
        recipe = read(write(MINIMAL + "train: {epochs: 2}"), ["train.steps=7"]).recipe
        assert (recipe.train.steps, recipe.train.epochs) == (7, None)
        recipe = read(write(MINIMAL + "train: {steps: 5}"), ["train.epochs=1"]).recipe
        assert (recipe.train.steps, recipe.train.epochs) == (None, 1.0)

    def test_both_or_neither_length(self) -> None:
        assert problems(MINIMAL + "train: {steps: 5, epochs: 1}") == ["recipe.yaml:4:1: give train.epochs or train.steps, not both"]
        assert problems(MINIMAL, "train.steps=5", "train.epochs=1") == ["recipe.yaml: give train.epochs or train.steps, not both"]
        assert problems(MINIMAL + "train: {epochs: null}") == ["recipe.yaml:4:1: give train.epochs or train.steps"]

    def test_batches_count_rows_or_tokens(self) -> None:
        recipe = read(write(MINIMAL + "train: {batch_tokens: 4096}")).recipe
        assert (recipe.train.batch_tokens, recipe.train.batch_size) == (4096, None)
        recipe = read(write(MINIMAL + "train: {batch_tokens: 4096}"), ["train.batch_size=8"]).recipe
        assert (recipe.train.batch_tokens, recipe.train.batch_size) == (None, 8)
        told = ["recipe.yaml:4:1: give train.batch_size or train.batch_tokens, not both"]
        assert problems(MINIMAL + "train: {batch_size: 8, batch_tokens: 4096}") == told


class TestProblems:
    def test_all_at_once_in_the_order_of_the_file(self) -> None:
        text = (
            "model: {name: org/base, revison: abc}\n"
            "task: sortin\n"
            "data:\n  train: rows.csv\n  colums: {}\n"
            "method: {kind: small, rank: 3, r: 0}\n"
            "train:\n  learning_rate: 1e-4x\n  schedule: cosin\n  batch_size: 2.5\n  early_stopping: {patiense: 3}\n  trackers: [tensorbord]\n"
            "learning_rate: 1\n"
        )
        found = problems(text, "trian.epochs=1")
        assert [line.split(": ")[0] for line in found] == [
            "command line",
            "recipe.yaml:1:25",
            "recipe.yaml:2:1",
            "recipe.yaml:5:3",
            "recipe.yaml:6:23",
            "recipe.yaml:6:32",
            "recipe.yaml:8:3",
            "recipe.yaml:9:3",
            "recipe.yaml:10:3",
            "recipe.yaml:11:20",
            "recipe.yaml:12:14",
            "recipe.yaml:13:1",
        ]
        told = "\n".join(found)
        for words in (
            "unknown key `trian`; did you mean `train`?",
            "unknown key `model.revison`; did you mean `revision`?",
            "unknown task `sortin`; did you mean `sorting`? (known: sorting)",
            "unknown key `data.colums`; did you mean `columns`?",
            "unknown key `method.rank` (known: kind, r, targets)",
            "`method.r: 0` must be at least 1",
            "`train.learning_rate: 1e-4x` is not a number",
            "`train.schedule: cosin` is not one of 'linear', 'cosine', 'constant', 'wsd'; did you mean `cosine`?",
            "`train.batch_size: 2.5` is not a whole number",
            "unknown key `train.early_stopping.patiense`; did you mean `patience`?",
            "`train.trackers[0]: tensorbord` is not one of 'tensorboard', 'wandb', 'mlflow'; did you mean `tensorboard`?",
            "unknown key `learning_rate`; did you mean `train.learning_rate`?",
        ):
            assert words in told

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("train: 5", "`train: 5` is not a map"),
            ("train: {seed: '1'}", "`train.seed: 1` is not a whole number"),
            ("train: {epochs: true}", "`train.epochs: true` is not a number"),
            ("train: {compile: yes}", "`train.compile: yes` is not true or false"),
            ("train: {gradient_checkpointing: yes}", "`train.gradient_checkpointing: yes` is not true or false or a size such as 2GB"),
            ("train: {gradient_checkpointing: 2TB}", "`train.gradient_checkpointing: 2TB` is not true or false or a size such as 2GB"),
            ("train: {gradient_checkpointing: 2}", "`train.gradient_checkpointing: 2` is not true or false or"),
            ("train: {learning_rate: .inf}", "is not a finite number"),
            ("train: {learning_rate: 1e999}", "is not a finite number"),
            ("train: {learning_rate: .nan}", "`train.learning_rate: .nan`"),
            ("train: {learning_rate: null}", "`train.learning_rate: null` is not a number"),
            ("train: {learning_rate: 0}", "must be above 0"),
            ("train: {processes: four}", "is not one of 'auto' or a whole number"),
            ("train: {learning_rate: [1]}", "`train.learning_rate: [1]` is not a number"),
            ("eval: {generation: {top_p: 2}}", "must be at most 1"),
            ("eval: {max_new_tokens: 2}", "did you mean `eval.generation.max_new_tokens`?"),
            ("output: 5", "`output: 5` is not text"),
            ("method: {r: 4}", "unknown key `method.r`"),
            ("method: {kind: small, targets: 5}", "`method.targets: 5` is not text (quote it if it is) or a list"),
            ("method: {kind: small, targets: [5]}", "`method.targets[0]: 5` is not text"),
            ("method: 5", "`method: 5` is not the name of a kind"),
            ("method: {kind: [small]}", "is not the name of a kind"),
        ],
    )
    def test_wrong_values(self, text: str, words: str) -> None:
        (problem,) = problems(MINIMAL + text)
        assert problem.startswith("recipe.yaml:4:")
        assert words in problem

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            ("{train: x.csv, validation: 1.5}", ["`data.validation: 1.5` must be below 1"]),
            ("{train: x.csv, validation: {a: 5}}", ["`data.validation.a: 5` is not text"]),
            ("{train: x.csv, validation: {test: a.csv}}", ["needs another name"]),
            ("{train: x.csv, validation: {train: a.csv, base: b.csv}}", ["`data.validation.train: ", "`data.validation.base: "]),
            ("{train: x.csv, validation: {../x: a.csv}}", ["needs another name: letters, digits, `_`, `.` and `-`"]),
            ("{train: x.csv, validation: {'': a.csv}}", ["needs another name"]),
            ('{train: x.csv, validation: {"a\\n": a.csv}}', ["needs another name"]),
            ("{train: [1, x.csv]}", ["`data.train[0]: 1` is not text"]),
            ("{train: {a: b}}", ["`data.train: {a: b}` is not text (quote it if it is) or a list"]),
            ("{train: ''}", ["`data.train: ` must not be empty"]),
            ("{train: []}", ["`data.train: []` must not be empty"]),
            ("{}", ["missing required key `data.train`: csv, tsv"]),
            ("rows.csv", ["`data: rows.csv` is not a map"]),
        ],
    )
    def test_wrong_data(self, data: str, words: list[str]) -> None:
        found = problems(f"model: m\ntask: sorting\ndata: {data}\n")
        assert len(found) == len(words)
        for problem, expected in zip(found, words, strict=True):
            assert problem.startswith("recipe.yaml:3:")
            assert expected in problem

    def test_alternatives_of_a_type_are_told_apart(self) -> None:
        text = "model: {name: m, tokenizer: {train: data, vocab: 5}}\ntask: sorting\ndata: {train: x.csv}\n"
        assert problems(text) == ["recipe.yaml:1:43: unknown key `model.tokenizer.vocab`; did you mean `vocab_size`?"]
        text = "model: {name: m, tokenizer: 5}\ntask: sorting\ndata: {train: x.csv}\n"
        assert problems(text) == ["recipe.yaml:1:18: `model.tokenizer: 5` is not text (quote it if it is) or a map"]

    def test_missing_keys(self) -> None:
        found = problems("train: {}\n")
        assert [line.partition("`")[2].partition("`")[0] for line in found] == ["data", "model", "task"]
        assert "known: sorting" in problems("model: m\ntask: {labels: [a]}\ndata: {train: x.csv}\n")[0]

    def test_rules_of_a_section(self) -> None:
        (problem,) = problems("model: {init: random}\ntask: sorting\ndata: {train: x.csv}\n")
        assert problem.startswith("recipe.yaml:1:1: give model.name")

    def test_rules_of_a_section_stand_beside_its_unknown_keys(self) -> None:
        found = problems(MINIMAL + "train: {steps: 5, epochs: 1, sead: 3}\n")
        assert [line.partition(": ")[2].partition("`")[0] for line in found] == ["give train.epochs or train.steps, not both", "unknown key "]

    def test_duplicates_stand_beside_other_problems(self) -> None:
        found = problems(MINIMAL + "train: {seed: 1, seed: 2, sead: 3}\n")
        assert len(found) == 2

    def test_secrets_are_not_echoed(self) -> None:
        secrets = ["hf_" + "aB3" * 11, "sk-proj-" + "a1B2" * 8, "AKIA" + "ABCD1234EFGH5678", "sk-" + "a1b2" * 10]
        for secret in secrets:
            for text in (f"model: {secret}", f"train: {{learning_rate: {secret}}}", f"train: {{{secret}: 1}}", f"data: {{train: [x.csv, {secret}]}}"):
                told = "\n".join(problems("output: x\n" + text))
                assert "recipe.yaml:2:" in told
                assert "looks like a secret" in told
                assert secret not in told
            assert secret not in "\n".join(problems(MINIMAL, f"model.name={secret}"))

    def test_control_characters_are_not_echoed(self) -> None:
        (problem,) = problems(MINIMAL + 'train: {schedule: "\\e[31mred"}\n')
        assert "\x1b" not in problem


class TestFiles:
    def test_missing(self) -> None:
        with pytest.raises(RecipeError, match=r"^gone.yaml: No such file"):
            read("gone.yaml")

    def test_directory(self, place: Path) -> None:
        with pytest.raises(RecipeError, match="a directory, not a recipe"):
            read(place)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "the recipe is empty"),
            (b"# nothing\n", "the recipe is empty"),
            (b"- a\n- b\n", "not a list"),
            (b"model\n", "not one value"),
            (b"model: m\ntask: \xff\n", "recipe.yaml:2: not UTF-8 text"),
            (MINIMAL.encode("utf-16"), "not UTF-8 text"),
            (b"model: m\ntask: a\0b\n", "recipe.yaml:2: not valid YAML"),
            (b"model: !!python/name:os.system x\n", "tags"),
            (b"a: &a [x]\nb: [*a, *a]\n", "anchors"),
            (b"[" * 10_000_000, "larger than"),
            (b"[" * 900_000, "nested deeper"),
            (b"{a: " * 200_000, "nested deeper"),
        ],
    )
    def test_hostile_files(self, content: bytes, words: str) -> None:
        Path("recipe.yaml").write_bytes(content)
        with pytest.raises(RecipeError, match=words) as caught:
            read("recipe.yaml")
        assert str(caught.value).startswith("recipe.yaml:")

    @pytest.mark.parametrize(
        "content",
        [
            MINIMAL + "".join(f"k{i}: 1\n" for i in range(25_000)),
            MINIMAL + "train:\n" + "".join(f" seed{i}: x\n" for i in range(20_000)),
            MINIMAL.replace("org/base", "sk-" * 300_000),
            MINIMAL.replace("rows.csv", "a/" + "b" * 900_000),
            MINIMAL + f"{'x' * 900_000}: 1\n",
            MINIMAL + "train: {trackers: [" + "x, " * 80_000 + "]}\n",
        ],
        ids=["keys", "fields", "secret", "hub id", "key", "items"],
    )
    def test_many_mistakes_take_seconds_and_few_lines(self, content: str) -> None:
        started = time.process_time()
        with pytest.raises(RecipeError) as caught:
            read(write(content + "nonsense: 1\n"))
        assert len(str(caught.value)) < 20_000
        assert time.process_time() - started < 10

    def test_endless_file(self) -> None:
        with pytest.raises(RecipeError, match="larger than"):
            read("/dev/zero")


class TestPaths:
    def test_they_become_absolute(self, place: Path) -> None:
        text = (
            "model: {name: ./m, tokenizer: {train: [a.txt]}}\ntask: sorting\ndata: {train: [a/b.csv, /c.jsonl], validation: {x: v.tsv}, test: t}\noutput: out\n"
        )
        recipe = read(write(text, "deep/recipe.yaml")).recipe
        assert recipe.model.name == str(place / "m")
        assert recipe.model.tokenizer.train == [str(place / "a.txt")]
        assert recipe.data.train == [str(place / "a/b.csv"), "/c.jsonl"]
        assert recipe.data.validation == {"x": str(place / "v.tsv")}
        assert recipe.data.test == str(place / "t")
        assert recipe.output == str(place / "out")

    @pytest.mark.parametrize("name", ["org/name", "org/name:config", "org/name@main", "org/name:config@refs/convert/parquet", "org/na.me-2"])
    def test_hub_data(self, name: str) -> None:
        assert read(write(MINIMAL.replace("rows.csv", name))).recipe.data.train == name

    @pytest.mark.parametrize("name", ["org/name.csv", "./org/name", "org/name.json.gz", "name", "a/b/c", "../org/name"])
    def test_local_data(self, place: Path, name: str) -> None:
        train = read(write(MINIMAL.replace("rows.csv", name))).recipe.data.train
        assert train == str(place / name)

    @pytest.mark.parametrize("name", ["bert-base-uncased", "org/name"])
    def test_hub_models(self, name: str) -> None:
        assert read(write(MINIMAL.replace("org/base", name))).recipe.model.name == name

    def test_what_is_there_is_not_on_the_hub(self, place: Path) -> None:
        (place / "org" / "base").mkdir(parents=True)
        (place / "org" / "rows").mkdir()
        recipe = read(write(MINIMAL.replace("rows.csv", "org/rows"))).recipe
        assert recipe.model.name == str(place / "org/base")
        assert recipe.data.train == str(place / "org/rows")
        assert read(write(MINIMAL.replace("base", "bsae"))).recipe.model.name == str(place / "org/bsae")

    def test_home(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/someone")
        assert read(write(MINIMAL.replace("rows.csv", "~/rows.csv"))).recipe.data.train == "/home/someone/rows.csv"

    def test_names_that_no_file_system_takes(self) -> None:
        assert read(write(MINIMAL.replace("org/base", "x" * 5000))).recipe.model.name == "x" * 5000
        assert read(write(MINIMAL.replace("org/base", '"a\\0b"'))).recipe.model.name.endswith("a\0b")

    def test_tokenizer_trained_on_the_rows(self) -> None:
        recipe = read(write(MINIMAL.replace("org/base", "{name: m, tokenizer: {train: data}}"))).recipe
        assert recipe.model.tokenizer.train == "data"


class TestExtends:
    def test_maps_merge_and_lists_replace(self) -> None:
        write(MINIMAL + "train: {seed: 1, trackers: [wandb, mlflow]}\n", "base.yaml")
        train = read(write("extends: base.yaml\ntrain: {batch_size: 4, trackers: [tensorboard]}\n")).recipe.train
        assert (train.seed, train.batch_size, train.trackers) == (1, 4, ["tensorboard"])

    def test_later_parents_win(self) -> None:
        write(MINIMAL + "train: {seed: 1, keep: 1}\n", "one.yaml")
        write("train: {seed: 2, keep: 2}\n", "two.yaml")
        train = read(write("extends: [one.yaml, two.yaml]\ntrain: {keep: 3}\n")).recipe.train
        assert (train.seed, train.keep) == (2, 3)

    def test_paths_in_a_parent_start_from_its_file(self, place: Path) -> None:
        write("model: ./m\ntask: sorting\ndata: {train: rows.csv, test: org/test}\n", "shared/deep/base.yaml")
        write("extends: deep/base.yaml\n", "shared/middle.yaml")
        recipe = read(write("extends: ../shared/middle.yaml\ndata: {validation: dev.csv}\n", "mine/recipe.yaml")).recipe
        folder = place / "mine" / ".." / "shared" / "deep"
        assert recipe.data.train == str(folder / "rows.csv")
        assert recipe.model.name == str(folder / "m")
        assert recipe.data.test == "org/test"
        assert recipe.data.validation == str(place / "dev.csv")
        assert recipe.output == str(place / "runs" / "recipe")

    def test_another_kind_drops_the_fields_of_the_first(self) -> None:
        write(MINIMAL + "method: {kind: small, r: 4}\n", "base.yaml")
        kept = read(write("extends: base.yaml\nmethod: {targets: [a]}\n")).recipe
        assert (kept.method.kind, kept.method.r) == ("small", 4)
        changed = read(write("extends: base.yaml\nmethod: smaller\n"))
        assert changed.recipe.method.r == 2
        assert changed.origins["method.r"] == "default"

    def test_circles(self) -> None:
        write("extends: b.yaml\n", "a.yaml")
        write("extends: [a.yaml]\n", "b.yaml")
        with pytest.raises(RecipeError, match=r"b.yaml:1:11: .*circle: a.yaml -> b.yaml -> a.yaml"):
            read("a.yaml")
        with pytest.raises(RecipeError, match="circle"):
            read(write("extends: self.yaml\n", "self.yaml"))

    def test_many_paths_to_the_same_parents_are_read_once(self) -> None:
        write(MINIMAL, "0.yaml")
        for i in range(1, 40):
            write(f"extends: [{i - 1}.yaml, {i - 1}.yaml]\n", f"{i}.yaml")
        assert read("39.yaml").recipe.model.name == "org/base"

    def test_deep_chains(self) -> None:
        for i in range(100):
            write(f"extends: {i + 1}.yaml\n", f"{i}.yaml")
        with pytest.raises(RecipeError, match="deeper than 64 files"):
            read("0.yaml")

    @pytest.mark.parametrize("value", ["gone.yaml", "[gone.yaml]"])
    def test_missing_parent(self, value: str) -> None:
        (problem,) = problems(f"extends: {value}\n")
        assert problem.startswith("recipe.yaml:1:")
        assert "gone.yaml: No such file" in problem

    @pytest.mark.parametrize("value", ["5", "{a: b}", '"a\\0b"'])
    def test_what_is_no_path(self, value: str) -> None:
        assert "is not the path of a recipe" in problems(MINIMAL + f"extends: {value}\n")[0]

    def test_problems_of_a_parent_name_its_file(self) -> None:
        write(MINIMAL + "train: {sead: 1}\n", "base.yaml")
        found = problems("extends: base.yaml\ntrain: {seeed: 1}\n")
        assert [line.split(" ")[0] for line in found] == ["base.yaml:4:9:", "recipe.yaml:2:9:"]


class TestOverrides:
    def test_values_are_yaml(self) -> None:
        overrides = [
            "train.learning_rate=1e-3",
            "train.trackers=[wandb]",
            "model.config={hidden_size: 8}",
            "train.max_grad_norm=null",
            "data.validation=0.1",
            "method=small",
            "method.r=4",
            "output=runs/a=b",
        ]
        recipe = read(write(MINIMAL), overrides).recipe
        assert recipe.train.learning_rate == 1e-3
        assert recipe.train.trackers == ["wandb"]
        assert recipe.model.config == {"hidden_size": 8}
        assert recipe.train.max_grad_norm is None
        assert recipe.data.validation == 0.1
        assert (recipe.method.kind, recipe.method.r) == ("small", 4)
        assert recipe.output.endswith("/runs/a=b")

    def test_text_needs_no_quotes_where_only_text_will_do(self) -> None:
        recipe = read(write(MINIMAL), ["model.revision=1234567", "output=010", "method=small", "method.targets=1e5", "data.columns.text=1"]).recipe
        assert recipe.model.revision == "1234567"
        assert recipe.output.endswith("010")
        assert recipe.method.targets == "1e5"
        assert recipe.data.columns == {"text": "1"}

    def test_order_does_not_matter_for_kinds(self) -> None:
        assert read(write(MINIMAL), ["method.r=4", "method.kind=small"]).recipe.method.r == 4

    def test_the_last_of_equal_keys_wins(self) -> None:
        assert read(write(MINIMAL), ["train.seed=1", "train.seed=2"]).recipe.train.seed == 2

    @pytest.mark.parametrize(
        ("override", "words"),
        [
            ("train.learnig_rate=1", "command line: unknown key `train.learnig_rate`; did you mean `learning_rate`?"),
            ("seed=1", "command line: unknown key `seed`; did you mean `train.seed`?"),
            ("train.seed=x", "command line: `train.seed: x` is not a whole number"),
            ("train.seed.x=1", "is not a whole number"),
            ("train.seed", "is not key=value"),
            ("=1", "is not key=value"),
            ("train..seed=1", "is not key=value"),
            ("--oops=1", "unknown key `--oops`"),
            ("model.config=a: b", "a map is written {key: value} here"),
            ("train.trackers=[wandb", "not valid YAML"),
            ("train.seed=!!int 1", "tags"),
            ("train.seed=*a", "aliases"),
            ("extends=other.yaml", "unknown key `extends`"),
            ("train.seed=\udcff", "not UTF-8"),
        ],
    )
    def test_mistakes(self, override: str, words: str) -> None:
        (problem,) = problems(MINIMAL, override)
        assert problem.startswith("command line")
        assert words in problem

    def test_base_paths_and_files_differ(self, place: Path) -> None:
        write(MINIMAL, "shared/base.yaml")
        recipe = read(write("extends: shared/base.yaml\n"), ["data.test=t.csv"]).recipe
        assert recipe.data.test == str(place / "t.csv")
        assert recipe.data.train == str(place / "shared" / "rows.csv")


class TestDump:
    @pytest.mark.parametrize(
        "text",
        [
            MINIMAL,
            MINIMAL + "method: {kind: small, targets: ['1e-4', 'no', '~', '']}\ntrain: {steps: 3, max_grad_norm: null, early_stopping: {}}\n",
            "model: {name: m, revision: '010', config: {a: .inf, b: [1, {c: 'null'}], 'x y': '1:2', d.e: 1}}\n"
            "task: {kind: sorting, labels: ['0', 'on', ' x', \"a\\nb\", 'ü#']}\ndata: {train: [x.csv], validation: {a: b.csv}, columns: {text: '1'}}\n",
        ],
    )
    def test_what_is_written_is_read_back(self, text: str) -> None:
        recipe = read(write(text)).recipe
        again = read(write(dump(recipe), "other/run.yaml"))
        assert again.recipe.model_dump() == recipe.model_dump()
        assert not [key for key, origin in again.origins.items() if origin.startswith("default")]
        assert dump(again.recipe) == dump(recipe)

    def test_a_run_is_repeated_elsewhere(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        written = dump(read(write(MINIMAL + "train: {steps: 3}\n")).recipe)
        (place / "elsewhere").mkdir()
        monkeypatch.chdir(place / "elsewhere")
        recipe = read(write(written), ["output=again", "train.epochs=1"]).recipe
        assert recipe.data.train == str(place / "rows.csv")
        assert recipe.output == str(place / "elsewhere" / "again")
        assert (recipe.train.epochs, recipe.train.steps) == (1.0, None)


class TestSchema:
    def test_kinds_and_shorthands(self) -> None:
        value = schema()
        text, discriminated = value["properties"]["method"]["anyOf"]
        assert text == {"type": "string", "enum": ["full", "small", "smaller"]}
        assert [ref["$ref"] for ref in discriminated["anyOf"]] == ["#/$defs/Whole", "#/$defs/Small", "#/$defs/Smaller"]
        assert discriminated["discriminator"]["propertyName"] == "kind"
        assert value["$defs"]["Small"]["properties"]["kind"]["const"] == "small"
        assert value["$defs"]["Small"]["additionalProperties"] is False
        assert value["properties"]["task"]["anyOf"][1] == {"$ref": "#/$defs/Sorting"}
        assert value["properties"]["model"]["anyOf"] == [{"type": "string"}, {"$ref": "#/$defs/Model"}]
        assert value["additionalProperties"] is False
        assert json.loads(json.dumps(value)) == schema()

    def test_only_whole_recipes_require_keys(self) -> None:
        extending, whole = schema()["anyOf"]
        assert extending == {"required": ["extends"]}
        assert whole["required"] == ["model", "task", "data"]
        assert whole["properties"]["data"]["required"] == ["train"]
        assert "required" not in schema()


class TestPlugins:
    def test_installed_kinds_come_after_built_ins_and_cannot_shadow_them(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = place / "other-1.0.dist-info"
        package.mkdir()
        (package / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
        (package / "entry_points.txt").write_text(f"[ftkit.method]\ntheirs = {__name__}:Small\nfull = {__name__}:Small\n")
        monkeypatch.syspath_prepend(place)
        assert plugins.known("method") == ["full", "small", "smaller", "theirs"]
        assert plugins.find("method", "theirs") is Small
        assert plugins.find("method", "full") is Whole

    def test_a_broken_installed_kind(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = place / "other-1.0.dist-info"
        package.mkdir()
        (package / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
        (package / "entry_points.txt").write_text("[ftkit.method]\ntheirs = no_such_module:Method\n")
        monkeypatch.syspath_prepend(place)
        with pytest.raises(MissingDependency, match=r"theirs.*no_such_module"):
            read(write(MINIMAL + "method: theirs\n"))

    def test_only_named_kinds_are_imported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(plugins.BUILTIN["method"], "broken", "no.such.module:Nothing")
        assert read(write(MINIMAL)).recipe.method.kind == "full"
        with pytest.raises(ModuleNotFoundError):
            read(write(MINIMAL + "method: broken\n"))


def test_a_mistake_is_told_without_heavy_imports(place: Path) -> None:
    write("model: m\ntask: text-classification\ndata: {trian: x.csv}\nmethod: {kind: lora, rank: 4}\n")
    code = (
        "import sys\nfrom ftkit.recipe import read\nfrom ftkit.errors import MissingDependency, RecipeError\n"
        "try: read('recipe.yaml')\nexcept RecipeError as error: print(error)\n"
        "print(sorted({'torch', 'transformers', 'peft', 'numpy', 'rich', 'datasets', 'huggingface_hub', 'pyarrow'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    assert "unknown key `data.trian`" in done.stdout
    assert "unknown key `method.rank`" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
