"""nnU-Net's own network and recipe with what keeps small lesions in the training; all plans, all dimensions.

Each trainer is a set of switches (``plans/switches.py``), which every other trainer of this package has, too.
"""

from nnunetv2_smallseg.trainers.slabs import SlabTrainer

__all__ = ["nnUNetTrainerSmallLesion", "nnUNetTrainerSmallLesionSampling", "nnUNetTrainerSmallLesionTargets"]


class nnUNetTrainerSmallLesion(SlabTrainer):
    """Patches are drawn by lesion, not by voxel, and no lesion is missing in the targets of deep supervision."""

    accepts_volumes = True
    lesion_sampling = "lesion"
    deep_supervision_targets = "lesion"


class nnUNetTrainerSmallLesionSampling(SlabTrainer):
    """Patches are drawn by lesion, not by voxel: the first of the two strategies alone."""

    accepts_volumes = True
    lesion_sampling = "lesion"


class nnUNetTrainerSmallLesionTargets(SlabTrainer):
    """No lesion is missing in the targets of deep supervision: the second of the two strategies alone."""

    accepts_volumes = True
    deep_supervision_targets = "lesion"
