"""The two trainers of ``scripts/curriculum_study.py``: the curriculum, and the same class with all weights 1."""

import os

import torch

from benchmarks.small_lesions.training import seed_everything
from nnunetv2_smallseg.trainers.curriculum import nnUNetTrainerCurriculum


class nnUNetTrainerStudyCurriculum(nnUNetTrainerCurriculum):
    """nnU-Net's recipe with the curriculum, from the seed in ``SMALLSEG_STUDY_SEED``."""

    def initialize(self) -> None:
        """Seeded initial weights, on as many threads as the study asks for (nnU-Net takes all cores)."""
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        seed_everything(int(os.environ["SMALLSEG_STUDY_SEED"]))
        super().initialize()

    def on_train_epoch_start(self) -> None:
        """Seeded patches, the same in both trainings of a seed."""
        super().on_train_epoch_start()
        seed_everything(int(os.environ["SMALLSEG_STUDY_SEED"]) * 100_000 + self.current_epoch)


class nnUNetTrainerStudyWithout(nnUNetTrainerStudyCurriculum):
    """The same with all weights 1, which trains as without the curriculum."""

    min_curriculum_weight = 1.0
