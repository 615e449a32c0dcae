"""Any height and width for networks with a fixed stride: pad before the network, crop its outputs."""

from collections.abc import Sequence

import torch
from torch.nn import functional

__all__ = ["crop_to_input", "pad_to_multiple"]


def pad_to_multiple(x: torch.Tensor, stride: int, min_size: int = 0) -> torch.Tensor:
    """Pads zeros below and right until height and width are multiples of ``stride`` and at least ``min_size``.

    Zero is what nnU-Net itself pads normalised images with. Padding on one side only keeps the sampling grid of every
    output aligned with that of the input.

    Args:
        x: (B, C, H, W).
        stride: Stride of the network.
        min_size: Least height and width, a multiple of ``stride``.
    Returns:
        (B, C, H', W') with H' and W' the next multiples of ``stride`` that are not smaller than ``min_size``.
    """
    below, right = (max(-size % stride, min_size - size) for size in x.shape[-2:])
    return functional.pad(x, (0, right, 0, below)) if below or right else x


def crop_to_input(outputs: Sequence[torch.Tensor], size: tuple[int, int], strides: Sequence[int]) -> list[torch.Tensor]:
    """Removes the padding of ``pad_to_multiple`` from outputs at several resolutions.

    Args:
        outputs: Tensors (B, K, h, w), one for each stride.
        size: Height and width of the unpadded input.
        strides: Stride of each output.
    Returns:
        The outputs cropped to round(H / stride) x round(W / stride), the size nnU-Net's ``DownsampleSegForDSTransform``
        gives the matching targets.
    """
    height, width = size
    return [
        output[..., : max(1, round(height / stride)), : max(1, round(width / stride))]
        for output, stride in zip(outputs, strides, strict=True)
    ]
