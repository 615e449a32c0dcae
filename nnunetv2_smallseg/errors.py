"""Errors meant for users: each message says what was wrong, what is allowed and what to do next."""

__all__ = [
    "CaseError",
    "CommandStopped",
    "DatasetError",
    "SmallSegError",
    "TrainingStopped",
    "UsageError",
    "WeightsError",
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


class TrainingStopped(SystemExit):
    """Ends a training that was asked to end, and the command it runs in, without a traceback.

    No ``Exception``: ``except Exception`` around a training is for failures.
    """

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(exit_status)
        self.message = message

    def __str__(self) -> str:
        return self.message
