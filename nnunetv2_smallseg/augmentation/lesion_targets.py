"""Targets of deep supervision with all lesions, as the last step of nnU-Net's augmentation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, SegOnlyTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform

from nnunetv2_smallseg.losses.deep_supervision_targets import downsample_labels

__all__ = ["LesionTargetsTransform", "keep_lesions_in_targets"]


class LesionTargetsTransform(SegOnlyTransform):
    """Replaces the segmentation by a list of targets in which no lesion disappears.

    Args:
        scales: For each target the factor of every spatial axis.
        options: Of ``downsample_labels``: what the channels are, and which labels come first.
    """

    def __init__(self, scales: Sequence[float | Sequence[float]], **options: object) -> None:
        super().__init__()
        self.scales = scales
        self.options = options

    def _apply_to_segmentation(self, segmentation: torch.Tensor, **params) -> list[torch.Tensor]:
        """(C, ...) -> one target (C, ...) for each scale."""
        return downsample_labels(segmentation, self.scales, **self.options)


def keep_lesions_in_targets(transforms: ComposeTransforms, **options: object) -> ComposeTransforms:
    """Puts ``LesionTargetsTransform`` in the place of nnU-Net's nearest-neighbour targets, with the same scales.

    Args:
        transforms: nnU-Net's pipeline for training or validation, with deep supervision; the list inside is changed.
        options: Of ``downsample_labels``.
    Returns:
        The same pipeline.
    Raises:
        ValueError: If the pipeline makes no such targets.
    """

    def adapted(transform: BasicTransform) -> BasicTransform:
        if isinstance(transform, DownsampleSegForDSTransform):
            return LesionTargetsTransform(transform.ds_scales, **options)
        return transform

    replaced = [adapted(transform) for transform in transforms.transforms]
    if replaced == transforms.transforms:
        raise ValueError(
            f"{DownsampleSegForDSTransform.__name__}, which lesion-preserving targets replace, is not among the "
            f"transforms {[type(transform).__name__ for transform in transforms.transforms]}: add it, or leave "
            "deep_supervision_targets at 'nearest'"
        )
    transforms.transforms = replaced
    return transforms
