"""Commands of the demo run in this environment, leave a log, and end with everything they started."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from nnunetv2_smallseg.demo import commands
from nnunetv2_smallseg.errors import SmallSegError


@pytest.fixture
def python(monkeypatch):
    """Lets ``run_logged(["x", CODE])`` run Python code."""
    monkeypatch.setattr(commands, "command_of", lambda name: [sys.executable, "-c"])
    monkeypatch.setattr(commands, "SECONDS_TO_END", 1)


def run_code(code: str, log: Path, lines: list[str] | None = None) -> None:
    commands.run_logged(["x", code], os.environ, log, ([] if lines is None else lines).append, lambda: None)


def test_output_goes_to_the_log_and_to_the_reader(python, tmp_path):
    lines: list[str] = []
    run_code("import sys; print('out'); print('err', file=sys.stderr)", tmp_path / "logs" / "x.log", lines)
    assert sorted(lines) == ["err\n", "out\n"]
    text = (tmp_path / "logs" / "x.log").read_text()
    assert text.startswith("$ x ") and "out\n" in text and "err\n" in text


def test_failures_show_the_end_of_the_output_and_the_log(python, tmp_path):
    with pytest.raises(SmallSegError) as failed:
        run_code("import sys\nfor i in range(50): print('line', i)\nsys.exit(3)", tmp_path / "x.log")
    message = str(failed.value)
    assert "exit status 3" in message and str(tmp_path / "x.log") in message
    assert "line 49" in message and "line 10" not in message and "--clean" in message


@pytest.mark.skipif(os.name == "nt", reason="process groups")
def test_workers_of_a_killed_command_do_not_keep_the_demo_waiting(python, tmp_path):
    code = (
        "import os, signal, subprocess, sys\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(worker.pid))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    started = time.monotonic()
    with pytest.raises(SmallSegError, match="memory"):
        run_code(code, tmp_path / "x.log")
    assert time.monotonic() - started < 20
    assert is_gone(int((tmp_path / "pid").read_text()))


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_ending_the_demo_ends_the_command(number, python, tmp_path):
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    pid_file = tmp_path / "pid"

    def end_ourselves() -> None:
        if pid_file.exists() and pid_file.read_text():
            os.kill(os.getpid(), getattr(signal, number))

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), commands.interrupted_by_signals():
        commands.run_logged(["x", code], os.environ, tmp_path / "x.log", lambda line: None, end_ourselves)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert is_gone(int(pid_file.read_text()))


def is_gone(pid: int) -> bool:
    """Whether a process ends within two seconds; what nobody waited for counts as ended."""
    for _ in range(20):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        status = Path(f"/proc/{pid}/stat")
        if status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_commands_are_those_of_this_environment(monkeypatch):
    monkeypatch.setenv("PATH", "")
    for name in ("nnUNetv2_extract_fingerprint", "nnUNetv2_train", "nnUNetv2_predict", "smallseg"):
        command = commands.command_of(name)
        assert Path(command[0]).is_file()
        assert command[0] == sys.executable or Path(command[0]).stem == name
    monkeypatch.setattr(commands.shutil, "which", lambda name, path: None)
    command = commands.command_of("nnUNetv2_train")
    assert command[:2] == [sys.executable, "-c"] and "run_training_entry" in command[2]
    with pytest.raises(SmallSegError, match="no command nnUNetv2_dance"):
        commands.command_of("nnUNetv2_dance")
