"""Which patches a trainer sees: nnU-Net's, or such that all lesions, or all sizes of lesions, get their share."""

from __future__ import annotations

import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_smallseg.data.lesion_loader import LesionDataLoader, LesionSampler
from nnunetv2_smallseg.errors import stop_on_user_error
from nnunetv2_smallseg.plans.configurations import resolve
from nnunetv2_smallseg.plans.switches import check_setting
from nnunetv2_smallseg.trainers.lesion_labels import LesionLabels, chosen_lesion_classes
from nnunetv2_smallseg.trainers.training_loader import loader_arguments, replace_training_loader

__all__ = ["LesionSampling"]


class LesionSampling(LesionLabels):
    """Mixin with the switches ``lesion_sampling`` and ``lesion_jitter``; stands before nnU-Net's trainer.

    It decides what the elements of a batch show that nnU-Net oversamples; all other elements, and the validation, are
    nnU-Net's.

    Attributes:
        lesion_sampling: "voxel" draws a voxel, as nnU-Net does; "lesion" a lesion, all alike; "size_bin" a size, all
            alike, and then a lesion of that size.
        lesion_jitter: How far from the middle of the patch a drawn lesion may lie: 0 is in the middle, 1 anywhere.
    """

    lesion_sampling: str = "voxel"
    lesion_jitter: float = 0.5

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ) -> None:
        # Before nnU-Net creates the output folder.
        with stop_on_user_error():
            self.check_lesion_sampling()
            label_manager = PlansManager(plans).get_label_manager(dataset_json)
            chosen_lesion_classes(self, resolve(plans, configuration), label_manager)
        super().__init__(plans, configuration, fold, dataset_json, device)

    def check_lesion_sampling(self) -> None:
        """Raises ``SmallSegError`` if a switch has a wrong value."""
        for name in ("lesion_sampling", "lesion_jitter"):
            check_setting(name, getattr(self, name), f"the trainer {type(self).__name__}")

    def get_dataloaders(self):
        """nnU-Net's data loaders, with the loader of the training replaced unless voxels are drawn."""
        with stop_on_user_error():
            self.check_lesion_sampling()
            classes = self.chosen_lesion_classes()
        training, validation = super().get_dataloaders()
        if self.lesion_sampling != "voxel":
            replace_training_loader(training, lambda loader: self._showing_lesions(loader, classes))
        return training, validation

    def _showing_lesions(self, loader: nnUNetDataLoader, classes: tuple[int, ...]) -> nnUNetDataLoader:
        """The loader that draws lesions and else does what ``loader`` does; ``loader`` itself if there are none."""
        table = self.read_lesion_table(loader._data)
        spacings = table.spacings(self.configuration_manager.spacing, self.plans_manager.transpose_forward)
        lesions = LesionSampler(
            table, self.lesion_sampling, spacings, classes=classes, case_probabilities=loader.sampling_probabilities
        )
        if lesions.is_empty:
            self.print_to_log_file(
                f"lesion_sampling = {self.lesion_sampling} has no effect: none of the {len(table.cases)} training "
                "cases has a lesion, so that patches are drawn as nnU-Net does"
            )
            return loader
        if self.probabilistic_oversampling:
            share = f"{100 * loader.oversample_foreground_percent:.0f} % of the patches"
        else:
            number = loader.batch_size - round(loader.batch_size * (1 - loader.oversample_foreground_percent))
            share = f"{number} of {loader.batch_size} patches of a batch"
        self.print_to_log_file(
            f"lesion_sampling = {self.lesion_sampling}: {share} show a drawn lesion (lesion_jitter = "
            f"{self.lesion_jitter}), the others are nnU-Net's\n{lesions.summary()}"
        )
        arguments, options = loader_arguments(loader, self.probabilistic_oversampling)
        return LesionDataLoader(*arguments, self.label_manager, lesions=lesions, jitter=self.lesion_jitter, **options)
