"""Reads a converted data set again, completely, and compares it with its report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nnunetv2_smallseg.datasets.archives import Source
from nnunetv2_smallseg.datasets.labels import label_counts
from nnunetv2_smallseg.datasets.pictures import read_picture
from nnunetv2_smallseg.datasets.splits import patients_on_both_sides
from nnunetv2_smallseg.datasets.target import JOURNAL, REPORT, SPLITS, file_of_report, file_sha256, raw_folder
from nnunetv2_smallseg.datasets.volumes import GIBIBYTE, Volume, read_volume, same_geometry
from nnunetv2_smallseg.errors import DatasetError, UsageError

__all__ = ["check_dataset", "differences"]

MAX_VOLUME_BYTES = 8 * GIBIBYTE


def check_dataset(number: int) -> tuple[Path, dict]:
    """Folder and report of the converted data set with this number.

    Raises:
        UsageError: If there is none, or it has no report.
        DatasetError: If the report cannot be read, or ``nnUNet_raw`` is not set.
    """
    raw = raw_folder()
    folders = sorted(raw.glob(f"Dataset{number:03d}_*"))
    if not folders:
        raise UsageError(f"--check {number}: no data set with this number in {raw}")
    path = folders[0] / REPORT
    if not path.is_file() or (folders[0] / JOURNAL).is_file():
        raise UsageError(
            f"--check {number}: {folders[0]} is no finished conversion: it was written by something "
            "else, or was interrupted; then start it again with the same command"
        )
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(report["cases"], dict):
            raise ValueError("its cases are no object")
        return folders[0], report
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{path} was changed and cannot be read ({error!r}): bring it back, or convert again with --overwrite"
        ) from error


def differences(folder: Path, report: dict) -> Iterator[str | None]:
    """One item a case, then one for the data set: None where all is as reported, or what is not."""
    for name, record in report["cases"].items():
        try:
            problems = list(_case_differences(folder, record))
        except DatasetError as error:
            problems = [str(error)]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            problems = [f"its entry in {REPORT} was changed ({error!r})"]
        yield f"{name}: {'; '.join(problems)}" if problems else None
    problems = list(_dataset_differences(folder, report))
    yield "; ".join(problems) if problems else None


def _case_differences(folder: Path, record: dict) -> Iterator[str]:
    for name, facts in record["files"].items():
        path = file_of_report(folder, name)
        if not path.is_file():
            yield f"{name} is missing"
            return
        if file_sha256(path) != facts["sha256"]:
            yield f"{name} is not the file that was written"
    names = list(record["files"])
    images = [_read(folder / name) for name in names if name.startswith("images")]
    [label_name] = [name for name in names if name.startswith("labels")]
    label = _read(folder / label_name)
    if list(label.array.shape) != record["shape"]:
        yield f"the label has the shape {list(label.array.shape)}, reported {record['shape']}"
    for image in images:
        if image.array.shape[: label.array.ndim] != label.array.shape:
            yield f"image and label differ in shape: {image.array.shape} and {label.array.shape}"
        elif isinstance(image, Volume) and not same_geometry(image, label):
            yield "image and label differ in geometry"
        elif image.array.dtype.kind == "f" and not np.isfinite([image.array.min(), image.array.max()]).all():
            yield "the image holds NaN or infinite values"
    expected = {int(value): count for value, count in record["label_voxels"].items()}
    counts, _ = label_counts(label.array, expected)
    if counts != expected:
        yield f"the label holds {counts} voxels of each value, reported {expected}"


def _read(path: Path):
    if path.name.endswith(".nii.gz"):
        return read_volume(Source(path), MAX_VOLUME_BYTES)
    return read_picture(Source(path))


def _dataset_differences(folder: Path, report: dict) -> Iterator[str]:
    if not report["cases"]:
        yield "no case was converted"
        return
    written = {name for record in report["cases"].values() for name in record["files"]}
    present = {
        f"{part}/{path.name}"
        for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs")
        for path in (folder / part).glob("*")
    }
    for name in sorted(present - written):
        yield f"{name} is not in the report"
    try:
        description = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        counted, reported = description["numTraining"], report["training_cases"]
        if counted != reported:
            yield f"dataset.json counts {counted} training cases, reported {reported}"
    except (OSError, ValueError, KeyError) as error:
        yield f"dataset.json cannot be read: {error}"
    training = {name: record["patient"] for name, record in report["cases"].items() if not record["test"]}
    if (folder / SPLITS).is_file():
        try:
            splits = json.loads((folder / SPLITS).read_text(encoding="utf-8"))
            unknown = sorted({case for split in splits for side in split.values() for case in side} - set(training))
        except (ValueError, TypeError, AttributeError) as error:
            yield f"{SPLITS} cannot be read: {error}"
            return
        if unknown:
            yield f"{SPLITS} names cases that are not there: {', '.join(unknown[:5])}"
        else:
            shared = patients_on_both_sides(splits, training)
            if shared and shared != report["patients_on_both_sides_of_a_fold"]:
                yield f"{SPLITS} has patients on both sides of a fold: {', '.join(shared[:5])}"
