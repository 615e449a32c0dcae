"""``smallseg env``: the printed line sets nnUNet_extTrainer, whatever is in it and whatever the shell."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nnunetv2_smallseg import environment
from nnunetv2_smallseg.cli.main import main
from nnunetv2_smallseg.errors import SmallSegError

OURS = str(environment.extension_folder())
AWKWARD = '/data/my trainers/it\'s $HOME "quoted" \\ ; rm x'


def printed(capsys, *arguments: str) -> str:
    assert main(["env", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.count("\n") == 1
    return captured.out.rstrip("\n")


def evaluated(shell: str, line: str) -> str:
    script = f'eval "$1"\n{sys.executable} -c \'import os; print(os.environ["nnUNet_extTrainer"], end="")\''
    return subprocess.run([shell, "-c", script, shell, line], check=True, capture_output=True, text=True).stdout


def test_extension_folder_holds_one_module_and_is_absolute():
    folder = environment.extension_folder()
    assert folder.is_absolute()
    assert [file.name for file in folder.glob("*.py")] == ["smallseg_trainers.py"]


@pytest.mark.parametrize("shell", ["sh", "bash", "zsh"])
@pytest.mark.parametrize("before", [None, "", "/other", AWKWARD, os.pathsep.join([AWKWARD, OURS, "/b"])])
def test_posix_shells_end_up_with_the_value(shell, before, capsys, monkeypatch):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    if before is not None:
        monkeypatch.setenv("nnUNet_extTrainer", before)
    value = evaluated(shell, printed(capsys, "--shell", shell))
    folders = value.split(os.pathsep)
    assert folders.count(OURS) == 1
    assert [folder for folder in folders if folder != OURS] == [
        folder for folder in (before or "").split(os.pathsep) if folder and folder != OURS
    ]


def test_default_shell_is_sh(capsys, monkeypatch):
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    assert printed(capsys) == printed(capsys, "--shell", "sh") == f"export nnUNet_extTrainer={OURS}"


def test_evaluating_twice_changes_nothing(capsys, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", "/other")
    first = evaluated("sh", printed(capsys))
    monkeypatch.setenv("nnUNet_extTrainer", first)
    assert evaluated("sh", printed(capsys)) == first


def test_other_spellings_of_our_folder_are_not_doubled(tmp_path, monkeypatch):
    link = tmp_path / "link"
    link.symlink_to(OURS)
    for spelling in (f"{OURS}/", f"{OURS}/../extension", str(link), os.path.relpath(OURS)):
        assert environment.extended_value(spelling) == spelling
    assert environment.extended_value(f"{OURS}-old") == os.pathsep.join([f"{OURS}-old", OURS])


def test_fish_and_powershell_quote_what_is_special_there():
    value = "/a b/it's \\x $HOME"
    assert environment.export_line("fish", value) == "set -gx nnUNet_extTrainer '/a b/it\\'s \\\\x $HOME'"
    assert environment.export_line("powershell", value) == "$env:nnUNet_extTrainer = '/a b/it''s \\x $HOME'"
    assert environment.export_line("powershell", "a\u2019b") == "$env:nnUNet_extTrainer = 'a\u2019\u2019b'"


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_evaluates_to_the_value():
    script = f"{environment.export_line('fish', AWKWARD)}\nprintf %s $nnUNet_extTrainer"
    assert subprocess.run(["fish", "-c", script], check=True, capture_output=True, text=True).stdout == AWKWARD


def test_unknown_shells_are_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["env", "--shell", "tcsh"])
    assert stopped.value.code == 2
    assert "powershell" in capsys.readouterr().err
    with pytest.raises(ValueError, match="tcsh"):
        environment.export_line("tcsh", "x")


def test_incomplete_installation_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    with pytest.raises(SmallSegError, match="incomplete"):
        environment.extension_folder()
    assert main(["env"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "pip install" in captured.err


@pytest.mark.skipif(os.name == "nt", reason="a drive letter holds no path separator")
def test_installation_below_a_path_separator_is_an_error(tmp_path, monkeypatch):
    folder = tmp_path / f"a{os.pathsep}b"
    (folder / "extension").mkdir(parents=True)
    (folder / "extension" / "smallseg_trainers.py").touch()
    monkeypatch.setattr(environment, "__file__", str(folder / "environment.py"))
    with pytest.raises(SmallSegError, match="separates"):
        environment.extension_folder()


def test_env_is_quick_because_it_imports_no_torch():
    code = (
        "import sys; from nnunetv2_smallseg.cli.main import main; main(['env']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'nnunetv2', 'numpy')))"
    )
    root = Path(environment.__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, stdout=subprocess.DEVNULL)
