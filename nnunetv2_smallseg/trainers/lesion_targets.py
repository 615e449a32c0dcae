"""Which targets the lower resolutions of deep supervision get: nnU-Net's, or some that keep every lesion."""

from __future__ import annotations

from collections.abc import Sequence

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform

from nnunetv2_smallseg.augmentation.lesion_targets import keep_lesions_in_targets
from nnunetv2_smallseg.trainers.lesion_labels import LesionLabels

__all__ = ["LesionTargets"]


class LesionTargets(LesionLabels):
    """Mixin with the switch ``deep_supervision_targets``; stands before nnU-Net's trainer among the bases.

    Attributes:
        deep_supervision_targets: ``nearest`` takes the label of one voxel of every cell, as nnU-Net does; ``lesion``
            the label that prevails in it, and every lesion keeps a cell (``downsample_labels``). Lesions of every label
            do; where some must give way, ``lesion_labels`` come first.
    """

    deep_supervision_targets: str = "nearest"

    def get_training_transforms(
        self, patch_size: Sequence[int], rotation_for_DA: object, deep_supervision_scales, *arguments, **options
    ) -> BasicTransform:
        """nnU-Net's training transforms with the targets of this trainer."""
        transforms = super().get_training_transforms(
            patch_size, rotation_for_DA, deep_supervision_scales, *arguments, **options
        )
        if deep_supervision_scales is None and self.deep_supervision_targets != "nearest":
            self.print_to_log_file(
                f"deep_supervision_targets = {self.deep_supervision_targets} has no effect: the loss of this trainer "
                "sees the full resolution only"
            )
        return self._with_own_targets(transforms, deep_supervision_scales)

    def get_validation_transforms(self, deep_supervision_scales, *arguments, **options) -> BasicTransform:
        """nnU-Net's validation transforms with the targets of this trainer."""
        transforms = super().get_validation_transforms(deep_supervision_scales, *arguments, **options)
        return self._with_own_targets(transforms, deep_supervision_scales)

    def _with_own_targets(self, transforms: BasicTransform, deep_supervision_scales) -> BasicTransform:
        if deep_supervision_scales is None or self.deep_supervision_targets == "nearest":
            return transforms
        labels = self.label_manager
        return keep_lesions_in_targets(
            transforms,
            regions=labels.has_regions,
            ignore_label=labels.ignore_label,
            ignore_channel=labels.has_regions and labels.has_ignore_label,
            priority=self.chosen_lesion_labels() or (),
        )
