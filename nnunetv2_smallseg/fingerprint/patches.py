"""How often nnU-Net's data loader shows a lesion: the closed form.

``nnUNetDataLoader`` draws a case uniformly for every patch of a batch. The last third of the batch is centred on a
voxel drawn uniformly from a class drawn uniformly among those of the case (oversampling 33 %); the rest lies anywhere.
With an ignore label the rest is centred on a voxel drawn uniformly from all annotated ones. A patch is drawn larger
than the network's, for rotation and scaling; without these the network sees its middle, which is what counts here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Box", "Locations", "PatchGrid", "Schedule"]

# nnUNetTrainer.oversample_foreground_percent and .num_iterations_per_epoch
OVERSAMPLING, ITERATIONS = 0.33, 250

# Half-open intervals [begin, end) in voxels along z, y and x.
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Schedule:
    """How many patches of which kind an epoch has.

    Attributes:
        batch_size: Patches in a batch.
        num_training_cases: Cases a patch is drawn from.
        iterations: Batches in an epoch.
        oversampling: Share of the patches that hold foreground for sure.
    """

    batch_size: int
    num_training_cases: float
    iterations: int = ITERATIONS
    oversampling: float = OVERSAMPLING

    @property
    def random_patches(self) -> int:
        """Patches of a batch that lie anywhere (``nnUNetDataLoader._oversample_last_XX_percent``)."""
        return round(self.batch_size * (1 - self.oversampling))

    @property
    def foreground_patches(self) -> int:
        """Patches of a batch that are centred on foreground."""
        return self.batch_size - self.random_patches

    def seen_per_epoch(self, random: np.ndarray, foreground: np.ndarray) -> np.ndarray:
        """Probability that a lesion is seen at least once in an epoch, all draws being independent.

        Args:
            random: Probability that a random patch of the lesion's case shows it.
            foreground: The same for a patch centred on foreground.
        """
        missed_randomly = (1 - np.asarray(random) / self.num_training_cases) ** self.random_patches
        missed_in_foreground = (1 - np.asarray(foreground) / self.num_training_cases) ** self.foreground_patches
        return 1 - (missed_randomly * missed_in_foreground) ** self.iterations

    def views_per_epoch(self, random: np.ndarray, foreground: np.ndarray) -> np.ndarray:
        """Expected number of patches of an epoch that show a lesion; arguments as in ``seen_per_epoch``."""
        in_batch = self.random_patches * np.asarray(random) + self.foreground_patches * np.asarray(foreground)
        return self.iterations * in_batch / self.num_training_cases


@dataclass(frozen=True)
class PatchGrid:
    """Where nnU-Net can place a patch in an image (``nnUNetDataLoader.get_bbox``).

    Attributes:
        shape: Voxels of the image, (z, y, x).
        drawn: Size of the patch that is drawn, (z, y, x).
        seen: Size of its middle, which the network sees, (z, y, x).
    """

    shape: tuple[int, ...]
    drawn: tuple[int, ...]
    seen: tuple[int, ...]

    def _starts(self, axis: int) -> tuple[int, int]:
        """First and last place at which the drawn patch can begin."""
        padding = self.drawn[axis] - self.seen[axis]
        padding = max(padding, self.drawn[axis] - self.shape[axis])
        last = self.shape[axis] + padding // 2 + padding % 2 - self.drawn[axis]
        return -padding // 2, last

    def _middle(self, axis: int) -> int:
        """Voxels between the beginnings of the drawn patch and of its middle."""
        return (self.drawn[axis] - self.seen[axis]) // 2

    def _random_share(self, axis: int, lowest: int, highest: int) -> float:
        """Share of all places at which the middle begins within [lowest, highest]."""
        first, last = (start + self._middle(axis) for start in self._starts(axis))
        return max(0, min(last, highest) - max(first, lowest) + 1) / (last - first + 1)

    def _centres(self, axis: int, lowest: int, highest: int) -> tuple[int, int]:
        """The voxels [begin, end) that, as centre of a patch, let its middle begin within [lowest, highest]."""
        first, half, middle = self._starts(axis)[0], self.drawn[axis] // 2, self._middle(axis)
        size = self.shape[axis]
        if first + middle > highest:
            return 0, 0
        # A centre near the beginning of the image leaves the patch at its first place.
        begin = 0 if first + middle >= lowest else lowest - middle + half
        return max(begin, 0), min(highest - middle + half + 1, size)

    def shown_at_random(self, box: Box) -> float:
        """Probability that a patch placed anywhere shows some of a box."""
        return float(np.prod([self._random_share(axis, begin - self.seen[axis] + 1, end - 1)
                              for axis, (begin, end) in enumerate(box)]))  # fmt: skip

    def whole_at_random(self, box: Box) -> float:
        """Probability that a patch placed anywhere shows all of a box."""
        return float(np.prod([self._random_share(axis, end - self.seen[axis], begin)
                              for axis, (begin, end) in enumerate(box)]))  # fmt: skip

    def centres_showing(self, box: Box) -> Box:
        """The voxels on which a patch can be centred to show some of a box."""
        return tuple(self._centres(axis, begin - self.seen[axis] + 1, end - 1) for axis, (begin, end) in enumerate(box))

    def centres_of_whole(self, box: Box) -> Box:
        """The voxels on which a patch can be centred to show all of a box; none along an axis it is too large for."""
        return tuple(self._centres(axis, end - self.seen[axis], begin) for axis, (begin, end) in enumerate(box))


class Locations:
    """Voxels a patch is centred on with equal probability; counts those within boxes.

    Args:
        coordinates: (N, 3) integers along z, y and x.
    """

    def __init__(self, coordinates: np.ndarray) -> None:
        coordinates = np.asarray(coordinates).reshape(-1, 3)
        self._coordinates = coordinates[np.argsort(coordinates[:, 0], kind="stable")]

    def __len__(self) -> int:
        return len(self._coordinates)

    def share(self, box: Box) -> float:
        """Share of the voxels that lie within a box; 0 if there are none."""
        if not len(self):
            return 0.0
        first, last = np.searchsorted(self._coordinates[:, 0], box[0])
        part = self._coordinates[first:last]
        inside = np.ones(len(part), dtype=bool)
        for axis in (1, 2):
            inside &= (part[:, axis] >= box[axis][0]) & (part[:, axis] < box[axis][1])
        return np.count_nonzero(inside) / len(self)

    def shares_of(self, components: np.ndarray, offset: Sequence[int]) -> np.ndarray:
        """Share of the voxels that lie in each component.

        Args:
            components: Component numbers in a part of the image that holds all the voxels, (Z, Y, X); 0 is none.
            offset: Where the part begins in the image.
        Returns:
            (1 + highest number,), the first for voxels of no component.
        """
        highest = int(components.max(initial=0))
        if not len(self):
            return np.zeros(highest + 1)
        numbers = components[tuple((self._coordinates - np.asarray(offset)).T)]
        return np.bincount(numbers, minlength=highest + 1) / len(self)
