"""Writes plans with the configurations ``2d`` and ``2.5d`` for a data set whose fingerprint nnU-Net has extracted.

Patch and batch size come from nnU-Net's own 2D planner; ``network_planner.py`` plans for a network and a memory.
"""

from __future__ import annotations

import io
import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2 import paths
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnunetv2_smallseg.errors import SmallSegError, UsageError
from nnunetv2_smallseg.files import write_json
from nnunetv2_smallseg.plans.configurations import TRAINING_KEY, check_num_slices, slab_configuration
from nnunetv2_smallseg.plans.inputs import (
    check_fingerprint,
    check_plans_name,
    check_raw_dataset,
    read_object,
    unknown_dataset,
)
from nnunetv2_smallseg.plans.switches import check_setting

__all__ = ["DEFAULT_NUM_SLICES", "DEFAULT_PLANS_NAME", "SmallSegPlanner", "plan_dataset"]

logger = logging.getLogger(__name__)

DEFAULT_PLANS_NAME = "nnUNetSmallSegPlans"
DEFAULT_NUM_SLICES = 3
# Who may have written plans that are planned again.
PLANNERS = ("SmallSegPlanner", "NetworkPlanner")
# Stride of the networks: a patch that is no multiple of it would be padded with zeros inside the network.
PATCH_MULTIPLE = 32


class SmallSegPlanner(ExperimentPlanner):
    """nnU-Net's planner, reduced to slices (``2d``) and slabs of slices (``2.5d``).

    Args:
        dataset: Name or number of the data set.
        plans_name: Name of the plans.
        num_slices: Slices of a slab, odd, at least 3; None plans ``2.5d`` with 3 where the images are volumes.
        patch_size: Height and width in voxels, rounded up to multiples of 32; None leaves it to nnU-Net.
        batch_size: Patches in a batch; None leaves it to nnU-Net.
        training: Schedule and switches for our trainers (``SETTINGS`` of ``plans/switches.py``).

    Attributes:
        patch_multiple: Height and width of patches are multiples of this.
    """

    patch_multiple: int = PATCH_MULTIPLE

    def __init__(
        self,
        dataset: str | int,
        plans_name: str = DEFAULT_PLANS_NAME,
        *,
        num_slices: int | None = None,
        patch_size: Sequence[int] | None = None,
        batch_size: int | None = None,
        training: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(dataset, plans_name=plans_name)
        self.num_slices = num_slices
        self.patch_size = patch_size
        self.batch_size = batch_size
        self.training = dict(training or {})

    def get_plans_for_configuration(self, spacing, median_shape, *arguments, **options) -> dict:
        """Plans slices with nnU-Net's rules, for a patch that fits the networks' stride."""
        if len(spacing) == 3:
            # Dropped by save_plans. A patch as large as the image keeps nnU-Net from searching for a 3d_lowres.
            return {"patch_size": median_shape, "spacing": spacing}
        shape = median_shape if self.patch_size is None else self._rounded_up(self.patch_size)
        return self.plan_slices(shape, spacing, median_shape, *arguments, **options)

    def plan_slices(self, shape: Sequence[float], spacing, median_shape, *arguments, **options) -> dict:
        """nnU-Net's plan for slices as if the images had another shape, (height, width) in voxels."""
        plan = super().get_plans_for_configuration(spacing, shape, *arguments, **options)
        plan["median_image_size_in_voxels"] = median_shape
        plan["patch_size"] = self._rounded_up(plan["patch_size"])
        if self.batch_size is not None:
            plan["batch_size"] = self.batch_size
        if self.training:
            plan[TRAINING_KEY] = self.training
        return plan

    def _rounded_up(self, shape: Sequence[float]) -> list[int]:
        return [math.ceil(size / self.patch_multiple) * self.patch_multiple for size in shape]

    def configurations(self, plans: dict, num_slices: int | None) -> dict[str, dict]:
        """The configurations to write.

        Args:
            plans: nnU-Net's, with its ``2d``.
            num_slices: Slices of a slab; None where the images have no slices.
        """
        planar = plans["configurations"]["2d"]
        return {"2d": planar} if num_slices is None else {"2d": planar, "2.5d": slab_configuration(planar, num_slices)}

    def save_plans(self, plans: dict) -> None:
        """Writes ``2d`` and, for volumes, ``2.5d``; configurations a user added to older plans are kept."""
        are_volumes = plans["original_median_shape_after_transp"][0] > 1
        if self.num_slices is not None and not are_volumes:
            raise UsageError(
                f"{self.dataset_name} holds single images, which have no slices to stack: leave out -num_slices; "
                "the plans get the configuration 2d only"
            )
        configurations = self.configurations(plans, (self.num_slices or DEFAULT_NUM_SLICES) if are_volumes else None)
        target = Path(paths.nnUNet_preprocessed) / self.dataset_name / f"{self.plans_identifier}.json"
        if target.is_file():
            old = load_json(str(target))
            configurations = {
                **configurations,
                **{name: entry for name, entry in old["configurations"].items() if name not in ("2d", "2.5d")},
            }
        plans["configurations"] = configurations
        recursive_fix_for_json_export(plans)
        write_json(plans, target)


def plan_dataset(
    dataset: str | int,
    plans_name: str = DEFAULT_PLANS_NAME,
    *,
    planner_class: type[SmallSegPlanner] = SmallSegPlanner,
    num_slices: int | None = None,
    training: Mapping[str, object] | None = None,
    **options: Any,
) -> tuple[Path, dict]:
    """Plans a data set.

    Args:
        dataset: Name or number of the data set.
        plans_name: Name of the plans.
        planner_class: What plans.
        num_slices: See ``SmallSegPlanner``.
        training: See ``SmallSegPlanner``.
        options: Further arguments of the planner's.
    Returns:
        Path of the plans file and its content.
    Raises:
        UsageError: If the data set is unknown or an option is impossible.
        SmallSegError: If nnU-Net's folders or the fingerprint are missing.
    """
    if num_slices is not None:
        check_num_slices(num_slices)
    for setting, value in (training or {}).items():
        check_setting(setting, value, "the call")
    check_plans_name(plans_name)
    for variable in (paths.nnUNet_raw, paths.nnUNet_preprocessed):
        if not variable.get():
            raise SmallSegError(
                f"the environment variable {variable.env_var_name} is not set: export it as the folder nnU-Net uses, "
                f"e.g. export {variable.env_var_name}=/data/{variable.env_var_name}"
            )
    name = _dataset_name(dataset)
    raw, preprocessed = Path(paths.nnUNet_raw) / name, Path(paths.nnUNet_preprocessed) / name
    if not (raw / "dataset.json").is_file():
        raise SmallSegError(f"{raw / 'dataset.json'} does not exist: put the raw data set {name} into {raw.parent}")
    if not (preprocessed / "dataset_fingerprint.json").is_file():
        raise SmallSegError(
            f"{name} has no fingerprint yet ({preprocessed / 'dataset_fingerprint.json'} is missing): first run "
            f"nnUNetv2_extract_fingerprint -d {int(name[7:10])} --verify_dataset_integrity"
        )
    check_raw_dataset(raw)
    fingerprint = check_fingerprint(preprocessed / "dataset_fingerprint.json", int(name[7:10]))
    _check_slab(num_slices, fingerprint)
    target = preprocessed / f"{plans_name}.json"
    if target.is_file():
        old = read_object(target, ("configurations",), "Remove it, or choose another -plans_name.")
        planner_used = old.get("experiment_planner_used")
        if planner_used not in PLANNERS:
            raise UsageError(
                f"{target} was written by {planner_used}, not by smallseg plan, and is left as it is: choose another "
                "-plans_name"
            )
    if os.environ.get("nnUNet_n_proc_DA") == "0":
        raise SmallSegError(
            "nnUNet_n_proc_DA is 0, with which nnU-Net's planner fails: unset it for planning, or set it to 1 or more"
        )
    # nnU-Net prints its plans, 3D ones included, and a traceback for each reader that does not read the images.
    chatter = io.StringIO()
    try:
        with redirect_stdout(chatter), redirect_stderr(chatter):
            try:
                planner = planner_class(name, plans_name, num_slices=num_slices, training=training, **options)
            except AssertionError as error:
                raise SmallSegError(
                    f"splits_final.json in {raw} and in {preprocessed} hold different folds: delete the one you do not "
                    "want"
                ) from error
            plans = planner.plan_experiment()
    except RuntimeError as error:
        if "Unable to determine a reader" not in str(error):
            raise
        raise SmallSegError(f"nnU-Net cannot read the images of {name}: {error} Replace the damaged file.") from error
    finally:
        logger.debug(chatter.getvalue())
    return target, plans


def _dataset_name(dataset: str | int) -> str:
    """Full name of a data set given by name or number."""
    try:
        name = maybe_convert_to_dataset_name(dataset)
    except (RuntimeError, ValueError) as error:
        if "More than one dataset name" in str(error):
            raise SmallSegError(
                f"several data sets have the number {dataset} in nnUNet_raw, nnUNet_preprocessed or nnUNet_results: "
                "rename all but one, or remove what is left of old ones"
            ) from error
        raise UsageError(unknown_dataset(dataset, Path(paths.nnUNet_raw))) from error
    if not (Path(paths.nnUNet_raw) / name).is_dir():
        raise UsageError(unknown_dataset(dataset, Path(paths.nnUNet_raw)))
    return name


def _check_slab(num_slices: int | None, fingerprint: Mapping) -> None:
    """Raises ``UsageError`` for slabs with more slices than any volume of the data set has along any axis."""
    largest = max((max(shape) for shape in fingerprint["shapes_after_crop"]), default=0)
    if num_slices is not None and num_slices > max(largest, DEFAULT_NUM_SLICES):
        raise UsageError(
            f"-num_slices {num_slices}: no volume of this data set has more than {largest} slices; 3 or 5 are usual"
        )
