"""How many pixels of each label every slice of a data set has, counted once and kept beside the preprocessed data.

nnU-Net's own ``class_locations`` hold a sample of the voxels of each class and cannot tell areas.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset

from nnunetv2_smallseg.augmentation.amplification import NUM_COPIES, amplification_thresholds
from nnunetv2_smallseg.files import replacing

__all__ = ["LabelCounts", "SliceTable", "cache_file", "count_labels", "read_counts"]

logger = logging.getLogger(__name__)

# Names of the preprocessed segmentation of a case, as nnU-Net's two kinds of data sets write it.
SEGMENTATION_ENDINGS = ("_seg.b2nd", "_seg.npy", ".npz")


@dataclass(frozen=True)
class LabelCounts:
    """Pixels of each label in the slices of a case.

    Attributes:
        num_slices: Slices Z of the case.
        slice_pixels: Pixels of a slice.
        labels: Label above 0 -> slice -> number of pixels; slices without the label are left out.
    """

    num_slices: int
    slice_pixels: int
    labels: dict[int, dict[int, int]]

    def areas(self, labels: Sequence[int]) -> np.ndarray:
        """Pixels of any of ``labels`` in each slice, (Z,) int64."""
        areas = np.zeros(self.num_slices, dtype=np.int64)
        for label in labels:
            for position, pixels in self.labels.get(label, {}).items():
                areas[position] += pixels
        return areas


def count_labels(segmentation: np.ndarray) -> LabelCounts:
    """Counts slice by slice.

    Args:
        segmentation: (1, Z, Y, X) or more channels, of which the first counts; numpy or Blosc2. Labels of 0 and below
            are not counted: background, and -1 outside of the image.
    """
    _, num_slices, height, width = segmentation.shape
    labels: dict[int, dict[int, int]] = {}
    for position in range(num_slices):
        pixels = np.asarray(segmentation[0, position])
        counts = np.bincount(pixels[pixels > 0].astype(np.int64))
        for label in np.flatnonzero(counts):
            labels.setdefault(int(label), {})[position] = int(counts[label])
    return LabelCounts(num_slices, height * width, labels)


def cache_file(dataset: nnUNetBaseDataset) -> Path:
    """Where the counts of a data set and configuration are kept: beside its folder, which must hold cases only."""
    folder = Path(dataset.source_folder)
    return folder.with_name(f"{folder.name}_slice_areas.json")


def read_counts(dataset: nnUNetBaseDataset) -> dict[str, LabelCounts]:
    """Counts of all cases of a data set, from the cache where they are there.

    The cache is keyed by case, so that folds share it; a case whose file has changed is counted again. Several
    processes may do this at once. A cache that cannot be written costs time only, and is logged.

    Args:
        dataset: The preprocessed cases.
    Returns:
        Case -> counts, in the order of ``dataset.identifiers``.
    """
    file = cache_file(dataset)
    cached = _read_cache(file)
    entries = {}
    for case in dataset.identifiers:
        state = _file_state(dataset, case)
        entry = cached.get(case)
        if entry is None or state is None or entry["file"] != state:
            _, segmentation, _, _ = dataset.load_case(case)
            counts = count_labels(segmentation)
            entry = {
                "file": state,
                "num_slices": counts.num_slices,
                "slice_pixels": counts.slice_pixels,
                "labels": counts.labels,
            }
        entries[case] = entry
    if any(cached.get(case) is not entry for case, entry in entries.items()):
        try:
            with replacing(file) as temporary:
                temporary.write_text(json.dumps({**_read_cache(file), **entries}), encoding="utf-8")
        except OSError as error:
            logger.warning("%s could not be written (%s): slices will be counted again next time", file, error)
    return {case: _counts(entry) for case, entry in entries.items()}


def _read_cache(file: Path) -> dict[str, dict]:
    """What the cache holds; nothing if it is absent or damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _file_state(dataset: nnUNetBaseDataset, case: str) -> list[int] | None:
    """Size and time of change of a case's segmentation; None for data sets that keep it elsewhere."""
    for ending in SEGMENTATION_ENDINGS:
        file = Path(dataset.source_folder) / f"{case}{ending}"
        if file.is_file():
            return [file.stat().st_size, file.stat().st_mtime_ns]
    return None


def _counts(entry: dict) -> LabelCounts:
    """The entry of a cache file, whose keys are strings, as numbers."""
    labels = {
        int(label): {int(position): pixels for position, pixels in slices.items()}
        for label, slices in entry["labels"].items()
    }
    return LabelCounts(entry["num_slices"], entry["slice_pixels"], labels)


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
