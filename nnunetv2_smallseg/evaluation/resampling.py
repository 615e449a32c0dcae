"""Intervals by bootstrap over cases or patients, and tests of paired differences.

Cases are what is drawn, never lesions or voxels, because lesions of a case depend on each other; where a patient has
several cases, patients are drawn with all their cases (Field and Welsh, Bootstrapping clustered data, 2007). All
quantities are made of ratios of sums over cases (a mean is the sum of the defined values by their number), so that one
function resamples them all, with the same draws for all columns: differences of predictions are paired.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import wilcoxon

from nnunetv2_smallseg.errors import SmallSegError

__all__ = [
    "Estimate",
    "Resampling",
    "bootstrap_counts",
    "bootstrap_ratios",
    "divide",
    "estimates",
    "holm",
    "percentile_interval",
    "read_patients",
    "wilcoxon_p_value",
]

# Draws held in memory at a time, times the number of groups.
BLOCK = 4_000_000


@dataclass(frozen=True)
class Estimate:
    """A value with the limits of its interval; NaN where undefined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Resampling:
    """How intervals are made.

    Attributes:
        num_samples: Bootstrap samples.
        level: Probability of the interval, between 0 and 1.
        patients: Case -> patient; None where every case is a patient of its own.
    """

    num_samples: int = 10_000
    level: float = 0.95
    patients: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}; at least 1 is needed, 1000 or more are sensible")
        if not 0 < self.level < 1:
            raise ValueError(f"level is {self.level}; it has to lie between 0 and 1, such as 0.95")

    def groups(self, cases: Sequence[str]) -> np.ndarray:
        """Number of the patient of each case: (num_cases,) int.

        Raises:
            SmallSegError: If a case has no patient.
        """
        if self.patients is None:
            return np.arange(len(cases))
        missing = [case for case in cases if case not in self.patients]
        if missing:
            raise SmallSegError(
                f"{len(missing)} of {len(cases)} cases have no patient, such as {missing[0]}. Add every case to the "
                "table of patients, or leave the table out if each case is a patient of its own."
            )
        return np.unique([self.patients[case] for case in cases], return_inverse=True)[1]


def _pairs(key: str, value: object) -> list[tuple[str, str]]:
    """(case, patient) pairs of an entry of a JSON object."""
    if isinstance(value, list):
        return [(case, key) for case in value]
    return [(key, value["patient"] if isinstance(value, dict) else value)]


def read_patients(file: Path) -> dict[str, str]:
    """Reads which patient a case belongs to.

    Args:
        file: CSV with the columns ``case`` and ``patient``, or JSON with an object of case -> patient, of patient ->
            list of cases, or of case -> object with ``patient``, as ``smallseg convert`` writes ``cases.json``.

    Returns:
        Case -> patient.

    Raises:
        SmallSegError: If the file is absent or holds something else, or a case has two patients.
    """
    file = Path(file)
    allowed = "a CSV file with the columns case and patient, or a JSON object of case: patient or patient: [cases]"
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise SmallSegError(f"{file} cannot be read ({error.strerror}). Give {allowed}.") from None
    except UnicodeDecodeError:
        raise SmallSegError(f"{file} is no text in UTF-8. Give {allowed}.") from None
    try:
        if file.suffix.lower() == ".json":
            pairs = [(case, patient) for key, value in json.loads(text).items() for case, patient in _pairs(key, value)]
        else:
            pairs = [(row["case"], row["patient"]) for row in csv.DictReader(text.splitlines())]
    except (AttributeError, KeyError, TypeError, ValueError, csv.Error):
        raise SmallSegError(f"{file} does not say which patient a case belongs to. Allowed is {allowed}.") from None
    patients: dict[str, str] = {}
    for case, patient in ((str(case), str(patient)) for case, patient in pairs):
        if patients.setdefault(case, patient) != patient:
            raise SmallSegError(
                f"{file}: case {case} belongs to patients {patients[case]} and {patient}; allowed is one."
            )
    return patients


def bootstrap_counts(
    num_groups: int, generator: np.random.Generator, num_samples: int, width: int = 0
) -> Iterator[tuple[slice, np.ndarray]]:
    """How often each group is drawn in bootstrap samples, some samples at a time.

    Args:
        num_groups: Groups to draw from; each sample has as many.
        generator: Source of the draws.
        num_samples: Samples.
        width: Numbers a sample needs in memory, if more than ``num_groups``.

    Yields:
        Which samples, and their counts, (num_samples_here, num_groups) float64. Nothing without a group.
    """
    block = max(BLOCK // max(num_groups, width, 1), 1)
    for start in range(0, num_samples if num_groups else 0, block):
        rows = slice(start, min(start + block, num_samples))
        shares = np.full(num_groups, 1 / num_groups)
        yield rows, generator.multinomial(num_groups, shares, rows.stop - start).astype(np.float64)


def bootstrap_ratios(
    numerators: np.ndarray,
    denominators: np.ndarray,
    generator: np.random.Generator,
    groups: np.ndarray | None = None,
    num_samples: int = 10_000,
) -> np.ndarray:
    """Ratios of sums over cases, in bootstrap samples of the groups.

    Args:
        numerators: (num_cases, num_columns), finite.
        denominators: (num_cases, num_columns), finite, at least 0.
        generator: Source of the draws; all columns see the same ones.
        groups: (num_cases,) group of each case, numbered from 0; None for a group a case.
        num_samples: Samples; each has as many groups as there are.

    Returns:
        (num_samples, num_columns) float64; NaN where a sample's denominator is 0, and for columns whose denominator
        is above 0 in fewer than two groups, because one group says nothing about the spread.
    """
    groups = np.arange(len(numerators)) if groups is None else np.asarray(groups)
    num_groups = int(groups.max(initial=-1)) + 1
    upper, lower = (np.zeros((num_groups, numerators.shape[1])) for _ in range(2))
    np.add.at(upper, groups, numerators)
    np.add.at(lower, groups, denominators)
    ratios = np.full((num_samples, numerators.shape[1]), np.nan)
    for rows, counts in bootstrap_counts(num_groups, generator, num_samples):
        ratios[rows] = divide(counts @ upper, counts @ lower)
    ratios[:, (lower > 0).sum(axis=0) < 2] = np.nan
    return ratios


def percentile_interval(samples: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Percentile intervals of bootstrap samples.

    Args:
        samples: (num_samples, num_columns); NaN are left out.
        level: Probability of the interval.

    Returns:
        (2, num_columns) lower and upper limits; NaN for columns without a defined sample.
    """
    limits = np.full((2, samples.shape[1]), np.nan)
    defined = ~np.isnan(samples).all(axis=0)
    tail = 50 * (1 - level)
    limits[:, defined] = np.nanpercentile(samples[:, defined], [tail, 100 - tail], axis=0)
    return limits


def divide(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Ratios, NaN where the denominator is 0."""
    return np.divide(upper, lower, out=np.full(np.shape(upper), np.nan), where=np.asarray(lower) != 0)


def estimates(
    numerators: np.ndarray,
    denominators: np.ndarray,
    generator: np.random.Generator,
    groups: np.ndarray,
    resampling: Resampling,
) -> list[Estimate]:
    """Ratio of sums over all cases and its interval, for each column."""
    samples = bootstrap_ratios(numerators, denominators, generator, groups, resampling.num_samples)
    low, high = percentile_interval(samples, resampling.level)
    values = divide(numerators.sum(axis=0), denominators.sum(axis=0))
    return [Estimate(*map(float, limits)) for limits in zip(values, low, high, strict=True)]


def wilcoxon_p_value(differences: np.ndarray) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test; pairs without a difference are left out, as Wilcoxon did.

    Args:
        differences: (num_pairs,) finite.

    Returns:
        1 if all pairs are equal, NaN if there is none. Exact for few pairs without ties.
    """
    if len(differences) == 0:
        return math.nan
    # Rounding makes equal differences equal that differ by the last bit.
    unequal = np.round(differences, 12)
    unequal = unequal[unequal != 0]
    return float(wilcoxon(unequal).pvalue) if len(unequal) else 1.0


def holm(p_values: Sequence[float]) -> np.ndarray:
    """P-values corrected for their number (Holm, Scandinavian Journal of Statistics 6, 1979).

    Args:
        p_values: Values in [0, 1]; NaN are not counted and stay.

    Returns:
        (num_values,) corrected values in the same order, at most 1.
    """
    values = np.asarray(p_values, dtype=float)
    corrected = np.full(len(values), np.nan)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(values[order] * factors), 1.0)
    return corrected
