"""Trainers of HUNet, AHNet and Mamba-AHNet (Sanjid et al., arXiv 2404.17235).

The paper gives no optimiser, learning rate, schedule, batch size, number of epochs or loss. The recipe is ours: AdamW
with learning rate 1e-4 along nnU-Net's polynomial, weight decay 0.01, and nnU-Net's loss, augmentation and deep
supervision. The networks with a reconstruction branch add 0.1 times the mean squared error of the reconstruction to
that loss (the paper only says that both are optimised jointly); ``network_options`` in the plans change the weight.

nnU-Net gives the lowest of the four outputs no weight in the loss.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import distributed

from nnunetv2_smallseg.architectures.mamba_ahnet import AHNet, AHNetRecon, HUNet, MambaAHNet, MambaAHNetRecon
from nnunetv2_smallseg.losses.reconstruction import SegmentationAndReconstructionLoss
from nnunetv2_smallseg.trainers.base import SmallSegTrainer, network_builder

__all__ = [
    "nnUNetTrainerAHNet",
    "nnUNetTrainerAHNetRecon",
    "nnUNetTrainerHUNet",
    "nnUNetTrainerMambaAHNet",
    "nnUNetTrainerMambaAHNetRecon",
]

LOGGED_ERROR = "train_reconstruction_errors"


class MambaAHNetFamilyTrainer(SmallSegTrainer):
    """The recipe all five share."""

    decay = 0.01
    adam_epsilon = 1e-8

    def build_schedule(self, optimizer: torch.optim.Optimizer) -> PolyLRScheduler:
        """nnU-Net's polynomial over this training."""
        return PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)


class ReconstructionTrainer(MambaAHNetFamilyTrainer):
    """Adds the error of the reconstruction to the loss and logs it.

    The network's output, the reconstruction included, never reaches nnU-Net's validation: the branch runs in training
    mode only. If the plans set ``reconstruction_weight`` to 0, the network has no branch, and nothing is added.
    """

    @property
    def reconstructs(self) -> bool:
        """Whether the network has a reconstruction branch."""
        return self.planar_network.reconstruction is not None

    def _build_loss(self) -> Callable[..., torch.Tensor]:
        """nnU-Net's loss, and that of the reconstruction if there is one."""
        loss = super()._build_loss()
        if not self.reconstructs:
            return loss
        return SegmentationAndReconstructionLoss(loss, self.planar_network.reconstruction_weight)

    def on_train_start(self) -> None:
        """Lets nnU-Net's logger accept the reconstruction error; a resumed training goes on with its own list."""
        super().on_train_start()
        if self.reconstructs:
            logged = self.logger.local_logger.my_fantastic_logging
            # One value for each epoch so far: nnU-Net derives the current epoch from the shortest list.
            logged.setdefault(LOGGED_ERROR, [float("nan")] * self.current_epoch)

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's step; its result holds the ``reconstruction_error`` too, in training mode."""
        if not (self.reconstructs and self.planar_network.training):
            return super().train_step(batch)
        image = batch["data"].to(self.device, non_blocking=True)
        with self.loss.for_image(image):
            result = super().train_step({**batch, "data": image})
        return {**result, "reconstruction_error": self.loss.last_reconstruction_error.item()}

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Logs the mean reconstruction error of the epoch; nnU-Net logs the total loss."""
        super().on_train_epoch_end(train_outputs)
        if not self.reconstructs:
            return
        errors = [output["reconstruction_error"] for output in train_outputs]
        if self.is_ddp:
            gathered = [None] * distributed.get_world_size()
            distributed.all_gather_object(gathered, errors)
            errors = gathered
        error = float(np.mean(errors))
        self.logger.log(LOGGED_ERROR, error, self.current_epoch)
        self.print_to_log_file(f"reconstruction error {error:.4f}, in train_loss with weight {self.loss.weight:g}")


class nnUNetTrainerHUNet(MambaAHNetFamilyTrainer):
    """HUNet: the U-Net that the others extend."""

    build_network_architecture = staticmethod(network_builder(HUNet))


class nnUNetTrainerAHNet(MambaAHNetFamilyTrainer):
    """AHNet: attention gates and residual blocks."""

    build_network_architecture = staticmethod(network_builder(AHNet))


class nnUNetTrainerAHNetRecon(ReconstructionTrainer):
    """AHNet that also reconstructs the image in training."""

    build_network_architecture = staticmethod(network_builder(AHNetRecon))


class nnUNetTrainerMambaAHNet(MambaAHNetFamilyTrainer):
    """Mamba-AHNet: AHNet with VM layers in the decoder."""

    build_network_architecture = staticmethod(network_builder(MambaAHNet))


class nnUNetTrainerMambaAHNetRecon(ReconstructionTrainer):
    """Mamba-AHNet that also reconstructs the image in training."""

    build_network_architecture = staticmethod(network_builder(MambaAHNetRecon))
