"""ATLAS 2023 (liver and tumour in contrast-enhanced MRI; not the stroke data set): nine scores and the ranking.

From the organisers' web site and the ``calculate_metrics.py`` they ship. Their ``evaluator.py`` is not public, so two
things follow other code: surface Dice is DeepMind's, distances are medpy's, and a case without tumour in one of the
maps has no distance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nnunetv2_smallseg.evaluation.edge_cases import value_if_empty
from nnunetv2_smallseg.evaluation.surface_metrics import surface_dice, surface_distances

__all__ = ["REGIONS", "SURFACE_TOLERANCE_MM", "evaluate_case", "rank", "summarise"]

REGIONS: dict[str, tuple[int, ...]] = {"liver": (1, 2), "tumour": (2,)}
SURFACE_TOLERANCE_MM = 5.0
# Score -> whether a larger value is better.
SCORES: dict[str, bool] = {"dice": True, "surface_dice_5mm": True, "assd_mm": False, "hausdorff_mm": False}


def evaluate_case(reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]) -> dict:
    """Scores of one case.

    Args:
        reference: Labels, (Z, Y, X): 1 liver, 2 tumour.
        prediction: The same for the prediction.
        spacing: Voxel size in mm, in array order.
    Returns:
        ``liver`` (both labels) and ``tumour``, each with ``dice``, ``hausdorff_mm``, ``assd_mm``,
        ``surface_dice_5mm``, None where undefined; ``burden_ref`` and ``burden_pred``: tumour voxels / liver voxels.
    """
    scores: dict = {}
    for name, labels in REGIONS.items():
        masks = np.isin(reference, labels), np.isin(prediction, labels)
        sizes = [int(mask.sum()) for mask in masks]
        empty = value_if_empty("dice", not sizes[0], not sizes[1])
        distances = surface_distances(*masks, spacing)
        values = {
            "dice": 2 * int((masks[0] & masks[1]).sum()) / sum(sizes) if empty is None else empty,
            "hausdorff_mm": distances["hd_mm"],
            "assd_mm": distances["assd_mm"],
            "surface_dice_5mm": surface_dice(*masks, spacing, SURFACE_TOLERANCE_MM),
        }
        scores[name] = {metric: value if np.isfinite(value) else None for metric, value in values.items()}
    for key, labels in (("burden_ref", reference), ("burden_pred", prediction)):
        liver = int(np.isin(labels, REGIONS["liver"]).sum())
        scores[key] = int((labels == 2).sum()) / liver if liver else 0.0
    return scores


def summarise(cases: Mapping[str, dict]) -> dict:
    """Means over the cases that have the score, with their number, and the root mean square error of the burden."""
    summary: dict = {}
    for region in REGIONS:
        for score in SCORES:
            values = [case[region][score] for case in cases.values() if case[region][score] is not None]
            summary[f"{region}_{score}"] = {
                "mean": float(np.mean(values)) if values else None,
                "num_cases": len(values),
            }
    errors = [case["burden_ref"] - case["burden_pred"] for case in cases.values()]
    summary["rmse_tumour_burden"] = float(np.sqrt(np.mean(np.square(errors))))
    return summary


def rank(teams: Mapping[str, Mapping[str, float]]) -> dict[str, int]:
    """Final ranks: each of the nine scores ranked over the teams (ties share a rank, gaps follow), ranks summed.

    Args:
        teams: Team -> score, with the keys ``liver_dice``, ..., ``tumour_hausdorff_mm``, ``rmse_tumour_burden``.
    Returns:
        Team -> rank, 1 is best.
    """
    larger = {f"{region}_{score}": better for region in REGIONS for score, better in SCORES.items()}
    larger["rmse_tumour_burden"] = False
    sums = dict.fromkeys(teams, 0)
    for score, better in larger.items():
        keys = {name: -values[score] if better else values[score] for name, values in teams.items()}
        for name in teams:
            sums[name] += 1 + sum(key < keys[name] for key in keys.values())
    return {name: 1 + sum(other < total for other in sums.values()) for name, total in sums.items()}
