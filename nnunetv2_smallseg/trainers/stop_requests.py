"""Requests to end a training: signals, and a file in its output folder."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from nnunetv2_smallseg.errors import TrainingStopped

__all__ = ["STOP_FILE_CODE", "StopRequests", "describe", "exit_status"]

# Beside the numbers of signals, of which 1 (SIGHUP) is never listened to.
STOP_FILE_CODE = 1
# Network file systems answer slowly.
SECONDS_BETWEEN_LOOKS = 1.0


def describe(code: int) -> str:
    """The request in words."""
    return "the file STOP" if code == STOP_FILE_CODE else signal.Signals(code).name


def exit_status(code: int) -> int:
    """The exit status of a command that ends because of a request: 0 for the file, else 128 plus the signal."""
    return 0 if code == STOP_FILE_CODE else 128 + code


class StopRequests:
    """Listens for requests while it is entered: ``with StopRequests(folder / "STOP", ["SIGTERM"]) as requests``.

    Until ``wait_for_iteration`` is called a signal ends the command at once, because there is nothing to save yet.
    Afterwards it is noted, and ``code`` tells it. Signals are listened to in the main thread only, as Python demands.
    Signals that are ignored on purpose stay ignored.

    Args:
        file: File that asks for the end by being there.
        signal_names: Signals to listen to; those the system does not have are left out.
    """

    def __init__(self, file: Path, signal_names: Sequence[str]) -> None:
        self.file = file
        self.numbers = [int(getattr(signal, name)) for name in signal_names if hasattr(signal, name)]
        self._process = os.getpid()
        self._received = 0
        self._waits = False
        self._terminations_in_worker = 0
        self._former: dict[int, object] = {}
        self._file_seen = False
        self._next_look = 0.0

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in self.numbers:
                former = signal.getsignal(number)
                if former is not None and former != signal.SIG_IGN:  # None: set by something that is not Python
                    self._former[number] = former
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)
        self._former = {}

    def wait_for_iteration(self) -> None:
        """From now on signals are noted only."""
        self._waits = True

    @property
    def code(self) -> int:
        """0 without a request, else the number of the signal received first, or ``STOP_FILE_CODE``."""
        if self._received:
            return self._received
        now = time.monotonic()
        if not self._file_seen and now >= self._next_look:
            self._next_look = now + SECONDS_BETWEEN_LOOKS
            self._file_seen = self.file.exists()
        return STOP_FILE_CODE if self._file_seen else 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            self._note_in_worker(number)
        elif not self._waits:
            raise TrainingStopped(
                f"{describe(number)} before the first iteration: there was nothing to save.", exit_status(number)
            )
        elif number == signal.SIGINT and self._received:
            signal.default_int_handler(number, frame)  # asked twice: at once
        else:
            self._received = self._received or number

    def _note_in_worker(self, number: int) -> None:
        """What the data loader's processes do, which inherit the handler.

        Signals are often sent to all processes of a job. The workers have to go on, or the training would fail before
        it is saved; it ends them itself. Only a second SIGTERM, or the loss of the training process, ends them here.
        """
        if number == signal.SIGTERM:
            self._terminations_in_worker += 1
            if self._terminations_in_worker > 1 or os.getppid() != self._process:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)
