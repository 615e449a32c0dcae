"""The lesions of a preprocessed data set and the label counts of its slices, measured once and kept in one file.

nnU-Net's own ``class_locations`` hold a sample of the voxels of each class: they tell neither how many lesions there
are, nor how large they are, nor what area a label has on a slice. This table does, for the amplification of slices, the
curriculum, lesion-balanced sampling and the lesion fingerprint.

The file is an uncompressed ``.npz`` of flat arrays. Voxels of lesions (``anchors``), its largest part, are mapped into
memory and not read, so that workers of a data loader do not hold a copy each.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import struct
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from nnunetv2_smallseg.evaluation.components import connected_components
from nnunetv2_smallseg.files import replacing

if TYPE_CHECKING:
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

__all__ = [
    "MAX_ANCHORS",
    "LabelCounts",
    "LesionTable",
    "Lesions",
    "MeasuredCase",
    "count_labels",
    "lesion_classes",
    "lesion_table",
    "measure_case",
    "table_file",
]

logger = logging.getLogger(__name__)

# Voxels kept of a lesion; smaller lesions are kept whole.
MAX_ANCHORS = 64
# Changes whenever the file's content does; files of other versions are measured anew.
VERSION = 1
# Names of the preprocessed segmentation of a case, as nnU-Net's two kinds of data sets write it.
SEGMENTATION_ENDINGS = ("_seg.b2nd", "_seg.npy", ".npz")
# So much work is lost at most if measuring is interrupted.
SECONDS_BETWEEN_WRITES = 120.0
# Below this number of cases, starting processes takes longer than measuring.
CASES_WORTH_PROCESSES = 16
# Processes that write at the same moment overwrite each other's cases; then they write again.
WRITING_ATTEMPTS = 5

# A class: its labels; one, or those of a region.
LesionClass = tuple[int, ...]


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


@dataclass(frozen=True)
class Lesions:
    """Lesions, one of N in each row.

    Attributes:
        classes: (N,) index of the class of each lesion.
        voxels: (N,) number of voxels.
        boxes: (N, 2, 3) first voxel and the one behind the last, in array order (z, y, x).
        anchor_starts: (N,) row of the first anchor of each lesion.
        anchor_counts: (N,) anchors of each lesion, from 1 to ``MAX_ANCHORS``.
        anchors: (M, 3) voxels of the lesions, in array order: all of a small lesion, else a sample.
    """

    classes: np.ndarray
    voxels: np.ndarray
    boxes: np.ndarray
    anchor_starts: np.ndarray
    anchor_counts: np.ndarray
    anchors: np.ndarray

    def __len__(self) -> int:
        return len(self.classes)

    def take(self, rows: np.ndarray) -> Lesions:
        """Some of the lesions; their anchors stay where they are."""
        return Lesions(
            self.classes[rows],
            self.voxels[rows],
            self.boxes[rows],
            self.anchor_starts[rows],
            self.anchor_counts[rows],
            self.anchors,
        )

    def anchors_of(self, row: int) -> np.ndarray:
        """Anchors of one lesion, (number, 3)."""
        start = self.anchor_starts[row]
        return self.anchors[start : start + self.anchor_counts[row]]

    def volumes_mm3(self, spacing: np.ndarray | Sequence[float]) -> np.ndarray:
        """Volumes, (N,) float64.

        Args:
            spacing: Voxel size in mm, (3,), or (N, 3) for each lesion, in array order.
        """
        return self.voxels * np.prod(np.asarray(spacing, dtype=np.float64), axis=-1)

    def extents_mm(self, spacing: np.ndarray | Sequence[float]) -> np.ndarray:
        """Extents of the bounding boxes, (N, 3) float64, in array order; ``spacing`` as for ``volumes_mm3``."""
        return (self.boxes[:, 1] - self.boxes[:, 0]) * np.asarray(spacing, dtype=np.float64)

    def equivalent_diameters_mm(self, spacing: np.ndarray | Sequence[float], *, num_dimensions: int = 3) -> np.ndarray:
        """Diameters of balls of the same volume, or of discs of the same area, (N,) float64.

        Args:
            spacing: As for ``volumes_mm3``.
            num_dimensions: 3, or 2 for single images, whose first axis has no size.
        """
        spacing = np.asarray(spacing, dtype=np.float64)
        if num_dimensions == 2:
            return 2 * np.sqrt(self.voxels * np.prod(spacing[..., 1:], axis=-1) / np.pi)
        return np.cbrt(6 * self.volumes_mm3(spacing) / np.pi)


@dataclass(frozen=True)
class MeasuredCase:
    """What is known of one case.

    Attributes:
        shape: (Z, Y, X).
        counts: Label counts of its slices.
        lesions: Its lesions, ordered by class.
    """

    shape: tuple[int, int, int]
    counts: LabelCounts
    lesions: Lesions


def lesion_classes(label_manager: LabelManager) -> tuple[LesionClass, ...]:
    """What lesions of a data set can be: its regions if it has any, else its labels; the ignore label is none."""
    classes = label_manager.foreground_regions if label_manager.has_regions else label_manager.foreground_labels
    return tuple(tuple(int(label) for label in np.atleast_1d(labels)) for labels in classes)


def measure_case(
    segmentation: np.ndarray, classes: Sequence[Sequence[int]], *, max_anchors: int = MAX_ANCHORS, seed: int = 0
) -> MeasuredCase:
    """Finds the lesions of a case: the components of each class, with 26 neighbours (8 in single images).

    Args:
        segmentation: Labels, integers, (Z, Y, X), or (Y, X), which counts as one slice. Labels that no class names,
            such as the ignore label, are no lesion.
        classes: Labels of each class, as ``lesion_classes`` gives them.
        max_anchors: Voxels kept of a lesion.
        seed: Of the voxels kept of larger lesions.
    Raises:
        ValueError: If ``segmentation`` has neither two nor three axes.
    """
    if segmentation.ndim not in (2, 3):
        raise ValueError(
            f"the segmentation has the shape {segmentation.shape}, but must be (Z, Y, X) or (Y, X): give one channel"
        )
    segmentation = segmentation.reshape((-1, *segmentation.shape[-2:]))
    counts = count_labels(segmentation[None])
    generator = np.random.default_rng(seed)
    found = [
        _lesions_of_class(segmentation, index, labels, counts, max_anchors, generator)
        for index, labels in enumerate(classes)
    ]
    return MeasuredCase(segmentation.shape, counts, _concatenated(found))


def _lesions_of_class(
    segmentation: np.ndarray,
    index: int,
    labels: Sequence[int],
    counts: LabelCounts,
    max_anchors: int,
    generator: np.random.Generator,
) -> Lesions:
    """The components of one class."""
    slices = np.flatnonzero(counts.areas(labels))
    if not len(slices):
        return _no_lesions()
    offset = int(slices[0])
    mask = np.isin(segmentation[offset : slices[-1] + 1], list(labels))
    components = connected_components(mask)
    voxels, boxes, _ = components.statistics()
    boxes = np.array([[[axis.start for axis in box], [axis.stop for axis in box]] for box in boxes], dtype=np.int32)
    voxels = voxels.astype(np.int64)

    inside = np.flatnonzero(mask)
    inside = inside[np.argsort(components.labels.reshape(-1)[inside], kind="stable")]
    kept = np.minimum(voxels, max_anchors)
    starts = np.cumsum(kept) - kept
    # A lesion, slice by slice, in `kept` parts, from each of which one voxel is kept: spread over all slices. The parts
    # begin anywhere, so that all voxels are equally likely although not all parts are equally long.
    of_lesion = np.repeat(np.arange(len(kept)), kept)
    part, length = np.arange(kept.sum()) - starts[of_lesion], voxels[of_lesion]
    first, behind = part * length // kept[of_lesion], (part + 1) * length // kept[of_lesion]
    within = (generator.integers(first, behind) + generator.integers(voxels)[of_lesion]) % length
    chosen = inside[(np.cumsum(voxels) - voxels)[of_lesion] + within]
    anchors = np.stack(np.unravel_index(chosen, mask.shape), axis=1).astype(np.int32)
    boxes[:, :, 0] += offset
    anchors[:, 0] += offset
    return Lesions(np.full(len(voxels), index, dtype=np.int16), voxels, boxes, starts, kept, anchors)


def _no_lesions() -> Lesions:
    numbers = np.zeros(0, dtype=np.int64)
    anchors = np.zeros((0, 3), dtype=np.int32)
    return Lesions(numbers.astype(np.int16), numbers, np.zeros((0, 2, 3), dtype=np.int32), numbers, numbers, anchors)


def _ragged(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Numbers from each start on, as many as its length says, one run behind the other."""
    return np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)


def _concatenated(parts: Sequence[Lesions]) -> Lesions:
    """All lesions, in order, with anchors of their own."""
    if not parts:
        return _no_lesions()
    counts = np.concatenate([part.anchor_counts for part in parts])
    return Lesions(
        np.concatenate([part.classes for part in parts]),
        np.concatenate([part.voxels for part in parts]),
        np.concatenate([part.boxes for part in parts]),
        np.cumsum(counts) - counts,
        counts,
        np.concatenate([part.anchors[_ragged(part.anchor_starts, part.anchor_counts)] for part in parts]),
    )


@dataclass(frozen=True)
class LesionTable:
    """Lesions and label counts of the cases of a data set.

    Attributes:
        classes: Labels of each class.
        cases: Names of the C cases.
        shapes: (C, 3) voxels of each case, (Z, Y, X).
        image_spacings: (C, 3) spacing in mm of the image as it was read, before nnU-Net transposed and resampled it;
            NaN if unknown.
        lesions: All lesions, case by case.
        lesion_counts: (C,) lesions of each case.
        slices: (S, 3) case by case: label, slice, pixels.
        slice_counts: (C,) rows of ``slices`` of each case.
        states: (C, 2) size and time of change of the files, from which a change is seen; -1 where there are none.
    """

    classes: tuple[LesionClass, ...]
    cases: tuple[str, ...]
    shapes: np.ndarray
    image_spacings: np.ndarray
    lesions: Lesions
    lesion_counts: np.ndarray
    slices: np.ndarray
    slice_counts: np.ndarray
    states: np.ndarray

    @cached_property
    def case_of(self) -> np.ndarray:
        """(N,) index of the case of each lesion."""
        return np.repeat(np.arange(len(self.cases), dtype=np.int32), self.lesion_counts)

    @property
    def num_dimensions(self) -> int:
        """2 if all cases are single images, else 3."""
        return 3 if (self.shapes[:, 0] > 1).any() else 2

    def spacings(self, target: Sequence[float], transpose_forward: Sequence[int]) -> np.ndarray:
        """Voxel size of each preprocessed case in mm, (C, 3), in array order.

        Args:
            target: Spacing of the configuration; two values where slices are not resampled through the plane.
            transpose_forward: Of the plans: axes of the image in the order of the preprocessed ones.
        Raises:
            ValueError: If slices keep the spacing of images for which it is not known.
        """
        spacings = np.empty((len(self.cases), 3))
        spacings[:, 3 - len(target) :] = target
        if len(target) == 2:
            spacings[:, 0] = self.image_spacings[:, transpose_forward[0]]
            if np.isnan(spacings).any():
                case = self.cases[int(np.isnan(spacings).any(axis=1).argmax())]
                raise ValueError(f"the properties of the preprocessed case {case} tell no spacing: preprocess it anew")
        return spacings

    @cached_property
    def counts(self) -> dict[str, LabelCounts]:
        """Case -> pixels of its labels in each slice."""
        ends = np.cumsum(self.slice_counts)
        counts = {}
        for case, shape, start, end in zip(self.cases, self.shapes, ends - self.slice_counts, ends, strict=True):
            labels: dict[int, dict[int, int]] = {}
            for label, position, pixels in self.slices[start:end].tolist():
                labels.setdefault(label, {})[position] = pixels
            counts[case] = LabelCounts(int(shape[0]), int(shape[1]) * int(shape[2]), labels)
        return counts

    def select(self, cases: Sequence[str]) -> LesionTable:
        """The table of some of the cases, in the order given."""
        index = {case: position for position, case in enumerate(self.cases)}
        chosen = np.array([index[case] for case in cases], dtype=np.int64)
        lesion_starts = np.cumsum(self.lesion_counts) - self.lesion_counts
        slice_starts = np.cumsum(self.slice_counts) - self.slice_counts
        return LesionTable(
            self.classes,
            tuple(cases),
            self.shapes[chosen],
            self.image_spacings[chosen],
            self.lesions.take(_ragged(lesion_starts[chosen], self.lesion_counts[chosen])),
            self.lesion_counts[chosen],
            self.slices[_ragged(slice_starts[chosen], self.slice_counts[chosen])],
            self.slice_counts[chosen],
            self.states[chosen],
        )

    def updated(self, other: LesionTable) -> LesionTable:
        """This table with the cases of another, which come in place of cases of the same name."""
        new = set(other.cases)
        kept = self.select([case for case in self.cases if case not in new])
        return LesionTable(
            self.classes,
            kept.cases + other.cases,
            np.concatenate([kept.shapes, other.shapes]),
            np.concatenate([kept.image_spacings, other.image_spacings]),
            _concatenated([kept.lesions, other.lesions]),
            np.concatenate([kept.lesion_counts, other.lesion_counts]),
            np.concatenate([kept.slices, other.slices]),
            np.concatenate([kept.slice_counts, other.slice_counts]),
            np.concatenate([kept.states, other.states]),
        )


def _table(
    classes: tuple[LesionClass, ...],
    measured: dict[str, tuple[MeasuredCase, list[float]]],
    states: dict[str, list[int]],
) -> LesionTable:
    """Case -> (measurement, spacing of the image), as a table."""
    cases = [case for case, _ in measured.values()]
    rows = [
        [(label, at, pixels) for label, slices in case.counts.labels.items() for at, pixels in slices.items()]
        for case in cases
    ]
    return LesionTable(
        classes,
        tuple(measured),
        np.array([case.shape for case in cases], dtype=np.int32).reshape(-1, 3),
        np.array([spacing for _, spacing in measured.values()], dtype=np.float64).reshape(-1, 3),
        _concatenated([case.lesions for case in cases]),
        np.array([len(case.lesions) for case in cases], dtype=np.int64),
        np.array([row for case in rows for row in case], dtype=np.int64).reshape(-1, 3),
        np.array([len(case) for case in rows], dtype=np.int64),
        np.array([states[case] for case in measured], dtype=np.int64).reshape(-1, 2),
    )


def table_file(dataset: nnUNetBaseDataset) -> Path:
    """Where the table of a data set and configuration is kept: beside its folder, which must hold cases only."""
    folder = Path(dataset.source_folder)
    return folder.with_name(f"{folder.name}_lesions.npz")


def lesion_table(dataset: nnUNetBaseDataset, label_manager: LabelManager, *, num_processes: int = 1) -> LesionTable:
    """The lesions and label counts of all cases of a data set, from its file where they are there.

    The file is keyed by case, so that folds and configurations share it; a case whose own file has changed is measured
    again, and all are if the labels or regions of the data set have changed. Several processes may do this at once. A
    file that is damaged or cannot be written costs time only, and is logged.

    Args:
        dataset: The preprocessed cases.
        label_manager: Their labels or regions.
        num_processes: Processes that measure, if there are many cases to measure.
    Returns:
        The table of the cases in the order of ``dataset.identifiers``.
    """
    classes = lesion_classes(label_manager)
    file = table_file(dataset)
    stored = _read(file, classes)
    states = {case: _file_state(dataset, case) for case in dataset.identifiers}
    known = dict(zip(stored.cases, stored.states.tolist(), strict=True))
    missing = [case for case, state in states.items() if state[0] < 0 or known.get(case) != state]
    if not missing:
        return stored.select(dataset.identifiers)
    logger.info("finding the lesions of %d cases in %s", len(missing), dataset.source_folder)
    measured, written = {}, time.monotonic()
    for case, measurement in _measure(dataset, missing, classes, num_processes):
        measured[case] = measurement
        if time.monotonic() - written > SECONDS_BETWEEN_WRITES:
            logger.info("found the lesions of %d of %d cases", len(measured), len(missing))
            _store(file, _table(classes, measured, states))
            written = time.monotonic()
    table = _table(classes, measured, states)
    _store(file, table)
    return stored.updated(table).select(dataset.identifiers)


def _measure(
    dataset: nnUNetBaseDataset, cases: Sequence[str], classes: tuple[LesionClass, ...], num_processes: int
) -> Iterator[tuple[str, tuple[MeasuredCase, list[float]]]]:
    """Measures cases, one after the other or in several processes."""
    measure = partial(_measure_stored, dataset, classes)
    if num_processes < 2 or len(cases) < CASES_WORTH_PROCESSES:
        yield from zip(cases, map(measure, cases), strict=True)
        return
    # Not forked: this process may use a GPU already.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_processes, len(cases)), context) as pool:
        yield from zip(cases, pool.map(measure, cases, chunksize=4), strict=True)


def _measure_stored(
    dataset: nnUNetBaseDataset, classes: tuple[LesionClass, ...], case: str
) -> tuple[MeasuredCase, list[float]]:
    """Measures a preprocessed case."""
    _, segmentation, _, properties = dataset.load_case(case)
    spacing = properties.get("spacing")
    return measure_case(np.asarray(segmentation[0]), classes), [np.nan] * 3 if spacing is None else list(spacing)


def _file_state(dataset: nnUNetBaseDataset, case: str) -> list[int]:
    """Size and time of change of a case's segmentation; -1 for data sets that keep it elsewhere."""
    for ending in SEGMENTATION_ENDINGS:
        try:
            status = os.stat(os.path.join(dataset.source_folder, f"{case}{ending}"))
        except FileNotFoundError:
            continue
        return [status.st_size, status.st_mtime_ns]
    return [-1, -1]


def _store(file: Path, new: LesionTable) -> None:
    """Adds cases to the file. One that cannot be written is logged."""
    new = new.select([case for case, state in zip(new.cases, new.states, strict=True) if state[0] >= 0])
    if not new.cases:
        return
    states = dict(zip(new.cases, new.states.tolist(), strict=True))
    for _ in range(WRITING_ATTEMPTS):
        try:
            _write(file, _read(file, new.classes).updated(new))
        except OSError as error:
            logger.warning("%s could not be written (%s): lesions will be looked for again next time", file, error)
            return
        stored = _read(file, new.classes)
        known = dict(zip(stored.cases, stored.states.tolist(), strict=True))
        if all(known.get(case) == state for case, state in states.items()):
            return
        # Another process has written what it had read before.
        time.sleep(random.uniform(0, 0.5))


def _write(file: Path, table: LesionTable) -> None:
    """Writes the file, whole or not at all."""
    lesions = _concatenated([table.lesions])
    header = {"version": VERSION, "classes": table.classes, "max_anchors": MAX_ANCHORS, "cases": table.cases}
    largest = int(table.shapes.max(initial=0))
    with replacing(file) as temporary, temporary.open("wb") as stream:
        np.savez(
            stream,
            header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
            shapes=table.shapes,
            image_spacings=table.image_spacings,
            lesion_counts=table.lesion_counts,
            classes=lesions.classes,
            voxels=lesions.voxels,
            boxes=lesions.boxes,
            anchor_counts=lesions.anchor_counts.astype(np.int16),
            anchors=lesions.anchors.astype(np.uint16 if largest <= 2**16 else np.int32),
            slices=table.slices.astype(np.int32),
            slice_counts=table.slice_counts,
            states=table.states,
        )


def _read(file: Path, classes: tuple[LesionClass, ...]) -> LesionTable:
    """What the file holds; nothing if it is absent, damaged, or about other labels."""
    nothing = _table(classes, {}, {})
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            header = json.loads(content["header"].tobytes())
            about = (header["version"], header["max_anchors"], header["classes"])
            if about != (VERSION, MAX_ANCHORS, [list(labels) for labels in classes]):
                logger.info("%s is about other labels or of another version: it is made anew", file)
                return nothing
            arrays = {name: content[name] for name in content.files if name not in ("header", "anchors")}
            anchors = _mapped(stream, content.zip.getinfo("anchors.npy"))
        counts = arrays.pop("anchor_counts").astype(np.int64)
        starts = np.cumsum(counts) - counts
        lesions = Lesions(*map(arrays.pop, ("classes", "voxels", "boxes")), starts, counts, anchors)
        table = LesionTable(classes, tuple(header["cases"]), lesions=lesions, **arrays)
        _check_lengths(table)
    except FileNotFoundError:
        return nothing
    except (OSError, ValueError, KeyError, TypeError, EOFError, struct.error, zipfile.BadZipFile) as error:
        logger.warning("%s cannot be read (%s): it is made anew", file, error)
        return nothing
    return table


def _mapped(stream: BinaryIO, member: zipfile.ZipInfo) -> np.ndarray:
    """An array of an uncompressed ``.npz``, mapped into memory; read where the system does not let open maps be.

    Raises:
        ValueError: If the member is compressed.
    """
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError("its arrays are compressed")
    # The local header: 30 bytes, of which the last four tell the lengths of name and extra field behind it.
    stream.seek(member.header_offset + 26)
    name, extra = struct.unpack("<HH", stream.read(4))
    stream.seek(member.header_offset + 30 + name + extra)
    np.lib.format.read_magic(stream)
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    # Windows cannot replace a file that is mapped, and there is nothing to map in an empty array.
    if os.name == "nt" or 0 in shape:
        return np.fromfile(stream, dtype, int(np.prod(shape))).reshape(shape)
    return np.asarray(np.memmap(stream, dtype, "r", stream.tell(), shape))


def _check_lengths(table: LesionTable) -> None:
    """Raises ``ValueError`` unless the arrays go together."""
    cases, lesions = len(table.cases), len(table.lesions)
    fits = (
        all(len(part) == cases for part in (table.shapes, table.image_spacings, table.states))
        and len(table.lesion_counts) == len(table.slice_counts) == cases
        and table.lesion_counts.sum() == lesions == len(table.lesions.voxels) == len(table.lesions.boxes)
        and table.slice_counts.sum() == len(table.slices)
        and len(table.lesions.anchor_counts) == lesions
        and table.lesions.anchor_counts.sum() == len(table.lesions.anchors)
    )
    if not fits:
        raise ValueError("its arrays have lengths that do not go together")
