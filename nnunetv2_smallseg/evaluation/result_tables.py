"""The tables of an evaluation, ``cases.csv`` and ``lesions.csv``, as statistics, figures and report read them."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from nnunetv2_smallseg.errors import SmallSegError

__all__ = ["METRICS", "Metric", "ResultTables", "Units", "size_order"]


@dataclass(frozen=True)
class Metric:
    """How a column of ``cases.csv`` is shown.

    Attributes:
        label: Name in tables and figures.
        unit: "length", "volume", "%", or empty for ratios and counts. ``Units`` says what they are called.
        better: "higher" or "lower"; empty for what describes a case and ranks nothing.
        digits: Decimals shown. Volumes and percentages have three significant digits instead.
    """

    label: str
    unit: str = ""
    better: str = ""
    digits: int = 3


METRICS = {
    "dice": Metric("Dice", better="higher"),
    "iou": Metric("Intersection over union", better="higher"),
    "sensitivity": Metric("Sensitivity (voxels)", better="higher"),
    "precision": Metric("Precision (voxels)", better="higher"),
    "specificity": Metric("Specificity (voxels)", better="higher", digits=4),
    "f2": Metric("F2 (voxels)", better="higher"),
    "mae": Metric("Mean absolute error", better="lower", digits=4),
    "ravd": Metric("Relative absolute volume difference", better="lower"),
    "assd_mm": Metric("Average surface distance", "length", "lower", 2),
    "hd_mm": Metric("Hausdorff distance", "length", "lower", 2),
    "hd95_mm": Metric("Hausdorff distance, 95 %", "length", "lower", 2),
    "nsd": Metric("Surface Dice", better="higher"),
    "auc": Metric("Area under the ROC curve", better="higher"),
    "brier": Metric("Brier score", better="lower", digits=4),
    "ece": Metric("Expected calibration error", better="lower", digits=4),
    "detection_recall": Metric("Lesion recall", better="higher"),
    "detection_precision": Metric("Lesion precision", better="higher"),
    "detection_f1": Metric("Lesion F1", better="higher"),
    "lesion_dice": Metric("Lesion Dice", better="higher"),
    "panoptic_quality": Metric("Panoptic quality", better="higher"),
    "segmentation_quality": Metric("Segmentation quality", better="higher"),
    "recognition_quality": Metric("Recognition quality", better="higher"),
    "num_reference_lesions": Metric("Reference lesions", digits=2),
    "num_predicted_lesions": Metric("Predicted lesions", digits=2),
    "num_detected": Metric("Detected lesions", digits=2),
    "num_false_positives": Metric("False positives", digits=2),
    "reference_volume_mm3": Metric("Reference volume", "volume"),
    "predicted_volume_mm3": Metric("Predicted volume", "volume"),
    "area_ratio_percent": Metric("Share of the image", "%"),
}


@dataclass(frozen=True)
class Units:
    """What lengths and volumes of an evaluation are measured in.

    Attributes:
        num_dimensions: 2 for single images, whose volumes are areas; 3 otherwise.
        length: "mm", or "px" where the size of a pixel is unknown.
    """

    num_dimensions: int = 3
    length: str = "mm"

    @property
    def volume(self) -> str:
        """Unit of volumes, or of areas in 2D."""
        return f"{self.length}{'²' if self.num_dimensions == 2 else '³'}"

    def of(self, metric: Metric) -> str:
        """Unit of a metric."""
        return {"length": self.length, "volume": self.volume}.get(metric.unit, metric.unit)


KEYS = ("prediction", "case", "region")
KINDS = ("reference", "false_positive")
TEXT_COLUMNS = {*KEYS, "kind", "lesion", "size_bin", "centroid"}
LESION_TEXT = (*KEYS, "kind", "size_bin")
LESION_NUMBERS = (
    "volume_mm3", "equivalent_diameter_mm", "detected", "dice", "volume_error_mm3", "diameter_error_mm", "score",
)  # fmt: skip
WORDS = {"": math.nan, "none": math.nan, "nan": math.nan, "true": 1.0, "false": 0.0}


def to_number(value: object) -> float:
    """The number of a cell; NaN for an empty one, 0 or 1 for a truth value.

    Raises:
        ValueError: If the cell holds other text or an infinite number.
    """
    text = "" if value is None else str(value).strip().lower()
    number = WORDS[text] if text in WORDS else float(text)
    if math.isinf(number):
        raise ValueError("infinite")
    return number


def size_order(name: str) -> tuple[float, float]:
    """Sorts size bins such as "<5", "5-10", ">20" from small to large; names without a number come last."""
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", name)]
    if not numbers:
        return math.inf, 0.0
    shift = {"<": -1.0, "≤": -1.0, ">": 1.0, "≥": 1.0}.get(name.strip()[:1], 0.0)
    return numbers[0], shift


def in_order_of_appearance(values: Iterable[str]) -> list[str]:
    """The different values, first seen first."""
    return list(dict.fromkeys(values))


def typed_rows(
    rows: Iterable[Mapping[str, object]], required: Iterable[str], numbers: Iterable[str], name: str
) -> list[dict]:
    """Rows with text in the text columns and numbers, NaN for undefined, in all others.

    Args:
        rows: Rows of text or numbers.
        required: Text columns every row has.
        numbers: Columns the result has, NaN in rows that lack them.
        name: Name of the table in errors.

    Raises:
        SmallSegError: If a required column is missing or a cell holds no number.
    """
    typed = []
    for number, row in enumerate(rows, start=1):
        missing = [column for column in required if row.get(column) is None]
        if missing:
            raise SmallSegError(
                f"{name}, row {number} has no {', '.join(missing)}. These columns are needed: {', '.join(required)}. "
                "Write the tables anew with `smallseg evaluate`."
            )
        converted = dict.fromkeys(numbers, math.nan)
        for column, value in row.items():
            try:
                converted[column] = str(value) if column in TEXT_COLUMNS else to_number(value)
            except ValueError:
                raise SmallSegError(
                    f"{name}, row {number}, column {column} holds {value!r}. A finite number or an empty cell is "
                    "needed. Write the tables anew with `smallseg evaluate`."
                ) from None
        typed.append(converted)
    return typed


def read_csv(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header.

    Raises:
        SmallSegError: If the file is not there.
    """
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))
    except FileNotFoundError:
        raise SmallSegError(f"{file} does not exist. `smallseg evaluate` writes it.") from None


class ResultTables:
    """Metrics of every case and every lesion, for one or several predictions of the same reference.

    Attributes:
        cases: One row a prediction, case and region. Text columns hold text, all others float, NaN for undefined.
        lesions: One row a reference lesion or false positive, likewise.
    """

    def __init__(self, cases: Iterable[Mapping[str, object]], lesions: Iterable[Mapping[str, object]]) -> None:
        """Takes rows of text or numbers.

        Args:
            cases: Rows with the columns of ``cases.csv``; empty text or None is undefined.
            lesions: Rows with the columns of ``lesions.csv``.

        Raises:
            SmallSegError: If there is no case, a row occurs twice, a lesion belongs to no case, or a cell holds
                something else than it should.
        """
        self.cases = typed_rows(cases, KEYS, (), "cases.csv")
        self.lesions = typed_rows(lesions, LESION_TEXT, LESION_NUMBERS, "lesions.csv")
        if not self.cases:
            raise SmallSegError("cases.csv holds no case. Evaluate at least one case.")
        keys = set()
        for row in self.cases:
            key = tuple(row[column] for column in KEYS)
            if key in keys:
                raise SmallSegError(
                    f"cases.csv holds two rows for prediction {key[0]}, case {key[1]}, region {key[2]}. One is "
                    "allowed: give folders of the same name different names."
                )
            keys.add(key)
        for row in self.lesions:
            key = tuple(row[column] for column in KEYS)
            if key not in keys:
                raise SmallSegError(
                    f"lesions.csv has a lesion of prediction {key[0]}, case {key[1]}, region {key[2]}, which is not "
                    "in cases.csv. Both files have to come from the same evaluation."
                )
            if row["kind"] not in KINDS:
                raise SmallSegError(f"lesions.csv: kind is {row['kind']!r}. Allowed are {' and '.join(KINDS)}.")
            if row["kind"] == "reference" and math.isnan(row["detected"]):
                raise SmallSegError(
                    f"lesions.csv does not say whether a lesion of prediction {key[0]}, case {key[1]} was detected. "
                    "Column detected has to hold 0 or 1 for every reference lesion."
                )

    @classmethod
    def read(cls, folder: Path) -> ResultTables:
        """Reads ``cases.csv`` and ``lesions.csv`` of a folder.

        Raises:
            SmallSegError: If a file is absent or not as it should be.
        """
        return cls(read_csv(Path(folder) / "cases.csv"), read_csv(Path(folder) / "lesions.csv"))

    @cached_property
    def predictions(self) -> list[str]:
        """Names of the predictions, in the order of the table."""
        return in_order_of_appearance(row["prediction"] for row in self.cases)

    @cached_property
    def regions(self) -> list[str]:
        """Names of the regions, in the order of the table."""
        return in_order_of_appearance(row["region"] for row in self.cases)

    @cached_property
    def metrics(self) -> list[str]:
        """Metric columns with at least one number: known ones in the order of ``METRICS``, then all others."""
        columns = {column for row in self.cases for column, value in row.items() if column not in TEXT_COLUMNS}
        known = [name for name in METRICS if name in columns]
        used = [*known, *sorted(columns - set(known))]
        return [name for name in used if any(not math.isnan(row.get(name, math.nan)) for row in self.cases)]

    @cached_property
    def size_bins(self) -> list[str]:
        """Size bins that occur, from small to large."""
        return sorted({row["size_bin"] for row in self.lesions if row["size_bin"]}, key=size_order)

    @cached_property
    def has_scores(self) -> bool:
        """Whether lesions have a probability."""
        return any(not math.isnan(row["score"]) for row in self.lesions)

    def case_names(self, region: str) -> list[str]:
        """Cases of a region, of all predictions together, in the order of the table."""
        return in_order_of_appearance(row["case"] for row in self.cases if row["region"] == region)

    def present(self, region: str) -> np.ndarray:
        """Which cases each prediction holds: (num_cases, num_predictions) bool."""
        return ~np.isnan(self._spread(region, self.cases, lambda row: 1.0, empty=np.nan))

    def values(self, region: str, metric: str) -> np.ndarray:
        """A metric of all cases: (num_cases, num_predictions) float64, NaN where undefined or absent."""
        return self._spread(region, self.cases, lambda row: row.get(metric, math.nan), empty=np.nan)

    def lesion_rows(self, region: str, prediction: str, kind: str = "reference") -> list[dict]:
        """Lesions of a kind ("reference" or "false_positive") in a region, of one prediction."""
        return [
            row
            for row in self.lesions
            if row["region"] == region and row["prediction"] == prediction and row["kind"] == kind
        ]

    def lesion_sums(self, region: str, amount: Callable[[dict], float]) -> np.ndarray:
        """Sums over the lesions of each case: (num_cases, num_predictions) float64.

        Args:
            region: Lesions of this region.
            amount: What a row of ``lesions`` adds.
        """
        return self._spread(region, self.lesions, amount, empty=0.0)

    def _spread(self, region: str, rows: list[dict], amount: Callable[[dict], float], empty: float) -> np.ndarray:
        """Sums ``amount`` of the rows of each case and prediction; ``empty`` where there is no row."""
        case_index = {name: index for index, name in enumerate(self.case_names(region))}
        prediction_index = {name: index for index, name in enumerate(self.predictions)}
        table = np.full((len(case_index), len(prediction_index)), empty)
        for row in rows:
            if row["region"] == region:
                place = case_index[row["case"]], prediction_index[row["prediction"]]
                table[place] = amount(row) if np.isnan(table[place]) else table[place] + amount(row)
        return table
