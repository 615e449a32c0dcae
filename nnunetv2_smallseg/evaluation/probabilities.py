"""What probabilities tell beyond the label map: AUC, calibration and FROC.

nnU-Net writes them with ``--save_probabilities``: ``<case>.npz`` with the array ``probabilities``, (channels, Z, Y, X).
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunetv2_smallseg.evaluation.components import Components, connected_components
from nnunetv2_smallseg.evaluation.images import EvaluationError
from nnunetv2_smallseg.evaluation.matching import MatchingRule, match, overlaps

__all__ = [
    "FALSE_POSITIVES_PER_CASE",
    "area_under_roc",
    "calibration_bins",
    "calibration_metrics",
    "candidates",
    "froc",
    "read_probabilities",
]

NUM_CALIBRATION_BINS = 20
# Operating points at which FROC is summarised.
FALSE_POSITIVES_PER_CASE: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def read_probabilities(path: Path, num_channels: int, shape: tuple[int, ...]) -> np.ndarray:
    """Probabilities of a case.

    Args:
        path: File of nnU-Net.
        num_channels: Channels expected: labels with background, or regions.
        shape: Shape of the label map.
    Returns:
        (num_channels, *shape) floats within [0, 1].
    Raises:
        EvaluationError: If the file is absent or damaged, or something else in it.
    """
    if not path.is_file():
        raise EvaluationError(f"{path} is missing: predict with --save_probabilities, or leave out --probabilities")
    try:
        with np.load(path, allow_pickle=False) as content:
            array = content["probabilities"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        # numpy takes anything that is no archive for a pickle, and advises to load it as one: never do.
        reason = "it is no archive of numpy" if not zipfile.is_zipfile(path) else str(error)
        raise EvaluationError(f"{path} holds no array 'probabilities' ({reason}): predict anew") from error
    if array.ndim == len(shape) + 2 and array.shape[1] == 1:  # nnU-Net keeps an axis Z of 1 for pictures
        array = array[:, 0]
    if array.shape != (num_channels, *shape):
        raise EvaluationError(
            f"{path} has the shape {array.shape}, but its label map and the labels need {(num_channels, *shape)}: "
            "give the dataset.json of the data set (-djfile)"
        )
    low, high = float(array.min()), float(array.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also catches NaN
        raise EvaluationError(f"{path} holds values from {low:g} to {high:g}: probabilities lie within [0, 1]")
    return array


def area_under_roc(probability: np.ndarray, reference: np.ndarray) -> float:
    """Area under the ROC curve of single voxels, exactly; ties count one half.

    Args:
        probability: (N,) floats.
        reference: (N,) boolean.
    Returns:
        Within [0, 1]; ``nan`` if all voxels are of one kind.
    """
    positive, negative = np.sort(probability[reference]), probability[~reference]
    if not (len(positive) and len(negative)):
        return float("nan")
    # Most background voxels lie below every lesion voxel and need no search.
    contested = negative[negative >= positive[0]]
    below = np.searchsorted(positive, contested, side="left").sum(dtype=np.int64)
    not_above = np.searchsorted(positive, contested, side="right").sum(dtype=np.int64)
    lost = (int(below) + int(not_above)) / 2
    return 1 - lost / (len(positive) * len(negative))


def calibration_bins(probability: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Voxels, sum of probabilities and number of reference voxels in bins of equal width, (bins, 3) float64."""
    index = np.clip((probability * NUM_CALIBRATION_BINS).astype(np.int64), 0, NUM_CALIBRATION_BINS - 1)
    columns = (None, probability.astype(np.float64), reference)
    return np.stack([np.bincount(index, weights, NUM_CALIBRATION_BINS) for weights in columns], axis=1)


def calibration_metrics(probability: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Brier score and expected calibration error over all voxels that count.

    Args:
        probability: (N,) floats.
        reference: (N,) boolean.
    Returns:
        ``brier``: mean (p - y)^2; ``ece``: mean over voxels of abs(mean p - share of reference) of their bin.
    """
    bins = calibration_bins(probability, reference)
    total = bins[:, 0].sum()
    if not total:
        return {"brier": float("nan"), "ece": float("nan")}
    brier = np.mean((probability.astype(np.float64) - reference) ** 2)
    return {"brier": float(brier), "ece": float(np.abs(bins[:, 1] - bins[:, 2]).sum() / total)}


def candidates(
    probability: np.ndarray,
    reference: Components,
    *,
    threshold: float,
    rule: MatchingRule,
    connectivity: int | None = None,
) -> dict[str, list[float]]:
    """Lesion candidates of a case for FROC: components of probability >= threshold, scored by their highest one.

    Args:
        probability: Probability of the region, (Z, Y, X) or (Y, X).
        reference: Lesions of the reference, same shape.
        threshold: Lowest probability of a candidate.
        rule: Matching rule.
        connectivity: Of the candidates.
    Returns:
        ``lesions``: for each reference lesion the highest score of a true candidate that overlaps it, 0 if there is
        none; ``false_positives``: scores of the false candidates.
    """
    found = connected_components(probability >= threshold, connectivity)
    table = overlaps(reference, found)
    matches = match(table, reference.statistics()[0], found.statistics()[0], rule)
    scores = np.zeros(found.count)
    inside = found.labels > 0
    np.maximum.at(scores, found.labels[inside].astype(np.int64) - 1, probability[inside])
    return {
        "lesions": [
            float(scores[partners].max()) if detected else 0.0
            for detected, partners in zip(matches.detected, matches.partners, strict=True)
        ],
        "false_positives": [float(score) for score in scores[~matches.true]],
    }


def froc(cases: Sequence[dict[str, list[float]]]) -> dict:
    """Free-response ROC: share of lesions found against false positives per case, as the threshold falls.

    Args:
        cases: Candidates of each case.
    Returns:
        ``threshold``, ``sensitivity``, ``false_positives_per_case``: the points of the curve, one for each score that
        occurs, from the highest; ``sensitivity_at``: false positives per case -> best sensitivity with at most as
        many; ``score``: mean of those; counts. Sensitivities are None without a lesion.
    """
    lesions = np.array([score for case in cases for score in case["lesions"]])
    false = np.array([score for case in cases for score in case["false_positives"]])
    thresholds = np.unique(np.concatenate([lesions[lesions > 0], false]))[::-1]

    def share_from(scores: np.ndarray, total: int) -> np.ndarray:
        return (len(scores) - np.searchsorted(np.sort(scores), thresholds, side="left")) / total

    per_case = share_from(false, max(len(cases), 1))
    sensitivity = share_from(lesions, len(lesions)) if len(lesions) else None
    at: dict[str, float | None] = {}
    for limit in FALSE_POSITIVES_PER_CASE:
        allowed = per_case <= limit
        at[f"{limit:g}"] = None if sensitivity is None else float(sensitivity[allowed].max(initial=0.0))
    return {
        "num_cases": len(cases),
        "num_lesions": len(lesions),
        "threshold": thresholds.tolist(),
        "sensitivity": None if sensitivity is None else sensitivity.tolist(),
        "false_positives_per_case": per_case.tolist(),
        "sensitivity_at": at,
        "score": None if sensitivity is None else float(np.mean(list(at.values()))),
    }
