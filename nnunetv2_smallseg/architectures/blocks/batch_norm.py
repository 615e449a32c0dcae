"""Batch normalisation that survives a single value per channel."""

import torch
from torch import nn

__all__ = ["GuardedBatchNorm2d"]


class GuardedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that uses its running statistics where a batch gives it one value per channel only.

    That happens in training with batch size 1 on globally pooled or very small maps; PyTorch raises an error then,
    because one value has no variance. The running statistics are left as they are in that case. The state dict is
    that of ``nn.BatchNorm2d``, and conversion to ``SyncBatchNorm`` works, which sees the values of all processes.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        return super().forward(x)
