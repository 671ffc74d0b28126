"""Lists and arrays that grow on disk, for sets larger than memory (`data.streaming`), and for what is said of them.

They lie in files without a name in the cache's directory, which are gone with the process, however it ends.  They
are read by position, not mapped: pages of a mapped file count as resident memory, and stay.
"""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import IO, TYPE_CHECKING, Any, Generic, TypeVar, overload

from ftkit.data import cache
from ftkit.errors import DiskError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

T = TypeVar("T")
BUFFER = 1 << 16  # values of an array that wait to be written
TYPES = {"<i4": "I32", "<i8": "I64", "<f4": "F32", "|i1": "I8"}  # numpy's names of dtypes and those of safetensors
BLOCK, BLOCK_BYTES = 1000, 1 << 22  # items that are read together, and their bytes, at most


@contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(f"{cache.directory()}: {error.strerror}; rows, tokens and predictions lie there, FTKIT_CACHE names another place") from error


def _file() -> IO[bytes]:
    with _disk():
        cache.directory().mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=cache.directory())


def _read(file: IO[bytes], start: int, size: int) -> bytes:
    """`size` bytes from `start`, wherever the file was written last."""
    parts = []
    with _disk():
        while size:
            parts.append(os.pread(file.fileno(), size, start))
            assert parts[-1], "within the file"
            start, size = start + len(parts[-1]), size - len(parts[-1])
    return b"".join(parts)


class Stored:
    """A numpy array of one dimension in a file; one value or a slice of it is read at a time."""

    def __init__(self, file: IO[bytes], dtype: Any, size: int, start: int = 0) -> None:
        import numpy as np

        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._file, self._size, self._start = file, size, start

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, place: slice) -> np.ndarray: ...
    @overload
    def __getitem__(self, place: int | np.integer[Any]) -> Any: ...
    def __getitem__(self, place: Any) -> Any:
        import numpy as np

        if not isinstance(place, slice):
            index = int(place) + (self._size if place < 0 else 0)
            return self[index : index + 1][0]
        start, stop, step = place.indices(self._size)
        assert step == 1, "neighbours only"
        width = self.dtype.itemsize
        return np.frombuffer(_read(self._file, self._start + start * width, max(0, stop - start) * width), self.dtype)

    def blocks(self, size: int = BUFFER) -> Iterator[np.ndarray]:
        """All of it, a part at a time."""
        return (self[start : start + size] for start in range(0, self._size, size))


def save(arrays: Mapping[str, Stored], path: Path, metadata: dict[str, str]) -> None:
    """A safetensors file of arrays that no memory has to hold; the library's own function takes them in memory alone.

    Its format: 8 bytes with the length of a JSON header, the header, the bytes (https://huggingface.co/docs/safetensors).
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    arrays = dict(sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize))  # so that each begins where its type may
    for name, stored in arrays.items():
        begin, end = end, end + len(stored) * stored.dtype.itemsize
        header[name] = {"dtype": TYPES[stored.dtype.str], "shape": [len(stored)], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for stored in arrays.values():
            for block in stored.blocks():
                file.write(block.tobytes())


def load(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The arrays and the metadata of such a file, which may be removed meanwhile."""
    file = path.open("rb")
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    metadata = header.pop("__metadata__")
    types = {name: dtype for dtype, name in TYPES.items()}
    arrays = {name: Stored(file, types[each["dtype"]], each["shape"][0], 8 + length + each["data_offsets"][0]) for name, each in header.items()}
    return arrays, metadata


class Growing:
    """An array that is written while it grows: as array.array, and with a `Stored` in the end."""

    def __init__(self, typecode: str) -> None:
        self.file, self._waiting, self._size = _file(), array(typecode), 0

    def __len__(self) -> int:
        return self._size

    def append(self, value: float) -> None:
        self.extend((value,))

    def extend(self, values: Iterable[Any]) -> None:
        before = len(self._waiting)
        self._waiting.extend(values)
        self._size += len(self._waiting) - before
        if len(self._waiting) > BUFFER:
            self.flush()

    def flush(self) -> None:
        with _disk():
            self.file.write(self._waiting.tobytes())
            self.file.flush()
        del self._waiting[:]

    def stored(self, dtype: Any) -> Stored:
        """What is there, as numbers of `dtype`."""
        import numpy as np

        self.flush()
        whole = Stored(self.file, self._waiting.typecode, self._size)
        if whole.dtype == np.dtype(dtype):
            return whole
        other = _file()
        with _disk():
            for block in whole.blocks():
                other.write(block.astype(dtype).tobytes())
            other.flush()
        return Stored(other, dtype, self._size)


class _Shelf:
    """Two files: items as JSON, end to end, and where each begins."""

    def __init__(self) -> None:
        self.items, self.bounds, self.size = _file(), Growing("q"), 0
        self.bounds.append(0)
        self._flushed = True

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def add(self, data: bytes) -> None:
        with _disk():
            self.items.write(data)
        self.size += len(data)
        self.bounds.append(self.size)
        self._flushed = False

    def between(self, start: int, stop: int) -> Iterator[bytes]:
        """The items from `start` to `stop`; of long ones few are read together."""
        if not self._flushed:
            with _disk():
                self.items.flush()
            self.bounds.flush()
            self._flushed = True
        stored = Stored(self.bounds.file, "q", len(self.bounds))
        while start < stop:
            bounds = stored[start : min(start + BLOCK, stop) + 1].tolist()
            count = max(1, bisect_right(bounds, bounds[0] + BLOCK_BYTES) - 1)
            data = _read(self.items, bounds[0], bounds[count] - bounds[0])
            yield from (data[one - bounds[0] : other - bounds[0]] for one, other in pairwise(bounds[: count + 1]))
            start += count


class Spool(Sequence[T], Generic[T]):
    """A list on disk, of what `dump` makes JSON values of and `load` makes again; items are added at its end and never change."""

    def __init__(self, dump: Callable[[T], Any], load: Callable[[Any], T], shelf: _Shelf | None = None) -> None:
        self._dump, self._load = dump, load
        self._shelf = _Shelf() if shelf is None else shelf
        self._first, self._count = len(self._shelf), 0

    def empty(self) -> Spool[T]:
        """Another one for such items."""
        return Spool(self._dump, self._load)

    def behind(self) -> Spool[T]:
        """Another one, in the same files, of which a process may not open many; nothing may be added to this one any more."""
        return Spool(self._dump, self._load, self._shelf)

    def append(self, item: T) -> None:
        assert self._first + self._count == len(self._shelf), "another one begins behind"
        # what JSON does not know (an image's bytes) becomes an object, which no text is
        self._shelf.add(json.dumps(self._dump(item), default=lambda value: {type(value).__name__: None}).encode())
        self._count += 1

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            assert step == 1, "neighbours only"
            return list(self._between(start, stop))
        index = int(place) + (len(self) if place < 0 else 0)
        if not 0 <= index < len(self):
            raise IndexError(index)
        return next(self._between(index, index + 1))

    def __iter__(self) -> Iterator[T]:
        return self._between(0, len(self))

    def _between(self, start: int, stop: int) -> Iterator[T]:
        return (self._load(json.loads(data)) for data in self._shelf.between(self._first + start, self._first + stop))


class Records:
    """JSON objects, each of which has the number of a feature, read in the order of these; many are on disk."""

    FEW = 10_000  # stay in memory

    def __init__(self) -> None:
        self._items: list[dict[str, Any]] | Spool[dict[str, Any]] = []
        self._features = array("q")

    def __len__(self) -> int:
        return len(self._items)

    def extend(self, records: Iterable[dict[str, Any]]) -> None:
        for record in records:
            if isinstance(self._items, list) and len(self._items) == self.FEW:
                few, self._items = self._items, Spool(dict, dict)
                for each in few:
                    self._items.append(each)
            self._items.append(record)
            self._features.append(record["feature"])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        import numpy as np

        return (self._items[int(place)] for place in np.argsort(np.array(self._features), kind="stable"))
