"""Trainers of Swin-UMamba (Liu et al., MICCAI 2024, arXiv 2402.03302).

Recipe of the paper (section 3.2) and its code (github.com/JiarunLiu/Swin-UMamba, commit 2c1f72e): AdamW, learning rate
1e-4 along a cosine to 1e-6, weight decay 0.05, ImageNet encoder frozen for ten epochs. What differs from the code:

- The cosine ends with the training, whatever its number of epochs (the code's period is 1000 epochs, of which it
  trains 100 to 350).
- Scans' A and D, norms and biases have no weight decay (the code marks them so, but nothing reads the marks).
- The patch embedding is frozen with the encoder where ImageNet weights fill it (SwinUMambaD, 3 channels), and adapted
  to other channel counts (the code leaves it at random there and never freezes it).
- The weight file is read once, before the first epoch (the code reads it for every prediction too).

As in the code, nnU-Net gives the lowest of the four outputs no weight in the loss.
"""

from nnunetv2_smallseg.architectures.swin_umamba import SwinUMamba, SwinUMambaD
from nnunetv2_smallseg.trainers.base import SmallSegTrainer, network_builder

__all__ = [
    "nnUNetTrainerSwinUMamba",
    "nnUNetTrainerSwinUMambaD",
    "nnUNetTrainerSwinUMambaDScratch",
    "nnUNetTrainerSwinUMambaScratch",
]


class nnUNetTrainerSwinUMamba(SmallSegTrainer):
    """Swin-UMamba from ImageNet weights."""

    build_network_architecture = staticmethod(network_builder(SwinUMamba))
    weights = "vmamba_tiny_imagenet"
    freeze_encoder_epochs = 10


class nnUNetTrainerSwinUMambaScratch(nnUNetTrainerSwinUMamba):
    """Swin-UMamba from random weights."""

    weights = None
    freeze_encoder_epochs = 0


class nnUNetTrainerSwinUMambaD(SmallSegTrainer):
    """Swin-UMamba† from ImageNet weights."""

    build_network_architecture = staticmethod(network_builder(SwinUMambaD))
    weights = "vmamba_tiny_imagenet"
    freeze_encoder_epochs = 10


class nnUNetTrainerSwinUMambaDScratch(nnUNetTrainerSwinUMambaD):
    """Swin-UMamba† from random weights, without deep supervision: with it, it did not converge (paper, 3.5)."""

    weights = None
    freeze_encoder_epochs = 0
    supervise_deeply = False
