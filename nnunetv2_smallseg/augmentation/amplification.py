"""Amplification of slices with small lesions: five more copies of each, in which the lesion stands elsewhere or larger.

Paper: Zhao et al., A novel framework for segmentation of small targets in medical images, Scientific Reports 2025,
https://doi.org/10.1038/s41598-025-94437-9, eq. 1 and 2, "method 4". The paper contradicts itself about method 4; read
as method 2 with centre amplification it gives the six copies the paper counts: the slice itself, two flips, an edge
crop, an edge crop of a flip, and a crop around one lesion. Crops are scaled to the size of the patch.

Functions draw from the generator they are given. Rows are vertical, columns horizontal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from scipy import ndimage
from torch.nn import functional

__all__ = [
    "COPY_NAMES",
    "NUM_COPIES",
    "View",
    "Window",
    "amplification_thresholds",
    "centre_crop",
    "draw_view",
    "edge_crop",
    "place_window",
    "take_view",
]

COPY_NAMES = (
    "as it is",
    "flipped horizontally",
    "flipped vertically",
    "edge crop",
    "edge crop, flipped",
    "centre crop",
)
NUM_COPIES = len(COPY_NAMES)

# The paper cuts 50 pixels off edges of images of 480 and 512 pixels: a tenth.
EDGE_SHARE = 0.1
EDGE_CROP_AXES = ((0,), (1,), (0, 1))

# The largest centre crop enlarges as much as an edge crop, the smallest four times.
CENTRE_LARGEST, CENTRE_SMALLEST = 1 - 2 * EDGE_SHARE, 0.25
CENTRE_MARGIN = 8  # pixels around the lesion
LARGEST_ANISOTROPY = 1 / (1 - 2 * EDGE_SHARE)  # that of an edge crop along one axis

JITTER_SHARE = 0.1


@dataclass(frozen=True)
class Window:
    """A rectangle of pixels, which may reach beyond the image.

    Attributes:
        start: First row and column.
        size: Height and width.
    """

    start: tuple[int, int]
    size: tuple[int, int]

    @property
    def stop(self) -> tuple[int, int]:
        """Row and column behind the last."""
        return self.start[0] + self.size[0], self.start[1] + self.size[1]

    def scaled(self, factors: Sequence[float]) -> Window:
        """The window with the same centre and another size, to the pixel."""
        size = tuple(round(side * factor) for side, factor in zip(self.size, factors, strict=True))
        start = tuple(old - (new - side) // 2 for old, new, side in zip(self.start, size, self.size, strict=True))
        return Window(start, size)

    def count(self, pixels: np.ndarray) -> int:
        """How many of the true values of ``pixels`` (H, W) lie inside."""
        (top, left), (bottom, right) = self.start, self.stop
        return int(np.count_nonzero(pixels[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]))


@dataclass(frozen=True)
class View:
    """What a copy shows of a slice: a window, and the axis along which it is flipped (0 rows, 1 columns), or None."""

    window: Window
    flip_axis: int | None = None


def ceiled_square(numerator: int, denominator: int) -> int:
    """The smallest square number of at least ``numerator / denominator``; exact, for integers above 0."""
    return (math.isqrt(-(-numerator // denominator) - 1) + 1) ** 2


def amplification_thresholds(areas: np.ndarray) -> tuple[int, int]:
    """The paper's thresholds: N1 = ceil(sqrt(S / A))^2 and N2 = ceil(sqrt(N1 / 2))^2 (eq. 1 and 2).

    Args:
        areas: Lesion pixels of every training slice, 0 or more; S is their sum, A how many are above 0.
    Returns:
        N1, the mean area rounded up to a square, and N2, half of it likewise: slices with fewer lesion pixels than N2
        are amplified. Both are 0 if no slice has a lesion.
    """
    num_slices, pixels = int(np.count_nonzero(areas)), int(np.sum(areas))
    if num_slices == 0:
        return 0, 0
    first = ceiled_square(pixels, num_slices)
    return first, ceiled_square(first, 2)


def place_window(lesion: np.ndarray, size: Sequence[int], generator: np.random.Generator) -> Window:
    """A window that shows the lesion.

    Along an axis where the slice fits, it is centred on the slice; along others on a random lesion pixel, off by up to
    a tenth of its side, and inside the slice.

    Args:
        lesion: Lesion pixels of the slice, (H, W), with at least one true value.
        size: Height and width of the window.
        generator: Draws the pixel and the shift.
    """
    pixels = np.argwhere(lesion)
    centre = pixels[generator.integers(len(pixels))]
    start = []
    for available, side, position in zip(lesion.shape, size, centre, strict=True):
        shift = generator.uniform(-JITTER_SHARE, JITTER_SHARE) * side
        if available <= side:
            start.append((available - side) // 2)
        else:
            start.append(min(max(round(position + shift - side / 2), 0), available - side))
    return Window(tuple(start), tuple(size))


def edge_crop(lesion: np.ndarray, window: Window, generator: np.random.Generator) -> Window:
    """The window without a tenth at top and bottom, left and right, or all four edges.

    The three are drawn with equal probability, from those that keep the whole lesion; if none does, from those that
    keep most of it.

    Args:
        lesion: Lesion pixels of the slice, (H, W).
        window: What to crop.
        generator: Draws the edges.
    """
    inner = 1 - 2 * EDGE_SHARE
    crops = [window.scaled([inner if axis in axes else 1.0 for axis in (0, 1)]) for axes in EDGE_CROP_AXES]
    kept = [crop.count(lesion) for crop in crops]
    best = [crop for crop, pixels in zip(crops, kept, strict=True) if pixels == max(kept)]
    return best[generator.integers(len(best))]


def centre_crop(lesion: np.ndarray, size: Sequence[int], generator: np.random.Generator) -> Window:
    """A window around one component of the lesion (8 neighbours), extended by random amounts on each side.

    Its sides are between a quarter and 0.8 of ``size``, but leave 8 pixels around the component; enlarged to ``size``,
    the two scales differ by a factor of 1.25 at most. At the border of the slice it is shifted inside. Along an axis
    where the slice is shorter than the window, it is centred on the slice.

    Args:
        lesion: Lesion pixels of the slice, (H, W), with at least one true value.
        size: Height and width of the patch the crop will be scaled to.
        generator: Draws the component and the extensions.
    """
    components, number = ndimage.label(lesion, structure=np.ones((3, 3)))
    box = ndimage.find_objects(components)[generator.integers(number)]
    lengths = []
    for extent, available, side in zip(box, lesion.shape, size, strict=True):
        longest = min(available, side)
        needed = max(extent.stop - extent.start + 2 * CENTRE_MARGIN, CENTRE_SMALLEST * longest)
        largest = CENTRE_LARGEST * longest
        lengths.append(generator.uniform(needed, largest) if needed < largest else min(needed, longest))
    relative = max(length / side for length, side in zip(lengths, size, strict=True))
    lengths = [
        math.ceil(max(length, side * relative / LARGEST_ANISOTROPY)) for length, side in zip(lengths, size, strict=True)
    ]
    start = []
    for extent, available, length in zip(box, lesion.shape, lengths, strict=True):
        extension = length - (extent.stop - extent.start)
        margin = min(CENTRE_MARGIN, extension / 2)
        before = generator.uniform(margin, extension - margin)
        inside = min(max(round(extent.start - before), 0), available - length)
        start.append(inside if available >= length else (available - length) // 2)
    return Window(tuple(start), tuple(lengths))


def draw_view(copy: int, lesion: np.ndarray, size: Sequence[int], generator: np.random.Generator) -> View:
    """What one of the six copies of an amplified slice shows.

    Args:
        copy: Number of the copy, an index of ``COPY_NAMES``.
        lesion: Lesion pixels of the slice, (H, W), with at least one true value.
        size: Height and width of the patch.
        generator: Draws positions, edges and axes.
    Raises:
        ValueError: If ``copy`` is no index of ``COPY_NAMES``.
    """
    if not 0 <= copy < NUM_COPIES:
        raise ValueError(f"copy is {copy}, but must be from 0 to {NUM_COPIES - 1}: {', '.join(COPY_NAMES)}")
    if copy == 5:
        return View(centre_crop(lesion, size, generator))
    window = place_window(lesion, size, generator)
    if copy >= 3:
        window = edge_crop(lesion, window, generator)
    flip_axis = {1: 1, 2: 0, 4: int(generator.integers(2))}.get(copy)
    return View(window, flip_axis)


def take_view(
    volume: np.ndarray,
    slices: tuple[int, int],
    view: View,
    size: Sequence[int],
    *,
    labels: bool,
) -> torch.Tensor:
    """Cuts a view out of some slices of a volume and scales it.

    Args:
        volume: (C, Z, Y, X), numpy or Blosc2; what lies outside is 0, and -1 for labels, as in nnU-Net.
        slices: First slice and the one behind the last; they may lie outside, too.
        view: What to show of each slice.
        size: Height and width of the result.
        labels: Whether these are label maps: nearest neighbour and int16, instead of linear and float32.
    Returns:
        (C, S, height, width).
    """
    (top, left), (bottom, right) = view.window.start, view.window.stop
    box = [list(slices), [top, bottom], [left, right]]
    cut = torch.from_numpy(crop_and_pad_nd(volume, box, -1 if labels else 0)).float()
    if cut.shape[-2:] != tuple(size):
        options = {"mode": "nearest-exact"} if labels else {"mode": "bilinear", "align_corners": False}
        cut = functional.interpolate(cut, size=tuple(size), **options)
    if view.flip_axis is not None:
        cut = cut.flip(view.flip_axis - 2)
    return cut.to(torch.int16) if labels else cut
