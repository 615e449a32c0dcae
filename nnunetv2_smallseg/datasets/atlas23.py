"""ATLAS, the liver MRI data set of 2023 (not the stroke data set of the same name).

Paper: Quinton et al., Data 2023, 8(5), 79, doi 10.3390/data8050079. Source:
https://atlas-challenge.u-bourgogne.fr/dataset. Licence CC BY-NC-SA 4.0.

Image ``im7`` belongs to label ``lb7``; numbers have gaps and no leading zeros, so that files sorted as text do not
pair. The two labels are disjoint, and the challenge evaluates the whole liver: it is the region [1, 2].
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

from nnunetv2_smallseg.datasets.archives import Source
from nnunetv2_smallseg.datasets.cases import Case, Converted, Plan, Problem
from nnunetv2_smallseg.datasets.trees import existing_folder, folders_below, visible_files
from nnunetv2_smallseg.datasets.volumes import GIBIBYTE, read_volume
from nnunetv2_smallseg.errors import CaseError, DatasetError

__all__ = ["plan", "read_case"]

MAX_VOLUME_BYTES = GIBIBYTE
REGIONS = {"background": 0, "liver": [1, 2], "tumour": 2}
PLAIN_LABELS = {"background": 0, "liver": 1, "tumour": 2}
# Below any T1-weighted intensity, above the air of a CT.
LOWEST_MRI_VALUE = -500
PATIENT_FILE = "patient_info_train.json"


def plan(source: str | Path, plain_labels: bool = False) -> Plan:
    """Lists the cases of ATLAS.

    Args:
        source: Folder that holds ``train/imagesTr`` and ``train/labelsTr``, anywhere below it.
        plain_labels: Liver without tumour and tumour as labels; by default the evaluated regions.
    Raises:
        UsageError: If ``source`` is no folder.
        DatasetError: If it does not hold the data set, or holds it twice.
    """
    root = existing_folder(source, "ATLAS (atlas-train-dataset-1.0.1)")
    trees = [folder for folder in folders_below(root) if _holds_atlas(folder)]
    if len(trees) != 1:
        raise DatasetError(_wrong_folder_message(root, trees))
    images = _numbered(trees[0] / "imagesTr", "im")
    labels = _numbered(trees[0] / "labelsTr", "lb")
    patients, notes = _patient_table(trees[0] / PATIENT_FILE)
    cases: list[Case] = []
    skipped: list[Problem] = []
    failed: list[Problem] = []
    for number in sorted({*images, *labels}):
        name = f"atlas_{number:03d}"
        if number not in labels:
            skipped.append(Problem(name, "ATLAS", f"image without label: {images[number].name}"))
        elif number not in images:
            failed.append(Problem(name, "ATLAS", f"label without image: {labels[number].name}"))
        else:
            details = patients.get(number, {})
            cases.append(
                Case(
                    identifier=name,
                    read=partial(read_case, Source(images[number]), Source(labels[number])),
                    patient=name,
                    subset="ATLAS",
                    sources=(str(images[number]), str(labels[number])),
                    stratum=details.get("contrast_phase", "unknown"),
                    details=details,
                )
            )
    return Plan(
        cases=cases,
        labels=PLAIN_LABELS if plain_labels else REGIONS,
        channel_names={"0": "MRI"},
        file_ending=".nii.gz",
        lesion_values=(2,),
        label_values=(0, 1, 2),
        skipped=skipped,
        failed=failed,
        regions_class_order=None if plain_labels else (1, 2),
        notes=notes,
    )


def _numbered(folder: Path, prefix: str) -> dict[int, Path]:
    found = {}
    for path in visible_files(folder, ".nii.gz"):
        match = re.fullmatch(rf"{prefix}(\d+)\.nii\.gz", path.name)
        if match:
            found[int(match[1])] = path
    return found


def _holds_atlas(folder: Path) -> bool:
    parts = folder / "imagesTr", folder / "labelsTr"
    return all(part.is_dir() for part in parts) and bool(_numbered(parts[0], "im") or _numbered(parts[1], "lb"))


def _wrong_folder_message(root: Path, trees: list[Path]) -> str:
    if trees:
        return f"ATLAS is there {len(trees)} times: {', '.join(map(str, trees))}. Name one of them."
    for folder in folders_below(root):
        if re.match(r"sub-r\d", folder.name) or any(path.name.startswith("sub-r") for path in folder.glob("sub-r*")):
            return (
                f"{root} holds the stroke data set ATLAS (files sub-r...), which is another one. This converter reads "
                "the liver MRI of https://atlas-challenge.u-bourgogne.fr"
            )
    return f"no imagesTr/im0.nii.gz ... and labelsTr/lb0.nii.gz ... below {root}: unpack atlas-train-dataset-1.0.1.zip"


def _patient_table(path: Path) -> tuple[dict[int, dict], list[str]]:
    """Columns of ``patient_info_train.json`` by patient number, and messages."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = {int(re.sub(r"^im", "", key)): dict(row) for key, row in content.items()}
    except FileNotFoundError:
        return {}, [f"{path} is missing: contrast phases are unknown, and folds do not balance them"]
    except (ValueError, AttributeError, TypeError) as error:
        return {}, [f"{path} cannot be read ({error}): contrast phases are unknown, and folds do not balance them"]
    for row in rows.values():
        phase = str(row.get("contrast_phase", "unknown"))
        row["contrast_phase"] = "unknown" if phase == "unkown" else phase  # so spelled in the file
    return rows, []


def read_case(image: Source, label: Source) -> Converted:
    """Reads a case.

    Raises:
        CaseError: If a file is damaged, or the image is no MRI.
    """
    volume = read_volume(image, MAX_VOLUME_BYTES)
    reference = read_volume(label, MAX_VOLUME_BYTES)
    if volume.array.min() < LOWEST_MRI_VALUE:
        raise CaseError(f"{image} holds values down to {volume.array.min():g}: that is a CT, not an MRI")
    return Converted((volume,), reference)
