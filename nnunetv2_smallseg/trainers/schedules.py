"""Learning-rate schedules as nnU-Net drives them: ``step(epoch)`` once an epoch, before its first iteration."""

import math

from torch.optim import Optimizer

__all__ = ["CosineSchedule", "FreezingSchedule"]


class CosineSchedule:
    """Cosine annealing without warm-up or restarts (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5).

    Args:
        optimizer: Its groups all get the same rate.
        initial_lr: Rate of epoch 0.
        min_lr: Rate the cosine ends at, reached after ``num_epochs``.
        num_epochs: Length of the training in epochs.
    """

    def __init__(self, optimizer: Optimizer, initial_lr: float, min_lr: float, num_epochs: int) -> None:
        self.optimizer = optimizer
        self.initial_lr = initial_lr
        self.min_lr = min_lr
        self.num_epochs = num_epochs

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0; the minimum after the last."""
        progress = min(epoch / self.num_epochs, 1.0)
        return self.min_lr + (self.initial_lr - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2

    def step(self, epoch: int) -> None:
        """Sets the rate of ``epoch`` in all parameter groups."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(epoch)


class FreezingSchedule(CosineSchedule):
    """The rates of SvANet's released code: a short cycle while the encoder is frozen, then a long one.

    Over 100 epochs: the minimum; five epochs of linear warm-up from a tenth of the peak; a cosine of ten epochs that is
    cut off by the end of the freezing; the minimum again; five epochs of warm-up; a cosine over all epochs. The code
    sets a rate at the end of the epoch before, which shifts the cosines by one epoch and leaves the two single epochs
    at the minimum.

    A training of another length stretches that in proportion: an epoch has the rate of that one of the 100 epochs in
    which its middle falls. With 1000 epochs each rate lasts ten; with few the single epochs at the minimum vanish.

    Args:
        optimizer: Its groups all get the same rate.
        initial_lr: Peak of the rate.
        min_lr: Rate of the cosines' ends.
        num_epochs: Length of the training in epochs.
    """

    published_epochs = 100
    frozen_epochs = 10
    warm_up_epochs = 5
    warm_up_start = 0.1

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0; the last one's after the last."""
        twice_the_middle = 2 * min(epoch, self.num_epochs - 1) + 1
        return self._published_rate(twice_the_middle * self.published_epochs // (2 * self.num_epochs))

    def _published_rate(self, epoch: int) -> float:
        """Rate of one of the 100 epochs of the released code."""
        frozen = epoch < self.frozen_epochs
        if epoch in (0, self.frozen_epochs):
            return self.min_lr
        # The first warm-up reaches the peak one epoch too late to show it, the second one does.
        warm_up = epoch - 1 if frozen else epoch - self.frozen_epochs
        if warm_up < self.warm_up_epochs or (not frozen and warm_up == self.warm_up_epochs):
            start = self.warm_up_start * self.initial_lr
            return start + (self.initial_lr - start) * warm_up / self.warm_up_epochs
        period = self.frozen_epochs if frozen else self.published_epochs
        return self.min_lr + (self.initial_lr - self.min_lr) * (1 + math.cos(math.pi * (epoch - 1) / period)) / 2
