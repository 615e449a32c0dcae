"""Trainers of STS-Net (Zhao et al., Scientific Reports 2025, https://doi.org/10.1038/s41598-025-94437-9).

Recipe: AdamW with learning rate 1e-4 (paper, Implementation details) and the amplified training set, whose slices are
drawn uniformly. The paper says nothing about schedule, weight decay and loss: here they are nnU-Net's polynomial,
AdamW's usual 0.01, and nnU-Net's Dice and cross-entropy. nnU-Net's own augmentation stays on; the paper uses none
besides the amplification.
"""

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

from nnunetv2_smallseg.architectures.sts_net import STSNet
from nnunetv2_smallseg.trainers.amplification import AmplificationMixin
from nnunetv2_smallseg.trainers.base import SmallSegTrainer, network_builder

__all__ = ["nnUNetTrainerSTSNet", "nnUNetTrainerSTSNetNoAmplification", "nnUNetTrainerSTSNetPretrained"]


class nnUNetTrainerSTSNet(AmplificationMixin, SmallSegTrainer):
    """STS-Net from random weights, on the amplified training set."""

    build_network_architecture = staticmethod(network_builder(STSNet))
    supervise_deeply = False  # the network has one output
    decay = 0.01
    adam_epsilon = 1e-8

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.oversample_foreground_percent = 0.0

    def build_schedule(self, optimizer: torch.optim.Optimizer) -> PolyLRScheduler:
        """nnU-Net's polynomial."""
        return PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)


class nnUNetTrainerSTSNetNoAmplification(nnUNetTrainerSTSNet):
    """STS-Net from random weights; slices are drawn uniformly, and each counts once."""

    amplify = False


class nnUNetTrainerSTSNetPretrained(nnUNetTrainerSTSNet):
    """STS-Net with an encoder from ImageNet, on the amplified training set."""

    weights = "resnext50_imagenet_v1"
