"""Visual state space blocks and the VMamba encoder made of them.

Paper: Liu et al., VMamba: Visual State Space Model, NeurIPS 2024, arXiv 2401.10166. This is its first version
("vanilla": no MLP branch, expansion 2, N = 16, depthwise 3x3 convolution with bias), which Swin-UMamba and others build
on. Facts were read from github.com/MzeroMiko/VMamba (MIT) and github.com/JiarunLiu/Swin-UMamba commit 2c1f72e
(Apache-2.0); the code is our own.

Maps are channel-last, (B, H, W, C), inside the encoder, as in both repositories.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nnunetv2_smallseg.architectures.blocks.drop_path import DropPath
from nnunetv2_smallseg.ops import ss2d

__all__ = ["SS2D", "PatchEmbedding", "PatchExpanding", "PatchMerging", "VMambaEncoder", "VSSBlock", "VSSStage"]

NUM_DIRECTIONS = 4


class SS2D(nn.Module):
    """2D selective scan: the map is read as four sequences, each scanned by a state space model, and summed.

    Args:
        width: Channels C in and out.
        state_size: States N of each channel.
        expansion: Inner width D as a multiple of ``width``.
        use_dwconv: Depthwise 3x3 convolution before the scan; its activation stays without it.
    """

    def __init__(self, width: int, *, state_size: int = 16, expansion: int = 2, use_dwconv: bool = True) -> None:
        super().__init__()
        inner = expansion * width
        rank = math.ceil(width / 16)
        self.rank, self.state_size = rank, state_size
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, kernel_size=3, padding=1, groups=inner) if use_dwconv else None
        self.x_proj_weight = nn.Parameter(torch.empty(NUM_DIRECTIONS, rank + 2 * state_size, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(NUM_DIRECTIONS, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(NUM_DIRECTIONS, inner))
        self.A_logs = nn.Parameter(torch.empty(NUM_DIRECTIONS * inner, state_size))
        self.Ds = nn.Parameter(torch.empty(NUM_DIRECTIONS * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.reset_scan_parameters()

    def reset_scan_parameters(self, dt_min: float = 1e-3, dt_max: float = 0.1, dt_floor: float = 1e-4) -> None:
        """Mamba's initialisation: A = -1..-N in every channel, step sizes log-uniform in [``dt_min``, ``dt_max``]."""
        inner = self.x_proj_weight.shape[-1]
        nn.init.uniform_(self.x_proj_weight, -(inner**-0.5), inner**-0.5)
        nn.init.uniform_(self.dt_projs_weight, -(self.rank**-0.5), self.rank**-0.5)
        nn.init.ones_(self.Ds)
        with torch.no_grad():
            log_dt = torch.empty_like(self.dt_projs_bias).uniform_(math.log(dt_min), math.log(dt_max))
            dt = log_dt.exp().clamp_min(dt_floor)
            self.dt_projs_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
            states = torch.arange(1, self.state_size + 1, dtype=self.A_logs.dtype)
            self.A_logs.copy_(states.log().expand_as(self.A_logs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        x = x.permute(0, 3, 1, 2)  # (B, D, H, W), channels last in memory, as the convolution leaves it
        x = functional.silu(x if self.conv2d is None else self.conv2d(x))
        y = ss2d(
            x.permute(0, 2, 3, 1),
            self.x_proj_weight,
            self.dt_projs_weight,
            self.dt_projs_bias,
            self.A_logs,
            self.Ds,
        )
        return self.out_proj(self.out_norm(y) * functional.silu(gate))


class VSSBlock(nn.Module):
    """Residual block: x + DropPath(SS2D(LayerNorm(x))), channel-last.

    Args:
        width: Channels C.
        drop_path: Rate of stochastic depth.
        state_size: States of the scan.
        use_dwconv: Depthwise convolution before the scan.
    """

    def __init__(self, width: int, *, drop_path: float = 0.0, state_size: int = 16, use_dwconv: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.ss2d = SS2D(width, state_size=state_size, use_dwconv=use_dwconv)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return x + self.drop_path(self.ss2d(self.norm(x)))


class VSSStage(nn.Module):
    """Several VSS blocks of one width.

    Args:
        width: Channels C.
        drop_paths: Rate of stochastic depth, one value a block.
        state_size: States of the scan.
        block: Makes a block from the width and the keywords ``drop_path`` and ``state_size``.
    """

    def __init__(
        self,
        width: int,
        drop_paths: Sequence[float],
        *,
        state_size: int = 16,
        block: Callable[..., nn.Module] = VSSBlock,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(width, drop_path=rate, state_size=state_size) for rate in drop_paths)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing and self.training else block(x)
        return x


class PatchEmbedding(nn.Module):
    """Non-overlapping patches as tokens: convolution with kernel = stride = patch size, then LayerNorm.

    Args:
        input_channels: Channels of the map.
        width: Channels C of the tokens.
        patch_size: Side of a patch in pixels.
    """

    def __init__(self, input_channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(input_channels, width, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, input_channels, H, W) -> (B, H / patch_size, W / patch_size, C)."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Halves the resolution and doubles the width: the four pixels of each 2x2 cell side by side, projected.

    A last odd row or column is dropped, as in VMamba.

    Args:
        width: Channels C in; 2C come out.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H // 2, W // 2, 2C)."""
        x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
        # Order of the checkpoints: rows vary fastest.
        cells = torch.cat((x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]), dim=-1)
        return self.reduction(self.norm(cells))


class PatchExpanding(nn.Module):
    """Raises the resolution: each token is projected and unfolded to ``factor`` x ``factor`` tokens, then LayerNorm.

    Args:
        width: Channels C in.
        output_width: Channels of the new tokens.
        factor: How many times larger height and width become.
    """

    def __init__(self, width: int, output_width: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.expand = nn.Linear(width, factor**2 * output_width, bias=False)
        self.norm = nn.LayerNorm(output_width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, factor * H, factor * W, output_width)."""
        batch, height, width, _ = x.shape
        x = self.expand(x).view(batch, height, width, self.factor, self.factor, -1)
        x = x.transpose(2, 3).reshape(batch, height * self.factor, width * self.factor, -1)
        return self.norm(x)


class VMambaEncoder(nn.Module):
    """VMamba without its classification head: a feature map from every stage.

    Args:
        input_channels: Channels of the map it reads.
        patch_size: Side of the patches of its patch embedding.
        widths: Channels of the stages.
        depths: Blocks of the stages.
        drop_path_rate: Rate of stochastic depth in the last block; it rises linearly from 0 in the first.
        state_size: States of the scans.
        block: Makes a block of a stage, see ``VSSStage``.

    Raises:
        ValueError: If ``widths`` do not double from stage to stage or ``depths`` has another length.
    """

    def __init__(
        self,
        input_channels: int,
        *,
        patch_size: int = 4,
        widths: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 9, 2),
        drop_path_rate: float = 0.2,
        state_size: int = 16,
        block: Callable[..., nn.Module] = VSSBlock,
    ) -> None:
        super().__init__()
        if len(widths) != len(depths):
            raise ValueError(f"widths {tuple(widths)} and depths {tuple(depths)} must have one value for each stage")
        if any(deep != 2 * shallow for shallow, deep in itertools.pairwise(widths)):
            raise ValueError(f"widths are {tuple(widths)}, but patch merging doubles them from stage to stage")
        rates = np.linspace(0, drop_path_rate, sum(depths)).tolist()
        firsts = [sum(depths[:stage]) for stage in range(len(depths))]
        self.patch_embed = PatchEmbedding(input_channels, widths[0], patch_size)
        self.stages = nn.ModuleList(
            VSSStage(width, rates[first : first + depth], state_size=state_size, block=block)
            for width, depth, first in zip(widths, depths, firsts, strict=True)
        )
        self.downsamples = nn.ModuleList(PatchMerging(width) for width in widths[:-1])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, input_channels, H, W) -> one (B, h, w, C) a stage, at strides p, 2p, 4p, 8p for patch size p."""
        return [output for _, output in self.forward_stages(x)]

    def forward_stages(self, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """As ``forward``, with the input of each stage before its output: both (B, h, w, C)."""
        stages = []
        for level, stage in enumerate(self.stages):
            x = self.patch_embed(x) if level == 0 else self.downsamples[level - 1](x)
            stages.append((x, stage(x)))
            x = stages[-1][1]
        return stages

    def block_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of all stages and patch mergings: everything but the patch embedding."""
        yield from self.stages.parameters()
        yield from self.downsamples.parameters()
