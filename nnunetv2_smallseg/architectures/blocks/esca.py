"""ESCA, the channel attention of STS-Net: channel weights from two one-dimensional convolutions along the channels.

Paper: Zhao et al., A novel framework for segmentation of small targets in medical images, Scientific Reports 2025,
https://doi.org/10.1038/s41598-025-94437-9, eq. 5-9 and Fig. 4. It does not give the rule for the kernel; here it is
that of ECA-Net (Wang et al., CVPR 2020, arXiv 1910.03151, gamma 2, b 1), whose attention ESCA resembles.
"""

import math

import torch
from torch import nn

__all__ = ["ESCA", "channel_kernel_size"]


def channel_kernel_size(channels: int) -> int:
    """Kernel of a convolution along ``channels`` channels: the odd number next to (log2(channels) + 1) / 2, from 3.

    Raises:
        ValueError: If ``channels`` is smaller than 1.
    """
    if channels < 1:
        raise ValueError(f"channels is {channels}, but must be at least 1")
    size = int((math.log2(channels) + 1) / 2)
    return max(3, size if size % 2 else size + 1)


class ESCA(nn.Module):
    """Weighs each channel by a gate that its neighbours along the channel axis determine.

    Global average pooling, two convolutions with weights of their own and nothing in between (eq. 6 and 7), sigmoid,
    product with the input (eq. 9). Eq. 6 and 7 are printed as formulae of the output length and mean stride 1 and a
    padding that keeps the length.

    Args:
        channels: Channels C of the input.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        kernel_size = channel_kernel_size(channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.conv1 = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.conv2 = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        sequence = self.pool(x).flatten(1).unsqueeze(1)  # (B, C, 1, 1) -> (B, 1, C)
        gate = torch.sigmoid(self.conv2(self.conv1(sequence)))
        return x * gate.transpose(1, 2).unsqueeze(-1)  # (B, 1, C) -> (B, C, 1, 1)
