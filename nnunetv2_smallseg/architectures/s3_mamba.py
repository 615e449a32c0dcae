"""S³-Mamba: VM-UNet with channel attention instead of the depthwise convolution, and tensor attention in the decoder.

Paper: Wang et al., S³-Mamba: Small-Size-Sensitive Mamba for Lesion Segmentation, AAAI 2025, arXiv 2412.14546. There is
no official code: the repository named in the paper holds a README only. The backbone is VM-UNet (Ruan & Xiang 2024,
arXiv 2402.02491), whose public code gave the facts about it; the code here is our own.

What the paper leaves open was decided here; ``docs/networks.md`` lists it all. The two most important choices:

- Size. The paper's "27.58 G FLOPs and 4.64 M parameters" fits no network of this family; with the two units exchanged
  it fits VM-UNet's size, the only one that VMamba-S can initialise, as the paper does. ``s3mamba`` is that reading,
  ``s3mamba_small`` the literal one.
- EnVSS. Of its two residual connections one spans the block and one the channel attention, inside the residual branch.
  Around the whole stream the attention would multiply the stream itself, by up to 2 in every block.

Any height and width from 1 pixel works: inputs are padded with zeros, below and right, to a multiple of 32 and at least
64, as in all networks here, and outputs cropped.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from nnunetv2_smallseg.architectures.blocks.vss import PatchExpanding, VMambaEncoder, VSSBlock, VSSStage
from nnunetv2_smallseg.architectures.segmentation_network import SegmentationNetwork
from nnunetv2_smallseg.architectures.tcma import TCMA

__all__ = ["PRESETS", "EnCFBlock", "EnVSSBlock", "S3Mamba", "S3MambaSmall"]

PATCH_SIZE = 4


@dataclass(frozen=True)
class Preset:
    """A size of the network.

    Attributes:
        widths: Channels of the encoder stages.
        depths: Blocks of the encoder stages.
        decoder_depths: Blocks of the decoder stages, deepest first.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    decoder_depths: tuple[int, ...]


PRESETS = {
    "s3mamba": Preset((96, 192, 384, 768), (2, 2, 2, 2), (2, 2, 2, 1)),
    "s3mamba_small": Preset((32, 64, 128, 256), (2, 2, 8, 2), (2, 2, 2, 1)),
}


class EnCFBlock(nn.Module):
    """Enhanced channel feature block: h + h * s(h), s a squeeze-and-excitation over the channels, channel-last.

    Global average, two linear layers with a ReLU between, sigmoid (Hu et al. 2018, arXiv 1709.01507), and the residual
    connection of the paper. The reduction is open; 32 is our choice, see ``docs/networks.md``.

    Args:
        width: Channels C.
        reduction: Hidden width is C / reduction, but at least 8.
    """

    def __init__(self, width: int, reduction: int = 32) -> None:
        super().__init__()
        hidden = max(8, width // reduction)
        self.reduce = nn.Linear(width, hidden)
        self.restore = nn.Linear(hidden, width)
        # The averages are small at first: with zero here, all hidden units of a block can be silent on every image.
        nn.init.constant_(self.reduce.bias, 0.1)
        nn.init.zeros_(self.restore.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        weights = self.restore(self.reduce(x.mean(dim=(1, 2), keepdim=True)).relu()).sigmoid()
        return x + x * weights


class EnVSSBlock(VSSBlock):
    """Enhanced visual state space block: x + DropPath(EnCF(SS2D(LayerNorm(x)))), channel-last.

    Args:
        width: Channels C.
        drop_path: Rate of stochastic depth.
        state_size: States of the scan.
        use_dwconv: Depthwise convolution before the scan, which the paper removes.
        use_encf: Channel attention after the scan. With ``use_dwconv`` and without this it is VMamba's VSS block.
        reduction: See ``EnCFBlock``.
    """

    def __init__(
        self,
        width: int,
        *,
        drop_path: float = 0.0,
        state_size: int = 16,
        use_dwconv: bool = False,
        use_encf: bool = True,
        reduction: int = 32,
    ) -> None:
        super().__init__(width, drop_path=drop_path, state_size=state_size, use_dwconv=use_dwconv)
        self.encf = EnCFBlock(width, reduction) if use_encf else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return x + self.drop_path(self.encf(self.ss2d(self.norm(x))))


class S3MambaDecoder(nn.Module):
    """VM-UNet's decoder, each stage followed by the TCMA of its resolution.

    Args:
        input_channels: Channels of the image.
        num_classes: Channels K of the outputs.
        widths: Channels of the encoder stages.
        depths: Blocks of the decoder stages, deepest first.
        deep_supervision: Return all outputs instead of the first.
        drop_path_rate: Stochastic depth of the first (deepest) block; it falls linearly to 0 in the last.
        state_size: States of the scans.
        block: Makes a block, see ``VSSStage``.
        use_tcma: Modulate the stages; without, the only output is the first.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        widths: Sequence[int],
        depths: Sequence[int],
        deep_supervision: bool,
        *,
        drop_path_rate: float,
        state_size: int,
        block: Callable[..., nn.Module],
        use_tcma: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        rates = np.linspace(drop_path_rate, 0, sum(depths)).tolist()
        firsts = [sum(depths[:stage]) for stage in range(len(depths))]
        self.stages = nn.ModuleList(
            VSSStage(width, rates[first : first + depth], state_size=state_size, block=block)
            for width, depth, first in zip(reversed(widths), depths, firsts, strict=True)
        )
        self.expand_layers = nn.ModuleList(PatchExpanding(2 * width, width, factor=2) for width in widths[-2::-1])
        self.final_expand = PatchExpanding(widths[0], widths[0] // PATCH_SIZE, factor=PATCH_SIZE)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
        strides = [PATCH_SIZE * 2**level for level in range(len(widths))]
        self.tcma = TCMA(input_channels, num_classes, widths, strides) if use_tcma else None
        # A list of one: nnUNetv2_train -pretrained_weights leaves out modules called seg_layers.
        self.seg_layers = nn.ModuleList([nn.Conv2d(widths[0] // PATCH_SIZE, num_classes, kernel_size=1)])

    def forward(self, image: torch.Tensor, skips: Sequence[torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
        """Decodes.

        Args:
            image: (B, C, H, W).
            skips: Channel-last inputs (B, h, w, c) of the encoder stages, at strides 4, 8, 16, 32.
            x: Output of the last encoder stage, (B, H / 32, W / 32, c).
        Returns:
            Logits (B, K, h, w) at stride 1 and, with deep supervision and TCMA, at strides 4, 8, 16, 32.
        """
        pyramid = None if self.tcma is None else self.tcma.pyramid(image)
        auxiliary = []
        for number, stage in enumerate(self.stages):
            level = len(self.stages) - 1 - number
            if number > 0:
                x = self.expand_layers[number - 1](x + skips[level + 1])
            x = stage(x)
            if self.tcma is not None:
                x, logits = self.tcma.seg_layers[level](x, skips[level], *pyramid[level])
                auxiliary.append(logits)
        logits = self.seg_layers[0](self.final_expand(x).permute(0, 3, 1, 2))
        return [logits, *reversed(auxiliary)] if self.deep_supervision else [logits]


class S3Mamba(SegmentationNetwork):
    """S³-Mamba; with ``use_encf`` and ``use_tcma`` off and ``use_dwconv`` on it is VM-UNet.

    Without TCMA there are no auxiliary outputs: deep supervision then gives a list of one, and
    ``deep_supervision_strides`` of the network is (1,).

    Args:
        input_channels: Channels C of the image.
        num_classes: Channels K of the outputs; with regions, the number of regions.
        deep_supervision: Return a list of five outputs instead of one.
        preset: Size of the network, a key of ``PRESETS``; by default the class's own, ``default_preset``.
        use_encf: Channel attention in every block.
        use_tcma: Tensor attention after every decoder stage.
        use_dwconv: Depthwise convolution in every block, which the paper removes.
        widths: Channels of the encoder stages in place of the preset's, each twice the one before.
        depths: Blocks of the encoder stages in place of the preset's.
        decoder_depths: Blocks of the decoder stages in place of the preset's, deepest first.
        encf_reduction: See ``EnCFBlock``.
        drop_path_rate: Stochastic depth of the blocks at the lowest resolution, of encoder and decoder.
        state_size: States N of the selective scans.

    Raises:
        ValueError: If there is no such preset, the first width is no multiple of 4, the widths do not double, or the
            numbers of stages differ.
    """

    stride = 32
    min_size = 64  # four values a channel at the lowest resolution, for the batch norms of TCMA at batch size 1
    deep_supervision_strides = (1, 4, 8, 16, 32)
    default_preset = "s3mamba"

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = True,
        *,
        preset: str | None = None,
        use_encf: bool = True,
        use_tcma: bool = True,
        use_dwconv: bool = False,
        widths: Sequence[int] | None = None,
        depths: Sequence[int] | None = None,
        decoder_depths: Sequence[int] | None = None,
        encf_reduction: int = 32,
        drop_path_rate: float = 0.1,
        state_size: int = 16,
    ) -> None:
        super().__init__(input_channels, num_classes)
        preset = preset or self.default_preset
        if preset not in PRESETS:
            raise ValueError(f"there is no preset '{preset}'; presets are {', '.join(PRESETS)}")
        widths = widths or PRESETS[preset].widths
        depths = depths or PRESETS[preset].depths
        decoder_depths = decoder_depths or PRESETS[preset].decoder_depths
        if len(widths) != 4 or len(decoder_depths) != 4:
            raise ValueError(
                f"widths {tuple(widths)} and decoder_depths {tuple(decoder_depths)} must have four values, one a stage"
            )
        if widths[0] % PATCH_SIZE:
            raise ValueError(f"the first width is {widths[0]}, but must be a multiple of {PATCH_SIZE}")
        if not use_tcma:
            self.deep_supervision_strides = (1,)
        block = functools.partial(EnVSSBlock, use_dwconv=use_dwconv, use_encf=use_encf, reduction=encf_reduction)
        self.encoder = VMambaEncoder(
            input_channels,
            patch_size=PATCH_SIZE,
            widths=widths,
            depths=depths,
            drop_path_rate=drop_path_rate,
            state_size=state_size,
            block=block,
        )
        self.decoder = S3MambaDecoder(
            input_channels,
            num_classes,
            widths,
            decoder_depths,
            deep_supervision,
            drop_path_rate=drop_path_rate,
            state_size=state_size,
            block=block,
            use_tcma=use_tcma,
        )

    def forward_padded(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Logits for an image whose height and width are multiples of the stride and at least 64."""
        stages = self.encoder.forward_stages(image)
        return self.decoder(image, [skip for skip, _ in stages], stages[-1][1])

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """What ImageNet weights fill: patch mergings, and the blocks of encoder and decoder but for channel attention.

        For three channels also the patch embedding. The decoder's blocks start from those of the encoder stage of the
        same width.
        """
        if self.input_channels == 3:
            yield from self.encoder.patch_embed.parameters()
        yield from self.encoder.downsamples.parameters()
        for stage in (*self.encoder.stages, *self.decoder.stages):
            for block in stage.blocks:
                yield from block.norm.parameters()
                yield from block.ss2d.parameters()


class S3MambaSmall(S3Mamba):
    """S³-Mamba of 4.6 million parameters, the paper's number read literally: same arguments, other default preset."""

    default_preset = "s3mamba_small"
