"""Trainers for ``nnUNetv2_train -tr``; all are importable from here."""

from nnunetv2_smallseg.trainers.amplification import nnUNetTrainerAmplification
from nnunetv2_smallseg.trainers.mamba_ahnet import (
    nnUNetTrainerAHNet,
    nnUNetTrainerAHNetRecon,
    nnUNetTrainerHUNet,
    nnUNetTrainerMambaAHNet,
    nnUNetTrainerMambaAHNetRecon,
)
from nnunetv2_smallseg.trainers.sts_net import (
    nnUNetTrainerSTSNet,
    nnUNetTrainerSTSNetNoAmplification,
    nnUNetTrainerSTSNetPretrained,
)
from nnunetv2_smallseg.trainers.swin_umamba import (
    nnUNetTrainerSwinUMamba,
    nnUNetTrainerSwinUMambaD,
    nnUNetTrainerSwinUMambaDScratch,
    nnUNetTrainerSwinUMambaScratch,
)

__all__ = [
    "nnUNetTrainerAHNet",
    "nnUNetTrainerAHNetRecon",
    "nnUNetTrainerAmplification",
    "nnUNetTrainerHUNet",
    "nnUNetTrainerMambaAHNet",
    "nnUNetTrainerMambaAHNetRecon",
    "nnUNetTrainerSTSNet",
    "nnUNetTrainerSTSNetNoAmplification",
    "nnUNetTrainerSTSNetPretrained",
    "nnUNetTrainerSwinUMamba",
    "nnUNetTrainerSwinUMambaD",
    "nnUNetTrainerSwinUMambaDScratch",
    "nnUNetTrainerSwinUMambaScratch",
]
