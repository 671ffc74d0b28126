"""A cache of files under the hash of everything they were made from.

An entry is one file, `<key>.<sha256 of its bytes>`: it appears whole or not at all, and a damaged one
is recognised.  Several processes may share the directory: of those that want the same key, one
computes and the others wait for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from ftkit.errors import DiskError, RecipeError

T = TypeVar("T")
Note = Callable[[str], None]

DEFAULT_LIMIT = "10GB"
POLL_SECONDS = 0.1  # between two looks at a lock that another process holds
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def directory() -> Path:
    """$FTKIT_CACHE, else ftkit below $XDG_CACHE_HOME, else ~/.cache/ftkit."""
    if chosen := os.environ.get("FTKIT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ftkit"


def limit() -> int:
    """$FTKIT_CACHE_LIMIT in bytes.  Raises RecipeError if it is no size."""
    value = os.environ.get("FTKIT_CACHE_LIMIT") or DEFAULT_LIMIT
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", value.strip(), re.IGNORECASE)
    if match is None:
        raise RecipeError(f"FTKIT_CACHE_LIMIT={value}: not a size; write 10GB, 500MB, or bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def key_of(**parts: Any) -> str:
    """The hash of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def cached(
    key: str,
    compute: Callable[[], T],
    load: Callable[[Path], T],
    save: Callable[[T, Path], None],
    note: Note,
    poll: Callable[[], None] = lambda: None,
) -> T:
    """What `compute` gives, or what it gave before under the same key.

    `poll` is called while waiting for another process and may raise to stop.  A cache that cannot be
    used costs time, never the run: it is said, and the value is computed.
    """
    max_bytes = limit()
    found, value = _load(key, load, note)
    if found:
        return value
    try:
        lock = _lock(key, note, poll)
    except OSError as error:
        note(f"the cache {directory()} cannot be used ({error.strerror}): nothing is kept for the next run")
        return compute()
    with lock:
        found, value = _load(key, load, note)
        if not found:
            value = compute()
            _store(key, value, save, max_bytes, note)
        with suppress(OSError):  # whoever waits for the lock finds the entry, and so does who makes the lock anew
            Path(lock.name).unlink()
    return value


def size() -> int:
    """Bytes in the cache."""
    return sum(entry.size for entry in _entries())


def clear() -> int:
    """Empty the cache; returns the bytes that were freed.  Raises DiskError if it cannot be emptied."""
    freed = 0
    for entry in _entries():
        try:
            entry.path.unlink(missing_ok=True)
        except OSError as error:
            raise DiskError(f"{entry.path}: cannot be removed: {error.strerror}") from error
        freed += entry.size
    return freed


class _Entry:
    """A file of the cache as it was when the directory was listed."""

    def __init__(self, path: Path) -> None:
        status = path.stat()
        self.path, self.size, self.used = path, status.st_size, status.st_mtime_ns


def _entries() -> Iterator[_Entry]:
    """Files by last use, oldest first; among them what a killed process left half written."""
    entries = []
    for path in (directory() / "entries").glob("*"):
        with suppress(FileNotFoundError):  # another process has just removed it
            entries.append(_Entry(path))
    yield from sorted(entries, key=lambda entry: entry.used)


def _load(key: str, load: Callable[[Path], T], note: Note) -> tuple[bool, Any]:
    for path in sorted((directory() / "entries").glob(f"{key}.*")):
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if path.name == f"{key}.{digest}":
                value = load(path)
                with suppress(OSError):  # a cache that may only be read has no last use
                    os.utime(path)
                return True, value
            note(f"the cache entry {path.name[:12]} is damaged: it is made again")
            path.unlink()
        except FileNotFoundError:  # another process has just removed it
            continue
        except OSError as error:
            note(f"the cache entry {path} cannot be read ({error.strerror}): it is made again")
    return False, None


def _lock(key: str, note: Note, poll: Callable[[], None]) -> IO[str]:
    """The file of a key, locked for this process alone; closing it, or being killed, releases it."""
    locks = directory() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    file = (locks / key).open("w")
    told = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if not told:
                note("waiting for another process that makes the same cache entry")
            told = True
            poll()
            time.sleep(POLL_SECONDS)


def _store(key: str, value: T, save: Callable[[T, Path], None], max_bytes: int, note: Note) -> None:
    entries = directory() / "entries"
    try:
        entries.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="tmp-", dir=entries)
        os.close(handle)
        temporary = Path(name)
        try:
            save(value, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if temporary.stat().st_size > max_bytes:
                note(f"{temporary.stat().st_size:,} bytes are more than the cache may hold (FTKIT_CACHE_LIMIT): not kept")
                return
            temporary.replace(entries / f"{key}.{digest}")
        finally:
            temporary.unlink(missing_ok=True)
        _evict(max_bytes)
    except (OSError, DiskError) as error:
        note(f"the cache {directory()} takes nothing more ({error}): nothing is kept for the next run")


def _evict(max_bytes: int) -> None:
    """Remove what was used longest ago until the rest fits."""
    entries = list(_entries())
    total = sum(entry.size for entry in entries)
    for entry in entries:
        if total <= max_bytes:
            return
        entry.path.unlink(missing_ok=True)
        total -= entry.size
