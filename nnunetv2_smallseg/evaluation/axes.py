"""RECIST-like long and short axis of a lesion, as the organisers of ULS23 measure them, without their quadratic loop.

Rules: ``reference/datasets/METRICS.md`` of the reference folder, after ``uls23/evaluation`` (06a2bff). Lengths are
distances of pixel centres: one less than a count of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from nnunetv2_smallseg.evaluation.boxes import bounding_box
from nnunetv2_smallseg.evaluation.surface_metrics import border_voxels

__all__ = ["recist_axes"]

# Pairs of pixels compared at a time: bounds the memory for large lesions.
PAIRS_AT_A_TIME = 4_000_000


def recist_axes(mask: np.ndarray, spacing: Sequence[float] | None = None) -> tuple[float, float]:
    """Long and short axis of a lesion.

    In every slice with foreground the largest 4-connected component counts (the first of several). The long axis is
    the largest distance of two of its border pixels; the slice with the largest wins, the first of several. The short
    axis is the longest segment between two border pixels of that slice at less than 1 degree from the perpendicular
    to the long axis; 2, 3, ... degrees if there is none. It need not lie inside the lesion.

    Args:
        mask: Boolean, (Z, Y, X) with slices along Z, or (Y, X).
        spacing: Size of a pixel in mm, (Y, X); 1 by default.
    Returns:
        Lengths in mm, in pixels without ``spacing``; both 0 if the mask is empty or no slice has two pixels.
    """
    pixel = np.ones(2) if spacing is None else np.asarray(spacing, dtype=float)
    box = bounding_box(mask)
    if box is None:
        return 0.0, 0.0
    best_squared, best_border, best_pair = 0.0, None, None
    for plane in mask[box] if mask.ndim == 3 else [mask[box]]:
        if _diagonal_squared(plane, pixel) <= best_squared:  # cannot be strictly longer
            continue
        border = border_voxels(_largest_component(plane))
        squared, pair = _farthest_pair(border, pixel)
        if squared > best_squared:
            best_squared, best_border, best_pair = squared, border, pair
    if best_border is None:
        return 0.0, 0.0
    return float(np.sqrt(best_squared)), _short_axis(best_border * pixel, (best_pair[1] - best_pair[0]) * pixel)


def _diagonal_squared(plane: np.ndarray, pixel: np.ndarray) -> float:
    """Squared diagonal of the box of a slice, through the centres of its corner pixels; -1 if the slice is empty."""
    box = bounding_box(plane)
    if box is None:
        return -1.0
    return float(sum(((extent.stop - extent.start - 1) * size) ** 2 for extent, size in zip(box, pixel, strict=True)))


def _largest_component(plane: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(plane)  # faces only: 4-connected
    if count < 2:
        return plane
    return labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])


def _farthest_pair(border: np.ndarray, pixel: np.ndarray) -> tuple[float, tuple[np.ndarray, np.ndarray]]:
    """Largest squared distance of two pixels and the first pair (in the order of ``border``) that has it.

    Both ends of such a pair are corners of the convex hull, hence the first or last pixel of their row.
    """
    first_of_row = np.flatnonzero(np.diff(border[:, 0], prepend=-1))
    last_of_row = np.append(first_of_row[1:], len(border)) - 1
    ends = border[np.unique(np.concatenate([first_of_row, last_of_row]))]
    squared = np.zeros((len(ends), len(ends)))
    for axis in range(2):
        squared += (np.subtract.outer(ends[:, axis], ends[:, axis]) * pixel[axis]) ** 2
    start, stop = np.unravel_index(np.argmax(squared), squared.shape)
    return float(squared[start, stop]), (ends[start], ends[stop])


def _short_axis(points: np.ndarray, long_axis: np.ndarray) -> float:
    """Length of the longest segment between two points whose angle to ``long_axis`` is nearest enough to 90 degrees."""
    rows = max(1, PAIRS_AT_A_TIME // len(points))
    best_degrees, best_squared = np.inf, 0.0
    long_length = np.hypot(*long_axis)
    for first in range(0, len(points), rows):
        last = min(first + rows, len(points))
        # (rows, points): from each of these points to every point from the first on.
        down, right = (np.subtract.outer(points[first:last, axis], points[first:, axis]) for axis in range(2))
        squared = down**2 + right**2
        sine = np.abs(down * long_axis[0] + right * long_axis[1])  # of the deviation from the perpendicular
        apart = squared > 0
        np.divide(sine, np.sqrt(squared) * long_length, out=sine, where=apart)
        sine[~apart] = np.inf
        smallest = _degrees_needed(sine.min())
        if smallest > best_degrees or not apart.any():
            continue
        if smallest < best_degrees:
            best_degrees, best_squared = smallest, 0.0
        # The sine decides quickly, the angle itself in the few cases close to the limit.
        near = sine < np.sin(np.radians(min(best_degrees + 1e-6, 90))) + 1e-9
        fitting = squared[near][_degrees_needed(sine[near]) <= best_degrees]
        best_squared = max(best_squared, float(fitting.max(initial=0.0)))
    return float(np.sqrt(best_squared))


def _degrees_needed(sine: np.ndarray) -> np.ndarray:
    """The first of 1, 2, 3, ... degrees that is above the deviation of a segment."""
    return np.floor(np.degrees(np.arcsin(np.clip(sine, 0.0, 1.0)))) + 1
