"""Folds for cross-validation in which no patient is on both sides.

All rules depend on names and sizes only, never on a random generator: converting again, on any machine, gives the same
folds.
"""

from __future__ import annotations

import hashlib
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence

__all__ = ["NUM_FOLDS", "grouped_folds", "kits_fold", "patient_folds", "patients_on_both_sides"]

NUM_FOLDS = 5

Splits = list[dict[str, list[str]]]


def _shuffle_key(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def kits_fold(case_number: int) -> int:
    """Fold of a KiTS patient: the same in every data set that holds this patient, whichever cases are present.

    Five consecutive case numbers are in five different folds, in an order of their own.
    """
    block, position = divmod(case_number, NUM_FOLDS)
    order = sorted(range(NUM_FOLDS), key=lambda fold: _shuffle_key(f"KiTS {block} {fold}"))
    return order[position]


def patient_folds(records: Sequence[dict], fixed: Callable[[str], int | None] = lambda patient: None) -> Splits | None:
    """Five folds over patients, alike in strata and, within a stratum, in lesion size.

    Patients of a stratum are ordered by the median size of their cases' lesions and dealt out in groups of five,
    always to the folds that have the fewest cases so far.

    Args:
        records: Training cases with ``case``, ``group`` (patient), ``stratum``, ``lesion_mm3``, ``train_only``. Cases
            that are train-only are in no validation set, and not in the training set of the fold that validates on
            their patient.
        fixed: Fold of a patient whose fold is given; None for all others.
    Returns:
        nnU-Net's list of folds; fewer than five with fewer than five patients, None with fewer than two.
    """
    groups: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        if not record["train_only"]:
            groups[record["group"]].append(record)
    num_folds = min(NUM_FOLDS, len(groups))
    if num_folds < 2:
        return None
    fold_of: dict[str, int] = {}
    counts = [0] * num_folds
    strata: dict[str, list[str]] = defaultdict(list)
    for group, members in groups.items():
        fold = fixed(group)
        if fold is not None:
            fold_of[group] = fold % num_folds
            counts[fold_of[group]] += len(members)
        else:
            strata[min(member["stratum"] for member in members)].append(group)
    for stratum in sorted(strata):
        by_size = sorted(
            strata[stratum],
            key=lambda group: (statistics.median(sum(m["lesion_mm3"]) for m in groups[group]), _shuffle_key(group)),
        )
        for first in range(0, len(by_size), num_folds):
            dealt = sorted(by_size[first : first + num_folds], key=lambda group: -len(groups[group]))
            emptiest = sorted(range(num_folds), key=lambda fold: (counts[fold], _shuffle_key(f"{stratum}{fold}")))
            for group, fold in zip(dealt, emptiest, strict=False):
                fold_of[group] = fold
                counts[fold] += len(groups[group])
    return _folds(records, fold_of, num_folds)


def grouped_folds(records: Sequence[dict]) -> Splits | None:
    """One fold for each ``group``, such as the centre of an image; None with fewer than two of them."""
    groups = sorted({record["group"] for record in records})
    if len(groups) < 2:
        return None
    return _folds(records, {group: fold for fold, group in enumerate(groups)}, len(groups))


def _folds(records: Sequence[dict], fold_of: dict[str, int], num_folds: int) -> Splits:
    splits: Splits = [{"train": [], "val": []} for _ in range(num_folds)]
    for record in sorted(records, key=lambda record: record["case"]):
        own = fold_of.get(record["group"])
        for fold, split in enumerate(splits):
            if fold != own:
                split["train"].append(record["case"])
            elif not record["train_only"]:
                split["val"].append(record["case"])
    return [split for split in splits if split["val"]]


def patients_on_both_sides(splits: Splits, group_of: dict[str, str]) -> list[str]:
    """Patients of whom some fold has cases in training and in validation."""
    found = set()
    for split in splits:
        found |= {group_of[case] for case in split["train"]} & {group_of[case] for case in split["val"]}
    return sorted(found)
