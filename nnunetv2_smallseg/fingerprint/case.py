"""Reads the labels of one case, preprocessed or raw, and measures them. Runs in worker processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nnunetv2_smallseg.errors import SmallSegError
from nnunetv2_smallseg.evaluation.regions import Region
from nnunetv2_smallseg.fingerprint.measure import (
    Foreground,
    Table,
    TrainingSetup,
    draw_locations,
    find_foreground,
    resampling_table,
    size_table,
    slice_areas,
    training_table,
)
from nnunetv2_smallseg.fingerprint.patches import Locations
from nnunetv2_smallseg.fingerprint.resampling import Resampled, describe_resampled, resample_labels

__all__ = ["CaseRecord", "CaseTask", "DataSet", "measure_case"]


@dataclass(frozen=True)
class DataSet:
    """What is the same for all cases.

    Attributes:
        regions: Labels or regions, in the order of nnU-Net.
        known_labels: Labels that may occur.
        num_dimensions: 2 for pictures, else 3.
        setup: What the configuration does to lesions.
        transpose_forward: Order of the axes in the preprocessed data.
        target_spacing: Voxel size in mm of the preprocessed data, (z, y, x) or, for slices, (y, x).
        resample: nnU-Net's function for labels: (1, Z, Y, X), new shape, spacing, new spacing -> (1, Z, Y, X).
        resampling: Options of nnU-Net's default function, if it is the one of the plans with linear interpolation.
        reader: nnU-Net's class that reads the images of the data set.
        preprocessed: Folder of the preprocessed cases; None if there is none.
        read_raw: Measure raw labels, resampled by us, also where preprocessed ones are there.
    """

    regions: tuple[Region, ...]
    known_labels: frozenset[int]
    num_dimensions: int
    setup: TrainingSetup
    transpose_forward: tuple[int, ...]
    target_spacing: tuple[float, ...]
    resample: Callable
    resampling: dict | None
    reader: type
    preprocessed: Path | None
    read_raw: bool


@dataclass(frozen=True)
class CaseTask:
    """A case to be measured: ``label_file`` holds its raw labels; None if they are not there."""

    data_set: DataSet
    case: str
    label_file: Path | None


@dataclass(frozen=True)
class CaseRecord:
    """What was measured of a case.

    Attributes:
        case: Its name.
        num_slices: Annotated slices.
        areas: Lesion areas in mm2 of the slices with lesions, one array a region and one for all together.
        sizes: ``size_table`` of the labels read.
        grid: ``size_table`` of the preprocessed labels, whose lesions ``training`` describes.
        training: ``training_table``.
        resampling: ``resampling_table``; empty if raw labels were needed and are not there.
        has_resampling: Whether ``resampling`` says something.
    """

    case: str
    num_slices: int
    areas: list[np.ndarray]
    sizes: Table
    grid: Table
    training: Table
    resampling: Table = field(default_factory=dict)

    @property
    def has_resampling(self) -> bool:
        """Whether it is known which lesions vanish by resampling."""
        return bool(self.resampling)


def measure_case(task: CaseTask) -> CaseRecord:
    """Reads and measures a case.

    Raises:
        SmallSegError: If a file cannot be read or holds something that is no label; names the file.
    """
    data_set = task.data_set
    if data_set.preprocessed is not None and not data_set.read_raw:
        return _measure_preprocessed(task)
    return _measure_raw(task)


def _measure_preprocessed(task: CaseTask) -> CaseRecord:
    data_set = task.data_set
    labels, properties = _read_preprocessed(data_set, task.case)
    spacing = _target_spacing(data_set, _spacing(data_set, properties["spacing"]))
    foreground = find_foreground(labels, data_set.regions)
    sizes = size_table(foreground, spacing, data_set.num_dimensions)
    locations, annotated = _stored_locations(data_set, properties)
    num_slices, areas = slice_areas(foreground, data_set.regions, spacing, data_set.setup.ignore_label)
    if tuple(properties["shape_after_cropping_and_before_resampling"]) == labels.shape:
        resampling = _unchanged(sizes)
    elif task.label_file is None:
        resampling = {}
    else:
        resampling = _resample_raw(task, properties)[0]
    return CaseRecord(task.case, num_slices, areas, sizes, sizes,
                      training_table(foreground, data_set.setup, locations, annotated), resampling)  # fmt: skip


def _measure_raw(task: CaseTask) -> CaseRecord:
    data_set = task.data_set
    properties = None
    if data_set.preprocessed is not None:
        _, properties = _open_preprocessed(data_set, task.case)
    resampling, raw, spacing, resampled = _resample_raw(task, properties)
    sizes = size_table(raw, spacing, data_set.num_dimensions)
    num_slices, areas = slice_areas(raw, data_set.regions, spacing, data_set.setup.ignore_label)
    foreground, grid = raw, sizes
    if resampled is not None:
        foreground = find_foreground(resampled.labels, data_set.regions, resampled.offset, resampled.shape)
        grid = size_table(foreground, _target_spacing(data_set, spacing), data_set.num_dimensions)
    # The same case gives the same numbers, whichever process measures it.
    generator = np.random.default_rng(list(task.case.encode()))
    locations = [Locations(draw_locations(foreground, region, generator)) for region in data_set.regions]
    annotated = None
    if data_set.setup.ignore_label is not None:
        annotated = Locations(_annotated_locations(foreground, data_set.setup.ignore_label, generator))
    return CaseRecord(task.case, num_slices, areas, sizes, grid,
                      training_table(foreground, data_set.setup, locations, annotated), resampling)  # fmt: skip


def _unchanged(sizes: Table) -> Table:
    """The ``resampling_table`` of a case that is not resampled."""
    vanished = np.zeros(len(sizes["region"]), dtype=bool)
    return {**{name: sizes[name] for name in ("region", "equivalent_diameter_mm")}, "vanished": vanished}


def _resample_raw(
    task: CaseTask, properties: dict | None
) -> tuple[Table, Foreground, tuple[float, ...], Resampled | None]:
    """Raw labels, cropped as in ``properties``, and resampled to the target spacing; None if they are not resampled."""
    from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape, determine_do_sep_z_and_axis

    data_set = task.data_set
    labels, spacing = _read_raw(data_set, task.label_file)
    if properties is not None:
        labels = labels[tuple(slice(begin, end) for begin, end in properties["bbox_used_for_cropping"])]
    foreground = find_foreground(labels, data_set.regions)
    sizes = size_table(foreground, spacing, data_set.num_dimensions)
    target = _target_spacing(data_set, spacing)
    new_shape = tuple(int(size) for size in compute_new_shape(labels.shape, spacing, target))
    if new_shape == labels.shape:
        return _unchanged(sizes), foreground, spacing, None
    if data_set.resampling is None:
        resampled = describe_resampled(data_set.resample(labels[None], new_shape, spacing, target)[0], labels.shape)
    else:
        options = (data_set.resampling.get("force_separate_z"), spacing, target)
        separately, axis = determine_do_sep_z_and_axis(*options)
        resampled = resample_labels(
            foreground.labels, foreground.offset, labels.shape, new_shape, int(axis) if separately else None
        )
    table = resampling_table(foreground, data_set.regions, resampled, sizes["equivalent_diameter_mm"])
    return table, foreground, spacing, resampled


def _spacing(data_set: DataSet, spacing: Sequence[float]) -> tuple[float, ...]:
    """Spacing of a file in the order of the preprocessed axes."""
    return tuple(float(spacing[axis]) for axis in data_set.transpose_forward)


def _target_spacing(data_set: DataSet, spacing: tuple[float, ...]) -> tuple[float, ...]:
    """Spacing after resampling: slices keep their distance where the configuration works on slices."""
    return (*spacing[: 3 - len(data_set.target_spacing)], *data_set.target_spacing)


def _read_raw(data_set: DataSet, file: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    """Labels (Z, Y, X) as integers and spacing, with the axes of the preprocessed data."""
    try:
        labels, properties = data_set.reader().read_seg(str(file))
    except Exception as error:  # readers raise whatever their libraries do
        raise SmallSegError(
            f"{file} cannot be read ({_last_line(error)}): write it anew, and check the data set by "
            "nnUNetv2_extract_fingerprint --verify_dataset_integrity"
        ) from error
    labels = np.asarray(labels[0])
    if np.issubdtype(labels.dtype, np.floating):
        if not np.array_equal(np.rint(labels), labels):
            raise SmallSegError(f"{file} holds values that are no whole numbers: labels are; find out what wrote it")
        labels = labels.astype(np.int16)
    labels = labels.transpose(data_set.transpose_forward)
    _check_labels(labels, data_set, file)
    return labels, _spacing(data_set, properties["spacing"])


def _open_preprocessed(data_set: DataSet, case: str) -> tuple[object, dict]:
    """The segmentation as nnU-Net opens it, (1, Z, Y, X), and the properties of a preprocessed case."""
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    folder = data_set.preprocessed
    try:
        _, labels, _, properties = infer_dataset_class(str(folder))(str(folder), [case]).load_case(case)
    except Exception as error:  # damaged files raise whatever their libraries do
        raise _damaged(folder, case, error) from error
    return labels, properties


def _read_preprocessed(data_set: DataSet, case: str) -> tuple[np.ndarray, dict]:
    """Labels (Z, Y, X) and properties of a preprocessed case."""
    opened, properties = _open_preprocessed(data_set, case)
    try:
        labels = np.asarray(opened[:1])[0]
    except Exception as error:
        raise _damaged(data_set.preprocessed, case, error) from error
    _check_labels(labels, data_set, data_set.preprocessed / f"{case}_seg")
    return labels, properties


def _damaged(folder: Path, case: str, error: Exception) -> SmallSegError:
    return SmallSegError(
        f"the preprocessed case {case} in {folder} cannot be read ({_last_line(error)}): delete its files and run "
        "nnUNetv2_preprocess again, or read the raw labels with --raw"
    )


def _check_labels(labels: np.ndarray, data_set: DataSet, file: Path) -> None:
    unknown = sorted({int(label) for label in np.unique(labels[labels > 0])} - data_set.known_labels)
    if unknown:
        raise SmallSegError(
            f"{file} holds the label {unknown[0]}, which dataset.json does not name (it names "
            f"{', '.join(map(str, sorted(data_set.known_labels)))}): correct the one or the other"
        )


def _stored_locations(data_set: DataSet, properties: dict) -> tuple[list[Locations], Locations | None]:
    """The voxels nnU-Net's preprocessing chose to centre patches on: of every region, and of all that is annotated."""
    stored = properties["class_locations"]

    def read(*keys: object) -> Locations:
        found = next((stored[key] for key in keys if key in stored and len(stored[key])), np.zeros((0, 4), dtype=int))
        return Locations(np.asarray(found)[:, 1:])

    locations = [read(region.labels, region.labels[0] if len(region.labels) == 1 else None)
                 for region in data_set.regions]  # fmt: skip
    if data_set.setup.ignore_label is None:
        return locations, None
    labels = sorted(data_set.known_labels - {data_set.setup.ignore_label})
    return locations, read((-1, *labels))


def _annotated_locations(foreground: Foreground, ignore_label: int, generator: np.random.Generator) -> np.ndarray:
    """Voxels drawn from all that are annotated, (N, 3); fewer where little is."""
    coordinates = generator.integers(0, foreground.shape, (10_000, 3))
    inside = coordinates - np.asarray(foreground.offset)
    within = np.all((inside >= 0) & (inside < foreground.labels.shape), axis=1)
    ignored = np.zeros(len(coordinates), dtype=bool)
    ignored[within] = foreground.labels[tuple(inside[within].T)] == ignore_label
    return coordinates[~ignored]


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
