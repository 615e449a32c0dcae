"""Voxel-wise agreement of two masks, from their four counts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nnunetv2_smallseg.evaluation.edge_cases import value_if_empty

__all__ = ["Counts", "confusion_matrix", "region_counts", "voxel_metrics"]


@dataclass(frozen=True)
class Counts:
    """Voxels in both masks, in the prediction only, in the reference only, in neither."""

    true_positive: int
    false_positive: int
    false_negative: int
    true_negative: int

    @property
    def reference(self) -> int:
        """Voxels of the reference."""
        return self.true_positive + self.false_negative

    @property
    def prediction(self) -> int:
        """Voxels of the prediction."""
        return self.true_positive + self.false_positive

    @property
    def total(self) -> int:
        """All voxels that count."""
        return self.reference + self.false_positive + self.true_negative


def confusion_matrix(reference: np.ndarray, prediction: np.ndarray) -> dict[tuple[int, int], int]:
    """How many voxels have each pair of labels: (label in the reference, label in the prediction) -> voxels."""
    if not reference.size:
        return {}
    num_labels = 1 + int(max(reference.max(), prediction.max()))
    if num_labels <= 256:
        pairs = reference.astype(np.uint16) * np.uint16(num_labels) + prediction
        counts = np.bincount(pairs.ravel(), minlength=num_labels * num_labels)
        present = np.flatnonzero(counts)
        return {(int(pair) // num_labels, int(pair) % num_labels): int(counts[pair]) for pair in present}
    pairs = np.stack([reference.ravel(), prediction.ravel()]).astype(np.int64)
    unique, counts = np.unique(pairs, axis=1, return_counts=True)
    return {(int(a), int(b)): int(count) for (a, b), count in zip(unique.T, counts, strict=True)}


def region_counts(matrix: dict[tuple[int, int], int], labels: tuple[int, ...], ignore_label: int | None) -> Counts:
    """The four counts of a region; voxels whose reference has the ignore label are left out."""
    counts = {(True, True): 0, (False, True): 0, (True, False): 0, (False, False): 0}
    for (reference, prediction), voxels in matrix.items():
        if reference != ignore_label:
            counts[reference in labels, prediction in labels] += voxels
    return Counts(counts[True, True], counts[False, True], counts[True, False], counts[False, False])


def voxel_metrics(counts: Counts, both_empty: str = "undefined") -> dict[str, float]:
    """Dice, IoU, sensitivity, precision, specificity, F2, MAE and RAVD.

    Args:
        counts: Voxels of the four kinds.
        both_empty: Rule for two empty masks, a key of ``edge_cases.BOTH_EMPTY_RULES``.
    Returns:
        Metric -> value; ``nan`` where undefined. RAVD is >= 0, the others within [0, 1].
    """
    tp, fp, fn, tn = counts.true_positive, counts.false_positive, counts.false_negative, counts.true_negative
    formulas = {
        "dice": (2 * tp, 2 * tp + fp + fn),
        "iou": (tp, tp + fp + fn),
        "sensitivity": (tp, tp + fn),
        "precision": (tp, tp + fp),
        "specificity": (tn, tn + fp),
        "f2": (5 * tp, 5 * tp + 4 * fn + fp),
        "mae": (fp + fn, counts.total),
        "ravd": (abs(counts.prediction - counts.reference), counts.reference),
    }
    metrics = {}
    for name, (numerator, denominator) in formulas.items():
        empty = value_if_empty(name, counts.reference == 0, counts.prediction == 0, both_empty)
        if empty is None:  # a reference that fills the image leaves no voxel for the specificity
            empty = numerator / denominator if denominator else math.nan
        metrics[name] = empty
    return metrics
