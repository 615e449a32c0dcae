"""Finds what a fingerprint is made of: data set, plans, configuration, labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from nnunetv2_smallseg.errors import SmallSegError, UsageError
from nnunetv2_smallseg.evaluation.regions import LabelScheme, scheme_from_dataset_json
from nnunetv2_smallseg.fingerprint.case import CaseTask, DataSet
from nnunetv2_smallseg.fingerprint.deep_supervision import downsampling_factors
from nnunetv2_smallseg.fingerprint.measure import TrainingSetup
from nnunetv2_smallseg.fingerprint.patches import ITERATIONS, Schedule
from nnunetv2_smallseg.plans.configurations import is_volume, resolve
from nnunetv2_smallseg.plans.inputs import read_object, unknown_dataset
from nnunetv2_smallseg.plans.switches import training_settings

__all__ = ["DEFAULT_PLANS_NAME", "Source", "find_source"]

DEFAULT_PLANS_NAME = "nnUNetSmallSegPlans"
# The configuration described unless another is named: the first of these that the plans have.
PREFERRED_CONFIGURATIONS = ("2.5d", "3d_fullres", "2d")


@dataclass(frozen=True)
class Source:
    """Everything that is known before a label is read.

    Attributes:
        dataset_name: Full name.
        plans_name: Name of the plans.
        configuration_name: Name of the configuration.
        configuration: The configuration with inheritance resolved.
        folder: Folder of the data set in ``nnUNet_preprocessed``.
        labels_folder: Where the labels described are.
        labels_read: ``preprocessed`` or ``raw``.
        data_set: What the worker processes need.
        schedule: Patches of an epoch.
        tasks: The cases.
    """

    dataset_name: str
    plans_name: str
    configuration_name: str
    configuration: Mapping
    folder: Path
    labels_folder: Path
    labels_read: str
    data_set: DataSet
    schedule: Schedule
    tasks: tuple[CaseTask, ...]

    @property
    def median_image_size(self) -> list[float]:
        """Median voxels of the preprocessed images, along z (in 3D configurations), y and x."""
        return list(self.configuration["median_image_size_in_voxels"])

    @property
    def number(self) -> int:
        """Number of the data set."""
        return int(self.dataset_name[7:10])


def find_source(
    dataset: str | int,
    plans_name: str = DEFAULT_PLANS_NAME,
    configuration_name: str | None = None,
    *,
    raw: bool = False,
) -> Source:
    """Finds plans and labels of a data set.

    Args:
        dataset: Name or number.
        plans_name: Name of the plans.
        configuration_name: Name of the configuration; None for 2.5d, 3d_fullres or 2d, the first there is.
        raw: Describe the raw labels even if preprocessed ones are there.
    Raises:
        UsageError: If there is no such data set.
        SmallSegError: If nnU-Net's folders, plans, configuration or labels are missing.
    """
    from nnunetv2 import paths
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    if not paths.nnUNet_preprocessed.get():
        raise SmallSegError(
            "the environment variable nnUNet_preprocessed is not set: export it as the folder nnU-Net uses, e.g. "
            "export nnUNet_preprocessed=/data/nnUNet_preprocessed"
        )
    folder, raw_folder = _dataset_folders(dataset)
    name = folder.name
    plans = _read_plans(folder, plans_name)
    if configuration_name is None:
        named = plans["configurations"]
        configuration_name = next((choice for choice in PREFERRED_CONFIGURATIONS if choice in named), next(iter(named)))
    configuration = resolve(plans, configuration_name)
    scheme = _read_scheme(folder, raw_folder)
    label_files = _raw_label_files(folder, raw_folder)
    preprocessed, preprocessed_cases = _preprocessed_cases(folder / configuration["data_identifier"])
    missing = sorted(label_files.keys() - preprocessed_cases)
    if preprocessed_cases and missing and not raw:
        raise SmallSegError(
            f"{len(missing)} of {len(label_files)} cases are not in {preprocessed} (the first: {missing[0]}): finish "
            f"nnUNetv2_preprocess -d {int(name[7:10])} -plans_name {plans_name}, or read the raw labels with --raw"
        )
    if not preprocessed_cases or missing:
        preprocessed = None
    from_raw = raw or preprocessed is None
    number = int(name[7:10])
    if from_raw and not label_files:
        raise SmallSegError(
            f"there are no labels of {name}: neither {folder / configuration['data_identifier']} nor "
            f"{raw_folder or 'nnUNet_raw'} (labelsTr) holds any; put the raw data set there and export nnUNet_raw, "
            f"or run nnUNetv2_preprocess -d {number} -plans_name {plans_name}"
        )
    cases = sorted(label_files if from_raw else preprocessed_cases)
    manager = PlansManager(plans)
    resampling = configuration.get("resampling_fn_seg_kwargs", {})
    is_default = configuration.get("resampling_fn_seg") == "resample_data_or_seg_to_shape" and (
        resampling.get("order"), resampling.get("order_z", 0)) == (1, 0)  # fmt: skip
    data_set = DataSet(
        regions=scheme.regions,
        known_labels=scheme.known_labels,
        num_dimensions=3 if plans["original_median_shape_after_transp"][0] > 1 else 2,
        setup=training_setup(configuration, scheme.ignore_label),
        transpose_forward=tuple(plans["transpose_forward"]),
        target_spacing=tuple(float(value) for value in configuration["spacing"]),
        resample=manager.get_configuration(configuration_name).resampling_fn_seg,
        resampling=dict(resampling) if is_default else None,
        reader=manager.image_reader_writer_class,
        preprocessed=preprocessed,
        read_raw=from_raw,
    )
    schedule = Schedule(
        batch_size=int(configuration["batch_size"]),
        num_training_cases=_num_training_cases(folder, raw_folder, len(cases)),
        iterations=training_settings(configuration, configuration_name).get("num_iterations_per_epoch", ITERATIONS),
    )
    return Source(
        dataset_name=name,
        plans_name=plans_name,
        configuration_name=configuration_name,
        configuration=configuration,
        folder=folder,
        labels_folder=next(iter(label_files.values())).parent if from_raw else preprocessed,
        labels_read="raw" if from_raw else "preprocessed",
        data_set=data_set,
        schedule=schedule,
        tasks=tuple(CaseTask(data_set, case, label_files.get(case)) for case in cases),
    )


def training_setup(configuration: Mapping, ignore_label: int | None = None) -> TrainingSetup:
    """Patch sizes and deep supervision of a configuration, slices of ``2d`` and ``2.5d`` as the first axis.

    The size of the patch that is drawn comes from nnU-Net's own trainer; slabs follow its 2D rules within the plane.
    """
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    patch = [int(size) for size in configuration["patch_size"]]
    in_plane = patch if is_volume(configuration) else patch[-2:]
    stand_in = SimpleNamespace(
        configuration_manager=SimpleNamespace(patch_size=in_plane), print_to_log_file=lambda *arguments: None
    )
    _, _, drawn, _ = nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(stand_in)
    slices = patch[: len(patch) - len(in_plane)]
    return TrainingSetup(
        patch_size=(*(1,) * (3 - len(patch)), *patch),
        drawn_patch_size=(*(1,) * (3 - len(patch)), *slices, *(int(size) for size in drawn)),
        factors=tuple(downsampling_factors(configuration)),
        ignore_label=ignore_label,
    )


def _dataset_folders(dataset: str | int) -> tuple[Path, Path | None]:
    """Folder of a data set in nnUNet_preprocessed, and in nnUNet_raw where it is there."""
    from nnunetv2 import paths
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    places = [Path(path) for path in (paths.nnUNet_raw, paths.nnUNet_preprocessed) if path.get()]
    try:
        name = str(maybe_convert_to_dataset_name(dataset))
    except (RuntimeError, ValueError) as error:
        raise UsageError(unknown_dataset(dataset, *places)) from error
    if not any((place / name).is_dir() for place in places):
        raise UsageError(unknown_dataset(dataset, *places))
    raw = Path(paths.nnUNet_raw) / name if paths.nnUNet_raw.get() else None
    return Path(paths.nnUNet_preprocessed) / name, raw if raw is not None and raw.is_dir() else None


def _read_plans(folder: Path, plans_name: str) -> dict:
    file = folder / f"{plans_name}.json"
    number = int(folder.name[7:10])
    if not file.is_file():
        raise SmallSegError(
            f"the plans {file} do not exist: write them by smallseg plan -d {number}, or name others with -p"
        )
    return read_object(file, ("configurations",), f"Write it anew by smallseg plan -d {number}")


def _read_scheme(folder: Path, raw_folder: Path | None) -> LabelScheme:
    files = [place / "dataset.json" for place in (raw_folder, folder) if place is not None]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise SmallSegError(f"{files[0]} does not exist: put the raw data set there")
    return scheme_from_dataset_json(found)


def _raw_label_files(folder: Path, raw_folder: Path | None) -> dict[str, Path]:
    """Case -> file with its raw labels: those of nnUNet_raw, else the copies beside the preprocessed data."""
    for description, labels in (
        *([(raw_folder / "dataset.json", raw_folder / "labelsTr")] if raw_folder is not None else []),
        (folder / "dataset.json", folder / "gt_segmentations"),
    ):
        if not description.is_file():
            continue
        content = read_object(description, ("file_ending",), "Mend it, or bring back the one of the data set")
        if "dataset" in content and labels.name == "labelsTr":
            from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

            listed = get_filenames_of_train_images_and_targets(str(raw_folder), content)
            return {case: Path(files["label"]) for case, files in listed.items()}
        ending = content["file_ending"]
        found = {file.name[: -len(ending)]: file for file in sorted(labels.glob(f"*{ending}"))}
        found = {case: file for case, file in found.items() if not case.startswith(".")}
        if found:
            return found
    return {}


def _preprocessed_cases(folder: Path) -> tuple[Path, set[str]]:
    """The folder of a configuration's preprocessed data and the cases in it."""
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    if not folder.is_dir() or not any(folder.glob("*.pkl")):
        return folder, set()
    return folder, set(infer_dataset_class(str(folder)).get_identifiers(str(folder)))


def _num_training_cases(folder: Path, raw_folder: Path | None, num_cases: int) -> float:
    """Cases a fold trains with: the mean over the folds of the data set, else four fifths as nnU-Net makes them."""
    for place in (folder, raw_folder):
        if place is not None and (place / "splits_final.json").is_file():
            try:
                folds = json.loads((place / "splits_final.json").read_text(encoding="utf-8"))
                return sum(len(fold["train"]) for fold in folds) / len(folds)
            except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
                raise SmallSegError(
                    f"{place / 'splits_final.json'} holds no list of folds ({error!r}): mend or remove it"
                ) from error
    return num_cases * 0.8 if num_cases >= 5 else num_cases
