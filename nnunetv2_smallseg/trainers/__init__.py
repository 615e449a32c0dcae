"""Trainers for ``nnUNetv2_train -tr``; all are importable from here."""

from nnunetv2_smallseg.trainers.swin_umamba import (
    nnUNetTrainerSwinUMamba,
    nnUNetTrainerSwinUMambaD,
    nnUNetTrainerSwinUMambaDScratch,
    nnUNetTrainerSwinUMambaScratch,
)

__all__ = [
    "nnUNetTrainerSwinUMamba",
    "nnUNetTrainerSwinUMambaD",
    "nnUNetTrainerSwinUMambaDScratch",
    "nnUNetTrainerSwinUMambaScratch",
]
