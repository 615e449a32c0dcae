"""ULS23, the Universal Lesion Segmentation Challenge 2023: crops of CT around one lesion each.

Paper: de Grauw et al., Medical Image Analysis 102 (2025) 103525, arXiv 2406.05231. Images: six records on Zenodo;
labels and split: https://github.com/DIAGNijmegen/ULS23. Data licence CC BY-NC-SA 4.0.

Images and labels are looked up by base name below folders named like the subsets, because the archives do not nest
their files alike. Volumes are stored as float32 with a fourth axis of length 1, which nnU-Net's nibabel readers refuse;
they are written with three axes, as int16 where that is exact.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from nnunetv2_smallseg.datasets.archives import Source, only_member, split_archive_message, zip_members
from nnunetv2_smallseg.datasets.cases import Case, Converted, Plan, Problem, case_identifier
from nnunetv2_smallseg.datasets.labels import label_counts
from nnunetv2_smallseg.datasets.splits import Splits, kits_fold, patient_folds
from nnunetv2_smallseg.datasets.trees import existing_folder, folders_below, visible_files
from nnunetv2_smallseg.datasets.uls23_history import CORRECTED, WITHDRAWN
from nnunetv2_smallseg.datasets.volumes import Volume, cropped, read_volume
from nnunetv2_smallseg.errors import CaseError, DatasetError, UsageError

__all__ = ["SUBSETS", "Subset", "plan", "read_case", "uls23_folds"]

VOLUME_SHAPE = (256, 256, 128)
# Such a volume of 4-byte voxels takes 32 MiB; nothing in the data set is larger.
MAX_VOLUME_BYTES = 1 << 28
IGNORE_LABEL = 2
SPLIT_FILE = "train_test_split.json"
LABEL_FOLDERS = ("labels", "labels_grabcut")
UNPACKING = (
    "Put all pieces of a part (.zip, .z01, ...) into one folder and run 7z x on the .zip; "
    "clone https://github.com/DIAGNijmegen/ULS23 for the labels."
)


@dataclass(frozen=True)
class Subset:
    """A part of ULS23.

    Attributes:
        group: ``full``, ``novel``, or ``weak``: one marked slice a volume.
        pattern: Names of its files; the group is what names the patient.
        patient_prefix: Put before the patient, so that the same patient has the same name in every subset and no two
            patients share one.
    """

    group: str
    pattern: str
    patient_prefix: str = ""


SUBSETS: dict[str, Subset] = {
    "ULS23_DeepLesion3D": Subset("novel", r"(\d{6})_\d\d_\d\d_\d+_lesion_\d+", "DeepLesion "),
    "ULS23_Radboudumc_Bone": Subset("novel", r"(bone_\d+)_lesion_\d+"),
    "ULS23_Radboudumc_Pancreas": Subset("novel", r"(diag_pancreas_\d+)_lesion_\d+"),
    "LIDC-IDRI": Subset("full", r"(lidcidri_\d+)_lesion_\d+_sample_\d+"),
    "LiTS": Subset("full", r"(liver_\d+)_lesion_\d+_sample_\d+"),
    "MDSC_Task06_Lung": Subset("full", r"(lung_\d+)_lesion_\d+_sample_\d+"),
    "MDSC_Task07_Pancreas": Subset("full", r"(pancreas_\d+)_lesion_\d+_sample_\d+"),
    "MDSC_Task10_Colon": Subset("full", r"(colon_\d+)_lesion_\d+_sample_\d+"),
    "NIH_LN_ABD": Subset("full", r"(ABD_LYMPH_\d+)_lesion_\d+_sample_\d+"),
    "NIH_LN_MED": Subset("full", r"(MED_LYMPH_\d+)_lesion_\d+_sample_\d+"),
    "kits21": Subset("full", r"kidney21_(case_\d+)_lesion_\d+_sample_\d+", "KiTS "),
    # Patients of CCC18 are not in its names; every volume counts as one.
    "CCC18": Subset("weak", r"(ccc18_\d+)_sample_\d+"),
    "DeepLesion": Subset("weak", r"(\d{6})_\d\d_\d\d_\d+_sample_\d+", "DeepLesion "),
}


@dataclass
class Listing:
    """Files of a subset by base name, as found on the disk."""

    images: dict[str, list[Source]] = field(default_factory=lambda: defaultdict(list))
    labels: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    problems: list[Problem] = field(default_factory=list)


def plan(
    source: str | Path,
    labels: str | Path | None = None,
    subsets: Sequence[str] | None = None,
    weak: bool = False,
    crop: Sequence[int] | None = None,
) -> Plan:
    """Lists the cases of ULS23.

    Args:
        source: Folder that holds the unpacked parts, anywhere below it.
        labels: Folder that holds the label repository; None when it is below ``source``.
        subsets: Names of subsets or the groups ``full``, ``novel``, ``weak``; None for all of full and novel that are
            there.
        weak: Add the weakly labelled subsets, for training only; all slices but the marked one get the ignore label.
        crop: Voxels (x, y, z) around the centre, where the lesion is; None for the whole 256 x 256 x 128.
    Raises:
        UsageError: If a folder or subset does not exist, or ``crop`` is impossible.
        DatasetError: If nothing of ULS23, or no official split, is there.
    """
    if crop is not None and any(not 1 <= size <= whole for size, whole in zip(crop, VOLUME_SHAPE, strict=True)):
        raise UsageError(f"--crop {' '.join(map(str, crop))}: volumes have {' x '.join(map(str, VOLUME_SHAPE))} voxels")
    roots = [existing_folder(source, "ULS23")]
    if labels is not None:
        repository = existing_folder(labels, "the label repository of ULS23")
        if not repository.is_relative_to(roots[0]):  # then it is found anyway
            roots.append(repository)
    chosen = _chosen_subsets(subsets, weak)
    listings = _list_files(roots)
    _check_downloads(roots, listings, chosen, asked=subsets is not None)
    test_names = _official_test_names(roots)
    deeplesion = re.compile(SUBSETS["ULS23_DeepLesion3D"].pattern)
    test_patients = {f"DeepLesion {match[1]}" for match in map(deeplesion.fullmatch, test_names) if match}
    cases: list[Case] = []
    skipped: list[Problem] = []
    failed: list[Problem] = []
    kept_out = []
    for name in chosen:
        listing = listings[name]
        failed += listing.problems
        if not listing.images:
            skipped += [Problem(name, name, f"not downloaded: {len(listing.labels)} labels, no image")]
            continue
        for base in sorted({*listing.images, *listing.labels}):
            found = _case(name, base, listing, test_names, tuple(crop) if crop else None)
            if isinstance(found, Case):
                if found.train_only and found.patient in test_patients:
                    kept_out.append(base)
                    skipped.append(Problem(base, name, "its patient is in the official test split (DeepLesion3D)"))
                else:
                    cases.append(found)
            else:
                (skipped if found[0] else failed).append(Problem(base, name, found[1]))
    uses_weak = any(SUBSETS[name].group == "weak" for name in chosen)
    kits = sorted({case.patient for case in cases if case.patient.startswith("KiTS ")})
    return Plan(
        cases=cases,
        labels={"background": 0, "lesion": 1, **({"ignore": IGNORE_LABEL} if uses_weak else {})},
        channel_names={"0": "CT"},
        file_ending=".nii.gz",
        lesion_values=(1,),
        skipped=skipped,
        failed=failed,
        folds=uls23_folds,
        report={
            "leaks": {
                "weak_volumes_of_test_patients_left_out": kept_out,
                "weak_patients_also_in_DeepLesion3D": sorted(_shared_deeplesion_patients(cases)),
                "patients_also_in_KiTS23": kits,
                "test_patients_also_in_KiTS23": sorted(
                    {case.patient for case in cases if case.test and case.patient.startswith("KiTS ")}
                ),
            }
        },
        notes=[
            f"{len(kits)} patients are in KiTS23 too: its converter puts them into the same folds; do not train on "
            "KiTS23 cases that are in imagesTs here"
        ]
        if kits
        else [],
    )


def _chosen_subsets(subsets: Sequence[str] | None, weak: bool) -> list[str]:
    wanted = list(subsets) if subsets is not None else ["full", "novel"]
    if weak:
        wanted.append("weak")
    groups = {subset.group for subset in SUBSETS.values()}
    unknown = [name for name in wanted if name not in SUBSETS and name not in groups]
    if unknown:
        raise UsageError(
            f"unknown subsets {', '.join(unknown)}: use {', '.join(SUBSETS)}, or the groups {', '.join(sorted(groups))}"
        )
    return [name for name, subset in SUBSETS.items() if name in wanted or subset.group in wanted]


def _list_files(roots: Iterable[Path]) -> dict[str, Listing]:
    """Images and labels of all subsets, by base name."""
    listings = {name: Listing() for name in SUBSETS}
    for root in roots:
        for folder in folders_below(root, not_into=("categories", ".git")):
            parts = (root.name, *folder.relative_to(root).parts)
            place = max((number for number, part in enumerate(parts) if part in SUBSETS), default=None)
            if place is None:
                continue
            subset = parts[place]
            listing = listings[subset]
            if not set(LABEL_FOLDERS).isdisjoint(parts[place:]):
                for path in visible_files(folder, ".nii.gz", ".nii.gz.zip"):
                    listing.labels[_base_name(path.name)].append(path)
            else:
                for path in visible_files(folder, ".nii.gz"):
                    listing.images[_base_name(path.name)].append(Source(path))
                for path in visible_files(folder, ".zip"):
                    if path.name != "categories.zip":
                        _list_archive(path, subset, listing)
    return listings


def _list_archive(path: Path, subset: str, listing: Listing) -> None:
    try:
        members, refused = zip_members(path)
    except CaseError as error:
        listing.problems.append(Problem(path.name, subset, str(error)))
        return
    for name, reason in refused:
        listing.problems.append(Problem(f"{path.name}[{name}]", subset, f"refused: {reason}"))
    for member in members:
        name = PurePosixPath(member.filename.replace("\\", "/")).name
        if name.endswith(".nii.gz") and not name.startswith("."):
            listing.images[_base_name(name)].append(Source(path, member.filename))


def _base_name(name: str) -> str:
    return name.removesuffix(".zip").removesuffix(".nii.gz")


def _check_downloads(roots: list[Path], listings: dict[str, Listing], chosen: list[str], asked: bool) -> None:
    """Stops before anything is written when nothing, or not what was asked for, is there."""
    where = " and ".join(str(root) for root in roots)
    pieces = [path for root in roots for path in visible_files(root, ".zip") if split_archive_message(path)]
    if not any(listings[name].images or listings[name].problems for name in chosen):
        if pieces:
            raise DatasetError(split_archive_message(pieces[0]))
        raise DatasetError(f"no images of {', '.join(chosen)} in {where}. {UNPACKING}")
    if not any(listings[name].labels for name in chosen):
        raise DatasetError(f"no labels of ULS23 in {where}. {UNPACKING}")
    missing = [name for name in chosen if not listings[name].images and not listings[name].problems]
    if asked and missing:
        raise DatasetError(f"no images of {', '.join(missing)} in {where}. {UNPACKING}")


def _official_test_names(roots: list[Path]) -> set[str]:
    for root in roots:
        for folder in folders_below(root, not_into=("images", *LABEL_FOLDERS, "categories")):
            path = folder / SPLIT_FILE
            if path.is_file():
                try:
                    return set(json.loads(path.read_text(encoding="utf-8"))["test"])
                except (ValueError, KeyError, TypeError) as error:
                    raise DatasetError(f"{path} is not the official split of ULS23: {error}") from error
    raise DatasetError(
        f"the official split is missing: {SPLIT_FILE} (folder baseline_model of the label repository) is not in "
        f"{' or '.join(map(str, roots))}. Without it test cases would be trained on."
    )


def _case(
    subset: str, base: str, listing: Listing, test_names: set[str], crop: tuple[int, ...] | None
) -> Case | tuple[bool, str]:
    """The case called ``base``, or (whether that is normal, why there is none)."""
    weak = SUBSETS[subset].group == "weak"
    match = re.fullmatch(SUBSETS[subset].pattern, base)
    if match is None:
        return False, f"its name is not one of {subset} ({SUBSETS[subset].pattern})"
    if base in WITHDRAWN:
        return True, "the organisers withdrew its label on 2024-02-20"
    if base not in listing.labels:
        return True, "image without label"
    if base not in listing.images:
        return False, "label without image: unpack the archive again"
    images = listing.images[base]
    plain = [image for image in images if image.member is None] or images
    if len(plain) > 1:
        return False, f"its image is there more than once: {', '.join(map(str, plain))}"
    # Merged into the image tree and in the clone beside it, a label may be there twice: the clone is the newer.
    label = max(listing.labels[base], key=lambda path: path.suffix == ".zip")
    return Case(
        identifier=case_identifier(base),
        read=partial(read_case, plain[0], label, crop, weak),
        patient=SUBSETS[subset].patient_prefix + match[1],
        subset=subset,
        sources=(str(plain[0]), str(label)),
        test=re.sub(r"_sample_\d+$", "", base) in test_names and not weak,
        train_only=weak,
    )


def _shared_deeplesion_patients(cases: list[Case]) -> set[str]:
    weak = {case.patient for case in cases if case.subset == "DeepLesion"}
    return weak & {case.patient for case in cases if case.subset == "ULS23_DeepLesion3D"}


def uls23_folds(records: list[dict]) -> Splits | None:
    """Patient-wise folds; patients of KiTS are in the same fold as in a converted KiTS23."""

    def fixed(patient: str) -> int | None:
        return kits_fold(int(patient.rsplit("_", 1)[1])) if patient.startswith("KiTS ") else None

    return patient_folds(records, fixed)


def read_case(image: Source, label: Path, crop: tuple[int, ...] | None, weak: bool) -> Converted:
    """Reads a case.

    Args:
        image: CT, float32 with a trailing axis of length 1.
        label: Its label, plain or zipped on its own.
        crop: Voxels around the centre, or None.
        weak: The label marks one slice; the others become ``IGNORE_LABEL``.
    Raises:
        CaseError: If a file is damaged or not what it should be.
    """
    volume = read_volume(image, MAX_VOLUME_BYTES)
    label_source = only_member(label, ".nii.gz") if label.suffix == ".zip" else Source(label)
    reference = read_volume(label_source, MAX_VOLUME_BYTES)
    notes = []
    if label.name.startswith(tuple(CORRECTED)) and int(reference.header["dim"][0]) == 4:
        notes.append("this label was redrawn on 2024-02-20 and is the old one here: update the label repository")
    if volume.array.dtype.itemsize == 1:
        raise CaseError(f"{image} holds 8-bit grey values: it is no CT in Hounsfield units")
    if volume.array.min() >= 0:  # a crop may lie inside bone
        notes.append("no value of the image is below 0: is it a CT in Hounsfield units?")
    volume = volume.with_array(_as_int16_where_exact(volume.array))
    _, values = label_counts(reference.array, (0, 1))
    marked = np.flatnonzero(values.any(axis=(0, 1)))
    details = {}
    if weak:
        if not len(marked):
            raise CaseError(f"{label} marks no slice")
        if len(marked) > 1:
            notes.append(f"{len(marked)} slices are marked, not one")
        ignored = np.full_like(values, IGNORE_LABEL)
        ignored[:, :, marked] = values[:, :, marked]
        values = ignored
        details["marked_slices"] = marked.tolist()
    reference = reference.with_array(values)
    if crop is not None:
        before = int((values == 1).sum())
        volume, reference = _cropped_at_centre(volume, crop), _cropped_at_centre(reference, crop)
        lost = before - int((reference.array == 1).sum())
        if lost:
            notes.append(f"{lost} of {before} lesion voxels are outside of the crop")
    return Converted((volume,), reference, notes=tuple(notes), details=details)


def _as_int16_where_exact(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind in "iu" and array.dtype.itemsize <= 2:
        return array
    with np.errstate(invalid="ignore"):  # NaN is refused later, with every other volume's
        integers = array.astype(np.int16, order="K")
    return integers if np.array_equal(integers, array) else array


def _cropped_at_centre(volume: Volume, size: tuple[int, ...]) -> Volume:
    """The middle of a volume; index ``shape // 2``, where the lesion is, stays at ``size // 2``."""
    if len(size) != 3 or any(not 1 <= length <= whole for length, whole in zip(size, volume.shape, strict=True)):
        raise CaseError(f"a crop of {size} voxels does not fit a volume of {volume.shape}")
    return cropped(
        volume, tuple(whole // 2 - length // 2 for length, whole in zip(size, volume.shape, strict=True)), size
    )
