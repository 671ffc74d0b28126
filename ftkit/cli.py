"""The command line.  Each body: import, call, print; results go to stdout, everything else to stderr."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from enum import StrEnum
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

import ftkit
from ftkit.errors import DiskError, FtkitError, Interrupted, RecipeError

# pydantic otherwise looks for plugins in the metadata of every installed package, a fifth of the time a check takes
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

app = typer.Typer(
    help="Fine-tune any transformer from one YAML recipe, and prove what the run did.",
    rich_markup_mode=None,
    add_completion=False,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
UsageError: Any = typer.BadParameter.__base__  # click's, or that of Typer's own copy of click, by Typer's version


class MergeBase(StrEnum):
    """Which weights an adapter is merged into."""

    stored = "stored"
    original = "original"


class Dtype(StrEnum):
    """How merged weights are stored."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings over those of the recipe, such as train.epochs=1.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.callback()
def options(context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"ftkit {ftkit.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest complete checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output directory.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Two steps on a tiny random model of the same kind, without the network.")] = False,
    as_json: AsJson = False,
) -> None:
    """Do what a recipe says: train, evaluate, save, verify."""
    if resume and overwrite:
        raise UsageError("--resume continues a run, --overwrite removes it: choose one")
    _read(recipe, overrides)
    with redirect_stdout(sys.stderr):  # what libraries print is not the result
        from ftkit.run import train

        summary = train(recipe, overrides or (), resume=resume, overwrite=overwrite, smoke=smoke)
    if "RANK" in os.environ:  # one of many processes: the first one, or the one that started them, tells for all
        from ftkit import launch

        if launch.world().rank > 0 or launch.ERROR_DIR in os.environ:
            return
    _print_summary(summary, as_json)


@app.command(name="eval")
def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_RECIPE", help="A run directory; or a recipe, whose untrained base is measured.")],
    data: Annotated[str | None, typer.Option("--data", metavar="FILE", help="Measure on these rows.")] = None,
    split: Annotated[str | None, typer.Option("--split", metavar="NAME", help="Measure on one of the recipe's sets.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="FILE", help="Measure the untuned model too, with this text before each row.")] = None,
    shots: Annotated[int, typer.Option("--shots", metavar="N", min=0, help="Measure the untuned model too, with N answered training rows before each.")] = 0,
    against: Annotated[str | None, typer.Option("--against", metavar="RUN", help="Compare score, answers, size and latency with another run's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a run on its own sets or on other rows, beside a prompt or another run."""
    with redirect_stdout(sys.stderr):
        from ftkit.remeasure import evaluate

        summary = evaluate(target, data=data, split=split, prompt=prompt, shots=shots, against=against)
    _print_summary(summary, as_json)


@app.command()
def predict(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")],
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="What to answer; a run on pairs takes two texts each.")] = None,
    file: Annotated[str | None, typer.Option("--file", metavar="F", help="Answer the rows of a data file.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Talk to the model, until the end of input or an empty line.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV with a header; lists and objects in it are JSON.")] = False,
    as_json: AsJson = False,
) -> None:
    """Answer texts or the rows of a file, one JSON object a line."""
    if sum((bool(texts), file is not None, chat)) != 1:
        raise UsageError("give texts, or --file F, or --chat")
    if sum((chat, as_csv, as_json)) > 1:
        raise UsageError("--chat is for people: it has no --json and no --csv" if chat else "give --json or --csv, not both")
    if chat:
        from ftkit.predict import chat as talk

        talk(run)
        return
    with redirect_stdout(sys.stderr):
        from ftkit.predict import predict

        answers = predict(run, texts or [], file)
    if as_csv:
        from ftkit.predict import write_csv

        with redirect_stdout(sys.stderr):
            table = write_csv(answers)
        for line in table:
            print(line, end="")
    elif as_json:
        with redirect_stdout(sys.stderr):
            document = list(answers)
        _print_json(document)
    else:
        for answer in answers:
            print(json.dumps(answer, ensure_ascii=False), flush=True)


@app.command(name="merge-adapter")
def merge_adapter(
    targets: Annotated[list[str], typer.Argument(metavar="RUN_OR_ADAPTER...", help="Run directories, or adapters in PEFT's format, of one base.")],
    output: Annotated[str, typer.Option("-o", "--output", metavar="DIR", help="Where the merged model is written.")],
    weights: Annotated[str | None, typer.Option(metavar="A,B,...", help="How much each of several adapters counts; alike, and 1 together, if empty.")] = None,
    base: Annotated[MergeBase, typer.Option(help="Merge into the weights as the adapter saw them, or as they were before 4 or 8 bits.")] = MergeBase.stored,
    dtype: Annotated[Dtype | None, typer.Option(help="How the merged weights are stored; as the base if empty.")] = None,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base, and compare the two."""
    with redirect_stdout(sys.stderr):
        if len(targets) == 1 and weights is None:
            from ftkit.merge import merge

            summary = merge(targets[0], output, base.value, dtype and dtype.value, note=print)
        else:
            if base is not MergeBase.stored:
                raise typer.BadParameter("several adapters are merged into the weights that they were trained beside", param_hint="--base")
            from ftkit.combine import combine

            summary = combine(targets, _numbers(weights), output, dtype and dtype.value, note=print)
    if as_json:
        _print_json(summary)
    else:
        for name, value in summary.items():
            print(f"{name}: {value}")


@app.command()
def compress(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A finished run whose model is whole, not an adapter.")],
    output: Annotated[str, typer.Option("-o", "--output", metavar="DIR", help="The run directory of the smaller model.")],
    overrides: Overrides = None,
    heads: Annotated[float | None, typer.Option(metavar="SHARE", help="Take this share of the attention heads out of each layer.")] = None,
    feed_forward: Annotated[float | None, typer.Option(metavar="SHARE", help="Take this share of the feed-forward units out of each layer.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Compute linear layers in 8 bits, on a CPU.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with one that was stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output directory.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a run smaller and faster: prune, fine-tune again, quantise."""
    if resume and overwrite:
        raise UsageError("--resume goes on with a run, --overwrite removes it: choose one")
    with redirect_stdout(sys.stderr):
        from ftkit.compress import compress

        summary = compress(run, output, heads, feed_forward, int8, overrides or (), resume, overwrite)
    if as_json:
        _print_json(summary)
    else:
        from ftkit.summary import print_compression

        print_compression(summary)


@app.command()
def check(recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Find all that is wrong with a recipe, without training."""
    resolved = _read(recipe, overrides)
    with redirect_stdout(sys.stderr):
        from ftkit.preflight import check
        from ftkit.report import Reporter

        with Reporter(None) as report:
            problems = check(resolved, report)
    if problems:
        found = FtkitError("\n".join(map(str, problems)))
        found.code = problems[0].code
        raise found
    _print_json({"problems": []}) if as_json else print(f"{recipe}: nothing wrong")


@app.command()
def show(recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print every setting and its origin, the layout of batches, and parameters by group."""
    resolved = _read(recipe, overrides)
    with redirect_stdout(sys.stderr):
        from ftkit.preflight import forecast

        try:
            expected = forecast(resolved)
        except FtkitError as error:  # no reason not to show the recipe
            expected = None
            print(f"parameters: {error}")
    values = resolved.recipe.model_dump()
    if expected:
        values["train"]["learning_rate"] = expected.learning_rate
    if as_json:
        _print_json({"recipe": values, "origins": resolved.origins, "parameters": expected and expected.parameters, "layout": expected and expected.layout})
        return
    from ftkit.recipe.document import one_line

    rows = [(key, one_line(value), resolved.origins[key]) for key, value in _leaves(values, resolved.origins)]
    width = max(len(key) for key, _, _ in rows)
    for key, value, origin in rows:
        print(f"{key:<{width}}  {value:<40}  # {origin}")
    if expected:
        print(f"\n{'layout':<{width}}  {expected.layout}{f' (not flat: {expected.not_flat})' if expected.not_flat else ''}")
        print(f"\n{'parameters':<{width}}  {'trainable':>15}  {'total':>15}")
        for group, counts in expected.parameters.items():
            print(f"{group:<{width}}  {counts['trainable']:>15,}  {counts['total']:>15,}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from ftkit.recipe import schema

    _print_json(schema())


@app.command(name="list")
def list_kinds(
    matrix: Annotated[bool, typer.Option("--matrix", help="Which method works with which architecture, task by task.")] = False, as_json: AsJson = False
) -> None:
    """List tasks, methods and objectives."""
    from ftkit import plugins

    if matrix:
        _show_matrix(as_json)
        return
    kinds = {axis: {kind: _summary(plugins.find(axis, kind)) for kind in plugins.known(axis)} for axis in plugins.BUILTIN}
    if as_json:
        _print_json(kinds)
        return
    width = max(len(kind) for summaries in kinds.values() for kind in summaries)
    for axis, summaries in kinds.items():
        print(f"{axis}s")
        for kind, summary in summaries.items():
            print(f"  {kind:<{width}}  {summary}")


def _show_matrix(as_json: bool) -> None:
    """Tables of architectures and methods, with what the impossible ones lack."""
    from ftkit import architectures, plugins

    methods, document = list(architectures.methods()), {}
    for kind in plugins.known("task"):
        task = plugins.find("task", kind)()
        gaps = {(gap.architecture, gap.method): gap.reason for gap in architectures.gaps(task)}
        rows = [name for name, has in architectures.TABLE.items() if architectures.head(task) in has]
        document[kind] = {name: {method: gaps.get((name, method), "yes") for method in methods} for name in rows}
        if as_json:
            continue
        width = max(map(len, rows))
        print(f"{kind}: {len(rows)} architectures, {len(methods)} methods, {len(rows) * len(methods) - len(gaps)} of {len(rows) * len(methods)} together")
        print("  ".join([" " * width, *methods]))
        for name in rows:
            print("  ".join([f"{name:<{width}}", *(f"{'-' if (name, method) in gaps else 'yes':<{len(method)}}" for method in methods)]).rstrip())
        for (name, method), reason in gaps.items():
            print(f"  {name}, {method}: {reason}")
        print()
    if as_json:
        _print_json(document)
    else:
        print("method/4: beside a base in 4 bits")


@app.command()
def vocab(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Whose tokenizer is asked: a hub id, a directory, or a run.")],
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Text files.")],
    size: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 1000,
    least: Annotated[int, typer.Option(min=1, help="How often a word occurs at least.")] = 10,
    output: Annotated[str | None, typer.Option("-o", "--output", metavar="F", help="Where they are written, one a line, for model.add_tokens.")] = None,
    as_json: AsJson = False,
) -> None:
    """Propose new tokens for a text: the words that take most tokens now."""
    with redirect_stdout(sys.stderr):
        from ftkit import rundir
        from ftkit.vocabulary import propose

        found = propose(model, files, size, least)
        if output:
            rundir.write_text(Path(output), "".join(f"{token}\n" for token in found.tokens))
    if as_json:
        _print_json({"tokens": found.tokens, "words": found.words, "tokens_per_word": {"before": found.before, "after": found.after}})
        return
    print(f"{found.words:,} words: {found.before:.3f} tokens a word, {found.after:.3f} with {len(found.tokens):,} new tokens")
    print(f"written to {output}" if output else "\n".join(found.tokens))


@app.command()
def cache(clear: Annotated[bool, typer.Option("--clear", help="Empty it.")] = False, as_json: AsJson = False) -> None:
    """Show or empty the cache of tokenised data (FTKIT_CACHE)."""
    from ftkit import quantities
    from ftkit.data import cache

    freed = {"freed_bytes": cache.clear()} if clear else {}
    directory, size, limit = cache.directory(), cache.size(), cache.limit()
    if as_json:
        _print_json({"directory": str(directory), "bytes": size, "limit_bytes": limit, **freed})
    else:
        print(f"{directory}: {quantities.size(size)} of at most {quantities.size(limit)}")
        for count in freed.values():
            print(f"freed {quantities.size(count)}")


def _numbers(text: str | None) -> list[float] | None:
    """`0.7,0.3` as numbers."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no list of numbers such as 0.7,0.3", param_hint="--weights") from error


def _read(recipe: str, overrides: list[str] | None) -> Any:
    """Before anything heavy is imported, so that a mistake in a recipe is told at once."""
    from ftkit.recipe import read

    return read(recipe, overrides or ())


def _leaves(values: Mapping[str, Any], origins: Mapping[str, str], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if path + name in origins:
            yield path + name, value
        else:
            yield from _leaves(value, origins, f"{path}{name}.")


def _summary(kind: type[Any]) -> str:
    return (kind.__doc__ or "").partition("\n")[0]


def _print_json(value: Any) -> None:
    strict = json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)  # JSON has no NaN
    print(json.dumps(strict, indent=2, ensure_ascii=False))


def _print_summary(summary: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(summary)
    else:
        from ftkit.summary import print_summary

        print_summary(summary)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; what went wrong is printed, never raised."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    gc.set_threshold(50_000)  # of new objects, not 700: what is imported stays, and looking through it again and again is a fifth of the start
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # half a surrogate pair in a data file is no reason to fail
    try:
        # Not app(): it would turn some exceptions into exit codes of its own.
        command = typer.main.get_command(app)
        with command.make_context("ftkit", arguments) as context:
            command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as request:
        return request.exit_code
    except BrokenPipeError:  # `ftkit ... | head`: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DiskError.code
    except typer.Abort:
        code, message = Interrupted.code, "interrupted"
    except UsageError as error:
        code, message = RecipeError.code, error.format_message()
        if error.ctx:
            message = f"{message}\n{error.ctx.get_usage()}"
    except (Exception, KeyboardInterrupt) as error:
        from ftkit.exits import explain

        code, message = explain(error)
    if not _left_to_launcher(code, message):
        if "--json" in arguments:
            _print_json({"error": message, "code": code})
        else:
            print(f"error: {message}", file=sys.stderr)
    return code


def _left_to_launcher(code: int, message: str) -> bool:
    """Whether this is one of several processes of ours, whose parent tells what went wrong, once."""
    if "RANK" not in os.environ:
        return False
    from ftkit.launch import leave_error

    return leave_error(code, message)
