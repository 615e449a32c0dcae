"""STS-Net (Zhao et al., Scientific Reports 2025): means over images of class-wise metrics, background included.

No official code; equations 10 to 14 of the paper, whose printed values agree with means over images. mDice of 0.82
there means a foreground Dice of about 0.64: do not compare it with nnU-Net's Dice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nnunetv2_smallseg.evaluation.voxel_metrics import Counts, confusion_matrix, region_counts, voxel_metrics

__all__ = ["evaluate_case", "summarise"]


def evaluate_case(reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]) -> dict:
    """``counts``: label -> the four counts, for background and every label in either; ``spacing`` is not used."""
    matrix = confusion_matrix(reference, prediction)
    labels = sorted({label for pair in matrix for label in pair} | {0})
    return {"counts": {label: vars(region_counts(matrix, (label,), None)) for label in labels}}


def summarise(cases: Mapping[str, dict]) -> dict:
    """Means over images: mDice and mIoU over all classes, Jaccard, recall and precision over the foreground.

    A class that is in neither map of an image does not count in its mean. The paper does not say what an image without
    a lesion counts: it is left out of Jaccard, recall and precision. Every mean is given with its number of images.
    """
    values: dict[str, list[float]] = {name: [] for name in ("mDice", "mIoU", "Jaccard", "Recall", "Precision")}
    for case in cases.values():
        metrics = {int(label): voxel_metrics(Counts(**counts)) for label, counts in case["counts"].items()}
        foreground = [metrics[label] for label in metrics if label != 0]
        values["mDice"].append(_mean([entry["dice"] for entry in metrics.values()]))
        values["mIoU"].append(_mean([entry["iou"] for entry in metrics.values()]))
        with_lesion = [
            metrics[label]
            for label in metrics
            if label != 0 and case["counts"][label]["true_positive"] + case["counts"][label]["false_negative"]
        ]
        if with_lesion:
            values["Jaccard"].append(_mean([entry["iou"] for entry in foreground]))
            values["Recall"].append(_mean([entry["sensitivity"] for entry in foreground]))
            values["Precision"].append(_mean([entry["precision"] for entry in foreground]))
    return {
        name: {"mean": _mean(entries), "num_images": int(np.isfinite(entries).sum())}
        for name, entries in values.items()
    }


def _mean(values: Sequence[float]) -> float | None:
    """Mean of the defined values; None if there are none."""
    defined = [value for value in values if value is not None and np.isfinite(value)]
    return float(np.mean(defined)) if defined else None
