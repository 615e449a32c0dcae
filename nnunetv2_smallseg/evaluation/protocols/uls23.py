"""ULS23 (Universal Lesion Segmentation, 2023): Dice, long and short axis error, consistency, challenge score.

Official code: https://github.com/DIAGNijmegen/ULS23 (commit 06a2bff), folder ``evaluation``. A case is a crop around a
lesion; axes are measured in pixels of the axial slice, spacing is never used.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from nnunetv2_smallseg.evaluation.axes import recist_axes

__all__ = [
    "challenge_score",
    "consistency_dice",
    "describe",
    "dice",
    "evaluate_case",
    "evaluate_stack",
    "lesion_scores",
    "relative_error",
    "shift_to",
    "summarise",
]


def dice(reference: np.ndarray, prediction: np.ndarray) -> float:
    """Dice of two masks; 0 if both are empty, as the organisers have it."""
    total = int(reference.sum()) + int(prediction.sum())
    return 2 * int((reference & prediction).sum()) / total if total else 0.0


def relative_error(predicted: float, expected: float) -> float:
    """The organisers' symmetric absolute error: abs(p - e) / (abs(p) + abs(e)), within [0, 1]; 0 if both are 0."""
    total = abs(predicted) + abs(expected)
    return abs(predicted - expected) / total if total else 0.0


def lesion_scores(reference: np.ndarray, prediction: np.ndarray) -> dict[str, float]:
    """Scores of one lesion.

    Args:
        reference: Labels, (Z, Y, X); every value above 0 is lesion.
        prediction: The same for the prediction.
    Returns:
        ``dice``, ``ref_long_axis_px``, ``ref_short_axis_px``, ``pred_long_axis_px``, ``pred_short_axis_px``,
        ``long_axis_sape``, ``short_axis_sape`` (relative errors), ``ref_voxels``, ``pred_voxels``.
    """
    reference, prediction = reference > 0, prediction > 0
    reference_long, reference_short = recist_axes(reference)
    predicted_long, predicted_short = recist_axes(prediction)
    return {
        "ref_voxels": int(reference.sum()),
        "pred_voxels": int(prediction.sum()),
        "dice": dice(reference, prediction),
        "ref_long_axis_px": reference_long,
        "ref_short_axis_px": reference_short,
        "pred_long_axis_px": predicted_long,
        "pred_short_axis_px": predicted_short,
        "long_axis_sape": relative_error(predicted_long, reference_long),
        "short_axis_sape": relative_error(predicted_short, reference_short),
    }


def shift_to(
    prediction: np.ndarray, translation_mm: Sequence[float], spacing: Sequence[float]
) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Shifts the prediction of one crop onto another crop of the same lesion.

    Args:
        prediction: Mask, (Z, Y, X).
        translation_mm: Translation between the crops in mm, (x, y, z).
        spacing: Voxel size in mm of the crop shifted to, (x, y, z).
    Returns:
        The shifted mask, boolean, and the shift in voxels, (x, y, z).
    """
    x, y, z = (float(step // size) for step, size in zip(translation_mm, spacing, strict=True))
    shift = (-x, -y, z)
    # The organisers interpolate by cubic splines, into an integer type and with the border repeated. By whole voxels
    # that comes down to reading other voxels.
    moved = prediction > 0
    for axis, step in enumerate(shift[::-1]):
        size = moved.shape[axis]
        moved = moved.take(np.clip(np.arange(size) - int(step), 0, size - 1), axis=axis)
    return moved, shift


def consistency_dice(
    first: np.ndarray, second: np.ndarray, translation_mm: Sequence[float], spacing: Sequence[float]
) -> float:
    """Dice of two predictions of one lesion from crops around different centres; 0 if one is empty.

    Args:
        first: Prediction in the first crop, (Z, Y, X).
        second: Prediction in the second crop, which is shifted onto the first.
        translation_mm: Translation between the crops in mm, (x, y, z).
        spacing: Voxel size in mm of the first crop, (x, y, z).
    """
    if not (first.any() and second.any()):
        return 0.0
    return dice(first > 0, shift_to(second, translation_mm, spacing)[0])


def challenge_score(
    segmentation_dice: Sequence[float],
    long_axis_errors: Sequence[float],
    short_axis_errors: Sequence[float],
    consistency: Sequence[float],
) -> float:
    """0.8 Dice + 0.05 (1 - long axis error) + 0.05 (1 - short axis error) + 0.1 consistency, of means over lesions."""
    return (
        0.8 * statistics.fmean(segmentation_dice)
        + 0.05 * (1 - min(1, statistics.fmean(long_axis_errors)))
        + 0.05 * (1 - min(1, statistics.fmean(short_axis_errors)))
        + 0.1 * statistics.fmean(consistency)
    )


def describe(values: Sequence[float]) -> dict[str, float | int | None]:
    """The organisers' description of a score: extremes, exclusive quartiles, mean, sample deviation, count.

    Quartiles and deviation are None for a single value.
    """
    several = len(values) > 1
    quartiles = statistics.quantiles(values) if several else [None, None, None]
    return {
        "min": min(values),
        "max": max(values),
        "25pc": quartiles[0],
        "median": quartiles[1],
        "75pc": quartiles[2],
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if several else None,
        "count": len(values),
    }


def evaluate_stack(
    reference: np.ndarray,
    prediction: np.ndarray,
    single_sample: Sequence[int],
    multi_sample: Sequence[Sequence[tuple[int, int, Sequence[float]]]],
    spacing: Sequence[Sequence[float]],
    depth: int = 128,
) -> dict:
    """Scores a stack of crops as the hidden test set is evaluated.

    Args:
        reference: Crops stacked along Z, (crops * depth, Y, X).
        prediction: The same for the predictions.
        single_sample: Indices of the crops whose segmentation is scored.
        multi_sample: For each lesion with several crops, its pairs: first crop, second crop, translation (x, y, z) mm.
        spacing: Voxel size of each crop, (x, y, z) mm.
        depth: Slices of a crop.
    Returns:
        ``ChallengeScore`` and the organisers' descriptions of the four scores; ``lesions``: the scores of each lesion.
    """

    def crop(stack: np.ndarray, index: int) -> np.ndarray:
        return stack[index * depth : (index + 1) * depth]

    lesions = [lesion_scores(crop(reference, index), crop(prediction, index)) for index in single_sample]
    consistency = [
        statistics.fmean(
            consistency_dice(crop(prediction, first), crop(prediction, second), translation, spacing[first])
            for first, second, translation in pairs
        )
        for pairs in multi_sample
    ]
    scores = [[lesion[name] for lesion in lesions] for name in ("dice", "long_axis_sape", "short_axis_sape")]
    return {
        "ChallengeScore": challenge_score(*scores, consistency),
        "SegmentationDice": describe(scores[0]),
        "LongAxisErrorPercentage": describe(scores[1]),
        "ShortAxisErrorPercentage": describe(scores[2]),
        "ConsistencyDice": describe(consistency),
        "lesions": lesions,
        "consistency": consistency,
    }


def evaluate_case(reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    """Scores of a folder's case, a crop around one lesion; ``spacing`` is not used."""
    return lesion_scores(reference, prediction)


def summarise(cases: Mapping[str, dict]) -> dict:
    """The organisers' descriptions of the scores over the lesions of a folder.

    The challenge score itself needs three crops a lesion for the consistency (``evaluate_stack``); here its other
    three parts are given, divided by their weight 0.9.
    """
    scores = {
        official: [case[name] for case in cases.values()]
        for official, name in (
            ("SegmentationDice", "dice"),
            ("LongAxisErrorPercentage", "long_axis_sape"),
            ("ShortAxisErrorPercentage", "short_axis_sape"),
        )
    }
    means = [statistics.fmean(values) for values in scores.values()]
    return {
        "score_without_consistency": (0.8 * means[0] + 0.05 * (1 - means[1]) + 0.05 * (1 - means[2])) / 0.9,
        **{name: describe(values) for name, values in scores.items()},
    }
