"""Which lesions of the reference were found, and which predicted ones are false.

Two rules. ``overlap`` judges every lesion by itself: a reference lesion is detected if at least the share t of its own
voxels is predicted, a predicted lesion is true if at least the share t of its own voxels is reference, one voxel at
least. A lesion split in two is therefore detected once without a false positive, and of two lesions merged by one
prediction both are detected. ``iou`` pairs lesions one to one, so that the sum of IoU is largest, and keeps pairs with
an IoU above t: here a split lesion leaves a false positive, a merged pair a miss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from nnunetv2_smallseg.errors import UsageError
from nnunetv2_smallseg.evaluation.components import Components

__all__ = ["CRITERIA", "Matches", "MatchingRule", "match", "one_to_one", "overlaps"]

CRITERIA = ("overlap", "iou")


@dataclass(frozen=True)
class MatchingRule:
    """How lesions are matched.

    Attributes:
        criterion: ``overlap`` or ``iou``.
        threshold: t, within [0, 1).

    Raises:
        UsageError: If there is no such criterion or the threshold lies outside.
    """

    criterion: str = "overlap"
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise UsageError(f"there is no matching rule {self.criterion!r}: use one of {', '.join(CRITERIA)}")
        if not 0 <= self.threshold < 1:
            raise UsageError(f"the threshold of the matching rule lies within [0, 1), not {self.threshold}")

    def __str__(self) -> str:
        if self.criterion == "iou":
            return f"one to one, IoU above {self.threshold:g}"
        share = f"at least {self.threshold:.0%} of it" if self.threshold else "at least one voxel of it"
        return f"a lesion counts as found if {share} overlaps the other map"


@dataclass(frozen=True)
class Matches:
    """Result of the matching.

    Attributes:
        detected: (num_reference,) whether each reference lesion was found.
        true: (num_predicted,) whether each predicted lesion is a true positive.
        partners: For each reference lesion the indices of the predicted lesions taken as its segmentation: those that
            overlap it, or its one partner.
    """

    detected: np.ndarray
    true: np.ndarray
    partners: list[np.ndarray]


def overlaps(reference: Components, prediction: Components) -> np.ndarray:
    """Common voxels of every pair of lesions, (num_reference, num_predicted) int64."""
    table = np.zeros((reference.count, prediction.count), dtype=np.int64)
    both = (reference.labels > 0) & (prediction.labels > 0)
    np.add.at(table, (reference.labels[both].astype(np.int64) - 1, prediction.labels[both].astype(np.int64) - 1), 1)
    return table


def one_to_one(
    table: np.ndarray, reference_voxels: np.ndarray, predicted_voxels: np.ndarray, threshold: float
) -> list[tuple[int, int, float]]:
    """Pairs of lesions with an IoU above a threshold, each lesion in one pair at most, with the largest sum of IoU.

    Args:
        table: Common voxels, (num_reference, num_predicted).
        reference_voxels: (num_reference,).
        predicted_voxels: (num_predicted,).
        threshold: Within [0, 1); from 0.5 on there is only one way to pair.
    Returns:
        Index of the reference lesion, index of the predicted lesion, IoU.
    """
    union = reference_voxels[:, None].astype(np.int64) + predicted_voxels[None, :].astype(np.int64) - table
    iou = np.where(table > 0, table / np.maximum(union, 1), 0.0)
    iou[iou <= threshold] = 0.0
    # Noisy predictions have thousands of components, few of which have a partner.
    rows, columns = np.flatnonzero(iou.any(axis=1)), np.flatnonzero(iou.any(axis=0))
    chosen = linear_sum_assignment(iou[np.ix_(rows, columns)], maximize=True)
    pairs = zip(rows[chosen[0]], columns[chosen[1]], strict=True)
    return [(int(row), int(column), float(iou[row, column])) for row, column in pairs if iou[row, column] > 0]


def match(table: np.ndarray, reference_voxels: np.ndarray, predicted_voxels: np.ndarray, rule: MatchingRule) -> Matches:
    """Matches the lesions of a case.

    Args:
        table: Common voxels, (num_reference, num_predicted), of ``overlaps``.
        reference_voxels: (num_reference,).
        predicted_voxels: (num_predicted,).
        rule: The rule, see above.
    """
    if rule.criterion == "iou":
        detected, true = np.zeros(len(reference_voxels), dtype=bool), np.zeros(len(predicted_voxels), dtype=bool)
        partners = [np.zeros(0, dtype=np.int64) for _ in reference_voxels]
        for row, column, _ in one_to_one(table, reference_voxels, predicted_voxels, rule.threshold):
            detected[row] = true[column] = True
            partners[row] = np.array([column])
        return Matches(detected, true, partners)

    def found(common: np.ndarray, voxels: np.ndarray) -> np.ndarray:
        return (common > 0) & (common >= rule.threshold * voxels)

    return Matches(
        detected=found(table.sum(axis=1), reference_voxels),
        true=found(table.sum(axis=0), predicted_voxels),
        partners=[np.flatnonzero(row) for row in table],
    )
