"""Measures the lesions of one case: sizes, and what deep supervision, patches and sampling do to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnunetv2_smallseg.evaluation.boxes import bounding_box
from nnunetv2_smallseg.evaluation.components import Components, connected_components
from nnunetv2_smallseg.evaluation.regions import Region
from nnunetv2_smallseg.evaluation.size_groups import equivalent_diameter_mm
from nnunetv2_smallseg.fingerprint.deep_supervision import Residues
from nnunetv2_smallseg.fingerprint.patches import Box, Locations, PatchGrid
from nnunetv2_smallseg.fingerprint.resampling import Resampled, surviving_components

__all__ = [
    "Foreground",
    "Table",
    "TrainingSetup",
    "draw_locations",
    "find_foreground",
    "resampling_table",
    "size_table",
    "slice_areas",
    "training_table",
]

# A column for every property, one row a lesion.
Table = dict[str, np.ndarray]
# nnU-Net keeps this many voxels of a class of a case, or this share if that is more, to centre patches on.
MIN_LOCATIONS, MIN_LOCATION_SHARE = 10_000, 0.01


@dataclass(frozen=True)
class TrainingSetup:
    """What a configuration does to lesions.

    Attributes:
        patch_size: Patch the network sees, (z, y, x); one slice in ``2d``.
        drawn_patch_size: Patch the data loader draws before rotation and scaling, (z, y, x).
        factors: Voxels per voxel of the target of each deep-supervision level, (z, y, x).
        ignore_label: Label of voxels that are not annotated, or None.
    """

    patch_size: tuple[int, int, int]
    drawn_patch_size: tuple[int, int, int]
    factors: tuple[tuple[int, int, int], ...]
    ignore_label: int | None = None

    @property
    def is_planar(self) -> bool:
        """Whether a patch is a single slice."""
        return self.patch_size[0] == 1


@dataclass(frozen=True)
class Foreground:
    """The part of a label map that holds all labels above 0, and its lesions.

    Attributes:
        labels: The part, (Z, Y, X).
        offset: Where it begins in the label map, (z, y, x).
        shape: Voxels of the whole label map.
        lesions: Connected components of each region within the part.
    """

    labels: np.ndarray
    offset: tuple[int, int, int]
    shape: tuple[int, int, int]
    lesions: tuple[Components, ...]


def find_foreground(
    labels: np.ndarray,
    regions: Sequence[Region],
    offset: Sequence[int] = (0, 0, 0),
    shape: Sequence[int] | None = None,
) -> Foreground:
    """Finds the lesions of every region.

    Args:
        labels: Label map or a part of one that holds all of its foreground, (Z, Y, X); a picture has one slice.
            Background is 0 or below.
        regions: Labels or regions of the data set.
        offset: Where the part begins in the label map.
        shape: Voxels of the whole label map; None if ``labels`` is the whole.
    """
    shape = labels.shape if shape is None else shape
    box = bounding_box(labels > 0) or (slice(0, 0),) * 3
    part = labels[box]
    begins = tuple(int(begin + side.start) for begin, side in zip(offset, box, strict=True))
    lesions = tuple(connected_components(region.mask(part)) for region in regions)
    return Foreground(part, begins, tuple(int(size) for size in shape), lesions)


def size_table(foreground: Foreground, spacing: Sequence[float], num_dimensions: int) -> Table:
    """Region, size (mm3, or mm2 of pictures), diameter and bounding box of every lesion.

    Args:
        foreground: The lesions.
        spacing: Voxel size in mm, (z, y, x); that along z does not count for pictures.
        num_dimensions: 2 for pictures, else 3.
    Returns:
        Columns ``region`` (index), ``size``, ``equivalent_diameter_mm``, ``extent_mm`` and ``extent_voxels`` (N, 3).
    """
    regions, voxels, extents = [], [], []
    for index, lesions in enumerate(foreground.lesions):
        counts, boxes, _ = lesions.statistics()
        regions += [index] * lesions.count
        voxels += [int(count) for count in counts]
        extents += [[side.stop - side.start for side in box] for box in boxes]
    sizes = np.array(voxels, dtype=np.float64) * math.prod(spacing[3 - num_dimensions :])
    extent = np.array(extents, dtype=np.float64).reshape(-1, 3)
    diameters = [equivalent_diameter_mm(size, num_dimensions) for size in sizes]
    return {
        "region": np.array(regions, dtype=np.int64),
        "size": sizes,
        "equivalent_diameter_mm": np.array(diameters, dtype=np.float64),
        "extent_mm": extent * np.asarray(spacing),
        "extent_voxels": extent,
    }


def slice_areas(
    foreground: Foreground, regions: Sequence[Region], spacing: Sequence[float], ignore_label: int | None
) -> tuple[int, list[np.ndarray]]:
    """How many slices are annotated, and the lesion area of those with lesions.

    Returns:
        Number of slices of the label map, without those that are all ignored; areas in mm2, one array a region and a
        last one for all regions together.
    """
    num_slices = foreground.shape[0]
    if ignore_label is not None:
        ignored = np.count_nonzero(foreground.labels == ignore_label, axis=(1, 2))
        num_slices -= int(np.count_nonzero(ignored == foreground.shape[1] * foreground.shape[2]))
    masks = [region.mask(foreground.labels) for region in regions]
    areas = []
    for mask in (*masks, np.logical_or.reduce(masks)):
        pixels = np.count_nonzero(mask, axis=(1, 2))
        areas.append(pixels[pixels > 0] * float(spacing[1] * spacing[2]))
    return num_slices, areas


def resampling_table(
    foreground: Foreground, regions: Sequence[Region], resampled: Resampled, diameters_mm: np.ndarray
) -> Table:
    """Which lesions vanish by resampling.

    Args:
        foreground: The lesions before.
        regions: Labels or regions of the data set.
        resampled: The label map after.
        diameters_mm: Diameters of the lesions, in the order of ``size_table``.
    Returns:
        Columns ``region``, ``equivalent_diameter_mm`` and ``vanished``.
    """
    indices, vanished = [], []
    for index, (region, lesions) in enumerate(zip(regions, foreground.lesions, strict=True)):
        kept = surviving_components(resampled, region.mask(resampled.labels), lesions.labels, foreground.offset)
        indices += [index] * lesions.count
        vanished += list(~np.isin(np.arange(1, lesions.count + 1), kept))
    return {
        "region": np.array(indices, dtype=np.int64),
        "equivalent_diameter_mm": diameters_mm,
        "vanished": np.array(vanished, dtype=bool),
    }


def draw_locations(foreground: Foreground, region: Region, generator: np.random.Generator) -> np.ndarray:
    """Voxels of a region to centre patches on, as many as nnU-Net's preprocessing draws.

    Returns:
        (N, 3) along z, y and x.
    """
    coordinates = np.argwhere(region.mask(foreground.labels)) + np.asarray(foreground.offset)
    number = max(min(MIN_LOCATIONS, len(coordinates)), math.ceil(MIN_LOCATION_SHARE * len(coordinates)))
    return coordinates[generator.choice(len(coordinates), number, replace=False)]


def training_table(
    foreground: Foreground,
    setup: TrainingSetup,
    locations: Sequence[Locations],
    annotated: Locations | None = None,
) -> Table:
    """What a training with nnU-Net's own sampling and targets sees of every lesion.

    Args:
        foreground: The lesions of the preprocessed label map.
        setup: Patch and deep supervision.
        locations: For each region, the voxels patches are centred on.
        annotated: All voxels that are annotated, or a sample, where there is an ignore label: other patches are centred
            on one of them.
    Returns:
        One row a lesion, ordered as by ``size_table``:
        ``num_sections``: slices it lies in;
        ``vanished`` (N, levels): share of the places of the grid at which it vanishes from the target;
        ``sections_vanished`` (N, levels): the same for its part in a slice, mean over its slices;
        ``random``, ``foreground``: probability that a random patch of this case, or one centred on foreground, shows
        some of it;
        ``centred``: probability that a patch centred on foreground is centred on it;
        ``cut_random``, ``cut_centred``: share of the patches that show it, or are centred on it, and do not hold all of
        it (in ``2d``: all of its part in the slice).
    """
    grid = PatchGrid(foreground.shape, setup.drawn_patch_size, setup.patch_size)
    present = [place for place in locations if len(place)]
    rows = []
    for lesions, own in zip(foreground.lesions, locations, strict=True):
        _, boxes, _ = lesions.statistics()
        centred = own.shares_of(lesions.labels, foreground.offset) / max(len(present), 1)
        for number, box in enumerate(boxes, start=1):
            lesion = _Lesion(lesions.labels[box] == number, box, foreground.offset)
            rows.append({**lesion.row(setup, grid, present, annotated), "centred": centred[number]})
    columns = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in _COLUMNS}
    for name in ("vanished", "sections_vanished"):
        columns[name] = columns[name].reshape(len(rows), len(setup.factors))
    return columns


_COLUMNS = (
    "num_sections", "vanished", "sections_vanished", "random", "foreground", "centred", "cut_random", "cut_centred",
)  # fmt: skip


class _Lesion:
    """A single lesion: ``mask`` (Z, Y, X) within its box."""

    def __init__(self, mask: np.ndarray, box: Sequence[slice], offset: Sequence[int]) -> None:
        self.begin = [side.start + begin for side, begin in zip(box, offset, strict=True)]
        self.box: Box = tuple((begin, begin + size) for begin, size in zip(self.begin, mask.shape, strict=True))
        # One slice at a time, so that an organ takes no more memory than a lesion.
        self.sections = []
        for z, plane in enumerate(mask):
            y, x = np.nonzero(plane)
            if len(y):
                self.sections.append((z + self.begin[0], y + self.begin[1], x + self.begin[2]))

    def row(
        self,
        setup: TrainingSetup,
        grid: PatchGrid,
        present: Sequence[Locations],
        annotated: Locations | None,
    ) -> dict[str, object]:
        """The columns of ``training_table`` for this lesion, but ``centred``."""
        residues = [Residues(factor) for factor in setup.factors]
        for section in self.sections:
            for level in residues:
                level.add_section(*section)
        # A patch of one slice shows one of the lesion's slices: their probabilities add up.
        boxes = [_section_box(*section) for section in self.sections] if setup.is_planar else [self.box]
        shown, whole, foreground, centred_whole = 0.0, 0.0, 0.0, 0
        for box in boxes:
            centres, centres_of_whole = grid.centres_showing(box), grid.centres_of_whole(box)
            shown += annotated.share(centres) if annotated else grid.shown_at_random(box)
            whole += annotated.share(centres_of_whole) if annotated else grid.whole_at_random(box)
            foreground += sum(place.share(centres) for place in present) / max(len(present), 1)
            centred_whole += self._count(centres_of_whole)
        return {
            "num_sections": len(self.sections),
            "vanished": [level.lesion_share for level in residues],
            "sections_vanished": [level.section_share for level in residues],
            "random": shown,
            "foreground": foreground,
            "cut_random": 1 - whole / shown if shown else 0.0,
            "cut_centred": 1 - centred_whole / sum(len(y) for _, y, _ in self.sections),
        }

    def _count(self, box: Box) -> int:
        """Voxels of the lesion within a box."""
        return sum(
            int(np.count_nonzero((y >= box[1][0]) & (y < box[1][1]) & (x >= box[2][0]) & (x < box[2][1])))
            for z, y, x in self.sections
            if box[0][0] <= z < box[0][1]
        )


def _section_box(z: int, y: np.ndarray, x: np.ndarray) -> Box:
    return (z, z + 1), (int(y.min()), int(y.max()) + 1), (int(x.min()), int(x.max()) + 1)
