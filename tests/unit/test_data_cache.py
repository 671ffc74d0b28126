"""The cache: hits, misses, damage, limits, several processes, and directories that cannot be used."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from ftkit.data import cache
from ftkit.errors import DiskError, RecipeError


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FTKIT_CACHE_LIMIT", raising=False)
    return tmp_path / "cache"


class Maker:
    """Counts how often a value is computed, and keeps what was noted."""

    def __init__(self, content="content"):
        self.content, self.computed, self.notes = content, 0, []

    def compute(self):
        self.computed += 1
        return self.content

    def get(self, key="a" * 64, save=None, **kwargs):
        save = save or (lambda value, path: path.write_text(value))
        return cache.cached(key, self.compute, Path.read_text, save, self.notes.append, **kwargs)


def entries(directory):
    return sorted((directory / "entries").iterdir())


def test_the_second_call_reads_what_the_first_computed(directory):
    maker = Maker()
    assert (maker.get(), maker.get(), maker.computed) == ("content", "content", 1)
    assert maker.get("b" * 64) == "content"
    assert maker.computed == 2
    assert maker.notes == []
    assert len(entries(directory)) == 2


def test_a_damaged_entry_is_said_and_made_again(directory):
    maker = Maker()
    maker.get()
    (entry,) = entries(directory)
    entry.write_text("contemt")
    assert maker.get() == "content"
    assert maker.computed == 2
    assert "damaged" in maker.notes[0]
    assert [path.read_text() for path in entries(directory)] == ["content"]


def test_an_error_while_computing_leaves_nothing(directory):
    maker = Maker()

    def fail():
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        cache.cached("a" * 64, fail, Path.read_text, Path.write_text, maker.notes.append)
    assert maker.get() == "content"


def test_what_was_used_longest_ago_goes_first(directory, monkeypatch):
    monkeypatch.setenv("FTKIT_CACHE_LIMIT", "250")
    maker = Maker("x" * 100)
    for age, key in ((300, "a"), (200, "b")):
        maker.get(key * 64)
        (entry,) = (directory / "entries").glob(f"{key * 64}.*")
        os.utime(entry, (time.time() - age,) * 2)
    maker.get("a" * 64)  # used again
    maker.get("c" * 64)
    assert [path.name[0] for path in entries(directory)] == ["a", "c"]
    assert cache.size() == 200


def test_an_entry_larger_than_the_limit_is_not_kept(directory, monkeypatch):
    monkeypatch.setenv("FTKIT_CACHE_LIMIT", "0.05KB")
    maker = Maker("x" * 100)
    assert maker.get() == "x" * 100
    assert entries(directory) == []
    assert "FTKIT_CACHE_LIMIT" in maker.notes[0]


@pytest.mark.parametrize(("value", "size"), [("10GB", 10**10), ("500 mb", 5 * 10**8), ("1.5K", 1500), ("123", 123), ("", 10**10)])
def test_limits(monkeypatch, value, size):
    monkeypatch.setenv("FTKIT_CACHE_LIMIT", value)
    assert cache.limit() == size


def test_a_limit_that_is_no_size(monkeypatch):
    monkeypatch.setenv("FTKIT_CACHE_LIMIT", "lots")
    with pytest.raises(RecipeError, match="FTKIT_CACHE_LIMIT=lots: not a size"):
        Maker().get()


def test_clear(directory):
    maker = Maker()
    maker.get()
    assert cache.clear() == len("content")
    assert cache.size() == cache.clear() == 0
    maker.get()
    assert maker.computed == 2


def test_the_directory(monkeypatch, tmp_path):
    assert cache.directory() == tmp_path / "cache"
    monkeypatch.setenv("FTKIT_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.directory() == tmp_path / "xdg" / "ftkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.directory() == Path.home() / ".cache" / "ftkit"


def test_a_cache_that_cannot_be_used_costs_only_time(directory):
    directory.write_text("a file where the directory should be")
    maker = Maker()
    assert maker.get() == "content"
    assert "cannot be used" in maker.notes[0]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), DiskError("disk full")])
def test_a_full_disk_costs_only_time(directory, error):
    def save(value, path):
        path.write_text("half")
        raise error

    maker = Maker()
    assert maker.get(save=save) == "content"
    assert "takes nothing more" in maker.notes[0]
    assert entries(directory) == []


def hold(key, started, directory):
    def compute():
        started.set()
        time.sleep(1)
        (Path(directory) / f"computed-{os.getpid()}").touch()
        return "from the other process"

    cache.cached(key, compute, Path.read_text, lambda value, path: path.write_text(value), print)


@pytest.fixture
def other_process(tmp_path):
    """Another process that takes a second to make the entry, and has begun."""
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=hold, args=("a" * 64, started, tmp_path))
    process.start()
    assert started.wait(10)
    yield process
    process.kill()
    process.join()


def test_one_process_computes_and_the_others_wait(other_process):
    maker = Maker()
    assert maker.get() == "from the other process"
    assert maker.computed == 0
    assert maker.notes == ["waiting for another process that makes the same cache entry"]


def test_another_key_does_not_wait(other_process, directory):
    maker = Maker()
    assert maker.get("a" * 63 + "b") == "content"
    assert maker.notes == []
    assert [path.name for path in (directory / "locks").iterdir()] == ["a" * 64]


def test_waiting_can_be_interrupted(other_process):
    def poll():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Maker().get(poll=poll)


def test_a_killed_process_holds_no_lock(other_process):
    other_process.kill()
    maker = Maker()
    assert maker.get() == "content"
    assert maker.computed == 1
