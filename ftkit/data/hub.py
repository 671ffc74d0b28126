"""Data sets on the hub -> tables.  Their Python code is never run, and what was read is pinned."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ftkit.data.files import Table, add_batches, format_of
from ftkit.errors import DataError, DiskError, HubError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset

    from ftkit.data.files import Choose, Poll

# The hub allows 96 characters in a name.
_HUB_ID = re.compile(r"(?P<name>(?P<org>[A-Za-z0-9][\w.-]{0,95})/[A-Za-z0-9][\w.-]{0,95})(?::(?P<config>[^@/\s]+))?(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubData(NamedTuple):
    """The splits of a data set on the hub, and the commit they were read from."""

    splits: dict[str, Dataset]
    revision: str


def is_hub_id(source: str, base: Path = Path()) -> bool:
    """Whether `source` names a data set on the hub: `org/name[:config][@revision]`, and nothing local.

    A data file's ending, or a first part that is a directory below `base`, makes it local.
    """
    match = _HUB_ID.fullmatch(source)
    return match is not None and format_of(Path(match["name"])) is None and not (base / match["org"]).is_dir()


def load(source: str, note: Callable[[str], None]) -> HubData:
    """Every split of `org/name[:config][@revision]`, from the hub or its local cache.

    Raises HubError (what to do is in the message), DataError if the files of the data set are broken,
    DiskError if the cache cannot hold them.
    """
    match = _HUB_ID.fullmatch(source)
    assert match is not None
    name, config, revision = match["name"], match["config"], match["revision"]
    splits = _load_dataset(source, name, config, revision)
    commit = _commit(next(iter(splits.values())))
    # Offline, the library falls back to the newest copy in its cache, whatever revision was asked for.
    if revision and _COMMIT.fullmatch(revision) and commit != revision:
        raise HubError(f"{source}: the hub's local cache holds revision {commit} instead; go online once, or ask for that one")
    note(f"{source}: read at commit {commit}")
    return HubData(splits, commit)


def table(source: str, split: str, data: HubData, poll: Poll = lambda: None, choose: Choose = list, new: Callable[[str], Table] = Table) -> Table:
    """The chosen columns of a split as records; integer classes become their names, an unlabelled -1 becomes null.

    `poll` is called between batches and may raise to stop.  `new` makes the table.
    """
    dataset = data.splits[split]
    chosen = dataset.select_columns(choose(dataset.column_names))
    result = new(f"{source}[{split}]")
    result.columns, result.sha256 = list(dataset.column_names), f"{data.revision}-{dataset._fingerprint}"
    names = {column: classes for column, feature in chosen.features.items() if (classes := _classes(feature))}

    def named(record: dict[str, Any]) -> dict[str, Any]:
        return record | {column: _named(record[column], classes) for column, classes in names.items()}

    add_batches(result, chosen.with_format("arrow").iter(batch_size=1000), poll, named)
    if not result.records and not result.bad:
        raise DataError(f"{result.source}: the split has no rows")
    return result


def _classes(feature: Any) -> list[str] | None:
    return getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)


def _named(value: Any, classes: list[str]) -> Any:
    if isinstance(value, list):
        return [_named(item, classes) for item in value]
    return classes[value] if value is not None and value >= 0 else None


def _commit(dataset: Dataset) -> str:
    """The library keeps what it built in `<config>/<version>/<commit>/`."""
    return Path(dataset.cache_files[0]["filename"]).parent.name if dataset.cache_files else "unknown"


def _load_dataset(source: str, name: str, config: str | None, revision: str | None) -> dict[str, Dataset]:
    import datasets
    from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HTTPError

    try:
        return dict(datasets.load_dataset(name, config, revision=revision))
    except DatasetNotFoundError as error:
        gated = "gated" in str(error)
        advice = f"accept its terms on https://huggingface.co/datasets/{name}, then log in with `hf auth login`" if gated else _check_name(revision)
        raise HubError(f"{source}: {first_line(error)} What to do: {advice}.") from error
    except DataFilesNotFoundError as error:
        raise HubError(f"{source}: the repository holds no data files that can be read without running its code.") from error
    except (ConnectionError, HTTPError) as error:
        raise HubError(
            f"{source}: the hub cannot be reached, and the data set is not in its local cache ({first_line(error)}). "
            "What to do: check the network, HF_HUB_OFFLINE and HF_ENDPOINT; or name a local file in the recipe."
        ) from error
    except DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskError(f"{source}: the disk of the hub's cache is full; HF_HOME names another place") from error
        raise DataError(f"{source}: its files cannot be read: {first_line(cause or error)}") from error
    except DatasetsError as error:
        raise DataError(f"{source}: {first_line(error)}") from error
    except ValueError as error:  # unknown or missing config; the message lists those there are
        raise HubError(f"{source}: {' '.join(str(error).split())} What to do: write the data set as {name}:CONFIG.") from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise HubError(
            f"{source}: this data set is made by Python code, which ftkit never runs. What to do: try the hub's own Parquet copy, {name}@refs/convert/parquet."
        ) from error


def _check_name(revision: str | None) -> str:
    checked = "the name and the revision" if revision else "the name"
    return f"check {checked}; a private data set needs `hf auth login`"
