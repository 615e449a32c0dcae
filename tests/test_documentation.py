"""README and docs tell the truth: links resolve, tables are current, every command is one that exists and works."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import network
from nnunetv2_smallseg.cli.main import build_parser, main

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def bash_blocks(page: Path) -> list[str]:
    """The bash code blocks of a page, without indentation."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)
    return ["\n".join(line.strip() for line in block.splitlines()) for block in blocks]


def commands(program: str) -> list[tuple[str, list[str]]]:
    """All lines of all bash blocks that call ``program``: (page, words)."""
    found = []
    for page in PAGES:
        for block in bash_blocks(page):
            # A line that ends with a backslash goes on in the next one.
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] == program:
                    found.append((page.name, words[1:]))
    return found


@every_page
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@every_page
def test_every_page_is_linked_from_the_readme(page):
    readme = (ROOT / "README.md").read_text()
    assert page.name == "README.md" or f"(docs/{page.name})" in readme


def test_generated_tables_are_current():
    finished = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "write_tables.py"), "--check"], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_table_of_the_whole_network_is_current():
    results = ROOT / "benchmarks" / "results"
    after, before = (
        json.loads((results / f"{name}.json").read_text()) for name in ("network_cpu", "network_cpu_before")
    )
    assert f"\n{network.tables(after, before)}\n" in (ROOT / "docs" / "scans.md").read_text()


@pytest.mark.parametrize(("page", "words"), commands("smallseg"))
def test_documented_commands_exist(page, words):
    build_parser().parse_args(words)  # exits on unknown commands and options


OFFLINE = [
    words
    for _, words in commands("smallseg")
    if words[0] in ("plan", "fingerprint", "trainers", "env")
    or words[:2] in (["weights", "list"], ["weights", "path"], ["convert", "--list"])
]


@pytest.mark.parametrize("words", OFFLINE, ids=" ".join)
def test_documented_commands_run(words, nnunet_folders, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    # Planning must not change the plans other tests train with.
    preprocessed = tmp_path / "preprocessed" / nnunet_folders.dataset
    preprocessed.mkdir(parents=True)
    shutil.copy(nnunet_folders.preprocessed / "dataset_fingerprint.json", preprocessed)
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed.parent))
    words = [str(nnunet_folders.number) if word == "901" else word for word in words]
    if words[0] == "fingerprint":
        for plans in ("nnUNetSmallSegPlans", "nnUNetPlans"):
            shutil.copy(nnunet_folders.preprocessed / f"{plans}.json", preprocessed)
        words += ["-np", "1"]  # starting processes takes longer than measuring five cases
    assert main(words) == 0
    assert capsys.readouterr().out


def test_commands_of_nnunet_exist(command, capsys):
    programs = {
        shlex.split(line, comments=True)[0]
        for page in PAGES
        for block in bash_blocks(page)
        for line in block.splitlines()
        if line.startswith("nnUNetv2_")
    }
    assert len(programs) >= 4
    scripts = importlib.metadata.entry_points(group="console_scripts")
    for program in programs:
        with pytest.raises(SystemExit) as stopped:
            command(scripts[program].load(), "--help")
        assert stopped.value.code == 0
        assert "usage: " in capsys.readouterr().out


def test_quick_start_of_the_readme(nnunet_workspace, tmp_path):
    """The quick start as written, in bash, on a small data set and with a short schedule."""
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- commands: quick start -->\n```bash\n(.*?)```", readme, re.DOTALL)[1]
    source = nnunet_workspace.folder / "raw" / nnunet_workspace.dataset
    shutil.copytree(source, tmp_path / "raw" / "Dataset901_QuickStart")
    replacements = {
        "smallseg plan -d 901": "smallseg plan -d 901 -batch_size 2 -patch_size 64 64 -num_epochs 1 "
        "-num_iterations 2 -num_val_iterations 1",
        "nnUNetv2_train 901 2.5d 0": "nnUNetv2_train 901 2.5d 0 -device cpu",
        "nnUNetv2_predict": "nnUNetv2_predict -device cpu -npp 0 -nps 0 --disable_tta",
        # By default eight processes are started, each of which takes longer than the work.
        "--verify_dataset_integrity": "--verify_dataset_integrity -np 1",
        "-c 2d": "-c 2d -np 1",
        "LABELS": str(source / "labelsTs"),
        "# if you have labels of INPUT": "",
        "INPUT": str(source / "imagesTs"),
        "OUTPUT": str(tmp_path / "output"),
        "REPORT": str(tmp_path / "report"),
    }
    for written, replacement in replacements.items():
        assert written in block
        block = block.replace(written, replacement)
    environment = {name: value for name, value in nnunet_workspace.environment.items() if name != "nnUNet_extTrainer"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir(exist_ok=True)
        environment[f"nnUNet_{name}"] = str(tmp_path / name)
    finished = subprocess.run(["bash", "-ec", block], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    assert len(list((tmp_path / "output").glob("*.nii.gz"))) == 2
    assert (tmp_path / "report" / "cases.csv").is_file()


def test_ci_runs_the_test_command_of_the_readme():
    command = re.search(r"<!-- command: tests -->\n```bash\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert "pytest" in command
    assert "ruff check" in command
    assert "<!-- command: tests -->" in (ROOT / ".ci" / "run").read_text()
