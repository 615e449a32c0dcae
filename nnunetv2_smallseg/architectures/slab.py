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

    def forward(self, slab: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Segments all slices of a slab.

        Args:
            slab: (B, C, S, H, W).
        Returns:
            Logits (B, K, S, H, W); with deep supervision a list of (B, K, S, h, w), largest first.
        Raises:
            ValueError: If ``slab`` has another number of axes or slices, or the classes of the 2D network are no
                multiple of the slices.
        """
        if slab.ndim != 5 or slab.shape[2] != self.num_slices:
            raise ValueError(
                f"the slab has shape {tuple(slab.shape)}, but must be (batch, channels, {self.num_slices}, height, "
                "width)"
            )
        outputs = self.network(slab.flatten(1, 2))  # (B, C, S, H, W) -> (B, C*S, H, W)
        if isinstance(outputs, list):
            return [self._unfold(output) for output in outputs]
        return self._unfold(outputs)

    def _unfold(self, output: torch.Tensor) -> torch.Tensor:
        if output.shape[1] % self.num_slices:
            raise ValueError(
                f"the 2D network has {output.shape[1]} classes, but must have a multiple of {self.num_slices} slices"
            )
        return output.unflatten(1, (-1, self.num_slices))  # (B, K*S, h, w) -> (B, K, S, h, w)

    def encoder_parameters(self):
        """See ``SegmentationNetwork.encoder_parameters``."""
        return self.network.encoder_parameters()

    def no_weight_decay(self) -> set[str]:
        """See ``SegmentationNetwork.no_weight_decay``."""
        return {f"network.{name}" for name in self.network.no_weight_decay()}

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """See ``SegmentationNetwork.set_grad_checkpointing``."""
        self.network.set_grad_checkpointing(enabled)
