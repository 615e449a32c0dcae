"""Distances between two surfaces, in mm: ASSD, Hausdorff distance, its 95th percentile, and surface Dice.

ASSD and Hausdorff distances are those between border voxels (voxels of a mask with a face neighbour outside of it, as
medpy has them); surface Dice weighs surface elements by their area, as DeepMind's surface-distance does, whose tables
of areas are used. Nearest neighbours come from a k-d tree of border points rather than from distance maps of the
volume: small lesions far apart have a large common box and few border points.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.spatial import cKDTree

from nnunetv2_smallseg.evaluation.boxes import bounding_box
from nnunetv2_smallseg.evaluation.edge_cases import value_if_empty

__all__ = ["border_voxels", "nearest_distances", "surface_dice", "surface_distances", "surface_elements"]


def border_voxels(mask: np.ndarray) -> np.ndarray:
    """Positions of the border voxels: in the mask, with a face neighbour that is not (or is outside of the array).

    Args:
        mask: Boolean, (Z, Y, X) or (Y, X).
    Returns:
        (num_voxels, mask.ndim) int64.
    """
    box = bounding_box(mask)
    if box is None:
        return np.zeros((0, mask.ndim), dtype=np.int64)
    padded = np.pad(mask[box], 1)
    inside = (slice(1, -1),) * mask.ndim
    interior = padded[inside].copy()
    for axis in range(mask.ndim):
        for shifted in (slice(0, -2), slice(2, None)):
            neighbours = list(inside)
            neighbours[axis] = shifted
            interior &= padded[tuple(neighbours)]
    return np.argwhere(padded[inside] & ~interior) + [extent.start for extent in box]


def surface_elements(mask: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The surface elements of a mask, one for each corner of the voxel grid through which its surface passes.

    Args:
        mask: Boolean, (Z, Y, X) or (Y, X).
        spacing: Voxel size in mm.
    Returns:
        (num_elements, mask.ndim) int64 positions on the grid of corners (corner i lies before voxel i), and
        (num_elements,) float64 areas in mm2 (lengths in mm in 2D).
    """
    from surface_distance import lookup_tables

    box = bounding_box(mask)
    if box is None:
        return np.zeros((0, mask.ndim), dtype=np.int64), np.zeros(0)
    if mask.ndim == 3:
        weights = np.asarray(lookup_tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL)
        areas = lookup_tables.create_table_neighbour_code_to_surface_area(spacing)
    else:
        weights = np.asarray(lookup_tables.ENCODE_NEIGHBOURHOOD_2D_KERNEL)
        areas = lookup_tables.create_table_neighbour_code_to_contour_length(spacing)
    padded = np.pad(mask[box], 1).view(np.uint8)
    # Which of the voxels around a corner belong to the mask, as a binary number.
    code = np.zeros([size - 1 for size in padded.shape], dtype=np.uint8)
    for offset in np.ndindex(*weights.shape):
        corner = tuple(slice(step, size - 1 + step) for step, size in zip(offset, padded.shape, strict=True))
        code += padded[corner] * np.uint8(weights[offset])
    on_surface = (code != 0) & (code != 2**weights.size - 1)
    return np.argwhere(on_surface) + [extent.start for extent in box], areas[code[on_surface]]


def nearest_distances(positions: np.ndarray, others: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Distance in mm from each of ``positions`` to the nearest of ``others``.

    Args:
        positions: (N, ndim) positions in voxels, N >= 1, sorted as ``np.argwhere`` gives them.
        others: (M, ndim) positions in voxels, M >= 1, sorted alike.
        spacing: Voxel size in mm.
    Returns:
        (N,) float64.
    """
    spacing = np.asarray(spacing)
    distances = np.zeros(len(positions))
    # Where a prediction is right, the surfaces coincide: nothing to search.
    extent = np.maximum(positions.max(axis=0), others.max(axis=0)) + 1
    numbers, other_numbers = (np.ravel_multi_index(tuple(points.T), extent) for points in (positions, others))
    candidates = np.minimum(np.searchsorted(other_numbers, numbers), len(other_numbers) - 1)
    apart = np.flatnonzero(other_numbers[candidates] != numbers)
    if apart.size:
        searched = positions[apart]
        tree = cKDTree(others * spacing, balanced_tree=False, compact_nodes=False)  # quicker to build
        nearest = others[tree.query(searched * spacing)[1]]
        # From whole voxel steps, so that a distance of one voxel is the spacing itself and not a rounding error more.
        distances[apart] = np.sqrt((((searched - nearest) * spacing) ** 2).sum(axis=1))
    return distances


def surface_distances(reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    """Average symmetric surface distance, Hausdorff distance and its 95th percentile.

    ASSD is the mean over the border voxels of both masks, HD95 the larger of the two directed 95th percentiles (linear
    interpolation), HD the larger of the two directed maxima.

    Args:
        reference: Boolean, (Z, Y, X) or (Y, X).
        prediction: Boolean, same shape.
        spacing: Voxel size in mm.
    Returns:
        ``assd_mm``, ``hd_mm``, ``hd95_mm``; ``nan`` if a mask is empty.
    """
    borders = border_voxels(reference), border_voxels(prediction)
    names = ("assd_mm", "hd_mm", "hd95_mm")
    if not (len(borders[0]) and len(borders[1])):
        return {name: value_if_empty(name, len(borders[0]) == 0, len(borders[1]) == 0) for name in names}
    directed = nearest_distances(*borders, spacing), nearest_distances(*borders[::-1], spacing)
    return {
        "assd_mm": float(np.concatenate(directed).mean()),
        "hd_mm": float(max(directed[0].max(), directed[1].max())),
        "hd95_mm": float(max(np.percentile(directed[0], 95), np.percentile(directed[1], 95))),
    }


def surface_dice(
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing: Sequence[float],
    tolerance_mm: float,
    both_empty: str = "undefined",
) -> float:
    """Share of both surfaces that lies within a tolerance of the other one (normalised surface distance, NSD).

    Args:
        reference: Boolean, (Z, Y, X) or (Y, X).
        prediction: Boolean, same shape.
        spacing: Voxel size in mm.
        tolerance_mm: A surface element counts if the other surface is at most this far away.
        both_empty: Rule for two empty masks, a key of ``edge_cases.BOTH_EMPTY_RULES``.
    Returns:
        Within [0, 1]; 0 if one mask is empty.
    """
    (reference_positions, reference_areas) = surface_elements(reference, spacing)
    (prediction_positions, prediction_areas) = surface_elements(prediction, spacing)
    empty = value_if_empty("nsd", len(reference_positions) == 0, len(prediction_positions) == 0, both_empty)
    if empty is not None:
        return empty
    near_reference = nearest_distances(reference_positions, prediction_positions, spacing) <= tolerance_mm
    near_prediction = nearest_distances(prediction_positions, reference_positions, spacing) <= tolerance_mm
    return float(
        (reference_areas[near_reference].sum() + prediction_areas[near_prediction].sum())
        / (reference_areas.sum() + prediction_areas.sum())
    )
