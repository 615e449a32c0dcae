"""The tables of the report: numbers as text, with what they sort by."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from string import ascii_uppercase

from nnunetv2_smallseg.evaluation.figures import colour as prediction_colour
from nnunetv2_smallseg.evaluation.froc import FROC_RATES, Froc
from nnunetv2_smallseg.evaluation.resampling import Estimate, Resampling
from nnunetv2_smallseg.evaluation.result_tables import METRICS, Metric, ResultTables, Units
from nnunetv2_smallseg.evaluation.statistics import DETECTION_METRICS, Comparison, Detection, MetricSummary

__all__ = [
    "UNDEFINED",
    "Cell",
    "Statistics",
    "Table",
    "case_table",
    "coloured_predictions",
    "comparison_table",
    "detection_table",
    "froc_table",
    "interval_text",
    "metric_of",
    "number_text",
    "overview_table",
    "prediction_letters",
    "size_table",
]

UNDEFINED = "\N{EN DASH}"


@dataclass(frozen=True)
class Statistics:
    """Everything computed over the tables; ``statistics.json`` holds the same."""

    metrics: list[MetricSummary]
    detection: list[Detection]
    comparisons: list[Comparison]
    froc: list[Froc]


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What is read.
        sort: What it sorts by; empty sorts last, in either direction.
        is_text: Whether it is a name.
        colour: Colour of a mark before the text, empty for none.
        interval: What follows in brackets, empty for nothing.
        title: The full name where the text is a letter; the filter finds it, too.
    """

    text: str
    sort: str = ""
    is_text: bool = False
    colour: str = ""
    interval: str = ""
    title: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        columns: Headings.
        rows: Cells, as many a row as there are columns.
        groups: Headings above the columns: text, number of columns and colour.
        note: Sentence below the table.
        stacked: Whether intervals stand below their values.
    """

    columns: list[str]
    rows: list[list[Cell]]
    groups: list[tuple[str, int, str]] = field(default_factory=list)
    note: str = ""
    stacked: bool = False


def coloured_predictions(tables: ResultTables) -> list[tuple[str, str]]:
    """Predictions with their colour in the figures."""
    return [(name, prediction_colour(index)) for index, name in enumerate(tables.predictions)]


def prediction_letters(tables: ResultTables) -> dict[str, str]:
    """A, B, ... for the predictions, whose names are long; numbers where letters do not suffice."""
    number = len(tables.predictions)
    letters = ascii_uppercase if number <= len(ascii_uppercase) else [str(1 + index) for index in range(number)]
    return dict(zip(tables.predictions, letters, strict=False))


def letter_note(tables: ResultTables) -> str:
    """What the letters stand for, as the beginning of a note; empty with a single prediction."""
    if len(tables.predictions) == 1:
        return ""
    return ", ".join(f"{letter}: {name}" for name, letter in prediction_letters(tables).items()) + ". "


def metric_of(name: str) -> Metric:
    """How a metric is shown; columns nobody knows are shown by their name."""
    if name in DETECTION_METRICS:
        label, better = DETECTION_METRICS[name]
        return Metric(label, better=better, digits=2 if name == "false_positives_per_case" else 3)
    return METRICS.get(name, Metric(name))


def heading(metric: Metric, units: Units) -> str:
    """Label with unit and direction."""
    unit = units.of(metric)
    arrow = {"higher": "\N{NO-BREAK SPACE}↑", "lower": "\N{NO-BREAK SPACE}↓", "": ""}[metric.better]
    return f"{metric.label}{f' ({unit})' if unit else ''}{arrow}"


def number_text(value: float, metric: Metric, signed: bool = False) -> str:
    """A number with the decimals of its metric and a real minus sign."""
    if math.isnan(value):
        return UNDEFINED
    has_digits = metric.unit not in ("volume", "%")
    if has_digits and abs(value) < 0.5 * 10.0**-metric.digits:
        value = 0.0
    sign = "+" if signed and value else "-"  # what is shown as 0 has no sign
    if not has_digits:
        text = f"{value:{sign},.0f}" if abs(value) >= 100 or value == 0 else f"{value:{sign}#.3g}"
    else:
        text = f"{value:{sign}.{metric.digits}f}"
    return text.rstrip(".").replace("-", "\N{MINUS SIGN}")


def interval_text(estimate: Estimate, metric: Metric, signed: bool = False) -> str:
    """The limits of an interval."""
    if math.isnan(estimate.low):
        return UNDEFINED
    return f"{number_text(estimate.low, metric, signed)} to {number_text(estimate.high, metric, signed)}"


def number_cell(value: float, metric: Metric, signed: bool = False) -> Cell:
    """A cell with a number."""
    return Cell(number_text(value, metric, signed), "" if math.isnan(value) else repr(float(value)))


def case_cell(value: float, name: str) -> Cell:
    """A metric of a case; counts are whole numbers, whose means are not."""
    metric = metric_of(name)
    return number_cell(value, dataclasses.replace(metric, digits=0) if name.startswith("num_") else metric)


def estimate_cell(estimate: Estimate, metric: Metric, signed: bool = False) -> Cell:
    """A value with its interval in brackets."""
    cell = number_cell(estimate.value, metric, signed)
    if math.isnan(estimate.low):
        return cell
    return Cell(cell.text, cell.sort, interval=f"({interval_text(estimate, metric, signed)})")


def count_cell(number: int | None) -> Cell:
    """A whole number."""
    return Cell(UNDEFINED) if number is None else Cell(f"{number:,}", str(number))


def text_cell(text: str, colour: str = "", sort: str | None = None) -> Cell:
    """A name, with a mark in the colour of the prediction it names."""
    return Cell(text, text if sort is None else sort, is_text=True, colour=colour)


def letter_cell(tables: ResultTables, prediction: str) -> Cell:
    """The letter of a prediction with its colour; the name if there is only one."""
    index = tables.predictions.index(prediction)
    text = prediction if len(tables.predictions) == 1 else prediction_letters(tables)[prediction]
    return dataclasses.replace(text_cell(text, prediction_colour(index)), title=prediction)


def p_value_cell(value: float) -> Cell:
    """A p-value."""
    if math.isnan(value):
        return Cell(UNDEFINED)
    return Cell("< 0.001" if value < 0.001 else f"{value:.3f}", repr(value))


def overview_table(tables: ResultTables, region: str, statistics: Statistics, level: float, units: Units) -> Table:
    """Every metric: mean, interval, median and numbers of cases of each prediction."""
    rows = []
    for name in tables.metrics:
        metric = metric_of(name)
        cells = [text_cell(heading(metric, units))]
        for summary in statistics.metrics:
            if (summary.region, summary.metric) == (region, name):
                cells += [
                    estimate_cell(summary.mean, metric),
                    number_cell(summary.median, metric),
                    count_cell(summary.num_cases),
                    count_cell(summary.num_undefined),
                ]
        rows.append(cells)
    columns = [f"mean ({100 * level:g} % interval)", "median", "cases", "undefined"]
    return Table(
        columns=["metric", *columns * len(tables.predictions)],
        rows=rows,
        groups=[("", 1, ""), *((name, len(columns), colour) for name, colour in coloured_predictions(tables))],
        note="Mean, interval and median are over the cases where a metric is defined; the others are counted as "
        "undefined. ↑ higher is better, ↓ lower is better.",
    )


def detection_table(tables: ResultTables, region: str, statistics: Statistics, units: Units) -> Table:
    """Detection of lesions of all sizes."""
    colours = dict(coloured_predictions(tables))
    rows = [
        [
            text_cell(row.prediction, colours[row.prediction]),
            count_cell(row.num_cases),
            count_cell(row.num_lesions),
            count_cell(row.num_detected),
            count_cell(row.num_lesions - row.num_detected),
            count_cell(row.num_false_positives),
            *(estimate_cell(getattr(row, name), metric_of(name)) for name in DETECTION_METRICS),
        ]
        for row in statistics.detection
        if row.region == region and row.size_bin is None
    ]
    return Table(
        columns=["prediction", "cases", "lesions", "detected", "missed", "false positives"]
        + [heading(metric_of(name), units) for name in DETECTION_METRICS],
        rows=rows,
        note="Pooled over the lesions of all cases. Recall: detected lesions by lesions of the reference. Precision: "
        "predicted lesions that are no false positives by predicted lesions. F1: their harmonic mean. The Dice of a "
        "missed lesion is 0.",
        stacked=True,
    )


def size_table(tables: ResultTables, region: str, statistics: Statistics, units: Units) -> Table | None:
    """Detection and errors of each size bin."""
    if not tables.size_bins:
        return None
    diameter = Metric("", "length", digits=2)
    rows = [
        [
            text_cell(row.size_bin, sort=str(tables.size_bins.index(row.size_bin))),
            letter_cell(tables, row.prediction),
            count_cell(row.num_lesions),
            count_cell(row.num_detected),
            estimate_cell(row.pooled_recall, metric_of("pooled_recall")),
            count_cell(row.num_false_positives),
            estimate_cell(row.false_positives_per_case, metric_of("false_positives_per_case")),
            estimate_cell(row.pooled_dice, metric_of("pooled_dice")),
            estimate_cell(row.volume_error_mm3, Metric("", "volume"), signed=True),
            estimate_cell(row.diameter_error_mm, diameter, signed=True),
        ]
        for row in statistics.detection
        if row.region == region and row.size_bin is not None
    ]
    return Table(
        columns=[
            "size", "prediction", "lesions", "detected", "Pooled recall ↑", "false positives",
            "False positives per case ↓", "Pooled lesion Dice ↑", f"Volume error ({units.volume})",
            f"Diameter error ({units.length})",
        ],
        rows=rows,
        note=letter_note(tables) + "False positives are in the bin of their own size. Errors are predicted minus "
        "reference, averaged over the lesions where they are defined.",
        stacked=True,
    )  # fmt: skip


def froc_table(tables: ResultTables, region: str, statistics: Statistics) -> Table | None:
    """Recall at fixed numbers of false positives per case."""
    metric = metric_of("pooled_recall")
    rows = [
        [
            letter_cell(tables, curve.prediction),
            *(estimate_cell(estimate, metric) for estimate in (*curve.at_rates, curve.mean_recall)),
        ]
        for curve in statistics.froc
        if curve.region == region
    ]
    if not rows:
        return None
    return Table(
        columns=["prediction", *(f"{rate:g}" for rate in FROC_RATES), "mean"],
        rows=rows,
        groups=[("", 1, ""), ("recall at false positives per case", len(FROC_RATES), ""), ("", 1, "")],
        note=letter_note(tables)
        + "The highest recall at no more than this many false positives per case; where a prediction never makes "
        "that many, its recall with all predicted lesions.",
        stacked=True,
    )


def comparison_table(
    tables: ResultTables, region: str, statistics: Statistics, resampling: Resampling, units: Units
) -> Table | None:
    """Differences of all pairs of predictions, by their letters."""
    letters = prediction_letters(tables)
    rows = []
    for row in statistics.comparisons:
        if row.region != region:
            continue
        metric = metric_of(row.metric)
        counts = (row.num_better, row.num_equal, row.num_worse)
        rows.append(
            [
                text_cell(heading(metric, units)),
                text_cell(f"{letters[row.first]}, {letters[row.second]}"),
                number_cell(row.value_first, metric),
                number_cell(row.value_second, metric),
                estimate_cell(row.difference, metric, signed=True),
                Cell(UNDEFINED) if row.num_better is None else Cell(" / ".join(map(str, counts)), str(row.num_better)),
                count_cell(row.num_cases),
                count_cell(row.num_undefined),
                p_value_cell(row.p_value),
                p_value_cell(row.p_value_holm),
            ]
        )
    if not rows:
        return None
    unit = "patients' mean differences" if resampling.patients is not None else "differences of the cases"
    return Table(
        columns=[
            "metric", "pair", "first", "second", f"difference ({100 * resampling.level:g} % interval)",
            "better / equal / worse", "used", "left out", "p", "p (Holm)",
        ],
        rows=rows,
        groups=[("", 2, ""), ("value", 2, ""), ("second minus first", 1, ""), ("cases", 3, ""), ("Wilcoxon", 2, "")],
        note=letter_note(tables) + "Better counts the cases where the second is better. p is of "
        f"Wilcoxon's signed-rank test on the {unit}; Holm's correction is over all comparisons of a "
        "metric. What is pooled over lesions has an interval and no test. Cases where a metric is undefined for one "
        "of the two are left out.",
    )  # fmt: skip


def case_table(tables: ResultTables, units: Units) -> Table:
    """All metrics of all cases."""
    with_region = len(tables.regions) > 1
    return Table(
        columns=["case", "prediction", *(["region"] if with_region else [])]
        + [heading(metric_of(name), units) for name in tables.metrics],
        rows=[
            [
                text_cell(row["case"]),
                letter_cell(tables, row["prediction"]),
                *([text_cell(row["region"])] if with_region else []),
                *(case_cell(row.get(name, math.nan), name) for name in tables.metrics),
            ]
            for row in tables.cases
        ],
        note=letter_note(tables),
    )
