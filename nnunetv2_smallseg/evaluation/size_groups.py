"""Groups of lesions and cases by size. Every group is fixed on the reference, never on the prediction."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import ndimage

from nnunetv2_smallseg.errors import UsageError
from nnunetv2_smallseg.evaluation.boxes import bounding_box

__all__ = [
    "AREA_RATIO_LIMITS",
    "DIAMETER_LIMITS_MM",
    "SHARES",
    "area_ratio_groups",
    "area_ratio_percent",
    "diameter_bin",
    "diameter_bins",
    "equivalent_diameter_mm",
    "share_groups",
]

DIAMETER_LIMITS_MM: tuple[float, ...] = (5.0, 10.0, 20.0)
# SvANet: nested groups of images, by the area of the largest object in percent of the image.
AREA_RATIO_LIMITS: dict[str, float] = {"ultra small": 1.0, "small": 10.0, "all": 100.0}
# S³-Mamba: the smallest 30 % of the images, the next 30 %, the rest.
SHARES: dict[str, float] = {"small": 0.3, "medium": 0.6, "large": 1.0}


def equivalent_diameter_mm(volume: float, num_dimensions: int) -> float:
    """Diameter in mm of the sphere of a volume in mm3, or of the circle of an area in mm2."""
    return (6 * volume / math.pi) ** (1 / 3) if num_dimensions == 3 else 2 * math.sqrt(volume / math.pi)


def diameter_bins(limits_mm: Sequence[float] = DIAMETER_LIMITS_MM) -> list[str]:
    """Names of the bins between limits, smallest first: ``<5 mm``, ``5-10 mm``, ``10-20 mm``, ``>=20 mm``.

    Raises:
        UsageError: If the limits do not ascend from above 0.
    """
    if not limits_mm or any(not low < high < math.inf for low, high in zip((0, *limits_mm), limits_mm, strict=False)):
        raise UsageError(f"limits of size groups have to ascend from above 0, not {list(limits_mm)}")
    inner = [f"{low:g}-{high:g} mm" for low, high in itertools.pairwise(limits_mm)]
    return [f"<{limits_mm[0]:g} mm", *inner, f">={limits_mm[-1]:g} mm"]


def diameter_bin(diameter_mm: float, limits_mm: Sequence[float] = DIAMETER_LIMITS_MM) -> str:
    """Name of the bin of a diameter; a diameter on a limit belongs to the larger bin."""
    return diameter_bins(limits_mm)[sum(diameter_mm >= limit for limit in limits_mm)]


def area_ratio_percent(mask: np.ndarray) -> float:
    """SvANet's area ratio: area of the largest object of an image, in percent of the image.

    Closing by a 2 x 2 kernel (two dilations, two erosions), then the area that the outer contour of each object
    encloses, through the centres of its border pixels: a k x k square has (k - 1)^2, a line of one pixel 0, holes
    count as filled. Follows OpenCV's ``morphologyEx``, ``findContours`` and ``contourArea``.

    Args:
        mask: Boolean; (Y, X), or (Z, Y, X), of which the slice with most pixels counts.
    Returns:
        Within [0, 100]; 0 for an empty mask.
    """
    if mask.ndim == 3:
        pixels = mask.sum(axis=(1, 2))
        mask = mask[int(np.argmax(pixels))] if mask.shape[0] else np.zeros((1, 1), dtype=bool)
    box = bounding_box(mask)
    if box is None:
        return 0.0
    # OpenCV anchors an even kernel at its last pixel, for the dilation as for the erosion, so that the object moves by
    # 2 pixels down and to the right, where the image cuts it off.
    reach = tuple(
        slice(max(side.start - 2, 0), min(side.stop + 2, size)) for side, size in zip(box, mask.shape, strict=True)
    )
    closed = _running(mask[reach], np.logical_or, False)
    closed = _running(closed, np.logical_and, True)
    labels, count = ndimage.label(closed, structure=np.ones((3, 3)))
    areas = [_enclosed_area(labels[part] == number + 1) for number, part in enumerate(ndimage.find_objects(labels))]
    return 100 * max(areas) / mask.size if count else 0.0


def _running(mask: np.ndarray, combine: np.ufunc, outside: bool) -> np.ndarray:
    """Combines every pixel with the two before it along both axes: two passes of a 2 x 2 kernel."""
    for axis in range(2):
        widths = [(0, 0), (0, 0)]
        widths[axis] = (2, 0)
        padded = np.pad(mask, widths, constant_values=outside)
        length = mask.shape[axis]
        mask = combine.reduce([padded.take(range(start, start + length), axis=axis) for start in range(3)])
    return mask


def _enclosed_area(component: np.ndarray) -> float:
    """Area inside the outer contour through pixel centres: unit squares between four pixels, halves between three."""
    filled = ndimage.binary_fill_holes(component).astype(np.uint8)
    corners = filled[:-1, :-1] + filled[1:, :-1] + filled[:-1, 1:] + filled[1:, 1:]
    return float((corners == 4).sum() + (corners == 3).sum() / 2)


def area_ratio_groups(ratio_percent: float) -> list[str]:
    """The nested groups of SvANet an image belongs to, by its area ratio (strictly below the limit)."""
    return [name for name, limit in AREA_RATIO_LIMITS.items() if ratio_percent < limit]


def share_groups(sizes: Mapping[str, float]) -> dict[str, str]:
    """S³-Mamba's groups: the smallest 30 % of the cases are small, up to 60 % medium, the rest large.

    Args:
        sizes: Case -> size of its lesions, any unit. Of cases of equal size the one named first counts as smaller.
    Returns:
        Case -> ``small``, ``medium`` or ``large``. Of n cases, round(0.3 n) are small and round(0.6 n) small or medium.
    """
    ordered = sorted(sizes, key=lambda case: sizes[case])
    ends = [math.floor(share * len(ordered) + 0.5) for share in SHARES.values()]
    names = list(SHARES)
    return {case: names[sum(position >= end for end in ends)] for position, case in enumerate(ordered)}
