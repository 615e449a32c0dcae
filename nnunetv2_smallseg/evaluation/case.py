"""All metrics of one case: reads the files, and measures every region in the smallest box that holds it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nnunetv2_smallseg.errors import UsageError
from nnunetv2_smallseg.evaluation import probabilities as probability_metrics
from nnunetv2_smallseg.evaluation.boxes import bounding_box
from nnunetv2_smallseg.evaluation.components import Components, connected_components, instance_components
from nnunetv2_smallseg.evaluation.edge_cases import BOTH_EMPTY_RULES
from nnunetv2_smallseg.evaluation.images import EvaluationError, LabelImage, check_geometry, read_labels
from nnunetv2_smallseg.evaluation.lesion_metrics import evaluate_lesions
from nnunetv2_smallseg.evaluation.matching import MatchingRule
from nnunetv2_smallseg.evaluation.regions import LabelScheme, Region
from nnunetv2_smallseg.evaluation.size_groups import DIAMETER_LIMITS_MM, area_ratio_percent, diameter_bins
from nnunetv2_smallseg.evaluation.surface_metrics import surface_dice, surface_distances
from nnunetv2_smallseg.evaluation.voxel_metrics import Counts, confusion_matrix, region_counts, voxel_metrics

__all__ = ["CaseResult", "CaseTask", "CountedCase", "Settings", "count_case", "evaluate_case", "occurring_labels"]


@dataclass(frozen=True)
class Settings:
    """What can be chosen about the metrics.

    Attributes:
        tolerance_mm: Tolerance of the surface Dice (``nsd``).
        both_empty: Rule for two empty masks, a key of ``edge_cases.BOTH_EMPTY_RULES``.
        rule: How lesions are matched.
        connectivity: Of lesions; None for 26 in 3D and 8 in 2D.
        panoptic_iou: IoU above which a pair of lesions counts in the panoptic quality.
        diameter_limits_mm: Limits of the size bins of lesions.
        candidate_threshold: Lowest probability of a lesion candidate for FROC.
        spacing: Voxel size in mm in array order of files that hold none; 1 by default.

    Raises:
        UsageError: If a value is none of the allowed ones.
    """

    tolerance_mm: float = 1.0
    both_empty: str = "undefined"
    rule: MatchingRule = field(default_factory=MatchingRule)
    connectivity: int | None = None
    panoptic_iou: float = 0.5
    diameter_limits_mm: tuple[float, ...] = DIAMETER_LIMITS_MM
    candidate_threshold: float = 0.1
    spacing: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        diameter_bins(self.diameter_limits_mm)
        for name in ("panoptic_iou", "candidate_threshold"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"{name} lies between 0 and 1, not {getattr(self, name)}")
        if not 0 <= self.tolerance_mm < math.inf:
            raise UsageError(f"the tolerance is 0 mm or more, not {self.tolerance_mm}")
        if self.both_empty not in BOTH_EMPTY_RULES:
            raise UsageError(f"both_empty is one of {', '.join(BOTH_EMPTY_RULES)}, not {self.both_empty!r}")


@dataclass(frozen=True)
class CaseTask:
    """One case of one folder of predictions, with all a worker process needs."""

    prediction: str
    case: str
    reference_file: Path
    prediction_file: Path
    scheme: LabelScheme
    settings: Settings
    instances_file: Path | None = None
    probabilities_file: Path | None = None
    protocol: str | None = None


@dataclass(frozen=True)
class CaseResult:
    """What was measured in a case.

    Attributes:
        task: Its task.
        rows: Rows of ``cases.csv``, one a region.
        lesions: Rows of ``lesions.csv``.
        counts: Region name -> voxel counts.
        candidates: Region name -> candidates for FROC; empty without probabilities.
        calibration: Region name -> bins of the calibration, (bins, 3); empty without probabilities.
        protocol: Result of the protocol; None without one.
        num_dimensions: 2 or 3.
        has_spacing: False if a spacing of 1 was assumed.
    """

    task: CaseTask
    rows: list[dict]
    lesions: list[dict]
    counts: dict[str, Counts]
    candidates: dict[str, dict]
    calibration: dict[str, np.ndarray]
    protocol: dict | None
    num_dimensions: int
    has_spacing: bool


def occurring_labels(path: Path) -> list[int]:
    """Labels that occur in a file."""
    return [int(label) for label in np.unique(read_labels(path).array)]


def check_labels(
    scheme: LabelScheme, reference: LabelImage, prediction: LabelImage, pairs: Iterable[tuple[int, int]]
) -> None:
    """Raises ``EvaluationError`` if a label of the pairs (reference, prediction) is unknown to the scheme."""
    if scheme.known_labels is None:
        return
    pairs = list(pairs)
    for image, position, allowed in (
        (reference, 0, scheme.known_labels),
        (prediction, 1, scheme.known_labels - {scheme.ignore_label}),
    ):
        unknown = {pair[position] for pair in pairs} - allowed
        if unknown:
            raise EvaluationError(
                f"{image.path} holds the labels {sorted(unknown)}, but only {sorted(allowed)} are known: give the "
                "dataset.json of this data set (-djfile), or convert the labels"
            )


@dataclass(frozen=True)
class CountedCase:
    """The two label maps of a case and how often each pair of labels occurs.

    Attributes:
        reference: Label map of the reference.
        prediction: Label map of the prediction.
        box: Smallest box that holds all voxels that are not background in both.
        matrix: (label in the reference, label in the prediction) -> voxels of the whole image.
    """

    reference: LabelImage
    prediction: LabelImage
    box: tuple[slice, ...]
    matrix: dict[tuple[int, int], int]


def count_case(task: CaseTask) -> CountedCase:
    """Reads the label maps of a case and counts: all that the voxel-wise metrics need.

    Raises:
        EvaluationError: If a file cannot be read, geometries differ, or unknown labels occur.
    """
    reference = read_labels(task.reference_file, task.settings.spacing)
    prediction = read_labels(task.prediction_file, task.settings.spacing)
    check_geometry(reference, prediction)
    box = bounding_box(reference.array | prediction.array) or (slice(0, 0),) * reference.array.ndim
    cropped = reference.array[box], prediction.array[box]
    matrix = confusion_matrix(*cropped)
    check_labels(task.scheme, reference, prediction, matrix)
    matrix[0, 0] = matrix.get((0, 0), 0) + reference.array.size - cropped[0].size
    return CountedCase(reference, prediction, box, matrix)


def evaluate_case(task: CaseTask) -> CaseResult:
    """Evaluates one case.

    Raises:
        EvaluationError: If a file cannot be read, geometries differ, or unknown labels occur.
    """
    scheme, settings = task.scheme, task.settings
    counted = count_case(task)
    reference, prediction, box, matrix = counted.reference, counted.prediction, counted.box, counted.matrix
    shape = reference.array.shape
    instances = None
    if task.instances_file is not None:
        instance_image = read_labels(task.instances_file, settings.spacing)
        check_geometry(reference, instance_image)
        instances = instance_image.array
    probabilities = None
    if task.probabilities_file is not None:
        probabilities = probability_metrics.read_probabilities(task.probabilities_file, scheme.num_channels, shape)

    rows, lesions, counts, candidates, calibration = [], [], {}, {}, {}
    for region in scheme.regions:
        measured = _RegionOfCase(task, region, reference, prediction, box, instances, probabilities)
        counts[region.name] = region_counts(matrix, region.labels, scheme.ignore_label)
        row, region_lesions = measured.metrics(counts[region.name])
        rows.append(row)
        lesions.extend(region_lesions)
        if probabilities is not None:
            candidates[region.name], calibration[region.name] = measured.candidates, measured.calibration
    protocol = None
    if task.protocol is not None:
        if any(label == scheme.ignore_label for label, _ in matrix):
            raise EvaluationError(
                f"{task.reference_file} holds the ignore label {scheme.ignore_label}, which no protocol knows: "
                "evaluate without --protocol"
            )
        module = importlib.import_module(f"nnunetv2_smallseg.evaluation.protocols.{task.protocol}")
        protocol = module.evaluate_case(reference.array, prediction.array, prediction.spacing)
    return CaseResult(task, rows, lesions, counts, candidates, calibration, protocol, len(shape), reference.has_spacing)


class _RegionOfCase:
    """One region of a case: its two masks, cropped to the box that holds both, and what is measured on them."""

    def __init__(
        self,
        task: CaseTask,
        region: Region,
        reference: LabelImage,
        prediction: LabelImage,
        box: Sequence[slice],
        instances: np.ndarray | None,
        probabilities: np.ndarray | None,
    ) -> None:
        self.task, self.settings = task, task.settings
        self.identity = {"prediction": task.prediction, "case": task.case, "region": region.name}
        self.image, self.region = reference, region
        masks = [region.mask(image.array[tuple(box)]) for image in (reference, prediction)]
        if task.scheme.ignore_label is not None:
            counted = reference.array[tuple(box)] != task.scheme.ignore_label
            masks = [mask & counted for mask in masks]
        inner = bounding_box(masks[0] | masks[1]) or (slice(0, 0),) * masks[0].ndim
        self.reference, self.prediction = (mask[inner] for mask in masks)
        # Where the masks lie in the image.
        self.box = tuple(
            slice(outer.start + side.start, outer.start + side.stop) for outer, side in zip(box, inner, strict=True)
        )
        self.instances = instances
        self.probability = None if probabilities is None else probabilities[region.channel]
        self.candidates: dict = {}
        self.calibration: np.ndarray | None = None

    def metrics(self, counts: Counts) -> tuple[dict, list[dict]]:
        """The row of ``cases.csv`` and the rows of ``lesions.csv``."""
        settings, spacing, masks = self.settings, self.image.spacing, (self.reference, self.prediction)
        components = self._reference_components(), connected_components(self.prediction, settings.connectivity)
        lesions = evaluate_lesions(
            *components,
            spacing,
            rule=settings.rule,
            diameter_limits_mm=settings.diameter_limits_mm,
            panoptic_iou=settings.panoptic_iou,
            probability=None if self.probability is None else self.probability[self.box],
            offset=[side.start for side in self.box],
            image_shape=self.image.array.shape,
        )
        voxel = float(np.prod(spacing))
        row = {
            **self.identity,
            **voxel_metrics(counts, settings.both_empty),
            **surface_distances(*masks, spacing),
            "nsd": surface_dice(*masks, spacing, settings.tolerance_mm, settings.both_empty),
            **self._probability_metrics(components[0]),
            **lesions.case,
            "reference_volume_mm3": counts.reference * voxel,
            "predicted_volume_mm3": counts.prediction * voxel,
            "area_ratio_percent": self._area_ratio(),
        }
        return row, [{**self.identity, **lesion} for lesion in lesions.rows]

    def _reference_components(self) -> Components:
        if self.instances is None:
            return connected_components(self.reference, self.settings.connectivity)
        return instance_components(self.reference, self.instances[self.box], self.settings.connectivity)

    def _area_ratio(self) -> float:
        """SvANet's area ratio of the slice with most pixels of the region, in the whole slice."""
        if not self.reference.any():
            return float("nan")
        plane = np.zeros(self.image.array.shape[-2:], dtype=bool)
        largest = self.reference
        if largest.ndim == 3:
            largest = largest[int(np.argmax(largest.sum(axis=(1, 2))))]
        plane[self.box[-2:]] = largest
        return area_ratio_percent(plane)

    def _probability_metrics(self, lesions: Components) -> dict[str, float | None]:
        if self.probability is None:
            return {"auc": None, "brier": None, "ece": None}
        labels = self.image.array
        counted = np.ones(labels.shape, dtype=bool)
        if self.task.scheme.ignore_label is not None:
            counted = labels != self.task.scheme.ignore_label
        values, reference = self.probability[counted], self.region.mask(labels)[counted]
        whole = np.zeros(labels.shape, dtype=np.uint32)
        whole[self.box] = lesions.labels
        self.candidates = probability_metrics.candidates(
            np.where(counted, self.probability, 0),
            Components(whole, lesions.numbers),
            threshold=self.settings.candidate_threshold,
            rule=self.settings.rule,
            connectivity=self.settings.connectivity,
        )
        self.calibration = probability_metrics.calibration_bins(values, reference)
        return {
            "auc": probability_metrics.area_under_roc(values, reference),
            **probability_metrics.calibration_metrics(values, reference),
        }
