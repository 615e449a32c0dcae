"""``smallseg doctor``: each check tells good from bad, and none of them can end the command with a traceback."""

import json
import math
import os
import re
import shutil
from types import SimpleNamespace

import pytest

from nnunetv2_smallseg import doctor, environment, registry
from nnunetv2_smallseg.cli.main import main

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """All variables set as they should be."""
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("nnUNet_extTrainer", str(environment.extension_folder()))
    monkeypatch.setenv("SMALLSEG_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.delenv("SMALLSEG_WEIGHTS_VMAMBA_TINY_IMAGENET", raising=False)
    monkeypatch.delenv("SMALLSEG_SCAN_BACKEND", raising=False)
    return tmp_path


def by_check(rows: list[doctor.Row]) -> dict[str, doctor.Row]:
    table = {row.check: row for row in rows}
    assert len(table) == len(rows)
    return table


def fixed(*rows: doctor.Row):
    return {"fixed": lambda: list(rows)}


GOOD = doctor.Row("good", doctor.OK, "fine")
WARN = doctor.Row("slow", doctor.WARNING, "slow", "make it fast")
BAD = doctor.Row("bad", doctor.FAILURE, "broken", "mend it")


def test_a_good_installation_passes_every_check(folders, capfd):
    rows = by_check(doctor.run_checks())
    assert doctor.exit_status(list(rows.values())) == 0, [r for r in rows.values() if r.status == "failure"]
    for name in ("python", "torch", "nnunetv2", *FOLDERS, "nnUNet_extTrainer"):
        assert rows[name].status == "ok"
    for name in registry.trainers():
        assert rows[f"trainer {name}"].status == "ok"
    assert rows["scan back end torch on cpu"].status == "ok"
    assert rows["scan on cpu"].status == "ok"
    assert rows["weights vmamba_tiny_imagenet"].status == "info"
    for row in rows.values():
        assert (row.next_step is None) == (row.status == "ok"), row
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("rows", "status"),
    [((GOOD,), 0), ((GOOD, WARN), 0), ((GOOD, BAD, WARN), 1), ((), 0)],
    ids=lambda value: str(value)[:9],
)
def test_only_failures_set_the_exit_status(rows, status):
    assert doctor.exit_status(list(rows)) == status


def test_table_is_aligned_and_tells_next_steps(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", fixed(GOOD, WARN, BAD))
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "ok       good  fine",
        "warning  slow  slow",
        "               next: make it fast",
        "failure  bad   broken",
        "               next: mend it",
    ]
    assert lines[-1] == "1 failure, 1 warning"


def test_json_lists_every_field(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", fixed(GOOD, WARN))
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"check": "good", "status": "ok", "message": "fine", "next_step": None},
        {"check": "slow", "status": "warning", "message": "slow", "next_step": "make it fast"},
    ]


@pytest.mark.parametrize("error", [RuntimeError("two\nlines"), ImportError("no torch"), SystemExit("bye")])
def test_a_check_that_raises_becomes_a_failure_row(error, monkeypatch, capsys):
    def broken():
        raise error

    monkeypatch.setattr(doctor, "CHECKS", {"first": broken, **fixed(GOOD)})
    assert main(["doctor", "--json"]) == 1
    captured = capsys.readouterr()
    first, second = json.loads(captured.out)
    assert first["check"] == "first" and first["status"] == "failure" and first["next_step"]
    assert type(error).__name__ in first["message"] and "\n" not in first["message"]
    assert second["check"] == "good"
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("name", FOLDERS)
def test_unset_empty_and_relative_folders_fail(name, folders, monkeypatch):
    for value in (None, "", "~/data", "data"):
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
        row = by_check(doctor.check_folders())[name]
        assert row.status == "failure" and name in row.next_step


def test_folder_that_can_be_created_is_no_failure(folders, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(folders / "new" / "deeper"))
    row = by_check(doctor.check_folders())["nnUNet_results"]
    assert row.status == "info" and "mkdir -p" in row.next_step
    assert not (folders / "new").exists()


def test_folder_that_is_a_file_fails(folders, monkeypatch):
    (folders / "file").touch()
    for value in ("file", "file/below"):
        monkeypatch.setenv("nnUNet_raw", str(folders / value))
        assert by_check(doctor.check_folders())["nnUNet_raw"].status == "failure"


def test_unwritable_folders_fail_except_for_raw_data(folders, monkeypatch):
    monkeypatch.setattr(doctor, "_is_writable", lambda folder: False)
    rows = by_check(doctor.check_folders())
    assert rows["nnUNet_raw"].status == "warning"
    assert rows["nnUNet_preprocessed"].status == rows["nnUNet_results"].status == "failure"
    monkeypatch.setenv("nnUNet_raw", str(folders / "new"))
    assert by_check(doctor.check_folders())["nnUNet_raw"].status == "failure"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions bind neither Windows nor root")
def test_permissions_are_tried_out(folders):
    (folders / "nnUNet_results").chmod(0o500)
    assert by_check(doctor.check_folders())["nnUNet_results"].status == "failure"


def test_little_space_is_a_warning(folders, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=9.9e9))
    rows = by_check(doctor.check_folders())
    for name in FOLDERS:
        assert rows[name].status == "ok"
        assert rows[f"space in {name}"].status == "warning" and "9.9 GB" in rows[f"space in {name}"].message


@pytest.mark.parametrize("value", [None, "", "/somewhere/else"])
def test_extension_variable_without_our_folder_fails(value, folders, monkeypatch):
    monkeypatch.delenv("nnUNet_extTrainer")
    if value is not None:
        monkeypatch.setenv("nnUNet_extTrainer", value)
    (row,) = doctor.check_extension()
    assert row.status == "failure" and "smallseg env" in row.next_step
    assert {row.status for row in doctor.check_trainers()} == {"failure"}


def test_another_class_of_the_same_name_fails(folders, monkeypatch):
    name = "nnUNetTrainerSwinUMamba"
    other = folders / "other"
    other.mkdir()
    (other / "mine.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        f"class {name}(nnUNetTrainer):\n    pass\n"
    )
    ours = str(environment.extension_folder())
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(other), ours]))
    rows = by_check(doctor.check_trainers())
    assert rows.pop(f"trainer {name}").status == "failure"
    assert {row.status for row in rows.values()} == {"ok"}


def test_a_neighbour_that_does_not_import_is_named(folders, monkeypatch):
    other = folders / "other"
    other.mkdir()
    (other / "broken.py").write_text("raise RuntimeError('neighbour is broken')\n")
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(other), str(environment.extension_folder())]))
    for row in doctor.check_trainers():
        assert row.status == "failure" and "neighbour is broken" in row.message


@pytest.mark.parametrize(
    ("version", "status"), [("2.8.0", "failure"), ("2.8.1", "ok"), ("2.9", "ok"), ("3.0.1", "failure")]
)
def test_version_of_nnunet(version, status, monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: version)
    (row,) = doctor.check_nnunet()
    assert row.status == status and version in row.message


def test_version_numbers():
    assert doctor.version_numbers("2.10.0+cu132") == (2, 10, 0)
    assert doctor.version_numbers("2.8.1.dev3") == (2, 8, 1)
    assert doctor.version_numbers("unknown") == ()


@pytest.mark.parametrize("difference", [1e-2, math.nan])
def test_back_end_that_is_wrong_fails(difference, folders, monkeypatch):
    from nnunetv2_smallseg.ops import dispatch

    monkeypatch.setattr(dispatch, "self_check", lambda name, device: difference)
    row = by_check(doctor.check_scans())["scan back end torch on cpu"]
    assert row.status == "failure" and "SMALLSEG_SCAN_BACKEND" in row.next_step


def test_missing_numba_is_a_warning_with_the_extra_to_install(folders, monkeypatch):
    from nnunetv2_smallseg.ops import dispatch

    available = {name: None for name in dispatch.BACKENDS if name not in ("cpu", "mamba_ssm")}
    monkeypatch.setattr(
        dispatch, "backend_availability", lambda: {**available, "cpu": "no numba", "mamba_ssm": "no mamba_ssm"}
    )
    rows = by_check(doctor.check_scans())
    assert rows["scan back end cpu"].status == "warning"
    assert re.search(r"nnunetv2-smallseg\[cpu\]", rows["scan back end cpu"].next_step)
    assert rows["scan back end mamba_ssm"].status in ("info", "warning")


def test_requested_back_end_that_does_not_exist_fails(folders, monkeypatch):
    monkeypatch.setenv("SMALLSEG_SCAN_BACKEND", "warp")
    row = by_check(doctor.check_scans())["scan on cpu"]
    assert row.status == "failure" and "warp" in row.message


def test_damaged_weights_fail_and_replaced_ones_are_told(folders, monkeypatch):
    def checked() -> doctor.Row:
        return by_check(doctor.check_weights())["weights vmamba_tiny_imagenet"]

    missing = checked()
    assert missing.status == "info" and "smallseg weights fetch" in missing.next_step
    file = folders / "weights" / "vssmtiny_dp01_ckpt_epoch_292.pth"
    file.parent.mkdir()
    file.write_bytes(b"half a download")
    damaged = checked()
    assert damaged.status == "failure" and str(file) in damaged.next_step
    monkeypatch.setenv("SMALLSEG_WEIGHTS_VMAMBA_TINY_IMAGENET", str(file))
    replaced = checked()
    assert replaced.status == "warning" and "is not the published file" in replaced.message
    monkeypatch.setenv("SMALLSEG_WEIGHTS_VMAMBA_TINY_IMAGENET", str(folders / "absent.pth"))
    absent = checked()
    assert absent.status == "failure"


@pytest.mark.parametrize(
    ("here", "status", "message"),
    [
        ("2.4.1", "info", "run with 2.5.0 to 2.15.0, here is 2.4.1"),
        ("2.5.0+cu124", "ok", "run with 2.5.0"),
        ("2.10.0", "ok", "between 2.5.0 and 2.15.0"),
        ("2.15.0", "ok", "run with 2.15.0"),
        ("2.16.0", "info", "run with 2.5.0 to 2.15.0, here is 2.16.0"),
    ],
)
def test_versions_are_compared_with_the_tested_ones(here, status, message, monkeypatch, tmp_path):
    tested = {"lowest": {"nnunetv2": "2.8.1", "torch": "2.5.0"}, "newest": {"nnunetv2": "2.8.1", "torch": "2.15.0"}}
    (tmp_path / "tested_versions.json").write_text(json.dumps(tested))
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "doctor.py"))
    versions = {"nnunetv2": "2.8.1", "torch": here}
    monkeypatch.setattr(doctor.importlib.metadata, "version", versions.__getitem__)
    nnunet, torch_row = doctor.check_tested_versions()
    assert (nnunet.check, nnunet.status) == ("nnunetv2 tested", "ok")
    assert torch_row.status == status
    assert message in torch_row.message
