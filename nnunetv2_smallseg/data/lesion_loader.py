"""nnU-Net's data loader, with oversampled patches that show a drawn lesion in place of a drawn voxel.

Where nnU-Net oversamples foreground, it draws a case, a class and a voxel of that class, which stands in the middle of
the patch. A lesion of four times the diameter has 64 times the voxels, and is drawn that much more often than a smaller
one of the same case. Here the lesion itself is drawn, and stands anywhere in the patch. All other patches stay those of
nnU-Net.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_smallseg.data.lesion_table import Lesions, LesionTable

__all__ = ["SAMPLINGS", "LesionDataLoader", "LesionSampler", "place_patch", "size_bins"]

# What oversampled patches show: a voxel (nnU-Net), a lesion, or a lesion of a drawn size.
SAMPLINGS = ("voxel", "lesion", "size_bin")


def size_bins(diameters_mm: np.ndarray) -> np.ndarray:
    """Size bins of lesions: each doubles the diameter.

    Args:
        diameters_mm: (N,) equivalent diameters, above 0.
    Returns:
        (N,) number k of the bin from 2^k to below 2^(k + 1) mm; negative below 1 mm.
    """
    return np.floor(np.log2(diameters_mm)).astype(np.int64)


@dataclass(frozen=True)
class LesionGroup:
    """Lesions among which one is drawn.

    Attributes:
        rows: (n,) their rows in the table.
        weights: (n,) cumulative weights, or None if all weigh the same.
    """

    rows: np.ndarray
    weights: np.ndarray | None

    def draw(self) -> int:
        """Row of a lesion."""
        if self.weights is None:
            return int(self.rows[np.random.randint(len(self.rows))])  # noqa: NPY002 - seeded by nnU-Net in each worker
        place = np.random.uniform(0, self.weights[-1])  # noqa: NPY002
        # The first of those beyond: never one of weight 0, nor, by rounding, one behind the last.
        return int(self.rows[min(np.searchsorted(self.weights, place, side="right"), len(self.rows) - 1)])

    def probabilities(self) -> np.ndarray:
        """(n,) probability of each lesion to be drawn from this group."""
        if self.weights is None:
            return np.full(len(self.rows), 1 / len(self.rows))
        return np.diff(self.weights, prepend=0) / self.weights[-1]


class LesionSampler:
    """Draws lesions: a class, each alike (nnU-Net's way), then for "size_bin" a size bin, each alike, then a lesion.

    Classes and bins without lesions are left out. Random numbers come from numpy's global state, which nnU-Net seeds in
    every worker.

    Args:
        table: Lesions of the training cases.
        sampling: "lesion" or "size_bin" (``size_bins``).
        spacings: (C, 3) spacing of each case in mm, in array order; sizes of bins need it.
        classes: Indices of the classes that are lesions; None for all.
        case_probabilities: (C,) how often nnU-Net draws each case; its lesions weigh as much. None for all alike.
    Raises:
        ValueError: If ``sampling`` is another one.
    """

    def __init__(
        self,
        table: LesionTable,
        sampling: str,
        spacings: np.ndarray,
        *,
        classes: Sequence[int] | None = None,
        case_probabilities: Sequence[float] | None = None,
    ) -> None:
        if sampling not in SAMPLINGS[1:]:
            raise ValueError(f"the sampling is {sampling!r}, but must be one of {', '.join(SAMPLINGS[1:])}")
        self.sampling = sampling
        self.cases = table.cases
        self.case_of = table.case_of
        self.lesions: Lesions = table.lesions
        self.diameters_mm = table.lesions.equivalent_diameters_mm(
            np.asarray(spacings)[table.case_of], num_dimensions=table.num_dimensions
        )
        weights = None
        if case_probabilities is not None:
            weights = np.asarray(case_probabilities, dtype=np.float64)[table.case_of]
        # Class -> size bin -> its lesions. One bin of all sizes, number None, if sizes do not matter.
        self.groups: dict[int, dict[int | None, LesionGroup]] = {}
        bins = size_bins(self.diameters_mm)
        for index in range(len(table.classes)) if classes is None else classes:
            mine = table.lesions.classes == index
            if weights is not None:
                mine &= weights > 0
            numbers = np.unique(bins[mine]).tolist() if sampling == "size_bin" else [None] * bool(mine.any())
            groups = {}
            for number in numbers:
                rows = np.flatnonzero(mine if number is None else mine & (bins == number))
                groups[number] = LesionGroup(rows, None if weights is None else np.cumsum(weights[rows]))
            if groups:
                self.groups[index] = groups
        self._drawn_from = [list(groups.values()) for groups in self.groups.values()]
        self.classes = table.classes

    @property
    def is_empty(self) -> bool:
        """Whether there is no lesion to draw."""
        return not self.groups

    def draw(self) -> int:
        """Row of a lesion."""
        groups = self._drawn_from[np.random.randint(len(self._drawn_from))]  # noqa: NPY002
        return groups[np.random.randint(len(groups))].draw()  # noqa: NPY002

    def probabilities(self) -> np.ndarray:
        """(N,) probability of each lesion of the table to be drawn."""
        probabilities = np.zeros(len(self.lesions))
        for groups in self.groups.values():
            for group in groups.values():
                probabilities[group.rows] = group.probabilities() / len(groups) / len(self.groups)
        return probabilities

    def summary(self) -> str:
        """Lines for the training log: lesions and share of the draws by class and size."""
        bins, probabilities = size_bins(self.diameters_mm), self.probabilities()
        lines = []
        for index, groups in self.groups.items():
            rows = np.concatenate([group.rows for group in groups.values()])
            sizes = [
                f"{np.count_nonzero(bins[rows] == number)} of {2.0**number:g} to {2.0 ** (number + 1):g} mm "
                f"({100 * probabilities[rows][bins[rows] == number].sum():.1f} %)"
                for number in np.unique(bins[rows]).tolist()
            ]
            lines.append(
                f"  label {'+'.join(map(str, self.classes[index]))}: {len(rows)} lesions in "
                f"{len(np.unique(self.case_of[rows]))} of {len(self.cases)} cases, by diameter and share of the draws: "
                f"{', '.join(sizes)}"
            )
        return "\n".join(lines)


def place_patch(
    box: np.ndarray,
    anchor: np.ndarray,
    size: np.ndarray,
    bounds: tuple[np.ndarray, np.ndarray],
    jitter: float,
) -> np.ndarray:
    """Draws where a patch begins that shows a lesion.

    On axes on which the lesion fits into the patch, it lies inside as a whole; on the others, its anchor does.

    Args:
        box: (2, D) first voxel of the lesion and the one behind its last.
        anchor: (D,) a voxel of it.
        size: (D,) what the network sees.
        bounds: Lowest and highest beginning, (D,) each.
        jitter: 1 for all such places alike; 0 for the one in the middle; between, that share of them around it.
    Returns:
        (D,) integers.
    """
    fits = box[1] - box[0] <= size
    first = np.where(fits, box[1] - size, anchor - size + 1)
    last = np.where(fits, box[0], anchor)
    fixed = (1 - jitter) * (last - first) / 2
    first, last = first + np.floor(fixed).astype(np.int64), last - np.ceil(fixed).astype(np.int64)
    # Both limits are clipped: if no such place is allowed, the nearest that is remains.
    return np.random.randint(np.clip(first, *bounds), np.clip(last, *bounds) + 1)  # noqa: NPY002


class LesionDataLoader(nnUNetDataLoader):
    """Shows lesions that a sampler draws in the elements of a batch that nnU-Net oversamples.

    Which elements these are, how many, and all others are nnU-Net's; so is how a batch is made. For 2D patches (the
    slice is the anchor's), slabs and volumes.

    Args:
        data: The training cases.
        batch_size: Elements of a batch.
        patch_size: What transforms get, (H, W), (S, H, W) or (Z, Y, X); nnU-Net cuts more than the network sees.
        final_patch_size: What the network sees of it, in the middle.
        label_manager: Labels of the data set.
        lesions: Draws lesions of these cases.
        jitter: How far from the middle lesions may lie, 0 to 1 (``place_patch``).
        options: Further options of nnU-Net's loader.
    Raises:
        ValueError: If there is no lesion to draw, or ``jitter`` is out of range.
    """

    def __init__(
        self,
        data: nnUNetBaseDataset,
        batch_size: int,
        patch_size: Sequence[int],
        final_patch_size: Sequence[int],
        label_manager: LabelManager,
        *,
        lesions: LesionSampler,
        jitter: float,
        **options,
    ) -> None:
        if lesions.is_empty:
            raise ValueError("there is no lesion to draw: use nnU-Net's own loader")
        if not 0 <= jitter <= 1:
            raise ValueError(f"jitter is {jitter}, but must lie between 0 and 1")
        super().__init__(data, batch_size, patch_size, final_patch_size, label_manager, **options)
        self.lesions = lesions
        self.jitter = jitter
        self._nnunet_oversamples = self.get_do_oversample
        self.get_do_oversample = self._planned_oversampling
        # What the elements of this batch show, a row of the sampler's lesions or None, and what the current one does.
        self._planned: list[int | None] = [None] * batch_size
        self._current: int | None = None

    def get_indices(self) -> np.ndarray:
        """Cases of the next batch: nnU-Net's, and those of drawn lesions for the elements it oversamples."""
        cases = super().get_indices()
        self._planned = [
            self.lesions.draw() if self._nnunet_oversamples(element) else None for element in range(len(cases))
        ]
        for element, lesion in enumerate(self._planned):
            if lesion is not None:
                cases[element] = self.lesions.cases[self.lesions.case_of[lesion]]
        return cases

    def _planned_oversampling(self, element: int) -> bool:
        """Whether an element shows foreground, as planned; nnU-Net asks before it places the element's patch."""
        self._current = self._planned[element]
        return self._current is not None

    def get_bbox(self, data_shape: Sequence[int], force_fg: bool, class_locations: dict | None, *arguments, **options):
        """Where the patch of the current element lies: beginning and end, lists of one number for each axis."""
        if not force_fg or self._current is None:
            return super().get_bbox(data_shape, force_fg, class_locations, *arguments, **options)
        patch_size, shape = np.array(self.patch_size), np.array(data_shape)
        box, anchors = self.lesions.lesions.boxes[self._current], self.lesions.lesions.anchors_of(self._current)
        anchor = anchors[np.random.randint(len(anchors))].astype(np.int64)  # noqa: NPY002
        # What the network sees begins here inside of the patch.
        seen = np.array(self.final_patch_size)
        margin = patch_size // 2 - seen // 2
        # Beginnings that nnU-Net allows: half of what it pads may lie outside.
        padding = np.maximum(self.need_to_pad, patch_size - shape)
        outside = (padding + 1) // 2
        bounds = margin - outside, margin + shape + outside - patch_size
        beginning = (place_patch(box, anchor, seen, bounds, self.jitter) - margin).tolist()
        return beginning, [first + int(size) for first, size in zip(beginning, patch_size, strict=True)]
