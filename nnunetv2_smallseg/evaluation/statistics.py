"""Statistics over the tables of an evaluation: means with intervals, detection, comparison of predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from nnunetv2_smallseg.evaluation.resampling import (
    Estimate,
    Resampling,
    bootstrap_ratios,
    divide,
    estimates,
    holm,
    percentile_interval,
    wilcoxon_p_value,
)
from nnunetv2_smallseg.evaluation.result_tables import METRICS, ResultTables

__all__ = [
    "DETECTION_METRICS",
    "Comparison",
    "Detection",
    "MetricSummary",
    "compare_predictions",
    "summarise_detection",
    "summarise_metrics",
]

# Label and better direction of what is pooled over the lesions of all cases.
DETECTION_METRICS = {
    "pooled_recall": ("Pooled recall", "higher"),
    "pooled_precision": ("Pooled precision", "higher"),
    "pooled_f1": ("Pooled F1", "higher"),
    "false_positives_per_case": ("False positives per case", "lower"),
    "pooled_dice": ("Pooled lesion Dice", "higher"),
}


@dataclass(frozen=True)
class MetricSummary:
    """A metric over the cases of a prediction.

    Attributes:
        region: Region of the labels.
        prediction: Name of the prediction.
        metric: Column of ``cases.csv``.
        mean: Mean over the cases where it is defined, with interval.
        median: Median over the same cases.
        num_cases: Cases where it is defined.
        num_undefined: Cases where it is not, or that the prediction lacks.
        num_groups: Patients with at least one of ``num_cases``.
    """

    region: str
    prediction: str
    metric: str
    mean: Estimate
    median: float
    num_cases: int
    num_undefined: int
    num_groups: int


def summarise_metrics(
    tables: ResultTables, generator: np.random.Generator, resampling: Resampling | None = None
) -> list[MetricSummary]:
    """Mean with interval, median and number of cases, for each region, metric and prediction."""
    resampling = resampling or Resampling()
    summaries = []
    for region in tables.regions if tables.metrics else ():
        groups = resampling.groups(tables.case_names(region))
        columns = [(metric, prediction) for metric in tables.metrics for prediction in tables.predictions]
        values = np.concatenate([tables.values(region, metric) for metric in tables.metrics], axis=1)
        defined = ~np.isnan(values)
        means = estimates(np.where(defined, values, 0.0), defined.astype(float), generator, groups, resampling)
        for index, (metric, prediction) in enumerate(columns):
            known = values[defined[:, index], index]
            summaries.append(
                MetricSummary(
                    region=region,
                    prediction=prediction,
                    metric=metric,
                    mean=means[index],
                    median=float(np.median(known)) if len(known) else math.nan,
                    num_cases=len(known),
                    num_undefined=len(values) - len(known),
                    num_groups=len(np.unique(groups[defined[:, index]])),
                )
            )
    return summaries


@dataclass(frozen=True)
class Detection:
    """What became of the lesions of a prediction, of all sizes or of one size bin.

    Attributes:
        region: Region of the labels.
        prediction: Name of the prediction.
        size_bin: Size bin, None for all sizes. False positives are in the bin of their own size.
        num_cases: Cases the prediction holds.
        num_lesions: Lesions of the reference.
        num_detected: Those among them that were detected.
        num_false_positives: Predicted lesions that match none.
        pooled_recall: Detected lesions by lesions of the reference.
        pooled_precision: Predicted lesions that are no false positives by predicted lesions; NaN for size bins, because
            a lesion and what detects it need not be in the same bin.
        pooled_f1: Harmonic mean of recall and precision; NaN for size bins.
        false_positives_per_case: False positives by cases.
        pooled_dice: Mean Dice of the reference lesions where it is defined.
        volume_error_mm3: Mean of predicted minus reference volume where it is defined.
        diameter_error_mm: Mean of predicted minus reference diameter where it is defined.
    """

    region: str
    prediction: str
    size_bin: str | None
    num_cases: int
    num_lesions: int
    num_detected: int
    num_false_positives: int
    pooled_recall: Estimate
    pooled_precision: Estimate
    pooled_f1: Estimate
    false_positives_per_case: Estimate
    pooled_dice: Estimate
    volume_error_mm3: Estimate
    diameter_error_mm: Estimate


def detection_sums(tables: ResultTables, region: str, size_bin: str | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Numerator and denominator of each quantity of ``Detection`` but F1: (num_cases, num_predictions) each."""

    def total(kind: str, column: str | None = None, count_defined: bool = False) -> np.ndarray:
        def amount(row: dict) -> float:
            if row["kind"] != kind or size_bin not in (None, row["size_bin"]):
                return 0.0
            value = 1.0 if column is None else row[column]
            if math.isnan(value):
                return 0.0
            return 1.0 if count_defined else value

        return tables.lesion_sums(region, amount)

    false_positives = total("false_positive")
    predicted = np.zeros_like(false_positives)
    if size_bin is None:
        predicted = np.nan_to_num(tables.values(region, "num_predicted_lesions"))
    sums = {
        "pooled_recall": (total("reference", "detected"), total("reference")),
        "pooled_precision": (np.maximum(predicted - false_positives, 0), predicted),
        "false_positives_per_case": (false_positives, tables.present(region).astype(float)),
    }
    for name, column in (
        ("pooled_dice", "dice"),
        ("volume_error_mm3", "volume_error_mm3"),
        ("diameter_error_mm", "diameter_error_mm"),
    ):
        sums[name] = total("reference", column), total("reference", column, count_defined=True)
    return sums


def harmonic_mean(recall: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """F1 of recall and precision: 0 where both are 0, NaN where one is undefined."""
    total = recall + precision
    return np.where(total == 0, 0.0, divide(2 * recall * precision, total))


def detection_samples(
    sums: Mapping[str, tuple[np.ndarray, np.ndarray]],
    generator: np.random.Generator,
    groups: np.ndarray,
    num_samples: int,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Quantities of ``Detection`` over all cases, and in bootstrap samples of the cases, the same for all.

    Returns:
        Name -> (num_predictions,), and name -> (num_samples, num_predictions).
    """
    upper, lower = (np.concatenate([pair[side] for pair in sums.values()], axis=1) for side in (0, 1))
    samples = np.split(bootstrap_ratios(upper, lower, generator, groups, num_samples), len(sums), axis=1)
    values = np.split(divide(upper.sum(axis=0), lower.sum(axis=0)), len(sums))
    found = dict(zip(sums, values, strict=True)), dict(zip(sums, samples, strict=True))
    for quantities in found:
        quantities["pooled_f1"] = harmonic_mean(quantities["pooled_recall"], quantities["pooled_precision"])
    return found


def summarise_detection(
    tables: ResultTables, generator: np.random.Generator, resampling: Resampling | None = None
) -> list[Detection]:
    """Detection of all lesions and of each size bin, for each region and prediction."""
    resampling = resampling or Resampling()
    summaries = []
    for region in tables.regions:
        groups = resampling.groups(tables.case_names(region))
        num_cases = tables.present(region).sum(axis=0)
        for size_bin in (None, *tables.size_bins):
            sums = detection_sums(tables, region, size_bin)
            values, samples = detection_samples(sums, generator, groups, resampling.num_samples)
            limits = {name: percentile_interval(sample, resampling.level) for name, sample in samples.items()}
            for index, prediction in enumerate(tables.predictions):
                detected, lesions = (sums["pooled_recall"][side][:, index].sum() for side in (0, 1))
                summaries.append(
                    Detection(
                        region=region,
                        prediction=prediction,
                        size_bin=size_bin,
                        num_cases=int(num_cases[index]),
                        num_lesions=int(lesions),
                        num_detected=int(detected),
                        num_false_positives=int(sums["false_positives_per_case"][0][:, index].sum()),
                        **{
                            name: Estimate(float(value[index]), *map(float, limits[name][:, index]))
                            for name, value in values.items()
                        },
                    )
                )
    return summaries


@dataclass(frozen=True)
class Comparison:
    """Two predictions on the same cases.

    Attributes:
        region: Region of the labels.
        metric: Column of ``cases.csv``, or a name of ``DETECTION_METRICS``.
        first: Name of a prediction.
        second: Name of another.
        value_first: Mean, or ratio over lesions, of the first on the common cases.
        value_second: Likewise of the second.
        difference: Second minus first, with interval.
        num_better: Cases where the second is better; None for ratios over lesions.
        num_equal: Cases where both are equal.
        num_worse: Cases where the second is worse.
        num_cases: Common cases where both are defined.
        num_undefined: Cases where one or both are undefined or absent.
        p_value: Wilcoxon's signed-rank test of no difference; NaN for ratios over lesions.
        p_value_holm: The same, corrected by Holm over all comparisons of the metric (pairs and regions).
    """

    region: str
    metric: str
    first: str
    second: str
    value_first: float
    value_second: float
    difference: Estimate
    num_better: int | None
    num_equal: int | None
    num_worse: int | None
    num_cases: int
    num_undefined: int
    p_value: float = math.nan
    p_value_holm: float = math.nan


def compare_predictions(
    tables: ResultTables, generator: np.random.Generator, resampling: Resampling | None = None
) -> list[Comparison]:
    """All pairs of predictions: metrics of cases that rank, and ratios over lesions.

    With patients, the test sees the mean difference of each patient instead of the differences of cases, because cases
    of a patient are not independent.

    Returns:
        Metrics of cases, then what is pooled over lesions; empty with a single prediction.
    """
    resampling = resampling or Resampling()
    pairs = list(combinations(range(len(tables.predictions)), 2))
    metrics = [metric for metric in tables.metrics if metric in METRICS and METRICS[metric].better]
    if not pairs:
        return []
    by_metric: dict[str, list[Comparison]] = {metric: [] for metric in metrics}
    pooled = []
    for region in tables.regions:
        groups = resampling.groups(tables.case_names(region))
        if metrics:
            for row in metric_comparisons(tables, region, metrics, pairs, groups, generator, resampling):
                by_metric[row.metric].append(row)
        for pair in pairs:
            pooled += detection_comparisons(tables, region, pair, groups, generator, resampling)
    comparisons = []
    for rows in by_metric.values():
        corrected = holm([row.p_value for row in rows])
        comparisons += [replace(row, p_value_holm=float(p_value)) for row, p_value in zip(rows, corrected, strict=True)]
    return comparisons + pooled


def metric_comparisons(
    tables: ResultTables,
    region: str,
    metrics: list[str],
    pairs: list[tuple[int, int]],
    groups: np.ndarray,
    generator: np.random.Generator,
    resampling: Resampling,
) -> list[Comparison]:
    """Compares pairs of predictions in metrics of cases, where both are defined."""
    columns = [(metric, pair) for metric in metrics for pair in pairs]
    values = {metric: tables.values(region, metric) for metric in metrics}
    # (num_cases, num_columns)
    raw = np.stack([values[metric][:, pair[1]] - values[metric][:, pair[0]] for metric, pair in columns], axis=1)
    defined = ~np.isnan(raw)
    differences = np.where(defined, raw, 0.0)
    means = estimates(differences, defined.astype(float), generator, groups, resampling)
    return [
        metric_comparison(tables, region, metric, pair, values[metric], groups, mean)
        for (metric, pair), mean in zip(columns, means, strict=True)
    ]


def metric_comparison(
    tables: ResultTables,
    region: str,
    metric: str,
    pair: tuple[int, int],
    values: np.ndarray,
    groups: np.ndarray,
    difference: Estimate,
) -> Comparison:
    """Counts and tests two columns of ``values`` (num_cases, num_predictions), whose mean difference is given."""
    both = values[:, pair]
    defined = ~np.isnan(both).any(axis=1)
    differences = np.where(defined, both[:, 1] - both[:, 0], 0.0)
    counts = defined.astype(float)
    signs = np.sign(np.round(differences[defined], 12)) * (1 if METRICS[metric].better == "higher" else -1)
    by_group = divide(np.bincount(groups, differences), np.bincount(groups, counts))
    means = both[defined].mean(axis=0) if defined.any() else (math.nan, math.nan)
    return Comparison(
        region=region,
        metric=metric,
        first=tables.predictions[pair[0]],
        second=tables.predictions[pair[1]],
        value_first=float(means[0]),
        value_second=float(means[1]),
        difference=difference,
        num_better=int((signs > 0).sum()),
        num_equal=int((signs == 0).sum()),
        num_worse=int((signs < 0).sum()),
        num_cases=int(defined.sum()),
        num_undefined=int((~defined).sum()),
        p_value=wilcoxon_p_value(by_group[~np.isnan(by_group)]),
    )


def detection_comparisons(
    tables: ResultTables,
    region: str,
    pair: tuple[int, int],
    groups: np.ndarray,
    generator: np.random.Generator,
    resampling: Resampling,
) -> list[Comparison]:
    """Compares what is pooled over the lesions of the cases that both predictions hold, resampled together."""
    common = tables.present(region)[:, pair].all(axis=1)
    sums = {
        name: tuple(side[:, pair] * common[:, None] for side in sides)
        for name, sides in detection_sums(tables, region, None).items()
    }
    values, samples = detection_samples(sums, generator, groups, resampling.num_samples)
    comparisons = []
    for metric in DETECTION_METRICS:
        first, second = values[metric]
        differences = samples[metric][:, 1:] - samples[metric][:, :1]
        ((low,), (high,)) = percentile_interval(differences, resampling.level)
        comparisons.append(
            Comparison(
                region=region,
                metric=metric,
                first=tables.predictions[pair[0]],
                second=tables.predictions[pair[1]],
                value_first=float(first),
                value_second=float(second),
                difference=Estimate(float(second - first), float(low), float(high)),
                num_better=None,
                num_equal=None,
                num_worse=None,
                num_cases=int(common.sum()),
                num_undefined=int((~common).sum()),
            )
        )
    return comparisons
