"""Lesions as connected components, or as instances drawn by the annotators."""

from __future__ import annotations

from dataclasses import dataclass

import cc3d
import numpy as np

from nnunetv2_smallseg.errors import UsageError

__all__ = ["CONNECTIVITIES", "Components", "connected_components", "connectivity_for", "instance_components"]

# Number of dimensions -> connectivities; the last one, with corners, is the default.
CONNECTIVITIES: dict[int, tuple[int, ...]] = {2: (4, 8), 3: (6, 18, 26)}


@dataclass(frozen=True)
class Components:
    """Numbered components of a mask.

    Attributes:
        labels: Component numbers from 1 without gaps, 0 is background; shape of the mask.
        numbers: (num_components,) number of each component in the tables.
    """

    labels: np.ndarray
    numbers: np.ndarray

    @property
    def count(self) -> int:
        """Number of components."""
        return len(self.numbers)

    def statistics(self) -> tuple[np.ndarray, list[tuple[slice, ...]], np.ndarray]:
        """Voxels (count,), bounding boxes, and centroids (count, ndim) in voxels, ordered by number."""
        if not self.count:  # cc3d describes no empty array
            return np.zeros(0, dtype=np.int64), [], np.zeros((0, self.labels.ndim))
        facts = cc3d.statistics(self.labels)
        return facts["voxel_counts"][1:], facts["bounding_boxes"][1:], facts["centroids"][1:]


def connectivity_for(num_dimensions: int, connectivity: int | None = None) -> int:
    """The connectivity to use: 26 in 3D and 8 in 2D unless another is given.

    Raises:
        UsageError: If the connectivity does not exist in that dimension.
    """
    allowed = CONNECTIVITIES[num_dimensions]
    if connectivity is not None and connectivity not in allowed:
        raise UsageError(
            f"the connectivity {connectivity} does not exist in {num_dimensions}D: "
            f"use one of {', '.join(map(str, allowed))}"
        )
    return connectivity or allowed[-1]


def connected_components(mask: np.ndarray, connectivity: int | None = None) -> Components:
    """Components of a mask.

    Args:
        mask: Boolean, (Z, Y, X) or (Y, X).
        connectivity: 6, 18 or 26 in 3D, 4 or 8 in 2D; 26 or 8 by default.
    """
    connectivity = connectivity_for(mask.ndim, connectivity)
    if not mask.any():
        return Components(np.zeros(mask.shape, dtype=np.uint32), np.zeros(0, dtype=np.int64))
    # As integers: for boolean masks and 8 neighbours cc3d 4.1.1 returns wrong labels or stops.
    integers = np.ascontiguousarray(mask).view(np.uint8)
    labels, count = cc3d.connected_components(integers, connectivity=connectivity, return_N=True)
    return Components(labels, np.arange(1, count + 1))


def instance_components(mask: np.ndarray, instances: np.ndarray, connectivity: int | None = None) -> Components:
    """Lesions by a map of instances: voxels of the mask with the same instance number are one lesion.

    Voxels of the mask without an instance form connected components of their own, so that nothing is lost.

    Args:
        mask: Boolean, (Z, Y, X) or (Y, X).
        instances: Instance numbers, 0 is none; shape of the mask.
        connectivity: For voxels without an instance.
    """
    numbers = np.unique(instances[mask])
    numbers = numbers[numbers > 0].astype(np.int64)
    labels = np.where(mask & (instances > 0), np.searchsorted(numbers, instances) + 1, 0).astype(np.uint32)
    rest = connected_components(mask & (instances == 0), connectivity)
    if rest.count:
        labels = np.where(rest.labels > 0, rest.labels.astype(np.uint32) + np.uint32(len(numbers)), labels)
    first = numbers.max(initial=0) + 1
    return Components(labels, np.concatenate([numbers, np.arange(first, first + rest.count)]))
