"""The report of an evaluation: one HTML file that opens without a network, with tables, figures and worst cases."""

from __future__ import annotations

import base64
import dataclasses
import math
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from itertools import combinations
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from nnunetv2_smallseg import __version__
from nnunetv2_smallseg.evaluation import figures
from nnunetv2_smallseg.evaluation.figures import FigureFile, draw_if_any
from nnunetv2_smallseg.evaluation.froc import froc_curve
from nnunetv2_smallseg.evaluation.previews import Preview, WorstCase, worst_cases
from nnunetv2_smallseg.evaluation.report_tables import (
    UNDEFINED,
    Statistics,
    case_table,
    coloured_predictions,
    comparison_table,
    detection_table,
    froc_table,
    interval_text,
    metric_of,
    number_text,
    overview_table,
    prediction_letters,
    size_table,
)
from nnunetv2_smallseg.evaluation.resampling import Resampling
from nnunetv2_smallseg.evaluation.result_tables import Metric, ResultTables, Units
from nnunetv2_smallseg.evaluation.statistics import (
    compare_predictions,
    summarise_detection,
    summarise_metrics,
)
from nnunetv2_smallseg.files import replacing, write_json

__all__ = ["Statistics", "compute_statistics", "data_address", "page_environment", "versions", "write_report"]

PACKAGES = ("nnunetv2", "numpy", "scipy", "matplotlib")
# With more pairs of predictions than this, differences are drawn to the first prediction only; tables have all pairs.
MANY_PAIRS = 6
# Shown at the top, for each prediction.
HEADLINE_METRICS = ("dice", "nsd", "hd95_mm")
HEADLINE_RATIOS = ("pooled_recall", "pooled_precision", "false_positives_per_case")


@dataclass(frozen=True)
class Worst:
    """A worst case with its picture as a data address, empty without one."""

    case: WorstCase
    picture: str
    description: str


def compute_statistics(
    tables: ResultTables, generator: np.random.Generator, resampling: Resampling | None = None
) -> Statistics:
    """All statistics of a report."""
    curves = [
        froc_curve(tables, region, prediction, generator, resampling)
        for region in tables.regions
        for prediction in tables.predictions
        if tables.has_scores
    ]
    return Statistics(
        metrics=summarise_metrics(tables, generator, resampling),
        detection=summarise_detection(tables, generator, resampling),
        comparisons=compare_predictions(tables, generator, resampling),
        froc=[curve for curve in curves if curve is not None],
    )


def write_report(
    tables: ResultTables,
    settings: Mapping[str, object],
    output: Path,
    previews: Sequence[Preview] = (),
    *,
    title: str = "Lesion evaluation",
    resampling: Resampling | None = None,
    seed: int = 0,
    units: Units | None = None,
    num_worst: int = 10,
    written: datetime | None = None,
) -> Path:
    """Writes ``report.html``, ``statistics.json`` and ``figures/*.png, *.svg``.

    Args:
        tables: Results of one or several predictions.
        settings: What was evaluated and how, shown in this order: name -> value or list of values.
        output: Folder to write into; made if absent.
        previews: Pictures of worst cases (``worst_cases`` says which, ``draw_preview`` draws them); cases without one
            are listed in words.
        title: Heading of the page.
        resampling: How intervals are made.
        seed: Seed of the bootstrap. The same tables and seed give the same numbers.
        units: Units of lengths and volumes; None for mm and mm³.
        num_worst: Worst cases shown of each prediction and region.
        written: Time of writing; None for now.

    Returns:
        Path of ``report.html``.

    Raises:
        SmallSegError: If ``resampling.patients`` lacks a case.
    """
    resampling, units = resampling or Resampling(), units or Units()
    output = Path(output)
    folder = output / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    statistics = compute_statistics(tables, np.random.default_rng(seed), resampling)
    write_json(to_plain(statistics), output / "statistics.json")
    pictures = {(preview.prediction, preview.case, preview.region): preview.png for preview in previews}
    worst = worst_cases(tables, num_worst)
    sections = []
    for number, region in enumerate(tables.regions):
        prefix = f"{number + 1}_{re.sub(r'[^A-Za-z0-9._-]+', '_', region)}_" if len(tables.regions) > 1 else ""
        drawn = draw_figures(tables, region, statistics, folder, prefix, resampling, seed, units)
        sections.append(
            {
                "name": region,
                "anchor": f"region-{number + 1}",
                "cards": headline_cards(tables, region, statistics, units),
                "overview": overview_table(tables, region, statistics, resampling.level, units),
                "detection": detection_table(tables, region, statistics, units),
                "sizes": size_table(tables, region, statistics, units),
                "froc": froc_table(tables, region, statistics),
                "comparisons": comparison_table(tables, region, statistics, resampling, units),
                "figures": [(figure, data_address(figure.svg.read_bytes(), "image/svg+xml")) for figure in drawn],
                "worst": [
                    (name, colour, worst_of(worst, pictures, name, region, units))
                    for name, colour in coloured_predictions(tables)
                ],
            }
        )
    environment = page_environment()
    written = written or datetime.now(timezone.utc)
    page = environment.get_template("report.html").render(
        title=title,
        predictions=[
            (letter, name, colour, len({row["case"] for row in tables.cases if row["prediction"] == name}))
            for (name, letter), (_, colour) in zip(
                prediction_letters(tables).items(), coloured_predictions(tables), strict=True
            )
        ],
        settings=[(name, setting_text(value)) for name, value in settings.items()],
        counts=count_text(tables, resampling),
        resampling=resampling,
        percent=f"{100 * resampling.level:g} %",
        seed=seed,
        sections=sections,
        num_worst=num_worst,
        cases=case_table(tables, units),
        versions=versions(),
        written=written.strftime("%Y-%m-%d %H:%M %Z").strip(),
    )
    target = output / "report.html"
    with replacing(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


def page_environment(*folders: Path) -> Environment:
    """Jinja with the templates of the report, and of other pages in the same style from ``folders``."""
    environment = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent / "templates"]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = breakable
    return environment


def to_plain(value: object) -> object:
    """Dataclasses, arrays and numbers as JSON holds them; NaN and infinity as null."""
    if dataclasses.is_dataclass(value):
        return {item.name: to_plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [to_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def breakable(name: str) -> Markup:
    """A name as HTML that may break after underscores, as names of trainers and plans are long."""
    return escape(name).replace("_", Markup("_<wbr>"))


def data_address(content: bytes, kind: str) -> str:
    """A file inside an address."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def setting_text(value: object) -> str:
    """A setting as text: lists with commas, nothing as a dash."""
    if value is None or value == "":
        return UNDEFINED
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {setting_text(item)}" for name, item in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(setting_text(item) for item in value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def count_text(tables: ResultTables, resampling: Resampling) -> str:
    """Numbers of cases, patients, predictions and regions, in words."""
    cases = {row["case"] for row in tables.cases}
    parts = [(len(cases), "case")]
    if resampling.patients is not None:
        parts.append((len({resampling.patients[case] for case in cases}), "patient"))
    parts += [(len(tables.predictions), "prediction"), (len(tables.regions), "region")]
    return ", ".join(f"{number} {word}{'' if number == 1 else 's'}" for number, word in parts)


def versions() -> list[tuple[str, str]]:
    """Versions of what computed the numbers."""
    found = [("nnunetv2-smallseg", __version__), ("Python", platform.python_version())]
    for package in PACKAGES:
        try:
            found.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue
    return found


def headline_cards(tables: ResultTables, region: str, statistics: Statistics, units: Units) -> list[dict]:
    """The few numbers everybody looks for, of each prediction."""
    cards = []
    for prediction, colour in coloured_predictions(tables):
        lines = []
        for row in statistics.metrics:
            if (row.region, row.prediction) == (region, prediction) and row.metric in HEADLINE_METRICS:
                metric = metric_of(row.metric)
                unit = f" {units.of(metric)}" if metric.unit and not math.isnan(row.mean.value) else ""
                value = number_text(row.mean.value, metric) + unit
                lines.append((metric.label, value, interval_text(row.mean, metric)))
        for row in statistics.detection:
            if (row.region, row.prediction, row.size_bin) == (region, prediction, None):
                for name in HEADLINE_RATIOS:
                    metric, estimate = metric_of(name), getattr(row, name)
                    label = (
                        metric.label
                        if name == "false_positives_per_case"
                        else f"Lesion {metric.label.removeprefix('Pooled ')}"
                    )
                    lines.append((label, number_text(estimate.value, metric), interval_text(estimate, metric)))
        cards.append(
            {"letter": prediction_letters(tables)[prediction], "name": prediction, "colour": colour, "lines": lines}
        )
    return cards


def worst_of(
    worst: Sequence[WorstCase],
    pictures: Mapping[tuple[str, str, str], bytes],
    prediction: str,
    region: str,
    units: Units,
) -> list[Worst]:
    """The worst cases of a prediction in a region, with pictures and words."""
    found = []
    for case in worst:
        if (case.prediction, case.region) != (prediction, region):
            continue
        png = pictures.get((prediction, case.case, region))
        parts = ["Dice undefined" if math.isnan(case.dice) else f"Dice {case.dice:.3f}"]
        if case.num_missed:
            volume = number_text(case.missed_volume_mm3, Metric("", "volume"))
            parts.append(f"{case.num_missed} missed ({volume} {units.volume})")
        if case.num_false_positives:
            parts.append(f"{case.num_false_positives} false positive{'' if case.num_false_positives == 1 else 's'}")
        found.append(Worst(case, data_address(png, "image/png") if png else "", ", ".join(parts)))
    return found


def draw_figures(
    tables: ResultTables,
    region: str,
    statistics: Statistics,
    folder: Path,
    prefix: str,
    resampling: Resampling,
    seed: int,
    units: Units,
) -> list[FigureFile]:
    """All figures of a region for which there is something to draw."""
    percent = f"{100 * resampling.level:g} %"
    whom = "cases" if resampling.patients is None else "patients"
    detections = [row for row in statistics.detection if row.region == region]
    curves = [curve for curve in statistics.froc if curve.region == region]
    generator = np.random.default_rng(seed)
    drawn = draw_if_any(
        lambda: figures.draw_recall_against_diameter(tables, region, generator, resampling, units),
        folder, f"{prefix}recall_against_diameter", "Recall against diameter",
        "Lesions in classes of the diameter with equal numbers, each at its median diameter. Bars: "
        f"{percent} bootstrap intervals over {whom}. Below: the lesions of the reference.",
    )  # fmt: skip
    drawn += draw_if_any(
        lambda: figures.draw_detection_by_size(tables, region, detections),
        folder, f"{prefix}detection_by_size", "Detection by size",
        "Lesions of the reference detected and missed in each size bin (detected/all), and false positives by their "
        "own size.",
    )  # fmt: skip
    drawn += draw_if_any(
        lambda: figures.draw_false_positives(tables, region, [row for row in detections if row.size_bin is None]),
        folder, f"{prefix}false_positives", "False positives per case",
        f"How many cases have how many false positives; mean and {percent} bootstrap interval over {whom} above.",
    )  # fmt: skip
    drawn += draw_if_any(
        lambda: figures.draw_froc(tables.predictions, curves) if curves else None,
        folder, f"{prefix}froc", "Free-response ROC (FROC)",
        f"Recall when only predicted lesions above a score count. Shaded: {percent} bootstrap intervals over {whom}. "
        "Mark: all predicted lesions.",
    )  # fmt: skip
    # Without FROC it fills the place beside the false positives.
    wide = bool(curves) or len(tables.predictions) > 2
    drawn += draw_if_any(
        lambda: figures.draw_dice_against_volume(tables, region, units, wide),
        folder, f"{prefix}dice_against_volume", "Dice against volume",
        "Each dot is a lesion of the reference; open circles were missed. Line: mean of lesions "
        "of similar volume.",
    )  # fmt: skip
    pairs = list(combinations(range(len(tables.predictions)), 2))
    if len(pairs) > MANY_PAIRS:
        pairs = [pair for pair in pairs if pair[0] == 0]
    for first, second in pairs:
        names = tables.predictions[first], tables.predictions[second]
        rows = [row for row in statistics.comparisons if row.region == region and (row.first, row.second) == names]
        drawn += draw_if_any(
            lambda rows=rows: figures.draw_paired_differences(tables, region, rows, generator, units),
            folder, f"{prefix}paired_differences_{first + 1}_{second + 1}", "Paired differences",
            f"{names[1]} minus {names[0]}: one dot a case. Diamond and bar: mean and {percent} bootstrap interval over "
            f"{whom}. ↓ lower is better.",
        )  # fmt: skip
    return drawn
