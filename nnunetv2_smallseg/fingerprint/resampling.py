"""Which lesions vanish when nnU-Net resamples the labels to the target spacing.

Labels are resampled as nnU-Net's ``resample_data_or_seg_to_shape`` does with order 1: every label is interpolated
linearly and the largest wins. It is done for the box around the foreground only, on the grid of the whole image, which
takes a fraction of the time and memory that the whole image takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Resampled", "describe_resampled", "resample_labels", "surviving_components"]


@dataclass(frozen=True)
class _Axis:
    """How the new voxels of an axis lie between the old ones: (n,) each; indices count from the image's beginning."""

    new: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    nearest: np.ndarray
    weight: np.ndarray  # of ``upper``


@dataclass(frozen=True)
class Resampled:
    """Resampled labels.

    Attributes:
        labels: The part of the new label map that can hold foreground, (Z, Y, X).
        offset: Where the part begins in the new label map, (z, y, x).
        shape: Voxels of the whole new label map.
        axes: How new voxels lie between old ones, one an axis.
    """

    labels: np.ndarray
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    axes: tuple[_Axis, ...]


def _axis(size: int, new_size: int, begin: int, end: int, nearest_only: bool) -> _Axis:
    """The new voxels that old ones within [begin, end) can influence."""
    positions = np.clip((np.arange(new_size) + 0.5) * (size / new_size) - 0.5, 0, size - 1)
    lower = np.floor(positions).astype(np.int64)
    upper = np.minimum(lower + 1, size - 1)
    nearest = np.minimum(np.floor(positions + 0.5).astype(np.int64), size - 1)
    weight = positions - lower
    if nearest_only:
        lower = upper = nearest
        weight = np.zeros_like(weight)
    new = np.flatnonzero((upper >= begin) & (lower < end))
    return _Axis(new, lower[new], upper[new], nearest[new], weight[new])


def _take(array: np.ndarray, indices: Sequence[np.ndarray], offset: Sequence[int]) -> np.ndarray:
    """Voxels of a part of an image at a grid of indices; 0 outside of the part."""
    for axis, (index, begin) in enumerate(zip(indices, offset, strict=True)):
        index = index - begin
        outside = (index < 0) | (index >= array.shape[axis])
        array = np.take(array, np.where(outside, 0, index), axis=axis)
        if outside.any():
            array[(slice(None),) * axis + (outside,)] = 0
    return array


def resample_labels(
    labels: np.ndarray,
    offset: Sequence[int],
    shape: Sequence[int],
    new_shape: Sequence[int],
    separate_axis: int | None = None,
) -> Resampled:
    """Resamples the foreground of a label map.

    Args:
        labels: The part of a label map that holds all foreground, (Z, Y, X), an integer type; 0 is background.
        offset: Where the part begins in the label map, (z, y, x).
        shape: Voxels of the whole label map.
        new_shape: Voxels it is resampled to.
        separate_axis: Axis along which nnU-Net takes the nearest slice instead of interpolating (thick slices).
    """
    ends = [begin + size for begin, size in zip(offset, labels.shape, strict=True)]
    axes = tuple(
        _axis(*sizes, nearest_only=axis == separate_axis)
        for axis, sizes in enumerate(zip(shape, new_shape, offset, ends, strict=True))
    )
    values = np.unique(labels)
    nearest = _take(labels, [axis.nearest for axis in axes], offset)
    result = np.zeros(nearest.shape, dtype=labels.dtype)
    best = np.zeros(nearest.shape)
    for value in np.union1d([0], values):
        # Outside of the part everything is background.
        score = (labels == value).astype(np.float64) if value else (labels != 0).astype(np.float64)
        for number, axis in enumerate(axes):
            begin = [offset[number] if position == number else 0 for position in range(3)]
            whole = [np.arange(size) for size in score.shape]
            lower, upper = (
                _take(score, [*whole[:number], index, *whole[number + 1 :]], begin)
                for index in (axis.lower, axis.upper)
            )
            weight = axis.weight.reshape([-1 if position == number else 1 for position in range(3)])
            score = lower * (1 - weight) + upper * weight
        if not value:
            score = 1 - score
        # Of labels with the same score the one of the nearest voxel wins, else the smallest.
        wins = (score > best) | ((score == best) & (score > 0) & (nearest == value))
        result[wins] = value
        np.maximum(best, score, out=best)
    begins = tuple(int(axis.new[0]) if axis.new.size else 0 for axis in axes)  # none between two new slices
    return Resampled(result, begins, tuple(int(size) for size in new_shape), axes)


def surviving_components(
    resampled: Resampled, mask: np.ndarray, components: np.ndarray, offset: Sequence[int]
) -> np.ndarray:
    """The numbers of the components of which a voxel is left.

    A new voxel has a label only if one of the old voxels around it has. Old voxels around one new voxel touch each
    other, so that those of one region belong to the same component.

    Args:
        resampled: The resampled labels.
        mask: Voxels of the region in ``resampled.labels``.
        components: Numbers of the region's components in the part of the old label map, (Z, Y, X); 0 is background.
        offset: Where that part begins in the old label map.
    Returns:
        Sorted, without 0.
    """
    places = np.nonzero(mask)
    numbers = np.zeros(len(places[0]), dtype=components.dtype)
    for corner in range(8):
        indices = []
        for number, (axis, place, begin) in enumerate(zip(resampled.axes, places, offset, strict=True)):
            index = (axis.upper if corner >> number & 1 else axis.lower)[place] - begin
            indices.append(index)
        inside = np.all(
            [(index >= 0) & (index < size) for index, size in zip(indices, components.shape, strict=True)], 0
        )
        found = components[tuple(np.where(inside, index, 0) for index in indices)]
        numbers = np.maximum(numbers, np.where(inside, found, 0))
    return np.setdiff1d(numbers, [0])


def describe_resampled(labels: np.ndarray, old_shape: Sequence[int]) -> Resampled:
    """A whole label map that something else resampled, for ``surviving_components``.

    Args:
        labels: The new label map, (Z, Y, X).
        old_shape: Voxels it had before.
    """
    axes = tuple(
        _axis(size, new_size, 0, size, nearest_only=False)
        for size, new_size in zip(old_shape, labels.shape, strict=True)
    )
    return Resampled(labels, (0, 0, 0), labels.shape, axes)
