"""What comes from outside is never run as code, and other users of the machine cannot change what we write."""

from __future__ import annotations

import logging
import os
import stat
import threading
import zipfile

import pytest
from conftest import ROOT
from unsafe_calls import unsafe_calls

from nnunetv2_smallseg import doctor
from nnunetv2_smallseg.datasets.archives import zip_members
from nnunetv2_smallseg.files import replacing, strangers_can_write, write_json

PLANTED = {
    "torch.load(file)": 1,
    "torch.load(file, weights_only=flag)": 1,
    "torch.load(file, weights_only=True)": 0,
    "from torch import load as read\nread(file, weights_only=False)": 1,
    "import functools\nread = functools.partial(torch.load, map_location='cpu')": 1,
    "import pickle\nfunction = pickle.loads": 1,
    "from pickle import Unpickler\nUnpickler(file).load()": 1,
    "import pickle\ntry: pass\nexcept pickle.UnpicklingError: pass": 0,
    "import numpy as np\nnp.load(file, allow_pickle=True)": 1,
    "import numpy as np\nnp.load(file, **options)": 1,
    "import numpy as np\nnp.load(file)": 0,
    "import yaml\nyaml.load(file)": 1,
    "eval(text)": 1,
    "network.eval()": 0,
    "exec(text)": 1,
    "import re\nre.compile(text)": 0,
    "import os\nos.system(text)": 1,
    "import subprocess\nsubprocess.run(text, shell=True)": 1,
    "import subprocess\nsubprocess.run([text], check=True)": 0,
    "import tempfile\ntempfile.mktemp()": 1,
    "import tempfile\ntempfile.mkstemp()": 0,
    "import zipfile\nzipfile.ZipFile(file).extractall(folder)": 1,
    "path.chmod(0o777)": 1,
    "path.chmod(0o644)": 0,
    "import os\nprint(os.environ)": 1,
}


@pytest.mark.parametrize("source", PLANTED, ids=str)
def test_unsafe_calls_are_found(source):
    assert len(list(unsafe_calls(f"import torch\n{source}"))) == PLANTED[source]


def test_no_unsafe_call_in_package_scripts_and_benchmarks():
    folders = [ROOT / name for name in ("nnunetv2_smallseg", "scripts", "benchmarks")]
    sources = {file: file.read_text() for folder in folders for file in folder.rglob("*.py")}
    assert len(sources) > 100
    found = [f"{file}:{line}: {what}" for file, source in sources.items() for line, what in unsafe_calls(source)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_new_files_have_the_permissions_of_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_json({}, tmp_path / "file.json")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.json").stat().st_mode) == mode


def test_temporary_files_follow_no_link_and_are_never_shared(tmp_path, monkeypatch):
    """Even if somebody guessed the name and put a link to another file there."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr("nnunetv2_smallseg.files.uuid.uuid4", lambda: type("Guessed", (), {"hex": "0"}))
    (tmp_path / ".file.0.part").symlink_to(victim)
    with pytest.raises(FileExistsError, match="file"), replacing(tmp_path / "file") as temporary:
        temporary.write_text("overwritten")
    assert victim.read_text() == "mine"
    assert not (tmp_path / "file").exists()


def test_writing_in_threads_never_loosens_permissions(tmp_path):
    """The umask belongs to the whole process: nobody may change it, not even for a moment."""
    modes, stop = set(), threading.Event()

    def make_files() -> None:
        number = 0
        while not stop.is_set():
            file = tmp_path / f"other{number}"
            file.touch()
            modes.add(stat.S_IMODE(file.stat().st_mode))
            number += 1

    before = os.umask(0o077)
    thread = threading.Thread(target=make_files)
    try:
        thread.start()
        for number in range(40):
            write_json({}, tmp_path / f"file{number % 5}.json")
    finally:
        stop.set()
        thread.join()
        os.umask(before)
    assert modes == {0o600}


def test_folders_that_strangers_can_write_are_told(tmp_path, monkeypatch, caplog):
    pytest.importorskip("numba")
    from nnunetv2_smallseg.ops import backend_cpu

    mine, open_to_all = tmp_path / "mine", tmp_path / "open"
    mine.mkdir(mode=0o755)
    open_to_all.mkdir()
    open_to_all.chmod(open_to_all.stat().st_mode | stat.S_IWOTH)
    assert not strangers_can_write(mine)
    assert not strangers_can_write(tmp_path / "absent")
    assert strangers_can_write(open_to_all)

    monkeypatch.setenv("nnUNet_results", str(open_to_all))
    monkeypatch.setenv("nnUNet_extTrainer", str(mine))
    [row] = doctor.check_strangers()
    assert (row.status, row.check) == ("warning", "trust in nnUNet_results")
    assert str(open_to_all) in row.message

    import numba
    import torch

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(mine))
    folder = backend_cpu.KERNELS.folder(torch.float32)
    assert folder.is_relative_to(mine)
    folder.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        assert backend_cpu.KERNELS.folder(torch.float32) is None
    assert "other users can write there" in caplog.text


@pytest.mark.parametrize("name", ["../../evil.nii.gz", "/etc/passwd", "a/../../b", "C:\\evil", "\\\\server\\x", "a\nb"])
def test_archives_cannot_lead_elsewhere(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), b"x")
    good, refused = zip_members(tmp_path / "a.zip")
    assert not good
    assert len(refused) == 1


def test_links_and_devices_in_archives_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number, kind in enumerate((stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO)):
            entry = zipfile.ZipInfo(f"entry{number}")
            entry.create_system, entry.external_attr = 3, (kind | 0o777) << 16
            archive.writestr(entry, "/etc/passwd")
    good, refused = zip_members(tmp_path / "a.zip")
    assert (len(good), len(refused)) == (0, 3)
