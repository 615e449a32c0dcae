"""Running the commands of nnU-Net and ours as processes, with their output in a log file."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from nnunetv2_smallseg.errors import SmallSegError

__all__ = ["command_of", "interrupted_by_signals", "run_logged"]

LINES_SHOWN_ON_FAILURE = 15
SECONDS_TO_END = 10


def command_of(name: str) -> list[str]:
    """How to start the console command ``name`` of this very Python environment, whatever PATH says.

    Raises:
        SmallSegError: If this environment has no such command.
    """
    if name == "smallseg":
        return [sys.executable, "-m", "nnunetv2_smallseg.cli.main"]
    folders = [str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
    script = shutil.which(name, path=os.pathsep.join(folders))
    if script is not None:
        return [script]
    # Environments that install packages without their scripts still know what the scripts would call.
    for point in entry_points(group="console_scripts", name=name):
        return [sys.executable, "-c", f"from {point.module} import {point.attr} as command; command()"]
    raise SmallSegError(
        f"this environment ({sys.prefix}) has no command {name}. Install nnU-Net there: "
        "pip install 'nnunetv2>=2.8.1,<3'"
    )


def run_logged(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    on_line: Callable[[str], None],
    on_tick: Callable[[], None],
) -> None:
    """Runs a console command to its end.

    Args:
        command: Name and arguments.
        environment: All its environment variables.
        log: File its output is appended to.
        on_line: Receives each line of output, from another thread.
        on_tick: Called about once a second.
    Raises:
        SmallSegError: If it fails, with the end of its output.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    last_lines: deque[str] = deque(maxlen=LINES_SHOWN_ON_FAILURE)
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"$ {shlex.join(command)}\n")
        stream.flush()
        process = subprocess.Popen(
            [*command_of(command[0]), *command[1:]],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            # A group of its own, so that its workers can be ended with it.
            start_new_session=os.name == "posix",
        )

        def read_output() -> None:
            for line in process.stdout:
                if line.strip():
                    last_lines.append(line.rstrip())
                # Whatever becomes of the log (ValueError: closed by now) and of our own output, reading goes on: a
                # command whose output nobody reads stands still.
                with contextlib.suppress(OSError, ValueError):
                    stream.write(line)
                    stream.flush()
                    on_line(line)

        reader = threading.Thread(target=read_output, daemon=True)
        reader.start()
        try:
            while True:
                try:
                    status = process.wait(timeout=1.0)
                    break
                except subprocess.TimeoutExpired:
                    on_tick()
            # Workers of a command that was killed live on and keep the pipe open.
            reader.join(timeout=SECONDS_TO_END)
        finally:
            if process.returncode is None or reader.is_alive():
                _end(process)
                reader.join(timeout=SECONDS_TO_END)
    if status != 0:
        reason = f"exit status {status}"
        if status in (-9, 137):
            reason += "; the system ends processes like this when memory runs out"
        shown = "\n".join(f"    {line}" for line in last_lines) or "    (no output)"
        raise SmallSegError(
            f"{command[0]} failed ({reason}). The end of {log}:\n{shown}\n"
            "  Mend the cause and run the same command again to go on from here, or add --clean to start anew."
        )


def _end(process: subprocess.Popen) -> None:
    """Ends a process and its workers, the hard way if they do not follow."""
    if os.name != "posix":
        process.kill()
        process.wait()
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=SECONDS_TO_END)


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Lets a request to end, or the end of the terminal, act as Ctrl-C, so that running commands are ended too."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may set handlers; elsewhere the caller is in charge.
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # nohup ignores the end of the terminal on purpose.
    former = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    for number in former:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
