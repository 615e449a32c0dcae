"""Cross entropy alone, on nnU-Net's targets: label maps or regions, with or without an ignore label.

nnU-Net's own losses without their Dice part would do but for patches in which all is to be ignored: there they give no
tensor, or not a number. Here the loss is 0 then, and so are the gradients.
"""

import torch
from torch import nn
from torch.nn import functional

__all__ = ["LabelCrossEntropy", "RegionCrossEntropy"]


class LabelCrossEntropy(nn.Module):
    """Cross entropy between classes, averaged over all pixels that are not ignored.

    Args:
        ignore_label: Label of the pixels to leave out, or None.
    """

    def __init__(self, ignore_label: int | None = None) -> None:
        super().__init__()
        self.ignore_label = ignore_label

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """(B, K, ...) and labels (B, 1, ...) of any type -> mean, without axes."""
        labels = target[:, 0].long()
        if self.ignore_label is None:
            return functional.cross_entropy(logits, labels)
        total = functional.cross_entropy(logits, labels, ignore_index=self.ignore_label, reduction="sum")
        return total / (labels != self.ignore_label).sum().clamp(min=1)


class RegionCrossEntropy(nn.Module):
    """Binary cross entropy of every region, averaged over regions and all pixels that are not ignored.

    Args:
        ignore: Whether the target's last channel marks the pixels to leave out.
    """

    def __init__(self, ignore: bool = False) -> None:
        super().__init__()
        self.ignore = ignore

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """(B, K, ...) and (B, K, ...) or (B, K + 1, ...) in {0, 1} of any type -> mean, without axes."""
        if not self.ignore:
            return functional.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))
        regions, seen = target[:, :-1].to(logits.dtype), target[:, -1:] == 0
        losses = functional.binary_cross_entropy_with_logits(logits, regions, reduction="none")
        return losses.where(seen, 0).sum() / (logits.shape[1] * seen.sum()).clamp(min=1)
