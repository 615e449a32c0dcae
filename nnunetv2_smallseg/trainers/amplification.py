"""Amplification of slices with small lesions for any trainer (Zhao et al., Scientific Reports 2025)."""

from __future__ import annotations

from collections.abc import Sequence

from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from nnunetv2_smallseg.data.amplified_loader import AmplifiedDataLoader
from nnunetv2_smallseg.data.slice_table import SliceTable, read_counts
from nnunetv2_smallseg.errors import SmallSegError
from nnunetv2_smallseg.plans.configurations import is_volume
from nnunetv2_smallseg.trainers.slabs import SlabTrainer, stop_on_user_error

__all__ = ["AmplificationMixin", "nnUNetTrainerAmplification"]


class AmplificationMixin:
    """Gives a trainer the amplified training set; its validation stays as it is.

    Stands before the trainer among the bases: ``class MyTrainer(AmplificationMixin, SlabTrainer)``. The trainer works
    on slices or slabs of slices. nnU-Net's augmentation goes on top.

    Attributes:
        amplify: Whether slices with small lesions count six times. If False, slices are drawn in the same way, but each
            counts once: the trainer without amplification to compare with.
        lesion_labels: Labels that count as lesion, for data sets that label organs, too; None for all labels. A
            configuration of the plans may hold others under ``lesion_labels``, which come first.
    """

    amplify: bool = True
    lesion_labels: Sequence[int] | None = None

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
        """The labels that count as lesion.

        Raises:
            SmallSegError: If ``lesion_labels`` names others than the data set has, or none.
        """
        foreground = [int(label) for label in self.label_manager.foreground_labels]
        configuration = self.configuration_manager.configuration
        chosen = configuration.get("lesion_labels", self.lesion_labels)
        if chosen is None:
            return foreground
        if not isinstance(chosen, Sequence) or not chosen or not set(chosen) <= set(foreground):
            place = "the plans' configuration" if "lesion_labels" in configuration else f"{type(self).__name__}"
            raise SmallSegError(
                f"lesion_labels of {place} is {chosen}, but must list some of the labels {foreground} of "
                f"{self.plans_manager.dataset_name}: change it there"
            )
        return list(chosen)

    def _amplified(self, loader: nnUNetDataLoader) -> AmplifiedDataLoader:
        """The loader that draws from the amplified training set and else does what ``loader`` does."""
        labels = self._lesion_labels()
        self.print_to_log_file("Counting the lesion pixels of every slice, once for each data set")
        slices = SliceTable.build(
            read_counts(loader._data), labels, ignore_label=self.label_manager.ignore_label, amplify=self.amplify
        )
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
