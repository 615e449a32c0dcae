"""ResNet with bottleneck blocks as an encoder, under torchvision's names, so that its weight files map by name.

Paper: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv 1512.03385. As in torchvision, the
stride of a block sits on its 3x3 convolution ("v1.5"). Written here because importing torchvision takes longer than
importing torch, in every worker process of nnU-Net.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from nnunetv2_smallseg.architectures.blocks.batch_norm import GuardedBatchNorm2d
from nnunetv2_smallseg.architectures.blocks.checkpointing import checkpointed

__all__ = ["Bottleneck", "ResNetEncoder"]


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution with batch normalisation, around a shortcut.

    Args:
        input_channels: Channels in.
        width: Channels of the 3x3 convolution; a quarter of the channels out.
        stride: Stride of the 3x3 convolution and of the shortcut.
        norm_epsilon: Term that keeps the denominator of the normalisations from 0.
    """

    expansion = 4

    def __init__(self, input_channels: int, width: int, stride: int = 1, norm_epsilon: float = 1e-5) -> None:
        super().__init__()
        output_channels = self.expansion * width
        norm = partial(GuardedBatchNorm2d, eps=norm_epsilon)
        self.conv1 = nn.Conv2d(input_channels, width, kernel_size=1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, output_channels, kernel_size=1, bias=False)
        self.bn3 = norm(output_channels)
        self.downsample = (
            nn.Sequential(
                nn.Conv2d(input_channels, output_channels, kernel_size=1, stride=stride, bias=False),
                norm(output_channels),
            )
            if stride != 1 or input_channels != output_channels
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, input_channels, H, W) -> (B, 4 width, ceil(H / stride), ceil(W / stride))."""
        residual = functional.relu(self.bn1(self.conv1(x)))
        residual = functional.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        shortcut = x if self.downsample is None else self.downsample(x)
        return functional.relu(residual + shortcut)


class ResNetEncoder(nn.Module):
    """ResNet without pooling and classifier; ResNet-50 by default.

    Args:
        input_channels: Channels of the image.
        width: Channels w of the stem.
        depths: Blocks of each layer; fewer than four layers leave the last ones out.
        norm_epsilon: Epsilon of the batch normalisations; torchvision's networks have 1e-5.

    Attributes:
        channels: Channels of the maps that ``forward`` returns: w, 4w, 8w, 16w, 32w.
        grad_checkpointing: Whether the activations of the blocks are computed again in the backward pass.
    """

    def __init__(
        self,
        input_channels: int,
        width: int = 64,
        depths: Sequence[int] = (3, 4, 6, 3),
        norm_epsilon: float = 1e-5,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.num_layers = len(depths)
        self.channels = (width, *(Bottleneck.expansion * width * 2**layer for layer in range(self.num_layers)))
        self.conv1 = nn.Conv2d(input_channels, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = GuardedBatchNorm2d(width, eps=norm_epsilon)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        for layer, depth in enumerate(depths):
            blocks = []
            for block in range(depth):
                channels = self.channels[layer] if block == 0 else self.channels[layer + 1]
                stride = 2 if layer > 0 and block == 0 else 1
                blocks.append(Bottleneck(channels, width * 2**layer, stride, norm_epsilon))
            setattr(self, f"layer{layer + 1}", nn.Sequential(*blocks))

    @property
    def layers(self) -> Iterator[nn.Sequential]:
        """The layers in order."""
        return (getattr(self, f"layer{number}") for number in range(1, self.num_layers + 1))

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """(B, input_channels, H, W) -> maps at strides 2 (stem), 4, 8, 16, 32 (layers).

        Inside autocast the encoder keeps the precision of its weights; only the maps it returns are in autocast's.
        Batch normalisation over few values (at stride 16, a patch of 32x32 has four a channel) makes the gradient grow
        from block to block on its way back, a thousandfold over the depth of ResNet-50. Normalisations that make up
        for an image of low contrast add to that. The gradients of the first layers' weights then pass 65504, where
        float16 ends, while those of the rest of the network are small, so that scaling the loss would not help.
        """
        device = image.device.type
        # Autocast knows no meta device, on which shapes are computed.
        with nullcontext() if image.is_meta else torch.autocast(device, enabled=False):
            x = functional.relu(self.bn1(self.conv1(image.to(self.conv1.weight.dtype))))
            features = [x]
            x = self.maxpool(x)
            for layer in self.layers:
                for block in layer:
                    x = self._run(block, x)
                features.append(x)
        if not image.is_meta and torch.is_autocast_enabled(device):
            features = [feature.to(torch.get_autocast_dtype(device)) for feature in features]
        return features

    def _run(self, block: Bottleneck, x: torch.Tensor) -> torch.Tensor:
        return checkpointed(block, x) if self.grad_checkpointing and self.training else block(x)
