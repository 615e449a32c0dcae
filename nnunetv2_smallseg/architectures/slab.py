"""2.5D: a 2D network that segments a slab of neighbouring slices at once.

The slices become channels of the 2D network, and its outputs are read as slices again. To nnU-Net the slab is a 3D
patch of few slices, so its data loader, sliding window and export work unchanged.
"""

from __future__ import annotations

import torch
from torch import nn

from nnunetv2_smallseg.architectures.segmentation_network import SegmentationNetwork

__all__ = ["SlabNetwork"]


class SlabNetwork(nn.Module):
    """Folds slices into channels, runs a 2D network, unfolds its outputs.

    Args:
        network: A 2D network with C * S input channels and K * S classes.
        num_slices: Slices S of a slab.

    Raises:
        ValueError: If the channels or classes of ``network`` are no multiples of ``num_slices``.
    """

    def __init__(self, network: SegmentationNetwork, num_slices: int) -> None:
        super().__init__()
        for name, value in (("input_channels", network.input_channels), ("num_classes", network.num_classes)):
            if num_slices < 1 or value % num_slices:
                raise ValueError(f"{name} of the 2D network is {value}, but must be a multiple of {num_slices} slices")
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
            ValueError: If ``slab`` has another number of axes or slices.
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
