"""HUNet, AHNet and Mamba-AHNet, with and without reconstruction of the image.

Paper: Sanjid et al., Optimizing Universal Lesion Segmentation: State Space Model-Guided Hierarchical Networks with
Feature Importance Adjustment, arXiv 2404.17235. The authors released no code, neither for this paper nor for the two
it builds on (HUNet, SSRN 4725376; Mamba-HUNet, arXiv 2403.17432), and the paper states no width, depth, parameter
count or loss. This is a family of networks that follows its text, not a reconstruction of a known network;
``docs/networks.md`` lists what was decided here. AHNet is the paper's "Advanced Hierarchical Network"; it has nothing
in common with the 3D Anisotropic Hybrid Network of the same abbreviation (MONAI's ``AHNet``).

Where the paper contradicts itself:

- Algorithms 1 and 2 compute the attention and never use it; here the gated map is concatenated with the skip.
- Algorithm 2, the "residual" block, adds nothing; here it is the residual block that section IV-D describes.
- Algorithm 4 reconstructs the image by a softmax over classes at 1/16 of its size; here a decoder of its own (section
  IV-E) ends in a linear 3x3 convolution.
- Equations 2 to 4 hold for state space models that do not depend on their input; the scan here is Mamba's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partialmethod

import torch
from torch import nn
from torch.nn import functional

from nnunetv2_smallseg.architectures.blocks.batch_norm import GuardedBatchNorm2d
from nnunetv2_smallseg.architectures.blocks.checkpointing import checkpointed
from nnunetv2_smallseg.architectures.blocks.vss import SS2D
from nnunetv2_smallseg.architectures.segmentation_network import SegmentationNetwork

__all__ = ["AHNet", "AHNetRecon", "HUNet", "MambaAHNet", "MambaAHNetRecon"]

NUM_LEVELS = 5


def convolution(input_channels: int, output_channels: int, kernel_size: int) -> nn.Sequential:
    """Convolution that keeps the size, without bias, and batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(input_channels, output_channels, kernel_size, padding=kernel_size // 2, bias=False),
        GuardedBatchNorm2d(output_channels),
    )


class AttentionGate(nn.Module):
    """Weights every pixel of a map by how well it agrees with another map (Algorithm 3).

    As in Algorithm 1, the upsampled map is gated and the skip is the context; Attention U-Net does it the other way.

    Args:
        width: Channels of the map to gate.
        context_channels: Channels of the context.
    """

    def __init__(self, width: int, context_channels: int) -> None:
        super().__init__()
        self.theta = convolution(width, width // 2, kernel_size=1)
        self.phi = convolution(context_channels, width // 2, kernel_size=1)
        self.psi = convolution(width // 2, 1, kernel_size=1)

    def attention(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """(B, width, H, W) and (B, context_channels, H, W) -> (B, 1, H, W) in (0, 1)."""
        return self.psi(functional.relu(self.theta(x) + self.phi(context))).sigmoid()

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """(B, width, H, W) and (B, context_channels, H, W) -> (B, width, H, W)."""
        return x * self.attention(x, context)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, added to their input (section IV-D).

    Args:
        width: Channels in and out.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = convolution(width, width, kernel_size=3)
        self.conv2 = convolution(width, width, kernel_size=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, width, H, W) -> (B, width, H, W)."""
        return functional.relu(x + self.conv2(functional.relu(self.conv1(x))))


class VMLayer(nn.Module):
    """Selective scan with a learned shortcut, then a projection without one (equations 5 to 7).

    Args:
        width: Channels in and out.
        state_size: States N of the scan.
    """

    def __init__(self, width: int, *, state_size: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.ss2d = SS2D(width, state_size=state_size)
        self.shortcut_scale = nn.Parameter(torch.ones(width))
        self.projection_norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, width, H, W) -> (B, width, H, W)."""
        x = x.permute(0, 2, 3, 1)
        x = self.ss2d(self.norm(x)) + self.shortcut_scale * x  # eq. 5
        return self.projection(self.projection_norm(x)).permute(0, 3, 1, 2)  # eq. 6


class EncoderLevel(nn.Module):
    """Two 3x3 convolutions, each with batch normalisation and ReLU.

    Args:
        input_channels: Channels in.
        width: Channels out.
    """

    def __init__(self, input_channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = convolution(input_channels, width, kernel_size=3)
        self.conv2 = convolution(width, width, kernel_size=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, input_channels, H, W) -> (B, width, H, W)."""
        return functional.relu(self.conv2(functional.relu(self.conv1(x))))


class DecoderLevel(nn.Module):
    """Doubles the resolution: transposed convolution, gate, concatenation, convolution, residual block, VM layer.

    Args:
        input_channels: Channels from below.
        skip_channels: Channels of the skip; 0 for a level without one, which then has no gate either.
        width: Channels out.
        gate: Gate the upsampled map with the skip as context before they are concatenated.
        residual: Refine the fused map by a residual block.
        mamba: End with a VM layer.
        state_size: States N of its scan.
    """

    def __init__(
        self,
        input_channels: int,
        skip_channels: int,
        width: int,
        *,
        gate: bool,
        residual: bool,
        mamba: bool = False,
        state_size: int = 16,
    ) -> None:
        super().__init__()
        self.upsample = nn.Sequential(
            nn.ConvTranspose2d(input_channels, width, kernel_size=2, stride=2, bias=False), GuardedBatchNorm2d(width)
        )
        self.gate = AttentionGate(width, skip_channels) if gate and skip_channels else None
        self.fuse = convolution(width + skip_channels, width, kernel_size=3)
        self.residual = ResidualBlock(width) if residual else None
        self.vm_layer = VMLayer(width, state_size=state_size) if mamba else None

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        """(B, input_channels, h, w) and (B, skip_channels, 2h, 2w) -> (B, width, 2h, 2w)."""
        x = functional.relu(self.upsample(x))
        if skip is not None:
            gated = x if self.gate is None else self.gate(x, skip)
            x = torch.cat((gated, skip), dim=1)
        x = functional.relu(self.fuse(x))
        if self.residual is not None:
            x = self.residual(x)
        return x if self.vm_layer is None else self.vm_layer(x)


class LevelStack(nn.Module):
    """Levels of an encoder or decoder, whose activations may be computed again in the backward pass.

    Args:
        levels: The levels, in the order in which they run.
    """

    def __init__(self, levels: Sequence[nn.Module]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self.grad_checkpointing = False

    def run_level(self, level: nn.Module, *inputs: torch.Tensor | None) -> torch.Tensor:
        """Runs one of the levels."""
        return checkpointed(level, *inputs) if self.grad_checkpointing and self.training else level(*inputs)


class Encoder(LevelStack):
    """Convolutions at five resolutions, with 2x2 max-pooling between them.

    Args:
        input_channels: Channels of the image.
        widths: Channels of the levels.
    """

    def __init__(self, input_channels: int, widths: Sequence[int]) -> None:
        super().__init__(
            [EncoderLevel(above, here) for above, here in zip((input_channels, *widths[:-1]), widths, strict=True)]
        )

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """(B, C, H, W) -> one (B, width, h, w) a level, at strides 1, 2, 4, 8, 16."""
        features = [self.run_level(self.levels[0], image)]
        for level in self.levels[1:]:
            features.append(self.run_level(level, functional.max_pool2d(features[-1], 2)))
        return features


class SegmentationDecoder(LevelStack):
    """Decoder with a head at every level: the "hierarchical upsampling" of HUNet.

    All heads are built whatever ``deep_supervision`` is: nnU-Net predicts with a network built without it, into which
    the weights of one trained with it must fit.

    Args:
        num_classes: Channels K of the outputs.
        widths: Channels of the encoder levels; the decoder has the same.
        deep_supervision: Return all outputs instead of the first.
        vm_levels: Levels that end with a VM layer, 0 at full resolution.
        options: Options of every ``DecoderLevel``.
    """

    def __init__(
        self, num_classes: int, widths: Sequence[int], deep_supervision: bool, *, vm_levels: Sequence[int], **options
    ) -> None:
        deep_to_shallow = range(len(widths) - 2, -1, -1)
        super().__init__(
            [
                DecoderLevel(widths[level + 1], widths[level], widths[level], mamba=level in vm_levels, **options)
                for level in deep_to_shallow
            ]
        )
        self.deep_supervision = deep_supervision
        self.seg_layers = nn.ModuleList(nn.Conv2d(width, num_classes, kernel_size=1) for width in widths[:-1])

    def forward(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Maps of the encoder -> logits (B, K, h, w) at strides 1, 2, 4, 8; at 1 only without deep supervision."""
        *skips, x = features
        maps = []
        for level, skip in zip(self.levels, reversed(skips), strict=True):
            x = self.run_level(level, x, skip)
            maps.append(x)
        num_outputs = len(self.seg_layers) if self.deep_supervision else 1
        return [head(maps[-1 - level]) for level, head in enumerate(self.seg_layers[:num_outputs])]


class ReconstructionDecoder(LevelStack):
    """Recreates the image from the encoder's maps (section IV-E), with half the widths of the segmentation decoder.

    The level at full resolution has no skip: through it the image could be copied, and the task would teach the
    encoder nothing.

    Args:
        output_channels: Channels of the image.
        widths: Channels of the encoder levels.
        gate: See ``DecoderLevel``.
        residual: See ``DecoderLevel``.
    """

    def __init__(self, output_channels: int, widths: Sequence[int], *, gate: bool, residual: bool) -> None:
        own_widths = [width // 2 for width in widths[:-1]]
        below = [*own_widths[1:], widths[-1]]
        skips = [0, *widths[1:-1]]
        levels = [
            DecoderLevel(deep, skip, here, gate=gate, residual=residual)
            for deep, skip, here in zip(below, skips, own_widths, strict=True)
        ]
        super().__init__(levels[::-1])
        # Linear: the image is normalised to zero mean and unit variance, and its values are not bounded.
        self.output = nn.Conv2d(own_widths[0], output_channels, kernel_size=3, padding=1)

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Maps of the encoder -> reconstruction (B, C, H, W)."""
        *skips, x = features
        for level, skip in zip(self.levels, (*reversed(skips[1:]), None), strict=True):
            x = self.run_level(level, x, skip)
        return self.output(x)


class MambaAHNet(SegmentationNetwork):
    """Mamba-AHNet, and by its switches the four other rows of the paper's tables.

    U-Net with five levels; each decoder level has an attention gate, a residual block and a VM layer. Whether the
    reconstruction of the image is computed depends on the network's mode: in training mode ``forward`` returns it
    beside the segmentation, in evaluation mode never.

    Args:
        input_channels: Channels C of the image.
        num_classes: Channels K of the outputs.
        deep_supervision: Return a list of four outputs instead of one.
        gate: Attention gates in the decoders.
        residual: Residual blocks in the decoders.
        mamba: VM layers in the segmentation decoder.
        reconstruction: A branch that reconstructs the image, in training mode only.
        reconstruction_weight: Weight (beta) that the loss gives to the reconstruction; trainers read it from here. 0
            builds no branch.
        base_channels: Channels at full resolution, an even number; they double from level to level.
        vm_full_resolution: A VM layer at full resolution too; it would take most of the time of all scans.
        state_size: States N of the selective scans.

    Raises:
        ValueError: If ``base_channels`` is odd or below 2, or ``reconstruction_weight`` is negative.
    """

    stride = 2 ** (NUM_LEVELS - 1)
    deep_supervision_strides = (1, 2, 4, 8)

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = True,
        *,
        gate: bool = True,
        residual: bool = True,
        mamba: bool = True,
        reconstruction: bool = False,
        reconstruction_weight: float = 0.1,
        base_channels: int = 32,
        vm_full_resolution: bool = False,
        state_size: int = 16,
    ) -> None:
        super().__init__(input_channels, num_classes)
        if base_channels < 2 or base_channels % 2:
            raise ValueError(f"base_channels is {base_channels}, but must be an even number from 2: gates halve it")
        if reconstruction_weight < 0:
            raise ValueError(
                f"reconstruction_weight is {reconstruction_weight}, but must be positive, or 0 for no reconstruction"
            )
        widths = [base_channels * 2**level for level in range(NUM_LEVELS)]
        vm_levels = range(0 if vm_full_resolution else 1, NUM_LEVELS - 1) if mamba else ()
        self.encoder = Encoder(input_channels, widths)
        self.decoder = SegmentationDecoder(
            num_classes,
            widths,
            deep_supervision,
            vm_levels=vm_levels,
            gate=gate,
            residual=residual,
            state_size=state_size,
        )
        self.reconstruction_weight = reconstruction_weight
        self.reconstruction = (
            ReconstructionDecoder(input_channels, widths, gate=gate, residual=residual)
            if reconstruction and reconstruction_weight
            else None
        )

    def forward_padded(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Logits for an image whose height and width are multiples of the stride."""
        return self.decoder(self.encoder(image))

    def forward(
        self, image: torch.Tensor
    ) -> torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor | list[torch.Tensor], torch.Tensor]:
        """Segments, and in training mode also reconstructs the image if the network has the branch for it.

        Args:
            image: (B, C, H, W), any height and width.
        Returns:
            The segmentation as ``SegmentationNetwork.forward`` gives it; in training mode with reconstruction the
            pair of it and of the reconstruction (B, C, H, W).
        Raises:
            ValueError: If ``image`` has another number of axes or channels.
        """
        if self.reconstruction is None or not self.training:
            return super().forward(image)
        features = self.encoder(self.pad_image(image))
        height, width = image.shape[-2:]
        return self.crop_outputs(self.decoder(features), image), self.reconstruction(features)[..., :height, :width]

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the encoder; no pretrained weights exist for them."""
        return self.encoder.parameters()


class HUNet(MambaAHNet):
    """The paper's base line: no gate, no residual block, no VM layer. Arguments as for ``MambaAHNet``."""

    __init__ = partialmethod(MambaAHNet.__init__, gate=False, residual=False, mamba=False)


class AHNet(MambaAHNet):
    """HUNet with attention gates and residual blocks. Arguments as for ``MambaAHNet``."""

    __init__ = partialmethod(MambaAHNet.__init__, mamba=False)


class AHNetRecon(MambaAHNet):
    """AHNet with the reconstruction branch. Arguments as for ``MambaAHNet``."""

    __init__ = partialmethod(MambaAHNet.__init__, mamba=False, reconstruction=True)


class MambaAHNetRecon(MambaAHNet):
    """Mamba-AHNet with the reconstruction branch. Arguments as for ``MambaAHNet``."""

    __init__ = partialmethod(MambaAHNet.__init__, reconstruction=True)
