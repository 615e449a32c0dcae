"""Swin-UMamba and Swin-UMamba† (here SwinUMambaD, as in the authors' code).

Paper: Liu et al., Swin-UMamba: Mamba-based UNet with ImageNet-based pretraining, MICCAI 2024, arXiv 2402.03302.
Official code: github.com/JiarunLiu/Swin-UMamba, commit 2c1f72e (Apache-2.0). The residual blocks follow MONAI 1.3's
``UnetResBlock`` (Apache-2.0). The code here is our own.

What differs from the official code, and why:

- Any height and width from 1 pixel works: inputs are padded to a multiple of 32 and outputs cropped. The official
  networks fail on other sizes in the decoder.
- Modules have descriptive names, and heads are called ``seg_layers``, so that ``nnUNetv2_train -pretrained_weights``
  transfers between data sets with other classes; ``to_official`` and ``from_official`` translate.
- Linear weights start from ``torch.nn.init.trunc_normal_``: the official initialiser leaves single weights a hundred
  standard deviations out.
- The network never reads a weight file; ``nnunetv2_smallseg.pretrained`` does, once, before training.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from nnunetv2_smallseg.architectures.blocks.channels_last import in_faster_layout, instance_norm
from nnunetv2_smallseg.architectures.blocks.vss import PatchExpanding, VMambaEncoder, VSSStage
from nnunetv2_smallseg.architectures.segmentation_network import SegmentationNetwork

__all__ = ["SwinUMamba", "SwinUMambaD", "from_official", "to_official"]

VMAMBA_TINY_WIDTHS = (96, 192, 384, 768)
VMAMBA_TINY_DEPTHS = (2, 2, 9, 2)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut; instance normalisation without parameters; LeakyReLU.

    Args:
        input_channels: Channels in.
        output_channels: Channels out; if they differ, a 1x1 convolution stands in the shortcut.
    """

    def __init__(self, input_channels: int, output_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(input_channels, output_channels, kernel_size=3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(output_channels, output_channels, kernel_size=3, padding=1, bias=False)
        self.shortcut = (
            nn.Conv2d(input_channels, output_channels, kernel_size=1, bias=False)
            if input_channels != output_channels
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, input_channels, H, W) -> (B, output_channels, H, W)."""
        x = in_faster_layout(x)
        # In place: norms keep their inputs, not their outputs, for the backward pass.
        residual = functional.leaky_relu(instance_norm(self.conv1(x)), 0.01, inplace=True)
        residual = instance_norm(self.conv2(residual))
        residual += x if self.shortcut is None else instance_norm(self.shortcut(x))
        return functional.leaky_relu(residual, 0.01, inplace=True)


class UpBlock(nn.Module):
    """Transposed convolution to twice the size, concatenation with the skip, residual block (paper, eq. 4 and 5).

    Args:
        input_channels: Channels from below.
        output_channels: Channels of the skip and of the output.
    """

    def __init__(self, input_channels: int, output_channels: int) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose2d(input_channels, output_channels, kernel_size=2, stride=2, bias=False)
        self.block = ResidualBlock(2 * output_channels, output_channels)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """(B, input_channels, h, w) and (B, output_channels, 2h, 2w) -> (B, output_channels, 2h, 2w)."""
        return self.block(torch.cat((self.upsample(x), skip), dim=1))


class Stem(nn.Module):
    """7x7 convolution with stride 2 and affine instance normalisation.

    Args:
        input_channels: Channels of the image.
        width: Channels out.
    """

    def __init__(self, input_channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(input_channels, width, kernel_size=7, stride=2, padding=3)
        self.norm = nn.InstanceNorm2d(width, affine=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, input_channels, H, W) -> (B, width, H / 2, W / 2)."""
        return instance_norm(self.conv(in_faster_layout(x)), self.norm.weight, self.norm.bias, self.norm.eps)


class ConvolutionalDecoder(nn.Module):
    """Decoder of Swin-UMamba: a residual block on every skip, up blocks, a head at strides 1, 2, 4 and 8.

    Args:
        input_channels: Channels of the image, which is the first skip.
        num_classes: Channels K of the outputs.
        widths: Channels of stem and encoder stages, e.g. (48, 96, 192, 384, 768).
        deep_supervision: Return all outputs instead of the first.
    """

    def __init__(self, input_channels: int, num_classes: int, widths: Sequence[int], deep_supervision: bool) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        # Skips are widened: image -> 48, stem 48 -> 96, stages 96 -> 192, 192 -> 384, 384 -> 768.
        self.skips = nn.ModuleList(
            ResidualBlock(narrow, wide) for narrow, wide in zip((input_channels, *widths[:-1]), widths, strict=True)
        )
        deep_to_shallow = tuple(reversed(widths))
        self.ups = nn.ModuleList(
            UpBlock(below, here)
            for below, here in zip((deep_to_shallow[0], *deep_to_shallow), deep_to_shallow, strict=False)
        )
        self.last = ResidualBlock(widths[0], widths[0])
        self.seg_layers = nn.ModuleList(nn.Conv2d(width, num_classes, kernel_size=1) for width in widths[:-1])

    def forward(self, image: torch.Tensor, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Decodes.

        Args:
            image: (B, C, H, W).
            features: Channel-first maps of stem and stages, at strides 2, 4, 8, 16, 32.
        Returns:
            Logits (B, K, h, w) at strides 1, 2, 4, 8, or at stride 1 only without deep supervision.
        """
        *shallow, x = features
        skips = [block(skip) for block, skip in zip(self.skips, (image, *shallow), strict=True)]
        maps = []
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            x = up(x, skip)
            maps.append(x)
        maps[-1] = self.last(maps[-1])
        num_outputs = len(self.seg_layers) if self.deep_supervision else 1
        return [head(maps[-1 - level]) for level, head in enumerate(self.seg_layers[:num_outputs])]


class SwinUMamba(SegmentationNetwork):
    """Swin-UMamba: convolution stem, VMamba-Tiny encoder with 2x2 patches, convolutional decoder.

    Args:
        input_channels: Channels C of the image.
        num_classes: Channels K of the outputs.
        deep_supervision: Return a list of four outputs instead of one.
        widths: Channels of the encoder stages, each twice the one before; the stem has half the first.
        depths: VSS blocks of the encoder stages.
        drop_path_rate: Stochastic depth of the last encoder block.
        state_size: States N of the selective scans.
    """

    stride = 32
    deep_supervision_strides = (1, 2, 4, 8)

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = True,
        *,
        widths: Sequence[int] = VMAMBA_TINY_WIDTHS,
        depths: Sequence[int] = VMAMBA_TINY_DEPTHS,
        drop_path_rate: float = 0.2,
        state_size: int = 16,
    ) -> None:
        super().__init__(input_channels, num_classes)
        stem_width = widths[0] // 2
        self.stem = Stem(input_channels, stem_width)
        self.encoder = VMambaEncoder(
            stem_width,
            patch_size=2,
            widths=widths,
            depths=depths,
            drop_path_rate=drop_path_rate,
            state_size=state_size,
        )
        self.decoder = ConvolutionalDecoder(input_channels, num_classes, (stem_width, *widths), deep_supervision)

    def forward_features(self, image: torch.Tensor) -> list[torch.Tensor]:
        """(B, C, H, W), H and W multiples of 32 -> channel-first maps of stem and stages, at strides 2 to 32."""
        stem = self.stem(image)
        return [stem, *(stage.permute(0, 3, 1, 2) for stage in self.encoder(stem))]

    def forward_padded(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Logits for an image whose height and width are multiples of the stride."""
        return self.decoder(image, self.forward_features(image))

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """What ImageNet weights fill: VSS blocks and patch mergings (204 tensors in the default size)."""
        return self.encoder.block_parameters()


class MambaDecoder(nn.Module):
    """Decoder of SwinUMambaD: patch expanding, fusion with the skip, two VSS blocks a step, final x4 expanding.

    Args:
        num_classes: Channels K of the outputs.
        widths: Channels of the encoder stages.
        deep_supervision: Return all outputs instead of the first.
        drop_path_rate: Stochastic depth of the first (deepest) block; it falls linearly to 0 in the last.
        state_size: States of the selective scans.
        patch_size: Factor of the final expanding.
    """

    blocks_per_stage = 2

    def __init__(
        self,
        num_classes: int,
        widths: Sequence[int],
        deep_supervision: bool,
        *,
        drop_path_rate: float,
        state_size: int,
        patch_size: int,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        skips = tuple(reversed(widths[:-1]))
        rates = np.linspace(drop_path_rate, 0, self.blocks_per_stage * len(skips)).reshape(len(skips), -1)
        self.expand_layers = nn.ModuleList(PatchExpanding(2 * width, width, factor=2) for width in skips)
        self.expand_layers.append(PatchExpanding(widths[0], widths[0], factor=patch_size))
        self.concat_back_dim = nn.ModuleList(nn.Linear(2 * width, width) for width in skips)
        self.stages = nn.ModuleList(
            VSSStage(width, stage_rates.tolist(), state_size=state_size)
            for width, stage_rates in zip(skips, rates, strict=True)
        )
        self.seg_layers = nn.ModuleList(nn.Conv2d(width, num_classes, kernel_size=1) for width in (*skips, widths[0]))

    def forward(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Decodes.

        Args:
            features: Channel-last maps (B, h, w, C) of the encoder stages, at strides 4, 8, 16, 32.
        Returns:
            Logits (B, K, h, w) at strides 1, 4, 8, 16, or at stride 1 only without deep supervision.
        """
        *skips, x = features
        maps = []
        steps = zip(self.expand_layers[:-1], self.concat_back_dim, self.stages, reversed(skips), strict=True)
        for expand, fuse, stage, skip in steps:
            x = stage(fuse(torch.cat((expand(x), skip), dim=-1)))
            maps.append(x)
        maps.append(self.expand_layers[-1](x))
        levels = list(zip(self.seg_layers, maps, strict=True))[:: -1 if self.deep_supervision else -len(maps)]
        return [head(level.permute(0, 3, 1, 2)) for head, level in levels]


class SwinUMambaD(SegmentationNetwork):
    """Swin-UMamba†: VMamba-Tiny encoder with 4x4 patches and a Mamba decoder; less than half the parameters.

    Args:
        input_channels: Channels C of the image.
        num_classes: Channels K of the outputs.
        deep_supervision: Return a list of four outputs instead of one.
        widths: Channels of the encoder stages, each twice the one before.
        depths: VSS blocks of the encoder stages.
        drop_path_rate: Stochastic depth of the blocks at the lowest resolution, of encoder and decoder.
        state_size: States N of the selective scans.
    """

    stride = 32
    deep_supervision_strides = (1, 4, 8, 16)

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = True,
        *,
        widths: Sequence[int] = VMAMBA_TINY_WIDTHS,
        depths: Sequence[int] = VMAMBA_TINY_DEPTHS,
        drop_path_rate: float = 0.2,
        state_size: int = 16,
    ) -> None:
        super().__init__(input_channels, num_classes)
        patch_size = 4
        self.encoder = VMambaEncoder(
            input_channels,
            patch_size=patch_size,
            widths=widths,
            depths=depths,
            drop_path_rate=drop_path_rate,
            state_size=state_size,
        )
        self.decoder = MambaDecoder(
            num_classes,
            widths,
            deep_supervision,
            drop_path_rate=drop_path_rate,
            state_size=state_size,
            patch_size=patch_size,
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=0.01)
                nn.init.zeros_(module.bias)

    def forward_features(self, image: torch.Tensor) -> list[torch.Tensor]:
        """(B, C, H, W), H and W multiples of 32 -> channel-last maps of the stages, at strides 4 to 32."""
        return self.encoder(image)

    def forward_padded(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Logits for an image whose height and width are multiples of the stride."""
        return self.decoder(self.forward_features(image))

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """What ImageNet weights fill: VSS blocks and patch mergings, and for three channels the patch embedding."""
        yield from self.encoder.block_parameters()
        if self.input_channels == 3:
            yield from self.encoder.patch_embed.parameters()


# Parts of names, (ours, official); each stands at most once in a name.
_SHARED_NAMES = (
    (".ss2d.", ".self_attention."),
    ("encoder.stages.", "vssm_encoder.layers."),
    ("encoder.patch_embed.", "vssm_encoder.patch_embed."),
    ("encoder.downsamples.", "vssm_encoder.downsamples."),
)
_SWIN_UMAMBA_NAMES = (
    ("stem.conv.", "stem.0."),
    ("stem.norm.", "stem.1."),
    *((f"decoder.skips.{i}.", f"encoder{i + 1}.layer.") for i in range(5)),
    *((f"decoder.ups.{i}.upsample.", f"decoder{6 - i}.transp_conv.conv.") for i in range(5)),
    *((f"decoder.ups.{i}.block.", f"decoder{6 - i}.conv_block.") for i in range(5)),
    ("decoder.last.", "decoder1.layer."),
    *((f"decoder.seg_layers.{i}.", f"out_layers.{i}.conv.conv.") for i in range(4)),
    (".conv1.weight", ".conv1.conv.weight"),
    (".conv2.weight", ".conv2.conv.weight"),
    (".shortcut.weight", ".conv3.conv.weight"),
)


def to_official(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the entries of a SwinUMamba or SwinUMambaD state dict to those of the official code.

    Args:
        state_dict: State dict of one of the two networks.
    Returns:
        The same tensors under official names, in the order of ``state_dict``.
    """
    # Only SwinUMamba has a stem; the heads of SwinUMambaD already bear their official names.
    names = _SHARED_NAMES + (_SWIN_UMAMBA_NAMES if "stem.conv.weight" in state_dict else ())

    def rename(name: str) -> str:
        name = re.sub(r"(\.blocks\.\d+)\.norm\.", r"\1.ln_1.", name)
        for ours, official in names:
            name = name.replace(ours, official)
        return name

    return {rename(name): tensor for name, tensor in state_dict.items()}


def from_official(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the entries of an official Swin-UMamba or Swin-UMamba† state dict to those of this module.

    Args:
        state_dict: State dict with official names.
    Returns:
        The same tensors under our names, in the order of ``state_dict``; names that are neither network's are kept, so
        that ``load_state_dict`` reports them.
    """

    def rename(name: str) -> str:
        name = re.sub(r"(\.blocks\.\d+)\.ln_1\.", r"\1.norm.", name)
        for ours, official in _SHARED_NAMES + _SWIN_UMAMBA_NAMES:
            name = name.replace(official, ours)
        return name

    return {rename(name): tensor for name, tensor in state_dict.items()}
