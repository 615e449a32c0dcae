"""SvANet (Dai et al., IEEE TNNLS 2026): pooled region metrics of the images below an area ratio.

Official code: https://github.com/anthonyweidai/SvANet (state of 2026-01-29). Every slice of a volume is an image. These
are not means over cases, and background is one of the classes: the values cannot be compared with nnU-Net's Dice. The
authors resize to 512 x 512 first; here every image counts with the pixels it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nnunetv2_smallseg.evaluation.size_groups import AREA_RATIO_LIMITS, area_ratio_percent
from nnunetv2_smallseg.evaluation.voxel_metrics import confusion_matrix

__all__ = ["class_area_ratios", "evaluate_case", "evaluate_image", "group_metrics", "summarise"]

IGNORED = 255
EPSILON = 1e-7


def class_area_ratios(reference: np.ndarray) -> list[float]:
    """Area ratio in percent of every foreground class present in an image, (Y, X), in the order of the labels."""
    labels = np.unique(reference)
    return [area_ratio_percent(reference == label) for label in labels if label not in (0, IGNORED)]


def evaluate_image(reference: np.ndarray, prediction: np.ndarray) -> dict:
    """What the metrics need of one image.

    Args:
        reference: Labels, (Y, X); pixels of 255 are left out.
        prediction: Labels, same shape.
    Returns:
        ``area_ratio_percent``: the largest of its classes, 0 without an object; ``pixels`` that count; ``confusion``:
        triples of label in the reference, label in the prediction, number of pixels.
    """
    counted = reference != IGNORED
    matrix = confusion_matrix(reference[counted], prediction[counted])
    return {
        "area_ratio_percent": max(class_area_ratios(reference), default=0.0),
        "pixels": int(counted.sum()),
        "confusion": [[*labels, pixels] for labels, pixels in matrix.items()],
    }


def evaluate_case(reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]) -> dict:
    """``images``: the records of an image, (Y, X), or of the slices of a volume, (Z, Y, X)."""
    if reference.ndim == 2:
        reference, prediction = reference[None], prediction[None]
    return {"images": [evaluate_image(*pair) for pair in zip(reference, prediction, strict=True)]}


def group_metrics(images: Sequence[dict], num_classes: int) -> dict[str, float | int]:
    """Metrics of a group of images, pooled.

    Args:
        images: Records of ``evaluate_image``, one or more.
        num_classes: Classes, background included.
    Returns:
        ``num_images``; ``mIoU``, ``mDice``, ``precision``, ``sensitivity``, ``F2``, ``E_measure`` in percent;
        ``MAE_as_published`` (difference of predicted index and binary target, divided once more by the number of
        images), ``MAE_pred_index_vs_binary_target`` (the same, divided once), ``MAE_index_mean`` and
        ``MAE_foreground_binary``.
    """
    table = np.zeros((num_classes, num_classes))
    for image in images:
        for reference, prediction, pixels in image["confusion"]:
            table[reference, prediction] += pixels
    with_class = np.array(
        [
            sum(any(reference == label for reference, _, _ in image["confusion"]) for image in images)
            for label in range(num_classes)
        ]
    )
    intersection, predicted, target = np.diag(table), table.sum(axis=0), table.sum(axis=1)
    union = target + predicted - intersection + EPSILON
    precision = intersection / (predicted + EPSILON)
    sensitivity = intersection / (union - predicted + intersection + EPSILON)
    per_class = {
        "mIoU": intersection / union,
        "mDice": 2 * intersection / (union + intersection),
        "precision": precision,
        "sensitivity": sensitivity,
        "F2": 5 * precision * sensitivity / (4 * precision + sensitivity + EPSILON),
    }
    index = np.arange(num_classes)
    binary = (index > 0).astype(int)

    def mean_error(of_prediction: np.ndarray, of_target: np.ndarray) -> float:
        return float((np.abs(of_prediction[None, :] - of_target[:, None]) * table).sum() / table.sum())

    published = mean_error(index, binary)
    return {
        "num_images": len(images),
        **{name: float(100 * (with_class * values).sum() / with_class.sum()) for name, values in per_class.items()},
        "E_measure": _e_measure(table, [image["pixels"] for image in images]),
        "MAE_as_published": published / len(images),
        "MAE_pred_index_vs_binary_target": published,
        "MAE_index_mean": mean_error(index, index),
        "MAE_foreground_binary": mean_error(binary, binary),
    }


def _e_measure(table: np.ndarray, pixels: Sequence[int]) -> float:
    """E-measure of the foreground of all classes together, in percent, with the authors' normalisation."""
    counts = np.array([[table[0, 0], table[0, 1:].sum()], [table[1:, 0].sum(), table[1:, 1:].sum()]])
    total = counts.sum()
    if counts[1].sum() == 0:
        alignment = counts[0, 0]
    else:
        a = (np.arange(2) - counts[1].sum() / total)[:, None]
        b = (np.arange(2) - counts[:, 1].sum() / total)[None, :]
        alignment = ((1 + 2 * a * b / (a**2 + b**2 + EPSILON)) ** 2 / 4 * counts).sum()
    return float(100 * alignment / (np.mean(pixels) - 1) / len(pixels))


def summarise(cases: Mapping[str, dict]) -> dict:
    """Metrics of the groups ``ultra small``, ``small`` and ``all``; images without an object belong to each of them."""
    images = [image for case in cases.values() for image in case["images"]]
    num_classes = 1 + max(max(labels[:2]) for image in images for labels in image["confusion"])
    groups = {}
    for name, limit in AREA_RATIO_LIMITS.items():
        members = [image for image in images if image["area_ratio_percent"] < limit]
        groups[name] = group_metrics(members, num_classes) if members else {"num_images": 0}
    return groups
