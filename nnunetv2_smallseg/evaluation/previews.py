"""Pictures of the worst cases: planes through the worst lesion, with reference and prediction outlined."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from scipy import ndimage

from nnunetv2_smallseg.evaluation.figures import figure_style, new_figure
from nnunetv2_smallseg.evaluation.result_tables import ResultTables

__all__ = ["Preview", "WorstCase", "draw_preview", "worst_cases", "worst_place"]

# Told apart with every kind of colour vision, on any grey (Okabe and Ito).
REFERENCE_COLOUR, PREDICTION_COLOUR = "#56B4E9", "#E69F00"
# A plane shows this many times the size of the lesion, and at least this many of the finest voxels.
FIELD_FACTOR, MIN_FIELD_VOXELS = 2.5, 64
# Share of an edge that is drawn in a dashed outline.
DASH_SHARE = 0.6


@dataclass(frozen=True)
class WorstCase:
    """A case to look at.

    Attributes:
        prediction: Name of the prediction.
        case: Name of the case.
        region: Region of the labels.
        rank: 1 for the worst of its prediction and region.
        dice: Dice of the case, NaN where undefined.
        num_missed: Reference lesions that were not detected.
        num_false_positives: Predicted lesions that match none.
        missed_volume_mm3: Volume of the missed lesions together.
    """

    prediction: str
    case: str
    region: str
    rank: int
    dice: float
    num_missed: int
    num_false_positives: int
    missed_volume_mm3: float


@dataclass(frozen=True)
class Preview:
    """The picture of a case, for ``write_report``: ``png`` holds the bytes of a PNG file."""

    prediction: str
    case: str
    region: str
    png: bytes


def worst_cases(tables: ResultTables, number: int = 10) -> list[WorstCase]:
    """The cases with the lowest Dice, of each prediction and region.

    A case whose Dice is undefined, because it has no lesion, counts as 0 if it has false positives and is left out
    otherwise. Cases of equal Dice are ordered by missed volume, then by false positives, most first. Cases with a Dice
    of 1 and without a missed lesion or false positive are not among them.
    """
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in tables.lesions:
        errors = found.setdefault((row["prediction"], row["region"], row["case"]), [0, 0, 0.0])
        if row["kind"] == "false_positive":
            errors[1] += 1
        elif row["detected"] != 1:
            errors[0] += 1
            errors[2] += 0.0 if math.isnan(row["volume_mm3"]) else row["volume_mm3"]
    worst = []
    for region in tables.regions:
        for prediction in tables.predictions:
            candidates = []
            for row in tables.cases:
                if (row["prediction"], row["region"]) != (prediction, region):
                    continue
                missed, false_positives, volume = found.get((prediction, region, row["case"]), [0, 0, 0.0])
                dice = row.get("dice", math.nan)
                if missed or false_positives or dice < 1:
                    order = (0.0 if math.isnan(dice) else dice, -volume, -false_positives)
                    candidates.append((order, row["case"], dice, missed, false_positives, volume))
            for rank, (_, case, dice, missed, false_positives, volume) in enumerate(
                sorted(candidates)[:number], start=1
            ):
                worst.append(
                    WorstCase(prediction, case, region, rank, dice, int(missed), int(false_positives), float(volume))
                )
    return worst


def worst_place(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]
) -> tuple[tuple[int, ...], np.ndarray] | None:
    """The voxel a preview goes through, and the lesion around it.

    Of the connected components of reference and prediction together, the one with the lowest Dice is the worst: missed
    lesions and false positives have 0, and the larger of two comes first. The voxel is the innermost one of its error,
    or of the component if there is no error.

    Args:
        reference: (Z, Y, X) or (Y, X) bool.
        prediction: Likewise.
        spacing: Voxel size in mm, same axis order.

    Returns:
        Voxel and component, (Z, Y, X) or (Y, X) bool; None if both label maps are empty.
    """
    components, number = ndimage.label(reference | prediction, np.ones((3,) * reference.ndim))
    if number == 0:
        return None
    labels = np.arange(1, number + 1)
    sizes = [ndimage.sum_labels(part, components, labels) for part in (reference, prediction, reference & prediction)]
    dice = 2 * sizes[2] / (sizes[0] + sizes[1])
    worst = min(range(number), key=lambda index: (round(dice[index], 12), -max(sizes[0][index], sizes[1][index])))
    component = components == labels[worst]
    error = component & (reference != prediction)
    part = error if error.any() else component
    # The border of the image is no surface: a padded copy would put the place into the middle of cut lesions instead.
    box = tuple(
        slice(max(bounds.start - 1, 0), bounds.stop + 1) for bounds in ndimage.find_objects(part.astype(np.uint8))[0]
    )
    depth = ndimage.distance_transform_edt(np.pad(part[box], 1), sampling=tuple(spacing))
    inner = np.argwhere(depth >= depth.max() - 1e-9) - 1 + [bounds.start for bounds in box]
    # Of several innermost voxels the one nearest to their middle.
    distances = (((inner - inner.mean(axis=0)) * np.asarray(spacing)) ** 2).sum(axis=1)
    return tuple(int(index) for index in inner[distances.argmin()]), component


def outline(mask: np.ndarray) -> np.ndarray:
    """The edges between the pixels inside and outside of a mask, so that single pixels keep their shape.

    Args:
        mask: (H, W) bool.

    Returns:
        (num_edges, 2, 2) begin and end as (column, row) in pixels; pixel centres are whole numbers.
    """
    padded = np.pad(mask, 1)
    rows, columns = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    level = np.stack([np.stack([columns - 0.5, rows - 0.5], -1), np.stack([columns + 0.5, rows - 0.5], -1)], 1)
    rows, columns = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    upright = np.stack([np.stack([columns - 0.5, rows - 0.5], -1), np.stack([columns - 0.5, rows + 0.5], -1)], 1)
    return np.concatenate([level, upright])


def field_of_view(component: np.ndarray, place: tuple[int, ...], spacing: Sequence[float]) -> tuple[list[float], float]:
    """The cube a preview shows: its centre in voxels, and its side in mm."""
    bounds = ndimage.find_objects(component.astype(np.uint8))[0]
    extent = max((bound.stop - bound.start) * step for bound, step in zip(bounds, spacing, strict=True))
    largest = max(size * step for size, step in zip(component.shape, spacing, strict=True))
    side = min(max(FIELD_FACTOR * extent, MIN_FIELD_VOXELS * min(spacing)), largest)
    if extent <= side / 2:
        return [float(index) for index in place], side
    # A large lesion stays in view as a whole, wherever in it the place is.
    return [(bound.start + bound.stop - 1) / 2 for bound in bounds], side


def grey_range(image: np.ndarray) -> tuple[float, float]:
    """Values shown black and white: percentiles 0.5 and 99.5 of what is in view."""
    finite = image[np.isfinite(image)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(finite, [0.5, 99.5])
    return (float(low), float(high)) if high > low else (float(low) - 1, float(low) + 1)


def draw_plane(
    axes: Axes,
    image: np.ndarray | None,
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing: tuple[float, float],
    centre: tuple[float, float],
    side: float,
    upright: bool,
    grey: tuple[float, float],
) -> None:
    """One plane (H, W) with both outlines.

    Args:
        axes: Where to draw; its units become mm from ``centre``.
        image: (H, W), (H, W, 3) or None.
        reference: (H, W) bool.
        prediction: (H, W) bool.
        spacing: mm of a row and of a column.
        centre: Row and column in the middle.
        side: Side of the shown square in mm.
        upright: Puts the first row at the bottom.
        grey: Values shown black and white.
    """
    steps, middle = np.array(spacing[::-1]), np.array(centre[::-1])  # (column, row)
    left, top = (-0.5 - middle) * steps
    right, bottom = (np.array(reference.shape[::-1]) - 0.5 - middle) * steps
    options = {"extent": (left, right, bottom, top), "origin": "upper", "interpolation": "nearest"}
    if image is None:
        axes.imshow(np.full(reference.shape, 0.25), cmap="gray", vmin=0, vmax=1, **options)
        for mask, colour in ((reference, REFERENCE_COLOUR), (prediction, PREDICTION_COLOUR)):
            shade = np.zeros((*mask.shape, 4))
            shade[mask] = to_rgba(colour, 0.3)
            axes.imshow(shade, **options)
    else:
        axes.imshow(image, cmap="gray", vmin=grey[0], vmax=grey[1], **options)
    # Dashes over a solid line: where both agree, both are seen. Every edge of a pixel is a dash of its own, because
    # matplotlib would begin its pattern anew at each of them.
    for mask, colour, share in ((reference, REFERENCE_COLOUR, 1.0), (prediction, PREDICTION_COLOUR, DASH_SHARE)):
        edges = (outline(mask) - middle) * steps
        centres = edges.mean(axis=1, keepdims=True)
        axes.add_collection(LineCollection(centres + share * (edges - centres), colors=colour, linewidths=2))
    axes.set_facecolor("black")
    axes.set_aspect("equal")
    axes.set_xlim(-side / 2, side / 2)
    axes.set_ylim(*((-side / 2, side / 2) if upright else (side / 2, -side / 2)))
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def add_scale_bar(axes: Axes, side: float, unit: str) -> None:
    """A white bar of a round length, at most a third of the square, with its length."""
    wanted = side / 3
    power = 10.0 ** math.floor(math.log10(wanted))
    length = max(step * power for step in (1, 2, 5) if step * power <= wanted)
    shadow = [withStroke(linewidth=3.5, foreground="black")]
    options = {"transform": axes.transAxes, "color": "white", "path_effects": shadow}
    axes.add_line(Line2D([0.05, 0.05 + length / side], [0.05, 0.05], linewidth=2.5, solid_capstyle="butt", **options))
    axes.text(0.05, 0.08, f"{length:g} {unit}", fontsize=12, ha="left", va="bottom", **options)


def draw_preview(
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing: Sequence[float],
    image: np.ndarray | None = None,
    unit: str = "mm",
) -> bytes:
    """Planes through the worst lesion of a case (``worst_place``): three of a volume, one of a 2D image.

    Args:
        reference: (Z, Y, X) or (Y, X), non-zero is the region.
        prediction: Likewise, of the same shape.
        spacing: Voxel size, same axis order.
        image: Values of the same shape, any range; in 2D also (Y, X, 3) colours, bytes or in [0, 1]. None draws the
            labels alone.
        unit: Unit of ``spacing``: "mm", or "px" for images whose pixel size nobody knows.

    Returns:
        A PNG file.

    Raises:
        ValueError: If shapes or spacing do not fit.
    """
    reference, prediction = np.asarray(reference) != 0, np.asarray(prediction) != 0
    if reference.shape != prediction.shape or reference.ndim not in (2, 3):
        raise ValueError(
            f"reference has shape {reference.shape}, prediction {prediction.shape}; both have to be (Z, Y, X) or (Y, X)"
        )
    if len(spacing) != reference.ndim or min(spacing) <= 0:
        raise ValueError(f"spacing is {tuple(spacing)}; {reference.ndim} values above 0 are needed")
    has_colours = image is not None and image.shape == (*reference.shape, 3) and reference.ndim == 2
    if image is not None and not has_colours and image.shape != reference.shape:
        raise ValueError(f"image has shape {image.shape}; {reference.shape} is needed, as the labels have")
    found = worst_place(reference, prediction, spacing)
    place, component = found or (tuple(size // 2 for size in reference.shape), np.ones_like(reference))
    centre, side = field_of_view(component, place, spacing)
    cut = tuple(
        slice(max(math.floor(middle - side / 2 / step), 0), math.ceil(middle + side / 2 / step) + 1)
        for middle, step in zip(centre, spacing, strict=True)
    )
    grey = (0.0, 1.0) if image is None or has_colours else grey_range(image[cut])
    names = ("z", "y", "x")[-reference.ndim :]
    fixed_axes = (0, 1, 2) if reference.ndim == 3 else (None,)
    with figure_style():
        figure = new_figure(3.1 * len(fixed_axes), 3.4)
        for axes, fixed in zip(figure.subplots(1, len(fixed_axes), squeeze=False)[0], fixed_axes, strict=True):
            index = tuple(place[axis] if axis == fixed else bounds for axis, bounds in enumerate(cut))
            row, column = (axis for axis in range(reference.ndim) if axis != fixed)
            draw_plane(
                axes,
                None if image is None else image[index],
                reference[index],
                prediction[index],
                spacing=(spacing[row], spacing[column]),
                centre=(centre[row] - cut[row].start, centre[column] - cut[column].start),
                side=side,
                upright=reference.ndim == 3 and row == 0,  # the first slice of a volume is the lowest
                grey=grey,
            )
            shown = f"{names[fixed]} = {place[fixed]}" if fixed is not None else f"y = {place[0]}, x = {place[1]}"
            axes.set_title(shown, loc="center", fontsize=12, pad=4)
        add_scale_bar(figure.axes[0], side, unit)
        target = io.BytesIO()
        figure.savefig(target, format="png", dpi=110, bbox_inches="tight", pad_inches=0.05)
    return target.getvalue()
