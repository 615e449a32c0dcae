"""Which labels and regions are evaluated, as ``dataset.json`` names them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunetv2_smallseg.evaluation.images import EvaluationError

__all__ = ["LabelScheme", "Region", "scheme_from_dataset_json", "scheme_from_labels"]


@dataclass(frozen=True)
class Region:
    """A foreground class: one label, or several that are evaluated together.

    Attributes:
        name: Name in the tables.
        labels: Labels whose voxels belong to it.
        key: Key in ``summary.json``, as nnU-Net writes it.
        channel: Its channel in a file of probabilities.
    """

    name: str
    labels: tuple[int, ...]
    key: str
    channel: int

    def mask(self, array: np.ndarray) -> np.ndarray:
        """Boolean mask of the region in a label map, of the map's shape."""
        mask = array == self.labels[0]
        for label in self.labels[1:]:
            mask |= array == label
        return mask


@dataclass(frozen=True)
class LabelScheme:
    """The regions to evaluate and the labels that may occur.

    Attributes:
        regions: In the order of nnU-Net.
        known_labels: Labels that may occur in a reference, 0 and the ignore label included; None for any.
        ignore_label: Label of reference voxels that are left out; None if there is none.
        num_channels: Channels of a file of probabilities.
    """

    regions: tuple[Region, ...]
    known_labels: frozenset[int] | None
    ignore_label: int | None
    num_channels: int


def scheme_from_dataset_json(path: Path) -> LabelScheme:
    """Reads regions and ignore label from a ``dataset.json`` of nnU-Net.

    Raises:
        EvaluationError: If the file is absent, no JSON, or has no ``labels``.
    """
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))["labels"]
        entries = {name: tuple(value) if isinstance(value, list) else (int(value),) for name, value in labels.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"{path} does not name labels ({error}): give the dataset.json of the data set with -djfile"
        ) from error
    ignore = entries.pop("ignore", (None,))[0]
    foreground = {name: values for name, values in entries.items() if any(values)}
    if not foreground:
        raise EvaluationError(f"{path} names no foreground label: give the dataset.json of the data set with -djfile")
    with_regions = any(isinstance(value, list) and len(value) > 1 for value in labels.values())
    known = {label for values in entries.values() for label in values} | {0}
    if with_regions:  # nnU-Net predicts one channel a region, in the order of the file
        regions = [
            Region(name, values, str(values if isinstance(labels[name], list) else values[0]), channel)
            for channel, (name, values) in enumerate(foreground.items())
        ]
        num_channels = len(regions)
    else:  # one channel a label, background first
        ordered = sorted(known)
        regions = [
            Region(name, values, str(values[0]), ordered.index(values[0]))
            for name, values in sorted(foreground.items(), key=lambda item: item[1])
        ]
        num_channels = len(ordered)
    return LabelScheme(
        tuple(regions), frozenset(known | ({ignore} if ignore is not None else set())), ignore, num_channels
    )


def scheme_from_labels(labels: Iterable[int], ignore_label: int | None = None) -> LabelScheme:
    """One region for each foreground label, named by its number; other labels may occur and count as background."""
    foreground = sorted({int(label) for label in labels} - {0, ignore_label})
    if not foreground:
        raise EvaluationError("there is no foreground label to evaluate: give labels (-l) or a dataset.json (-djfile)")
    regions = tuple(Region(str(label), (label,), str(label), label) for label in foreground)
    return LabelScheme(regions, None, ignore_label, max(foreground) + 1)
