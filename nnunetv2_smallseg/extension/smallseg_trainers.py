"""The one file nnU-Net imports from ``nnUNet_extTrainer``: our trainers by name, from the installed package."""

from nnunetv2_smallseg.trainers import (
    nnUNetTrainerAHNet,
    nnUNetTrainerAHNetRecon,
    nnUNetTrainerHUNet,
    nnUNetTrainerLiteSvANet,
    nnUNetTrainerLiteSvANetScratch,
    nnUNetTrainerMambaAHNet,
    nnUNetTrainerMambaAHNetRecon,
    nnUNetTrainerS3MambaNoCurriculum,
    nnUNetTrainerS3MambaPretrained,
    nnUNetTrainerSvANet,
    nnUNetTrainerSvANetScratch,
    nnUNetTrainerSwinUMamba,
    nnUNetTrainerSwinUMambaD,
    nnUNetTrainerSwinUMambaDScratch,
    nnUNetTrainerSwinUMambaScratch,
)

__all__ = [
    "nnUNetTrainerAHNet",
    "nnUNetTrainerAHNetRecon",
    "nnUNetTrainerHUNet",
    "nnUNetTrainerLiteSvANet",
    "nnUNetTrainerLiteSvANetScratch",
    "nnUNetTrainerMambaAHNet",
    "nnUNetTrainerMambaAHNetRecon",
    "nnUNetTrainerS3MambaNoCurriculum",
    "nnUNetTrainerS3MambaPretrained",
    "nnUNetTrainerSvANet",
    "nnUNetTrainerSvANetScratch",
    "nnUNetTrainerSwinUMamba",
    "nnUNetTrainerSwinUMambaD",
    "nnUNetTrainerSwinUMambaDScratch",
    "nnUNetTrainerSwinUMambaScratch",
]
