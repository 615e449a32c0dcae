"""2.5D: a 2D network that segments a slab of neighbouring slices at once.

The slices become channels of the 2D network, and its outputs are read as slices again. To nnU-Net the slab is a 3D
patch of few slices, so its data loader, sliding window and export work unchanged.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["SlabNetwork"]


class SlabNetwork(nn.Module):
    """Folds slices into channels, runs a 2D network, unfolds its outputs.

    Args:
        network: A 2D network with C * S input channels and K * S classes: one of ours, or nnU-Net's own.
        num_slices: Slices S of a slab.
    """

    def __init__(self, network: nn.Module, num_slices: int) -> None:
        super().__init__()
        self.network = network
        self.num_slices = num_slices

    @property
    def decoder(self) -> nn.Module:
        """The decoder of the 2D network, whose ``deep_supervision`` nnU-Net sets."""
        return self.network.decoder

    def forward(self, slab: torch.Tensor) -> torch.Tensor | list[torch.Tensor] | tuple:
        """Segments all slices of a slab.

        Args:
            slab: (B, C, S, H, W).
        Returns:
            Logits (B, K, S, H, W); with deep supervision a list of (B, K, S, h, w), largest first. If the 2D network
            returns a pair of these and an image (B, C*S, H, W), so does this one, the image as (B, C, S, H, W).
        Raises:
            ValueError: If ``slab`` has another number of axes or slices, or the classes of the 2D network are no
                multiple of the slices.
        """
        if slab.ndim != 5 or slab.shape[2] != self.num_slices:
            raise ValueError(
                f"the slab has shape {tuple(slab.shape)}, but must be (batch, channels, {self.num_slices}, height, "
                "width)"
            )
        return self._unfold(self.network(slab.flatten(1, 2)))  # (B, C, S, H, W) -> (B, C*S, H, W)

    def _unfold(self, output: torch.Tensor | list | tuple) -> torch.Tensor | list | tuple:
        """(B, K*S, h, w) -> (B, K, S, h, w), in lists and tuples too."""
        if isinstance(output, list):
            return [self._unfold(part) for part in output]
        if isinstance(output, tuple):
            return tuple([self._unfold(part) for part in output])
        if output.shape[1] % self.num_slices:
            raise ValueError(
                f"the 2D network has {output.shape[1]} classes, but must have a multiple of {self.num_slices} slices"
            )
        return output.unflatten(1, (-1, self.num_slices))

    def encoder_parameters(self):
        """See ``SegmentationNetwork.encoder_parameters``."""
        return self.network.encoder_parameters()

    def no_weight_decay(self) -> set[str]:
        """See ``SegmentationNetwork.no_weight_decay``."""
        return {f"network.{name}" for name in self.network.no_weight_decay()}

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """See ``SegmentationNetwork.set_grad_checkpointing``."""
        self.network.set_grad_checkpointing(enabled)
