"""One entry per system: its paper, networks and trainers.

Pure data. It imports neither torch nor nnunetv2, so that command line, documentation and tests can read it at no
cost. Register a network or trainer here once and every generic test, ``smallseg trainers`` and ``smallseg doctor``
cover it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = [
    "SYSTEMS",
    "Network",
    "Paper",
    "System",
    "Trainer",
    "network",
    "networks",
    "trainer",
    "trainers",
    "trainers_without_weights",
]


@dataclass(frozen=True)
class Paper:
    """A publication and the code its authors released."""

    title: str
    venue: str
    url: str
    official_code: str | None = None
    official_commit: str | None = None
    official_licence: str | None = None


@dataclass(frozen=True)
class Network:
    """A network class.

    Attributes:
        name: Name of the class.
        module: Module that holds it.
        stride: Height and width are padded to a multiple of this inside the network.
        deep_supervision_strides: Stride of each output with deep supervision on, largest output first.
        parameters: (input channels, classes) -> number of parameters of the published network.
        description: One line for tables.
        reference: Folder of its reference outputs below ``shared/reference``.
        published_deep_supervision: Whether the published network has heads for deep supervision. Parameters and
            multiply-adds are those of the network built with or without them accordingly.
        small: Constructor options of a small version, for tests and smoke runs.
    """

    name: str
    module: str
    stride: int
    deep_supervision_strides: tuple[int, ...]
    parameters: dict[tuple[int, int], int]
    description: str
    reference: str
    published_deep_supervision: bool = True
    small: Mapping = field(default_factory=dict)


@dataclass(frozen=True)
class Trainer:
    """A trainer class of ``nnunetv2_smallseg.trainers``.

    Attributes:
        name: Name of the class, as given to ``nnUNetv2_train -tr``.
        network: Name of its network; None for nnU-Net's own, as the plans describe it.
        weights: Name of the weight file it starts from (``smallseg weights list``), or None.
        description: One line for tables.
    """

    name: str
    network: str | None
    weights: str | None
    description: str


@dataclass(frozen=True)
class System:
    """One paper with its networks, if they are ours, and trainers.

    The last system is nnU-Net itself: its networks are those of the plans, and what its trainers here add is this
    package's own, not published.
    """

    name: str
    paper: Paper
    networks: tuple[Network, ...]
    trainers: tuple[Trainer, ...]


SYSTEMS: tuple[System, ...] = (
    System(
        name="Swin-UMamba",
        paper=Paper(
            title="Swin-UMamba: Mamba-based UNet with ImageNet-based pretraining",
            venue="MICCAI 2024",
            url="https://arxiv.org/abs/2402.03302",
            official_code="https://github.com/JiarunLiu/Swin-UMamba",
            official_commit="2c1f72e",
            official_licence="Apache-2.0",
        ),
        networks=(
            Network(
                name="SwinUMamba",
                module="nnunetv2_smallseg.architectures.swin_umamba",
                stride=32,
                deep_supervision_strides=(1, 2, 4, 8),
                parameters={(1, 14): 59_889_368},
                description="VMamba encoder behind a convolution stem, convolutional decoder",
                reference="swin_umamba",
                small={"widths": (24, 48, 96, 192), "depths": (1, 1, 1, 1)},
            ),
            Network(
                name="SwinUMambaD",
                module="nnunetv2_smallseg.architectures.swin_umamba",
                stride=32,
                deep_supervision_strides=(1, 4, 8, 16),
                parameters={(1, 14): 27_497_720},
                description="VMamba encoder, Mamba decoder (Swin-UMamba† of the paper)",
                reference="swin_umamba",
                small={"widths": (24, 48, 96, 192), "depths": (1, 1, 1, 1)},
            ),
        ),
        trainers=(
            Trainer(
                name="nnUNetTrainerSwinUMamba",
                network="SwinUMamba",
                weights="vmamba_tiny_imagenet",
                description="ImageNet weights, encoder frozen for 10 epochs",
            ),
            Trainer(
                name="nnUNetTrainerSwinUMambaD",
                network="SwinUMambaD",
                weights="vmamba_tiny_imagenet",
                description="ImageNet weights, encoder frozen for 10 epochs",
            ),
            Trainer(
                name="nnUNetTrainerSwinUMambaScratch",
                network="SwinUMamba",
                weights=None,
                description="Random start",
            ),
            Trainer(
                name="nnUNetTrainerSwinUMambaDScratch",
                network="SwinUMambaD",
                weights=None,
                description="Random start, no deep supervision (paper, section 3.5)",
            ),
        ),
    ),
    System(
        name="SvANet",
        paper=Paper(
            title="Exploiting Scale-Variant Attention for Segmenting Small Medical Objects",
            venue="IEEE TNNLS 2026",
            url="https://arxiv.org/abs/2407.07720",
            official_code="https://github.com/anthonyweidai/SvANet",
            official_commit="state of 2026-01-29",
            official_licence="MIT",
        ),
        networks=(
            Network(
                name="SvANet",
                module="nnunetv2_smallseg.architectures.svanet",
                stride=32,
                deep_supervision_strides=(1, 2, 4, 8, 16),
                parameters={(3, 8): 177_635_576},
                description="ResNet-50 encoder, scale-variant attention between stages, AssemFormer decoder",
                reference="svanet",
                published_deep_supervision=False,
                small={"width": 8, "depths": (1, 1, 1, 1)},
            ),
            Network(
                name="LiteSvANet",
                module="nnunetv2_smallseg.architectures.svanet",
                stride=16,
                deep_supervision_strides=(1, 2, 4, 8),
                parameters={(3, 8): 53_040_372},
                description="SvANet without the last encoder stage",
                reference="svanet",
                published_deep_supervision=False,
                small={"width": 8, "depths": (1, 1, 1, 1)},
            ),
        ),
        trainers=(
            Trainer(
                name="nnUNetTrainerSvANet",
                network="SvANet",
                weights="resnet50_imagenet_v2",
                description="ImageNet weights, encoder frozen for a tenth of the training",
            ),
            Trainer(
                name="nnUNetTrainerLiteSvANet",
                network="LiteSvANet",
                weights="resnet50_imagenet_v2",
                description="ImageNet weights, encoder frozen for a tenth of the training",
            ),
            Trainer(
                name="nnUNetTrainerSvANetScratch",
                network="SvANet",
                weights=None,
                description="Random start",
            ),
            Trainer(
                name="nnUNetTrainerLiteSvANetScratch",
                network="LiteSvANet",
                weights=None,
                description="Random start",
            ),
        ),
    ),
    System(
        name="STS-Net",
        paper=Paper(
            title="A novel framework for segmentation of small targets in medical images",
            venue="Scientific Reports 2025",
            url="https://doi.org/10.1038/s41598-025-94437-9",
        ),
        networks=(
            Network(
                name="STSNet",
                module="nnunetv2_smallseg.architectures.sts_net",
                stride=8,
                deep_supervision_strides=(1,),
                parameters={(1, 14): 39_102_720, (3, 2): 39_105_908, (1, 2): 39_099_636, (3, 1): 39_105_651},
                description="ResNeXt50 encoder with channel attention, DeepLabV3 decoder",
                reference="sts_net",
                small={"encoder_name": "resnet18", "decoder_channels": 16},
            ),
        ),
        trainers=(
            Trainer(
                name="nnUNetTrainerSTSNet",
                network="STSNet",
                weights=None,
                description="Random start, slices with small lesions amplified",
            ),
            Trainer(
                name="nnUNetTrainerSTSNetNoAmplification",
                network="STSNet",
                weights=None,
                description="Random start, slices drawn uniformly without amplification",
            ),
            Trainer(
                name="nnUNetTrainerSTSNetPretrained",
                network="STSNet",
                weights="resnext50_imagenet_v1",
                description="ImageNet weights, slices with small lesions amplified",
            ),
            Trainer(
                name="nnUNetTrainerAmplification",
                network=None,
                weights=None,
                description="nnU-Net's network and recipe, slices with small lesions amplified",
            ),
        ),
    ),
    System(
        name="S³-Mamba",
        paper=Paper(
            title="S³-Mamba: Small-Size-Sensitive Mamba for Lesion Segmentation",
            venue="AAAI 2025",
            url="https://arxiv.org/abs/2412.14546",
        ),
        networks=(
            Network(
                name="S3Mamba",
                module="nnunetv2_smallseg.architectures.s3_mamba",
                stride=32,
                deep_supervision_strides=(1, 4, 8, 16, 32),
                parameters={
                    (3, 2): 27_582_650,
                    (1, 2): 27_578_650,
                    (3, 1): 27_577_721,
                    (1, 4): 27_588_508,
                    (4, 3): 27_589_579,
                },
                description="VM-UNet with channel attention and tensor attention in the decoder",
                reference="s3_mamba",
                small={"widths": (16, 32, 64, 128), "depths": (1, 1, 1, 1), "decoder_depths": (1, 1, 1, 1)},
            ),
            Network(
                name="S3MambaSmall",
                module="nnunetv2_smallseg.architectures.s3_mamba",
                stride=32,
                deep_supervision_strides=(1, 4, 8, 16, 32),
                parameters={(3, 2): 4_648_346, (1, 2): 4_646_394, (1, 4): 4_650_460},
                description="S3Mamba with a third of the channels, the paper's size read literally",
                reference="s3_mamba",
                small={"widths": (16, 32, 64, 128), "depths": (1, 1, 1, 1), "decoder_depths": (1, 1, 1, 1)},
            ),
        ),
        trainers=(
            Trainer(
                name="nnUNetTrainerS3Mamba",
                network="S3Mamba",
                weights=None,
                description="Random start, curriculum",
            ),
            Trainer(
                name="nnUNetTrainerS3MambaSmall",
                network="S3MambaSmall",
                weights=None,
                description="Random start, curriculum",
            ),
            Trainer(
                name="nnUNetTrainerS3MambaPretrained",
                network="S3Mamba",
                weights="vmamba_small_imagenet",
                description="ImageNet weights, curriculum",
            ),
            Trainer(
                name="nnUNetTrainerS3MambaNoCurriculum",
                network="S3Mamba",
                weights=None,
                description="Random start, all cases weighted alike",
            ),
            Trainer(
                name="nnUNetTrainerCurriculum",
                network=None,
                weights=None,
                description="nnU-Net's own recipe with the curriculum, also in 3D",
            ),
        ),
    ),
    System(
        name="Mamba-AHNet",
        paper=Paper(
            title=(
                "Optimizing Universal Lesion Segmentation: State Space Model-Guided Hierarchical Networks with Feature "
                "Importance Adjustment"
            ),
            venue="arXiv 2024",
            url="https://arxiv.org/abs/2404.17235",
        ),
        networks=(
            Network(
                name="HUNet",
                module="nnunetv2_smallseg.architectures.mamba_ahnet",
                stride=16,
                deep_supervision_strides=(1, 2, 4, 8),
                parameters={(1, 2): 6_979_560},
                description="U-Net with a head at every decoder level: the base line of Mamba-AHNet",
                reference="mamba_ahnet",
                small={"base_channels": 8},
            ),
            Network(
                name="AHNet",
                module="nnunetv2_smallseg.architectures.mamba_ahnet",
                stride=16,
                deep_supervision_strides=(1, 2, 4, 8),
                parameters={(1, 2): 8_636_448},
                description="HUNet with attention gates and residual blocks (not MONAI's AHNet)",
                reference="mamba_ahnet",
                small={"base_channels": 8},
            ),
            Network(
                name="AHNetRecon",
                module="nnunetv2_smallseg.architectures.mamba_ahnet",
                stride=16,
                deep_supervision_strides=(1, 2, 4, 8),
                parameters={(1, 2): 9_951_079},
                description="AHNet that also reconstructs the image in training",
                reference="mamba_ahnet",
                small={"base_channels": 8},
            ),
            Network(
                name="MambaAHNet",
                module="nnunetv2_smallseg.architectures.mamba_ahnet",
                stride=16,
                deep_supervision_strides=(1, 2, 4, 8),
                parameters={(1, 2): 9_517_216},
                description="AHNet with visual state space layers in the decoder",
                reference="mamba_ahnet",
                small={"base_channels": 8},
            ),
            Network(
                name="MambaAHNetRecon",
                module="nnunetv2_smallseg.architectures.mamba_ahnet",
                stride=16,
                deep_supervision_strides=(1, 2, 4, 8),
                parameters={(1, 2): 10_831_847},
                description="Mamba-AHNet that also reconstructs the image in training",
                reference="mamba_ahnet",
                small={"base_channels": 8},
            ),
        ),
        trainers=(
            Trainer(
                name="nnUNetTrainerHUNet",
                network="HUNet",
                weights=None,
                description="Random start, the base line without gates and residual blocks",
            ),
            Trainer(
                name="nnUNetTrainerAHNet",
                network="AHNet",
                weights=None,
                description="Random start",
            ),
            Trainer(
                name="nnUNetTrainerAHNetRecon",
                network="AHNetRecon",
                weights=None,
                description="Random start, loss of a reconstruction with weight 0.1",
            ),
            Trainer(
                name="nnUNetTrainerMambaAHNet",
                network="MambaAHNet",
                weights=None,
                description="Random start",
            ),
            Trainer(
                name="nnUNetTrainerMambaAHNetRecon",
                network="MambaAHNetRecon",
                weights=None,
                description="Random start, loss of a reconstruction with weight 0.1",
            ),
        ),
    ),
    System(
        name="nnU-Net",
        paper=Paper(
            title="nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation",
            venue="Nature Methods 2021",
            url="https://doi.org/10.1038/s41592-020-01008-z",
            official_code="https://github.com/MIC-DKFZ/nnUNet",
            official_commit="2.8.1",
            official_licence="Apache-2.0",
        ),
        networks=(),
        trainers=(
            Trainer(
                name="nnUNetTrainerSmallLesion",
                network=None,
                weights=None,
                description="Patches drawn by lesion, every lesion in all targets of deep supervision; also in 3D",
            ),
            Trainer(
                name="nnUNetTrainerSmallLesionSampling",
                network=None,
                weights=None,
                description="Patches drawn by lesion only, to compare with; also in 3D",
            ),
            Trainer(
                name="nnUNetTrainerSmallLesionTargets",
                network=None,
                weights=None,
                description="Every lesion in all targets of deep supervision only, to compare with; also in 3D",
            ),
        ),
    ),
)


def networks() -> dict[str, Network]:
    """All networks by class name."""
    return {network.name: network for system in SYSTEMS for network in system.networks}


def trainers() -> dict[str, Trainer]:
    """All trainers by class name."""
    return {trainer.name: trainer for system in SYSTEMS for trainer in system.trainers}


def network(name: str) -> Network:
    """The network entry called ``name``; ``KeyError`` if there is none."""
    return networks()[name]


def trainer(name: str) -> Trainer:
    """The trainer entry called ``name``; ``KeyError`` if there is none."""
    return trainers()[name]


def trainers_without_weights(weights: str) -> list[str]:
    """Names of the trainers that start at random the networks for which others read the weight file ``weights``."""
    fitting = {trainer.network for trainer in trainers().values() if trainer.weights == weights}
    return [trainer.name for trainer in trainers().values() if trainer.weights is None and trainer.network in fitting]
