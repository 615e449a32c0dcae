"""Amplification of slices with small lesions for any trainer (Zhao et al., Scientific Reports 2025)."""

from __future__ import annotations

from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from nnunetv2_smallseg.data.amplified_loader import AmplifiedDataLoader
from nnunetv2_smallseg.data.slice_table import SliceTable
from nnunetv2_smallseg.errors import SmallSegError
from nnunetv2_smallseg.plans.configurations import is_volume
from nnunetv2_smallseg.trainers.lesion_labels import LesionLabels
from nnunetv2_smallseg.trainers.slabs import SlabTrainer, stop_on_user_error

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
        if isinstance(training, SingleThreadedAugmenter):
            training.data_loader = self._amplified(training.data_loader)
        else:
            # The worker processes run already, with nnU-Net's loader: they start anew with ours.
            training.generator = self._amplified(training.generator)
            training.restart()
        return training, validation

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
        axes = slice(1, None) if loader.patch_size_was_2d else slice(None)
        return AmplifiedDataLoader(
            loader._data,
            loader.batch_size,
            loader.patch_size[axes],
            loader.final_patch_size[axes],
            self.label_manager,
            slices=slices,
            lesion_labels=labels,
            oversample_foreground_percent=loader.oversample_foreground_percent,
            probabilistic_oversampling=self.probabilistic_oversampling,
            transforms=loader.transforms,
        )


class nnUNetTrainerAmplification(AmplificationMixin, SlabTrainer):
    """nnU-Net's own network and recipe, on the amplified training set."""
