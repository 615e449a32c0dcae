"""Trainers of SvANet and LiteSvANet (Dai et al., IEEE TNNLS 2026, arXiv 2407.07720).

Recipe of the released code (github.com/anthonyweidai/SvANet, state of 2026-01-29): AdamW with weight decay 0.03 on all
parameters, the code's learning rate of every epoch (the paper gives another one, which the code does not have), cross
entropy alone, ImageNet encoder frozen for the first tenth of the epochs, no deep supervision. What differs:

- Augmentation, patch and batch size, number of epochs, gradient clipping, mixed precision, and the choice of the
  checkpoint are nnU-Net's. The code trains 100 epochs and keeps the one that is best on the test images.
- The learning rates stretch with the number of epochs.
- All ImageNet values go where their names say, and the first convolution is adapted to other than three channels, where
  it is then trained from the start.
"""

import math

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import nn

from nnunetv2_smallseg.architectures.svanet import LiteSvANet, SvANet
from nnunetv2_smallseg.losses.cross_entropy import LabelCrossEntropy, RegionCrossEntropy
from nnunetv2_smallseg.trainers.base import SmallSegTrainer, network_builder
from nnunetv2_smallseg.trainers.schedules import FreezingSchedule

__all__ = [
    "nnUNetTrainerLiteSvANet",
    "nnUNetTrainerLiteSvANetScratch",
    "nnUNetTrainerSvANet",
    "nnUNetTrainerSvANetScratch",
]


class nnUNetTrainerSvANet(SmallSegTrainer):
    """SvANet from ImageNet weights."""

    build_network_architecture = staticmethod(network_builder(SvANet))
    weights = "resnet50_imagenet_v2"
    supervise_deeply = False
    learning_rate = 5e-4
    min_learning_rate = 1e-6
    decay = 0.03
    decay_everything = True
    adam_epsilon = 1e-8

    @property
    def freeze_encoder_epochs(self) -> int:
        """A tenth of the training, rounded up; none from a random start."""
        return 0 if self.weights is None else math.ceil(self.num_epochs / 10)

    def build_schedule(self, optimizer: torch.optim.Optimizer) -> FreezingSchedule:
        """The released code's rate of every epoch, stretched to this training."""
        return FreezingSchedule(optimizer, self.initial_lr, self.min_learning_rate, self.num_epochs)

    def _build_loss(self) -> nn.Module:
        """Cross entropy between labels, or of each region; with nnU-Net's weights if there are several outputs."""
        ignore_label = self.label_manager.ignore_label
        if self.label_manager.has_regions:
            loss = RegionCrossEntropy(ignore=ignore_label is not None)
        else:
            loss = LabelCrossEntropy(ignore_label)
        stock = super()._build_loss()
        return DeepSupervisionWrapper(loss, stock.weight_factors) if self.enable_deep_supervision else loss


class nnUNetTrainerSvANetScratch(nnUNetTrainerSvANet):
    """SvANet from random weights."""

    weights = None


class nnUNetTrainerLiteSvANet(nnUNetTrainerSvANet):
    """LiteSvANet from ImageNet weights."""

    build_network_architecture = staticmethod(network_builder(LiteSvANet))


class nnUNetTrainerLiteSvANetScratch(nnUNetTrainerLiteSvANet):
    """LiteSvANet from random weights."""

    weights = None
