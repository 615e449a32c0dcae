"""Amplification of slices with small lesions for any trainer (Zhao et al., Scientific Reports 2025)."""

from __future__ import annotations

from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from nnunetv2_smallseg.data.amplified_loader import AmplifiedDataLoader
from nnunetv2_smallseg.data.slice_table import SliceTable
from nnunetv2_smallseg.errors import SmallSegError
from nnunetv2_smallseg.plans.configurations import is_volume
from nnunetv2_smallseg.trainers.lesion_labels import LesionLabels
from nnunetv2_smallseg.trainers.slabs import SlabTrainer, stop_on_user_error
from nnunetv2_smallseg.trainers.training_loader import loader_arguments, replace_training_loader

__all__ = ["AmplificationMixin", "nnUNetTrainerAmplification"]


class AmplificationMixin(LesionLabels):
    """Gives a trainer the amplified training set; its validation stays as it is.

    Stands before the trainer among the bases: ``class MyTrainer(AmplificationMixin, SlabTrainer)``. The trainer works
    on slices or slabs of slices. nnU-Net's augmentation goes on top.

    Attributes:
        amplify: Whether slices with small lesions count six times. If False, slices are drawn in the same way, but each
            counts once: the trainer without amplification to compare with.
        lesion_labels: Labels that count as lesion (``LesionLabels``).
    """

    amplify: bool = True

    def get_dataloaders(self):
        """nnU-Net's data loaders, with the loader of the training replaced."""
        with stop_on_user_error():
            self._refuse_volumes()
            self._lesion_labels()
        training, validation = super().get_dataloaders()
        replace_training_loader(training, self._amplified)
        return training, validation

    def check_lesion_sampling(self) -> None:
        """Refuses lesions drawn in another way; ``LesionSampling`` asks, if the trainer has it."""
        super().check_lesion_sampling()
        if self.lesion_sampling != "voxel":
            raise SmallSegError(
                f"{type(self).__name__} draws slices by amplification, but has lesion_sampling = "
                f"{self.lesion_sampling!r}, which draws patches, too: set it to 'voxel', or use a trainer without "
                "amplification"
            )

    def _refuse_volumes(self) -> None:
        if is_volume(self.configuration_manager.configuration):
            raise SmallSegError(
                f"the configuration {self.configuration_name!r} is three-dimensional, but amplification works on "
                "slices: use 2d or 2.5d"
            )

    def _lesion_labels(self) -> list[int]:
        """The labels that count as lesion; ``SmallSegError`` if they are wrong."""
        return list(self.chosen_lesion_labels() or map(int, self.label_manager.foreground_labels))

    def _amplified(self, loader: nnUNetDataLoader) -> AmplifiedDataLoader:
        """The loader that draws from the amplified training set and else does what ``loader`` does."""
        labels = self._lesion_labels()
        counts = self.read_lesion_table(loader._data).counts
        slices = SliceTable.build(counts, labels, ignore_label=self.label_manager.ignore_label, amplify=self.amplify)
        self.print_to_log_file(slices.summary())
        arguments, options = loader_arguments(loader, self.probabilistic_oversampling)
        return AmplifiedDataLoader(*arguments, self.label_manager, slices=slices, lesion_labels=labels, **options)


class nnUNetTrainerAmplification(AmplificationMixin, SlabTrainer):
    """nnU-Net's own network and recipe, on the amplified training set."""
