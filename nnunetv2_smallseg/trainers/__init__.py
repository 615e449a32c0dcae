"""Trainers for ``nnUNetv2_train -tr``; all are importable from here."""

from nnunetv2_smallseg.trainers.amplification import (
    nnUNetTrainerAmplification,
)
from nnunetv2_smallseg.trainers.curriculum import (
    nnUNetTrainerCurriculum,
)
from nnunetv2_smallseg.trainers.mamba_ahnet import (
    nnUNetTrainerAHNet,
    nnUNetTrainerAHNetRecon,
    nnUNetTrainerHUNet,
    nnUNetTrainerMambaAHNet,
    nnUNetTrainerMambaAHNetRecon,
)
from nnunetv2_smallseg.trainers.s3_mamba import (
    nnUNetTrainerS3Mamba,
    nnUNetTrainerS3MambaNoCurriculum,
    nnUNetTrainerS3MambaPretrained,
    nnUNetTrainerS3MambaSmall,
)
from nnunetv2_smallseg.trainers.small_lesion import (
    nnUNetTrainerSmallLesion,
    nnUNetTrainerSmallLesionSampling,
    nnUNetTrainerSmallLesionTargets,
)
from nnunetv2_smallseg.trainers.sts_net import (
    nnUNetTrainerSTSNet,
    nnUNetTrainerSTSNetNoAmplification,
    nnUNetTrainerSTSNetPretrained,
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
    "nnUNetTrainerAmplification",
    "nnUNetTrainerCurriculum",
    "nnUNetTrainerHUNet",
    "nnUNetTrainerLiteSvANet",
    "nnUNetTrainerLiteSvANetScratch",
    "nnUNetTrainerMambaAHNet",
    "nnUNetTrainerMambaAHNetRecon",
    "nnUNetTrainerS3Mamba",
    "nnUNetTrainerS3MambaNoCurriculum",
    "nnUNetTrainerS3MambaPretrained",
    "nnUNetTrainerS3MambaSmall",
    "nnUNetTrainerSTSNet",
    "nnUNetTrainerSTSNetNoAmplification",
    "nnUNetTrainerSTSNetPretrained",
    "nnUNetTrainerSmallLesion",
    "nnUNetTrainerSmallLesionSampling",
    "nnUNetTrainerSmallLesionTargets",
    "nnUNetTrainerSvANet",
    "nnUNetTrainerSvANetScratch",
    "nnUNetTrainerSwinUMamba",
    "nnUNetTrainerSwinUMambaD",
    "nnUNetTrainerSwinUMambaDScratch",
    "nnUNetTrainerSwinUMambaScratch",
]
