"""What ftkit says when it stops, and the exit code it stops with.

Every mistake that a user can make ends as one of these, so that `cli.main` can print the message
without a traceback and exit with the documented code.  Anything else that reaches `cli.main` is a
defect of ftkit and exits with 1 and its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class FtkitError(Exception):
    """Base of all errors with a documented exit code; the message is what the user reads."""

    code = 1


class RecipeError(FtkitError):
    """The recipe or the command line asks for something wrong or impossible."""

    code = 2


class DataError(FtkitError):
    """A data file is missing, malformed, or does not fit the task."""

    code = 3


class MissingDependency(FtkitError):
    """A package, device or instruction set that the recipe needs is not here."""

    code = 4


class OutOfMemory(FtkitError):
    """The model, its state or a batch did not fit into memory."""

    code = 5


class Diverged(FtkitError):
    """The loss or the gradient norm stopped being finite."""

    code = 6

    def __init__(self, message: str, rows: Sequence[int] = (), step: int | None = None) -> None:
        super().__init__(message)
        self.rows = rows  # indices of the features in the batch
        self.step = step


class DiskError(FtkitError):
    """A file could not be written or read: full, unwritable, or broken."""

    code = 7


class HubError(FtkitError):
    """The network, the hub or the access to a repository failed."""

    code = 8


class VerificationFailed(FtkitError):
    """A saved, merged or exported artefact does not give the outputs it was saved with."""

    code = 9


class Preempted(FtkitError):
    """SIGTERM or SIGUSR1 arrived; the same command continues the run."""

    code = 75


class Interrupted(FtkitError):
    """SIGINT (Ctrl-C) arrived."""

    code = 130


def first_line(error: BaseException) -> str:
    """What an error says in its first line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
