"""Stochastic depth (Huang et al. 2016, arXiv 1603.09382).

timm and torchvision have it too, but importing either takes longer than importing torch itself, in every worker
process of nnU-Net.
"""

import torch
from torch import nn

__all__ = ["DropPath"]


class DropPath(nn.Module):
    """Drops the residual branch of single samples during training and scales the others by 1 / (1 - rate).

    Args:
        rate: Probability of dropping a sample's branch, in [0, 1).

    Raises:
        ValueError: If ``rate`` lies outside [0, 1).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"the drop path rate is {rate}, but must lie in [0, 1)")
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ...) -> (B, ...)."""
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask / keep

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"rate={self.rate:.3f}"
