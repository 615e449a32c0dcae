"""Augmentation of 2.5D slabs: what changes pixels of a slice changes all slices of the slab alike, within the plane."""

from __future__ import annotations

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform

__all__ = ["InPlaneTransform", "blur_in_plane"]


class InPlaneTransform(ImageOnlyTransform):
    """Applies a 2D image transform to every slice of a slab, with one draw of its parameters.

    Args:
        transform: A transform for images (C, H, W).
    """

    def __init__(self, transform: ImageOnlyTransform) -> None:
        super().__init__()
        self.transform = transform

    def get_parameters(self, **data_dict) -> dict:
        """Draws for one slice."""
        return self.transform.get_parameters(image=data_dict["image"][:, 0])

    def _apply_to_image(self, img: torch.Tensor, **params) -> torch.Tensor:
        """(C, S, H, W) -> (C, S, H, W)."""
        slices = [self.transform.apply({"image": one.clone()}, **params)["image"] for one in img.unbind(1)]
        return torch.stack(slices, dim=1)


def blur_in_plane(transforms: ComposeTransforms) -> ComposeTransforms:
    """Makes the Gaussian blur of nnU-Net's 3D pipeline act within the slices of a slab.

    The rest of that pipeline already does when it is built with ``do_dummy_2d_data_aug``; the blur, left as it is,
    fails on slabs thinner than its kernel.

    Args:
        transforms: nnU-Net's pipeline; the list inside is changed.
    Returns:
        The same pipeline.
    """

    def adapted(transform: BasicTransform) -> BasicTransform:
        if isinstance(transform, RandomTransform) and isinstance(transform.transform, GaussianBlurTransform):
            return RandomTransform(InPlaneTransform(transform.transform), transform.apply_probability)
        return transform

    transforms.transforms = [adapted(transform) for transform in transforms.transforms]
    return transforms
