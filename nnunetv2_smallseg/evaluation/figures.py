"""The figures of a report, one style, each as PNG and SVG. Everything drawn is in the tables and statistics given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from nnunetv2_smallseg.evaluation.froc import FROC_RATES, Froc
from nnunetv2_smallseg.evaluation.resampling import Resampling, bootstrap_ratios, percentile_interval
from nnunetv2_smallseg.evaluation.result_tables import METRICS, ResultTables, Units
from nnunetv2_smallseg.evaluation.statistics import Comparison, Detection
from nnunetv2_smallseg.files import replacing

__all__ = [
    "COLOURS",
    "INK",
    "QUIET",
    "WIDE",
    "FigureFile",
    "draw_detection_by_size",
    "draw_dice_against_volume",
    "draw_false_positives",
    "draw_froc",
    "draw_paired_differences",
    "draw_recall_against_diameter",
    "figure_style",
    "new_figure",
    "save_figure",
    "set_log_axis",
    "short_name",
]

# Told apart with every kind of colour vision (Okabe and Ito); markers say the same without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, QUIET, GRID, FALSE = "#222222", "#6B6B6B", "#E4E4E4", "#B4B4B4"
NAME_LENGTH, HALF_NAME_LENGTH = 44, 27
# Inches. Two narrow figures stand beside each other, at the scale of a wide one.
NARROW, WIDE, HEIGHT = 6.2, 12.8, 4.2
LOG_STEPS = ((1,), (1, 2, 5))
# Beyond this many points, dots become a picture inside the SVG.
MANY_POINTS = 1500
# No mean curve through fewer lesions; lesions weigh by a Gaussian of this many powers of ten in volume.
FEW_LESIONS, BANDWIDTH = 15, 0.2
# Scores whose differences share an axis. Specificity and mean absolute error differ by far less than these.
PAIRED_SCORES = ("dice", "iou", "sensitivity", "precision", "f2", "nsd", "auc")

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "text.parse_math": False,  # names may hold a dollar sign
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "svg.hashsalt": "smallseg",  # the same figure gives the same file
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class FigureFile:
    """A drawn figure.

    Attributes:
        name: File name without suffix.
        title: Heading.
        caption: What is shown, and how it was counted.
        png: The PNG file.
        svg: The SVG file.
        wide: Whether it needs the width of two others.
    """

    name: str
    title: str
    caption: str
    png: Path
    svg: Path
    wide: bool = False


@contextmanager
def figure_style() -> Iterator[None]:
    """Matplotlib with the style of the report, whatever was set before."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches that needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, folder: Path, name: str) -> tuple[Path, Path]:
    """Writes ``name.png`` and ``name.svg`` into a folder, each whole or not at all."""
    files = folder / f"{name}.png", folder / f"{name}.svg"
    for file in files:
        metadata = {"Date": None} if file.suffix == ".svg" else None
        with replacing(file) as temporary:
            figure.savefig(temporary, format=file.suffix[1:], metadata=metadata)
    return files


def short_name(name: str, length: int = NAME_LENGTH) -> str:
    """The name, with its middle left out if it is longer than ``length``."""
    if len(name) <= length:
        return name
    begin = (length - 1) // 2
    return f"{name[:begin]}…{name[len(name) - (length - 1 - begin) :]}"


def colour(index: int) -> str:
    """Colour of a prediction."""
    return COLOURS[index % len(COLOURS)]


def marker(index: int) -> str:
    """Marker of a prediction."""
    return MARKERS[index % len(MARKERS)]


def add_legend(figure: Figure, axes: Axes) -> None:
    """One legend above the figure, for the handles of ``axes``."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max((len(label) for label in labels), default=0)
    columns = 1 if longest > 34 else max(1, min(len(labels), 90 // max(longest, 14)))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=1.8, columnspacing=2)


def plain_number(value: float, _position: object = None) -> str:
    """A tick label without exponents: 0.1, 5, 2,000."""
    return f"{value:,.0f}" if value >= 1 and float(value).is_integer() else f"{value:g}"


def set_log_axis(axis: matplotlib.axis.Axis, low: float, high: float) -> None:
    """Round ticks in each power of ten, the fewest that are at least three in the range; even steps if it is narrow."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in LOG_STEPS:
        ticks = [step * 10.0**power for power in powers for step in steps]
        if sum(low <= tick <= high for tick in ticks) >= 3:
            break
    else:
        ticks = MaxNLocator(6).tick_values(low, high)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(plain_number))


def panels(figure: Figure, names: Sequence[str], length: int, max_columns: int = 3) -> list[Axes]:
    """One panel a name, in rows, with common axes and the name, at most ``length`` letters of it, above."""
    columns = min(len(names), max_columns)
    rows = math.ceil(len(names) / columns)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for unused in grid.flat[len(names) :]:
        unused.remove()
    for index, (axes, name) in enumerate(zip(grid.flat, names, strict=False)):
        axes.set_title(short_name(name, length), color=colour(index), fontweight="bold")
        # The axis labels of a removed panel's column belong to the lowest panel that is left.
        axes.tick_params(labelbottom=index + columns >= len(names))
    return list(grid.flat[: len(names)])


def panel_size(num_panels: int, height: float) -> tuple[float, float]:
    """Width and height in inches of a figure of panels."""
    return (WIDE if num_panels > 2 else NARROW), height * math.ceil(num_panels / 3)


def draw_recall_against_diameter(
    tables: ResultTables,
    region: str,
    generator: np.random.Generator,
    resampling: Resampling,
    units: Units,
) -> Figure | None:
    """Recall of lesions of similar diameter with intervals, above the number of lesions.

    Lesions are put into up to eight classes of the diameter with equal numbers; a point stands at the median diameter
    of its class. Intervals are bootstrapped over cases.

    Returns:
        None if the reference holds no lesion of known diameter.
    """
    cases = {name: index for index, name in enumerate(tables.case_names(region))}
    lesions = [
        [row for row in tables.lesion_rows(region, prediction) if row["equivalent_diameter_mm"] > 0]
        for prediction in tables.predictions
    ]
    everything = np.array([row["equivalent_diameter_mm"] for rows in lesions for row in rows])
    if len(everything) == 0:
        return None
    most = max(len(rows) for rows in lesions)
    num_classes = int(np.clip(most // 12, 1, 8))
    edges = np.unique(np.quantile(everything, np.linspace(0, 1, num_classes + 1)))
    figure = new_figure(NARROW, HEIGHT)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    groups = resampling.groups(list(cases))
    for index, (prediction, rows) in enumerate(zip(tables.predictions, lesions, strict=True)):
        diameters = np.array([row["equivalent_diameter_mm"] for row in rows])
        classes = np.clip(np.searchsorted(edges, diameters, side="right") - 1, 0, max(len(edges) - 2, 0))
        counts = np.zeros((2, len(cases), max(len(edges) - 1, 1)))
        for row, number in zip(rows, classes, strict=True):
            counts[:, cases[row["case"]], number] += row["detected"], 1
        filled = counts[1].sum(axis=0) > 0
        counts = counts[:, :, filled]
        samples = bootstrap_ratios(*counts, generator, groups, resampling.num_samples)
        limits = percentile_interval(samples, resampling.level)
        recall = counts[0].sum(axis=0) / counts[1].sum(axis=0)
        middle = np.array([np.median(diameters[classes == number]) for number in np.flatnonzero(filled)])
        # Beside each other, not on top of each other.
        middle = middle * 1.025 ** (index - (len(tables.predictions) - 1) / 2)
        whiskers = np.maximum(np.stack([recall - limits[0], limits[1] - recall]), 0)
        upper.errorbar(
            middle, recall, whiskers, color=colour(index), marker=marker(index), markersize=5, linewidth=1.6,
            elinewidth=1, capsize=2.5, label=short_name(prediction), clip_on=False, zorder=3,
        )  # fmt: skip
    upper.set_ylim(0, 1.02)
    upper.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    upper.set_ylabel("lesions detected")
    low, high = everything.min() / 1.1, everything.max() * 1.1
    upper.set_xscale("log")
    set_log_axis(lower.xaxis, low, high)
    upper.set_xlim(low, high)
    fullest = max(lesions, key=len)
    diameters = [row["equivalent_diameter_mm"] for row in fullest]
    lower.hist(diameters, bins=np.geomspace(low, high, 25), color="#9AA5AE", edgecolor="white", linewidth=0.5)
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    lower.set_ylabel("lesions")
    lower.set_xlabel(f"equivalent diameter of the reference lesion ({units.length})")
    lower.text(
        1, 1, f"{len(diameters)} lesions in {len(cases)} cases", transform=lower.transAxes, ha="right", va="bottom",
        fontsize=8.5, color=QUIET,
    )  # fmt: skip
    add_legend(figure, upper)
    return figure


def draw_dice_against_volume(tables: ResultTables, region: str, units: Units, wide: bool = True) -> Figure | None:
    """Dice of every reference lesion against its volume, with the mean of lesions of similar volume.

    Args:
        tables: Tables.
        region: Region to draw.
        units: Unit of volumes.
        wide: Width of two figures; with one or two predictions it can do with less.

    Returns:
        None if no lesion has a Dice.
    """
    lesions = [
        [row for row in tables.lesion_rows(region, name) if row["volume_mm3"] > 0 and not math.isnan(row["dice"])]
        for name in tables.predictions
    ]
    volumes = np.array([row["volume_mm3"] for rows in lesions for row in rows])
    if len(volumes) == 0:
        return None
    figure = new_figure(*((WIDE, 3.6 * math.ceil(len(lesions) / 3)) if wide else (NARROW, HEIGHT)))
    grid = panels(figure, tables.predictions, NAME_LENGTH if wide or len(lesions) == 1 else HALF_NAME_LENGTH)
    for index, (axes, rows) in enumerate(zip(grid, lesions, strict=True)):
        volume = np.array([row["volume_mm3"] for row in rows])
        dice = np.array([row["dice"] for row in rows])
        found = np.array([row["detected"] == 1 for row in rows], dtype=bool)
        options = {"s": 17, "linewidths": 0.9, "clip_on": False, "rasterized": len(rows) > MANY_POINTS, "zorder": 3}
        axes.scatter(volume[found], dice[found], color=colour(index), alpha=0.5, edgecolors="none", **options)
        options |= {"facecolors": "none", "edgecolors": colour(index)}
        axes.scatter(volume[~found], dice[~found], alpha=0.8, **options)
        if len(rows) >= FEW_LESIONS:
            places = np.linspace(*np.quantile(np.log10(volume), (0.05, 0.95)), 80)
            weights = np.exp(-0.5 * ((places[:, None] - np.log10(volume)) / BANDWIDTH) ** 2)
            axes.plot(10**places, weights @ dice / weights.sum(axis=1), color=INK, linewidth=1.8, zorder=4)
    grid[0].set_xscale("log")
    grid[0].set_ylim(0, 1.02)
    low, high = volumes.min() / 1.3, volumes.max() * 1.3
    grid[0].set_xlim(low, high)
    for axes in grid:
        set_log_axis(axes.xaxis, low, high)
    size = "area" if units.num_dimensions == 2 else "volume"
    figure.supxlabel(f"{size} of the reference lesion ({units.volume})", fontsize=9)
    figure.supylabel("Dice of the lesion", fontsize=9)
    return figure


def draw_false_positives(tables: ResultTables, region: str, detections: Sequence[Detection]) -> Figure:
    """How many cases have no, one, two, ... false positives, with the mean in the legend.

    Args:
        tables: Tables.
        region: Region to draw.
        detections: Detection of lesions of all sizes in this region, one a prediction.
    """
    present = tables.present(region)
    counts = tables.lesion_sums(region, lambda row: float(row["kind"] == "false_positive"))
    # The last bar takes the few cases with more.
    limit = int(max(1, min(12, counts.max())))
    figure = new_figure(NARROW, HEIGHT)
    axes = figure.add_subplot()
    width = 0.82 / len(tables.predictions)
    for index, prediction in enumerate(tables.predictions):
        numbers = np.minimum(counts[present[:, index], index], limit).astype(int)
        heights = np.bincount(numbers, minlength=limit + 1)
        detection = next(row for row in detections if row.prediction == prediction)
        mean = detection.false_positives_per_case
        interval = "" if math.isnan(mean.low) else f" ({mean.low:.2f} to {mean.high:.2f})"
        positions = np.arange(limit + 1) + (index - (len(tables.predictions) - 1) / 2) * width
        bars = axes.bar(
            positions, heights, width * 0.94, color=colour(index),
            label=f"{short_name(prediction)}: {mean.value:.2f}{interval} per case",
        )  # fmt: skip
        if width > 0.15:
            axes.bar_label(bars, [str(height) if height else "" for height in heights], fontsize=7.5, color=QUIET)
    axes.set_xticks(range(limit + 1))
    if counts.max() > limit:
        axes.set_xticklabels([*map(str, range(limit)), f"≥ {limit}"])
    axes.grid(axis="x", visible=False)
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("false positives in a case")
    axes.set_ylabel("cases")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=1)
    return figure


def draw_froc(predictions: Sequence[str], curves: Sequence[Froc]) -> Figure:
    """FROC curves with intervals over cases.

    Args:
        predictions: All predictions, which give colours their order.
        curves: Curves of some or all of them.
    """
    figure = new_figure(NARROW, HEIGHT)
    axes = figure.add_subplot()
    begin = FROC_RATES[0] / 2
    for curve in curves:
        index = predictions.index(curve.prediction)
        end = curve.false_positives_per_case[-1]
        shown = curve.grid <= max(end, begin)
        axes.fill_between(
            curve.grid[shown], curve.low[shown], curve.high[shown], color=colour(index), alpha=0.13, linewidth=0
        )
        label = f"{short_name(curve.prediction)}: mean recall {curve.mean_recall.value:.3f}"
        # A logarithmic axis has no 0: the curve starts with what it has reached where the axis begins.
        start = int((curve.false_positives_per_case <= begin).sum()) - 1
        rates = np.maximum(curve.false_positives_per_case[start:], begin)
        axes.step(rates, curve.recall[start:], where="post", color=colour(index), linewidth=1.8, label=label)
        axes.plot(
            rates[-1],
            curve.recall[-1],
            color=colour(index),
            marker=marker(index),
            markersize=6,
            clip_on=False,
            zorder=4,
        )
    axes.set_xscale("log")
    most = max(curve.false_positives_per_case[-1] for curve in curves)
    axes.set_xlim(begin, max(most * 1.1, next((rate for rate in FROC_RATES[3:] if rate >= most), most)))
    axes.xaxis.set_major_locator(FixedLocator((*FROC_RATES, *(2.0**power for power in range(4, 12)))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.set_xlabel("false positives per case")
    axes.set_ylabel("lesions detected")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=1)
    return figure


def draw_detection_by_size(tables: ResultTables, region: str, detections: Sequence[Detection]) -> Figure | None:
    """Lesions detected and missed, and false positives, in each size bin; one panel a prediction.

    Args:
        tables: Tables.
        region: Region to draw.
        detections: Detection in this region, of every size bin and prediction.

    Returns:
        None if there is no lesion.
    """
    if not tables.size_bins:
        return None
    figure = new_figure(*panel_size(len(tables.predictions), HEIGHT if len(tables.predictions) <= 2 else 3.4))
    grid = panels(figure, tables.predictions, NAME_LENGTH if len(tables.predictions) != 2 else HALF_NAME_LENGTH)
    highest = max(max(row.num_lesions, row.num_false_positives) for row in detections if row.size_bin)
    for index, (axes, prediction) in enumerate(zip(grid, tables.predictions, strict=True)):
        rows = [
            next(row for row in detections if row.prediction == prediction and row.size_bin == name)
            for name in tables.size_bins
        ]
        places = np.arange(len(rows))
        found = np.array([row.num_detected for row in rows])
        missed = np.array([row.num_lesions for row in rows]) - found
        false = np.array([row.num_false_positives for row in rows])
        axes.bar(places - 0.17, found, 0.44, color=colour(index))
        axes.bar(
            places - 0.17, missed, 0.44, bottom=found, color="white", edgecolor=colour(index), linewidth=0.9,
            hatch="////",
        )  # fmt: skip
        axes.bar(places + 0.25, false, 0.28, color=FALSE)
        for place, row in zip(places, rows, strict=True):
            if row.num_lesions:
                text = f"{row.num_detected}/{row.num_lesions}"
                axes.text(place - 0.17, row.num_lesions + highest * 0.015, text, ha="center", va="bottom", fontsize=7.5)
            if row.num_false_positives:
                axes.text(
                    place + 0.25, row.num_false_positives + highest * 0.015, row.num_false_positives, ha="center",
                    va="bottom", fontsize=7.5, color=QUIET,
                )  # fmt: skip
        axes.set_xticks(places, tables.size_bins)
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    grid[0].set_ylim(0, highest * 1.1)
    figure.supxlabel("size of the lesion", fontsize=9)
    figure.supylabel("lesions", fontsize=9)
    handles = [
        Patch(facecolor=INK, label="detected"),
        Patch(facecolor="white", edgecolor=INK, hatch="////", label="missed"),
        Patch(facecolor=FALSE, label="false positive"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    return figure


def draw_paired_differences(
    tables: ResultTables, region: str, comparisons: Sequence[Comparison], generator: np.random.Generator, units: Units
) -> Figure | None:
    """Differences of two predictions: one dot a case, mean and interval as a bar; scores above, distances below.

    Args:
        tables: Tables.
        region: Region to draw.
        comparisons: Comparisons of one pair of predictions in this region.
        generator: Spreads the dots across their row.
        units: Unit of distances.

    Returns:
        None if there is nothing to compare.
    """
    scores, distances = (
        [row for row in comparisons if row.num_cases and row.metric in names]
        for names in (PAIRED_SCORES, [name for name, metric in METRICS.items() if metric.unit == "length"])
    )
    sides = [rows for rows in (scores, distances) if rows]
    if not sides:
        return None
    first, second = (tables.predictions.index(name) for name in (comparisons[0].first, comparisons[0].second))
    lengths = [len(rows) for rows in sides]
    figure = new_figure(WIDE, 0.6 + 0.55 * len(sides) + 0.38 * sum(lengths))
    grid = figure.subplots(len(sides), 1, squeeze=False, height_ratios=lengths)[:, 0]
    for axes, rows in zip(grid, sides, strict=True):
        for place, row in enumerate(rows):
            values = tables.values(region, row.metric)
            differences = values[:, second] - values[:, first]
            differences = differences[~np.isnan(differences)]
            across = place + generator.uniform(-0.22, 0.22, len(differences))
            # Coloured by which prediction is better, whatever the direction of the metric.
            signs = differences * (1 if METRICS[row.metric].better == "higher" else -1)
            colours = np.where(signs > 0, colour(second), np.where(signs < 0, colour(first), QUIET))
            axes.scatter(
                differences, across, s=9, c=colours, alpha=0.45, linewidths=0, rasterized=len(differences) > MANY_POINTS
            )
            limits = row.difference
            if not math.isnan(limits.low):
                axes.plot([limits.low, limits.high], [place, place], color=INK, linewidth=2.2, zorder=4)
            axes.plot(limits.value, place, color=INK, marker="D", markersize=4.5, zorder=5)
        axes.axvline(0, color=QUIET, linewidth=1, zorder=1)
        labels = [METRICS[row.metric].label + (" ↓" if METRICS[row.metric].better == "lower" else "") for row in rows]
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("difference" + (f" ({units.length})" if rows is distances else ""))
        # Zero in the middle shows at a glance to which side the cases fall.
        limit = 1.05 * max(abs(bound) for bound in axes.dataLim.intervalx) or 1.0  # 0 if nothing differs
        axes.set_xlim(-limit, limit)
    for index in (second, first):
        grid[0].scatter([], [], s=16, color=colour(index), label=f"{short_name(tables.predictions[index])} better")
    add_legend(figure, grid[0])
    return figure


def draw_if_any(
    draw: Callable[[], Figure | None], folder: Path, name: str, title: str, caption: str
) -> list[FigureFile]:
    """Draws and saves a figure; an empty list if there was nothing to draw."""
    with figure_style():
        figure = draw()
        if figure is None:
            return []
        is_wide = bool(figure.get_figwidth() > NARROW)
        return [FigureFile(name, title, caption, *save_figure(figure, folder, name), wide=is_wide)]
