"""Errors meant for users: each message says what was wrong, what is allowed and what to do next."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "CaseError",
    "CommandStopped",
    "DatasetError",
    "SmallSegError",
    "UsageError",
    "WeightsError",
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
