"""The files about a whole data set: ``dataset.json``, folds, the table of cases and the report."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_smallseg import __version__
from nnunetv2_smallseg.datasets.cases import Plan, Problem
from nnunetv2_smallseg.datasets.splits import NUM_FOLDS, Splits, patients_on_both_sides
from nnunetv2_smallseg.datasets.target import REPORT, SPLITS, TABLE
from nnunetv2_smallseg.files import write_json

__all__ = ["Outcome", "write_summary"]


@dataclass(frozen=True)
class Outcome:
    """Result of a conversion.

    Attributes:
        folder: Folder of the data set.
        report: Content of ``conversion_report.json``.
        messages: What the user should know.
    """

    folder: Path
    report: dict
    messages: list[str]


def write_summary(plan: Plan, folder: Path, settings: dict, records: dict[str, dict], failed: list[Problem]) -> Outcome:
    """Writes the files about the whole data set."""
    messages = list(plan.notes)
    records = dict(sorted(records.items()))
    training = [record for record in records.values() if not record["test"]]
    duplicates = _duplicates(records)
    groups = _groups(records, duplicates)
    report = {
        "settings": settings,
        "version": __version__,
        "cases_in": len(plan.cases) + len(plan.skipped) + len(plan.failed),
        "cases_written": len(records),
        "training_cases": len(training),
        "test_cases": len(records) - len(training),
        "cases_skipped": len(plan.skipped),
        "cases_failed": len(failed),
        "subsets": _subset_counts(plan, records, failed),
        "label_voxels": _sum_counts(records),
        "skipped": [vars(problem) for problem in _sorted(plan.skipped)],
        "failed": [vars(problem) for problem in _sorted(failed)],
        "geometry_fixes": {name: record["fixes"] for name, record in records.items() if record["fixes"]},
        "notes": {name: record["notes"] for name, record in records.items() if record["notes"]},
        "duplicates": duplicates,
        **plan.report,
        "cases": records,
    }
    if duplicates:
        messages.append(f"{len(duplicates)} images are there more than once; see duplicates in {REPORT}")
    if not records:
        for name in ("dataset.json", SPLITS, TABLE):
            (folder / name).unlink(missing_ok=True)
        write_json(report, folder / REPORT)
        return Outcome(folder, report, messages)
    both = sorted({groups[r["case"]] for r in training} & {groups[n] for n, r in records.items() if r["test"]})
    report["patients_in_training_and_test"] = both
    if both:
        messages.append(f"{len(both)} patients are in training and test cases: {', '.join(both[:5])}")
    splits = plan.folds([{**record, "group": groups[record["case"]]} for record in training])
    if splits is None:
        (folder / SPLITS).unlink(missing_ok=True)
        messages.append("too few patients for a cross-validation: no splits_final.json; nnU-Net will make folds itself")
    else:
        shared = patients_on_both_sides(splits, groups)
        if shared:
            messages.append(f"{len(shared)} patients are in training and validation of a fold: {', '.join(shared[:5])}")
        report["patients_on_both_sides_of_a_fold"] = shared
        write_json(splits, folder / SPLITS)
        if len(splits) < NUM_FOLDS:
            numbers = "fold 0" if len(splits) == 1 else f"folds 0 to {len(splits) - 1}"
            messages.append(f"train {numbers} only: for higher numbers nnU-Net draws a split of its own")
        messages += _about_preprocessed_splits(folder, splits)
    write_json({name: _table_row(record) for name, record in records.items()}, folder / TABLE)
    write_json(_dataset_json(plan, folder, records, len(training)), folder / "dataset.json")
    write_json(report, folder / REPORT)
    return Outcome(folder, report, messages)


def _sorted(problems: Iterable[Problem]) -> list[Problem]:
    return sorted(problems, key=lambda problem: (problem.subset, problem.name, problem.reason))


def _duplicates(records: dict[str, dict]) -> list[list[str]]:
    same = defaultdict(list)
    for name, record in records.items():
        same[record["image_sha256"]].append(name)
    return [names for names in same.values() if len(names) > 1]


def _groups(records: dict[str, dict], duplicates: list[list[str]]) -> dict[str, str]:
    """Patient of each case, where patients who share an image are one."""
    parent: dict[str, str] = {}

    def root(patient: str) -> str:
        while parent.get(patient, patient) != patient:
            patient = parent[patient]
        return patient

    for names in duplicates:
        patients = sorted({root(records[name]["patient"]) for name in names})
        for patient in patients:
            parent[patient] = patients[0]
    return {name: root(record["patient"]) for name, record in records.items()}


def _subset_counts(plan: Plan, records: dict[str, dict], failed: list[Problem]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter] = defaultdict(Counter)
    for record in records.values():
        counts[record["subset"]]["test" if record["test"] else "training"] += 1
    for problem in plan.skipped:
        counts[problem.subset]["skipped"] += 1
    for problem in failed:
        counts[problem.subset]["failed"] += 1
    keys = ("training", "test", "skipped", "failed")
    return {subset: {key: counts[subset][key] for key in keys} for subset in sorted(counts)}


def _sum_counts(records: dict[str, dict]) -> dict[str, int]:
    total: Counter = Counter()
    for record in records.values():
        total.update(record["label_voxels"])
    return dict(sorted(total.items(), key=lambda item: int(item[0])))


def _table_row(record: dict) -> dict:
    row = {name: record[name] for name in ("patient", "subset", "test", "train_only", "spacing", "shape")}
    row["num_lesions"] = len(record["lesion_voxels"])
    row["lesion_voxels"] = record["lesion_voxels"]
    if "orientation" in record:  # only volumes have millimetres
        row["lesion_mm3"] = record["lesion_mm3"]
    return {**row, **record["details"]}


def _dataset_json(plan: Plan, folder: Path, records: dict[str, dict], num_training: int) -> dict:
    reader = plan.reader
    if reader is None and not all(record.get("orthonormal", True) for record in records.values()):
        reader = "NibabelIOWithReorient"  # SimpleITK, nnU-Net's first choice, refuses such geometry
    content = {
        "channel_names": dict(plan.channel_names),
        "labels": dict(plan.labels),
        "numTraining": num_training,
        "file_ending": plan.file_ending,
        "name": folder.name[len("Dataset000_") :],
        "converted_by": f"smallseg convert {__version__}",
        **plan.description,
    }
    if reader is not None:
        content["overwrite_image_reader_writer"] = reader
    if plan.regions_class_order is not None:
        content["regions_class_order"] = list(plan.regions_class_order)
    return content


def _about_preprocessed_splits(folder: Path, splits: Splits) -> list[str]:
    """Whether nnU-Net will use our folds: it copies them when it plans, unless it has others."""
    preprocessed = os.environ.get("nnUNet_preprocessed")
    if not preprocessed:
        return []
    existing = Path(preprocessed) / folder.name / SPLITS
    if not existing.is_file():
        return []
    with contextlib.suppress(ValueError):  # whatever else it holds, it is not ours
        if json.loads(existing.read_text(encoding="utf-8")) == splits:
            return []
    return [
        f"{existing} holds other folds, and planning will stop because of that. "
        f"If no training depends on it, replace it: cp {folder / SPLITS} {existing}"
    ]
