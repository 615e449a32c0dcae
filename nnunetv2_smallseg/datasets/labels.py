"""Values and lesions of a label."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from nnunetv2_smallseg.errors import CaseError

__all__ = ["label_counts", "lesion_sizes"]


def label_counts(array: np.ndarray, allowed: Iterable[int]) -> tuple[dict[int, int], np.ndarray]:
    """Counts the values of a label.

    Args:
        array: Label of any numeric type.
        allowed: Values it may hold, 0 to 255.
    Returns:
        Voxels of each allowed value, and the label as unsigned 8-bit integers (``array`` itself if it is that already).
    Raises:
        CaseError: If it holds NaN, fractions, or other values.
    """
    allowed = tuple(allowed)
    if array.size == 0:
        raise CaseError("the label is empty")
    lowest, highest = array.min(), array.max()
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise CaseError("the label holds NaN or infinite values")
    if lowest < 0 or highest > 255:
        raise CaseError(f"the label holds values from {lowest:g} to {highest:g}; known values: {_listed(allowed)}")
    values = array if array.dtype == np.uint8 else array.astype(np.uint8, order="K")
    if array.dtype.kind == "f" and not np.array_equal(values, array):
        raise CaseError(f"the label holds fractions, such as {array[values != array][0]:g}: it is no label map")
    counts = np.zeros(256, np.int64)
    for part in np.moveaxis(values, int(np.argmax(values.strides)), 0):  # counting at once takes 8 bytes a voxel
        counts += np.bincount(part.ravel(order="K"), minlength=256)
    unknown = [f"{value} ({counts[value]} voxels)" for value in np.flatnonzero(counts) if value not in allowed]
    if unknown:
        raise CaseError(f"the label holds unknown values {', '.join(unknown)}; known values: {_listed(allowed)}")
    return {value: int(counts[value]) for value in allowed}, values


def _listed(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in values)


def lesion_sizes(label: np.ndarray, lesion_values: tuple[int, ...]) -> list[int]:
    """Voxels of each connected lesion, smallest first; voxels that touch at a corner are connected."""
    import cc3d

    mask = np.zeros_like(label, bool)
    for value in lesion_values:
        mask |= label == value
    if not mask.any():
        return []
    components = cc3d.connected_components(mask, connectivity=8 if label.ndim == 2 else 26)
    return sorted(int(size) for size in np.bincount(components[mask])[1:])
