"""Puts the finished runs of a data set together: what was found by lesion size, and paired differences to stock."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.small_lesions.arms import ARMS, STOCK
from benchmarks.small_lesions.data import Data
from benchmarks.small_lesions.runs import BUDGETS, EQUAL_TIME, ERROR_FILE, RESULT_FILE, Workspace, counts_for_time
from nnunetv2_smallseg.evaluation.resampling import Resampling, bootstrap_ratios, divide, percentile_interval
from nnunetv2_smallseg.evaluation.result_tables import ResultTables, read_csv
from nnunetv2_smallseg.evaluation.size_groups import diameter_bins
from nnunetv2_smallseg.evaluation.statistics import detection_sums

__all__ = ["METRICS", "collect", "summarise"]

# Name here -> name in ``evaluation.statistics``.
METRICS = {"dice": "pooled_dice", "recall": "pooled_recall", "false_positives_per_case": "false_positives_per_case"}
ALL_SIZES = "all sizes"


def collect(workspace: Workspace, data: Data) -> dict | None:
    """Everything about a data set for its results file; None if no run is finished.

    A training at equal iterations that took the time of stock, within 5 %, is listed for equal time as well.
    """
    folder = workspace.folder / data.name
    finished = {
        budget: {
            (result["arm"], result["seed"]): result
            for file in sorted(folder.glob(f"{budget}/*/seed_*/{RESULT_FILE}"))
            if (result := json.loads(file.read_text()))["arm"] in ARMS
        }
        for budget in BUDGETS
    }
    if not any(finished.values()):
        return None
    for (arm, seed), result in finished["iterations"].items():
        seconds = workspace.time_budget(data.name, seed)
        if seconds is not None and counts_for_time(result, seconds):
            finished["time"].setdefault((arm, seed), result)
    summaries = []
    for budget, results in finished.items():
        order = sorted(results, key=lambda key: (list(ARMS).index(key[0]), key[1]))
        tables = _tables(folder / results[key]["budget"] / key[0] / f"seed_{key[1]}" / "evaluation" for key in order)
        seeds: dict[str, list[int]] = {}
        for arm, seed in order:
            seeds.setdefault(arm, []).append(seed)
        if tables is not None:
            summaries += [{"budget": budget, **row} for row in summarise(tables, seeds, data.limits_mm)]
    scale = workspace.scale(data)
    return {
        "machine": json.loads((workspace.folder / "machine.json").read_text()),
        "data": {"name": data.name, "title": data.title, "unit": data.unit, "limits_mm": list(data.limits_mm)},
        "settings": {
            **asdict(scale),
            "full": workspace.full,
            "device": workspace.device,
            "num_loaders": workspace.num_loaders,
            "num_folds": data.num_folds,
            "evaluated_shape": data.evaluated_shape,
            "phantom": asdict(data.phantom) if data.phantom is not None else None,
            "equal_time_tolerance": EQUAL_TIME,
        },
        "arms": {
            name: {"title": arm.title, "trainer": arm.trainer, "network": arm.network, "switches": dict(arm.attributes)}
            for name, arm in ARMS.items()
            if any(name == key[0] for results in finished.values() for key in results)
        },
        "runs": [
            {"counts_for": budget, **result}
            for budget, results in finished.items()
            for _, result in sorted(results.items(), key=lambda entry: (entry[0][1], list(ARMS).index(entry[0][0])))
        ],
        "summaries": summaries,
        "failures": failures(folder),
    }


def failures(folder: Path) -> list[dict]:
    """The runs of a data set that ended with an error when they were last tried, with its last line."""
    return [
        {
            "arm": file.parts[-3],
            "budget": file.parts[-4],
            "seed": int(file.parts[-2].removeprefix("seed_")),
            "message": file.read_text().strip().splitlines()[-1],
        }
        for file in sorted(folder.glob(f"*/*/seed_*/{ERROR_FILE}"))
        if not file.with_name(RESULT_FILE).exists()
    ]


def _tables(folders: Sequence[Path]) -> ResultTables | None:
    """The tables of several evaluations as one; None without any."""
    cases, lesions = [], []
    for folder in folders:
        cases += read_csv(folder / "cases.csv")
        lesions += read_csv(folder / "lesions.csv")
    return ResultTables(cases, lesions) if cases else None


def summarise(
    tables: ResultTables,
    seeds: Mapping[str, Sequence[int]],
    limits_mm: Sequence[float],
    resampling: Resampling | None = None,
) -> list[dict]:
    """Dice and recall of lesions and false positives of every arm, by size group, with the difference to stock.

    Numbers of an arm are those of all its seeds pooled; differences use the seeds that stock has, too. Intervals are by
    bootstrap over cases: a case is drawn with what all arms and seeds made of it.

    Args:
        tables: Predictions ``ARM-SEED`` of one region.
        seeds: Arm -> its seeds.
        limits_mm: Limits of the size groups.
        resampling: Bootstrap samples and level.
    Returns:
        One dictionary an arm, group and metric: ``value`` with ``low`` and ``high``, ``per_seed``; and unless the arm
        is stock ``difference``: the same of arm minus stock, with ``num_cases``, the cases that have such lesions.
        Undefined numbers are None.
    """
    resampling = resampling or Resampling()
    region = tables.regions[0]
    column = {name: index for index, name in enumerate(tables.predictions)}
    groups = resampling.groups(tables.case_names(region))
    rows = []
    for group in (None, *diameter_bins(limits_mm)):
        sums = detection_sums(tables, region, group)
        for metric, source in METRICS.items():
            upper, lower = sums[source]
            pooled: list[tuple[np.ndarray, np.ndarray]] = []

            def pool(arm: str, members: Sequence[int], upper=upper, lower=lower, pooled=pooled) -> int:
                """Adds a column with the seeds of an arm together; returns its number."""
                columns = [column[f"{arm}-{seed}"] for seed in members]
                pooled.append((upper[:, columns].sum(axis=1), lower[:, columns].sum(axis=1)))
                return len(pooled) - 1

            places = {}
            for arm, members in seeds.items():
                common = [seed for seed in members if seed in seeds.get(STOCK, ())] if arm != STOCK else []
                pair = (pool(STOCK, common), pool(arm, common)) if common else None
                places[arm] = pool(arm, members), pair, common
            uppers, lowers = (np.stack(side, axis=1) for side in zip(*pooled, strict=True))
            generator = np.random.default_rng(0)
            samples = bootstrap_ratios(uppers, lowers, generator, groups, resampling.num_samples)
            values = divide(uppers.sum(axis=0), lowers.sum(axis=0))
            by_prediction = divide(upper.sum(axis=0), lower.sum(axis=0))
            low, high = percentile_interval(samples, resampling.level)
            for arm, (own, pair, common) in places.items():
                row = {
                    "arm": arm,
                    "group": group or ALL_SIZES,
                    "metric": metric,
                    "value": _number(values[own]),
                    "low": _number(low[own]),
                    "high": _number(high[own]),
                    "per_seed": {str(seed): _number(by_prediction[column[f"{arm}-{seed}"]]) for seed in seeds[arm]},
                }
                if pair is not None:
                    stock, ours = pair
                    (down,), (up,) = percentile_interval(
                        samples[:, [ours]] - samples[:, [stock]], resampling.level
                    )  # fmt: skip
                    row["difference"] = {
                        "value": _number(values[ours] - values[stock]),
                        "low": _number(down),
                        "high": _number(up),
                        "per_seed": {
                            str(seed): _number(
                                by_prediction[column[f"{arm}-{seed}"]] - by_prediction[column[f"{STOCK}-{seed}"]]
                            )
                            for seed in common
                        },
                        "num_cases": int((lowers[:, stock] > 0).sum()),
                    }
                rows.append(row)
    return rows


def _number(value: float) -> float | None:
    """Four digits behind the point; None for NaN."""
    return None if math.isnan(value) else round(float(value), 4)
