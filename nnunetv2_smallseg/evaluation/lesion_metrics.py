"""Metrics of single lesions, and what they come to in a case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnunetv2_smallseg.evaluation.axes import recist_axes
from nnunetv2_smallseg.evaluation.components import Components
from nnunetv2_smallseg.evaluation.edge_cases import value_if_empty
from nnunetv2_smallseg.evaluation.matching import MatchingRule, match, one_to_one, overlaps
from nnunetv2_smallseg.evaluation.size_groups import diameter_bin, equivalent_diameter_mm

__all__ = ["LesionResult", "detection_metrics", "evaluate_lesions", "panoptic_metrics"]


@dataclass(frozen=True)
class LesionResult:
    """Lesions of one region of one case.

    Attributes:
        rows: One dictionary a reference lesion, then one a false positive; columns of ``lesions.csv``.
        case: Columns of ``cases.csv``.
    """

    rows: list[dict]
    case: dict[str, float | int]


def detection_metrics(num_reference: int, num_predicted: int, num_detected: int, num_true: int) -> dict[str, float]:
    """Recall, precision and F1 of lesions.

    Args:
        num_reference: Lesions of the reference.
        num_predicted: Lesions of the prediction.
        num_detected: Reference lesions that were found.
        num_true: Predicted lesions that are true positives.
    Returns:
        ``detection_recall`` = detected / reference, ``detection_precision`` = true / predicted, ``detection_f1``, their
        harmonic mean; ``nan`` where undefined.
    """
    empty = num_reference == 0, num_predicted == 0
    recall, precision, f1 = (value_if_empty(f"detection_{name}", *empty) for name in ("recall", "precision", "f1"))
    if recall is None:
        recall = num_detected / num_reference
    if precision is None:
        precision = num_true / num_predicted
    if f1 is None:
        f1 = 2 * recall * precision / (recall + precision) if recall + precision else 0.0
    return {"detection_recall": recall, "detection_precision": precision, "detection_f1": f1}


def panoptic_metrics(num_reference: int, num_predicted: int, ious: Sequence[float]) -> dict[str, float]:
    """Panoptic quality and its two factors (Kirillov et al., CVPR 2019).

    Args:
        num_reference: Lesions of the reference.
        num_predicted: Lesions of the prediction.
        ious: IoU of each matched pair.
    Returns:
        ``panoptic_quality``; ``segmentation_quality``: mean IoU of the pairs; ``recognition_quality``: F1 of the pairs.
    """
    empty = num_reference == 0, num_predicted == 0
    names = ("panoptic_quality", "segmentation_quality", "recognition_quality")
    if any(empty):
        return {name: value_if_empty(name, *empty) for name in names}
    pairs = len(ious)
    total = (num_reference + num_predicted) / 2  # pairs + misses / 2 + false positives / 2
    values = sum(ious) / total, sum(ious) / pairs if pairs else float("nan"), pairs / total
    return dict(zip(names, values, strict=True))


def evaluate_lesions(
    reference: Components,
    prediction: Components,
    spacing: Sequence[float],
    *,
    rule: MatchingRule,
    diameter_limits_mm: Sequence[float],
    panoptic_iou: float = 0.5,
    probability: np.ndarray | None = None,
    offset: Sequence[int] | None = None,
    image_shape: Sequence[int] | None = None,
) -> LesionResult:
    """Matches the lesions of a case and measures each of them.

    Args:
        reference: Lesions of the reference, (Z, Y, X) or (Y, X).
        prediction: Lesions of the prediction, same shape.
        spacing: Voxel size in mm.
        rule: Matching rule.
        diameter_limits_mm: Limits of the size bins.
        panoptic_iou: IoU above which a pair counts in the panoptic quality.
        probability: Probability of the region, same shape; None if there is none.
        offset: Position of the arrays in the image, where they are a crop of it.
        image_shape: Shape of the image, where the arrays are a crop of it.
    Returns:
        Volumes are areas in mm2 in 2D. The Dice of a lesion compares it with all its partners together, each as a
        whole; 0 if it was missed. Errors are prediction - reference, of detected lesions only.
    """
    shape = reference.labels.shape
    image_shape = tuple(image_shape or shape)
    offset = np.asarray(offset if offset is not None else [0] * len(shape))
    voxel = float(np.prod(spacing))
    reference_voxels, reference_boxes, reference_centroids = reference.statistics()
    predicted_voxels, predicted_boxes, predicted_centroids = prediction.statistics()
    table = overlaps(reference, prediction)
    matches = match(table, reference_voxels, predicted_voxels, rule)
    pairs = one_to_one(table, reference_voxels, predicted_voxels, panoptic_iou)

    def facts(components: Components, index: int, voxels: int, box: tuple[slice, ...], centroid: np.ndarray) -> dict:
        mask = components.labels[box] == index + 1
        volume = float(voxels) * voxel
        diameter = equivalent_diameter_mm(volume, len(shape))
        long_axis, short_axis = recist_axes(mask, spacing[-2:])
        sides = zip(box, offset, image_shape, strict=True)
        return {
            "lesion": int(components.numbers[index]),
            "volume_mm3": volume,
            "equivalent_diameter_mm": diameter,
            "long_axis_mm": long_axis,
            "short_axis_mm": short_axis,
            "size_bin": diameter_bin(diameter, diameter_limits_mm),
            "score": float(probability[box][mask].max()) if probability is not None else None,
            "touches_border": int(any(side.start + start == 0 or side.stop + start == size
                                      for side, start, size in sides)),
            "centroid": " ".join(f"{value:.2f}" for value in centroid + offset),
        }  # fmt: skip

    rows = []
    for index, (voxels, box, centroid) in enumerate(
        zip(reference_voxels, reference_boxes, reference_centroids, strict=True)
    ):
        row = {"kind": "reference", **facts(reference, index, voxels, box, centroid)}
        detected, partners = bool(matches.detected[index]), matches.partners[index]
        row.update(detected=int(detected), dice=0.0, predicted_volume_mm3=0.0)
        if detected:
            predicted = int(predicted_voxels[partners].sum())
            row["dice"] = 2 * int(table[index, partners].sum()) / (int(voxels) + predicted)
            row["predicted_volume_mm3"] = predicted * voxel
            row["volume_error_mm3"] = row["predicted_volume_mm3"] - row["volume_mm3"]
            predicted_diameter = equivalent_diameter_mm(row["predicted_volume_mm3"], len(shape))
            row["diameter_error_mm"] = predicted_diameter - row["equivalent_diameter_mm"]
        rows.append(row)
    for index in np.flatnonzero(~matches.true):
        found = facts(prediction, index, predicted_voxels[index], predicted_boxes[index], predicted_centroids[index])
        rows.append({"kind": "false_positive", **found})
    num_true = int(matches.true.sum())
    dice_values = [row["dice"] for row in rows if row["kind"] == "reference"]
    case = {
        "num_reference_lesions": reference.count,
        "num_predicted_lesions": prediction.count,
        "num_detected": int(matches.detected.sum()),
        "num_false_positives": prediction.count - num_true,
        **detection_metrics(reference.count, prediction.count, int(matches.detected.sum()), num_true),
        "lesion_dice": float(np.mean(dice_values)) if dice_values else float("nan"),
        **panoptic_metrics(reference.count, prediction.count, [iou for _, _, iou in pairs]),
    }
    return LesionResult(rows, case)
