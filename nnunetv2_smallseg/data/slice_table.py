"""Which slices of the training cases the amplified data set has, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nnunetv2_smallseg.augmentation.amplification import NUM_COPIES, amplification_thresholds
from nnunetv2_smallseg.data.lesion_table import LabelCounts

__all__ = ["SliceTable"]


@dataclass(frozen=True)
class SliceTable:
    """All slices of the training cases, and in how many copies each stands in the amplified data set.

    Attributes:
        cases: Names of the cases.
        case_of: Index of the case of each slice, (N,).
        position_of: Position of each slice in its case, (N,).
        areas: Lesion pixels of each slice, (N,).
        copies: Copies of each slice, (N,): 6 if amplified, 1 if not, 0 where no pixel is annotated.
        thresholds: N1 and N2 of the paper; lesions of fewer than N2 pixels are amplified.
    """

    cases: tuple[str, ...]
    case_of: np.ndarray
    position_of: np.ndarray
    areas: np.ndarray
    copies: np.ndarray
    thresholds: tuple[int, int]

    @classmethod
    def build(
        cls,
        counts: dict[str, LabelCounts],
        lesion_labels: Sequence[int],
        *,
        ignore_label: int | None = None,
        amplify: bool = True,
    ) -> SliceTable:
        """Lists the slices.

        Args:
            counts: Case -> pixels of its labels.
            lesion_labels: Labels that count as lesion.
            ignore_label: Label of pixels that are not annotated, or None.
            amplify: If False, every slice has one copy.
        Raises:
            ValueError: If no slice has an annotated pixel.
        """
        areas = np.concatenate([case.areas(lesion_labels) for case in counts.values()])
        thresholds = amplification_thresholds(areas)
        copies = np.where((areas > 0) & (areas < thresholds[1]) & amplify, NUM_COPIES, 1)
        if ignore_label is not None:
            annotated = [case.areas([ignore_label]) < case.slice_pixels for case in counts.values()]
            copies[~np.concatenate(annotated)] = 0
        if not copies.any():
            raise ValueError(f"no slice of the {len(counts)} training cases has an annotated pixel: annotate some")
        lengths = [case.num_slices for case in counts.values()]
        return cls(
            cases=tuple(counts),
            case_of=np.repeat(np.arange(len(lengths)), lengths),
            position_of=np.concatenate([np.arange(length) for length in lengths]),
            areas=areas,
            copies=copies,
            thresholds=thresholds,
        )

    @cached_property
    def _ends(self) -> np.ndarray:
        """Number behind the last copy of each slice, if copies are numbered through."""
        return np.cumsum(self.copies)

    @cached_property
    def _lesion_ends(self) -> np.ndarray:
        """The same where only slices with lesions have copies; where there are none, all slices have."""
        with_lesion = np.where(self.areas > 0, self.copies, 0)
        return np.cumsum(with_lesion) if with_lesion.any() else self._ends

    def draw(self, generator: np.random.Generator, lesion: bool = False) -> tuple[int, int]:
        """Draws one of all copies, each with the same probability.

        Args:
            generator: Draws.
            lesion: Draw among slices with lesions, if there are any.
        Returns:
            Index of the slice and number of its copy, from 0.
        """
        ends = self._lesion_ends if lesion else self._ends
        number = int(generator.integers(ends[-1]))
        index = int(np.searchsorted(ends, number, side="right"))
        return index, number - int(ends[index] - self.copies[index])

    def summary(self) -> str:
        """A line for the training log."""
        amplified = int(np.count_nonzero(self.copies == NUM_COPIES))
        return (
            f"Amplification: N1 = {self.thresholds[0]} and N2 = {self.thresholds[1]} pixels; {amplified} of "
            f"{np.count_nonzero(self.areas)} slices with lesions are amplified, so that {len(self.copies)} slices "
            f"count as {int(self.copies.sum())}"
        )
