"""Which lesions vanish from nnU-Net's targets of the lower deep-supervision levels.

nnU-Net makes these targets by nearest-neighbour downsampling (``DownsampleSegForDSTransform``, mode nearest-exact): of
every block of f voxels along an axis one is kept. Where the patch begins decides which one. Over all places of the
patch, every residue of the coordinates modulo f is kept equally often, so that a lesion vanishes at the share of the
residues that none of its voxels has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["Residues", "downsampling_factors", "level_weights"]


def downsampling_factors(configuration: Mapping) -> list[tuple[int, int, int]]:
    """Voxels per voxel of the target of every deep-supervision level, from full to low resolution.

    nnU-Net supervises all stages but the lowest (``nnUNetTrainer._get_deep_supervision_scales``). Slices of ``2d`` and
    ``2.5d`` are never pooled.

    Args:
        configuration: A configuration of the plans with inheritance resolved.
    Returns:
        (z, y, x) for each level.
    """
    strides = configuration["architecture"]["arch_kwargs"]["strides"]
    strides = [[stride] * len(configuration["spacing"]) if isinstance(stride, int) else stride for stride in strides]
    factors = np.cumprod(np.asarray(strides), axis=0)[:-1]
    return [(*(1,) * (3 - len(factor)), *(int(value) for value in factor)) for factor in factors]


def level_weights(number: int) -> list[float]:
    """Weights of the levels in nnU-Net's loss: halved from level to level, 0 for the last, sum 1.

    ``nnUNetTrainer._build_loss``; a single level has weight 1 here.
    """
    if number < 2:
        return [1.0] * number
    weights = np.array([0.5**level for level in range(number - 1)] + [0.0])
    return [float(weight) for weight in weights / weights.sum()]


class Residues:
    """Counts the residues that the voxels of a lesion have modulo the factors of one level.

    Args:
        factor: Voxels per voxel of the target, (z, y, x).
    """

    def __init__(self, factor: Sequence[int]) -> None:
        self.factor = tuple(factor)
        self._seen = np.zeros(self.factor, dtype=bool)
        self._section_shares: list[float] = []

    def add_section(self, z: int, y: np.ndarray, x: np.ndarray) -> None:
        """Adds the voxels of a lesion in slice ``z``: their rows and columns, (N,) each."""
        _, rows, columns = self.factor
        plane = np.zeros((rows, columns), dtype=bool)
        plane[y % rows, x % columns] = True
        self._seen[z % self.factor[0]] |= plane
        self._section_shares.append(1.0 - np.count_nonzero(plane) / plane.size)

    @property
    def lesion_share(self) -> float:
        """Share of the places of the grid at which nothing of the lesion is left, within [0, 1)."""
        return 1.0 - np.count_nonzero(self._seen) / self._seen.size

    @property
    def section_share(self) -> float:
        """The same for the lesion's part in one slice, mean over its slices."""
        return float(np.mean(self._section_shares))
