"""The folder of the data set that is written, and the names of the files in it."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from nnunetv2_smallseg.errors import DatasetError, UsageError

__all__ = [
    "JOURNAL",
    "PARTS",
    "REPORT",
    "SPLITS",
    "TABLE",
    "check_folder",
    "dataset_folder",
    "file_of_report",
    "file_sha256",
    "raw_folder",
]

REPORT = "conversion_report.json"
JOURNAL = ".conversion_journal.jsonl"
TABLE = "cases.json"
SPLITS = "splits_final.json"
PARTS = ("imagesTr", "labelsTr", "imagesTs", "labelsTs")


def raw_folder() -> Path:
    """The folder in ``nnUNet_raw``; ``DatasetError`` if the variable is not set."""
    value = os.environ.get("nnUNet_raw")
    if not value:
        raise DatasetError(
            "the environment variable nnUNet_raw is not set. Set it to the folder that holds, or shall hold, "
            "nnU-Net's raw data sets: export nnUNet_raw=/path/to/nnUNet_raw"
        )
    return Path(os.path.abspath(value))


def dataset_folder(number: int, name: str) -> Path:
    """The folder of a data set in ``nnUNet_raw``.

    Raises:
        UsageError: If the number or name is not nnU-Net's, or another data set has this number.
        DatasetError: If ``nnUNet_raw`` is not set.
    """
    if not 1 <= number <= 999:
        raise UsageError(f"-d {number}: nnU-Net's numbers of data sets go from 1 to 999")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}", name):
        raise UsageError(f"-name {name!r}: use letters, digits, '-' and '_', such as BreastUltrasound")
    raw = raw_folder()
    folder = raw / f"Dataset{number:03d}_{name}"
    others = sorted(other.name for other in raw.glob(f"Dataset{number:03d}_*") if other.name != folder.name)
    if others:
        raise UsageError(f"-d {number} is taken by {others[0]} in {raw}: choose another number")
    return folder


def check_folder(folder: Path) -> None:
    """Stops before anything is written if the folder is not ours to write."""
    for part in (folder, *(folder / name for name in PARTS)):
        if part.is_symlink():
            raise UsageError(f"{part} is a link: nothing is written through links. Remove it.")
    ours = (folder / REPORT).is_file() or (folder / JOURNAL).is_file()
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder} exists and was not written by smallseg convert: choose another number, or move it away"
        )


def file_of_report(folder: Path, name: str) -> Path:
    """A file of a data set that a report names.

    Raises:
        DatasetError: If the name leads elsewhere.
    """
    if not re.fullmatch(r"(images|labels)T[rs]/[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        raise DatasetError(f"{folder / REPORT} names a file {name!r}, which no converter writes: it was changed")
    return folder / name


def file_sha256(path: Path) -> str:
    """Checksum of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
