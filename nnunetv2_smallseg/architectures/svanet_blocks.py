"""Blocks of SvANet: Monte Carlo attention, AssemFormer, guidance with scale-variant attention, ASPP, decoder step.

Paper and official code: see ``svanet.py``. All random draws come from torch's generators on the device of the data and
stay tensors: they repeat with a seed and under activation checkpointing, and ``torch.compile`` traces them.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

from nnunetv2_smallseg.architectures.blocks.batch_norm import GuardedBatchNorm2d
from nnunetv2_smallseg.architectures.blocks.checkpointing import checkpointed
from nnunetv2_smallseg.architectures.blocks.drop_path import DropPath

__all__ = [
    "ASPP",
    "UNIT_NORM_EPSILON",
    "AssemFormer",
    "ConvUnit",
    "DecoderStep",
    "GuidanceBranch",
    "MonteCarloAttention",
    "Neck",
    "UpLink",
]

# Epsilon of every batch normalisation that follows a convolution, also in the encoder; those of the AssemFormer's
# attention blocks have PyTorch's 1e-5.
UNIT_NORM_EPSILON = 1e-3


def at_least_single(x: torch.Tensor) -> torch.Tensor:
    """Half precision as float32, other types as they are: means over many pixels need the digits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class ConvUnit(nn.Module):
    """Convolution without bias, batch normalisation and, unless told otherwise, ReLU.

    Args:
        input_channels: Channels in.
        output_channels: Channels out.
        kernel_size: Size of the kernel; the map is padded so that stride 1 keeps its size.
        stride: Stride of the convolution.
        dilation: Dilation of the convolution.
        groups: Groups of the convolution.
        activation: Module after the normalisation, or None.
    """

    def __init__(
        self,
        input_channels: int,
        output_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        activation: type[nn.Module] | None = nn.ReLU,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            input_channels,
            output_channels,
            kernel_size,
            stride=stride,
            padding=(kernel_size - 1) // 2 * dilation,
            dilation=dilation,
            groups=groups,
            bias=False,
        )
        self.norm = GuardedBatchNorm2d(output_channels, eps=UNIT_NORM_EPSILON)
        self.activation = nn.Identity() if activation is None else activation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, input_channels, H, W) -> (B, output_channels, ceil(H / stride), ceil(W / stride))."""
        return self.activation(self.norm(self.conv(x)))


class MonteCarloAttention(nn.Module):
    """MCAttn: a gate for every channel, computed in training from the mean over a random subset of the pixels.

    Each step draws k from {1, 2, 3}, shuffles all pixels, pools them to k x k cells and keeps one cell, the same for
    all samples and channels; evaluation takes the mean over all pixels. The paper describes cells of the map itself;
    the released code shuffles first, so that a cell is no place but a random 1 / k^2 of the pixels. The weighted mean
    here is that of the code, without moving the map's pixels.

    Args:
        channels: Channels of the map.
    """

    largest_grid = 3
    cells_lcm = 36  # least common multiple of 1, 4 and 9 cells

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(32, self._rounded_to_eight(channels // 4))
        self.squeeze = nn.Conv2d(channels, hidden, kernel_size=1)
        self.excite = nn.Conv2d(hidden, channels, kernel_size=1)

    @staticmethod
    def _rounded_to_eight(value: int) -> int:
        """The multiple of eight that is nearest, but at least eight and not less than nine tenths of ``value``."""
        rounded = max(8, (value + 4) // 8 * 8)
        return rounded if rounded >= 0.9 * value else rounded + 8

    def draw(self, num_pixels: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One step's choices.

        Args:
            num_pixels: Pixels of the map.
            device: Where to draw.
        Returns:
            Grid size k and index of the cell, integers without axes, and a permutation (num_pixels,): pixel p of the
            shuffled map is pixel ``permutation[p]`` of the map.
        """
        grid = torch.randint(1, self.largest_grid + 1, (), device=device)
        cell = torch.randint(self.cells_lcm, (), device=device) % (grid * grid)
        return grid, cell, torch.randperm(num_pixels, device=device)

    def pixel_weights(self, height: int, width: int, device: torch.device) -> torch.Tensor:
        """Which pixels this step's mean is over: (H, W), 1 for those of the drawn cell and 0 for the others."""
        grid, cell, permutation = self.draw(height * width, device)

        def in_bin(size: int, index: torch.Tensor) -> torch.Tensor:
            # Bin i of adaptive average pooling: from floor(i size / k) to ceil((i + 1) size / k).
            position = torch.arange(size, device=device)
            return (position >= index * size // grid) & (position < ((index + 1) * size + grid - 1) // grid)

        inside = in_bin(height, cell // grid)[:, None] & in_bin(width, cell % grid)
        inside = inside.flatten()
        return torch.zeros_like(inside).scatter(0, permutation, inside).unflatten(0, (height, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels, H, W) -> (B, channels, H, W)."""
        pixels = at_least_single(x)
        if self.training:
            weights = self.pixel_weights(x.shape[2], x.shape[3], x.device).to(pixels.dtype)
            mean = (pixels * (weights / weights.sum())).sum((2, 3), keepdim=True)
        else:
            mean = pixels.mean((2, 3), keepdim=True)
        return x * self.excite(functional.relu(self.squeeze(mean.to(x.dtype)))).sigmoid()


class SeparableAttentionBlock(nn.Module):
    """Separable self-attention of MobileViT v2 (arXiv 2206.02680) and a feed-forward part, both residual.

    A softmax over the patches weighs the keys into one context vector, which gates the values: linear in the number
    of patches.

    Args:
        channels: Channels D.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention_norm = GuardedBatchNorm2d(channels)
        self.score_key_value = nn.Conv2d(channels, 1 + 2 * channels, kernel_size=1)
        self.attention_out = nn.Conv2d(channels, channels, kernel_size=1)
        self.feed_forward_norm = GuardedBatchNorm2d(channels)
        self.feed_forward_in = nn.Conv2d(channels, 2 * channels, kernel_size=1)
        self.feed_forward_out = nn.Conv2d(2 * channels, channels, kernel_size=1)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(B, D, 4, N) -> (B, D, 4, N), for N patches of 4 pixels."""
        channels = patches.shape[1]
        score, key, value = self.score_key_value(self.attention_norm(patches)).split((1, channels, channels), dim=1)
        context = (key * score.softmax(dim=-1)).sum(dim=-1, keepdim=True)
        patches = patches + self.attention_out(functional.relu(value) * context)
        hidden = functional.silu(self.feed_forward_in(self.feed_forward_norm(patches)))
        return patches + self.feed_forward_out(hidden)


class AssemFormer(nn.Module):
    """Convolution and separable attention between 2x2 patches, concatenated and added to the input.

    Args:
        channels: Channels C of the map, an even number; attention works on C / 2.
    """

    patch_size = 2
    depth = 2

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // 2
        self.local = ConvUnit(channels, channels, 3, activation=nn.SiLU)
        self.reduce = nn.Conv2d(channels, inner, kernel_size=1, bias=False)
        self.blocks = nn.Sequential(*(SeparableAttentionBlock(inner) for _ in range(self.depth)))
        self.norm = GuardedBatchNorm2d(inner)
        self.project = ConvUnit(2 * inner, channels, 1, activation=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W). A last row or column outside all patches is 0 in the attention's map."""
        local = self.reduce(self.local(x))
        p, (height, width) = self.patch_size, (x.shape[2] // self.patch_size, x.shape[3] // self.patch_size)
        # (B, D, H, W) -> (B, D, H/2, 2, W/2, 2) -> (B, D, 4, N): pixel within the patch, patch
        patches = local[..., : p * height, : p * width].unflatten(3, (width, p)).unflatten(2, (height, p))
        patches = self.norm(self.blocks(patches.permute(0, 1, 3, 5, 2, 4).flatten(4, 5).flatten(2, 3)))
        folded = patches.unflatten(3, (height, width)).unflatten(2, (p, p)).permute(0, 1, 4, 2, 5, 3)
        folded = folded.flatten(4, 5).flatten(2, 3)
        folded = functional.pad(folded, (0, x.shape[3] - p * width, 0, x.shape[2] - p * height))
        return x + self.project(torch.cat((folded, local), dim=1))


class Neck(nn.Module):
    """MCBottleneck: widening residual block with Monte Carlo attention, then an AssemFormer.

    Args:
        channels: Channels C in and out; 2C inside.

    Attributes:
        grad_checkpointing: Whether the activations are computed again in the backward pass.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.bottleneck = nn.Sequential(
            ConvUnit(channels, 2 * channels, 1),
            ConvUnit(2 * channels, 2 * channels, 3),
            MonteCarloAttention(2 * channels),
            ConvUnit(2 * channels, channels, 1, activation=None),
        )
        self.former = AssemFormer(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if self.grad_checkpointing and self.training:
            return checkpointed(self.former, x + checkpointed(self.bottleneck, x))
        return self.former(x + self.bottleneck(x))


class GuidanceBranch(nn.Module):
    """Guidance from one stage to a deeper one: strided convolutions under the gate of scale-variant attention.

    SvAttn pools the source and the result of every step (n + 1 scales) to a grid and squeezes each to the target's
    channels. Evaluation averages over scales and cells. In training every cell is seen at one scale only: the cells'
    scales are shuffled each step, and the sum over scales is averaged over the cells, which has the same expectation.
    A sigmoid of that vector gates the channels of the last step.

    With ``design_size`` the grid is fixed and square, and each cell's scale is drawn once, at construction, as in the
    released code; here it is a buffer and thus part of the state dict. Without it the grid follows the map, a quarter
    of its height and width, and the cells' scales are drawn anew in every step.

    Args:
        input_channels: Channels of the source stage.
        output_channels: Channels of the target stage.
        source_stage: Number s of the source; its stride is 2^s.
        target_stage: Number t of the target, larger than s.
        design_size: Image size S that sets the grid to max(4, S / 2^t / 4) cells a side, or None.
        drop_path_rate: Stochastic depth of the branch.
    """

    smallest_grid = 4

    def __init__(
        self,
        input_channels: int,
        output_channels: int,
        source_stage: int,
        target_stage: int,
        design_size: int | None,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        num_steps = target_stage - source_stage
        widths = (input_channels,) * num_steps + (output_channels,)
        self.steps = nn.ModuleList(
            nn.Sequential(ConvUnit(before, after, 3, stride=2), ConvUnit(after, after, 1))
            for before, after in pairwise(widths)
        )
        self.squeezes = nn.ModuleList(nn.Conv2d(width, output_channels, kernel_size=1) for width in widths)
        self.drop_path = DropPath(drop_path_rate)
        cell_scales = None
        if design_size is not None:
            side = self._cells(design_size // 2**target_stage)
            cell_scales = torch.randint(len(widths), (side, side))
        self.register_buffer("cell_scales", cell_scales)

    def _cells(self, size: int) -> int:
        return max(self.smallest_grid, size // 4)

    def draw_cell_scales(self, grid: tuple[int, int], device: torch.device) -> torch.Tensor:
        """This step's scale of every cell, integers from 0 (the source) to n, (grid height, grid width)."""
        num_scales = len(self.squeezes)
        if self.cell_scales is None:
            return torch.randint(num_scales, grid, device=device)
        shuffled = self.cell_scales.flatten()[torch.randperm(self.cell_scales.numel(), device=device)]
        return torch.randperm(num_scales, device=device)[shuffled].unflatten(0, grid)

    def gate(self, scales: Sequence[torch.Tensor]) -> torch.Tensor:
        """Maps of n + 1 scales, (B, C_i, H_i, W_i) -> (B, output_channels, 1, 1) in (0, 1)."""
        height, width = scales[-1].shape[-2:]
        grid = (self._cells(height), self._cells(width)) if self.cell_scales is None else self.cell_scales.shape
        num_cells = grid[0] * grid[1]
        cell_scales = self.draw_cell_scales(tuple(grid), scales[0].device) if self.training else None
        total = 0.0
        for index, (scale, squeeze) in enumerate(zip(scales, self.squeezes, strict=True)):
            pooled = at_least_single(functional.adaptive_avg_pool2d(scale, grid))
            if cell_scales is None:
                share = pooled.new_full(grid, 1 / (num_cells * len(scales)))
            else:
                share = (cell_scales == index).to(pooled.dtype) / num_cells
            # The squeeze is linear: averaging its input gives the mean of its output at 1 / num_cells of the cost.
            mean = (pooled * share).sum((2, 3), keepdim=True).to(scale.dtype)
            total = total + functional.conv2d(mean, squeeze.weight) + squeeze.bias[:, None, None] * share.sum()
        return total.sigmoid()

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        """(B, input_channels, H, W) -> (B, output_channels, H / 2^n, W / 2^n) for n = t - s steps."""
        scales = [source]
        for step in self.steps:
            scales.append(step(scales[-1]))
        return self.drop_path(scales[-1] * self.gate(scales))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling of DeepLab v3 (arXiv 1706.05587): five views of the deepest map.

    Args:
        input_channels: Channels in.
        output_channels: Channels of each branch and of the output.
        dropout: Share of the output's channels that are dropped in training.
    """

    dilations = (12, 24, 36)

    def __init__(self, input_channels: int, output_channels: int, dropout: float = 0.1) -> None:
        super().__init__()
        unit = partial(ConvUnit, input_channels, output_channels)
        self.branches = nn.ModuleList((unit(1), *(unit(3, dilation=dilation) for dilation in self.dilations)))
        self.pooled_branch = unit(1)
        self.project = ConvUnit((len(self.branches) + 1) * output_channels, output_channels, 1)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, input_channels, H, W) -> (B, output_channels, H, W)."""
        views = [branch(x) for branch in self.branches]
        views.append(self.pooled_branch(x.mean((2, 3), keepdim=True)).expand_as(views[0]))
        return self.dropout(self.project(torch.cat(views, dim=1)))


class UpLink(nn.Module):
    """Twice the size: 1x1 to a quarter of the channels, 3x3 transposed convolution, 1x1 to the output's channels.

    Args:
        input_channels: Channels in, a multiple of four.
        output_channels: Channels out.
    """

    def __init__(self, input_channels: int, output_channels: int) -> None:
        super().__init__()
        inner = input_channels // 4
        self.reduce = ConvUnit(input_channels, inner, 1)
        self.upsample = nn.ConvTranspose2d(
            inner, inner, kernel_size=3, stride=2, padding=1, output_padding=1, bias=False
        )
        self.norm = GuardedBatchNorm2d(inner, eps=UNIT_NORM_EPSILON)
        self.restore = ConvUnit(inner, output_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, input_channels, H, W) -> (B, output_channels, 2H, 2W)."""
        return self.restore(functional.relu(self.norm(self.upsample(self.reduce(x)))))


class DecoderStep(nn.Module):
    """Up-link, fusion with the skip, AssemFormer.

    Args:
        input_channels: Channels from below.
        output_channels: Channels C of the skip and of the output.
        grouped: Fuse with C groups of two channels, as the paper's parameter count demands; else densely.

    Attributes:
        grad_checkpointing: Whether the activations are computed again in the backward pass.
    """

    def __init__(self, input_channels: int, output_channels: int, grouped: bool) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.up = UpLink(input_channels, output_channels)
        self.fuse = nn.Sequential(
            ConvUnit(2 * output_channels, output_channels, 3, groups=output_channels if grouped else 1),
            ConvUnit(output_channels, output_channels, 1),
        )
        self.former = AssemFormer(output_channels)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """(B, input_channels, h, w) and (B, C, 2h, 2w) -> (B, C, 2h, 2w)."""
        if self.grad_checkpointing and self.training:
            fused = checkpointed(self.fuse, torch.cat((checkpointed(self.up, x), skip), dim=1))
            return checkpointed(self.former, fused)
        return self.former(self.fuse(torch.cat((self.up(x), skip), dim=1)))
