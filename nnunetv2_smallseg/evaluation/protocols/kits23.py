"""KiTS23 (Kidney and Kidney Tumor Segmentation, 2023): Dice and surface Dice of three nested regions, and the ranking.

Official code: https://github.com/neheller/kits23 (commit c108835), ``kits23/evaluation``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nnunetv2_smallseg.evaluation.surface_metrics import surface_dice

__all__ = ["REGIONS", "TOLERANCES_MM", "Rank", "case_scores", "evaluate_case", "rank", "summarise"]

# Hierarchical evaluation classes: 1 kidney, 2 tumour, 3 cyst.
REGIONS: dict[str, tuple[int, ...]] = {"kidney_and_mass": (1, 2, 3), "mass": (2, 3), "tumor": (2,)}
TOLERANCES_MM: dict[str, float] = {
    "kidney_and_mass": 1.0330772532390826,
    "mass": 1.1328796488598762,
    "tumor": 1.1498198361434828,
}


def case_scores(reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]) -> dict[str, dict[str, float]]:
    """Scores of one case.

    Args:
        reference: Labels, (Z, Y, X): 1 kidney, 2 tumour, 3 cyst; other values are background.
        prediction: The same for the prediction.
        spacing: Voxel size in mm of the prediction, in array order.
    Returns:
        ``dice`` and ``surface_dice``, each by region; 1 if the region is empty in both, 0 if it is empty in one.
    """
    scores: dict[str, dict[str, float]] = {"dice": {}, "surface_dice": {}}
    for name, labels in REGIONS.items():
        masks = np.isin(reference, labels), np.isin(prediction, labels)
        total = int(masks[0].sum()) + int(masks[1].sum())
        scores["dice"][name] = 2 * int((masks[0] & masks[1]).sum()) / total if total else 1.0
        scores["surface_dice"][name] = surface_dice(*masks, spacing, TOLERANCES_MM[name], both_empty="one")
    return scores


def evaluate_case(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]
) -> dict[str, dict[str, float]]:
    """The same as ``case_scores``, under the name all protocols share."""
    return case_scores(reference, prediction, spacing)


def summarise(cases: Mapping[str, dict]) -> dict:
    """Plain means over the cases, by the official column names, and the two means the ranking uses."""
    columns = {}
    for prefix, metric in (("Dice", "dice"), ("SD", "surface_dice")):
        for column, name in (("kidney", "kidney_and_mass"), ("masses", "mass"), ("tumor", "tumor")):
            columns[f"{prefix}_{column}"] = float(np.mean([case[metric][name] for case in cases.values()]))
    values = list(columns.values())
    return {**columns, "mean_dice": float(np.mean(values[:3])), "mean_surface_dice": float(np.mean(values[3:]))}


@dataclass(frozen=True)
class Rank:
    """A row of the official ranking."""

    team: str
    final_rank: int
    mean_rank: float
    mean_dice: float
    mean_surface_dice: float
    tumor_dice: float


def rank(teams: Mapping[str, Sequence[float]]) -> list[Rank]:
    """Ranks teams by the official rule.

    Mean Dice and mean surface Dice are ranked, the two ranks averaged and ranked again; ties are broken by the tumour
    Dice only, and teams that share it too share the rank.

    Args:
        teams: Team -> Dice of kidney, masses, tumour, then surface Dice of the same.
    Returns:
        Best first.
    """
    rows = {name: (sum(values[:3]) / 3, sum(values[3:]) / 3, values[2]) for name, values in teams.items()}

    def position(name: str, column: int) -> int:
        return 1 + sum(other[column] > rows[name][column] for other in rows.values())

    mean_ranks = {name: (position(name, 0) + position(name, 1)) / 2 for name in rows}
    keys = {name: (mean_ranks[name], -rows[name][2]) for name in rows}
    ranking = [
        Rank(name, 1 + sum(key < keys[name] for key in keys.values()), mean_ranks[name], *rows[name]) for name in rows
    ]
    return sorted(ranking, key=lambda row: row.final_rank)
