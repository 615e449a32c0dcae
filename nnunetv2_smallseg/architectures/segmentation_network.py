"""What every 2D network of this package has in common: sizes, padding, deep supervision, parameter groups."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import nn

from nnunetv2_smallseg.architectures.blocks.padding import crop_to_input, pad_to_multiple

__all__ = ["SegmentationNetwork"]


class SegmentationNetwork(nn.Module, ABC):
    """Base of the 2D networks.

    A subclass builds ``self.decoder``, whose attribute ``deep_supervision`` is the switch nnU-Net sets, and writes
    ``forward_padded`` and ``encoder_parameters``.

    Attributes:
        stride: Height and width are padded to a multiple of this.
        min_size: Height and width are padded to at least this, a multiple of the stride.
        deep_supervision_strides: Stride of each output with deep supervision on, largest output first.

    Raises:
        ValueError: If ``input_channels`` or ``num_classes`` is smaller than 1.
    """

    stride: int
    min_size: int = 0
    deep_supervision_strides: tuple[int, ...]

    def __init__(self, input_channels: int, num_classes: int) -> None:
        super().__init__()
        for name, value in (("input_channels", input_channels), ("num_classes", num_classes)):
            if value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1")
        self.input_channels = input_channels
        self.num_classes = num_classes

    @abstractmethod
    def forward_padded(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Logits for an image whose height and width are multiples of the stride, largest first."""

    @abstractmethod
    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that pretrained weights fill and that are frozen in the first epochs."""

    @property
    def deep_supervision(self) -> bool:
        """Whether ``forward`` returns a list of outputs instead of the first."""
        return self.decoder.deep_supervision

    @deep_supervision.setter
    def deep_supervision(self, enabled: bool) -> None:
        self.decoder.deep_supervision = enabled

    def forward(self, image: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Segments.

        Args:
            image: (B, C, H, W), any height and width.
        Returns:
            Logits (B, K, H, W); with deep supervision a list of (B, K, round(H / s), round(W / s)) for the strides s
            of ``deep_supervision_strides``.
        Raises:
            ValueError: If ``image`` has another number of axes or channels.
        """
        return self.crop_outputs(self.forward_padded(self.pad_image(image)), image)

    def pad_image(self, image: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H', W') with H' and W' multiples of the stride, at least ``min_size``.

        Raises:
            ValueError: As ``forward``.
        """
        if image.ndim != 4 or image.shape[1] != self.input_channels:
            raise ValueError(
                f"{type(self).__name__} got an input of shape {tuple(image.shape)}, but reads (batch, "
                f"{self.input_channels}, height, width)"
            )
        return pad_to_multiple(image, self.stride, self.min_size)

    def crop_outputs(self, outputs: list[torch.Tensor], image: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Outputs of ``forward_padded`` -> what ``forward`` returns for the unpadded ``image``."""
        if outputs[0].shape[-2:] != image.shape[-2:]:
            strides = self.deep_supervision_strides[: len(outputs)]
            outputs = crop_to_input(outputs, (image.shape[-2], image.shape[-1]), strides)
        return outputs if self.deep_supervision else outputs[0]

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters to exempt from weight decay: norms, biases, and A and D of the scans.

        A and D are marked so in VMamba's code; one-dimensional parameters by common practice (timm).
        """
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in ("A_logs", "dt_projs_bias")
        }

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Trades time for memory: activations of the deep blocks are computed again in the backward pass.

        Raises:
            NotImplementedError: If the network has no block that can be checkpointed.
        """
        stages = [module for module in self.modules() if hasattr(module, "grad_checkpointing")]
        if not stages:
            raise NotImplementedError(f"{type(self).__name__} does not support activation checkpointing")
        for stage in stages:
            stage.grad_checkpointing = enabled
