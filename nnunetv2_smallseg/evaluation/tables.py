"""Tables and summaries: means with their counts, groups by size, and the files they are written to."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from nnunetv2_smallseg.evaluation import probabilities
from nnunetv2_smallseg.evaluation.case import CaseResult
from nnunetv2_smallseg.evaluation.lesion_metrics import detection_metrics
from nnunetv2_smallseg.evaluation.regions import LabelScheme, Region
from nnunetv2_smallseg.evaluation.size_groups import (
    AREA_RATIO_LIMITS,
    SHARES,
    area_ratio_groups,
    diameter_bins,
    share_groups,
)
from nnunetv2_smallseg.files import replacing

__all__ = ["CASE_METRICS", "LESION_COLUMNS", "nnunet_summary", "region_summary", "statistics_of", "write_csv"]

# Metrics of cases.csv of which a mean over cases makes sense.
CASE_METRICS: tuple[str, ...] = (
    "dice", "iou", "sensitivity", "precision", "specificity", "f2", "mae", "ravd", "assd_mm", "hd_mm", "hd95_mm", "nsd",
    "auc", "brier", "ece", "lesion_dice", "panoptic_quality", "segmentation_quality", "recognition_quality",
)  # fmt: skip

LESION_COLUMNS: tuple[str, ...] = (
    "prediction", "case", "region", "kind", "lesion", "volume_mm3", "equivalent_diameter_mm", "long_axis_mm",
    "short_axis_mm", "size_bin", "detected", "dice", "predicted_volume_mm3", "volume_error_mm3", "diameter_error_mm",
    "score", "touches_border", "centroid",
)  # fmt: skip


def is_defined(value: object) -> bool:
    """Whether a field holds a value: neither None nor nan."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def write_csv(rows: Sequence[dict], columns: Sequence[str], target: Path) -> None:
    """Writes a table; undefined values become empty fields. Numbers keep all their digits."""
    with replacing(target) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        for row in rows:
            values = (row.get(column) for column in columns)
            writer.writerow([value if is_defined(value) else "" for value in values])


def statistics_of(values: Iterable[float | None]) -> dict[str, float | int | None]:
    """Mean, median and sample standard deviation of the defined values, with their number.

    Without a value all three are None; the deviation of a single one is None.
    """
    defined = [value for value in values if is_defined(value)]
    return {
        "mean": float(np.mean(defined)) if defined else None,
        "median": float(np.median(defined)) if defined else None,
        "standard_deviation": float(np.std(defined, ddof=1)) if len(defined) > 1 else None,
        "count": len(defined),
    }


def nnunet_summary(results: Sequence[CaseResult], scheme: LabelScheme) -> dict:
    """The content of nnU-Net's ``summary.json``, by its definitions: a region absent from both maps is NaN."""
    cases = []
    for result in results:
        metrics = {}
        for region in scheme.regions:
            counts = result.counts[region.name]
            tp, fp, fn = counts.true_positive, counts.false_positive, counts.false_negative
            absent = tp + fp + fn == 0
            metrics[region.key] = {
                "Dice": math.nan if absent else 2 * tp / (2 * tp + fp + fn),
                "FN": fn,
                "FP": fp,
                "IoU": math.nan if absent else tp / (tp + fp + fn),
                "TN": counts.true_negative,
                "TP": tp,
                "n_pred": counts.prediction,
                "n_ref": counts.reference,
            }
        cases.append(
            {
                "metrics": metrics,
                "prediction_file": str(result.task.prediction_file),
                "reference_file": str(result.task.reference_file),
            }
        )
    names = list(cases[0]["metrics"][scheme.regions[0].key])

    def mean(values: Sequence[float]) -> float:
        defined = [value for value in values if not math.isnan(value)]
        return float(np.mean(defined)) if defined else math.nan

    means = {
        region.key: {name: mean([case["metrics"][region.key][name] for case in cases]) for name in names}
        for region in scheme.regions
    }
    # A plain mean over the regions, as nnU-Net takes it: NaN as soon as one of them is.
    foreground = {name: float(np.mean([values[name] for values in means.values()])) for name in names}
    return {"foreground_mean": foreground, "mean": means, "metric_per_case": cases}


def region_summary(
    results: Sequence[CaseResult], region: Region, diameter_limits_mm: Sequence[float]
) -> dict[str, object]:
    """What one folder of predictions reached in one region.

    Args:
        results: Cases of the folder.
        region: The region.
        diameter_limits_mm: Limits of the size bins of lesions.
    Returns:
        ``num_cases``, ``num_cases_with_reference``; ``metrics``: metric -> mean, median, deviation, count;
        ``lesions``: detection pooled over all lesions; ``by_diameter``: the same for bins of lesions; ``by_area_ratio``
        and ``by_share``: metrics of groups of cases; ``froc`` and ``calibration`` with probabilities.
    """
    rows = [row for result in results for row in result.rows if row["region"] == region.name]
    lesions = [row for result in results for row in result.lesions if row["region"] == region.name]
    with_reference = [row for row in rows if row["reference_volume_mm3"] > 0]
    shares = share_groups({row["case"]: row["reference_volume_mm3"] for row in with_reference})
    summary = {
        "num_cases": len(rows),
        "num_cases_with_reference": len(with_reference),
        "metrics": case_metrics(rows),
        "lesions": lesion_summary(rows, lesions),
        "by_diameter": {
            name: bin_summary([row for row in lesions if row["size_bin"] == name])
            for name in diameter_bins(diameter_limits_mm)
        },
        "by_area_ratio": {
            name: group_summary([row for row in with_reference if name in area_ratio_groups(row["area_ratio_percent"])])
            for name in AREA_RATIO_LIMITS
        },
        "by_share": {
            name: group_summary([row for row in with_reference if shares[row["case"]] == name]) for name in SHARES
        },
    }
    if results[0].candidates:
        summary["froc"] = probabilities.froc([result.candidates[region.name] for result in results])
        bins = np.sum([result.calibration[region.name] for result in results], axis=0)
        summary["calibration"] = {
            "upper_edge": [(index + 1) / len(bins) for index in range(len(bins))],
            "num_voxels": [int(count) for count in bins[:, 0]],
            "mean_probability": [float(total / count) if count else None for count, total, _ in bins],
            "share_of_reference": [float(hits / count) if count else None for count, _, hits in bins],
        }
    return summary


def case_metrics(rows: Sequence[dict]) -> dict[str, dict]:
    """Metric -> statistics over cases."""
    return {name: statistics_of(row[name] for row in rows) for name in CASE_METRICS}


def group_summary(rows: Sequence[dict]) -> dict:
    """Metrics of a group of cases."""
    return {"num_cases": len(rows), "metrics": case_metrics(rows)}


def lesion_summary(rows: Sequence[dict], lesions: Sequence[dict]) -> dict:
    """Detection pooled over the lesions of all cases, false positives per case, and statistics over lesions."""
    totals = {
        name: int(sum(row[name] for row in rows))
        for name in ("num_reference_lesions", "num_predicted_lesions", "num_detected", "num_false_positives")
    }
    num_true = totals["num_predicted_lesions"] - totals["num_false_positives"]
    detection = detection_metrics(
        totals["num_reference_lesions"], totals["num_predicted_lesions"], totals["num_detected"], num_true
    )
    return {
        **totals,
        **{name: value if is_defined(value) else None for name, value in detection.items()},
        "false_positives_per_case": totals["num_false_positives"] / len(rows),
        **errors_of(lesions),
    }


def bin_summary(lesions: Sequence[dict]) -> dict:
    """Detection and errors of the lesions of a size bin; false positives are binned by their own size."""
    reference = [row for row in lesions if row["kind"] == "reference"]
    detected = sum(row["detected"] for row in reference)
    return {
        "num_reference_lesions": len(reference),
        "num_detected": detected,
        "num_false_positives": len(lesions) - len(reference),
        "detection_recall": detected / len(reference) if reference else None,
        **errors_of(lesions),
    }


def errors_of(lesions: Sequence[dict]) -> dict[str, dict]:
    """Statistics of Dice (missed lesions count 0) and of the errors of detected lesions."""
    reference = [row for row in lesions if row["kind"] == "reference"]
    return {
        "lesion_dice": statistics_of(row["dice"] for row in reference),
        "volume_error_mm3": statistics_of(row.get("volume_error_mm3") for row in reference),
        "diameter_error_mm": statistics_of(row.get("diameter_error_mm") for row in reference),
    }
