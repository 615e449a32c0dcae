"""Trainers for ``nnUNetv2_train -tr``; all are importable from here."""

from nnunetv2_smallseg.trainers.mamba_ahnet import (
    nnUNetTrainerAHNet,
    nnUNetTrainerAHNetRecon,
    nnUNetTrainerHUNet,
    nnUNetTrainerMambaAHNet,
    nnUNetTrainerMambaAHNetRecon,
)
from nnunetv2_smallseg.trainers.s3_mamba import (
    nnUNetTrainerS3MambaNoCurriculum,
    nnUNetTrainerS3MambaPretrained,
)
from nnunetv2_smallseg.trainers.svanet import (
    nnUNetTrainerLiteSvANet,
    nnUNetTrainerLiteSvANetScratch,
    nnUNetTrainerSvANet,
    nnUNetTrainerSvANetScratch,
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
