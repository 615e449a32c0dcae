"""nnU-Net's trainer on slices and on 2.5D slabs: what every trainer of this package is built on.

Everything goes through the hooks of nnU-Net's ``nnUNetTrainer`` (2.8): nothing of nnU-Net is changed or copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_smallseg.architectures.slab import SlabNetwork
from nnunetv2_smallseg.augmentation.in_plane import blur_in_plane
from nnunetv2_smallseg.errors import stop_on_user_error
from nnunetv2_smallseg.plans.configurations import check_configuration, is_volume, num_slices, resolve
from nnunetv2_smallseg.plans.switches import RUNNING, SCHEDULE, SWITCHES, check_setting, training_settings
from nnunetv2_smallseg.trainers.checkpoint_fit import explain_misfits
from nnunetv2_smallseg.trainers.crash_safety import CrashSafety
from nnunetv2_smallseg.trainers.finite_loss import FiniteLoss
from nnunetv2_smallseg.trainers.input_checks import InputChecks
from nnunetv2_smallseg.trainers.lesion_sampling import LesionSampling
from nnunetv2_smallseg.trainers.lesion_targets import LesionTargets
from nnunetv2_smallseg.trainers.several_processes import SeveralProcesses

__all__ = ["SlabTrainer", "stop_on_user_error"]


class SlabTrainer(InputChecks, FiniteLoss, LesionSampling, LesionTargets, CrashSafety, SeveralProcesses, nnUNetTrainer):
    """nnU-Net's own network and recipe, on slices (``2d``) and on slabs of slices (``2.5d``).

    The schedule (epochs and iterations) is nnU-Net's unless the plans say otherwise (``smallseg plan -num_epochs``).
    The switches (``plans/switches.py``) are class attributes, here as nnU-Net does it, that the plans may set, too.

    Attributes:
        accepts_volumes: Whether nnU-Net's 3D configurations are accepted, too.
        num_slices: Slices of a patch: 1 in ``2d``, S for slabs, None in 3D configurations.
    """

    accepts_volumes: bool = False

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ) -> None:
        # Before nnU-Net creates the output folder: a wrong configuration must leave nothing behind.
        with stop_on_user_error():
            resolved = resolve(plans, configuration)
            check_configuration(resolved, configuration)
            volume = self.accepts_volumes and is_volume(resolved)
            self.num_slices = None if volume else num_slices(resolved, configuration)
            settings = training_settings(resolved, configuration)
            for name in (*SWITCHES, *RUNNING):
                check_setting(name, getattr(self, name), f"the trainer {type(self).__name__}")
                if name in settings:
                    setattr(self, name, settings[name])
        super().__init__(plans, configuration, fold, dataset_json, device)
        for name in SCHEDULE.keys() & settings.keys():
            setattr(self, name, settings[name])

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The network of the plans; around slabs in ``2.5d``."""
        configuration = configuration_manager.configuration
        with stop_on_user_error():
            slices = 1 if is_volume(configuration) else num_slices(configuration, "of this model")
        network = nnUNetTrainer.build_network_architecture(
            plans_manager,
            configuration_manager,
            num_input_channels * slices,
            num_output_channels * slices,
            enable_deep_supervision,
        )
        return explain_misfits(network if slices == 1 else SlabNetwork(network, slices))

    @property
    def is_slab(self) -> bool:
        """Whether patches are slabs of several slices."""
        return self.num_slices is not None and self.num_slices > 1

    def on_train_start(self) -> None:
        """Writes the switches to the log, and prepares the training."""
        values = ", ".join(f"{name} = {getattr(self, name)}" for name in SWITCHES)
        self.print_to_log_file(f"Switches of {type(self).__name__}: {values}")
        super().on_train_start()

    def prepare_rehearsal(self, keys: Sequence[str]) -> None:
        """Makes ``train_step`` work without a data set, on a batch of the cases ``keys``.

        Called in place of ``on_train_start`` where the memory of a step is predicted or measured (``plans/memory.py``).
        """

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        """nnU-Net's scales; those of slabs never pool slices."""
        scales = super()._get_deep_supervision_scales()
        if scales is None or not self.is_slab:
            return scales
        return [[1.0, *scale] for scale in scales]

    @contextmanager
    def _slab_seen_in_plane(self) -> Iterator[None]:
        """Shows nnU-Net's rules for augmentation the plane of a slab only."""
        slab = self.configuration_manager
        in_plane = {**slab.configuration, "patch_size": slab.patch_size[1:]}
        self.configuration_manager = ConfigurationManager(in_plane)
        try:
            yield
        finally:
            self.configuration_manager = slab

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:
        """nnU-Net's 2D rules, also for slabs: rotate, scale and mirror within the plane only."""
        if not self.is_slab:
            return super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        with self._slab_seen_in_plane():
            rotation, _, initial, axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        axes = tuple(axis + 1 for axis in axes)
        self.inference_allowed_mirroring_axes = axes
        self.print_to_log_file(f"slab of {self.num_slices} slices: augmented and mirrored within the plane only")
        return rotation, True, [self.num_slices, *initial], axes

    def get_training_transforms(self, *arguments, **options) -> BasicTransform:
        """nnU-Net's training transforms; on slabs the blur acts within the plane as well."""
        transforms = super().get_training_transforms(*arguments, **options)
        return blur_in_plane(transforms) if self.is_slab else transforms
