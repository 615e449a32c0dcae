"""Converters of volumes: the miniature official trees, hostile files, patients, splits."""

from __future__ import annotations

import gzip
import json
import multiprocessing.dummy
import zipfile
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
from dataset_files import AFFINE, nifti_bytes, tree, volume_pair, write_atlas, write_kits, write_nifti, write_uls

from nnunetv2_smallseg.cli.main import main
from nnunetv2_smallseg.datasets import atlas23, engine, kits23, uls23
from nnunetv2_smallseg.datasets.archives import Source, zip_members
from nnunetv2_smallseg.datasets.convert import convert_dataset
from nnunetv2_smallseg.datasets.splits import kits_fold, patients_on_both_sides
from nnunetv2_smallseg.datasets.uls23_history import CORRECTED, WITHDRAWN
from nnunetv2_smallseg.datasets.volumes import cropped, read_volume
from nnunetv2_smallseg.errors import CaseError, DatasetError, UsageError

LIMIT = 1 << 24


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """An empty nnUNet_raw."""
    folder = tmp_path / "raw"
    folder.mkdir()
    monkeypatch.setenv("nnUNet_raw", str(folder))
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    return folder


@pytest.fixture(scope="module")
def samples(shared):
    """The miniature official trees and what is known about them."""
    folder = shared / "reference" / "datasets" / "samples"
    return folder, json.loads((folder / "manifest.json").read_text())


@pytest.fixture(scope="module")
def converted_uls(samples, tmp_path_factory):
    """All of the ULS23 sample with its weak case, at full size."""
    folder = tmp_path_factory.mktemp("uls") / "Dataset230_ULS23"
    plan = uls23.plan(samples[0] / "uls23", weak=True)
    return engine.convert(plan, folder, {"converter": "uls23"})


def verify(folder: Path, monkeypatch) -> None:
    """nnU-Net's own check, its worker processes replaced by threads."""
    from nnunetv2.experiment_planning import verify_dataset_integrity as module

    threads = SimpleNamespace(get_context=lambda kind: multiprocessing.dummy)
    monkeypatch.setattr(module, "multiprocessing", threads)
    module.verify_dataset_integrity(str(folder), 1)


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


# ---------------------------------------------------------------------------------------------------- official samples


def test_uls_sample_equals_the_manifest(samples, converted_uls):
    _, manifest = samples
    report = converted_uls.report
    assert not report["failed"]
    rows = [row for row in manifest["uls23"] if row["label_shape"] is not None]
    records = report["cases"]
    assert len(rows) == len(records) == 10
    for row in rows:
        record = records[row["name"]]
        assert record["label_voxels"]["1"] == row["lesion_voxels"]
        assert sum(record["lesion_mm3"]) == pytest.approx(row["lesion_mm3"], abs=0.01, rel=1e-4)
        assert record["spacing"] == pytest.approx(row["spacing"], abs=1e-4)
        place = "Ts" if record["test"] else "Tr"
        image = nibabel.load(converted_uls.folder / f"images{place}" / f"{row['name']}_0000.nii.gz")
        label = nibabel.load(converted_uls.folder / f"labels{place}" / f"{row['name']}.nii.gz")
        assert image.shape == label.shape == (256, 256, 128)
        assert image.get_data_dtype() in (np.int16, np.float32) and label.get_data_dtype() == np.uint8
        source = nibabel.Nifti1Image.from_bytes(gzip.decompress(read_source(record["sources"][0])))
        reference = nibabel.Nifti1Image.from_bytes(gzip.decompress(read_source(record["sources"][1])))
        assert np.array_equal(image.dataobj, np.asarray(source.dataobj)[..., 0])
        expected = np.asarray(reference.dataobj).reshape(256, 256, 128)
        written = np.asarray(label.dataobj)
        if row["subset"] == "DeepLesion":
            assert record["details"]["marked_slices"] == [64]
            assert np.array_equal(written[..., 64], expected[..., 64])
            assert set(np.unique(np.delete(written, 64, axis=2))) == {2}
        else:
            assert np.array_equal(written, expected)
        for header in (image.header, label.header):
            assert np.array_equal(header.get_best_affine(), source.affine)
            assert np.array_equal(header.get_qform(), source.get_qform())
            assert header["qform_code"] == source.header["qform_code"]


def read_source(text: str) -> bytes:
    """A file, or the named or only member of an archive."""
    path, _, member = text.partition("[")
    if not path.endswith(".zip"):
        return Path(path).read_bytes()
    with zipfile.ZipFile(path) as archive:
        return archive.read(member.rstrip("]") or archive.namelist()[0])


def test_uls_sample_splits_and_leaks(samples, converted_uls):
    _, manifest = samples
    report = converted_uls.report
    test = {name.removesuffix("_sample_0") for name, record in report["cases"].items() if record["test"]}
    assert test == set(manifest["uls_split"]["test"])
    assert [problem["name"] for problem in report["skipped"] if "withdrew" in problem["reason"]] == [
        "bone_00194_lesion_08"
    ]
    assert report["leaks"]["weak_patients_also_in_DeepLesion3D"] == ["DeepLesion 000775"]
    folds = json.loads((converted_uls.folder / "splits_final.json").read_text())
    weak = "000775_02_02_102_sample_0"
    for fold in folds:
        assert weak not in fold["val"]
        assert ("000775_02_02_102_lesion_01" in fold["val"]) == (weak not in fold["train"])
    assert patients_on_both_sides(folds, {n: r["patient"] for n, r in report["cases"].items()}) == []
    description = json.loads((converted_uls.folder / "dataset.json").read_text())
    assert description["labels"] == {"background": 0, "lesion": 1, "ignore": 2}
    assert description["numTraining"] == 8


def test_kits_sample_equals_nnunets_converter(samples, raw, tmp_path, monkeypatch):
    from nnunetv2.dataset_conversion import Dataset220_KiTS2023

    folder, manifest = samples
    outcome = convert_dataset("kits23", folder / "kits23", 220)
    monkeypatch.setattr(Dataset220_KiTS2023, "nnUNet_raw", str(tmp_path / "theirs"))
    Dataset220_KiTS2023.convert_kits2023(str(folder / "kits23" / "dataset"))
    theirs = tree(tmp_path / "theirs" / "Dataset220_KiTS2023")
    ours = tree(outcome.folder)
    description, our_description = (json.loads(content.pop("dataset.json")) for content in (theirs, ours))
    assert {name: ours[name] for name in theirs} == theirs
    assert {name for name in ours if "/" in name} == set(theirs)
    about = ("licence", "converted_by", "reference", "release")  # what nnU-Net does not read
    for key in set(description) - set(about):
        assert our_description[key] == description[key], key
    for row in manifest["kits23"]:
        record = outcome.report["cases"][row["case"]]
        assert record["shape"] == row["shape"]
        assert record["spacing"] == pytest.approx(row["spacing"], abs=1e-4)
        assert {value: record["label_voxels"][value] for value in "123"} == row["voxels"]
        assert record["orientation"] == "IPL"
    verify(outcome.folder, monkeypatch)
    assert main(["convert", "--check", "220"]) == 0


def test_atlas_sample_equals_the_manifest(samples, raw, monkeypatch):
    folder, manifest = samples
    outcome = convert_dataset("atlas", folder / "atlas", 233)
    source = folder / "atlas" / "atlas-train-dataset-1.0.1" / "train"
    phases = {}
    for row in manifest["atlas"]:
        name = f"atlas_{row['id']:03d}"
        record = outcome.report["cases"][name]
        assert record["shape"] == row["shape"]
        assert record["label_voxels"]["2"] == row["tumour_voxels"]
        assert record["label_voxels"]["1"] == row["liver_voxels"]  # without the tumours
        assert record["lesion_voxels"] == row["sizes"]
        image, label = (outcome.folder / part for part in (f"imagesTr/{name}_0000.nii.gz", f"labelsTr/{name}.nii.gz"))
        assert np.array_equal(voxels(image), voxels(source / "imagesTr" / f"im{row['id']}.nii.gz"))
        assert np.array_equal(voxels(label), voxels(source / "labelsTr" / f"lb{row['id']}.nii.gz"))
        phases[row["id"]] = json.loads((outcome.folder / "cases.json").read_text())[name]["contrast_phase"]
    assert phases == {0: "arterial", 1: "portal", 2: "delayed", 10: "no contrast agent", 37: "unknown"}
    description = json.loads((outcome.folder / "dataset.json").read_text())
    assert description["labels"] == {"background": 0, "liver": [1, 2], "tumour": 2}
    assert description["regions_class_order"] == [1, 2]
    assert "training" not in description and "modality" not in description
    verify(outcome.folder, monkeypatch)


# --------------------------------------------------------------------------------------------------------------- ULS23


NAMES = {
    "kits21": [f"kidney21_case_{number:05d}_lesion_01_sample_0" for number in range(7)],
    "LiTS": ["liver_0_lesion_01_sample_0", "liver_0_lesion_02_sample_0", "liver_1_lesion_01_sample_0"],
    "ULS23_DeepLesion3D": ["000010_02_02_100_lesion_01", "000020_01_01_050_lesion_01"],
    "DeepLesion": ["000010_02_02_100_sample_0", "000020_01_01_050_sample_0", "000030_01_01_050_sample_0"],
}


def test_uls_leaks_stay_out_of_validation(tmp_path, raw, monkeypatch):
    write_uls(tmp_path / "source", NAMES, test=["000010_02_02_100_lesion_01", "kidney21_case_00006_lesion_01"])
    outcome = convert_dataset("uls23", tmp_path / "source", 230, weak=True)
    report = outcome.report
    left_out = "000010_02_02_100_sample_0"
    assert report["leaks"]["weak_volumes_of_test_patients_left_out"] == [left_out]
    assert left_out not in report["cases"]
    verify(outcome.folder, monkeypatch)
    assert report["leaks"]["weak_patients_also_in_DeepLesion3D"] == ["DeepLesion 000020"]
    assert report["leaks"]["test_patients_also_in_KiTS23"] == ["KiTS case_00006"]
    assert any("KiTS23" in message for message in outcome.messages)
    folds = json.loads((outcome.folder / "splits_final.json").read_text())
    write_kits(tmp_path / "kits", range(7))
    kits = json.loads((convert_dataset("kits23", tmp_path / "kits", 220).folder / "splits_final.json").read_text())
    for number in range(6):
        name = NAMES["kits21"][number]
        assert [name in fold["val"] for fold in folds] == [f"case_{number:05d}" in fold["val"] for fold in kits]
        assert name in folds[kits_fold(number)]["val"]
    for fold in folds:
        assert not set(NAMES["DeepLesion"]) & set(fold["val"])
        if "000020_01_01_050_lesion_01" in fold["val"]:
            assert "000020_01_01_050_sample_0" not in fold["train"]
        assert {"liver_0_lesion_01_sample_0", "liver_0_lesion_02_sample_0"} <= set(fold["val"]) or not {
            "liver_0_lesion_01_sample_0",
            "liver_0_lesion_02_sample_0",
        } & set(fold["val"])


def test_uls_subsets_and_crop(tmp_path, raw):
    write_uls(tmp_path / "source", NAMES)
    outcome = convert_dataset("uls23", tmp_path / "source", 230, subsets=["LiTS"], crop=[4, 6, 2])
    assert set(outcome.report["cases"]) == set(NAMES["LiTS"])
    name = NAMES["LiTS"][0]
    source = nibabel.load(tmp_path / "source" / "ULS23" / "LiTS" / "images" / f"{name}.nii.gz")
    image = nibabel.load(outcome.folder / "imagesTr" / f"{name}_0000.nii.gz")
    assert np.array_equal(image.dataobj, np.asarray(source.dataobj)[2:6, 1:7, 1:3, 0])
    assert np.allclose(image.affine @ [0, 0, 0, 1], source.affine @ [2, 1, 1, 1])
    assert np.allclose(image.get_qform(), image.get_sform())
    cut = convert_dataset("uls23", tmp_path / "source", 231, subsets=["LiTS"], crop=[2, 2, 2], dataset_name="Cut")
    assert cut.report["notes"][name] == ["2 of 4 lesion voxels are outside of the crop"]
    large = convert_dataset("uls23", tmp_path / "source", 232, subsets=["LiTS"], crop=[99, 2, 2], dataset_name="Large")
    assert "does not fit" in large.report["failed"][0]["reason"]
    with pytest.raises(UsageError, match="256 x 256 x 128 voxels"):
        uls23.plan(tmp_path / "source", crop=[300, 2, 2])
    with pytest.raises(UsageError, match="unknown subsets MSD"):
        uls23.plan(tmp_path / "source", subsets=["MSD"])
    with pytest.raises(DatasetError, match="no images of CCC18"):
        uls23.plan(tmp_path / "source", subsets=["CCC18", "LiTS"])


def test_uls_labels_without_images_and_images_without_labels(tmp_path, raw):
    write_uls(tmp_path / "source", {"LiTS": [f"liver_{n}_lesion_01_sample_0" for n in range(4)]})
    withdrawn, corrected = "liver_108_lesion_16_sample_0", "liver_20_lesion_05_sample_0"
    assert withdrawn in WITHDRAWN and corrected in CORRECTED and (len(WITHDRAWN), len(CORRECTED)) == (138, 26)
    write_uls(tmp_path / "source", {"LiTS": [withdrawn, corrected]})
    images, labels = (tmp_path / "source" / part / "LiTS" for part in ("ULS23", "annotations"))
    next(images.rglob("liver_0_*")).unlink()
    next(labels.rglob("liver_1_*")).unlink()
    (images / "images" / "._liver_2_lesion_01_sample_0.nii.gz").write_bytes(b"macOS")
    (images / "images" / "liver_2_lesion_01_old.nii.gz").write_bytes(b"x")
    report = convert_dataset("uls23", tmp_path / "source", 230).report
    assert set(report["cases"]) == {"liver_2_lesion_01_sample_0", "liver_3_lesion_01_sample_0", corrected}
    assert {problem["name"]: problem["reason"] for problem in report["failed"]} == {
        "liver_0_lesion_01_sample_0": "label without image: unpack the archive again",
        "liver_2_lesion_01_old": report["failed"][1]["reason"],
    }
    reasons = {problem["name"]: problem["reason"] for problem in report["skipped"]}
    assert reasons["liver_1_lesion_01_sample_0"] == "image without label"
    assert "withdrew" in reasons[withdrawn]
    assert "redrawn on 2024-02-20" in report["notes"][corrected][0]


def test_uls_needs_images_labels_and_split(tmp_path):
    with pytest.raises(UsageError, match="is no folder"):
        uls23.plan(tmp_path / "absent")
    with pytest.raises(DatasetError, match="no images of"):
        uls23.plan(tmp_path)
    (tmp_path / "ULS23_Part1.zip").write_bytes(b"PK")
    (tmp_path / "ULS23_Part1.z01").write_bytes(b"PK")
    with pytest.raises(DatasetError, match=r"7z x ULS23_Part1\.zip"):
        uls23.plan(tmp_path)
    write_uls(tmp_path / "a", {"LiTS": ["liver_0_lesion_01_sample_0"]})
    with pytest.raises(DatasetError, match="no labels of ULS23"):
        uls23.plan(tmp_path / "a" / "ULS23")
    (tmp_path / "a" / "baseline_model" / "train_test_split.json").write_text("[]")
    with pytest.raises(DatasetError, match="not the official split"):
        uls23.plan(tmp_path / "a")
    (tmp_path / "a" / "baseline_model" / "train_test_split.json").unlink()
    with pytest.raises(DatasetError, match="official split is missing"):
        uls23.plan(tmp_path / "a")


def test_uls_labels_in_a_folder_of_their_own(tmp_path, raw):
    write_uls(tmp_path / "all", {"LiTS": ["liver_0_lesion_01_sample_0"]})
    (tmp_path / "repository").mkdir()
    for part in ("annotations", "baseline_model"):
        (tmp_path / "all" / part).rename(tmp_path / "repository" / part)
    plan = uls23.plan(tmp_path / "all", labels=tmp_path / "repository")
    assert [case.identifier for case in plan.cases] == ["liver_0_lesion_01_sample_0"]
    (tmp_path / "repository").rename(tmp_path / "all" / "repository")
    plan = uls23.plan(tmp_path / "all", labels=tmp_path / "all" / "repository")
    assert [case.identifier for case in plan.cases] == ["liver_0_lesion_01_sample_0"]


def test_hostile_archives(tmp_path, raw):
    """Names that leave the folder, links, bombs, cut files: each named, the rest converted, nothing written outside."""
    good = "liver_0_lesion_01_sample_0"
    write_uls(tmp_path / "source", {"LiTS": [f"liver_{number}_lesion_01_sample_0" for number in range(6)]})
    images = tmp_path / "source" / "ULS23" / "LiTS" / "images"
    content = {path.name: path.read_bytes() for path in images.iterdir()}
    for path in list(images.iterdir()):
        path.unlink()
    image, _ = volume_pair(3, (8, 8, 4))
    header_only = gzip.decompress(content["liver_2_lesion_01_sample_0.nii.gz"])[:352]
    with zipfile.ZipFile(images / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"images/{good}.nii.gz", content[f"{good}.nii.gz"])
        archive.writestr("../../../liver_9_lesion_01_sample_0.nii.gz", b"x")
        archive.writestr("/tmp/liver_8_lesion_01_sample_0.nii.gz", b"x")
        archive.writestr("C:\\liver_7_lesion_01_sample_0.nii.gz", b"x")
        link = zipfile.ZipInfo("liver_6_lesion_01_sample_0.nii.gz")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        bomb = gzip.compress(header_only + bytes(1 << 26))
        archive.writestr("liver_1_lesion_01_sample_0.nii.gz", bomb)
        huge = bytearray(header_only)
        huge[40:56] = np.array([3, 30000, 30000, 30000, 1, 1, 1, 1], "<i2").tobytes()
        archive.writestr("liver_2_lesion_01_sample_0.nii.gz", gzip.compress(bytes(huge)))
        archive.writestr("liver_3_lesion_01_sample_0.nii.gz", content["liver_3_lesion_01_sample_0.nii.gz"][:-100])
        archive.writestr("liver_4_lesion_01_sample_0.nii.gz", nifti_bytes(image[:-1]))
        archive.writestr("liver_5_lesion_01_sample_0.nii.gz", b"not gzip")
    before = {path for path in tmp_path.rglob("*") if raw not in path.parents}
    assert main(["convert", "uls23", str(tmp_path / "source"), "-d", "230", "-np", "1"]) == 1
    assert {path for path in tmp_path.rglob("*") if raw not in path.parents} == before
    report = json.loads((raw / "Dataset230_ULS23" / "conversion_report.json").read_text())
    assert list(report["cases"]) == [good]
    reasons = {problem["name"]: problem["reason"] for problem in report["failed"]}
    for part, message in {
        "../../../liver_9": "leaves the archive's folder",
        "/tmp/liver_8": "is absolute",
        "liver_7": "is absolute",
        "liver_6": "is a link",
        "liver_1": "goes on after its voxels",
        "liver_2": "the limit is",
        "liver_3": "damaged or was not downloaded completely",
        "liver_4": "differ in shape",
        "liver_5": "truncated",
    }.items():
        matching = [reason for name, reason in reasons.items() if part in name and message in reason]
        assert matching, (part, reasons)


def test_hostile_labels(tmp_path, raw):
    bases = [f"liver_{number}_lesion_01_sample_0" for number in range(6)]
    write_uls(tmp_path / "source", {"LiTS": bases})
    folder = tmp_path / "source" / "annotations" / "LiTS" / "labels"
    label = volume_pair(0, (8, 8, 4))[1].astype(np.float32)

    def replace(number: int, **members: bytes) -> None:
        with zipfile.ZipFile(folder / f"{bases[number]}.nii.gz.zip", "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)

    nan, unknown = label.copy(), label.copy()
    nan[0, 0, 0], unknown[0, 0, 0] = np.nan, 5
    replace(1, **{"a.nii.gz": nifti_bytes(nan)})
    replace(2, **{"a.nii.gz": nifti_bytes(unknown)})
    replace(3, **{"a.nii.gz": nifti_bytes(label), "b.nii.gz": nifti_bytes(label)})
    replace(4, **{"../a.nii.gz": nifti_bytes(label)})
    moved = AFFINE.copy()
    moved[0, 3] = 40
    replace(5, **{"a.nii.gz": nifti_bytes(label, moved)})
    report = convert_dataset("uls23", tmp_path / "source", 230).report
    assert list(report["cases"]) == bases[:1]
    reasons = [problem["reason"] for problem in report["failed"]]
    for reason, message in zip(
        reasons,
        ("NaN", "unknown values 5 (1 voxels)", "holds 2 files", "leaves the archive's folder", "40 mm apart"),
        strict=True,
    ):
        assert message in reason


# ----------------------------------------------------------------------------------------------------- KiTS23 and ATLAS


def test_kits_problems_are_named_case_by_case(tmp_path, raw, capsys):
    write_kits(tmp_path / "source", range(8))
    dataset = tmp_path / "source" / "dataset"
    (dataset / "case_00001" / "imaging.nii.gz").rename(dataset / "case_00001" / ".partial.imaging.nii.gz")
    (dataset / "case_00002" / "segmentation.nii.gz").unlink()
    image, label = volume_pair(3, label=2)
    write_nifti(dataset / "case_00003" / "imaging.nii.gz", (image.astype(np.float64) + 2000))
    write_nifti(dataset / "case_00004" / "segmentation.nii.gz", label[..., :-1])
    write_nifti(dataset / "case_00005" / "segmentation.nii.gz", label * 2)
    turned = np.array([[0, 0, -1, 0], [0, -1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1.0]])
    write_nifti(dataset / "case_00006" / "segmentation.nii.gz", label, turned)
    nudged = AFFINE.copy()
    nudged[1, 3] = 1e-3
    write_nifti(dataset / "case_00007" / "segmentation.nii.gz", label, nudged)
    assert main(["convert", "kits23", str(tmp_path / "source"), "-d", "220", "-np", "1"]) == 1
    errors = capsys.readouterr().err
    report = json.loads((raw / "Dataset220_KiTS2023" / "conversion_report.json").read_text())
    assert list(report["cases"]) == ["case_00000", "case_00007"]
    reasons = {problem["name"]: problem["reason"] for problem in report["failed"]}
    for name, message in {
        "case_00001": "a download was interrupted",
        "case_00003": "no CT in Hounsfield units",
        "case_00004": "differ in shape",
        "case_00005": "unknown values 4",
        "case_00006": "their geometry has to agree",
    }.items():
        assert message in reasons[name]
        assert f"failed: {name}" in errors
    assert report["skipped"][0]["name"] == "case_00002"
    assert "written with the geometry of the image" in report["geometry_fixes"]["case_00007"][0]
    label_file = nibabel.load(raw / "Dataset220_KiTS2023" / "labelsTr" / "case_00007.nii.gz")
    assert np.array_equal(label_file.affine, AFFINE.astype(np.float32))


def test_kits_without_images(tmp_path):
    with pytest.raises(DatasetError, match="no folder case_XXXXX"):
        kits23.plan(tmp_path)
    write_kits(tmp_path, range(2))
    for path in tmp_path.rglob("imaging.nii.gz"):
        path.unlink()
    with pytest.raises(DatasetError, match="kits23_download_data"):
        kits23.plan(tmp_path)


def test_kits_plain_labels(tmp_path, raw, monkeypatch):
    write_kits(tmp_path / "source", range(5))
    outcome = convert_dataset("kits23", tmp_path / "source", 221, dataset_name="KiTSPlain", plain_labels=True)
    description = json.loads((outcome.folder / "dataset.json").read_text())
    assert description["labels"] == {"background": 0, "kidney": 1, "tumor": 2, "cyst": 3}
    assert "regions_class_order" not in description
    verify(outcome.folder, monkeypatch)


def test_atlas_pairs_by_number_and_refuses_the_stroke_data(tmp_path, raw):
    write_atlas(tmp_path / "source", (0, 1, 2, 10, 37))
    train = tmp_path / "source" / "train"
    (train / "imagesTr" / "im2.nii.gz").unlink()
    (train / "labelsTr" / "lb10.nii.gz").unlink()
    info = {"im0": {"contrast_phase": "portal"}, "im1": {"contrast_phase": "unkown"}}
    (train / "patient_info_train.json").write_text(json.dumps(info))
    plan = atlas23.plan(tmp_path / "source")
    assert [case.identifier for case in plan.cases] == ["atlas_000", "atlas_001", "atlas_037"]
    assert [case.stratum for case in plan.cases] == ["portal", "unknown", "unknown"]
    assert plan.failed[0].reason == "label without image: lb2.nii.gz"
    assert plan.skipped[0].reason == "image without label: im10.nii.gz"
    (train / "patient_info_train.json").write_text("[1")
    assert "cannot be read" in atlas23.plan(tmp_path / "source").notes[0]
    (tmp_path / "stroke" / "sub-r001s001" / "anat").mkdir(parents=True)
    with pytest.raises(DatasetError, match="stroke"):
        atlas23.plan(tmp_path / "stroke")
    write_atlas(tmp_path / "source" / "copy")
    with pytest.raises(DatasetError, match="2 times"):
        atlas23.plan(tmp_path / "source")
    with pytest.raises(DatasetError, match=r"unpack atlas-train-dataset-1\.0\.1\.zip"):
        atlas23.plan(raw)


def test_atlas_refuses_ct(tmp_path, raw):
    write_atlas(tmp_path / "source", (0, 1))
    image, _ = volume_pair(0, lowest=-1000)
    write_nifti(tmp_path / "source" / "train" / "imagesTr" / "im1.nii.gz", image)
    report = convert_dataset("atlas", tmp_path / "source", 233).report
    assert list(report["cases"]) == ["atlas_000"]
    assert "not an MRI" in report["failed"][0]["reason"]


def test_sheared_geometry_gets_a_reader_that_takes_it(tmp_path, raw, monkeypatch):
    write_atlas(tmp_path / "source", (0, 1, 2))
    sheared = AFFINE.copy()
    sheared[0, 1] = 0.3
    for number in (0, 1, 2):
        image, label = volume_pair(number, label=2, lowest=0)
        for part, name, array in (("imagesTr", "im", image), ("labelsTr", "lb", label)):
            nifti = nibabel.Nifti1Image(array, sheared, dtype=array.dtype)
            nifti.header.set_qform(None, 0)
            nibabel.save(nifti, tmp_path / "source" / "train" / part / f"{name}{number}.nii.gz")
    outcome = convert_dataset("atlas", tmp_path / "source", 233)
    description = json.loads((outcome.folder / "dataset.json").read_text())
    assert description["overwrite_image_reader_writer"] == "NibabelIOWithReorient"
    verify(outcome.folder, monkeypatch)


# -------------------------------------------------------------------------------------------------------------- volumes


@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i2", "<f4", ">f8", "<u2"])
def test_volumes_read_as_nibabel_reads_them(tmp_path, dtype):
    array = np.random.default_rng(0).integers(0, 200, (3, 4, 5)).astype(dtype)
    image = nibabel.Nifti1Image(array, AFFINE, dtype=array.dtype)
    image.header.set_data_dtype(array.dtype)
    if dtype.startswith(">"):
        image = nibabel.Nifti1Image(array, AFFINE, image.header.as_byteswapped(">"))
    for name in ("a.nii", "a.nii.gz"):
        nibabel.save(image, tmp_path / name)
        volume = read_volume(Source(tmp_path / name), LIMIT)
        assert np.array_equal(volume.array, array)
        assert np.array_equal(volume.affine, nibabel.load(tmp_path / name).affine)
        target = tmp_path / "out.nii.gz"
        volume.with_array(volume.array).write(target)
        assert np.array_equal(voxels(target), array)


def test_labels_get_every_description_of_the_geometry(tmp_path, raw):
    """SimpleITK and nibabel prefer different fields; a label whose fields differ is written with those of its image."""
    write_atlas(tmp_path / "source", (0, 1))
    label = nibabel.Nifti1Image(volume_pair(0, label=2)[1], AFFINE)
    label.header.set_qform(np.diag([1, 1, 1, 1]), 1)
    label.header.set_sform(AFFINE, 1)
    nibabel.save(label, tmp_path / "source" / "train" / "labelsTr" / "lb0.nii.gz")
    outcome = convert_dataset("atlas", tmp_path / "source", 233)
    assert list(outcome.report["geometry_fixes"]) == ["atlas_000"]
    written = nibabel.load(outcome.folder / "labelsTr" / "atlas_000.nii.gz")
    assert np.allclose(written.get_qform(), AFFINE, atol=1e-6) and np.allclose(written.get_sform(), AFFINE, atol=1e-6)
    assert main(["convert", "--check", "233"]) == 0


def test_scale_factors_are_applied(tmp_path):
    image = nibabel.Nifti1Image(np.arange(8, dtype=np.int16).reshape(2, 2, 2), AFFINE)
    content = bytearray(image.to_bytes())
    content[112:120] = np.array([2.0, -10.0], "<f4").tobytes()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(bytes(content)))
    volume = read_volume(Source(tmp_path / "a.nii.gz"), LIMIT)
    assert np.array_equal(volume.array, nibabel.load(tmp_path / "a.nii.gz").get_fdata())
    assert volume.file is None


def test_damaged_volumes(tmp_path):
    good = gzip.decompress(nifti_bytes(volume_pair(0)[0]))

    def refused(content: bytes, message: str) -> None:
        (tmp_path / "a.nii.gz").write_bytes(content)
        with pytest.raises(CaseError, match=message):
            read_volume(Source(tmp_path / "a.nii.gz"), LIMIT)

    def changed(offset: int, values: np.ndarray) -> bytes:
        content = bytearray(good)
        content[offset : offset + values.nbytes] = values.tobytes()
        return gzip.compress(bytes(content))

    refused(b"", "truncated: 0 bytes")
    refused(good[:-1], "truncated: 383 of 384")
    refused(gzip.compress(good)[:-4], "downloaded completely")
    refused(gzip.compress(good)[:-1] + b"\xff", "damaged")
    refused(b"\x1f\x8b" + b"junk" * 100, "damaged")
    refused(changed(40, np.array([2, 6, 8], "<i2")), "a single 3D volume is expected")
    refused(changed(40, np.array([4, 6, 8, 4, 2], "<i2")), "a single 3D volume is expected")
    refused(changed(40, np.array([3, 6, -8, 4], "<i2")), "a single 3D volume is expected")
    refused(changed(70, np.array([128], "<i2")), "not a colour")
    refused(changed(70, np.array([99], "<i2")), "no NIfTI-1 file")
    refused(changed(344, np.frombuffer(b"nope", "u1")), "no single-file NIfTI-1 file")
    refused(changed(280, np.full(12, np.nan, "<f4")), "no usable geometry")
    refused(changed(280, np.zeros(12, "<f4")), "no usable geometry")
    refused(changed(108, np.array([1e30], "<f4")), "the voxels begin")
    (tmp_path / "a.nii.gz").unlink()
    with pytest.raises(CaseError, match="cannot be read"):
        read_volume(Source(tmp_path / "a.nii.gz"), LIMIT)


def test_crop_keeps_positions(tmp_path):
    affine = np.array([[0, -0.7, 0.1, 5], [0.7, 0, 0, -3], [0, 0.2, 2.5, 9], [0, 0, 0, 1.0]])
    array = np.arange(6 * 7 * 8, dtype=np.int16).reshape(6, 7, 8)
    image = nibabel.Nifti1Image(array, affine)
    nibabel.save(image, tmp_path / "a.nii.gz")
    volume = read_volume(Source(tmp_path / "a.nii.gz"), LIMIT)
    part = cropped(volume, (1, 2, 3), (4, 3, 2))
    assert np.array_equal(part.array, array[1:5, 2:5, 3:5])
    assert np.allclose(part.affine @ [0, 0, 0, 1], affine @ [1, 2, 3, 1], atol=1e-5)


def test_split_archives_are_explained(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK")
    (tmp_path / "images.z01").write_bytes(b"PK")
    with pytest.raises(CaseError, match=r"7z x images\.zip"):
        zip_members(tmp_path / "images.zip")
