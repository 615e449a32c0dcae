"""Trainers of S³-Mamba (Wang et al., AAAI 2025, arXiv 2412.14546).

Recipe of the paper: AdamW, learning rate 1e-4 along a cosine, start from VMamba-S's ImageNet weights, batches of 16
images resized to 256 x 256, at most 600 epochs. Here:

- Weight decay is 0.01 and epsilon 1e-8, PyTorch's values, and the cosine ends at 0 with the training, without warm-up;
  the paper states none of these.
- Batch, patch, number of epochs and augmentation are nnU-Net's, as is the loss, which the paper does not name.
- The start is random unless a trainer says otherwise: without the depthwise convolution the features are not those that
  VMamba-S's weights were trained for.
- The paper's regularised curriculum is ``CurriculumMixin``; ``...NoCurriculum`` does without it.
- Outputs at lower resolutions are supervised; the paper does not speak of deep supervision. It gives the class maps of
  the tensor attention their meaning and the attention a gradient from the first step on.
"""

from torch import nn

from nnunetv2_smallseg.architectures.s3_mamba import S3Mamba, S3MambaSmall
from nnunetv2_smallseg.trainers.base import SmallSegTrainer, network_builder
from nnunetv2_smallseg.trainers.curriculum import CurriculumMixin

__all__ = [
    "S3MambaTrainer",
    "nnUNetTrainerS3Mamba",
    "nnUNetTrainerS3MambaNoCurriculum",
    "nnUNetTrainerS3MambaPretrained",
    "nnUNetTrainerS3MambaSmall",
]


class S3MambaTrainer(SmallSegTrainer):
    """What all trainers of S³-Mamba share: network and optimizer, without the curriculum."""

    build_network_architecture = staticmethod(network_builder(S3Mamba))
    min_learning_rate = 0.0
    decay = 0.01
    adam_epsilon = 1e-8

    def _build_loss(self) -> nn.Module:
        """nnU-Net's loss; where plans switch TCMA off there is one output only, and no deep supervision."""
        if self.planar_network.deep_supervision_strides == (1,):
            self.enable_deep_supervision = False
            self.set_deep_supervision_enabled(False)
        return super()._build_loss()


class nnUNetTrainerS3Mamba(CurriculumMixin, S3MambaTrainer):
    """S³-Mamba from random weights, with the curriculum."""


class nnUNetTrainerS3MambaSmall(CurriculumMixin, S3MambaTrainer):
    """The small S³-Mamba from random weights, with the curriculum."""

    build_network_architecture = staticmethod(network_builder(S3MambaSmall))


class nnUNetTrainerS3MambaPretrained(CurriculumMixin, S3MambaTrainer):
    """S³-Mamba from ImageNet weights, with the curriculum, as in the paper."""

    weights = "vmamba_small_imagenet"


class nnUNetTrainerS3MambaNoCurriculum(S3MambaTrainer):
    """S³-Mamba from random weights, all cases weighted alike."""
