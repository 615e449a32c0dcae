"""Free-response receiver operating characteristic (FROC), from the scores in the table of lesions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nnunetv2_smallseg.evaluation.resampling import Estimate, Resampling, bootstrap_counts, divide, percentile_interval
from nnunetv2_smallseg.evaluation.result_tables import ResultTables

__all__ = ["FROC_RATES", "Froc", "froc_curve"]

# False positives per case at which a FROC curve is read (LUNA16: Setio et al., Medical Image Analysis 42, 2017).
FROC_RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Froc:
    """Free-response receiver operating characteristic of a prediction.

    Attributes:
        region: Region of the labels.
        prediction: Name of the prediction.
        false_positives_per_case: (num_thresholds,) ascending, from 0.
        recall: (num_thresholds,) recall at the same threshold.
        thresholds: (num_thresholds,) lowest score that counts, descending, from infinity.
        at_rates: Recall at ``FROC_RATES``: the highest that has no more false positives per case.
        mean_recall: Mean of these.
        grid: (num_rates,) false positives per case at which ``low`` and ``high`` are given.
        low: (num_rates,) lower limits of the recall.
        high: (num_rates,) upper limits.
    """

    region: str
    prediction: str
    false_positives_per_case: np.ndarray
    recall: np.ndarray
    thresholds: np.ndarray
    at_rates: tuple[Estimate, ...]
    mean_recall: Estimate
    grid: np.ndarray
    low: np.ndarray
    high: np.ndarray


def recall_at(rates: np.ndarray, found: np.ndarray, false: np.ndarray, lesions: np.ndarray, cases: np.ndarray):
    """Recall at false positives per case, for samples of cases.

    Args:
        rates: (num_rates,) false positives per case.
        found: (num_samples, num_thresholds) lesions detected, ascending.
        false: (num_samples, num_thresholds) false positives, ascending from 0.
        lesions: (num_samples,) lesions of the sample.
        cases: (num_samples,) cases of the sample.

    Returns:
        (num_samples, num_rates), NaN in samples without a lesion.
    """
    recalls = np.full((len(found), len(rates)), np.nan)
    for index, rate in enumerate(rates):
        # A small margin: 0.1 * 30 cases are 3 false positives.
        last = (false <= (rate * cases + 1e-9)[:, None]).sum(axis=1) - 1
        recalls[:, index] = divide(found[np.arange(len(found)), last], lesions)
    return recalls


def froc_curve(
    tables: ResultTables,
    region: str,
    prediction: str,
    generator: np.random.Generator,
    resampling: Resampling | None = None,
) -> Froc | None:
    """Recall against false positives per case when only predicted lesions above a score count.

    The score of a lesion of the reference is the highest probability in it. Missed lesions stay missed, whatever their
    score, and false positives without a score are left out. The curve ends where all
    predicted lesions count; the recall at higher rates is that of the end.

    Returns:
        The curve with intervals over cases, None without scores or without lesions.
    """
    resampling = resampling or Resampling()
    cases = tables.case_names(region)
    case_index = {name: index for index, name in enumerate(cases)}
    present = tables.present(region)[:, tables.predictions.index(prediction)]
    reference = tables.lesion_rows(region, prediction, "reference")
    lesions = np.bincount([case_index[row["case"]] for row in reference], minlength=len(cases)).astype(float)
    marks = [
        (row["score"], case_index[row["case"]], row["kind"] == "reference")
        for row in (*reference, *tables.lesion_rows(region, prediction, "false_positive"))
        if not math.isnan(row["score"]) and (row["kind"] == "false_positive" or row["detected"])
    ]
    if not marks or not reference:
        return None
    marks.sort(key=lambda mark: -mark[0])
    scores, owners, hits = (np.array(column) for column in zip(*marks, strict=True))
    # Marks of equal score count together: only the last of them is a threshold.
    ends = np.flatnonzero(np.append(np.diff(scores) != 0, True))

    def sweep(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Detected lesions and false positives at all thresholds, (num_samples, num_thresholds), for case weights."""
        begin = np.zeros((len(weights), 1))
        found, false = (np.cumsum(weights[:, owners] * kind, axis=1)[:, ends] for kind in (hits, ~hits))
        return np.concatenate([begin, found], axis=1), np.concatenate([begin, false], axis=1)

    everything = np.ones((1, len(cases)))
    found, false = sweep(everything)
    num_cases = present.sum(keepdims=True).astype(float)
    num_lesions = lesions.sum(keepdims=True)
    curve_false = false[0] / num_cases
    grid = np.geomspace(FROC_RATES[0] / 2, max(FROC_RATES[-1], curve_false[-1]), 60)
    rates = np.concatenate([FROC_RATES, grid])
    value = recall_at(np.array(FROC_RATES), found, false, num_lesions, num_cases)[0]

    groups = resampling.groups(cases)
    num_groups = int(groups.max()) + 1
    samples = np.full((resampling.num_samples, len(rates)), np.nan)
    for rows, counts in bootstrap_counts(num_groups, generator, resampling.num_samples, len(marks)):
        weights = counts[:, groups]
        samples[rows] = recall_at(rates, *sweep(weights), weights @ lesions, weights @ present)
    if len(np.unique(groups[lesions > 0])) < 2:
        samples[:] = np.nan
    num_rates = len(FROC_RATES)
    low, high = percentile_interval(samples, resampling.level)
    ((mean_low,), (mean_high,)) = percentile_interval(
        samples[:, :num_rates].mean(axis=1, keepdims=True), resampling.level
    )
    return Froc(
        region=region,
        prediction=prediction,
        false_positives_per_case=curve_false,
        recall=found[0] / num_lesions,
        thresholds=np.concatenate([[np.inf], scores[ends]]),
        at_rates=tuple(
            Estimate(*map(float, limits)) for limits in zip(value, low[:num_rates], high[:num_rates], strict=True)
        ),
        mean_recall=Estimate(float(value.mean()), float(mean_low), float(mean_high)),
        grid=grid,
        low=low[num_rates:],
        high=high[num_rates:],
    )
