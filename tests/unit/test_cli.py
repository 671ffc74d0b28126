"""The command line: what goes to which stream, exit codes, and how little it imports."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import ftkit
from ftkit import errors
from ftkit.cli import main
from ftkit.exits import explain

ROOT = Path(__file__).parents[2]
RECIPE = "model: org/base\ntask: text-classification\ndata: {train: rows.csv}\n"
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "numpy", "pyarrow", "rich", "matplotlib", "huggingface_hub"}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)

    def command(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        output = capsys.readouterr()
        return code, output.out, output.err

    return command


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Replace functions of a heavy module; returns the calls they get."""

    def replace(module: str, **functions: Any) -> list[Any]:
        calls: list[Any] = []
        fake = ModuleType(module)

        def recorded(function: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                calls.append((args, kwargs))
                print("a library says something")
                return function(*args, **kwargs)

            return call

        for name, function in functions.items():
            setattr(fake, name, recorded(function))
        monkeypatch.setitem(sys.modules, module, fake)
        monkeypatch.setattr(ftkit, module.rpartition(".")[2], fake, raising=False)
        return calls

    return replace


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in {"NO_COLOR", "FORCE_COLOR", "RANK"}}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env={**clean, "PYTHONPATH": str(ROOT), **environment}, timeout=60)


class TestHelp:
    @pytest.mark.parametrize(
        "command", [[], ["train"], ["eval"], ["predict"], ["merge-adapter"], ["compress"], ["check"], ["show"], ["schema"], ["list"], ["cache"]]
    )
    def test_it_is_plain_text_on_stdout(self, run: Run, command: list[str]) -> None:
        code, out, err = run(*command, "--help")
        assert (code, err) == (0, "")
        assert out.startswith("Usage: ftkit")
        assert "\x1b" not in out

    def test_without_a_command(self, run: Run) -> None:
        assert run() == run("--help")

    def test_version(self, run: Run) -> None:
        assert run("--version") == (0, f"ftkit {ftkit.__version__}\n", "")

    def test_it_imports_next_to_nothing(self) -> None:
        code = "import sys\nfrom ftkit.cli import main\nmain(['--help'])\nprint(sorted(sys.modules), file=sys.stderr)"
        done = python("-c", code, PYTHONDONTWRITEBYTECODE="1")
        imported = set(eval_list(done.stderr))
        assert not imported & (HEAVY | {"pydantic", "yaml"})

    def test_module(self) -> None:
        done = python("-m", "ftkit", "--version")
        assert (done.returncode, done.stdout) == (0, f"ftkit {ftkit.__version__}\n")


class TestMatrix:
    def test_it_tells_what_works_with_what_and_what_is_lacking(self, run: Run) -> None:
        code, out, _ = run("list", "--matrix")
        assert code == 0
        assert "text-classification: 48 architectures, 20 methods, 888 of 960 together" in out
        assert "  gpt2, head: no head apart from the input embedding" in out
        table = json.loads(run("list", "--matrix", "--json")[1])
        cells = [answer for row in table["text-classification"].values() for answer in row.values()]
        assert (len(cells), cells.count("yes")) == (960, 888)
        assert table["causal-lm"]["llama"]["bitfit"] == "no biases"
        assert table["sentence-embedding"]["llama"]["head"] == "no head apart from the input embedding"
        assert ("t5" in table["sentence-embedding"], "squeezebert" in table["sentence-embedding"]) == (False, False)
        assert table["text-classification"]["squeezebert"]["head/4"] == "no linear modules"
        assert "before a separator" in table["question-answering"]["big_bird"]["prompt/4"]
        assert (table["seq2seq"]["t5"]["bitfit"], table["seq2seq"]["bart"]["bitfit"]) == ("no biases", "yes")

    def test_it_needs_none_of_the_heavy_modules(self) -> None:
        code = "import sys\nfrom ftkit.cli import main\nmain(['list', '--matrix'])\nprint(sorted(sys.modules), file=sys.stderr)"
        assert not set(eval_list(python("-c", code).stderr)) & HEAVY


def eval_list(text: str) -> list[str]:
    return json.loads(text.strip().replace("'", '"'))


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["nope"], "No such command"),
            (["train"], "Missing argument"),
            (["train", "recipe.yaml", "--nope"], "No such option"),
            (["train", "recipe.yaml", "--resume", "--overwrite"], "choose one"),
            (["predict", "run"], "give texts, or --file F, or --chat"),
            (["predict", "run", "text", "--chat"], "give texts, or --file F, or --chat"),
            (["merge-adapter", "run"], "Missing option"),
            (["merge-adapter", "run", "-o", "out", "--base", "other"], "original"),
            (["compress", "run"], "Missing option"),
            (["compress", "run", "-o", "out", "--resume", "--overwrite"], "choose one"),
            (["train", "gone.yaml"], "gone.yaml: No such file"),
            (["train", "recipe.yaml", "train.sead=1"], "did you mean `seed`?"),
            (["check", "recipe.yaml", "nonsense"], "is not key=value"),
        ],
    )
    def test_mistakes_exit_with_2(self, run: Run, arguments: list[str], words: str) -> None:
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert words in err
        assert "Traceback" not in err
        code, out, err = run(*arguments, "--json")
        assert (code, err) == (2, "")
        document = json.loads(out)
        assert document["code"] == 2
        assert words in document["error"]


class TestTrain:
    def test_it_calls_and_prints(self, run: Run, stand_in: Callable[..., list[Any]]) -> None:
        calls = stand_in("ftkit.run", train=lambda *_, **__: {"seconds": 1.0, "metrics": {"test": {"loss": float("nan")}}})
        code, out, err = run("train", "recipe.yaml", "train.seed=3", "output=runs/x", "--smoke", "--overwrite", "--json")
        assert code == 0
        assert calls == [(("recipe.yaml", ["train.seed=3", "output=runs/x"]), {"resume": False, "overwrite": True, "smoke": True})]
        assert json.loads(out) == {"seconds": 1.0, "metrics": {"test": {"loss": None}}}
        assert err == "a library says something\n"

    def test_the_summary_is_for_people(self, run: Run, stand_in: Callable[..., list[Any]]) -> None:
        stand_in("ftkit.run", train=lambda *_, **__: {"metrics": {"test": {"accuracy": 0.75}}})
        code, out, _ = run("train", "recipe.yaml")
        assert code == 0
        assert "accuracy" in out
        assert "0.75" in out
        assert "\x1b" not in out

    def test_a_mistake_is_found_before_anything_heavy_is_imported(self, run: Run, stand_in: Callable[..., list[Any]]) -> None:
        calls = stand_in("ftkit.run", train=dict)
        assert run("train", "recipe.yaml", "train.epochs=x")[0] == 2
        assert calls == []

    def test_other_ranks_are_silent(self, run: Run, stand_in: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
        stand_in("ftkit.run", train=lambda *_, **__: {"seconds": 1.0})
        monkeypatch.setenv("WORLD_SIZE", "2")
        for rank, silent in (("0", False), ("1", True)):
            monkeypatch.setenv("RANK", rank)
            assert (run("train", "recipe.yaml", "--json")[1] == "") is silent

    def test_ranks_leave_their_errors_to_their_parent(
        self, run: Run, stand_in: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        stand_in("ftkit.run", train=failing(errors.DataError("row 3")))
        monkeypatch.setenv("FTKIT_ERROR_DIR", str(tmp_path))
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        assert run("train", "recipe.yaml") == (3, "", "a library says something\n")
        left = json.loads((tmp_path / "rank-1.json").read_text())
        assert (left["code"], left["message"]) == (3, "row 3")


class TestOtherCommands:
    def test_eval(self, run: Run, stand_in: Callable[..., list[Any]]) -> None:
        calls = stand_in("ftkit.remeasure", evaluate=lambda *_, **__: {"metrics": {"x": {"accuracy": 1.0}}})
        code, out, _ = run("eval", "runs/x", "--data", "x.csv", "--split", "x", "--shots", "2", "--json")
        assert (code, json.loads(out)) == (0, {"metrics": {"x": {"accuracy": 1.0}}})
        assert calls == [(("runs/x",), {"data": "x.csv", "split": "x", "prompt": None, "shots": 2, "against": None})]

    def test_predict_prints_a_line_for_each_answer_or_one_document(self, run: Run, stand_in: Callable[..., list[Any]]) -> None:
        answers = [{"text": "größe", "label": "a"}, {"text": "\ud800", "label": "b"}]
        calls = stand_in("ftkit.predict", predict=lambda *_: iter(answers))
        code, out, err = run("predict", "runs/x", "größe", "two")
        assert code == 0
        assert [json.loads(line) for line in out.splitlines()] == answers
        assert "größe" in out
        assert err == "a library says something\n"
        code, out, _ = run("predict", "runs/x", "--file", "rows.csv", "--json")
        assert json.loads(out) == answers
        assert calls == [(("runs/x", ["größe", "two"], None), {}), (("runs/x", [], "rows.csv"), {})]

    def test_chat(self, run: Run, stand_in: Callable[..., list[Any]]) -> None:
        calls = stand_in("ftkit.predict", chat=lambda target: None)
        assert run("predict", "runs/x", "--chat")[0] == 0
        assert calls == [(("runs/x",), {})]
        code, out, _ = run("predict", "runs/x", "--chat", "--json")
        assert (code, "--chat is for people" in out) == (2, True)

    def test_merge_adapter(self, run: Run, stand_in: Callable[..., list[Any]]) -> None:
        calls = stand_in("ftkit.merge", merge=lambda *_, note: note("comparing") or {"output": "merged", "max_difference": 0.0})
        code, out, err = run("merge-adapter", "runs/x", "-o", "merged", "--base", "original", "--dtype", "bfloat16")
        assert (code, out) == (0, "output: merged\nmax_difference: 0.0\n")
        assert "comparing" in err
        assert calls[0][0] == ("runs/x", "merged", "original", "bfloat16")
        run("merge-adapter", "runs/x", "-o", "merged", "--json")
        assert calls[1][0] == ("runs/x", "merged", "stored", None)

    def test_merge_several_adapters(self, run: Run, stand_in: Callable[..., list[Any]]) -> None:
        calls = stand_in("ftkit.combine", combine=lambda *_, note: {"output": "merged"})
        assert run("merge-adapter", "runs/x", "runs/y", "--weights", "0.7,0.3", "-o", "merged")[0] == 0
        assert calls[0][0] == (["runs/x", "runs/y"], [0.7, 0.3], "merged", None)
        assert run("merge-adapter", "runs/x", "runs/y", "-o", "merged")[0] == 0
        assert calls[1][0][1] is None
        code, _, err = run("merge-adapter", "runs/x", "runs/y", "--weights", "most", "-o", "merged")
        assert (code, "no list of numbers such as 0.7,0.3" in err) == (2, True)
        code, _, err = run("merge-adapter", "runs/x", "runs/y", "-o", "merged", "--base", "original")
        assert (code, "several adapters" in err) == (2, True)

    def test_check(self, run: Run, stand_in: Callable[..., list[Any]]) -> None:
        stand_in("ftkit.preflight", check=lambda resolved, report: [])
        assert run("check", "recipe.yaml")[:2] == (0, "recipe.yaml: nothing wrong\n")
        assert json.loads(run("check", "recipe.yaml", "--json")[1]) == {"problems": []}
        stand_in("ftkit.preflight", check=lambda resolved, report: [errors.DataError("rows.csv is missing"), errors.RecipeError("no such model")])
        code, out, err = run("check", "recipe.yaml")
        assert (code, out) == (3, "")
        assert err.endswith("error: rows.csv is missing\nno such model\n")

    def test_show(self, run: Run, stand_in: Callable[..., list[Any]]) -> None:
        groups = {"layers": {"trainable": 10, "total": 2000}}
        expected = SimpleNamespace(parameters=groups, layout="bucketed", not_flat="its attention is its own", learning_rate=5.8e-5)
        stand_in("ftkit.preflight", forecast=lambda resolved: expected)
        code, out, _ = run("show", "recipe.yaml", "train.seed=7", "data.columns={a.b: '1'}", "model.revision=123")
        assert code == 0
        lines = [line.split() for line in out.splitlines()]
        assert ["train.seed", "7", "#", "command", "line"] in lines
        assert ["task.kind", "text-classification", "#", "recipe.yaml:2"] in lines
        assert ["data.columns.a.b", '"1"', "#", "command", "line"] in lines
        assert ["model.revision", '"123"', "#", "command", "line"] in lines
        assert ["layers", "10", "2,000"] in lines
        assert ["layout", "bucketed", "(not", "flat:", "its", "attention", "is", "its", "own)"] in lines
        document = json.loads(run("show", "recipe.yaml", "--json")[1])
        assert document["recipe"]["train"]["seed"] == 42
        assert document["recipe"]["train"]["learning_rate"] == 5.8e-5  # for a model of its width
        assert document["origins"]["model.name"] == "recipe.yaml:1"
        assert document["parameters"] == groups
        assert document["layout"] == "bucketed"

    def test_show_without_parameters(self, run: Run, stand_in: Callable[..., list[Any]]) -> None:
        stand_in("ftkit.preflight", forecast=failing(errors.HubError("no network")))
        code, out, err = run("show", "recipe.yaml")
        assert code == 0
        assert "train.seed" in out
        assert "trainable" not in out
        assert "parameters: no network" in err

    def test_schema(self, run: Run) -> None:
        code, out, _ = run("schema")
        assert code == 0
        document = json.loads(out)
        assert {"text-classification", "causal-lm"} <= set(document["properties"]["task"]["anyOf"][0]["enum"])

    def test_shipped_schema_is_current(self, run: Run) -> None:
        shipped = ROOT / "ftkit" / "recipe" / "schema.json"
        assert shipped.read_text(encoding="utf-8") == run("schema")[1], "run: ftkit schema > ftkit/recipe/schema.json"

    def test_list(self, run: Run) -> None:
        code, out, _ = run("list")
        assert code == 0
        assert "lora" in out
        kinds = json.loads(run("list", "--json")[1])
        assert list(kinds) == ["task", "method", "objective"]
        assert all(summary for summaries in kinds.values() for summary in summaries.values())

    def test_cache(self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / "cache"))
        code, out, _ = run("cache")
        assert code == 0
        assert str(tmp_path / "cache") in out
        assert json.loads(run("cache", "--clear", "--json")[1])["freed_bytes"] == 0


class TestExits:
    @pytest.mark.parametrize(
        ("error", "code", "words"),
        [
            *((kind("it"), kind.code, "it") for kind in errors.FtkitError.__subclasses__()),
            (MemoryError(), 5, "out of memory"),
            (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 5, "you tried to allocate 9 bytes"),
            (RuntimeError("CUDA out of memory"), 5, "train.accumulate"),
            (OSError(errno.ENOSPC, "No space left on device", "/x/model"), 7, "/x/model: "),
            (PermissionError(errno.EACCES, "Permission denied", "/x"), 7, "Permission denied"),
            (OSError(errno.EROFS, "Read-only file system"), 7, "Read-only"),
            (Exception("Error while serializing: IoError(No space left on device (os error 28))"), 7, "No space left"),
            (ConnectionError("no route"), 8, "no route"),
            (ConnectionResetError(errno.ECONNRESET, "reset"), 8, "reset"),
            (TimeoutError("slow"), 8, "slow"),
            (KeyboardInterrupt(), 130, "interrupted"),
            (ValueError("odd"), 1, "this is a defect of ftkit, please report it"),
            (FileNotFoundError(errno.ENOENT, "No such file", "x"), 1, "defect"),
            (RuntimeError("shape mismatch"), 1, "shape mismatch"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
    )
    def test_codes(self, error: BaseException, code: int, words: str) -> None:
        found, message = explain(error)
        assert found == code
        assert words in message
        assert ("defect" in message) == (code == 1)

    def test_hub_errors(self) -> None:
        from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

        assert explain(LocalEntryNotFoundError("not in the cache"))[0] == 8
        assert explain(OfflineModeIsEnabled("offline"))[0] == 8

    def test_torch_out_of_memory(self) -> None:
        import torch

        assert explain(torch.OutOfMemoryError("17 GiB"))[0] == 5

    def test_what_an_error_was_raised_from_counts(self) -> None:
        def chained() -> Iterator[None]:
            try:
                raise ConnectionError("no route")
            except ConnectionError as error:
                raise OSError("cannot load x") from error
            yield

        with pytest.raises(OSError, match="cannot load x") as caught:
            next(chained())
        assert explain(caught.value)[0] == 8

    def test_no_import_of_torch(self) -> None:
        done = python("-c", "import sys\nfrom ftkit.exits import explain\nexplain(ValueError())\nprint('torch' in sys.modules)")
        assert done.stdout == "False\n"

    def test_a_defect_shows_its_traceback(self, run: Run, stand_in: Callable[..., list[Any]]) -> None:
        stand_in("ftkit.run", train=failing(ZeroDivisionError("oops")))
        code, out, err = run("train", "recipe.yaml")
        assert (code, out) == (1, "")
        assert "error: this is a defect of ftkit" in err
        assert "ZeroDivisionError: oops" in err
        code, out, _ = run("train", "recipe.yaml", "--json")
        assert json.loads(out)["code"] == 1

    def test_an_error_of_ours_shows_none(self, run: Run, stand_in: Callable[..., list[Any]]) -> None:
        stand_in("ftkit.run", train=failing(errors.Diverged("step 3")))
        assert run("train", "recipe.yaml") == (6, "", "a library says something\nerror: step 3\n")

    def test_interrupted(self, run: Run, stand_in: Callable[..., list[Any]]) -> None:
        stand_in("ftkit.run", train=failing(KeyboardInterrupt()))
        code, _, err = run("train", "recipe.yaml")
        assert code == 130
        assert err.endswith("error: interrupted\n")

    def test_closed_pipe(self) -> None:
        command = [sys.executable, "-m", "ftkit", "schema"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 7


def test_a_mistake_in_a_recipe_is_told_without_heavy_imports(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE + "trian: {epochs: 1}\n")
    code = f"import sys\nfrom ftkit.cli import main\nmain(['train', {str(tmp_path / 'recipe.yaml')!r}])\nprint(sorted({HEAVY!r} & set(sys.modules)))"
    done = python("-c", code)
    assert "unknown key `trian`; did you mean `train`?" in done.stderr
    assert done.stdout == "[]\n"
