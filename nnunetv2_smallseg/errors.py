"""Errors meant for users: each message says what was wrong, what is allowed and what to do next."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

__all__ = [
    "CaseError",
    "CommandStopped",
    "DatasetError",
    "SmallSegError",
    "UsageError",
    "WeightsError",
    "did_you_mean",
    "of_the_system",
    "stop_on_user_error",
]


class SmallSegError(Exception):
    """Something a user can mend. Commands print the message without a traceback and exit with 1."""

    exit_status = 1


class UsageError(SmallSegError):
    """The command was called wrongly (unknown name, impossible combination). Commands exit with 2."""

    exit_status = 2


class WeightsError(SmallSegError):
    """A weight file is missing, damaged, or does not fit the network."""


class DatasetError(SmallSegError):
    """A data set cannot be converted, or a converted one is not what its report says."""


class CaseError(DatasetError):
    """One case cannot be converted; the others can."""


class CommandStopped(SystemExit, SmallSegError):
    """Ends a stock ``nnUNetv2_*`` command with a message on stderr, exit status 1 and no traceback.

    nnU-Net's commands let exceptions of a trainer through, and Python prints a traceback for every one but
    ``SystemExit``. Being a ``SmallSegError`` too, it is caught by ``except Exception`` when a trainer is used as a
    library.
    """


@contextmanager
def stop_on_user_error() -> Iterator[None]:
    """Turns an error that the user can mend into the end of the command: message, exit status 1, no traceback."""
    try:
        yield
    except SmallSegError as error:
        raise CommandStopped(f"error: {error}") from None


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`` Did you mean X?`` with the known name nearest to ``name``, small and capital letters alike; else nothing.

    Args:
        name: What was typed.
        known: What it could have been.
        cutoff: Least similarity within [0, 1].
    """
    lowered = {other.lower(): other for other in known}
    nearest = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=cutoff)
    return f" Did you mean {lowered[nearest[0]]}?" if nearest else ""


# What to do about errors of the operating system, by number.
NEXT_STEPS = {
    errno.ENOSPC: "The disk is full: make room there, or name a folder on another disk",
    errno.EDQUOT: "Your quota is used up: make room there, or name a folder on another disk",
    errno.EACCES: "Mend its permissions, or name a folder of yours",
    errno.EPERM: "Mend its permissions, or name a folder of yours",
    errno.EROFS: "It cannot be written to: name another folder",
    errno.ENOENT: "Check the path for spelling, and make the folder if it is missing",
    errno.ENOTDIR: "A part of the path is a file: name a folder",
    errno.EISDIR: "A folder is where a file should be: remove it or choose another name",
    errno.EEXIST: "Something else is there: remove it or choose another name",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.EMFILE: "Too many files are open: use fewer processes (-np), or raise the limit (ulimit -n)",
    errno.EIO: "The disk or the network file system failed: check it, then start again",
    errno.ESTALE: "The network file system lost it: mount it again, then start again",
}


def of_the_system(error: OSError) -> str:
    """An error of the operating system in one line: what failed, on which file, and what to do."""
    what = error.strerror or str(error) or type(error).__name__
    where = f"{error.filename}: " if error.filename else ""
    next_step = NEXT_STEPS.get(error.errno, "Check the path, its permissions and the space on the disk")
    return f"{where}{what}. {next_step}; then run the same command again."
