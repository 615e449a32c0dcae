"""KiTS23, the Kidney and Kidney Tumor Segmentation Challenge 2023: 489 contrast-enhanced CT.

Paper: Heller et al., arXiv 2307.01984. Source: https://github.com/neheller/kits23. Data licence CC BY-NC-SA 4.0.

Files are checked and copied as they are; ``dataset.json`` says the same as that of nnU-Net's own converter
(``nnunetv2/dataset_conversion/Dataset220_KiTS2023.py``), so that plans and models can be exchanged.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from nnunetv2_smallseg.datasets.archives import Source
from nnunetv2_smallseg.datasets.cases import Case, Converted, Plan, Problem
from nnunetv2_smallseg.datasets.splits import Splits, kits_fold, patient_folds
from nnunetv2_smallseg.datasets.trees import existing_folder, folders_below
from nnunetv2_smallseg.datasets.volumes import GIBIBYTE, read_volume
from nnunetv2_smallseg.errors import CaseError, DatasetError

__all__ = ["kits23_folds", "plan", "read_case"]

# 1,059 slices of 512 x 512 voxels of 8 bytes are 2.1 GiB.
MAX_VOLUME_BYTES = 4 * GIBIBYTE
REGIONS = {"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumor": 2}
PLAIN_LABELS = {"background": 0, "kidney": 1, "tumor": 2, "cyst": 3}


def plan(source: str | Path, plain_labels: bool = False) -> Plan:
    """Lists the cases of KiTS23.

    Args:
        source: Folder that holds ``case_00000`` and so on, or one above it.
        plain_labels: Kidney, tumour and cyst as labels of their own; by default the evaluated regions.
    Raises:
        UsageError: If ``source`` is no folder.
        DatasetError: If it holds no case, or none with an image.
    """
    root = existing_folder(source, "KiTS23 (kits23/dataset)")
    cases: list[Case] = []
    skipped: list[Problem] = []
    failed: list[Problem] = []
    seen: dict[str, Path] = {}
    for folder in folders_below(root, not_into=("instances",)):
        if not re.fullmatch(r"case_\d{5}", folder.name):
            continue
        name = folder.name
        if name in seen:
            failed.append(Problem(name, "KiTS23", f"it is there twice: {seen[name]} and {folder}"))
            continue
        seen[name] = folder
        image, label = folder / "imaging.nii.gz", folder / "segmentation.nii.gz"
        if not image.is_file():
            partly = " (a download was interrupted)" if any(folder.glob(".partial*")) else ""
            failed.append(Problem(name, "KiTS23", f"no imaging.nii.gz{partly}: run kits23_download_data"))
        elif not label.is_file():
            skipped.append(Problem(name, "KiTS23", "image without segmentation.nii.gz"))
        else:
            cases.append(
                Case(
                    identifier=name,
                    read=partial(read_case, Source(image), Source(label)),
                    patient=f"KiTS {name}",
                    subset="KiTS23",
                    sources=(str(image), str(label)),
                )
            )
    if not seen:
        raise DatasetError(f"no folder case_XXXXX below {root}: clone https://github.com/neheller/kits23")
    if not cases:
        raise DatasetError(
            f"none of the {len(seen)} cases below {root} has both imaging.nii.gz and segmentation.nii.gz: the "
            "repository holds labels only; run kits23_download_data to fetch the images"
        )
    return Plan(
        cases=cases,
        labels=PLAIN_LABELS if plain_labels else REGIONS,
        channel_names={"0": "CT"},
        file_ending=".nii.gz",
        lesion_values=(2, 3),
        label_values=(0, 1, 2, 3),
        skipped=skipped,
        failed=failed,
        # Kidney first, then masses as 3, then tumour as 2: later ones are written over earlier ones.
        regions_class_order=None if plain_labels else (1, 3, 2),
        reader="NibabelIOWithReorient",
        folds=kits23_folds,
        description={"description": "KiTS2023"},
    )


def kits23_folds(records: list[dict]) -> Splits | None:
    """Five folds by case number: the same for every patient in KiTS23 and in ULS23's kits21."""
    return patient_folds(records, lambda patient: kits_fold(int(patient.rsplit("_", 1)[1])))


def read_case(image: Source, label: Source) -> Converted:
    """Reads a case.

    Raises:
        CaseError: If a file is damaged, or the image is no CT.
    """
    volume = read_volume(image, MAX_VOLUME_BYTES)
    reference = read_volume(label, MAX_VOLUME_BYTES)
    if volume.array.min() >= 0:
        raise CaseError(f"{image} has no value below 0: it is no CT in Hounsfield units")
    notes = []
    if volume.orientation != "IPL":
        notes.append(f"axes point to {volume.orientation}; all published cases say IPL. nnU-Net's reader turns them")
    return Converted((volume,), reference, notes=tuple(notes))
