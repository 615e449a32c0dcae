"""Puts the cases together: the content of ``lesion_fingerprint.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from nnunetv2_smallseg import __version__
from nnunetv2_smallseg.evaluation.size_groups import diameter_bins
from nnunetv2_smallseg.fingerprint.case import CaseRecord
from nnunetv2_smallseg.fingerprint.deep_supervision import level_weights
from nnunetv2_smallseg.fingerprint.measure import Table
from nnunetv2_smallseg.fingerprint.source import Source

__all__ = ["ALL", "FORMAT_VERSION", "PERCENTILES", "SLAB_SIZES", "length_unit", "summarise"]

FORMAT_VERSION = 1
PERCENTILES = {"p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "p99": 99, "max": 100}
ALL = "all"
# Slices of a patch for which it is told how many lesions fit.
SLAB_SIZES = (1, 3, 5, 7)
# Readers of pictures, which hold no spacing: nnU-Net takes a pixel as 1.
PIXEL_READERS = ("NaturalImage2DIO",)


def length_unit(content: Mapping) -> str:
    """Unit of diameters, short: mm or px."""
    return "mm" if content["unit"] == "mm" else "px"


def summarise(source: Source, records: Sequence[CaseRecord], diameter_limits_mm: Sequence[float]) -> dict:
    """Everything a fingerprint says but the recommendations.

    Args:
        source: Data set, plans and configuration.
        records: The measured cases; at least one.
        diameter_limits_mm: Limits of the size bins.
    Returns:
        Plain values for JSON; docs/fingerprint.md describes them. Percentiles of nothing are None.
    """
    data_set = source.data_set
    regions = [region.name for region in data_set.regions]
    sizes, grid, training = (_join([getattr(record, name) for record in records])
                             for name in ("sizes", "grid", "training"))  # fmt: skip
    planar = data_set.num_dimensions == 2
    unit = "pixel" if data_set.reader.__name__ in PIXEL_READERS else "mm"
    bins = _Bins(diameter_limits_mm, unit)
    return {
        "format_version": FORMAT_VERSION,
        "smallseg_version": __version__,
        "dataset": source.dataset_name,
        "plans": source.plans_name,
        "configuration": source.configuration_name,
        "labels_read": source.labels_read,
        "labels_folder": str(source.labels_folder),
        "num_cases": len(records),
        "num_dimensions": data_set.num_dimensions,
        "unit": unit,
        "target_spacing_mm": list(data_set.target_spacing),
        "patch_size": [int(size) for size in source.configuration["patch_size"]],
        "batch_size": source.schedule.batch_size,
        "classes": {region.name: list(region.labels) for region in data_set.regions},
        "ignore_label": data_set.setup.ignore_label,
        "size_bins": {"limits_mm": list(bins.limits), "names": bins.names},
        "lesions": _by_class(regions, lambda chosen: _lesions(records, sizes, grid, chosen, bins, planar)),
        "slices": _slices(records, regions),
        "vanish": {
            "resampling": _resampling(records, regions, bins),
            "deep_supervision": _deep_supervision(source, grid, training, regions, bins),
        },
        "patch": _patch(source, grid, training, regions, bins),
        "sampling": _sampling(source, grid, training, regions, bins),
        "cases": {
            record.case: {
                "num_lesions": {name: int(np.count_nonzero(record.sizes["region"] == index))
                                for index, name in enumerate(regions)},
                "lesion_size": float(record.sizes["size"].sum()),
                "num_slices": record.num_slices,
                "num_slices_with_lesions": len(record.areas[-1]),
            }
            for record in records
        },
    }  # fmt: skip


class _Bins:
    """Size bins by equivalent diameter."""

    def __init__(self, limits: Sequence[float], unit: str) -> None:
        self.limits = [float(limit) for limit in limits]
        self.names = [name if unit == "mm" else name.replace("mm", "px") for name in diameter_bins(limits)]

    def shares(self, diameters: np.ndarray, values: np.ndarray) -> dict[str, float | None]:
        """Mean of ``values`` in each bin; None without a lesion."""
        places = np.searchsorted(self.limits, diameters, side="right")
        return {name: _mean(values[places == index]) for index, name in enumerate(self.names)}

    def counts(self, diameters: np.ndarray) -> dict[str, int]:
        """Lesions in each bin."""
        places = np.searchsorted(self.limits, diameters, side="right")
        return {name: int(np.count_nonzero(places == index)) for index, name in enumerate(self.names)}


def _join(tables: Sequence[Table]) -> Table:
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def _by_class(regions: Sequence[str], describe: Callable[[int | None], dict]) -> dict[str, dict]:
    """A description of all classes together, and of each."""
    return {ALL: describe(None), **{name: describe(index) for index, name in enumerate(regions)}}


def _chosen(table: Table, region: int | None) -> np.ndarray:
    return np.ones(len(table["region"]), dtype=bool) if region is None else table["region"] == region


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _percentiles(values: np.ndarray) -> dict[str, float | list[float] | None]:
    """Percentiles of (N,) or, axis by axis, of (N, axes); None of nothing."""
    if not len(values):
        return dict.fromkeys(PERCENTILES)
    found = np.percentile(np.asarray(values, dtype=np.float64), list(PERCENTILES.values()), axis=0)
    return {name: value.tolist() for name, value in zip(PERCENTILES, found, strict=True)}


def _lesions(
    records: Sequence[CaseRecord], sizes: Table, grid: Table, region: int | None, bins: _Bins, planar: bool
) -> dict:
    chosen, on_grid = _chosen(sizes, region), _chosen(grid, region)
    axes = slice(1 if planar else 0, None)
    per_case = np.array([np.count_nonzero(_chosen(record.sizes, region)) for record in records])
    totals = np.array([record.sizes["size"][_chosen(record.sizes, region)].sum() for record in records])
    diameters = sizes["equivalent_diameter_mm"][chosen]
    size = "area_mm2" if planar else "volume_mm3"
    return {
        "count": int(np.count_nonzero(chosen)),
        "num_cases_with_lesions": int(np.count_nonzero(per_case)),
        "per_case": _percentiles(per_case),
        f"{size}_per_case": _percentiles(totals),
        size: _percentiles(sizes["size"][chosen]),
        "equivalent_diameter_mm": _percentiles(diameters),
        "extent_mm": _percentiles(sizes["extent_mm"][chosen][:, axes]),
        "extent_voxels": _percentiles(grid["extent_voxels"][on_grid][:, axes]),
        "share_within_slices": {
            str(slices): _mean(grid["extent_voxels"][on_grid][:, 0] <= slices) for slices in SLAB_SIZES
        },
        "by_size": bins.counts(diameters),
        "histogram": _histogram(diameters),
    }


def _histogram(diameters: np.ndarray) -> dict[str, list]:
    """Lesions in classes of the diameter, each 10 ** 0.1 times as wide as the one before."""
    if not len(diameters):
        return {"edges_mm": [], "counts": []}
    steps = np.arange(np.floor(np.log10(diameters.min()) * 10), np.floor(np.log10(diameters.max()) * 10) + 2)
    edges = 10 ** (steps / 10)
    return {"edges_mm": edges.tolist(), "counts": np.histogram(diameters, edges)[0].tolist()}


def _slices(records: Sequence[CaseRecord], regions: Sequence[str]) -> dict[str, dict]:
    total = sum(record.num_slices for record in records)

    def describe(region: int | None) -> dict:
        areas = np.concatenate([record.areas[-1 if region is None else region] for record in records])
        return {
            "num_slices": total,
            "num_with_lesions": len(areas),
            "share_with_lesions": len(areas) / total if total else None,
            "lesion_area_mm2": _percentiles(areas),
        }

    return _by_class(regions, describe)


def _resampling(records: Sequence[CaseRecord], regions: Sequence[str], bins: _Bins) -> dict:
    known = [record for record in records if record.has_resampling]
    if not known:
        return {"num_cases": 0, "classes": None, "note": "needs the raw labels, which are not there"}
    table = _join([record.resampling for record in known])

    def describe(region: int | None) -> dict:
        chosen = _chosen(table, region)
        vanished = table["vanished"][chosen]
        diameters = table["equivalent_diameter_mm"][chosen]
        return {
            "count": len(vanished),
            "num_vanished": int(np.count_nonzero(vanished)),
            "share": _mean(vanished),
            "by_size": bins.shares(diameters, vanished),
        }

    note = "" if len(known) == len(records) else "cases whose raw labels are not there are left out"
    return {"num_cases": len(known), "classes": _by_class(regions, describe), "note": note}


def _deep_supervision(source: Source, grid: Table, training: Table, regions: Sequence[str], bins: _Bins) -> list[dict]:
    factors = source.data_set.setup.factors
    levels = []
    for level, (factor, weight) in enumerate(zip(factors, level_weights(len(factors)), strict=True)):

        def describe(region: int | None, level: int = level) -> dict:
            chosen = _chosen(grid, region)
            diameters = grid["equivalent_diameter_mm"][chosen]
            lesions, sections = (training[name][chosen, level] for name in ("vanished", "sections_vanished"))
            return {
                "lesions": _mean(lesions),
                "lesions_by_size": bins.shares(diameters, lesions),
                "sections": _mean(sections),
                "sections_by_size": bins.shares(diameters, sections),
            }

        levels.append(
            {
                "factor": list(factor),
                "loss_weight": weight,
                "nearest": _by_class(regions, describe),
                # By construction: every voxel of the target takes a lesion that lies in it.
                "lesion_preserving": 0.0,
            }
        )
    return levels


def _patch(source: Source, grid: Table, training: Table, regions: Sequence[str], bins: _Bins) -> dict:
    patch = np.asarray(source.data_set.setup.patch_size)
    axes = slice(1 if source.data_set.num_dimensions == 2 else 0, None)

    def describe(region: int | None) -> dict:
        chosen = _chosen(grid, region)
        diameters = grid["equivalent_diameter_mm"][chosen]
        larger = grid["extent_voxels"][chosen] > patch
        return {
            "larger_than_patch": [_mean(column) for column in larger[:, axes].T],
            "larger_than_patch_in_plane": _mean(larger[:, 1:].any(axis=1)),
            **{
                f"cut_{kind}": {
                    "share": _mean(training[f"cut_{kind}"][chosen]),
                    "by_size": bins.shares(diameters, training[f"cut_{kind}"][chosen]),
                }
                for kind in ("random", "centred")
            },
        }

    return {
        "patch_size": [int(size) for size in patch[axes]],
        "drawn_patch_size": [int(size) for size in source.data_set.setup.drawn_patch_size[axes]],
        "classes": _by_class(regions, describe),
    }


def _sampling(source: Source, grid: Table, training: Table, regions: Sequence[str], bins: _Bins) -> dict:
    schedule = source.schedule
    random, foreground = training["random"], training["foreground"]
    values = {
        "seen_per_epoch": schedule.seen_per_epoch(random, foreground),
        "views_per_epoch": schedule.views_per_epoch(random, foreground),
        "centred_per_epoch": schedule.views_per_epoch(np.zeros_like(random), training["centred"]),
        "never_centred": training["centred"] == 0,
    }

    def describe(region: int | None) -> dict:
        chosen = _chosen(grid, region)
        diameters = grid["equivalent_diameter_mm"][chosen]
        return {
            "count": int(np.count_nonzero(chosen)),
            "by_size_count": bins.counts(diameters),
            **{
                name: {"mean": _mean(value[chosen]), "by_size": bins.shares(diameters, value[chosen])}
                for name, value in values.items()
            },
            "least_seen": float(values["seen_per_epoch"][chosen].min()) if chosen.any() else None,
        }

    return {
        "num_training_cases": float(schedule.num_training_cases),
        "iterations_per_epoch": schedule.iterations,
        "random_patches_per_batch": schedule.random_patches,
        "foreground_patches_per_batch": schedule.foreground_patches,
        "classes": _by_class(regions, describe),
    }
