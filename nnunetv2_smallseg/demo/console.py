"""What a demo shows while it runs: numbered steps with elapsed time, and one live line for the step at work."""

from __future__ import annotations

import math
import re
import shutil
import sys
import threading
import time
from typing import TextIO

__all__ = ["Console", "TrainingProgress", "format_seconds"]


def format_seconds(seconds: float) -> str:
    """``8 s`` or ``3 min 08 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Console:
    """Reports steps on stderr. On a terminal the running step owns one line that is rewritten; in a file nothing is."""

    def __init__(self, num_steps: int, stream: TextIO | None = None) -> None:
        """Reports ``num_steps`` steps to ``stream`` (default: stderr)."""
        self.stream = stream or sys.stderr
        self.num_steps = num_steps
        self.live = self.stream.isatty()
        self.title = ""
        self.detail = ""
        self.started = 0.0
        # Output of a command is read by one thread while another counts the seconds.
        self.lock = threading.Lock()

    def message(self, text: str) -> None:
        """Prints a line of its own."""
        print(text, file=self.stream, flush=True)

    def skip(self, number: int, title: str, seconds: float) -> None:
        """Reports a step finished by an earlier run."""
        self.message(f"[{number}/{self.num_steps}] {title}: finished before, in {format_seconds(seconds)}")

    def start(self, number: int, title: str) -> None:
        """Reports that a step begins."""
        self.title, self.detail, self.started = f"[{number}/{self.num_steps}] {title}", "", time.monotonic()
        if self.live:
            self.tick()
        else:
            self.message(f"{self.title} ...")

    def update(self, detail: str) -> None:
        """Shows what the running step is at."""
        with self.lock:
            self.detail = detail
        if self.live:
            self.tick()
        else:
            self.message(f"{self.title}: {detail}")

    def tick(self) -> None:
        """Refreshes the live line and its seconds; does nothing where lines cannot be rewritten."""
        if not self.live:
            return
        with self.lock:
            elapsed = format_seconds(time.monotonic() - self.started)
            text = f"{self.title} ... {elapsed}" + (f", {self.detail}" if self.detail else "")
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", file=self.stream, flush=True)

    def finish(self) -> float:
        """Reports that the step is done and returns its seconds."""
        seconds = time.monotonic() - self.started
        self.clear()
        self.message(f"{self.title}: done in {format_seconds(seconds)}")
        return seconds

    def clear(self) -> None:
        """Removes the live line."""
        if self.live:
            print("\r\x1b[K", end="", file=self.stream, flush=True)


class TrainingProgress:
    """Reads nnU-Net's training output line by line and sums up each epoch in a few words."""

    def __init__(self, num_epochs: int | None) -> None:
        """``num_epochs`` is the length of the training, None when the trainer does not tell."""
        self.total = "" if num_epochs is None else f"/{num_epochs}"
        self.epoch = 0
        self.loss = "?"

    def read(self, line: str) -> str | None:
        """Text to show after this line of output; None when it brings no news."""
        if match := re.search(r"Epoch (\d+)\s*$", line):
            self.epoch = int(match[1]) + 1
        elif match := re.search(r"train_loss (\S+)", line):
            self.loss = match[1]
        elif match := re.search(r"Pseudo dice \[(.*)\]", line):
            return f"epoch {self.epoch}{self.total}, loss {self.loss}, pseudo Dice {self._mean(match[1])}"
        elif match := re.search(r"predicting (\S+)", line):
            return f"validating {match[1]}"
        return None

    @staticmethod
    def _mean(values: str) -> str:
        """Mean of a printed list such as ``np.float32(0.5), nan``, without the classes that did not occur."""
        numbers = [float(number) for number in re.findall(r"(?:nan|\d+\.?\d*(?:e-?\d+)?)(?=\)|,|\s*$)", values)]
        known = [number for number in numbers if not math.isnan(number)]
        return f"{sum(known) / len(known):.2f}" if known else "nan"
