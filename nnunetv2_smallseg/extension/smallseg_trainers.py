"""The one file nnU-Net imports from ``nnUNet_extTrainer``: our trainers by name, from the installed package."""

from nnunetv2_smallseg.trainers import (
    nnUNetTrainerAHNet,
    nnUNetTrainerAHNetRecon,
    nnUNetTrainerAmplification,
    nnUNetTrainerHUNet,
    nnUNetTrainerMambaAHNet,
    nnUNetTrainerMambaAHNetRecon,
    nnUNetTrainerSTSNet,
    nnUNetTrainerSTSNetNoAmplification,
    nnUNetTrainerSTSNetPretrained,
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
