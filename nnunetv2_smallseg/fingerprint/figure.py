"""The picture of a fingerprint: sizes above, what nnU-Net makes of them below; in the style of the report."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from nnunetv2_smallseg.evaluation.figures import (
    COLOURS,
    INK,
    QUIET,
    WIDE,
    figure_style,
    new_figure,
    set_log_axis,
    short_name,
)
from nnunetv2_smallseg.files import replacing
from nnunetv2_smallseg.fingerprint.summary import ALL, length_unit

__all__ = ["draw_fingerprint"]

HEIGHT = 7.6
# Lesions and patches in the paired bars.
LESIONS, PATCHES = "#9AA5AE", COLOURS[0]


def draw_fingerprint(content: Mapping, file: Path) -> bytes:
    """Draws a fingerprint.

    Args:
        content: Content of ``lesion_fingerprint.json``.
        file: PNG file to write, whole or not at all.
    Returns:
        The same picture as SVG.
    """
    with figure_style():
        figure = new_figure(WIDE, HEIGHT)
        grid = figure.subplots(2, 3).flat
        draw = (_diameters, _lesions_per_case, _extents, _vanished, _seen, _patches)
        has_lesions = content["sampling"]["classes"][ALL]["count"] > 0
        for axes, panel in zip(grid, draw, strict=True):
            if has_lesions:
                panel(axes, content)
            else:
                axes.set_axis_off()
        lesions = content["lesions"][ALL]["count"]
        figure.suptitle(
            f"{short_name(content['dataset'])}: {lesions:,} lesions in {content['num_cases']:,} cases; "
            f"{content['configuration']} of {short_name(content['plans'])}",
            fontsize=11, x=0.01, ha="left", fontweight="bold",
        )  # fmt: skip
        with replacing(file) as temporary:
            figure.savefig(temporary, format="png")
        svg = io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return svg.getvalue()


def _diameters(axes: Axes, content: Mapping) -> None:
    """How many lesions have which diameter, a line a class."""
    axes.set_title("Size")
    everything = content["lesions"][ALL]["histogram"]
    for index, name in enumerate(content["classes"]):
        histogram = content["lesions"][name]["histogram"]
        if not histogram["counts"]:
            continue
        color = COLOURS[index % len(COLOURS)]
        axes.stairs(histogram["counts"], histogram["edges_mm"], color=color, label=short_name(name, 20), linewidth=1.6)
        axes.stairs(histogram["counts"], histogram["edges_mm"], color=color, alpha=0.2, fill=True)
    axes.set_xscale("log")
    edges = everything["edges_mm"]
    set_log_axis(axes.xaxis, edges[0], edges[-1])
    axes.set_xlim(edges[0], edges[-1])
    for limit in content["size_bins"]["limits_mm"]:
        if edges[0] < limit < edges[-1]:
            axes.axvline(limit, color=QUIET, linewidth=0.8, linestyle=":")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel(f"equivalent diameter ({length_unit(content)})")
    axes.set_ylabel("lesions")
    if len(content["classes"]) > 1:
        axes.legend()


def _lesions_per_case(axes: Axes, content: Mapping) -> None:
    """How many cases have how many lesions."""
    axes.set_title("Lesions of a case")
    numbers = np.array([sum(case["num_lesions"].values()) for case in content["cases"].values()])
    width = max(1, int(np.ceil((numbers.max() + 1) / 20)))
    edges = np.arange(0, numbers.max() + width + 1, width) - (0.5 if width == 1 else 0)
    axes.hist(numbers, edges, color=LESIONS, edgecolor="white", linewidth=0.5)
    for locate in (axes.xaxis, axes.yaxis):
        locate.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("lesions" if width == 1 else f"lesions (bars of {width})")
    axes.set_ylabel("cases")


def _extents(axes: Axes, content: Mapping) -> None:
    """Extents of the lesions along the axes beside the patch."""
    axes.set_title("Extent and patch")
    extents = content["lesions"][ALL]["extent_voxels"]
    names = ("slices", "rows", "columns")[-len(extents["p50"]) :]
    patch = content["patch"]["patch_size"]
    for place, _ in enumerate(names):
        low, middle, high, p99, most = (extents[key][place] for key in ("p5", "p50", "p95", "p99", "max"))
        axes.plot([low, most], [place, place], color=LESIONS, linewidth=1.5)
        axes.plot([low, high], [place, place], color=LESIONS, linewidth=8, solid_capstyle="butt")
        axes.plot(middle, place, color=INK, marker="|", markersize=13, markeredgewidth=2, linestyle="none")
        axes.plot(p99, place, color=COLOURS[1], marker="D", markersize=5, linestyle="none",
                  label="99 % of the lesions" if place == 0 else None)  # fmt: skip
        axes.plot(patch[place], place, color=PATCHES, marker="s", markersize=7, linestyle="none",
                  label="patch" if place == 0 else None)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(0.8, 1.3 * max(*extents["max"], *patch))
    set_log_axis(axes.xaxis, 0.8, 1.3 * max(*extents["max"], *patch))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.9)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("voxels (bar: 5 % to 95 %, line to the largest)")
    axes.legend(loc="upper right", ncols=2, borderaxespad=0, handletextpad=0.2, columnspacing=1)


def _vanished(axes: Axes, content: Mapping) -> None:
    """Share that vanishes by resampling and from the targets of each level, a line a size bin."""
    by_slice = len(content["target_spacing_mm"]) == 2
    key = "sections_by_size" if by_slice else "lesions_by_size"
    axes.set_title("Vanish" if not by_slice or content["num_dimensions"] == 2 else "Vanish (parts in a slice)")
    levels = [level for level in content["vanish"]["deep_supervision"] if max(level["factor"]) > 1]
    resampling = content["vanish"]["resampling"]["classes"]
    begin = 0 if resampling is None else 1
    for index, name in enumerate(_present(content)):
        color = COLOURS[index % len(COLOURS)]
        shares = [level["nearest"][ALL][key][name] for level in levels]
        axes.plot(range(begin, begin + len(levels)), shares, color=color, marker="o", markersize=4.5, label=name)
        if resampling is not None:
            share = resampling[ALL]["by_size"][name]
            axes.plot(0, np.nan if share is None else share, color=color, marker="s", markersize=5, linestyle="none",
                      clip_on=False)  # fmt: skip
    labels = [f"1/{max(level['factor'])}" + ("" if level["loss_weight"] else "\n(no weight)") for level in levels]
    axes.set_xticks(range(begin + len(levels)), [*(["resam-\npling"] if begin else []), *labels])
    axes.set_xlim(-0.3, begin + len(levels) - 0.7)
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.set_xlabel("nearest-neighbour target")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left")


def _seen(axes: Axes, content: Mapping) -> None:
    """Probability that a lesion of each size is seen in an epoch."""
    axes.set_title("Seen in an epoch")
    names = _present(content)
    sampling = content["sampling"]["classes"][ALL]
    shares = [sampling["seen_per_epoch"]["by_size"][name] or 0.0 for name in names]
    bars = axes.bar(
        range(len(names)), shares, 0.62, color=[COLOURS[index % len(COLOURS)] for index in range(len(names))]
    )
    axes.bar_label(bars, [f"{share:.2f}" if share < 0.995 else ">0.99" for share in shares], fontsize=8, color=QUIET)
    _by_size(axes, names)
    axes.set_ylim(0, 1.12)
    axes.set_yticks(np.linspace(0, 1, 5))
    axes.set_ylabel("probability")


def _patches(axes: Axes, content: Mapping) -> None:
    """Share of the lesions and of the foreground patches that each size has."""
    axes.set_title("What foreground patches are centred on")
    names = _present(content)
    sampling = content["sampling"]["classes"][ALL]
    counts = np.array([sampling["by_size_count"][name] for name in names], dtype=float)
    centred = counts * [sampling["centred_per_epoch"]["by_size"][name] or 0.0 for name in names]
    for offset, values, color, label in ((-0.2, counts, LESIONS, "lesions"), (0.2, centred, PATCHES, "patches")):
        shares = values / (values.sum() or 1)
        bars = axes.bar(np.arange(len(names)) + offset, shares, 0.36, color=color, label=label)
        axes.bar_label(bars, [f"{100 * share:.0f} %" for share in shares], fontsize=7.5, color=QUIET)
    _by_size(axes, names)
    axes.set_ylim(0, 1.12)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.legend(loc="upper right")


def _by_size(axes: Axes, names: list[str]) -> None:
    axes.set_xticks(range(len(names)), names)
    axes.grid(axis="x", visible=False)
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("equivalent diameter")


def _present(content: Mapping) -> list[str]:
    """Size bins that hold lesions."""
    counts = content["sampling"]["classes"][ALL]["by_size_count"]
    return [name for name in content["size_bins"]["names"] if counts[name]]
