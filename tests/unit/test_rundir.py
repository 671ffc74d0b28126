"""Whose a directory is, and what may be removed from it."""

import json
from types import SimpleNamespace

import pytest

from ftkit import rundir
from ftkit.errors import RecipeError


def write_manifest(directory, **facts):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "manifest.json").write_text(json.dumps(facts))


def prepared(model=None, train="train.csv", validation=None, **objective):
    data = SimpleNamespace(train=train, validation=validation, test=None)
    recipe = SimpleNamespace(data=data, objective=SimpleNamespace(**objective))
    return SimpleNamespace(source=model and SimpleNamespace(name=str(model), adapter=None), recipe=recipe)


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_manifest_of_another_program_is_no_run(tmp_path, overwrite):
    write_manifest(tmp_path, name="a web application", icons=[])
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(RecipeError, match="not a run of ftkit"):
        rundir.check(tmp_path, resume=not overwrite, overwrite=overwrite)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_run_may_be_replaced_if_asked(tmp_path):
    write_manifest(tmp_path, status="failed", exit_code=6)
    with pytest.raises(RecipeError, match="--overwrite"):
        rundir.check(tmp_path, resume=False, overwrite=False)
    rundir.check(tmp_path, resume=False, overwrite=True)


def test_a_run_is_not_written_over_what_it_starts_from(tmp_path):
    write_manifest(tmp_path / "run", status="finished")
    (tmp_path / "run" / "model").mkdir()
    rows = tmp_path / "run" / "predictions" / "test.jsonl"
    rows.parent.mkdir()
    rows.write_text("{}")
    with pytest.raises(RecipeError, match="which it starts from"):
        rundir.spare(tmp_path / "run", prepared(model=tmp_path / "run" / "model"))
    with pytest.raises(RecipeError, match="which it starts from"):
        rundir.spare(tmp_path / "run", prepared(validation={"mine": str(rows)}))
    with pytest.raises(RecipeError, match="which it starts from"):
        rundir.spare(tmp_path / "run", prepared(teacher=str(tmp_path / "run")))
    rundir.spare(tmp_path / "other", prepared(model=tmp_path / "run" / "model", train=[str(rows)]))
