"""The engine of all converters: whole files or none, resuming after a kill, nothing outside the data set's folder."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from dataset_files import tree, volume_pair, write_atlas, write_kits, write_nifti

from nnunetv2_smallseg.cli.main import main
from nnunetv2_smallseg.datasets import engine, journal, kits23, splits
from nnunetv2_smallseg.datasets.cases import Case, Converted, Plan, case_identifier
from nnunetv2_smallseg.datasets.labels import label_counts, lesion_sizes
from nnunetv2_smallseg.datasets.pictures import Picture
from nnunetv2_smallseg.datasets.target import JOURNAL, REPORT, SPLITS, TABLE, dataset_folder
from nnunetv2_smallseg.errors import CaseError, DatasetError, UsageError


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """An empty nnUNet_raw."""
    folder = tmp_path / "raw"
    folder.mkdir()
    monkeypatch.setenv("nnUNet_raw", str(folder))
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    return folder


def convert_kits(source, raw, **options):
    return engine.convert(kits23.plan(source), raw / "Dataset220_KiTS2023", {"converter": "kits23"}, **options)


def make_picture(seed: int) -> Converted:
    values = np.random.default_rng(seed).integers(0, 255, (8, 8), np.uint8)
    return Converted((Picture(values),), Picture((values > 200).astype(np.uint8)))


def picture_plan(count: int, **fields) -> Plan:
    cases = [
        Case(f"case_{number:04d}", partial(make_picture, number), f"patient {number // 2}", "all", (str(number),))
        for number in range(count)
    ]
    return Plan(cases, {"background": 0, "lesion": 1}, {"0": "grey"}, ".png", (1,), **fields)


# Forks a process for each conversion and kills it after a random time: starting Python anew takes longer than that.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import cc3d
from nnunetv2_smallseg.datasets import engine, kits23
assert "torch" not in sys.modules

source, target, whole, kills = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
started = time.perf_counter()
engine.convert(kits23.plan(source), whole, {"converter": "kits23"})
seconds = 0.7 * (time.perf_counter() - started)
print("whole", flush=True)
sys.stdin.readline()
wait = random.Random(5)
killed = 0
while killed < kills:
    child = os.fork()
    if child == 0:
        engine.convert(kits23.plan(source), target, {"converter": "kits23"})
        os._exit(0)
    time.sleep(wait.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed += os.WIFSIGNALED(status)
    print("killed" if os.WIFSIGNALED(status) else "finished", flush=True)
    sys.stdin.readline()
"""


def check_partial_tree(folder, expected: dict[str, bytes]) -> None:
    """Whatever has its final name is whole; everything else is hidden."""
    for name, content in tree(folder).items():
        if not name.rsplit("/", 1)[-1].startswith("."):
            assert content == expected[name], name


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_and_resume_ends_in_the_same_tree(tmp_path):
    source, target, whole = tmp_path / "source", tmp_path / "target", tmp_path / "whole"
    write_kits(source, range(16))
    expected: dict[str, bytes] = {}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLER, str(source), str(target), str(whole), "30"]
    finished = 0
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as killer:
        for line in killer.stdout:
            if line == "whole\n":
                expected = tree(whole)
            elif target.exists():
                check_partial_tree(target, expected)
                done = (target / REPORT).exists() and not (target / JOURNAL).exists()
                if line == "finished\n" or done:
                    assert tree(target) == expected
                    finished += 1
                    target.rename(tmp_path / f"finished_{finished}")
            killer.stdin.write("\n")
            killer.stdin.flush()
    assert killer.returncode == 0
    engine.convert(kits23.plan(source), target, {"converter": "kits23"})
    assert tree(target) == expected
    assert finished >= 1


def test_kill_with_worker_processes(tmp_path):
    source, target, whole = tmp_path / "source", tmp_path / "target", tmp_path / "whole"
    write_kits(source, range(40))
    engine.convert(kits23.plan(source), whole, {"converter": "kits23"})
    expected = tree(whole)
    code = (
        "import sys; from pathlib import Path; from nnunetv2_smallseg.datasets import engine, kits23\n"
        "engine.convert(kits23.plan(sys.argv[1]), Path(sys.argv[2]), {'converter': 'kits23'}, 2)"
    )
    command = [sys.executable, "-c", code, str(source), str(target)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        deadline = time.monotonic() + 60
        while len(list((target / "labelsTr").glob("*.nii.gz"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        children = workers.read_text().split() if workers.exists() else []
        process.kill()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}/fd/0").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(Path(f"/proc/{child}/fd/0").exists() for child in children), "workers outlive their parent"
    assert 0 < len(list((target / "labelsTr").glob("*.nii.gz"))) < 40
    check_partial_tree(target, expected)
    engine.convert(kits23.plan(source), target, {"converter": "kits23"}, num_processes=2)
    assert tree(target) == expected


def test_report_and_sidecars(tmp_path, raw):
    write_kits(tmp_path / "source", range(12))
    outcome = convert_kits(tmp_path / "source", raw)
    report = json.loads((outcome.folder / REPORT).read_text())
    assert report == outcome.report
    assert (report["cases_in"], report["cases_written"], report["cases_failed"]) == (12, 12, 0)
    assert report["label_voxels"] == {"0": 12 * (6 * 8 * 4 - 4), "1": 0, "2": 12 * 4, "3": 0}
    row = json.loads((outcome.folder / TABLE).read_text())["case_00003"]
    assert row["lesion_voxels"] == [4]
    assert row["lesion_mm3"] == [pytest.approx(4 * 0.8 * 0.8 * 3)]
    folds = json.loads((outcome.folder / SPLITS).read_text())
    assert len(folds) == 5
    assert sorted(case for fold in folds for case in fold["val"]) == sorted(report["cases"])
    assert not (outcome.folder / JOURNAL).exists()


def test_finished_cases_are_skipped_and_new_ones_added(tmp_path, raw, monkeypatch):
    write_kits(tmp_path / "source", range(4))
    folder = convert_kits(tmp_path / "source", raw).folder
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "imagesTr").iterdir()}
    write_kits(tmp_path / "source", [5])
    outcome = convert_kits(tmp_path / "source", raw)
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "imagesTr").iterdir()}
    assert {name: after[name] for name in before} == before
    assert outcome.report["cases_written"] == 5
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 5
    (folder / "labelsTr" / "case_00001.nii.gz").write_bytes(b"cut")
    (folder / "imagesTr" / "case_00002_0000.nii.gz").unlink()
    convert_kits(tmp_path / "source", raw)
    assert main(["convert", "--check", "220"]) == 0
    convert_kits(tmp_path / "source", raw, overwrite=True)
    rewritten = {path.name: path.stat().st_mtime_ns for path in (folder / "imagesTr").iterdir()}
    assert rewritten.keys() == after.keys()
    assert not set(rewritten.values()) & set(after.values())


def test_cases_that_left_the_source_are_not_deleted(tmp_path, raw):
    write_kits(tmp_path / "source", range(4))
    folder = convert_kits(tmp_path / "source", raw).folder
    before = tree(folder)
    (tmp_path / "source" / "dataset" / "case_00002").rename(tmp_path / "elsewhere")
    with pytest.raises(DatasetError, match=r"case_00002.*no longer in the source"):
        convert_kits(tmp_path / "source", raw)
    assert {name: content for name, content in tree(folder).items() if name != JOURNAL} == before
    assert convert_kits(tmp_path / "source", raw, overwrite=True).report["cases_written"] == 3
    assert not list(folder.glob("*/case_00002*"))


def test_other_options_and_other_data_sets_are_refused(tmp_path, raw):
    write_kits(tmp_path / "source", range(3))
    folder = convert_kits(tmp_path / "source", raw).folder
    before = tree(folder)
    plan = kits23.plan(tmp_path / "source", plain_labels=True)
    settings = {"converter": "kits23", "options": {"plain_labels": True}}
    with pytest.raises(UsageError, match="other options"):
        engine.convert(plan, folder, settings)
    assert tree(folder) == before
    assert "regions_class_order" in json.loads((folder / "dataset.json").read_text())
    engine.convert(plan, folder, settings, overwrite=True)
    assert "regions_class_order" not in json.loads((folder / "dataset.json").read_text())
    with pytest.raises(UsageError, match="taken by Dataset220_KiTS2023"):
        dataset_folder(220, "Other")
    foreign = raw / "Dataset300_Mine"
    foreign.mkdir()
    (foreign / "dataset.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="not written by smallseg convert"):
            engine.convert(plan, foreign, settings, overwrite=overwrite)
    assert tree(foreign) == {"dataset.json": b"{}"}


def test_overwriting_can_be_interrupted_too(tmp_path, raw, monkeypatch, capsys):
    write_kits(tmp_path / "source", range(6))
    folder = convert_kits(tmp_path / "source", raw).folder
    expected = tree(folder)
    run = engine._run

    def interrupted(tasks, num_processes):
        for number, result in enumerate(run(tasks, num_processes)):
            if number == 3:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(engine, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_kits(tmp_path / "source", raw, overwrite=True)
    assert len(list((folder / "labelsTr").iterdir())) == 4
    assert main(["convert", "--check", "220"]) == 2
    assert "was interrupted" in capsys.readouterr().err
    monkeypatch.setattr(engine, "_run", run)
    convert_kits(tmp_path / "source", raw)
    assert tree(folder) == expected


def test_nothing_is_written_through_links(tmp_path, raw):
    write_kits(tmp_path / "source", range(2))
    outside = tmp_path / "outside"
    outside.mkdir()
    (raw / "Dataset220_KiTS2023").mkdir()
    (raw / "Dataset220_KiTS2023" / JOURNAL).touch()
    (raw / "Dataset220_KiTS2023" / "imagesTr").symlink_to(outside)
    with pytest.raises(UsageError, match="is a link"):
        convert_kits(tmp_path / "source", raw)
    assert not list(outside.iterdir())


def test_a_changed_report_removes_nothing_elsewhere(tmp_path, raw):
    write_kits(tmp_path / "source", range(2))
    folder = convert_kits(tmp_path / "source", raw).folder
    victim = raw / "victim.txt"
    victim.write_text("kept")
    report = json.loads((folder / REPORT).read_text())
    report["cases"]["case_00000"]["files"] = {"../victim.txt": {"bytes": 4, "sha256": ""}}
    (folder / REPORT).write_text(json.dumps(report))
    with pytest.raises(DatasetError, match="it was changed"):
        convert_kits(tmp_path / "source", raw, overwrite=True)
    assert victim.read_text() == "kept"


def test_two_conversions_at_a_time_are_refused(tmp_path, raw, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    write_kits(tmp_path / "source", range(2))
    monkeypatch.setattr(journal, "LOCK_SECONDS", 0.2)
    folder = raw / "Dataset220_KiTS2023"
    folder.mkdir()
    with (folder / JOURNAL).open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(DatasetError, match="another conversion"):
            convert_kits(tmp_path / "source", raw)
    assert convert_kits(tmp_path / "source", raw).report["cases_written"] == 2


def broken() -> Converted:
    raise CaseError("cannot be read")


def surprising() -> Converted:
    raise KeyError("from a library")


def test_failing_cases_do_not_stop_the_others(tmp_path, raw, capsys):
    plan = picture_plan(6)
    bad = [Case(f"bad_{read.__name__}", read, "x", "all", ("somewhere",)) for read in (broken, surprising)]
    twice = [Case(name, partial(make_picture, 9), "y", "all", (name,)) for name in ("Same", "same")]
    outcome = engine.convert(Plan(**{**vars(plan), "cases": [*bad, *plan.cases, *twice]}), raw / "out", {})
    assert outcome.report["cases_written"] == 6
    reasons = {problem["name"]: problem["reason"] for problem in outcome.report["failed"]}
    assert reasons["bad_broken"] == "cannot be read"
    assert "KeyError" in reasons["bad_surprising"] and "somewhere" in reasons["bad_surprising"]
    assert "2 cases would be called" in reasons["Same"] and "same" in reasons


def test_nothing_convertible_leaves_no_dataset_json(raw):
    plan = picture_plan(0)
    case = Case("bad", broken, "x", "all", ())
    outcome = engine.convert(Plan(**{**vars(plan), "cases": [case]}), raw / "out", {})
    assert outcome.report["cases_failed"] == 1
    assert sorted(path.name for path in (raw / "out").iterdir()) == [REPORT]
    with pytest.raises(DatasetError, match="nothing to convert"):
        engine.convert(plan, raw / "other", {})
    assert not (raw / "other").exists()


def test_full_disk_stops_with_a_message(raw, monkeypatch):
    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Picture, "write", full)
    with pytest.raises(DatasetError, match=r"No space left.*kept"):
        engine.convert(picture_plan(3), raw / "out", {})


def test_parallel_equals_serial(raw):
    engine.convert(picture_plan(9), raw / "serial", {})
    engine.convert(picture_plan(9), raw / "parallel", {}, num_processes=2)
    serial, parallel = tree(raw / "serial"), tree(raw / "parallel")
    name = "dataset.json"  # holds the name of the folder
    assert serial.pop(name).replace(b'"name": ""', b"") == parallel.pop(name).replace(b'"name": ""', b"")
    assert serial == parallel


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, np.nan]]), "NaN"),
        (np.array([[0, np.inf]]), "NaN or infinite"),
        (np.array([[0, 0.5]]), "fractions, such as 0.5"),
        (np.array([[0, 7, 7]], np.uint8), r"unknown values 7 \(2 voxels\); known values: 0, 1"),
        (np.array([[0, -1]], np.int16), "from -1 to 0"),
        (np.array([[0, 256]], np.int16), "from 0 to 256"),
        (np.zeros((0, 3), np.uint8), "empty"),
    ],
)
def test_labels_with_other_values_are_refused(values, message):
    with pytest.raises(CaseError, match=message):
        label_counts(values, (0, 1))


def test_label_counts_keep_values():
    for dtype in (np.uint8, np.int16, np.float32, np.float64, ">i4"):
        label = np.asfortranarray(np.random.default_rng(0).integers(0, 3, (5, 4, 3))).astype(dtype)
        counts, values = label_counts(label, (0, 1, 2))
        assert values.dtype == np.uint8
        assert (values == label).all()
        assert counts == {value: int((label == value).sum()) for value in (0, 1, 2)}


def test_lesions_that_touch_at_a_corner_are_one():
    label = np.zeros((4, 4, 4), np.uint8)
    label[0, 0, 0] = label[1, 1, 1] = 1
    label[3, 3, 3] = 2
    assert lesion_sizes(label, (1, 2)) == [1, 2]
    assert lesion_sizes(label, (2,)) == [1]
    assert lesion_sizes(np.zeros((2, 2), np.uint8), (1,)) == []


@pytest.mark.parametrize("name", ["", "...", "///", "x" * 300, "--"])
def test_impossible_case_names(name):
    with pytest.raises(CaseError, match="cannot be the name"):
        case_identifier(name)


def test_case_names_are_made_safe():
    assert case_identifier("benign (1)") == "benign_1"
    assert case_identifier("../../etc/passwd") == "etc_passwd"
    assert case_identifier("ünï\ncode") == "n_code"


def test_duplicates_are_reported_and_kept_on_one_side(raw):
    plan = picture_plan(12)
    copy = Case("copy", partial(make_picture, 0), "somebody else", "all", ("copy",))
    outcome = engine.convert(Plan(**{**vars(plan), "cases": [*plan.cases, copy]}), raw / "out", {})
    assert outcome.report["duplicates"] == [["case_0000", "copy"]]
    for fold in json.loads((raw / "out" / SPLITS).read_text()):
        assert ("case_0000" in fold["val"]) == ("copy" in fold["val"])


def test_own_folds_in_the_preprocessed_folder_are_named(tmp_path, raw, monkeypatch):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    write_kits(tmp_path / "source", range(5))
    assert convert_kits(tmp_path / "source", raw).messages == []
    folder = tmp_path / "preprocessed" / "Dataset220_KiTS2023"
    folder.mkdir(parents=True)
    (folder / SPLITS).write_text("[]")
    (message,) = convert_kits(tmp_path / "source", raw).messages
    assert "holds other folds" in message and "cp " in message
    assert (folder / SPLITS).read_text() == "[]"


def record(case: str, group: str, size: float = 1.0, stratum: str = "a", train_only: bool = False) -> dict:
    return {"case": case, "group": group, "stratum": stratum, "lesion_mm3": [size], "train_only": train_only}


def test_folds_keep_patients_together_and_balance_sizes():
    draw = random.Random(1)
    records = [record(f"c{n}", f"p{n // 3}", draw.lognormvariate(0, 2), "ab"[n % 7 == 0]) for n in range(300)]
    folds = splits.patient_folds(records)
    groups = {item["case"]: item["group"] for item in records}
    assert splits.patients_on_both_sides(folds, groups) == []
    assert sorted(case for fold in folds for case in fold["val"]) == sorted(groups)
    assert [len(fold["val"]) for fold in folds] == [60] * 5
    shuffled = sorted(records, key=lambda item: item["case"][::-1])
    assert splits.patient_folds(shuffled) == folds


def test_weak_cases_are_never_validated_nor_trained_with_their_patient():
    records = [record(f"c{n}", f"p{n}") for n in range(10)]
    records += [record(f"w{n}", f"p{n}", train_only=True) for n in range(20)]
    for fold in splits.patient_folds(records):
        validated = {case[1:] for case in fold["val"]}
        assert all(case.startswith("c") for case in fold["val"])
        assert not {f"w{number}" for number in validated} & set(fold["train"])
        assert {f"w{n}" for n in range(10, 20)} <= set(fold["train"])


def test_few_patients():
    assert splits.patient_folds([record("a", "p")]) is None
    assert len(splits.patient_folds([record("a", "p"), record("b", "q"), record("c", "r")])) == 3


def test_kits_folds_depend_on_the_number_only():
    folds = [splits.kits_fold(number) for number in range(600)]
    for first in range(0, 600, 5):
        assert sorted(folds[first : first + 5]) == [0, 1, 2, 3, 4]


def test_raw_folder_has_to_be_named(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    write_atlas(tmp_path)
    assert main(["convert", "atlas", str(tmp_path), "-d", "900"]) == 1
    assert "nnUNet_raw is not set" in capsys.readouterr().err
    assert main(["convert", "--check", "900"]) == 1
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    assert main(["convert", "atlas", str(tmp_path), "-d", "1000"]) == 2
    assert main(["convert", "--check", "900"]) == 2


def test_check_finds_every_change(tmp_path, raw, capsys):
    write_atlas(tmp_path / "source")
    assert main(["convert", "atlas", str(tmp_path / "source"), "-d", "233", "-np", "1"]) == 0
    folder = raw / "Dataset233_ATLAS2023"
    assert main(["convert", "--check", "233"]) == 0
    image, label = volume_pair(1, label=2, lowest=0)
    label[0, 0, 0] = 1
    write_nifti(folder / "labelsTr" / "atlas_001.nii.gz", label)
    write_nifti(folder / "imagesTr" / "atlas_002_0000.nii.gz", image[:-1])
    (folder / "imagesTr" / "atlas_010_0000.nii.gz").unlink()
    cut = (folder / "labelsTr" / "atlas_037.nii.gz").read_bytes()[:-20]
    (folder / "labelsTr" / "atlas_037.nii.gz").write_bytes(cut)
    (folder / "imagesTr" / "extra_0000.nii.gz").write_bytes(b"x")
    capsys.readouterr()
    assert main(["convert", "--check", "233"]) == 1
    errors = capsys.readouterr().err
    for part in (
        "atlas_001: labelsTr/atlas_001.nii.gz is not the file that was written; the label holds",
        "atlas_002: imagesTr/atlas_002_0000.nii.gz is not the file",
        "differ in shape",
        "atlas_010_0000.nii.gz is missing",
        "atlas_037",
        "imagesTr/extra_0000.nii.gz is not in the report",
    ):
        assert part in errors
    assert "atlas_000" not in errors


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX only")
def test_command_line_starts_and_converts_without_torch(tmp_path, raw):
    write_atlas(tmp_path / "source")
    code = (
        "import sys; sys.modules['torch'] = sys.modules['nnunetv2'] = None\n"
        "from nnunetv2_smallseg.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "convert", "atlas", str(tmp_path / "source"), "-d", "233", "-np", "2"]
    finished = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
