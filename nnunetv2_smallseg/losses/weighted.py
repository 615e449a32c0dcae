"""nnU-Net's losses with a weight for each sample.

Dice and cross-entropy (labels) or Dice and binary cross-entropy (regions), with ignore label, with Dice over the batch
or over samples, alone or under nnU-Net's deep supervision, on one process or several. With all weights 1 values and
gradients are, to the last bit, those of nnU-Net's ``DC_and_CE_loss`` and ``DC_and_BCE_loss`` with
``MemoryEfficientSoftDiceLoss`` (2.8). In particular Dice over the batch stays that: a Dice for each sample would be
meaningless on the many slices without lesion.
"""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch.nn import functional

__all__ = ["SampleWeightedLoss", "WeightedDice", "WeightedDiceBCELoss", "WeightedDiceCELoss"]


class _GatherRanks(torch.autograd.Function):
    """Stacks a tensor of all processes; its gradient is the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        """(...) -> (processes, ...)."""
        gathered = [torch.zeros_like(tensor) for _ in range(distributed.get_world_size())]
        distributed.all_gather(gathered, tensor)
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        """(processes, ...) -> (...)."""
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient)
        return gradient[distributed.get_rank()]


def per_sample(weights: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Weights (B,) with as many axes as ``like`` (B, ...)."""
    return weights.view(-1, *[1] * (like.ndim - 1))


def spatial_axes(tensor: torch.Tensor) -> tuple[int, ...]:
    """All axes but batch and channel."""
    return tuple(range(2, tensor.ndim))


class WeightedDice(nn.Module):
    """Negative soft Dice with a weight for each sample.

    Over the batch: -mean over classes of (2·sum w·I + s) / (sum w·(P + G) + s), sums over the samples of all processes.
    Over samples: -mean over samples and classes of w·Dice.

    Args:
        batch_dice: Dice over the batch.
        smooth: s.
        ddp: Gather the samples of all processes, for Dice over the batch.
    """

    def __init__(self, *, batch_dice: bool, smooth: float = 1e-5, ddp: bool = False) -> None:
        super().__init__()
        self.batch_dice = batch_dice
        self.smooth = smooth
        self.ddp = ddp

    def forward(
        self,
        probabilities: torch.Tensor,
        reference: torch.Tensor,
        weights: torch.Tensor,
        valid: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A scalar.

        Args:
            probabilities: (B, C, ...) of the classes that count.
            reference: (B, C, ...) 0 or 1, float32.
            weights: (B,) float32.
            valid: (B, 1, ...) bool, False where nothing is annotated.
        """
        axes = spatial_axes(probabilities)
        intersection, predicted = probabilities * reference, probabilities
        if valid is not None:
            intersection, predicted, reference = intersection * valid, predicted * valid, reference * valid
        sums = [part.sum(axes, dtype=torch.float32) for part in (intersection, predicted, reference)]  # (B, C) each
        if self.batch_dice:
            sums = [part * weights[:, None] for part in sums]
            if self.ddp:
                sums = [_GatherRanks.apply(part).sum(0, dtype=torch.float32) for part in sums]
            sums = [part.sum(0, dtype=torch.float32) for part in sums]  # (C,)
        intersection, predicted, reference = sums
        dice = (2 * intersection + self.smooth) / (reference + predicted + float(self.smooth)).clamp_min(1e-8)
        return -(dice if self.batch_dice else dice * weights[:, None]).mean()


def sample_dice(
    probabilities: torch.Tensor, reference: torch.Tensor, smooth: float, valid: torch.Tensor | None
) -> torch.Tensor:
    """Mean Dice of each sample over the classes its reference holds: (B, C, ...) -> (B,); 0 where it holds none."""
    if valid is not None:
        probabilities, reference = probabilities * valid, reference * valid
    axes = spatial_axes(probabilities)
    present = reference.sum(axes, dtype=torch.float32)
    intersection = (probabilities * reference).sum(axes, dtype=torch.float32)
    predicted = probabilities.sum(axes, dtype=torch.float32)
    dice = (2 * intersection + smooth) / (present + predicted + smooth)
    return (dice * (present > 0)).sum(1) / (present > 0).sum(1).clamp_min(1)


class _WeightedLoss(nn.Module):
    """What the losses for labels and for regions share.

    Attributes:
        dice: The Dice part; may be replaced by its compiled version.
    """

    def __init__(self, dice: WeightedDice, *, weight_ce: float = 1.0, weight_dice: float = 1.0) -> None:
        super().__init__()
        self.dice = dice
        self.smooth = dice.smooth
        self.weight_ce = weight_ce
        self.weight_dice = weight_dice


class WeightedDiceCELoss(_WeightedLoss):
    """Dice and cross-entropy for labels, with a weight for each sample.

    Cross-entropy: sum w·CE over valid voxels by their number in the batch.

    Args:
        dice: The Dice part.
        ignore_label: Label of voxels without annotation.
        background: Whether the background counts in the Dice.
        lesion_labels: Labels that make a sample worth measuring; None for all foreground.
        weight_ce: Factor of the cross-entropy.
        weight_dice: Factor of the Dice.
    """

    def __init__(
        self,
        dice: WeightedDice,
        *,
        ignore_label: int | None = None,
        background: bool = False,
        lesion_labels: tuple[int, ...] | None = None,
        weight_ce: float = 1.0,
        weight_dice: float = 1.0,
    ) -> None:
        super().__init__(dice, weight_ce=weight_ce, weight_dice=weight_dice)
        self.ignore_label = ignore_label
        self.background = background
        self.lesion_labels = lesion_labels
        self.ignore_index = -100 if ignore_label is None else ignore_label

    def _split(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Labels (B, 1, ...) without the ignore label, and where they are valid."""
        if self.ignore_label is None:
            return target, None
        valid = target != self.ignore_label
        return torch.where(valid, target, 0), valid

    def _classes(self, logits: torch.Tensor, labels: torch.Tensor, background: bool) -> tuple[torch.Tensor, ...]:
        """Probabilities and one-hot reference of the classes that count."""
        with torch.no_grad():
            reference = torch.zeros(logits.shape, device=logits.device, dtype=torch.float32)
            reference.scatter_(1, labels.long(), 1)
        first = 0 if background else 1
        return torch.softmax(logits, 1)[:, first:], reference[:, first:]

    def _cross_entropy(self, logits: torch.Tensor, target: torch.Tensor, reduction: str) -> torch.Tensor:
        """Mean over valid voxels, or (B, ...) with 0 where invalid."""
        labels = target[:, 0].long()
        return functional.cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction=reduction)

    def forward(self, logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """A scalar.

        Args:
            logits: (B, C, ...).
            target: (B, 1, ...) labels.
            weights: (B,) float32.
        """
        labels, valid = self._split(target)
        dice = cross_entropy = 0
        if self.weight_dice != 0:
            dice = self.dice(*self._classes(logits, labels, self.background), weights, valid)
        if self.weight_ce != 0 and (valid is None or valid.sum() > 0):
            # nnU-Net's mean, plus what the weights change: exactly nothing when they are 1. (A weighted sum by the
            # number of voxels is the same, but rounds differently.)
            mean = self._cross_entropy(logits, target, "mean")
            each = self._cross_entropy(logits, target, "none")
            number = each.numel() if valid is None else valid.sum()
            cross_entropy = mean + (per_sample(weights - 1, each) * each).sum() / number
        return self.weight_ce * cross_entropy + self.weight_dice * dice

    @torch.no_grad()
    def measure(self, logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of each sample by itself, and whether it holds a lesion.

        Args:
            logits: (B, C, ...).
            target: (B, 1, ...) labels.
        Returns:
            (B,) float32: mean cross-entropy over valid voxels + 1 - mean Dice over the foreground classes in the
            sample; (B,) bool.
        """
        labels, valid = self._split(target)
        each = self._cross_entropy(logits.float(), target, "none")
        number = each[0].numel() if valid is None else valid.flatten(1).sum(1).clamp_min(1)
        dice = sample_dice(*self._classes(logits.float(), labels, False), self.smooth, valid)
        if self.lesion_labels is None:
            lesion = labels > 0
        else:
            lesion = torch.stack([labels == label for label in self.lesion_labels]).any(0)
        return each.flatten(1).sum(1) / number + 1 - dice, lesion.flatten(1).any(1)


class WeightedDiceBCELoss(_WeightedLoss):
    """Dice and binary cross-entropy for regions, with a weight for each sample.

    Binary cross-entropy: mean of w·BCE; with an ignore label sum of w·BCE over valid voxels by their number, as in
    nnU-Net, which counts a voxel once however many regions there are.

    Args:
        dice: The Dice part.
        use_ignore_label: The last channel of the target marks voxels without annotation.
        lesion_channels: Regions that make a sample worth measuring; None for all.
        weight_ce: Factor of the binary cross-entropy.
        weight_dice: Factor of the Dice.
    """

    def __init__(
        self,
        dice: WeightedDice,
        *,
        use_ignore_label: bool = False,
        lesion_channels: tuple[int, ...] | None = None,
        weight_ce: float = 1.0,
        weight_dice: float = 1.0,
    ) -> None:
        super().__init__(dice, weight_ce=weight_ce, weight_dice=weight_dice)
        self.use_ignore_label = use_ignore_label
        self.lesion_channels = lesion_channels

    def _split(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Regions (B, R, ...) float32 and where they are valid."""
        if not self.use_ignore_label:
            return target.float(), None
        return target[:, :-1].float(), ~target[:, -1:].bool()

    def forward(self, logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """A scalar.

        Args:
            logits: (B, R, ...).
            target: (B, R, ...) 0 or 1; one more channel with an ignore label.
            weights: (B,) float32.
        """
        reference, valid = self._split(target)
        dice = self.dice(torch.sigmoid(logits), reference, weights, valid)
        each = functional.binary_cross_entropy_with_logits(logits, reference, reduction="none")
        if valid is None:
            # As for labels: nnU-Net's mean, plus what the weights change.
            mean = functional.binary_cross_entropy_with_logits(logits, reference)
            cross_entropy = mean + (per_sample(weights - 1, each) * each).mean()
        else:
            cross_entropy = (each * valid * per_sample(weights, each)).sum() / torch.clip(valid.sum(), min=1e-8)
        return self.weight_ce * cross_entropy + self.weight_dice * dice

    @torch.no_grad()
    def measure(self, logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of each sample by itself, and whether it holds a lesion.

        Args:
            logits: (B, R, ...).
            target: As for ``forward``.
        Returns:
            (B,) float32: mean binary cross-entropy over regions and valid voxels + 1 - mean Dice over the regions in
            the sample; (B,) bool.
        """
        reference, valid = self._split(target)
        logits = logits.float()
        each = functional.binary_cross_entropy_with_logits(logits, reference, reduction="none").mean(1, keepdim=True)
        if valid is not None:
            each, reference = each * valid, reference * valid
        number = each[0].numel() if valid is None else valid.flatten(1).sum(1).clamp_min(1)
        dice = sample_dice(torch.sigmoid(logits), reference, self.smooth, valid)
        lesion = reference if self.lesion_channels is None else reference[:, list(self.lesion_channels)]
        return each.flatten(1).sum(1) / number + 1 - dice, lesion.flatten(1).any(1)


class SampleWeightedLoss(nn.Module):
    """A loss as nnU-Net's training step calls it, with the weights of the samples set beforehand.

    Args:
        loss: ``WeightedDiceCELoss`` or ``WeightedDiceBCELoss``.
        deep_supervision: nnU-Net's wrapper around ``loss``, or None. It hands every list it gets to the loss, level by
            level, and so the weights too.

    Attributes:
        weights: (B,) weights of the next batch; None for 1 without measuring, as in validation.
        measured: What the last weighted call measured at full resolution: losses (B,) and whether each sample holds a
            lesion (B,).
    """

    def __init__(
        self, loss: WeightedDiceCELoss | WeightedDiceBCELoss, deep_supervision: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.loss = loss
        self.deep_supervision = deep_supervision
        self.weights: torch.Tensor | None = None
        self.measured: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(
        self, outputs: torch.Tensor | list[torch.Tensor], targets: torch.Tensor | list[torch.Tensor]
    ) -> torch.Tensor:
        """A scalar from logits and targets, or from lists of them by falling resolution under deep supervision."""
        finest, target = (outputs, targets) if self.deep_supervision is None else (outputs[0], targets[0])
        weights = self.weights
        if weights is None:
            weights = torch.ones(len(finest), device=finest.device)
        else:
            self.measured = self.loss.measure(finest, target)
        if self.deep_supervision is None:
            return self.loss(outputs, targets, weights)
        return self.deep_supervision(outputs, targets, [weights] * len(outputs))
