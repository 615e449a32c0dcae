"""Segmentation loss plus the error of a reconstructed image, for networks that return both in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional

__all__ = ["SegmentationAndReconstructionLoss", "reconstruction_error"]

LARGEST_TARGET = 5.0


def reconstruction_error(reconstruction: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Mean squared error of a reconstruction, in float32.

    The image counts as at most 5 standard deviations from its mean: single extreme intensities, such as metal in CT,
    would dominate the squares.

    Args:
        reconstruction: Any shape, (B, C, H, W) or (B, C, S, H, W).
        image: The normalised image, same shape.
    Returns:
        Scalar, float32.
    Raises:
        ValueError: If the shapes differ.
    """
    if reconstruction.shape != image.shape:
        raise ValueError(
            f"the reconstruction has shape {tuple(reconstruction.shape)}, but must have that of the image, "
            f"{tuple(image.shape)}"
        )
    target = image.float().clamp(-LARGEST_TARGET, LARGEST_TARGET)
    return functional.mse_loss(reconstruction.float(), target)


class SegmentationAndReconstructionLoss(nn.Module):
    """L_segmentation + weight * L_reconstruction (Sanjid et al., arXiv 2404.17235, section IV-E: optimised jointly).

    nnU-Net gives a loss only the network's output and the labels, so that the image is announced beforehand::

        with loss.for_image(image):
            loss((segmentation, reconstruction), target)

    In evaluation the network returns the segmentation alone; the loss is then that of the segmentation.

    Args:
        segmentation_loss: Loss of (output, target), such as nnU-Net's.
        weight: Weight (beta) of the reconstruction.

    Attributes:
        last_reconstruction_error: Unweighted L_reconstruction of the last call with a reconstruction, without gradient;
            None before.
    """

    def __init__(self, segmentation_loss: Callable[..., torch.Tensor], weight: float) -> None:
        super().__init__()
        self.segmentation_loss = segmentation_loss
        self.weight = weight
        self.last_reconstruction_error: torch.Tensor | None = None
        self._image: torch.Tensor | None = None

    @contextmanager
    def for_image(self, image: torch.Tensor) -> Iterator[None]:
        """Sets the image to reconstruct, (B, C, H, W) or (B, C, S, H, W), for the calls inside."""
        self._image = image
        try:
            yield
        finally:
            self._image = None

    def forward(
        self,
        output: torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor | list[torch.Tensor], torch.Tensor],
        target: torch.Tensor | list[torch.Tensor],
    ) -> torch.Tensor:
        """Loss of a segmentation, or of a pair of segmentation and reconstruction.

        Args:
            output: What the segmentation loss takes, or a tuple of that and the reconstruction.
            target: What the segmentation loss takes.
        Returns:
            Scalar.
        Raises:
            RuntimeError: If there is a reconstruction, but no image was announced.
        """
        if not isinstance(output, tuple):
            return self.segmentation_loss(output, target)
        if self._image is None:
            raise RuntimeError("the loss got a reconstruction, but no image: call it inside `with loss.for_image(...)`")
        segmentation, reconstruction = output
        error = reconstruction_error(reconstruction, self._image)
        self.last_reconstruction_error = error.detach()
        return self.segmentation_loss(segmentation, target) + self.weight * error
