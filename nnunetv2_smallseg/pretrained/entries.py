"""One entry per published weight file: where it is, how to check it, and what it fits.

Pure data. It imports neither torch nor nnunetv2, so that command line, documentation and tests can read it at no
cost. ``smallseg weights`` and ``pretrained.store`` work on whatever is listed here.
"""

from __future__ import annotations

from dataclasses import dataclass

from nnunetv2_smallseg.errors import UsageError, did_you_mean

__all__ = ["ENTRIES", "WeightEntry", "entry", "names"]


@dataclass(frozen=True)
class WeightEntry:
    """A weight file that others published.

    Attributes:
        name: Name in commands and trainers.
        description: One line for tables.
        file_names: Names of the file in the weights folder. Downloads get the first; the others are names under which
            people already have it.
        urls: Direct addresses, tried in this order.
        manual_url: Address that needs a browser, or None.
        size_bytes: Length of the file.
        sha256: Checksum of the file, hexadecimal; its first digits where nobody states more.
        sha256_source: Who states size and checksum.
        licence: Licence of the file.
        source: Page that publishes the file.
        paper: Paper of the pretrained network.
        layout: Names and shapes inside, which choose the loader in ``pretrained.load``.
        imagenet_top1: Top-1 accuracy on ImageNet-1K at 224 x 224 pixels, in percent.
        fits: Names of the networks that can start from it.
    """

    name: str
    description: str
    file_names: tuple[str, ...]
    urls: tuple[str, ...]
    manual_url: str | None
    size_bytes: int
    sha256: str
    sha256_source: str
    licence: str
    source: str
    paper: str
    layout: str
    imagenet_top1: float
    fits: tuple[str, ...]

    @property
    def file_name(self) -> str:
        """Name under which a download is stored."""
        return self.file_names[0]

    @property
    def variable(self) -> str:
        """Environment variable that points to another file to be used in place of this one."""
        return f"SMALLSEG_WEIGHTS_{self.name.upper()}"


ENTRIES: tuple[WeightEntry, ...] = (
    WeightEntry(
        name="vmamba_tiny_imagenet",
        description="VMamba-Tiny, first version (depths 2-2-9-2), ImageNet-1K",
        file_names=("vssmtiny_dp01_ckpt_epoch_292.pth", "vmamba_tiny_e292.pth"),
        urls=(
            "https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth",
            "https://github.com/MzeroMiko/VMamba/releases/download/%2320240218/vssmtiny_dp01_ckpt_epoch_292.pth",
        ),
        manual_url="https://drive.google.com/file/d/1ml7nZM-YPYbQurHiodf4dpXHw88dXFfP/view?usp=sharing",
        size_bytes=91_649_482,
        sha256="dbc0cc4f5ec0e45db5fba7c939d2c7d9b617e891ac10766912a8d604c37c5e47",
        sha256_source="third-party projects that use the file; VMamba's authors publish no checksum",
        licence="MIT",
        source="https://github.com/MzeroMiko/VMamba",
        paper="VMamba: Visual State Space Model, NeurIPS 2024, https://arxiv.org/abs/2401.10166",
        layout="vmamba_tiny",
        imagenet_top1=82.2,
        fits=("SwinUMamba", "SwinUMambaD"),
    ),
    WeightEntry(
        name="vmamba_small_imagenet",
        description="VMamba-Small, first version (depths 2-2-27-2), ImageNet-1K",
        file_names=("vssmsmall_dp03_ckpt_epoch_238.pth", "vmamba_small_e238_ema.pth"),
        urls=(
            "https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth",
            "https://github.com/MzeroMiko/VMamba/releases/download/%2320240218/vssmsmall_dp03_ckpt_epoch_238.pth",
        ),
        manual_url=None,
        size_bytes=177_830_070,
        sha256="8a9b3d3954bd28265405bd9a86768599d11491ba414ce04011db837d6c319e14",
        sha256_source="the Git LFS entry of the file in github.com/zifuwan/Sigma; VMamba's authors publish no checksum",
        licence="MIT",
        source="https://github.com/MzeroMiko/VMamba",
        paper="VMamba: Visual State Space Model, NeurIPS 2024, https://arxiv.org/abs/2401.10166",
        layout="vmamba_small",
        imagenet_top1=83.5,
        fits=("S3Mamba",),
    ),
    WeightEntry(
        name="resnet50_imagenet_v2",
        description="ResNet-50 of torchvision (IMAGENET1K_V2), ImageNet-1K",
        file_names=("resnet50-11ad3fa6.pth",),
        urls=("https://download.pytorch.org/models/resnet50-11ad3fa6.pth",),
        manual_url=None,
        size_bytes=102_540_417,
        sha256="11ad3fa6",
        sha256_source="torchvision, whose file names hold the first 8 digits and which checks just these; the size is "
        "stated by third parties",
        licence="BSD-3-Clause",
        source="https://pytorch.org/vision/stable/models/generated/torchvision.models.resnet50.html",
        paper="Deep Residual Learning for Image Recognition, CVPR 2016, https://arxiv.org/abs/1512.03385",
        layout="resnet50",
        imagenet_top1=80.858,
        fits=("SvANet", "LiteSvANet"),
    ),
    WeightEntry(
        name="resnext50_imagenet_v1",
        description="ResNeXt50-32x4d of torchvision, first recipe, ImageNet-1K",
        file_names=("resnext50_32x4d-7cdf4587.pth",),
        urls=("https://download.pytorch.org/models/resnext50_32x4d-7cdf4587.pth",),
        manual_url=None,
        size_bytes=100_441_675,
        sha256="7cdf4587",
        sha256_source="torchvision, which puts the first digits into the file's name; the size is stated by timm",
        licence="BSD-3-Clause",
        source="https://github.com/pytorch/vision",
        paper="Aggregated Residual Transformations for Deep Neural Networks, CVPR 2017, "
        "https://arxiv.org/abs/1611.05431",
        layout="resnext50",
        imagenet_top1=77.618,
        fits=("STSNet",),
    ),
)


def names() -> list[str]:
    """Names of all entries."""
    return [weights.name for weights in ENTRIES]


def entry(name: str) -> WeightEntry:
    """The entry called ``name``.

    Raises:
        UsageError: If there is none; the message lists the known names.
    """
    for weights in ENTRIES:
        if weights.name == name:
            return weights
    raise UsageError(
        f"no weights are called '{name}'.{did_you_mean(name, names(), 0.4)} Known names: {', '.join(names())}. "
        "`smallseg weights list` describes them."
    )
