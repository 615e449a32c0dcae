"""The one file nnU-Net imports from ``nnUNet_extTrainer``: our trainers by name, from the installed package."""

from nnunetv2_smallseg.trainers import (
    nnUNetTrainerAHNet,
    nnUNetTrainerAHNetRecon,
    nnUNetTrainerCurriculum,
    nnUNetTrainerHUNet,
    nnUNetTrainerMambaAHNet,
    nnUNetTrainerMambaAHNetRecon,
    nnUNetTrainerS3Mamba,
    nnUNetTrainerS3MambaNoCurriculum,
    nnUNetTrainerS3MambaPretrained,
    nnUNetTrainerS3MambaSmall,
    nnUNetTrainerSwinUMamba,
    nnUNetTrainerSwinUMambaD,
    nnUNetTrainerSwinUMambaDScratch,
    nnUNetTrainerSwinUMambaScratch,
)

__all__ = [
    "nnUNetTrainerAHNet",
    "nnUNetTrainerAHNetRecon",
    "nnUNetTrainerCurriculum",
    "nnUNetTrainerHUNet",
    "nnUNetTrainerMambaAHNet",
    "nnUNetTrainerMambaAHNetRecon",
    "nnUNetTrainerS3Mamba",
    "nnUNetTrainerS3MambaNoCurriculum",
    "nnUNetTrainerS3MambaPretrained",
    "nnUNetTrainerS3MambaSmall",
    "nnUNetTrainerSwinUMamba",
    "nnUNetTrainerSwinUMambaD",
    "nnUNetTrainerSwinUMambaDScratch",
    "nnUNetTrainerSwinUMambaScratch",
]
